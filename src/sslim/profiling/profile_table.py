"""A profile as tables to print: one for each set of conditions, within 120 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sslim.profiling.latency import Conditions
from sslim.profiling.profile import ZEROS_NOTE, Profile, ProfiledModel, ProfileRow, describe_conditions

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 120  # characters that a table needs at most
COLUMNS = ("params\nM", "nonzero\nM", "file\nMB", "GMAC\nper s", "p50\nms", "p95\nms", "RTF", "peak\nMB", "predicted\nspeed-up")
MEASURED = "measured\nspeed-up (quartiles)"


def profile_table(profile: Profile, conditions: Conditions) -> Table:
    """Returns the rows of one set of conditions as a table to print; MB are 10^6 bytes."""
    from rich import box
    from rich.table import Table

    rows = profile.rows_at(conditions)
    table = Table(
        title=f"{describe_conditions(conditions)}; {profile.machine.get('processor', 'unknown processor')}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    shown = [name for name in COLUMNS if name != COLUMNS[1] or profile.sparse_models]
    table.add_column("model", overflow="fold")
    for name in (*shown, MEASURED):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        model = profile.model(row.model)
        cells = dict(zip(COLUMNS, _cells(model, row), strict=True))
        is_baseline = row.model == profile.baseline
        low, high = row.speedup_quartiles
        measured = "baseline" if is_baseline else f"{row.measured_speedup:.2f} ({low:.2f}-{high:.2f})"
        table.add_row(row.model, *(cells[name] for name in shown), measured)
    return table


def _cells(model: ProfiledModel, row: ProfileRow) -> list[str]:
    peak = "-" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e6:.0f}"
    return [
        f"{model.num_parameters / 1e6:.2f}",
        f"{model.nonzero_parameters / 1e6:.2f}",
        f"{model.file_bytes / 1e6:.1f}",
        f"{row.macs_per_second / 1e9:.3f}",
        f"{row.p50_ms:.1f}",
        f"{row.p95_ms:.1f}",
        f"{row.real_time_factor:.4f}",
        peak,
        f"{row.predicted_speedup:.2f}",
    ]


def profile_notes(profile: Profile) -> list[str]:
    """Returns what a reader needs to know beside the figures, one sentence each."""
    counts = sorted({len(row.times_ms) for row in profile.rows})
    sparse = [(model.name, f"{100 * model.zero_share:.0f} % of its weights are zeros") for model in profile.sparse_models]
    return [
        f"latency: p50 and p95 over {counts[0]} rounds, all models in turns in one process, warm-up left out; "
        "RTF: p50 by seconds of audio",
        f"speed-up over {profile.baseline}: predicted by the ratio of MACs; measured by the ratio of latencies within a round, "
        "median and quartiles over rounds",
        *([profile.memory_includes] if profile.memory_includes else []),
        *(f"{name}: {zeros}; {ZEROS_NOTE}" for name, zeros in sparse),
    ]
