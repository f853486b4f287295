"""What every round of a compression bought: parameters, zeros, MACs, bytes; the rows of ``compression.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from sslim import __version__
from sslim.compress.weights import STEP as WEIGHTS
from sslim.config import read_json
from sslim.models import SpeechModel
from sslim.models.storage import stored_state
from sslim.nn.encoder import EncoderConfig
from sslim.profiling import Conditions, count_macs
from sslim.profiling.measure import nonzero_parameters, zero_share
from sslim.profiling.profile import SPARSE, ZEROS_NOTE
from sslim.storage import write_json

TABLE = "compression.json"


def has_pruned_weights(model: SpeechModel) -> bool:
    """Whether single weights are zero because they were pruned, here or (as far as it shows) elsewhere."""
    share = zero_share(model)
    return share >= SPARSE or (share > 0 and any(entry.get("step") == WEIGHTS for entry in model.provenance))


def outcome(before: SpeechModel, after: SpeechModel) -> str:
    """Returns what a round did to a model's parameters, heads left out, in a sentence."""
    counts = [model.num_parameters(with_heads=False) for model in (before, after)]
    told = f"{counts[0]:,} parameters before, {counts[1]:,} after"
    if not has_pruned_weights(after):
        return told
    return f"{told}, {counts[1] - nonzero_parameters(after):,} of them zero; {ZEROS_NOTE}"


def row_of(name: str, model: SpeechModel, conditions: Conditions) -> dict[str, Any]:
    """Returns a row of the table.

    Args:
        name: Of the round.
        model: What it left.
        conditions: Length of audio that MACs hold for.
    """
    config = model.config
    blocks = config.encoder.blocks if isinstance(config.encoder, EncoderConfig) else ()
    macs = None if config.frontend is None else count_macs(config, seconds=conditions.seconds).per_second
    return {
        "name": name,
        "num_parameters": model.num_parameters(with_heads=False),
        "num_nonzero": nonzero_parameters(model),
        "pruned_weights": has_pruned_weights(model),
        "macs_per_s": macs,
        "num_bytes": sum(tensor.numel() * tensor.element_size() for tensor in stored_state(model).values()),
        "num_layers": config.encoder.num_layers,
        "heads": [block.num_heads for block in blocks],
        "feedforward": [block.feedforward_dim for block in blocks],
    }


def write_table(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes ``compression.json``; the first row is the whole model's.

    A row that met a budget also has ``budget`` (what was asked for, what was reached, both in words), and for one of latency
    ``latency_ms``, as does the whole model.
    """
    write_json(folder / TABLE, {"format_version": 1, "sslim": __version__, "rows": list(rows)})


def printed_table(folder: Path) -> Table:
    """Returns ``compression.json`` of a folder as a table to print, every row beside the whole model."""
    rows = read_json(folder / TABLE)["rows"]
    whole = rows[0]
    timed = any("latency_ms" in row for row in rows)
    notes = [f"{row['name']}: {row['budget']['told']}" for row in rows if "budget" in row]
    notes += [ZEROS_NOTE] if any(row["pruned_weights"] for row in rows) else []
    table = Table(caption="\n".join(notes) or None)
    for name in ("", "parameters", "not zero", "GMAC / s", "MB", *(["ms"] * timed), "layers", "heads", "units"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        table.add_row(
            row["name"],
            _beside(row, whole, "num_parameters", 1e6, " M"),
            _beside(row, whole, "num_nonzero", 1e6, " M"),
            _beside(row, whole, "macs_per_s", 1e9),
            _beside(row, whole, "num_bytes", 1e6),
            *([_beside(row, whole, "latency_ms", 1.0)] * timed),
            str(row["num_layers"]),
            _range(row["heads"]),
            _range(row["feedforward"]),
        )
    return table


def _beside(row: dict[str, Any], whole: dict[str, Any], key: str, unit: float, name: str = "") -> str:
    value, before = row.get(key), whole.get(key)
    if value is None:
        return "-"
    text = f"{value / unit:.3f}{name}"
    return f"{text} ({value / before:.2f})" if before and row is not whole else text


def _range(values: list[int]) -> str:
    least, most = min(values, default=0), max(values, default=0)
    return str(most) if least == most else f"{least}-{most}"
