"""When weights are pruned: a list of sparsities over the updates of a run, each step taken when the loss has come to rest.

It is the schedule of MelHuBERT's weight pruning (Lin et al., arXiv 2211.09949; the ``prune`` section of its runner files), as a
function of the run's losses without side effects. What differs from the reference:

- the smoothed loss is corrected for its start from zero (as Adam's moments are), so that it is the weighted mean of all losses
  since the last pruning; there it begins with the mean of three, whose weight has not gone when it is compared;
- it is compared with what it was ``average_length`` updates before the check, whatever the warm-up;
- a loss that rises has not come to rest either, and a check can be put off ``max_extensions`` times, not without end.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal

Action = Literal["train", "wait", "prune", "stop"]


@dataclass(frozen=True, kw_only=True)
class PruningSchedule:
    """Settings of iterative pruning; updates are counted from the start of the run.

    Attributes:
        sparsities: Share of all weights that is zero after each pruning, rising (``sparsity``).
        warm_up: Updates before the first pruning, which waits for nothing else (``warnup`` in the reference's files).
        period: Updates from one check to the next (``period``).
        condition: ``normal`` prunes at every check; ``converge`` only where the loss has come to rest since the last pruning
            (``pruning_condition``).
        tolerance: Largest change, up or down, of a smoothed loss at rest (``converge_loss_tolerance``).
        average_length: Updates between the two smoothed losses that are compared (``average_length``).
        smooth_factor: Share that the smoothed loss keeps of itself at every update (``smooth_factor``).
        max_extensions: How often a pruning is put off by a period; then ``at_cap`` decides.
        at_cap: ``prune`` all the same, or ``stop``: prune no more in this run.
        recovery_steps: Updates after the last pruning.
        latest_pruning: Updates after which nothing may be pruned any more: a check is put off only while the rest of the list
            still fits. None lets the run grow by every extension.
    """

    sparsities: tuple[float, ...]
    warm_up: int
    period: int
    condition: Literal["normal", "converge"] = "normal"
    tolerance: float = 0.001
    average_length: int = 15_000
    smooth_factor: float = 0.9998
    max_extensions: int = 4
    at_cap: Literal["prune", "stop"] = "prune"
    recovery_steps: int = 0
    latest_pruning: int | None = None

    def __post_init__(self) -> None:
        listed = list(self.sparsities)
        if not listed or any(not 0.0 < value < 1.0 for value in listed) or any(a >= b for a, b in pairwise(listed)):
            raise ValueError(f"sparsities are {listed}; expected one or more rising numbers above 0 and below 1")
        for name, least in (("warm_up", 1), ("period", 1), ("max_extensions", 0), ("recovery_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number from {least}")
        if not 0.0 <= self.smooth_factor < 1.0 or self.tolerance < 0.0:
            raise ValueError(
                f"smooth_factor is {self.smooth_factor} and tolerance {self.tolerance}; expected a number from 0 below 1, and "
                "one from 0"
            )
        if self.condition == "converge" and not 0 < self.average_length < self.period:
            raise ValueError(
                f"average_length is {self.average_length}; expected 1 or more, and less than the period of {self.period} "
                "updates, or a pruning would lie between the losses that are compared"
            )
        if self.latest_pruning is not None and self.latest_pruning < self.last_check:
            raise ValueError(
                f"latest_pruning is {self.latest_pruning}, but {len(listed)} prunings last until update {self.last_check}"
            )

    @classmethod
    def linear(cls, target: float, num_prunings: int, **settings: Any) -> PruningSchedule:
        """Returns a schedule of equal steps to a sparsity (the reference's single number with ``n_iters``)."""
        if num_prunings < 1:
            raise ValueError(f"num_prunings is {num_prunings}; expected a number from 1")
        return cls(sparsities=tuple(target * (k + 1) / num_prunings for k in range(num_prunings)), **settings)

    @property
    def last_check(self) -> int:
        """Update after which the last pruning comes, when none is put off."""
        return self.warm_up + (len(self.sparsities) - 1) * self.period

    @property
    def planned_steps(self) -> int:
        """Updates of a run in which no pruning is put off."""
        return self.last_check + self.recovery_steps

    def above(self, sparsity: float) -> PruningSchedule:
        """Returns the schedule without the steps that a model of this sparsity has behind it.

        Raises:
            ValueError: Nothing is left of it.
        """
        left = tuple(value for value in self.sparsities if value > sparsity)
        if not left:
            raise ValueError(
                f"the model has sparsity {sparsity:.4g} already, the schedule ends at {self.sparsities[-1]:g}: nothing is left"
            )
        return replace(self, sparsities=left)

    def start(self) -> Progress:
        """Returns where a run begins."""
        return Progress(next_check=self.warm_up)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands in its schedule.

    Attributes:
        next_check: Updates done when the next pruning is considered.
        prunings: Prunings done.
        extensions: How often the next one was put off.
        num_losses: Losses since the last pruning.
        average: Their exponential average, not corrected for its start from 0.
        earlier: The corrected one ``average_length`` updates before the next check; NaN until then.
        stopped: Whether pruning was given up.
        last_step: Updates done at the last pruning, or when pruning was given up; 0 before.
    """

    next_check: int
    prunings: int = 0
    extensions: int = 0
    num_losses: int = 0
    average: float = 0.0
    earlier: float = math.nan
    stopped: bool = False
    last_step: int = 0

    def is_over(self, schedule: PruningSchedule) -> bool:
        """Whether nothing will be pruned any more."""
        return self.stopped or self.prunings == len(schedule.sparsities)

    def smoothed(self, schedule: PruningSchedule) -> float:
        """Weighted mean of the losses since the last pruning; there has to be one."""
        return self.average / (1.0 - schedule.smooth_factor**self.num_losses)

    def steps_needed(self, schedule: PruningSchedule) -> int:
        """Returns the updates of the whole run, recovery included, if no pruning is put off from now on."""
        if self.is_over(schedule):
            return self.last_step + schedule.recovery_steps
        remaining = len(schedule.sparsities) - self.prunings
        return self.next_check + (remaining - 1) * schedule.period + schedule.recovery_steps

    def to_numbers(self) -> list[float]:
        """Returns the fields in order, for a float64 tensor; see :meth:`from_numbers`."""
        return [float(value) for value in astuple(self)]

    @classmethod
    def from_numbers(cls, numbers: list[float]) -> Progress:
        """Reads what :meth:`to_numbers` gives."""
        kinds = {"int": int, "float": float, "bool": bool}
        return cls(**{field.name: kinds[str(field.type)](value) for field, value in zip(fields(cls), numbers, strict=True)})


def advance(schedule: PruningSchedule, progress: Progress, completed: int, loss: float) -> tuple[Progress, Action]:
    """Tells what follows an update.

    Args:
        schedule: Settings.
        progress: Before the update.
        completed: Updates done, this one included; an update may have been left out before it.
        loss: Of this update, finite.

    Returns:
        Where the run stands then, and: ``train`` on; ``wait`` (a check was put off); ``prune`` to
        ``schedule.sparsities[prunings - 1]``; or ``stop`` pruning for good.
    """
    if progress.is_over(schedule):
        return progress, "train"
    factor = schedule.smooth_factor
    average = factor * progress.average + (1.0 - factor) * loss
    progress = replace(progress, average=average, num_losses=progress.num_losses + 1)
    if math.isnan(progress.earlier) and completed >= progress.next_check - schedule.average_length:
        progress = replace(progress, earlier=progress.smoothed(schedule))
    if completed < progress.next_check:
        return progress, "train"
    if not _at_rest(schedule, progress):
        if _can_wait(schedule, progress):
            later = progress.next_check + schedule.period
            return replace(progress, next_check=later, extensions=progress.extensions + 1, earlier=math.nan), "wait"
        if schedule.at_cap == "stop":
            return replace(progress, stopped=True, last_step=completed), "stop"
    done, later = progress.prunings + 1, progress.next_check + schedule.period
    return Progress(next_check=later, prunings=done, last_step=completed), "prune"


def _at_rest(schedule: PruningSchedule, progress: Progress) -> bool:
    """Whether the next pruning needs no further training: the first one waits for the warm-up alone."""
    if schedule.condition == "normal" or progress.prunings == 0:
        return True
    return abs(progress.smoothed(schedule) - progress.earlier) <= schedule.tolerance


def _can_wait(schedule: PruningSchedule, progress: Progress) -> bool:
    if progress.extensions >= schedule.max_extensions:
        return False
    if schedule.latest_pruning is None:
        return True
    remaining = len(schedule.sparsities) - progress.prunings
    return progress.next_check + remaining * schedule.period <= schedule.latest_pruning
