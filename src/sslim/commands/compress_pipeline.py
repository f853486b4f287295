"""``sslim compress pipeline``: several methods one after the other, with training between them, from a TOML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run the steps of PIPELINE on MODEL. The same command continues an interrupted run.

    Methods that cut: heads, rows, width, depth, sharing, low-rank, weights, quantize. Methods that train while they compress,
    with a training of their own: gates, iterative-weights, distil. `sslim compress METHOD --help` says what each does
    (iterative-weights is `weights` with --schedule). A file may look like this:

    | [recover]                      # training after every cut
    | minutes = 2
    | [[step]]
    | method = "heads"
    | keep = 0.5
    | rounds = 2
    | [[step]]
    | method = "rows"
    | budget = "latency_ms=12"
    | [[step]]
    | method = "iterative-weights"
    | schedule = {sparsities = [0.3, 0.5], warm_up = 500, period = 500}
    | training = {steps = 500}
    | recover = false
    | [[step]]
    | method = "quantize"

    Example: `sslim compress pipeline small.toml runs/teacher --corpus corpora/speech --output runs/small`.
    """

    pipeline: tyro.conf.Positional[Path]
    """TOML file with [[step]] tables."""
    model: tyro.conf.Positional[Path]
    """Model folder, run folder or foreign checkpoint."""
    output: Path
    """Folder for cut models, training runs, the table of what was bought, and at the end model/."""
    corpus: Path | None = None
    """Folder made by `sslim prepare`, for steps that look at speech or train."""
    threads: int = 0
    """CPU threads for torch while training; 0 leaves torch's own choice."""


def main(options: Options) -> None:
    """Runs the steps and prints what each bought."""
    from sslim.commands.compression_options import run_pipeline
    from sslim.recipes.pipeline import read_pipeline

    pipeline = read_pipeline(options.pipeline)
    run_pipeline(pipeline, options.model, options.corpus, options.output, options.threads)
