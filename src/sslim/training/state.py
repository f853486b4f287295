"""Where a run stands: everything beside tensors that the next session needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from sslim.config import from_plain, read_json, to_plain
from sslim.storage import load_tensors, save_tensors, write_json
from sslim.training.loading import Position
from sslim.training.optimizers import load_optimizer_state, save_optimizer_state
from sslim.training.protocols import Record


@dataclass(kw_only=True)
class TrainerState:
    """State of a run after a whole number of steps.

    Attributes:
        step: Steps done, skipped ones included.
        position: Data position of the next step.
        skipped_steps: Steps without an update because something was not finite.
        bad_in_a_row: How many of them just now.
        elapsed_s: Training time of all sessions.
        validated_step: Step of the last whole validation.
        warned: Sentinels that have spoken.
        window: Metric sums since the last train record.
        log_bytes: Size of metrics.jsonl.
        data_digest: Of the training batches.
        micro_batches_per_step: Over all processes.
    """

    step: int = 0
    position: Position = field(default_factory=Position)
    skipped_steps: int = 0
    bad_in_a_row: int = 0
    elapsed_s: float = 0.0
    validated_step: int = 0
    warned: list[str] = field(default_factory=list)
    window: dict[str, list[float]] = field(default_factory=dict)
    log_bytes: int = 0
    data_digest: str = ""
    micro_batches_per_step: int = 1


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a session of a run ended.

    Attributes:
        step: Steps done.
        finished: False when a signal ended it; the same command goes on.
        exit_code: 0, 143 after SIGTERM, 130 after Ctrl-C.
        skipped_steps: Steps without an update.
        validation: The last validation record; empty without validation.
    """

    step: int
    finished: bool
    exit_code: int
    skipped_steps: int
    validation: Record


def write_checkpoint(folder: Path, state: TrainerState, objective: nn.Module, optimizer: Optimizer) -> None:
    """Writes ``objective.safetensors``, ``optimizer.safetensors`` and ``trainer.json``."""
    save_tensors(folder / "objective.safetensors", objective.state_dict())
    save_optimizer_state(folder, optimizer, objective)
    write_json(folder / "trainer.json", to_plain(state))


def read_checkpoint(folder: Path, objective: nn.Module, optimizer: Optimizer) -> TrainerState:
    """Restores what ``write_checkpoint`` wrote; strict in both directions.

    Raises:
        ValueError: The checkpoint belongs to another objective.
    """
    tensors = load_tensors(folder / "objective.safetensors")
    expected = objective.state_dict()
    for name in sorted(tensors.keys() ^ expected.keys()):
        raise ValueError(f"{folder}: {name!r} is {'not in' if name in tensors else 'only in'} the objective being trained")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{folder}: {name!r} has shape {tuple(tensor.shape)}, the objective {tuple(expected[name].shape)}")
    objective.load_state_dict(tensors, strict=True)
    load_optimizer_state(folder, optimizer, objective, strict=True)
    return from_plain(TrainerState, read_json(folder / "trainer.json"), str(folder / "trainer.json"))
