"""Pareto fronts of probed models: score against parameters, MACs and measured latency."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslim.compress.pareto import pareto_front
from sslim.report import figures
from sslim.report.labels import place_names, set_log_axis, whisker
from sslim.report.markup import Markup, element, join, table
from sslim.report.palette import PAGE, PRINT, Palette, printed
from sslim.report.trade_offs import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sslim.profiling.profile import Profile

MARGIN = 1.25  # of the axis of costs, beyond the outermost values
LEAST_SPAN = 2.0  # the axis of costs covers at least this ratio


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A model in a picture.

    Attributes:
        name: Beside it; empty for one of many.
        cost: x, above 0.
        score: y.
        sd: Of the score; None for no whisker.
    """

    name: str
    cost: float
    score: float
    sd: float | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture: score against one cost.

    Attributes:
        dots: Models.
        cost: Name and unit of the cost.
        score: Name and unit of the score.
        title: What was probed.
        lower_is_better: Whether the score is an error or a loss.
        references: Scores of baselines without a cost, by name.
        missing: Names of the models whose cost is not known.
        machine: Where a latency was measured; empty for other costs.
    """

    dots: tuple[Dot, ...]
    cost: str
    score: str
    title: str
    lower_is_better: bool = False
    references: Mapping[str, float] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    machine: str = ""

    def front(self) -> list[int]:
        """The dots that no other beats in cost or score without losing in the other, by rising cost."""
        sign = 1.0 if self.lower_is_better else -1.0
        return pareto_front([(dot.cost, sign * dot.score) for dot in self.dots])


def panels(comparison: Comparison, profiles: Sequence[Profile]) -> Iterator[Panel]:
    """Yields a panel for parameters, one for MACs, and one for every measurement of latency, each if two models have a place.

    Args:
        comparison: Models of one task.
        profiles: Those that the comparison was made from.
    """
    from sslim.profiling.profile import describe_conditions

    yield from _panel(comparison, "parameters / million", [_scaled(m.num_parameters, 1e-6) for m in comparison.models])
    if (seconds := comparison.seconds()) is not None:
        cost = f"GMAC for each second of speech, in utterances of {seconds:g} s"
        yield from _panel(comparison, cost, [_scaled(m.macs.get(seconds), 1e-9) for m in comparison.models])
    for number, conditions in comparison.measurements():
        machine = profiles[number].machine
        device = machine.get("gpu" if conditions.device.startswith("cuda") else "processor", "unknown machine")
        cost = f"median latency / ms: {describe_conditions(conditions)}"
        yield from _panel(comparison, cost, [m.latency_ms.get((number, conditions)) for m in comparison.models], device)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _panel(comparison: Comparison, cost: str, costs: Sequence[float | None], machine: str = "") -> Iterator[Panel]:
    known = [(model, value) for model, value in zip(comparison.models, costs, strict=True) if value]
    if len(known) < 2:
        return
    yield Panel(
        dots=tuple(Dot(name=m.name, cost=value, score=m.score, sd=m.sd) for m, value in known),
        cost=cost,
        score=comparison.metric,
        title=comparison.title,
        lower_is_better=comparison.lower_is_better,
        references=comparison.references,
        missing=tuple(m.name for m, value in zip(comparison.models, costs, strict=True) if not value),
        machine=machine,
    )


def front_section(comparison: Comparison, profiles: Sequence[Profile], *, name: str) -> Markup | None:
    """Returns the part of the page for one comparison: pictures, and who is on which front; None without a picture.

    Args:
        comparison: Models of one task.
        profiles: Those that the comparison was made from.
        name: Unique on the page.
    """
    drawn = list(panels(comparison, profiles))
    if not drawn:
        return None
    captioned = [
        element("figure", picture(panel, name=f"{name}-{i}"), element("figcaption", _caption(panel)))
        for i, panel in enumerate(drawn)
    ]
    notes = [element("p", note, class_="muted") for note in comparison.notes]
    pictures = element("div", *captioned, class_="panels")
    return join([element("h3", comparison.title), pictures, *notes, _table(comparison, drawn)])


def _caption(panel: Panel) -> str:
    names = [panel.dots[i].name for i in panel.front()]
    said = f"On the front, where no other model is better for the same cost or less: {', '.join(names)}."
    if any(dot.sd for dot in panel.dots):
        said += " Whiskers: one standard deviation over seeds."
    said += f" Measured on {panel.machine}." if panel.machine else ""
    return said + (f" Cost unknown: {', '.join(panel.missing)}." if panel.missing else "")


def _table(comparison: Comparison, drawn: Sequence[Panel]) -> Markup:
    header = ["model", comparison.metric, *(panel.cost.split(":")[0] for panel in drawn)]
    rows = []
    for model in comparison.models:
        costs = [next((round(dot.cost, 3) for dot in panel.dots if dot.name == model.name), None) for panel in drawn]
        rows.append([model.name, figures.score(model.score, model.sd, comparison.places), *costs])
    return table(header, rows)


def picture(panel: Panel, *, name: str) -> Markup:
    """Returns a panel as inline SVG; ``name`` is unique on the page."""
    with figures.drawing(4.9, 3.5) as figure:
        draw_panel(figure.subplots(), panel, PAGE)
        return figures.inline_svg(figure, name, f"{panel.title}: {panel.score} against {panel.cost}")


def save_picture(panel: Panel, path: Path) -> None:
    """Writes a panel for paper; the ending (.png, .svg, .pdf) decides the kind."""
    with printed(path, 6.4, 4.4) as figure:
        draw_panel(figure.subplots(), panel, PRINT)


def draw_panel(axes: Axes, panel: Panel, palette: Palette) -> None:
    """Draws models by cost and score, a line through those that none beats, and baselines without a cost as dashed lines.

    Args:
        axes: Where.
        panel: What.
        palette: Colours.
    """
    front = panel.front()
    low, high = _limits([dot.cost for dot in panel.dots])
    set_log_axis(axes.xaxis, low, high)
    lines = [panel.title, panel.machine] if panel.machine else [panel.title]
    axes.set_title("\n".join(map(figures.plain_text, lines)), fontsize=10)
    axes.set_xlabel(figures.plain_text(panel.cost))
    axes.set_ylabel(figures.plain_text(panel.score))
    steps_x = [*(panel.dots[i].cost for i in front), high]  # until something dearer is better, the last is the best there is
    steps_y = [panel.dots[i].score for i in front]
    steps_y.append(steps_y[-1])
    axes.plot(steps_x, steps_y, drawstyle="steps-post", color=palette.front, linewidth=1.3, alpha=0.8)
    colours = [palette.front if i in front else palette.muted for i in range(len(panel.dots))]
    for colour in (palette.muted, palette.front):
        many = [dot for dot, own in zip(panel.dots, colours, strict=True) if own == colour and not dot.name]
        axes.plot([d.cost for d in many], [d.score for d in many], "o", color=colour, markersize=3.0, alpha=0.6, linewidth=0)
    for dot, colour in zip(panel.dots, colours, strict=True):
        if dot.name:
            axes.errorbar(dot.cost, dot.score, yerr=dot.sd, fmt="o", color=colour, markersize=5.5, capsize=2.5, linewidth=1.0)
    _set_scores(axes, panel)
    _draw_references(axes, panel, palette)
    named = [i for i, dot in enumerate(panel.dots) if dot.name]
    place_names(
        axes,
        [(panel.dots[i].cost, panel.dots[i].score) for i in named],
        [panel.dots[i].name for i in named],
        colours=[palette.ink if i in front else palette.muted for i in named],
        line_colour=palette.muted,
        avoid=[*_along_steps(steps_x, steps_y), *_whiskers(panel.dots), *((dot.cost, dot.score) for dot in panel.dots)],
    )


def _set_scores(axes: Axes, panel: Panel) -> None:
    """The vertical axis holds all models with their whiskers, and a little around them."""
    ends = [*(dot.score for dot in panel.dots), *(score for _, score in _whiskers(panel.dots))]
    span = max(ends) - min(ends) or abs(ends[0]) * 0.1 or 1.0
    axes.set_ylim(min(ends) - 0.15 * span, max(ends) + 0.15 * span)


def _draw_references(axes: Axes, panel: Panel, palette: Palette) -> None:
    """Baselines near the models as dashed lines; of those far away, which would press the models together, the figure alone."""
    low, high = axes.get_ylim()
    reach = 0.5 * (high - low)
    near = {name: score for name, score in panel.references.items() if low - reach <= score <= high + reach}
    room = 0.06 * (high - low)
    axes.set_ylim(
        min([low, *(score - room for score in near.values())]), max([high, *(score + room for score in near.values())])
    )
    for name, score in near.items():
        axes.axhline(score, color=palette.muted, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        place: Any = {"xycoords": ("axes fraction", "data"), "xytext": (-2, 2), "textcoords": "offset points"}
        axes.annotate(
            figures.plain_text(name), (1.0, score), **place, ha="right", va="bottom", fontsize=8.5, color=palette.muted
        )
    far = [f"{name} {score:.4g}" for name, score in panel.references.items() if name not in near]
    if far:
        words = figures.plain_text(f"not shown: {', '.join(far)}")
        axes.text(0.985, 0.02, words, transform=axes.transAxes, ha="right", va="bottom", fontsize=8.5, color=palette.muted)


def _limits(costs: Sequence[float]) -> tuple[float, float]:
    low, high = min(costs) / MARGIN, max(costs) * MARGIN
    if high / low < LEAST_SPAN:
        grow = (LEAST_SPAN * low / high) ** 0.5
        low, high = low / grow, high * grow
    return low, high


def _along_steps(x: Sequence[float], y: Sequence[float], count: int = 40) -> Iterator[tuple[float, float]]:
    """Points along a line of steps, level first."""
    for i in range(len(x) - 1):
        for k in range(count + 1):
            yield x[i] * (x[i + 1] / x[i]) ** (k / count), y[i]
            yield x[i + 1], y[i] + (y[i + 1] - y[i]) * k / count


def _whiskers(dots: Sequence[Dot]) -> list[tuple[float, float]]:
    return [point for dot in dots if dot.sd for point in whisker(dot.cost, dot.score - dot.sd, dot.score + dot.sd)]
