"""Learning-rate schedules: pure functions of the step, giving a factor on the configured rate.

Step 0 is the first update. A warm-up of W steps gives 1/W, 2/W, ..., 1 at steps 0 to W - 1; the last step of a decay is
still above its final value, so that every update does something.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning-rate schedule.

    Attributes:
        kind: ``constant``; ``warmup`` (linear, then constant); ``linear`` (warm-up, then down to final_factor; fairseq's
            ``polynomial_decay``, S3PRL's linear schedule); ``cosine`` (likewise along half a cosine); ``tri-stage``
            (warm-up, hold, exponential decay; fairseq's ``tri_stage``).
        warmup_steps: Steps of warm-up.
        warmup_share: Warm-up as a share of all steps, instead of warmup_steps.
        hold_share: For ``tri-stage``: share of all steps at the full rate; the rest decays.
        initial_factor: Where warm-up starts (never reached itself).
        final_factor: Where decay ends.
    """

    kind: Literal["constant", "warmup", "linear", "cosine", "tri-stage"] = "constant"
    warmup_steps: int = 0
    warmup_share: float = 0.0
    hold_share: float = 0.4
    initial_factor: float = 0.0
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or not 0.0 <= self.warmup_share < 1.0:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must be at least 0, and warmup_share {self.warmup_share} in [0, 1)"
            )
        if self.warmup_steps and self.warmup_share:
            raise ValueError(f"warmup_steps {self.warmup_steps} and warmup_share {self.warmup_share} are both given; give one")
        if self.kind == "tri-stage" and not 0.0 < self.final_factor <= 1.0:
            raise ValueError(
                f"final_factor {self.final_factor} of a tri-stage schedule must be above 0 and at most 1, such as 0.01"
            )

    @property
    def needs_total(self) -> bool:
        """Whether the number of steps must be known beforehand."""
        return self.kind not in ("constant", "warmup") or self.warmup_share > 0


def _constant(progress: float, config: ScheduleConfig) -> float:
    return 1.0


def _linear(progress: float, config: ScheduleConfig) -> float:
    return 1.0 + (config.final_factor - 1.0) * progress


def _cosine(progress: float, config: ScheduleConfig) -> float:
    return config.final_factor + (1.0 - config.final_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _exponential(progress: float, config: ScheduleConfig) -> float:
    return config.final_factor**progress


def learning_rate_factor(config: ScheduleConfig, step: int, total_steps: int | None) -> float:
    """Returns the factor for the update at ``step`` (0-based).

    Args:
        config: The schedule.
        step: Updates before this one.
        total_steps: Updates of the whole run; None when it is not known.

    Raises:
        ValueError: The schedule needs the total and it is None.
    """
    if total_steps is None and config.needs_total:
        raise ValueError(f"a {config.kind!r} schedule needs total_steps or epochs; without them use 'constant' or 'warmup'")
    total = total_steps or 0
    warmup = config.warmup_steps or round(config.warmup_share * total)
    if config.kind == "constant":
        warmup = 0
    if step < warmup:
        return config.initial_factor + (1.0 - config.initial_factor) * (step + 1) / warmup
    hold = round(config.hold_share * total) if config.kind == "tri-stage" else 0
    decay_steps = max(1, total - warmup - hold)
    progress = min(1.0, max(0.0, (step - warmup - hold) / decay_steps))
    return SCHEDULES[config.kind](progress, config)


SCHEDULES: dict[str, Callable[[float, ScheduleConfig], float]] = {
    "constant": _constant,
    "warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "tri-stage": _exponential,
}
"""What follows warm-up (and hold): share of the decay that is over, to factor."""
