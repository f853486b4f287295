"""Colours of pictures that are drawn both for the page, as placeholders of its CSS variables, and for paper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sslim.report import figures, pareto

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Colours by use.

    Attributes:
        ink: Text.
        muted: What is beside the point.
        line: Thin lines.
        front: What is best.
        chosen: What stands out.
    """

    ink: str
    muted: str
    line: str
    front: str
    chosen: str


PAGE = Palette(ink=figures.INK, muted=figures.MUTED, line=figures.LINE, front=figures.SERIES[0], chosen=figures.SERIES[1])
PRINT = Palette(ink=pareto.INK, muted=pareto.MUTED, line=pareto.LINE, front=pareto.FRONT, chosen=pareto.CHOSEN)


@contextmanager
def printed(path: Path, width_in: float, height_in: float) -> Iterator[Figure]:
    """Yields an empty figure for paper and writes it to ``path``, whose ending (.png, .svg, .pdf) decides the kind."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(pareto.STYLE):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
