"""``model-card.md``: what a compression made, from what, in which steps, and what each of them bought, for people to read.

Everything in it stands in ``model.json`` (provenance), ``compression.json`` (the table) and ``pipeline.json`` too.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sslim import __version__
from sslim.data.corpus import Corpus
from sslim.models import SpeechModel
from sslim.nn.encoder import EncoderConfig
from sslim.profiling.profile import ZEROS_NOTE
from sslim.storage import write_text_atomically

CARD = "model-card.md"
SHORT = 12  # digits of a digest
LONG = 200  # letters of a value, after which it is left to model.json
ABOUT = {
    "import": "read from a foreign checkpoint",
    "set statistics": "given the mean and standard deviation of its features",
    "pretrain": "trained by masked prediction of labels",
    "supernet": "trained as a supernet",
    "extract": "cut out of a supernet",
    "distil": "trained to give what a teacher gives",
    "heads": "attention heads taken out",
    "rows": "feed-forward units taken out",
    "width": "attention heads and feed-forward units taken out",
    "depth": "layers left out",
    "sharing": "layers folded into blocks that run several times",
    "low-rank": "matrices factorised",
    "weights": "single weights set to zero",
    "gates": "what learnt gates had closed taken out",
    "quantize": "weights stored in fewer bits",
}
COLUMNS = (
    ("parameters", "num_parameters", 1.0, "{:,.0f}"),
    ("not zero", "num_nonzero", 1.0, "{:,.0f}"),
    ("GMAC / s", "macs_per_s", 1e9, "{:.4f}"),
    ("MB", "num_bytes", 1e6, "{:.3f}"),
    ("ms", "latency_ms", 1.0, "{:.2f}"),
)


def write_model_card(
    output: Path, model: SpeechModel, rows: Sequence[Mapping[str, Any]], source: Mapping[str, str], corpus_folder: Path | None
) -> None:
    """Writes ``model-card.md`` of a compression.

    Args:
        output: Its folder.
        model: The result.
        rows: Those of its table, the first of the whole model.
        source: ``name`` and ``digest`` of the model that was compressed.
        corpus_folder: The corpus that was looked at or trained on, if any.
    """
    corpus = None if corpus_folder is None else Corpus.open(corpus_folder)
    write_text_atomically(output / CARD, model_card(output.resolve().name, model, rows, source, corpus))


def model_card(
    name: str, model: SpeechModel, rows: Sequence[Mapping[str, Any]], source: Mapping[str, str], corpus: Corpus | None
) -> str:
    """Returns the text of a model card, see :func:`write_model_card`."""
    encoder, (whole, result) = model.config.encoder, (rows[0], rows[-1])
    num_blocks = len(set(encoder.depth_map)) if isinstance(encoder, EncoderConfig) else encoder.num_layers
    blocks = f" from {num_blocks} blocks" if num_blocks < encoder.num_layers else ""
    share = result["num_parameters"] / whole["num_parameters"]
    lines = [
        f"# {name}",
        "",
        f"A {model.config.family} model of {encoder.num_layers} layers{blocks}, {encoder.dim} wide: "
        f"{result['num_parameters']:,} parameters without heads, {share:.2f} of the {whole['num_parameters']:,} of the model "
        "that it was made from.",
        "",
        "## Before and after",
        "",
        *_table(rows),
        "",
        "## What was done",
        "",
        "From the first step to the last:",
        "",
        *(f"{number}. {_step(entry)}" for number, entry in enumerate(model.provenance, 1)),
        "",
        "## Made from",
        "",
        f"- Model: `{source['name']}` (digest {source['digest'][:SHORT]})",
        f"- Speech: {_speech(corpus)}",
        "",
        "## Notes",
        "",
        *(f"- {note}" for note in _notes(model, rows)),
        "",
        "## Use",
        "",
        "```python",
        "import sslim",
        "",
        'model = sslim.load_model("model")  # the folder beside this file',
        "output = model.encode(waveform_BS, lengths_B)" if model.frontend else "output = model.encode_features(features_BTF)",
        "```",
        "",
        f"Made with sslim {__version__}, torch {torch.__version__}, Python {platform.python_version()}. All settings: "
        "`pipeline.json`; every part that was removed: `model/model.json`; the table: `compression.json`.",
    ]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for every row; each figure beside the whole model's."""
    columns = [column for column in COLUMNS if any(row.get(column[1]) is not None for row in rows)]
    titles = ["", *(title for title, *_ in columns), "layers", "heads", "units"]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for row in rows:
        cells = [_figure(row, rows[0], *column[1:]) for column in columns]
        sizes = [" ".join(map(str, dict.fromkeys(row[key]))) or "0" for key in ("heads", "feedforward")]
        lines.append(f"| {' | '.join([row['name'], *cells, str(row['num_layers']), *sizes])} |")
    return lines


def _figure(row: Mapping[str, Any], whole: Mapping[str, Any], key: str, unit: float, form: str) -> str:
    value, before = row.get(key), whole.get(key)
    if value is None:
        return "-"
    told = form.format(value / unit)
    return f"{told} ({value / before:.2f})" if before and row is not whole else told


def _step(entry: Mapping[str, Any]) -> str:
    """One entry of the provenance in a line: what it is, and its settings that are short."""
    kind = "action" if "action" in entry else "step"
    name = str(entry[kind])
    about = f": {ABOUT[name]}" if name in ABOUT else ""
    settings = ", ".join(text for key, value in entry.items() if key != kind and (text := _setting(key, value)))
    return f"**{name}**{about}{f' ({settings})' if settings else ''}"


def _setting(key: str, value: Any) -> str:
    """A setting in words; empty for nothing, and for long lists."""
    if key == "teacher" and isinstance(value, Mapping):
        return f"teacher `{value.get('name')}` (digest {str(value.get('digest'))[:SHORT]})"
    if key == "calibration" and isinstance(value, Mapping):
        labels = f" with labels {value['labels']}" if value.get("labels") else ""
        return f"scored on {value.get('num_utterances')} utterances of {value.get('corpus')}{labels}"
    if value is None or value is False or isinstance(value, list | tuple | dict) or len(str(value)) > LONG:
        return ""
    words = key.replace("_", " ")
    return words if value is True else f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}"


def _speech(corpus: Corpus | None) -> str:
    if corpus is None:
        return "none was looked at"
    hours = corpus.duration_s() / 3600
    return f"corpus {corpus.name}, {len(corpus):,} utterances, {hours:.2f} h (digest {corpus.digest[:SHORT]})"


def _notes(model: SpeechModel, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = ["A frame's features do not depend on what an utterance is batched with."]
    notes += [f"{row['name']}: {row['budget']['told']}." for row in rows if row.get("budget")]
    if rows[-1]["pruned_weights"]:
        notes.append(f"{ZEROS_NOTE[0].upper()}{ZEROS_NOTE[1:]}.")
    if model.config.storage is not None:
        notes.append(f"Weights are stored as {model.config.storage}: the model can be neither cut nor trained any more.")
    frontend = model.frontend
    normalization = getattr(model.config.frontend, "normalization", None)
    if normalization is not None and normalization.kind == "global":
        source = getattr(frontend, "statistics_source", None)
        notes.append(
            "The model brings no mean and standard deviation of its features: give it some with `sslim import --statistics`."
            if source is None
            else f"Features are normalised with the mean and standard deviation of {source}."
        )
    if getattr(model.config.frontend, "compat", None) is not None:
        notes[0] = "The front-end treats padding as the reference does: features depend on what an utterance is batched with."
    if model.frontend is None:
        notes.append("The model takes features, not waveforms.")
    return notes
