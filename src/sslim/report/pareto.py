"""Pareto fronts of a search as a picture: what subnets cost against how good they are.

The picture is drawn for paper and README (PNG or SVG by the file's ending), so its colours are the light ones of the HTML page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sslim.compress.pareto import pareto_front
from sslim.config import read_json

SEARCH = "search.json"
INK, MUTED, LINE, PAPER, FRONT, CHOSEN = "#1d1f21", "#64696f", "#dcdcd4", "#fdfdfb", "#1f5fa8", "#c8551b"
LABELS = {
    "loss": "validation loss of the subnet",
    "accuracy": "probe accuracy / %",
    "params": "parameters / million",
    "macs": "MACs / billion per second of audio",
    "latency_ms": "predicted latency / ms",
    "measured_ms": "measured latency / ms",
}
SCALES = {"params": 1e-6, "macs": 1e-9, "accuracy": 100.0}
STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.facecolor": PAPER,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "sslim",
}


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """One subnet of a search.

    Attributes:
        values: ``loss``, costs (``params``, ``macs``, ``latency_ms``), ``measured_ms``, ``accuracy``: what is known.
        name: Of an extracted or named subnet, ``front-1``; None for the others.
        on_front: Whether nothing beats it in loss and in the search's costs.
        sd: Standard deviation of the accuracy over seeds; None where unknown.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    name: str | None = None
    on_front: bool = False
    sd: float | None = None


def read_points(folder: Path) -> list[FrontPoint]:
    """Reads the subnets that ``sslim compress search`` left in a folder.

    Raises:
        ValueError: The folder holds no finished search.
    """
    path = folder / SEARCH
    values = read_json(path) if path.is_file() else None
    if not isinstance(values, dict) or "candidates" not in values:
        raise ValueError(f"{folder} holds no finished search: it has no {SEARCH} of `sslim compress search`")
    points = []
    for row in values["candidates"]:
        numbers = {"loss": row["loss"], "measured_ms": row.get("measured_ms"), **row["costs"]}
        known = {name: float(number) for name, number in numbers.items() if number is not None}
        points.append(FrontPoint(values=known, name=row.get("name"), on_front=bool(row["on_front"])))
    return points


def with_accuracies(points: Sequence[FrontPoint], cards: Sequence[Mapping[str, Any]]) -> list[FrontPoint]:
    """Adds probe accuracies to the subnets that cards name (a row's name is the model's folder, ``front-1``).

    Args:
        points: Of the search.
        cards: Result cards of ``sslim probe``, all of one task.

    Raises:
        ValueError: Cards of different tasks or metrics, or none that names a subnet.
    """
    if len(tasks := sorted({f"{card['task']} ({card['metric']})" for card in cards})) > 1:
        raise ValueError(f"the cards are of different tasks, which do not fit on one axis: {', '.join(tasks)}")
    rows = {row["name"]: row for card in cards for row in card["rows"] if row["model"] is not None}
    found = []
    for point in points:
        row = rows.get(point.name)
        if row is not None:
            point = replace(point, values={**point.values, "accuracy": float(row["mean"])}, sd=float(row["sd"]))
        found.append(point)
    if not any("accuracy" in point.values for point in found):
        names = ", ".join(sorted(rows)) or "none"
        raise ValueError(f"no card names a subnet of this search; the cards have {names}, the subnets are called front-1, ...")
    return found


def draw_front(points: Sequence[FrontPoint], path: Path, *, y: str = "loss", x: str = "params", title: str = "") -> None:
    """Draws subnets by cost and quality; the front as a line, named subnets with their names.

    Args:
        points: Subnets; those without a finite x or y are left out.
        path: Where to write; the ending (.png, .svg, .pdf) decides the kind.
        y: ``loss``, ``accuracy`` or a cost.
        x: A cost.
        title: Above the picture.

    Raises:
        ValueError: No point has both values.
    """
    import matplotlib
    from matplotlib.figure import Figure

    known = [p for p in points if all(math.isfinite(p.values.get(axis, math.nan)) for axis in (x, y))]
    if not known:
        raise ValueError(f"no subnet has both {x} and {y} to draw")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        others = [p for p in known if not p.on_front and p.name is None]
        front = sorted((p for p in known if p.on_front), key=lambda p: p.values[x])
        named = [p for p in known if p.name is not None]
        if others:
            axes.plot(*_columns(others, x, y), "o", color=MUTED, alpha=0.35, markersize=3.5, linewidth=0, label="evaluated")
        if front:
            axes.plot(*_columns(front, x, y), "o", color=FRONT, markersize=4.5, label="" if y == "loss" else "Pareto front")
        if front and y == "loss":  # only there is the front the best of each cost
            steps: Any = {"drawstyle": "steps-post", "linewidth": 1.4, "label": "Pareto front"}
            axes.plot(*_columns(staircase(front, x, y), x, y), "o-", color=FRONT, markersize=4.5, **steps)
        if named:
            spread = [SCALES.get(y, 1.0) * (p.sd or 0.0) for p in named] if y == "accuracy" else None
            axes.errorbar(
                *_columns(named, x, y), yerr=spread, fmt="D", color=CHOSEN, markersize=5.5, capsize=3, label="extracted"
            )
            label: Any = {"xytext": (6, 5), "textcoords": "offset points", "fontsize": 8.5}
            if y == "loss":  # cheaper and better than the front is nothing: there names cover no point
                label |= {"xytext": (-6, -11), "horizontalalignment": "right"}
            for point in named:
                (across,), (up,) = _columns([point], x, y)
                axes.annotate(point.name or "", (across, up), **label)
        axes.set_xlabel(LABELS.get(x, x))
        axes.set_ylabel(LABELS.get(y, y))
        axes.margins(x=0.1, y=0.1)
        if title:
            axes.set_title(title, loc="left", fontsize=11)
        axes.legend(loc="best")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def staircase(points: Sequence[FrontPoint], x: str, y: str) -> list[FrontPoint]:
    """Returns the points that none beats in both x and y, by rising x; of a front of several costs these may be few."""
    return [points[i] for i in pareto_front([(point.values[x], point.values[y]) for point in points])]


def _columns(points: Sequence[FrontPoint], x: str, y: str) -> tuple[list[float], list[float]]:
    return (
        [SCALES.get(x, 1.0) * point.values[x] for point in points],
        [SCALES.get(y, 1.0) * point.values[y] for point in points],
    )
