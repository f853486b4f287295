"""Pictures of analyses, drawn into figures that the caller opens: curves of LNSR and ablation, similarity, layer weights.

Colours of text and thin lines are those of the style that is active; ``attention_pictures.py`` draws what concerns heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sslim.analysis.attention import DIAGONALITY, GLOBALNESS, VERTICALITY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sslim.analysis.ablation import AblationCurve
    from sslim.analysis.layer_weights import LayerWeights
    from sslim.analysis.lnsr import LnsrCurve
    from sslim.analysis.similarity import Similarity

BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#c8551b", "#3c8d53", "#85898e"
METRIC_COLOURS = {GLOBALNESS: BLUE, VERTICALITY: ORANGE, DIAGONALITY: GREEN}
MARKERS = "osD^v<>P"
SEQUENTIAL = "viridis"
MAX_WRITTEN = 14  # a grid with more columns has no room for numbers in its cells


def show_title(axes: Axes, title: str) -> None:
    """Writes a panel's title, left."""
    axes.set_title(title, loc="left", fontsize=10)


def whole_ticks(axis: Any, first: int, last: int, most: int = 25) -> None:
    """Ticks on whole numbers, thinned out to ``most``."""
    step = -(-(last - first + 1) // most)
    axis.set_ticks(range(first, last + 1, step))


def lnsr_size(curves: Sequence[LnsrCurve]) -> tuple[float, float]:
    """Returns width and height in inches that suit :func:`draw_lnsr`."""
    return min(12.0, 6.6 + 0.22 * len(curves[0].layers)), 4.2


def draw_lnsr(figure: Figure, curves: Sequence[LnsrCurve], *, title: str, layer: int) -> None:
    """Draws LNSR by layer: full lines for PGD, dashed ones for Gaussian noise, a marker for each epsilon.

    Args:
        figure: Where.
        curves: What was measured.
        title: Above.
        layer: The one that PGD attacked.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes = figure.subplots()
    epsilons = sorted({curve.epsilon for curve in curves})
    num_layers = len(curves[0].layers) - 1
    for curve in sorted(curves, key=lambda curve: (curve.noise != "pgd", -curve.epsilon)):
        is_pgd = curve.noise == "pgd"
        x, y, sd = range(num_layers + 1), np.array(curve.layers), np.array(curve.layers_sd)
        style: Any = {"color": BLUE if is_pgd else ORANGE, "linestyle": "-" if is_pgd else (0, (4, 2))}
        marker = MARKERS[epsilons.index(curve.epsilon) % len(MARKERS)]
        name = f"{'PGD' if is_pgd else 'Gaussian'}, {curve.epsilon:g}"
        axes.plot([-1, *x], [curve.input, *y], marker=marker, markersize=4.5, linewidth=1.5, label=name, **style)
        low = np.maximum(y - sd, 0.5 * y)
        axes.fill_between(x, low, y + sd, color=style["color"], alpha=0.12, linewidth=0)
    axes.axvline(layer, color=GREY, linewidth=0.8, linestyle=":")
    if all(min(curve.input, *curve.layers) > 0 for curve in curves):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    step = -(-(num_layers + 1) // 20)
    ticks = sorted({*range(0, num_layers + 1, step), layer})
    axes.set_xticks([-1, *ticks], ["input", *(f"{i}\nattacked" if i == layer else str(i) for i in ticks)])
    axes.set_xlabel("layer (0 enters the first block)")
    axes.set_ylabel("noise-to-signal ratio")
    show_title(axes, title)
    figure.legend(loc="outside right upper", title="noise, epsilon", handlelength=3.2)


def draw_ablation(figure: Figure, curves: Sequence[AblationCurve], *, title: str, measure: str) -> None:
    """Draws one line for each order of removal; random orders are drawn as their mean and range.

    Args:
        figure: Where.
        curves: What was measured.
        title: Above.
        measure: What the vertical axis shows.
    """
    axes = figure.subplots()
    random = [curve for curve in curves if curve.order.startswith("random")]
    if random:
        values = np.array([curve.values for curve in random])
        x = random[0].removed
        axes.fill_between(x, values.min(0), values.max(0), color=GREY, alpha=0.2, linewidth=0)
        axes.plot(x, values.mean(0), color=GREY, linestyle=(0, (4, 2)), label=f"random (mean and range of {len(random)})")
    markers = dict(zip(METRIC_COLOURS, MARKERS[: len(METRIC_COLOURS)], strict=True))
    for curve in curves:
        if curve not in random:
            style: Any = {"color": METRIC_COLOURS[curve.order], "marker": markers[curve.order]}
            axes.plot(curve.removed, curve.values, markersize=4.5, label=f"highest {curve.order} first", **style)
    whole_ticks(axes.xaxis, 0, curves[0].removed[-1], 16)
    axes.set_xlabel("heads taken away")
    axes.set_ylabel(measure)
    show_title(axes, title)
    figure.legend(loc="outside right upper")


def similarity_size(result: Similarity) -> tuple[float, float]:
    """Returns width and height in inches that suit :func:`draw_similarity`."""
    rows, columns = len(result.cka), len(result.cka[0])
    side = 0.42
    return 3 * (side * max(columns, 5) + 1.3), side * max(rows, 5) + 1.5


def draw_similarity(figure: Figure, result: Similarity, *, names: tuple[str, str], title: str) -> None:
    """Draws CKA, mean CCA and PWCCA as grids, layer 0 at the lower left.

    Args:
        figure: Where.
        result: What was measured.
        names: Of the rows' and of the columns' model.
        title: Above.
    """
    panels = {"linear CKA": result.cka, "mean CCA": result.cca, "PWCCA (from the rows' side)": result.pwcca}
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for axes, (name, values) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        grid(figure, axes, np.array(values), title=name, limits=(0.0, 1.0), form="{:.2f}", first=(0, 0))
        axes.set_xlabel(f"layer of {names[1]}")
        axes.set_ylabel(f"layer of {names[0]}")


def grid(
    figure: Figure,
    axes: Axes,
    values: np.ndarray,
    *,
    title: str,
    form: str,
    limits: tuple[float, float] | None = None,
    colours: str = SEQUENTIAL,
    first: tuple[int, int] = (1, 1),
) -> None:
    """Draws a matrix as coloured cells with numbers, its first row at the bottom, and a colour bar; NaN cells stay empty.

    Args:
        figure: For the colour bar.
        axes: Where.
        values: (rows, columns).
        title: Above.
        form: Of the numbers.
        limits: Of the colours; None fits the values.
        colours: Name of the colour map.
        first: What the first row and the first column are called.
    """
    low, high = limits or (float(np.nanmin(values)), float(np.nanmax(values)))
    image = axes.imshow(values, origin="lower", aspect="equal", cmap=colours, vmin=low, vmax=high)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    rows, columns = values.shape
    for axis, count, start in ((axes.xaxis, columns, first[1]), (axes.yaxis, rows, first[0])):
        step = -(-count // 16)
        axis.set_ticks(range(0, count, step), [str(start + i) for i in range(0, count, step)])
        axis.set_tick_params(length=0)
    if columns <= MAX_WRITTEN:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                red, green, blue, _ = image.to_rgba(value)
                ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else "black"
                text = form.format(value)
                text = text if float(text) else form.format(0.0)  # no -0.0
                axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=ink)
    figure.colorbar(image, ax=axes, shrink=0.85, pad=0.03)
    show_title(axes, title)


def layer_weights_size(rows: Sequence[LayerWeights]) -> tuple[float, float]:
    """Returns width and height in inches that suit :func:`draw_layer_weights`."""
    return max(6.5, 3.4 + 0.45 * max(len(row.weights) for row in rows)), 1.5 + 0.42 * len(rows)


def draw_layer_weights(figure: Figure, rows: Sequence[LayerWeights], *, title: str) -> None:
    """Draws weights as one line of cells for each row, with a mark at the weighted mean layer.

    Args:
        figure: Where.
        rows: Of the cards.
        title: Above.
    """
    axes = figure.subplots()
    width = max(len(row.weights) for row in rows)
    values = np.full((len(rows), width), np.nan)
    for i, row in enumerate(rows):
        values[i, : len(row.weights)] = row.weights
    grid(
        figure, axes, values, title=title, limits=(0.0, float(np.nanmax(values))), form="{:.2f}", first=(0, 0), colours="Blues"
    )
    axes.set_aspect("auto")
    axes.invert_yaxis()
    tasks = {row.task for row in rows}
    names = [row.name if len(tasks) == 1 else f"{row.task}: {row.name}" for row in rows]
    axes.set_yticks(range(len(rows)), [name if len(name) <= 40 else name[:39] + "…" for name in names])
    for i, row in enumerate(rows):
        label = "mean layer" if i == 0 else None
        axes.plot(row.centre, i + 0.33, marker="^", color=ORANGE, markersize=6, linestyle="none", label=label, clip_on=False)
    axes.set_xlabel("layer (0 enters the first block)")
    figure.legend(loc="outside lower right")
