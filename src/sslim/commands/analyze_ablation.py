"""``sslim analyze ablation``: heads taken away one after another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from sslim.commands.analysis_options import AnalysisOptions, progress, say, show


@dataclass(frozen=True, kw_only=True)
class Options(AnalysisOptions):
    """Take the attention heads of MODEL away, those of the highest globalness, verticality or diagonality first, and at random.

    Example: `sslim analyze ablation runs/small/model --corpus corpora/digits --measure label --output analysis/ablation`.
    """

    model: tyro.conf.Positional[Path]
    """Model folder, run folder or foreign checkpoint."""
    measure: Literal["distance", "label", "speaker", "phones"] = "distance"
    """What is left: relative change of the final output, or the accuracy of a probe (over the whole corpus; takes long)."""
    points: int = 13
    """Numbers of heads on each curve, from none to all."""
    random_orders: int = 3
    """Random orders to compare with."""


def main(options: Options) -> None:
    """Measures and prints the table; writes results and picture."""
    from sslim.recipes.analyses import analyze_ablation

    if options.random_orders < 0:
        raise ValueError(f"--random-orders is {options.random_orders}; expected 0 or more")
    speech = options.speech(options.model)
    with progress("measurements") as tell:
        table = analyze_ablation(
            speech,
            options.output,
            measure=options.measure,
            num_points=options.points,
            num_random=options.random_orders,
            say=say,
            tell=tell,
        )
    show(table)
