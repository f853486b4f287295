"""Pictures as inline SVG: matplotlib draws, the page's own colours and typeface are put in afterwards.

Every colour that matplotlib is given is a placeholder that becomes a CSS variable, so one picture suits light and dark pages.
Text stays text.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from sslim.report.example import Example
from sslim.report.markup import CONTROL, Markup, escape

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER = "#0e0d01", "#0e0d02", "#0e0d03", "#0e0d04"
SERIES = ("#0e0d11", "#0e0d12", "#0e0d13", "#0e0d14", "#0e0d15", "#0e0d16")
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "paper"} | {c: f"c{i}" for i, c in enumerate(SERIES, 1)}
MAX_POINTS = (
    400  # a curve with more is averaged in bins of equal size: finer than a pixel of the panel, and the page stays small
)
GOLDEN_RATIO = 0.618034
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sslim",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a picture.

    Attributes:
        name: For the legend.
        x: Positions, rising.
        y: Values; those that are not finite are left out.
        markers: Few points, so each is marked.
        dashed: For validation; it has the colour of the full line of the same name.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    markers: bool = False
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of a picture.

    Attributes:
        name: What it stands for.
        value: Its length.
        sd: Standard deviation, drawn as a whisker; None when there is one score only.
        is_baseline: Drawn paler.
    """

    name: str
    value: float
    sd: float | None = None
    is_baseline: bool = False


