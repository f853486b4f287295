"""Pictures of attention: scores and categories of all heads, weights on an utterance, what phones attend to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sslim.analysis.attention import CATEGORIES, DIAGONALITY, METRICS, Head
from sslim.analysis.phone_relations import RELATIONS
from sslim.analysis.pictures import METRIC_COLOURS, SEQUENTIAL, grid, show_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sslim.analysis.phone_relations import PhoneHead, PhoneRelations
    from sslim.data.sources import Segment

ABOUT = {
    "globalness": "globalness / nats",
    "verticality": "verticality / nats",
    "diagonality": "diagonality / share of length",
}
TOP = 3  # heads of each category among the examples
PERCENTILE = 99.5  # of the weights is the brightest colour, so that single peaks do not hide the rest
MAX_LOG2 = 3.0  # eight times as often as chance is the strongest colour
MAX_PHONE_PANELS = 4


@dataclass(frozen=True, kw_only=True)
class ExampleUtterance:
    """One utterance whose attention is shown.

    Attributes:
        name: Its id.
        frame_shift_s: Seconds from one frame to the next.
        weights: (layer, head), from 1, to (T, T) attention.
        alignment: Segments; None where there are none.
    """

    name: str
    frame_shift_s: float
    weights: Mapping[tuple[int, int], np.ndarray]
    alignment: Sequence[Segment] | None = None


def head_table(heads: Sequence[Head | PhoneHead], value: Callable[[int], float]) -> np.ndarray:
    """Lays a value of each head (by its place in ``heads``) out as (layers, most heads), NaN where there is no head."""
    shape = max(head.layer for head in heads), max(head.head for head in heads)
    table = np.full(shape, np.nan)
    for i, head in enumerate(heads):
        table[head.layer - 1, head.head - 1] = value(i)
    return table


def heads_size(heads: Sequence[Head | PhoneHead], panels: int) -> tuple[float, float]:
    """Returns width and height in inches of so many panels of all heads, in two rows when there are four or more."""
    layers, most = max(head.layer for head in heads), max(head.head for head in heads)
    columns = panels if panels < 4 else -(-panels // 2)
    width, height = 0.46 * max(most, 4) + 1.5, 0.46 * max(layers, 4) + 1.1
    return columns * width, (1 if panels < 4 else 2) * height + 0.4


def draw_heads(figure: Figure, heads: Sequence[Head], *, title: str) -> None:
    """Draws a panel for each score, all heads in it, and one of their categories.

    Args:
        figure: Where.
        heads: Of a model.
        title: Above.
    """
    from matplotlib.patches import Patch

    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    panels = figure.subplots(2, 2).ravel()
    patches = [Patch(color=METRIC_COLOURS[metric], label=name) for metric, name in CATEGORIES.items()]
    figure.legend(handles=patches, loc="outside lower right", ncols=3)
    for axes, metric in zip(panels[: len(METRICS)], METRICS, strict=True):
        table = head_table(heads, lambda i, metric=metric: getattr(heads[i], metric))  # type: ignore[misc]
        grid(figure, axes, table, title=ABOUT[metric], form="{:.3f}" if metric == DIAGONALITY else "{:.2f}")
        _name_axes(axes)
    _draw_categories(panels[-1], heads)


def _name_axes(axes: Axes) -> None:
    axes.set_xlabel("head")
    axes.set_ylabel("layer")


def _draw_categories(axes: Axes, heads: Sequence[Head]) -> None:
    """Cells in the colour of the category, with its initial and the head's rank in it."""
    from matplotlib.colors import ListedColormap

    names = list(CATEGORIES.values())
    table = head_table(heads, lambda i: names.index(heads[i].category))
    axes.imshow(
        table, origin="lower", aspect="equal", cmap=ListedColormap([METRIC_COLOURS[m] for m in METRICS]), vmin=0, vmax=2
    )
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    small = table.shape[1] > 14
    metric_of = {category: metric for metric, category in CATEGORIES.items()}
    for head in heads if not small else ():
        text = f"{head.category[0].upper()}{head.ranks[metric_of[head.category]]}"
        axes.text(head.head - 1, head.layer - 1, text, ha="center", va="center", fontsize=7, color="white")
    for axis, count in ((axes.xaxis, table.shape[1]), (axes.yaxis, table.shape[0])):
        step = -(-count // 16)
        axis.set_ticks(range(0, count, step), [str(i + 1) for i in range(0, count, step)])
        axis.set_tick_params(length=0)
    _name_axes(axes)
    show_title(axes, "category, and rank in it")


def draw_examples(figure: Figure, heads: Sequence[Head], example: ExampleUtterance) -> None:
    """Draws the attention of the heads that rank highest in each category: a row for each, the best ones from the left.

    Args:
        figure: Where.
        heads: Of the model.
        example: What is shown.
    """
    marks = "; marks at the edges: where phones begin" if example.alignment else ""
    figure.suptitle(f"Attention on {example.name}: the highest of each score{marks}", x=0.01, ha="left", fontsize=11)
    columns = min(TOP, len(heads))
    for row, metric in zip(figure.subplots(len(METRICS), columns, squeeze=False), METRICS, strict=True):
        best = sorted(heads, key=lambda head, metric=metric: head.ranks[metric])[:columns]  # type: ignore[misc]
        for place, (axes, head) in enumerate(zip(row, best, strict=True)):
            _draw_weights(axes, example.weights[head.place], example)
            show_title(axes, f"layer {head.layer} head {head.head}: {getattr(head, metric):.3g}")
            if place == 0:
                axes.set_ylabel(f"{metric}\nquery / s", color=METRIC_COLOURS[metric])
            if metric == METRICS[-1]:
                axes.set_xlabel("key / s")


def _draw_weights(axes: Axes, weights_TT: np.ndarray, example: ExampleUtterance, *, ticks: bool = True) -> None:
    """Queries downwards, keys to the right; marks at the upper and right edges where phones begin."""
    length_s = len(weights_TT) * example.frame_shift_s
    top = max(float(np.percentile(weights_TT, PERCENTILE)), 1e-12)
    extent = (0.0, length_s, length_s, 0.0)
    axes.imshow(weights_TT, cmap=SEQUENTIAL, vmin=0.0, vmax=top, extent=extent, aspect="equal", interpolation="nearest")
    axes.grid(visible=False)
    if not ticks:
        axes.set_xticks([])
        axes.set_yticks([])
    for segment in example.alignment or () if ticks else ():
        style: Any = {"color": axes.yaxis.label.get_color(), "linewidth": 0.6, "clip_on": False}
        axes.plot([segment.start_s] * 2, [1.0, 1.02], transform=axes.get_xaxis_transform(), **style)
        axes.plot([1.0, 1.02], [segment.start_s] * 2, transform=axes.get_yaxis_transform(), **style)
    axes.set(xlim=(0.0, length_s), ylim=(length_s, 0.0))


def maps_size(heads: Sequence[Head]) -> tuple[float, float]:
    """Returns width and height in inches that suit :func:`draw_maps`."""
    layers, most = max(head.layer for head in heads), max(head.head for head in heads)
    side = 1.9 if most <= 4 else 1.25
    return side * most + 0.6, (side + 0.05) * layers + 0.7


def draw_maps(figure: Figure, heads: Sequence[Head], example: ExampleUtterance) -> None:
    """Draws the attention of every head, the last layer on top, framed in the colour of its category.

    Args:
        figure: Where.
        heads: Of the model.
        example: What is shown.
    """
    from matplotlib.patches import Patch

    layers, most = max(head.layer for head in heads), max(head.head for head in heads)
    panels = figure.subplots(layers, most, squeeze=False)
    metric_of = {category: metric for metric, category in CATEGORIES.items()}
    for axes in panels.ravel():
        axes.set_axis_off()
    for head in heads:
        axes = panels[layers - head.layer, head.head - 1]
        axes.set_axis_on()
        _draw_weights(axes, example.weights[head.place], example, ticks=False)
        for spine in axes.spines.values():
            spine.set(visible=True, edgecolor=METRIC_COLOURS[metric_of[head.category]], linewidth=2.2)
        if head.head == 1:
            axes.set_ylabel(f"layer {head.layer}", fontsize=9)
        if head.layer == 1 or not any(other.place == (head.layer - 1, head.head) for other in heads):
            axes.set_xlabel(f"head {head.head}", fontsize=9)
    seconds = len(next(iter(example.weights.values()))) * example.frame_shift_s
    figure.suptitle(f"Attention on {example.name} ({seconds:.1f} s)", x=0.01, ha="left", fontsize=11)
    patches = [Patch(color=METRIC_COLOURS[metric], label=name) for metric, name in CATEGORIES.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3)


def draw_relations(figure: Figure, result: PhoneRelations, *, title: str) -> None:
    """Draws a panel for each relation: how many times as often as uniform attention each head looks there, as log2.

    Args:
        figure: Where.
        result: What was measured.
        title: Above.
    """
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    panels = figure.subplots(2, 3).ravel()
    for axes, relation in zip(panels[: len(RELATIONS)], RELATIONS, strict=True):
        chance = result.uniform[relation]
        table = head_table(result.heads, lambda i, r=relation, u=chance: _log2(result.heads[i].relations[r], u))  # type: ignore[misc]
        limits = (-MAX_LOG2, MAX_LOG2)
        grid(figure, axes, table, title=f"{relation} ({100 * chance:.0f} %)", form="{:+.1f}", limits=limits, colours="RdBu_r")
        _name_axes(axes)
    panels[-1].set_axis_off()
    words = (
        "log2 of a head's share of attention\nover that of uniform attention,\nwhich stands in brackets:\n+1 is twice as often"
    )
    panels[-1].text(0.0, 0.9, words, va="top", fontsize=9, transform=panels[-1].transAxes)


def _log2(share: float, chance: float) -> float:
    return float(np.log2(share / chance)) if share > 0 and chance > 0 else float("nan")


def phone_maps_size(result: PhoneRelations) -> tuple[float, float]:
    """Returns width and height in inches that suit :func:`draw_phone_maps`."""
    side = max(3.2, 0.105 * len(result.phones) + 0.9)
    return 2 * side + 0.8, (1 + (len(result.heads) > 1)) * side + 0.5


def draw_phone_maps(figure: Figure, result: PhoneRelations, *, title: str) -> None:
    """Draws phone-relation maps of the heads that differ most from uniform attention, log2 of the ratio to it.

    Args:
        figure: Where.
        result: What was measured.
        title: Above.
    """
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    order = sorted(range(len(result.heads)), key=lambda i: -result.heads[i].divergence)[:MAX_PHONE_PANELS]
    rows = 1 + (len(result.heads) > 1)
    panels = figure.subplots(rows, 2, squeeze=False).ravel()
    image: Any = None
    for axes in panels[len(order) :]:
        axes.set_visible(False)
    for axes, i in zip(panels[: len(order)], order, strict=True):
        head = result.heads[i]
        shown = np.clip(np.nan_to_num(result.log_ratio(i), neginf=-MAX_LOG2), -MAX_LOG2, MAX_LOG2)
        shown = np.where(result.uniform_CC > 0, shown, np.nan)
        image = axes.imshow(shown, cmap="RdBu_r", vmin=-MAX_LOG2, vmax=MAX_LOG2, interpolation="nearest")
        axes.grid(visible=False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(range(len(result.phones)), result.phones)
            axis.set_tick_params(labelsize=6, length=0)
        axes.tick_params(axis="x", rotation=90)
        axes.set_xlabel("key phone")
        axes.set_ylabel("query phone")
        show_title(axes, f"layer {head.layer} head {head.head}: {head.divergence:.2f} nats from uniform")
    figure.colorbar(image, ax=panels.tolist(), shrink=0.6, label="log2 of attention over that of uniform attention")
