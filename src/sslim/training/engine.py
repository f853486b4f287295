"""One step of training and one pass of validation: tensors in, numbers out, no files.

A step first prepares every micro-batch (front-end, masks), adds up over micro-batches and processes how many frames each
loss term covers, then runs forward and backward for each against those totals. Everything random is seeded from (run seed,
step, micro-batch), so no random state is ever saved, and two processes compute what one does that accumulates twice as
many.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sslim.batch import Batch, StepOutput
from sslim.training.config import TrainerConfig
from sslim.training.distributed import Processes
from sslim.training.metrics import Sums, means
from sslim.training.optimizers import build_optimizer, set_learning_rate, trained_parameters
from sslim.training.protocols import BatchSource
from sslim.training.seeds import derive_seed, seed_device


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one sentence."""


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a step gave on this process.

    Attributes:
        updated: Whether the parameters were updated; False when the loss or a gradient of any process is not finite, or nothing
            of the step is scored.
        scored: Whether anything of the step, on any process, is scored.
        losses: Of each micro-batch, its share of the step's loss.
        gradient_norm: Before clipping, of the whole step.
        sums: Metrics of the micro-batches.
    """

    updated: bool
    losses: list[float]
    gradient_norm: float
    sums: Sums
    scored: bool = True


def suspects(batches: list[Batch], outcome: StepOutcome, processes: Processes) -> list[str]:
    """Returns the utterances of the micro-batches whose loss is not finite, on any process; all when every loss is finite."""
    parts = [(batch.ids, math.isfinite(loss)) for batch, loss in zip(batches, outcome.losses, strict=True)]
    everyone = [part for gathered in processes.gather(parts) for part in gathered]
    chosen = [ids for ids, finite in everyone if not finite] or [ids for ids, _ in everyone]
    return [name for ids in chosen for name in ids]


class Engine:
    """Runs an objective.

    Args:
        objective: On its device, with the ``Objective`` protocol.
        config: Settings.
        device: Where the objective is.
        processes: Who takes part.
    """

    def __init__(self, objective: nn.Module, config: TrainerConfig, device: torch.device, processes: Processes) -> None:
        self.objective, self.config, self.device, self.processes = objective, config, device, processes
        if config.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise ValueError("precision 'bf16' is asked for, but this GPU has no bfloat16; use 'fp32'")
        if config.gradient_checkpointing:
            if not hasattr(objective, "set_gradient_checkpointing"):
                raise ValueError(f"{type(objective).__name__} has no gradient checkpointing; leave gradient_checkpointing off")
            objective.set_gradient_checkpointing(True)  # type: ignore[operator]
        self.optimizer = build_optimizer(objective, config.optimizer)
        self.parameters = list(trained_parameters(objective).values())
        self._validation_totals: dict[str, Tensor] | None = None

    @property
    def advice(self) -> str | None:
        """A sentence for the user about a setting that works but does not pay on this machine."""
        if self.config.precision != "bf16" or self.device.type != "cpu":
            return None
        capability = torch.backends.cpu.get_cpu_capability()
        if capability in ("DEFAULT", "AVX2"):
            return f"this CPU ({capability}) computes bf16 in software, many times slower: precision fp32 is the better choice"
        return None

    def begin(self) -> None:
        """Compiles, and gives all processes the same parameters; after these have been restored."""
        self.processes.copy_from_main(tensor.detach() for tensor in self.objective.state_dict().values())
        if self.config.compile:
            self.objective.compile(backend=self.config.compile_backend)

    def _prepare(self, batch: Batch, *purpose: int | str) -> Any:
        seed = derive_seed(self.config.seed, "prepare", *purpose)
        seed_device(seed, self.device)
        return self.objective.prepare(batch.to(self.device), torch.Generator().manual_seed(seed))  # type: ignore[operator]

    def _forward(self, prepared: Any, totals: dict[str, Tensor], *purpose: int | str) -> StepOutput:
        seed_device(derive_seed(self.config.seed, "forward", *purpose), self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.objective(prepared, totals)

    def _totals(self, weights: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], bool]:
        """Adds weights up over micro-batches and processes; tells whether there are any.

        Each sum is at least 1, so that an empty term is divided by something.
        """
        names = sorted(weights[0])
        rows = [torch.stack([part[name].to(torch.float64) for name in names]) for part in weights]
        sums = self.processes.sum(torch.stack(rows).sum(0))
        return dict(zip(names, sums.clamp(min=1.0).float(), strict=True)), bool(sums.any())

    def train_step(self, batches: list[Batch], step: int, learning_rate: float) -> StepOutcome:
        """Computes gradients of this process's micro-batches and updates the parameters once.

        Raises:
            TrainingError: The GPU has not enough memory. (Going on without that micro-batch would change the step in silence.)
        """
        self.objective.train()
        if hasattr(self.objective, "begin_step"):
            shared = torch.Generator().manual_seed(derive_seed(self.config.seed, "step", step))
            self.objective.begin_step(step, shared)  # type: ignore[operator]
        micro = [self.processes.rank + i * self.processes.world_size for i in range(len(batches))]
        losses, sums = [], Sums(self.device)
        try:
            prepared = [self._prepare(batch, step, j) for batch, j in zip(batches, micro, strict=True)]
            totals, scored = self._totals([item.weights for item in prepared])
            if not scored:
                return StepOutcome(updated=False, losses=[0.0] * len(batches), gradient_norm=0.0, sums=sums, scored=False)
            for item, j in zip(prepared, micro, strict=True):
                output = self._forward(item, totals, step, j)
                output.loss.backward()
                losses.append(output.loss.detach())
                sums.add({**output.metrics, "loss": (output.loss, 0.0)})
        except torch.OutOfMemoryError as error:
            shapes = ", ".join(str(tuple(batch.inputs.shape)) for batch in batches)
            raise TrainingError(f"out of memory at step {step} with inputs {shapes}: lower max_frames_per_batch") from error
        self.processes.sum_gradients(self.parameters)
        outcome = self._update(losses, sums, learning_rate)
        if outcome.updated and hasattr(self.objective, "end_step"):
            loss = self.processes.sum(torch.tensor(sum(outcome.losses), dtype=torch.float64, device=self.device))
            self.objective.end_step(step, float(loss), self.optimizer)  # type: ignore[operator]
        return outcome

    def _update(self, losses: list[Tensor], sums: Sums, learning_rate: float) -> StepOutcome:
        """Updates the parameters, unless something is not finite: then parameters and optimiser state stay as they are."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        *values, norm_value = torch.stack([*losses, norm.to(self.device)]).tolist()
        bad = not all(math.isfinite(value) for value in (*values, norm_value))
        bad = bool(self.processes.maximum([bad], self.device)[0])
        if not bad:
            if self.config.max_grad_norm is not None:
                nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, norm)
            set_learning_rate(self.optimizer, learning_rate)
            self.optimizer.step()
            if self.processes.is_main:
                sums.add({"loss": (0.0, 1.0), "gradient_norm": (norm_value, 1.0)})
        self.optimizer.zero_grad(set_to_none=True)
        return StepOutcome(updated=not bad, losses=values, gradient_norm=norm_value, sums=sums)

    @torch.no_grad()
    def evaluate(self, source: BatchSource, stopped: Callable[[], bool]) -> dict[str, float | None] | None:
        """Returns the means over epoch 0 of a source, with the same masks every time; None when it was stopped halfway.

        Args:
            source: Validation micro-batches; process r takes every W-th.
            stopped: Asked between micro-batches; with several processes not heeded, they would part ways.
        """
        mode = self.objective.training
        self.objective.eval()
        mine = range(self.processes.rank, source.num_batches, self.processes.world_size)
        try:
            if self._validation_totals is None:  # the same every time, so counted once
                counts = Sums(self.device)
                for i in mine:
                    weights = self._prepare(source[0, i], "validation", i).weights
                    counts.add({name: (value, 1.0) for name, value in weights.items()})
                totals = counts.gathered(self.processes)
                self._validation_totals = {k: torch.tensor(max(v, 1.0), device=self.device) for k, (v, _) in totals.items()}
            sums = Sums(self.device)
            for i in mine:
                if self.processes.world_size == 1 and stopped():
                    return None
                prepared = self._prepare(source[0, i], "validation", i)
                output = self._forward(prepared, self._validation_totals, "validation", i)
                sums.add({**output.metrics, "loss": (output.loss, 0.0)})
            total = sums.gathered(self.processes)
            return means({**total, "loss": [total["loss"][0], 1.0]})
        finally:
            self.objective.train(mode)
