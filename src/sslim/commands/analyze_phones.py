"""``sslim analyze phones``: which phones attend to which."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from sslim.commands.analysis_options import AnalysisOptions, progress, say, show


@dataclass(frozen=True, kw_only=True)
class Options(AnalysisOptions):
    """Add up the attention of MODEL from phone to phone over a CORPUS with alignments, beside uniform attention.

    Example: `sslim analyze phones runs/small/model --corpus corpora/synthetic --output analysis/phones`.
    """

    model: tyro.conf.Positional[Path]
    """Model folder, run folder or foreign checkpoint."""


def main(options: Options) -> None:
    """Adds up and prints the table; writes results, maps and pictures."""
    from sslim.recipes.analyses import analyze_phones

    speech = options.speech(options.model, aligned=True)
    with progress("utterances") as tell:
        table = analyze_phones(speech, options.output, say=say, tell=tell)
    show(table)
