"""Profiles: what models cost as a table, and the speed-up that MACs promise against the one that was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslim.config import read_json
from sslim.report import figures
from sslim.report.labels import place_names, set_log_axis, whisker
from sslim.report.markup import Markup, details, element, join, number, table
from sslim.report.palette import PAGE, PRINT, Palette, printed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sslim.profiling import Conditions
    from sslim.profiling.profile import Profile, ProfileRow

KIND = "profile"
MARGIN = 1.12  # of the axes, beyond the outermost values
LEAST_SPAN = 1.5  # axes cover at least this ratio: a machine's noise must not look like a difference
COLUMNS = 3  # panels beside each other on paper


def is_profile(path: Path) -> bool:
    """Whether a file is a result of ``sslim profile``, of whatever version."""
    if path.suffix != ".json" or not path.is_file():
        return False
    values = read_json(path)
    return isinstance(values, dict) and values.get("kind") == KIND


def profile_section(profile: Profile, file_name: str, *, name: str) -> Markup:
    """Returns the part of the page for one profile: for all conditions a table and a picture, then MACs by part.

    Args:
        profile: What was measured.
        file_name: Of its file.
        name: Unique on the page.
    """
    from sslim.profiling.profile import describe_conditions
    from sslim.profiling.profile_table import profile_notes

    machine = ", ".join(f"{key}: {value}" for key, value in profile.machine.items())
    parts: list[Any] = [element("h3", f"Profile {file_name}"), element("p", f"{machine}.", class_="muted")]
    pictures = []
    for index, conditions in enumerate(profile.conditions):
        parts.append(_table(profile, conditions))
        if len(profile.models) > 1:
            caption = (
                f"Predicted and measured speed-up over {profile.baseline}, {describe_conditions(conditions)}. Whiskers: "
                "quartiles over rounds. Below the line a model gains less than its MACs promise."
            )
            picture = speedup_picture(profile, conditions, name=f"{name}-speedup{index}")
            pictures.append(element("figure", picture, element("figcaption", caption)))
    parts.append(element("ul", *(element("li", note) for note in profile_notes(profile))))
    parts.append(element("div", *pictures, class_="panels") if pictures else None)
    parts.append(details("MACs by part", *(_macs_table(profile, conditions) for conditions in _lengths(profile))))
    return join(parts)


def _table(profile: Profile, conditions: Conditions) -> Markup:
    from sslim.profiling.profile import describe_conditions

    sparse, rows = bool(profile.sparse_models), []
    for row in profile.rows_at(conditions):
        model = profile.model(row.model)
        cells: list[Any] = [row.model, model.num_parameters]
        cells += [model.nonzero_parameters] if sparse else []
        cells += [round(model.file_bytes / 1e6, 1), round(row.macs_per_second / 1e9, 3), round(row.p50_ms, 1)]
        cells += [round(row.p95_ms, 1), round(row.real_time_factor, 4)]
        cells += [None if row.peak_memory_bytes is None else round(row.peak_memory_bytes / 1e6)]
        is_baseline = row.model == profile.baseline
        rows.append([*cells, round(row.predicted_speedup, 2), None if is_baseline else round(row.measured_speedup, 2)])
    header = ["model", "parameters", *(["not zero"] if sparse else []), "file / MB", "GMAC per s", "p50 / ms", "p95 / ms"]
    header += ["real-time factor", "peak / MB", "predicted speed-up", "measured speed-up"]
    return table(header, rows, caption=f"{describe_conditions(conditions)}; speed-up over {profile.baseline}.")


def _lengths(profile: Profile) -> list[Conditions]:
    """One of the conditions for each length: MACs for each second do not depend on batch and threads."""
    first: dict[float, Conditions] = {}
    for conditions in profile.conditions:
        first.setdefault(conditions.seconds, conditions)
    return list(first.values())


def _macs_table(profile: Profile, conditions: Conditions) -> Markup:
    rows = profile.rows_at(conditions)
    groups = list(dict.fromkeys(group for row in rows for group in row.macs_by_group))
    audio_s = conditions.batch * conditions.seconds
    cells = [[row.model, *(number(row.macs_by_group.get(g, 0) / audio_s / 1e9) for g in groups)] for row in rows]
    caption = f"GMAC for each second of speech, in utterances of {conditions.seconds:g} s."
    return table(["model", *groups], cells, caption=caption)


def speedup_picture(profile: Profile, conditions: Conditions, *, name: str) -> Markup:
    """Returns predicted and measured speed-up under one set of conditions as inline SVG.

    Args:
        profile: What was measured.
        conditions: Which rows.
        name: Unique on the page.
    """
    title = _title(profile, conditions)
    with figures.drawing(4.9, 4.9) as figure:
        draw_speedups(figure.subplots(), profile, conditions, PAGE, title)
        return figures.inline_svg(figure, name, f"predicted and measured speed-up: {title}")


def save_speedups(profile: Profile, path: Path) -> None:
    """Writes predicted and measured speed-up for paper, a panel for each set of conditions.

    Args:
        profile: What was measured.
        path: Where to; the ending (.png, .svg, .pdf) decides the kind.

    Raises:
        ValueError: There is no model beside the baseline.
    """
    if len(profile.models) < 2:
        raise ValueError(f"the profile holds {profile.baseline} alone: a speed-up needs a model beside the baseline")
    every = profile.conditions
    columns = min(COLUMNS, len(every))
    lines = -(-len(every) // columns)
    with printed(path, 5.4 * columns if columns > 1 else 5.8, 5.4 * lines + 0.3) as figure:
        panels = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
        for axes in panels[len(every) :]:
            axes.set_visible(False)
        for number, (axes, conditions) in enumerate(zip(panels, every, strict=False)):
            draw_speedups(axes, profile, conditions, PRINT, _title(profile, conditions))
            if number % columns:
                axes.set_ylabel("")


def _title(profile: Profile, conditions: Conditions) -> str:
    from sslim.profiling.profile import describe_conditions

    on_gpu = conditions.device.startswith("cuda")
    machine = profile.machine.get("gpu" if on_gpu else "processor", "unknown machine")
    return f"{machine}: {describe_conditions(conditions)}"


def draw_speedups(axes: Axes, profile: Profile, conditions: Conditions, palette: Palette, title: str) -> None:
    """Draws predicted (x) and measured (y) speed-up, with the diagonal where both are the same.

    Args:
        axes: Where.
        profile: What was measured.
        conditions: Which rows.
        palette: Colours.
        title: Machine, seconds, threads.
    """
    rows = profile.rows_at(conditions)
    low, high = _limits(rows)
    axes.set_aspect("equal", adjustable="box")
    for axis in (axes.xaxis, axes.yaxis):
        set_log_axis(axis, low, high)
    axes.grid(visible=True, axis="both")
    axes.plot([low, high], [low, high], color=palette.muted, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axes.set_title(figures.plain_text(title), fontsize=10)
    axes.set_xlabel("predicted speed-up: ratio of MACs")
    axes.set_ylabel("measured speed-up: ratio of latencies")
    colours = []
    for row in rows:
        is_baseline = row.model == profile.baseline
        colours.append(palette.muted if is_baseline else palette.front)
        x, y, (first, third) = row.predicted_speedup, row.measured_speedup, row.speedup_quartiles
        spread = None if is_baseline else [[max(0.0, y - first)], [max(0.0, third - y)]]
        axes.errorbar(x, y, yerr=spread, fmt="D" if is_baseline else "o", color=colours[-1], markersize=5.5, capsize=2.5)
    _write_on_diagonal(axes, low, high, palette)
    diagonal = [low * (high / low) ** (i / 60) for i in range(61)]
    whiskers = [point for row in rows for point in whisker(row.predicted_speedup, *row.speedup_quartiles)]
    place_names(
        axes,
        [(row.predicted_speedup, row.measured_speedup) for row in rows],
        [row.model for row in rows],
        colours=[palette.muted if row.model == profile.baseline else palette.ink for row in rows],
        line_colour=palette.muted,
        avoid=[*zip(diagonal, diagonal, strict=True), *whiskers],
    )


def _write_on_diagonal(axes: Axes, low: float, high: float, palette: Palette) -> None:
    """Says what the diagonal is, above its upper end, where a model that is faster than promised would be."""
    place = low * (high / low) ** 0.86
    words = {"rotation": 45, "rotation_mode": "anchor", "ha": "center", "va": "bottom"}
    note = axes.annotate("as predicted", (place, place), xytext=(-2, 2), textcoords="offset points", **words)  # type: ignore[arg-type]
    note.set(fontsize=8.5, color=palette.muted)


def _limits(rows: list[ProfileRow]) -> tuple[float, float]:
    values = [v for row in rows for v in (row.predicted_speedup, row.measured_speedup, *row.speedup_quartiles)]
    low, high = min(values) / MARGIN, max(values) * MARGIN
    if high / low < LEAST_SPAN:
        grow = (LEAST_SPAN * low / high) ** 0.5
        low, high = low / grow, high * grow
    return low, high
