"""The result card: everything a reader needs to judge a table of probe results, as one JSON file and as a printed table."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sslim.config import read_json, to_plain
from sslim.profiling.measure import macs_at
from sslim.storage import write_json

if TYPE_CHECKING:
    from rich.table import Table

    from sslim.data.corpus import Corpus
    from sslim.probes.evaluate import NamedModel, Outcome, ProbeConfig
    from sslim.probes.features import Representation
    from sslim.probes.protocol import Groups, Parts
    from sslim.probes.tasks import Task

FORMAT_VERSION = 1
SHARE_DIGITS = 4  # of accuracies: 0.01 %
WEIGHT_DIGITS = 4
MACS_SECONDS = 10.0  # length of the utterances that a row's MACs are for


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _rounded(values: Any, digits: int = SHARE_DIGITS) -> list[float]:
    return [round(float(value), digits) for value in values]


def build_row(
    source: NamedModel | None, representation: Representation, layer: str, outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """Returns one row: a score for each seed (the mean over folds), their mean and standard deviation, and what was chosen.

    Args:
        source: The model, its path and digest; None for baselines.
        representation: What was probed.
        layer: ``mix``, a number, or ``-`` for features.
        outcomes: One for each seed.
    """
    scores = [float(np.mean(outcome.test)) for outcome in outcomes]
    folds_SK = np.array([outcome.test for outcome in outcomes])
    weights = np.mean([fitted.classifier.layer_weights for outcome in outcomes for fitted in outcome.fitted], axis=0)
    row: dict[str, Any] = {
        "name": representation.name,
        "kind": representation.kind,
        "model": source.path if source else None,
        "model_digest": source.digest if source else None,
        "num_parameters": representation.num_parameters,
        "macs_per_second": macs_at(source.model.config, MACS_SECONDS).total / MACS_SECONDS if source else None,
        "macs_seconds": MACS_SECONDS if source else None,
        "frame_period_s": representation.frame_shift_s,
        "layer": layer,
        "scores": _rounded(scores),
        "mean": round(float(np.mean(scores)), SHARE_DIGITS),
        "sd": round(spread(scores), SHARE_DIGITS),
        "n": len(scores),
        "dev_scores": _rounded(np.mean([fitted.dev_accuracy for fitted in outcome.fitted]) for outcome in outcomes),
        "layer_weights": _rounded(weights, WEIGHT_DIGITS),
        "chosen": [{"seed": outcome.seed, "folds": [fitted.chosen for fitted in outcome.fitted]} for outcome in outcomes],
    }
    if folds_SK.shape[1] > 1:
        row["fold_scores"] = [_rounded(folds) for folds in folds_SK]
        row["fold_sd"] = round(spread(folds_SK.mean(0).tolist()), SHARE_DIGITS)
    return row


def build_card(
    corpus: Corpus,
    task: Task,
    division: Parts | Groups,
    config: ProbeConfig,
    rows: list[dict[str, Any]],
    *,
    chance: float,
    left_out: dict[str, int],
) -> dict[str, Any]:
    """Returns the card as plain JSON values.

    Args:
        corpus: Where utterances came from.
        task: What was asked.
        division: Which utterances trained, chose, tested.
        config: Everything that was asked for.
        rows: From :func:`build_row`.
        chance: Accuracy of the most frequent training class.
        left_out: Utterances that took no part, by reason.
    """
    from importlib.metadata import version

    from sslim.probes.protocol import Parts

    if isinstance(division, Parts):
        sizes: dict[str, Any] = {name: len(getattr(division, name)) for name in ("train", "dev", "test")}
    else:
        sizes = dict(zip(division.names, map(len, division.members), strict=True))
    return {
        "format_version": FORMAT_VERSION,
        "task": task.name,
        "unit": task.unit,
        "metric": "accuracy",
        "classes": list(task.classes),
        "chance": round(chance, SHARE_DIGITS),
        "protocol": {
            "split": division.description,
            "utterances": sizes,
            "classifier": classifier_name(config),
            "pooling": config.pooling if task.unit == "utterance" else None,
            "choices": "on dev only; test scored once",
            **_special(config),
            "labels": "shuffled (a control)" if config.shuffle_labels else "as in the manifest",
        },
        "config": to_plain(config),
        "corpus": {"name": corpus.name, "path": str(corpus.path), "digest": corpus.digest, "num_utterances": len(corpus)},
        "left_out": left_out,
        "num_quarantined": left_out["quarantined"],
        "seeds": list(range(config.num_seeds)),
        "rows": rows,
        "sslim_version": version("sslim"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def classifier_name(config: ProbeConfig) -> str:
    """Returns what classifies, in words."""
    if config.hidden_dim is not None:
        return f"one hidden layer of {config.hidden_dim}"
    return f"linear over {2 * config.context + 1} frames" if config.context else "linear"


def _special(config: ProbeConfig) -> dict[str, str]:
    """What is out of the ordinary, for the card's protocol."""
    told = {}
    if config.published is not None:
        from sslim.probes.published import NOT_REPRODUCED, REPRODUCED

        told["reproduces"] = f"{REPRODUCED}; {config.published.num_steps:,} steps"
        told["not_reproduced"] = NOT_REPRODUCED
    if config.fine_tuning is not None:
        rates = ", ".join(f"{rate:g}" for rate in config.fine_tuning.learning_rates)
        told["models"] = (
            f"trained with the classifier for up to {config.fine_tuning.max_epochs} epochs, the model at a learning rate of "
            f"{rates}, the classifier at {config.fine_tuning.head_learning_rate:g}; features of other rows are as they are"
        )
    return told


def write_card(card: dict[str, Any], path: str | Path) -> None:
    """Writes a card; parent folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, card)


def read_card(path: str | Path) -> dict[str, Any]:
    """Reads a card.

    Raises:
        ValueError: The file is no result card of a version that this sslim knows.
    """
    card = read_json(path)
    if not isinstance(card, dict) or "rows" not in card or "task" not in card:
        raise ValueError(f"{path} is not a result card of `sslim probe`")
    if card.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} is a result card of version {card.get('format_version')!r}; this sslim reads {FORMAT_VERSION}"
        )
    return card


def card_table(card: dict[str, Any]) -> Table:
    """Returns the card as a table to print, percentages."""
    from rich.table import Table

    protocol = card["protocol"]
    pooled = f", {protocol['pooling']} pooling" if protocol["pooling"] else ""
    shuffled = "; LABELS SHUFFLED" if card["config"]["shuffle_labels"] else ""
    published = "; protocol of S3PRL v0.1" if "reproduces" in protocol else ""
    seeds, chance = len(card["seeds"]), f"{100 * card['chance']:.1f}"
    table = Table(
        title=f"{card['task']} on {card['corpus']['name']}: {protocol['classifier']}{pooled}",
        caption=f"accuracy in %, mean ± sd over {seeds} seeds; chance {chance}; {protocol['split']}{published}{shuffled}",
    )
    for name in ("features", "parameters", "layer", "dev", "test"):
        table.add_column(name, justify="left" if name == "features" else "right")
    for row in card["rows"]:
        size = f"{row['num_parameters'] / 1e6:.2f} M" if row["num_parameters"] else "-"
        dev = f"{100 * float(np.mean(row['dev_scores'])):.1f}"
        table.add_row(row["name"], size, row["layer"], dev, f"{100 * row['mean']:.1f} ± {100 * row['sd']:.1f}")
    return table
