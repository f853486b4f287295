"""What the commands of all cutting methods share: options, and how they become a pipeline of one step."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from sslim.recipes.pipeline import Pipeline, StepConfig
    from sslim.recipes.recovery import RecoveryConfig


TABLE_WIDTH = 130  # in a narrower terminal lines wrap, but no figure is cut
CAN_BE_NONE = ("normalize",)  # settings whose None says something else than their default


@dataclass(frozen=True, kw_only=True)
class CompressionOptions:
    """Options of every cutting method."""

    model: tyro.conf.Positional[Path]
    """Model folder, run folder or foreign checkpoint."""
    output: Path
    """Folder for cut models, training runs, the table of what was bought, and at the end model/ and model-card.md."""
    corpus: Path | None = None
    """Folder made by `sslim prepare`, for scores that look at speech and for training after the cut."""
    rounds: int = 1
    """Cuts that lead to the strength asked for, each followed by training."""
    recover_steps: int | None = None
    """Train after every cut for so many steps; without this and --recover-minutes nothing is trained."""
    recover_minutes: float | None = None
    """Stop that training after this long, or after --recover-steps (2,000 when not given)."""
    loss: str | None = None
    """layers (from the model before the cut, the default), prediction (of --labels), reconstruction (by TERA's own head and its
    like; for data scores too), or a loss of `compress distil`."""
    labels: str | None = None
    """Label set to predict, for data scores and for training, in place of the model before the cut."""
    learning_rate: float | None = None
    """Peak learning rate of the training."""
    batch_s: float | None = None
    """Seconds of audio in a micro-batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 autocast while training."""
    calibration_utterances: int = 200
    """Utterances that data scores look at."""
    seconds: float = 10.0
    """Length of audio that MACs and latency hold for."""
    threads: int = 0
    """Threads that latency is measured with (0: one), and torch's own while training (0: its own choice)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where data scores are computed, and where to train."""
    seed: int = 0
    """Decides everything random."""

    def recovery(self) -> RecoveryConfig | None:
        """Returns the training after every cut; None where none is asked for.

        Raises:
            ValueError: Options of a training that is not asked for.
        """
        from sslim.recipes.recovery import LAYERS, PREDICTION, RecoveryConfig

        if self.recover_steps is None and self.recover_minutes is None:
            self._check_nothing_is_trained()
            return None
        chosen = self.loss or (LAYERS if self.labels is None else PREDICTION)
        given = {"steps": self.recover_steps, "learning_rate": self.learning_rate, "batch_s": self.batch_s}
        return RecoveryConfig(
            loss=chosen,
            labels=self.labels,
            minutes=self.recover_minutes,
            precision=self.precision,
            device=self.device,
            seed=self.seed,
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )

    def _check_nothing_is_trained(self) -> None:
        """Refuses options that would do nothing without training."""
        scores = getattr(self, "score", None) == "data"
        given = ["loss"] if self.loss is not None and not (scores and self.loss == "reconstruction") else []
        given += [name for name in ("learning_rate", "batch_s") if getattr(self, name) is not None]
        given += ["precision"] if self.precision != "fp32" else []
        given += ["labels"] if self.labels is not None and not scores else []
        if given:
            told = " or for --score data" if given[0] == "labels" and hasattr(self, "score") else ""
            raise ValueError(
                f"--{given[0].replace('_', '-')} is for training after the cut{told}: ask for it with --recover-steps"
            )

    def pipeline(self, method: str, settings: dict[str, Any], budget: str | None = None) -> Pipeline:
        """Returns the pipeline of one step that the command line describes; a setting that is None has its default."""
        from sslim.recipes.pipeline import StepConfig

        step = StepConfig(
            method=method,
            settings={name: value for name, value in settings.items() if value is not None or name in CAN_BE_NONE},
            rounds=self.rounds,
            budget=budget,
            recover=self.recovery(),
        )
        return self.pipeline_of(step)

    def pipeline_of(self, step: StepConfig) -> Pipeline:
        """Returns the pipeline of a step, with the speech and the conditions that the command line describes."""
        from sslim.compress.methods import METHODS
        from sslim.profiling import Conditions
        from sslim.recipes.calibration import CalibrationConfig
        from sslim.recipes.pipeline import Pipeline

        labels = self.labels if step.recover is None and step.method in METHODS else None
        return Pipeline(
            steps=(step,),
            calibration=CalibrationConfig(
                num_utterances=self.calibration_utterances,
                seed=self.seed,
                labels=labels,
                reconstruct=step.recover is None and self.loss == "reconstruction",
                device=self.device,
            ),
            conditions=Conditions(seconds=self.seconds, threads=self.threads or 1),
        )


def run(options: CompressionOptions, pipeline: Pipeline) -> None:
    """Runs a pipeline as a command: notes on standard error, the table on standard output."""
    run_pipeline(pipeline, options.model, options.corpus, options.output, options.threads)


def run_pipeline(pipeline: Pipeline, model: Path, corpus: Path | None, output: Path, threads: int = 0) -> None:
    """Runs a pipeline as a command: notes on standard error, the table on standard output."""
    import torch
    from rich.console import Console

    from sslim.recipes.compression_table import printed_table
    from sslim.recipes.model_card import CARD
    from sslim.recipes.pipeline import compress
    from sslim.training import Processes

    if threads:
        torch.set_num_threads(threads)
    console = Console(stderr=True, highlight=False)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    interrupted = compress(pipeline, model, corpus, output, say=say)
    if interrupted is not None:
        print(f"stopped at step {interrupted.step}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(interrupted.exit_code)
    if not Processes.of_environment().is_main:
        return
    Console(width=TABLE_WIDTH, highlight=False).print(printed_table(output))
    say(f"model: {output / 'model'}   its card: {output / CARD}   next: sslim profile {output / 'model'} --baseline {model}")
