"""Names beside points, where they hide neither points nor lines nor each other, and ticks that people can read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sslim.report.figures import plain_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

MAX_CHARACTERS = 34
DISTANCES_PT = (7.0, 15.0, 26.0, 40.0)
DIRECTIONS = (0, 180, 90, 270, 30, 150, 330, 210, 60, 120, 300, 240)  # degrees; beside the point is read best
OUTSIDE, ON_NAME, ON_POINT, ON_LINE = 200.0, 60.0, 6.0, 1.0  # what a place costs; a line is given as points along it
NEAR_PT = 8.0  # a name that is farther from its point gets a line to it
MANTISSAS = ((1.0,), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), tuple(m / 4 for m in range(4, 40)))
FONT_PT = 8.5
FINE = tuple(m / 20 for m in range(20, 200))


def log_ticks(low: float, high: float, least: int = 3) -> list[float]:
    """Returns round numbers from ``low`` to ``high``, both above 0, about ``least`` to eight of them for a logarithmic axis."""
    found: list[float] = []
    for mantissas in (*MANTISSAS, FINE):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [m * 10.0**decade for decade in decades for m in mantissas if low <= m * 10.0**decade <= high]
        if len(found) >= least:
            break
    step = math.ceil(len(found) / 8)
    return found[::step] if step else found


def set_log_axis(axis: Any, low: float, high: float) -> None:
    """Makes an axis of matplotlib logarithmic from ``low`` to ``high`` with ticks of :func:`log_ticks`."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(low, high)
    axis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))


def whisker(x: float, low: float, high: float, count: int = 8) -> list[tuple[float, float]]:
    """Returns points along an upright line, for names to keep off it."""
    return [(x, low + (high - low) * k / count) for k in range(count + 1)]


def place_names(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    *,
    colours: Sequence[str],
    line_colour: str,
    avoid: Sequence[tuple[float, float]] = (),
) -> None:
    """Writes a name beside each point, in the direction where it hides least.

    Call it when everything else is drawn and the limits are set.

    Args:
        axes: Where.
        points: Data coordinates (x, y).
        names: One each.
        colours: One each.
        line_colour: Of the thin line from a name to its point, where it had to move away.
        avoid: Further data coordinates that should stay visible, for example along a line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    figure = axes.get_figure(root=True)
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # settles the layout, which the places depend on
    weights = [ON_POINT] * len(points) + [ON_LINE] * len(avoid)
    pixels = axes.transData.transform([*points, *avoid]).tolist() if points else []
    hidden = [(x, y, weight) for (x, y), weight in zip(pixels, weights, strict=True)]
    taken: list[Bbox] = [Text.get_window_extent(text, renderer) for text in axes.texts]  # an annotation's own has its line too
    places = [_Place(distance=distance, degrees=degrees) for distance in DISTANCES_PT for degrees in DIRECTIONS]
    for point, (x, y), name, colour in zip(points, pixels, names, colours, strict=False):
        text = plain_text(name)
        text = text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
        measured = axes.text(0, 0, text, fontsize=FONT_PT)
        size = measured.get_window_extent(renderer)
        measured.remove()
        found = {place: place.box(x, y, size.width, size.height, figure.dpi / 72) for place in places}
        best = min(places, key=lambda place: _cost(found[place], taken, hidden, axes.bbox) + place.price)
        taken.append(found[best])
        best.write(axes, text, point, colour, line_colour)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a name can stand: so far from its point, in this direction."""

    distance: float
    degrees: int

    @property
    def price(self) -> float:
        return self.distance / 20 + DIRECTIONS.index(self.degrees) / 40

    @property
    def offset(self) -> tuple[float, float]:
        angle = math.radians(self.degrees)
        return self.distance * math.cos(angle), self.distance * math.sin(angle)

    @property
    def alignment(self) -> tuple[str, str]:
        """Which side of the name, and which edge, is nearest to the point."""
        right, up = (part / self.distance for part in self.offset)
        across = "left" if right > 0.3 else "right" if right < -0.3 else "center"
        return across, "bottom" if up > 0.6 else "top" if up < -0.6 else "center"

    def box(self, x: float, y: float, width: float, height: float, scale: float) -> Bbox:
        """The name's box in pixels, with a little room; ``scale`` is pixels for each point of type."""
        from matplotlib.transforms import Bbox

        (across, along), (right, up) = self.alignment, self.offset
        shares = {"left": 0.0, "center": 0.5, "right": 1.0, "bottom": 0.0, "top": 1.0}
        x0, y0 = x + scale * right - shares[across] * width, y + scale * up - shares[along] * height
        return Bbox.from_bounds(x0, y0, width, height).padded(1.0)

    def write(self, axes: Axes, text: str, point: tuple[float, float], colour: str, line_colour: str) -> None:
        """Writes the name, with a line to its point where that is far."""
        across, along = self.alignment
        line = {"arrowstyle": "-", "linewidth": 0.5, "color": line_colour} if self.distance > NEAR_PT else None
        style: Any = {"ha": across, "va": along, "fontsize": FONT_PT, "color": colour, "arrowprops": line}
        note = axes.annotate(text, point, xytext=self.offset, textcoords="offset points", **style)
        note.set_in_layout(False)


def _cost(box: Bbox, taken: Sequence[Bbox], hidden: Sequence[tuple[float, float, float]], frame: Bbox) -> float:
    """How bad a place is: outside the frame, over another name, over points and lines."""
    from matplotlib.transforms import Bbox

    cost = 0.0
    if box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1:
        cost += OUTSIDE
    for other in taken:
        shared = Bbox.intersection(box, other)
        if shared is not None and shared.width > 0 and shared.height > 0:
            cost += ON_NAME
    return cost + sum(w for x, y, w in hidden if box.x0 - 2 <= x <= box.x1 + 2 and box.y0 - 2 <= y <= box.y1 + 2)
