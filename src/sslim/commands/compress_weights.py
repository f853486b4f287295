"""``sslim compress weights``: sets the least important weights of a model to zero, at once, in rounds, or while training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from sslim.commands.compression_options import CompressionOptions, run

if TYPE_CHECKING:
    from sslim.compress.weight_schedule import PruningSchedule
    from sslim.recipes.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class Options(CompressionOptions):
    """Set the least important weights of MODEL's encoder to zero; training afterwards keeps them there.

    Sizes stay, and so does the time: zeros are multiplied like any other number without a sparse kernel.

    With --schedule or --prunings there is one training with the prunings inside, as in MelHuBERT's compression, and
    --recover-steps follow the last of them. Examples:
    `sslim compress weights runs/teacher --sparsity 0.75 --rounds 3 --corpus corpora/speech --recover-minutes 2
    --output runs/sparse`,
    `sslim compress weights runs/teacher --schedule 0.5,0.7,0.8 --condition converge --corpus corpora/speech --labels km100
    --output runs/sparse`.
    """

    sparsity: float | None = None
    """Share of all weights that is zero afterwards."""
    scope: Literal["global", "layer"] = "global"
    """global: chosen over the whole encoder; layer: the same share of every layer."""
    score: Literal["magnitude", "random"] = "magnitude"
    """Whether the smallest weights go or random ones."""
    biases: bool = False
    """Prune biases too."""
    schedule: str | None = None
    """Rising sparsities such as 0.2,0.4,0.6, one for each pruning of a training, in place of --sparsity."""
    prunings: int | None = None
    """Prunings of a training that lead to --sparsity in equal steps."""
    warm_up: int | None = None
    """Updates before the first pruning. Default: --period."""
    period: int = 1_000
    """Updates from one pruning to the next."""
    condition: Literal["normal", "converge"] = "normal"
    """normal: prune when the period is over; converge: only when the loss has come to rest, else wait another period."""
    tolerance: float = 0.001
    """With converge, the largest change of the smoothed loss at rest."""
    average_length: int | None = None
    """With converge, updates between the smoothed losses that are compared. Default: 0.6 of the period."""
    smooth_factor: float | None = None
    """With converge, the share that the smoothed loss keeps of itself at every update. Default: 1 - 5 / period."""
    max_extensions: int = 4
    """With converge, how often a pruning is put off."""
    at_cap: Literal["prune", "stop"] = "prune"
    """Then prune all the same, or prune no more."""


SCHEDULED = ("warm_up", "period", "condition", "tolerance", "average_length", "smooth_factor", "max_extensions", "at_cap")


def main(options: Options) -> None:
    """Prunes, trains if asked to, and prints what was bought."""
    schedule = _schedule(options)
    if schedule is not None:
        run(options, _while_training(options, schedule))
        return
    if options.sparsity is None:
        raise ValueError("nothing says how many weights go: give --sparsity, or --schedule")
    run(options, options.pipeline("weights", {"sparsity": options.sparsity, **_choice(options)}))


def _choice(options: Options) -> dict[str, Any]:
    return {"scope": options.scope, "score": options.score, "biases": options.biases, "seed": options.seed}


def _schedule(options: Options) -> PruningSchedule | None:
    """The schedule that the options describe; None where there is none."""
    from sslim.compress.weight_schedule import PruningSchedule

    if options.schedule is None and options.prunings is None:
        if given := [name for name in SCHEDULED if getattr(options, name) != Options.__dataclass_fields__[name].default]:
            raise ValueError(
                f"--{given[0].replace('_', '-')} belongs to prunings inside a training: give --schedule or --prunings"
            )
        return None
    if options.rounds != 1:
        raise ValueError(
            f"--rounds is {options.rounds}, but prunings inside a training are listed with --schedule: leave it out"
        )
    length, factor = options.average_length, options.smooth_factor
    settings: dict[str, Any] = {
        "warm_up": options.period if options.warm_up is None else options.warm_up,
        "period": options.period,
        "condition": options.condition,
        "tolerance": options.tolerance,
        "average_length": max(1, round(0.6 * options.period)) if length is None else length,
        "smooth_factor": max(0.0, 1.0 - 5.0 / max(options.period, 1)) if factor is None else factor,
        "max_extensions": options.max_extensions,
        "at_cap": options.at_cap,
    }
    if options.prunings is not None:
        if options.sparsity is None or options.schedule is not None:
            raise ValueError("--prunings divides --sparsity into equal steps: give both, and no --schedule")
        return PruningSchedule.linear(options.sparsity, options.prunings, **settings)
    assert options.schedule is not None
    if options.sparsity is not None:
        raise ValueError(f"--schedule ends at the sparsity that is reached: leave out --sparsity {options.sparsity:g}")
    try:
        listed = tuple(float(part) for part in options.schedule.split(","))
    except ValueError as error:
        raise ValueError(f"--schedule is {options.schedule!r}; expected sparsities such as 0.2,0.4,0.6") from error
    return PruningSchedule(sparsities=listed, **settings)


def _while_training(options: Options, schedule: PruningSchedule) -> Pipeline:
    """The pipeline of one training with prunings inside; it goes on after the last one."""
    from sslim.config import to_plain
    from sslim.recipes.pipeline import StepConfig

    steps = options.period if options.recover_steps is None else options.recover_steps
    training = replace(options, recover_steps=steps).recovery()
    settings = {"schedule": to_plain(schedule), "choice": _choice(options), "training": to_plain(training)}
    return options.pipeline_of(StepConfig(method="iterative-weights", settings=settings))
