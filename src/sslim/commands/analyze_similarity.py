"""``sslim analyze similarity``: CKA and CCA between layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from sslim.commands.analysis_options import AnalysisOptions, progress, say, show


@dataclass(frozen=True, kw_only=True)
class Options(AnalysisOptions):
    """Compare the layers of MODEL with each other, or with those of OTHER, on the same frames.

    Example: `sslim analyze similarity runs/teacher runs/student --corpus corpora/digits --output analysis/similarity`.
    """

    model: tyro.conf.Positional[Path]
    """Model folder, run folder or foreign checkpoint."""
    other: tyro.conf.Positional[Path | None] = None
    """A second one, whose layers are the columns."""
    kept_variance: float = 0.99
    """Share of a layer's variance that canonical correlation looks at; the rest is taken for noise."""


def main(options: Options) -> None:
    """Compares and prints the table; writes results and picture."""
    from sslim.recipes.analyses import analyze_similarity

    speech = options.speech(options.model, *([] if options.other is None else [options.other]))
    with progress("utterances") as tell:
        table = analyze_similarity(speech, options.output, kept_variance=options.kept_variance, say=say, tell=tell)
    show(table)