def curves(
    lines: Sequence[Curve],
    *,
    title: str,
    x_label: str = "step",
    name: str = "curves",
    scale: Literal["free", "zero", "log"] = "free",
) -> Markup:
    """Draws lines in one panel.

    Args:
        lines: Up to six names; empty ones are skipped.
        title: Above the panel.
        x_label: Below it.
        name: Unique on the page; starts the ids inside the picture.
        scale: Vertical axis: ``free`` fits the values, ``zero`` starts at 0, ``log`` is logarithmic if all are positive.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    with drawing(4.9, 2.75) as figure:
        axes = figure.subplots()
        colours = dict(zip(dict.fromkeys(line.name for line in lines), SERIES, strict=False))
        for line in lines:
            x, y = _thinned(line.x, line.y)
            style: dict[str, Any] = {"linestyle": "--" if line.dashed else "-", "markersize": 3.5}
            style["marker"] = "o" if line.markers else ""
            if len(x) and line.name in colours:
                axes.plot(x, y, color=colours[line.name], label=plain_text(line.name), **style)
        if scale == "zero":
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if min((min(line.y) for line in lines), default=0.0) < 0 else 0.0)
        elif scale == "log" and all(v > 0 for line in lines for v in line.y):
            axes.set_yscale("log")
            for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5), numticks=20))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
        axes.set_title(plain_text(title))
        axes.set_xlabel(plain_text(x_label))
        axes.margins(x=0.02)
        if len(colours) > 1:
            handles, names = axes.get_legend_handles_labels()
            first = {name: handle for handle, name in reversed(list(zip(handles, names, strict=True)))}
            shown = [plain_text(name) for name in colours if plain_text(name) in first]
            axes.legend(
                [first[name] for name in shown],
                shown,
                loc="upper center",
                bbox_to_anchor=(0.5, -0.2),
                ncols=min(3, len(shown)),
                handlelength=1.2,
                columnspacing=1.2,
            )
        return inline_svg(figure, name, title)


def bars(values: Sequence[Bar], *, unit: str = "", places: int = 1, name: str = "bars") -> Markup:
    """Draws horizontal bars, the first on top, each with its figure beside it.

    Args:
        values: Bars; baselines are paler.
        unit: What the values are, under the axis.
        places: Decimal places of the figures.
        name: Unique on the page.
    """
    with drawing(7.6, 0.75 + 0.36 * len(values)) as figure:
        axes = figure.subplots()
        longest = max((bar.value + (bar.sd or 0.0) for bar in values), default=1.0)
        for row, bar in enumerate(values):
            colour, strength = (MUTED, 0.45) if bar.is_baseline else (SERIES[0], 0.9)
            axes.barh(row, bar.value, height=0.62, color=colour, alpha=strength, linewidth=0)
            if bar.sd is not None:
                axes.errorbar(bar.value, row, xerr=bar.sd, color=INK, capsize=3, linewidth=1, fmt="none")
            axes.text(
                bar.value + (bar.sd or 0.0) + 0.012 * longest, row, score(bar.value, bar.sd, places), va="center", fontsize=9
            )
        axes.set_yticks(range(len(values)), [plain_text(bar.name) for bar in values], color=INK)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(min(0.0, *(bar.value for bar in values)) if values else 0.0, longest * 1.16 or 1.0)
        axes.invert_yaxis()
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(plain_text(unit))
        return inline_svg(figure, name, f"bars: {unit}")


def score(mean: float, sd: float | None = None, places: int = 1) -> str:
    """Returns a score and its deviation."""
    return f"{mean:.{places}f}" + (f" ± {sd:.{places}f}" if sd is not None else "")


def example(shown: Example, *, name: str = "example") -> Markup:
    """Draws one utterance: features, phones, target clusters, predictions, and where the model saw nothing.

    Args:
        shown: The utterance; its missing parts are left out.
        name: Unique on the page.
    """
    strips = [(shown.labels_T, "targets")]
    if shown.predictions_T is not None:
        strips.append((shown.predictions_T, "predictions"))
    heights = [5.0] + ([0.55] if shown.phones_T is not None else []) + [0.6] * len(strips)
    heights += [0.35] if shown.predictions_T is not None else []
    end_s = len(shown.features_TF) * shown.frame_shift_s
    with drawing(9.6, 0.75 + 0.46 * sum(heights)) as figure:
        grid = {"height_ratios": heights, "hspace": 0.12}
        panels: Iterator[Axes] = iter(figure.subplots(len(heights), 1, sharex=True, gridspec_kw=grid, squeeze=False)[:, 0])
        first = axes = next(panels)
        axes.imshow(
            shown.features_TF.T.astype("float32"),
            origin="lower",
            aspect="auto",
            cmap="magma",
            interpolation="nearest",
            extent=(0.0, end_s, 0.0, shown.features_TF.shape[1]),
        )
        axes.set_ylabel("feature")
        axes.grid(visible=False)
        axes.set_title(plain_text(shown.id))
        _mark_masked(axes, shown)
        if shown.phones_T is not None:
            _phone_strip(axes := next(panels), shown)
        for ids_T, label in strips:
            axes = next(panels)
            axes.imshow(_colours(ids_T)[None], aspect="auto", interpolation="nearest", extent=(0.0, end_s, 0.0, 1.0))
            _strip_style(axes, label)
        if shown.predictions_T is not None:
            axes = next(panels)
            right_T = (shown.predictions_T == shown.labels_T) & (shown.labels_T >= 0)
            axes.fill_between(*_steps(right_T, shown.frame_shift_s), color=SERIES[2], linewidth=0)
            axes.set_ylim(0, 1)
            _strip_style(axes, "correct")
        axes.tick_params(axis="x", length=3, labelbottom=True)
        axes.set_xlabel("seconds")
        first.set_xlim(0.0, end_s)
        return inline_svg(figure, name, f"{shown.id}: features and targets")


def _mark_masked(axes: Axes, shown: Example) -> None:
    if shown.mask_T is None:
        return
    for start, stop in _runs(shown.mask_T):
        axes.axvspan(start * shown.frame_shift_s, stop * shown.frame_shift_s, color=PAPER, alpha=0.55, linewidth=0)
    mark_stretches(axes, shown.mask_T, shown.frame_shift_s, height=shown.features_TF.shape[1] * 0.985)


def mark_stretches(axes: Axes, flags_T: np.ndarray, frame_shift_s: float, *, height: float) -> None:
    """Draws a bar over each stretch of True, also above the panel."""
    for start, stop in _runs(flags_T):
        x = [start * frame_shift_s, stop * frame_shift_s]
        axes.plot(x, [height] * 2, color=SERIES[1], linewidth=3, solid_capstyle="butt", clip_on=False)


def _phone_strip(axes: Axes, shown: Example) -> None:
    assert shown.phones_T is not None
    axes.set_ylim(0, 1)
    edges = [0, *(i for i in range(1, len(shown.phones_T)) if shown.phones_T[i] != shown.phones_T[i - 1]), len(shown.phones_T)]
    for start, stop in pairwise(edges):
        phone = int(shown.phones_T[start])
        axes.axvline(start * shown.frame_shift_s, color=LINE, linewidth=0.8)
        if phone >= 0 and stop - start > 1:
            middle = (start + stop) / 2 * shown.frame_shift_s
            axes.text(middle, 0.5, plain_text(shown.phone_names[phone]), ha="center", va="center", fontsize=9, clip_on=True)
    _strip_style(axes, "phones")


def _strip_style(axes: Axes, label: str) -> None:
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.tick_params(axis="x", length=0, labelbottom=False)
    axes.set_ylabel(label, rotation=0, ha="right", va="center")
    axes.spines[:].set_visible(False)


def _colours(ids_T: np.ndarray) -> np.ndarray:
    """(T, 4): a colour for each cluster; neighbouring ids differ much, the same id is the same everywhere."""
    import numpy as np
    from matplotlib.colors import hsv_to_rgb

    hue_T = (ids_T * GOLDEN_RATIO) % 1.0
    saturation_T = 0.45 + 0.35 * ((ids_T * 7) % 3) / 2
    value_T = 0.62 + 0.33 * ((ids_T * 5) % 4) / 3
    rgb_T3 = hsv_to_rgb(np.stack([hue_T, saturation_T, value_T], axis=-1))
    return np.concatenate([rgb_T3, (ids_T >= 0)[:, None].astype(rgb_T3.dtype)], axis=-1)


def _runs(flags_T: np.ndarray) -> list[tuple[int, int]]:
    """Start and exclusive end of each stretch of True."""
    import numpy as np

    changes = np.flatnonzero(np.diff(np.concatenate([[0], flags_T.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in zip(changes[::2], changes[1::2], strict=True)]


def _steps(flags_T: np.ndarray, frame_shift_s: float) -> tuple[list[float], list[float]]:
    x: list[float] = []
    y: list[float] = []
    for start, stop in _runs(flags_T):
        x += [start * frame_shift_s] * 2 + [stop * frame_shift_s] * 2
        y += [0.0, 1.0, 1.0, 0.0]
    return x or [0.0], y or [0.0]


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Finite points only, averaged in bins when there are many."""
    import numpy as np

    x_, y_ = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    x_, y_ = x_[np.isfinite(y_)], y_[np.isfinite(y_)]
    if len(x_) <= MAX_POINTS:
        return x_, y_
    bins = np.array_split(np.arange(len(x_)), MAX_POINTS)
    return np.array([x_[b].mean() for b in bins]), np.array([y_[b].mean() for b in bins])


