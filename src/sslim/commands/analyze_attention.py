"""``sslim analyze attention``: heads that are global, vertical or diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from sslim.commands.analysis_options import AnalysisOptions, progress, say, show


@dataclass(frozen=True, kw_only=True)
class Options(AnalysisOptions):
    """Score the attention heads of MODEL by globalness, verticality and diagonality, rank them, and draw what they attend to.

    Example: `sslim analyze attention runs/small/model --corpus corpora/digits --output analysis/attention`.
    """

    model: tyro.conf.Positional[Path]
    """Model folder, run folder or foreign checkpoint."""
    example: str | None = None
    """Id of the utterance whose attention is drawn; one of median length when not given."""


def main(options: Options) -> None:
    """Scores and prints the table; writes results and pictures."""
    from sslim.recipes.analyses import analyze_attention

    speech = options.speech(options.model)
    with progress("utterances") as tell:
        table = analyze_attention(speech, options.output, example=options.example, say=say, tell=tell)
    show(table)
