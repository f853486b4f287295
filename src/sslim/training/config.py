"""Settings of the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sslim.training.optimizers import OptimizerConfig
from sslim.training.schedules import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How to train.

    Attributes:
        total_steps: Updates of the whole run.
        epochs: Passes over the data, instead of total_steps.
        max_minutes: Stop after this much training time, all sessions together. Such a run cannot be repeated exactly.
        accumulate: Micro-batches of a step on each process.
        max_grad_norm: Gradients are scaled down to this norm; None leaves them.
        precision: ``bf16`` runs the forward under autocast; parameters, losses and updates stay fp32.
        compile: Compile the objective's forward with ``torch.compile``.
        compile_backend: Its backend.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        log_every: Steps between lines in metrics.jsonl.
        validate_every: Steps between validations; None validates only at the end.
        save_every: Steps between checkpoints; there is always one at the end and when the run is stopped.
        save_every_epochs: Epochs between checkpoints, instead of save_every.
        keep_checkpoints: Newest checkpoints that are kept.
        seed: Everything random follows from it.
        num_workers: Processes that build batches; 0 uses a thread, which is enough for stored features.
        device: Where to train.
        max_bad_steps: Non-finite steps in a row that end the run.
        tensorboard: Also write TensorBoard events.
        optimizer: Optimiser.
        schedule: Learning rate over the steps.
    """

    total_steps: int | None = None
    epochs: int | None = None
    max_minutes: float | None = None
    accumulate: int = 1
    max_grad_norm: float | None = 10.0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    compile_backend: str = "inductor"
    gradient_checkpointing: bool = False
    log_every: int = 50
    validate_every: int | None = None
    save_every: int = 1000
    save_every_epochs: int | None = None
    keep_checkpoints: int = 2
    seed: int = 0
    num_workers: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_bad_steps: int = 10
    tensorboard: bool = False
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        if self.total_steps is not None and self.epochs is not None:
            raise ValueError(f"total_steps {self.total_steps} and epochs {self.epochs} are both given; give one")
        if self.total_steps is None and self.epochs is None and self.max_minutes is None:
            raise ValueError("nothing says when to stop: give total_steps, epochs or max_minutes")
        positive = ("total_steps", "epochs", "max_minutes", "accumulate", "max_grad_norm", "log_every", "validate_every")
        for name in (*positive, "save_every", "save_every_epochs", "keep_checkpoints", "max_bad_steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        if self.total_steps is None and self.epochs is None and self.schedule.needs_total:
            raise ValueError(
                f"a {self.schedule.kind!r} schedule needs total_steps or epochs; max_minutes alone does not give the steps"
            )


MAY_CHANGE = frozenset(
    {
        "total_steps",
        "epochs",
        "max_minutes",
        "accumulate",
        "compile",
        "compile_backend",
        "gradient_checkpointing",
        "log_every",
        "validate_every",
        "save_every",
        "save_every_epochs",
        "keep_checkpoints",
        "num_workers",
        "device",
        "max_bad_steps",
        "tensorboard",
    }
)
"""Trainer settings that a resumed run may change: when to stop and what to watch, not what is learnt from the same data.

``accumulate`` is here because it changes with the number of processes; the trainer itself checks their product.
"""