def plain_text(text: str) -> str:
    """Returns text that an SVG can hold, cut to a length that a picture can."""
    text = CONTROL.sub("\ufffd", str(text)).replace("\n", " ")
    return text if len(text) <= 60 else text[:59] + "…"


@contextmanager
def drawing(width_in: float, height_in: float) -> Iterator[Figure]:
    """Yields an empty figure in this page's style, without touching matplotlib's global state or any display."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser draws the text, not matplotlib
        yield Figure(figsize=(width_in, height_in))


def inline_svg(figure: Figure, name: str, title: str) -> Markup:
    """Returns the figure as an SVG element that fits into a page: no prologue, no foreign names, own ids, CSS colours.

    Args:
        figure: Drawn inside :func:`drawing`, with placeholders for colours.
        name: Unique on the page; starts the ids inside the picture.
        title: For those who cannot see it.
    """
    buffer = StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.05, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    size = re.search(r'viewBox="0 0 ([\d.]+) [\d.]+">', text)
    assert size is not None
    width_px = float(size[1]) * 96 / 72 * 1.2  # drawn a little small, so that text in a narrow column stays readable
    opening = f'<svg role="img" aria-label="{escape(title)}" style="max-width: {width_px:.0f}px" {size[0]}'
    return Markup(re.sub(r"<svg [^>]*>", lambda _: opening, text, count=1).strip())
