"""Weights pruned while a model is trained: one run with all prunings inside, longer by every one that was put off.

MelHuBERT's weight pruning (Lin et al., arXiv 2211.09949): the loss, the optimiser and the learning rate, which stays, are those
of the whole run. When prunings come is said in ``compress.weight_schedule``, what becomes of weights in ``compress.weights``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from sslim.checkpoints import save_model
from sslim.compress.weight_schedule import PruningSchedule
from sslim.compress.weights import IterativeWeightPruning, WeightChoice, sparsity_of
from sslim.config import to_plain
from sslim.models import SpeechModel
from sslim.recipes.distil import NamedTeacher
from sslim.recipes.recovery import RecoveryConfig, Wrap, Write, recover
from sslim.training import ScheduleConfig, TrainingResult

WARMUP_SHARE = 0.05  # of the planned updates, over which the learning rate rises


@dataclass(frozen=True, kw_only=True)
class IterativeWeights:
    """Settings of pruning weights while training.

    Attributes:
        schedule: When how much is pruned.
        choice: Which weights.
        training: Loss, labels, learning rate (warm-up, then constant), data; its ``steps`` are those after the last pruning.
    """

    schedule: PruningSchedule
    choice: WeightChoice = WeightChoice()
    training: RecoveryConfig = RecoveryConfig()

    def __post_init__(self) -> None:
        if self.schedule.recovery_steps:
            raise ValueError(
                f"recovery_steps of the schedule is {self.schedule.recovery_steps}: updates after the last pruning are the "
                "steps of the training, leave it out"
            )


class TrainPruned(Protocol):
    """Trains a model so many updates, with an objective that is wrapped, or goes on with a run; the model is not its own."""

    def __call__(self, total_steps: int, *, wrap: Wrap, write: Write) -> TrainingResult: ...


def prune_weights_iteratively(
    settings: IterativeWeights,
    model: NamedTeacher,
    whole: NamedTeacher,
    corpus: Path,
    output: Path,
    *,
    say: Callable[[str], None] = print,
) -> TrainingResult:
    """Trains and prunes a model, or goes on with what ``output`` holds; the pruned model is then in ``output/model``.

    Args:
        settings: How.
        model: What is pruned; it stays as it is.
        whole: The model before any compression, for losses that learn from one.
        corpus: A prepared corpus.
        output: Run folder.
        say: Where notes for the user go.

    Raises:
        ValueError: The model is as sparse as the schedule's end already, or anything else about data, models or settings that
            cannot work.
    """
    schedule = replace(settings.schedule, recovery_steps=settings.training.steps)
    schedule = what_is_left(schedule, settings.choice, model.model, say)
    rate = ScheduleConfig(kind="warmup", warmup_steps=max(1, round(WARMUP_SHARE * schedule.planned_steps)))

    def train(total_steps: int, *, wrap: Wrap, write: Write) -> TrainingResult:
        config = replace(settings.training, steps=total_steps)
        start = copy.deepcopy(model.model)
        told = described(schedule, settings.choice)
        return recover(start, whole, corpus, output, config, wrap=wrap, write=write, schedule=rate, pruning=told, say=say)

    return train_and_prune(train, schedule, settings.choice, say=say)


def described(schedule: PruningSchedule, choice: WeightChoice) -> dict[str, Any]:
    """Returns what is pruned, and when, for the ``run.json`` of the training."""
    return {"schedule": to_plain(schedule), "choice": to_plain(choice)}


def what_is_left(
    schedule: PruningSchedule, choice: WeightChoice, model: SpeechModel, say: Callable[[str], None]
) -> PruningSchedule:
    """Returns the schedule without what a pruned model has behind it.

    Raises:
        ValueError: Nothing is left.
    """
    sparsity = sparsity_of(model, biases=choice.biases)
    left = schedule.above(sparsity)
    if gone := len(schedule.sparsities) - len(left.sparsities):
        say(f"note: the model has sparsity {sparsity:.4g} already: {gone} of {len(schedule.sparsities)} prunings are left out")
    return left


def train_and_prune(
    train: TrainPruned, schedule: PruningSchedule, choice: WeightChoice, *, say: Callable[[str], None] = print
) -> TrainingResult:
    """Runs training with prunings inside to its end: as planned, and on by what was put off.

    Every model that is saved tells in its provenance what was pruned so far (``IterativeWeightPruning.record``).

    Args:
        train: Starts or resumes the run; every call begins with a model of its own, in the same state.
        schedule: When how much is pruned; its ``recovery_steps`` end the run.
        choice: Which weights.
        say: Told how the run went on.

    Returns:
        The result of the last part: not finished where a signal ended it.
    """
    steps = schedule.planned_steps
    while True:
        result, pruning = _part(train, steps, schedule, choice)
        out_of_time = result.step < steps
        if not result.finished or out_of_time or pruning.steps_needed <= result.step:
            break
        steps = pruning.steps_needed
        say(f"note: prunings were put off until the loss came to rest: the run goes on to update {steps:,}")
    if result.finished:
        say(f"sparsity {float(pruning.sparsity):.4g} after {result.step:,} updates")
        if pruning.shortfall is not None:
            say(f"note: {pruning.shortfall}")
    return result


def _part(
    train: TrainPruned, steps: int, schedule: PruningSchedule, choice: WeightChoice
) -> tuple[TrainingResult, IterativeWeightPruning]:
    """Trains up to a number of updates; also gives the objective, which knows where the schedule stands."""
    made: list[IterativeWeightPruning] = []

    def wrap(objective: nn.Module) -> nn.Module:
        made.append(IterativeWeightPruning(objective, schedule, choice))
        return made[0]

    def write(model: SpeechModel, folder: Path) -> None:
        told = copy.copy(model)  # shares everything but the list
        told.provenance = [*model.provenance, made[0].record()]
        save_model(told, folder)

    return train(steps, wrap=wrap, write=write), made[0]
