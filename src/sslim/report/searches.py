"""A search of a supernet: loss of the evaluated subnets against each of their costs."""

from __future__ import annotations

from pathlib import Path

from sslim.report.fronts import Dot, Panel, picture
from sslim.report.markup import Markup, element, join, number, table
from sslim.report.pareto import LABELS, SCALES, SEARCH, FrontPoint, read_points

COSTS = ("params", "macs", "latency_ms", "measured_ms")


def is_search(path: Path) -> bool:
    """Whether a folder is one of ``sslim compress search``, finished."""
    return (path / SEARCH).is_file()


def search_section(folder: Path, *, name: str) -> Markup:
    """Returns the part of the page for one search: a picture for each cost, and its front as a table.

    Args:
        folder: Of the search.
        name: Unique on the page.

    Raises:
        ValueError: The folder holds no finished search.
    """
    points = read_points(folder)
    drawn = [panel for cost in COSTS if (panel := _panel(points, cost)) is not None]
    captioned = [
        element("figure", picture(panel, name=f"{name}-{i}"), element("figcaption", "The line joins subnets that none beats."))
        for i, panel in enumerate(drawn)
    ]
    known = [cost for cost in COSTS if any(cost in point.values for point in points)]
    best = sorted((p for p in points if p.on_front or p.name), key=lambda p: p.values.get("params", 0.0))
    cells = [[p.name or "", *(_shown(p, cost) for cost in known), _shown(p, "loss")] for p in best]
    evaluated = f"{len(points)} subnets were evaluated; below is the front of the search."
    return join(
        [
            element("h2", f"Search {folder.resolve().name}"),
            element("p", evaluated),
            element("div", *captioned, class_="panels"),
            table(["subnet", *(LABELS[cost] for cost in known), LABELS["loss"]], cells),
        ]
    )


def _shown(point: FrontPoint, name: str) -> str:
    value = point.values.get(name)
    return "" if value is None else number(SCALES.get(name, 1.0) * value)


def _panel(points: list[FrontPoint], cost: str) -> Panel | None:
    known = [point for point in points if point.values.get(cost, 0.0) > 0 and "loss" in point.values]
    if len(known) < 2:
        return None
    scale = SCALES.get(cost, 1.0)
    return Panel(
        dots=tuple(Dot(name=p.name or "", cost=scale * p.values[cost], score=p.values["loss"]) for p in known),
        cost=LABELS[cost],
        score=LABELS["loss"],
        title="Subnets of the search",
        lower_is_better=True,
    )
