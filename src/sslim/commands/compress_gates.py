"""``sslim compress gates``: learns what can be cut while distilling, then cuts it (DPHuBERT)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    """Give the heads, feed-forward units and front-end channels of MODEL gates, and train both until enough gates are closed.

    The model learns from a frozen copy of itself; then it is cut, and with --recover-steps distilled again. Example:
    `sslim compress gates runs/teacher corpora/speech --sparsity 0.75 --steps 5000 --recover-steps 2500 --output runs/gated`.
    """

    model: tyro.conf.Positional[Path]
    """Model folder, run folder or foreign checkpoint."""
    corpus: tyro.conf.Positional[Path]
    """Folder made by `sslim prepare`."""
    output: Path
    """Folder for the runs, the table of what was bought, and at the end model/."""
    sparsity: float | None = None
    """Share of the parameters that goes."""
    budget: str | None = None
    """Parameters that are left, such as params=25M, in place of a share."""
    steps: int = 2_000
    """Updates with gates; the target rises over the first quarter of them."""
    recover_steps: int | None = None
    """Updates of the distillation after the cut; none when not given."""
    learning_rate: float = 5e-4
    """Peak learning rate of both trainings; gates learn faster by a factor of their own."""
    batch_s: float = 30.0
    """Seconds of audio in a micro-batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 autocast while training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    threads: int = 0
    """CPU threads for torch; 0 leaves torch's own choice."""
    seconds: float = 10.0
    """Length of audio that MACs hold for."""
    seed: int = 0
    """Decides everything random."""


def main(options: Options) -> None:
    """Trains, cuts, trains again if asked to, and prints what was bought."""
    from sslim.commands.compression_options import run_pipeline
    from sslim.compress.budgets import parse_budget
    from sslim.profiling import Conditions
    from sslim.recipes.pipeline import Pipeline, StepConfig
    from sslim.recipes.recovery import RecoveryConfig

    params = None
    if options.budget is not None:
        budget = parse_budget(options.budget)
        if budget.name != "params":
            raise ValueError(
                f"--budget {options.budget} is not in parameters; gates are trained to a number of parameters only"
            )
        params = budget.maximum
    common = {
        "learning_rate": options.learning_rate,
        "batch_s": options.batch_s,
        "precision": options.precision,
        "device": options.device,
        "seed": options.seed,
    }
    settings = {**common, "steps": options.steps, "sparsity": options.sparsity, "params": params}
    recover = None if options.recover_steps is None else RecoveryConfig(steps=options.recover_steps, **common)  # type: ignore[arg-type]
    pipeline = Pipeline(
        steps=(StepConfig(method="gates", settings=settings, recover=recover),), conditions=Conditions(seconds=options.seconds)
    )
    run_pipeline(pipeline, options.model, options.corpus, options.output, options.threads)
