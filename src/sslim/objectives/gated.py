"""Training with gates to a target sparsity: any objective, and a Lagrangian that holds the model to a number of parameters.

DPHuBERT (Peng et al., Interspeech 2023), after Wang, Wohlwend and Lei 2020, "Structured pruning of large language models"
(arXiv 1910.04732): to the loss comes ``lambda1 (s - t) + lambda2 (s - t)^2``, where s is the expected share of parameters that
is gone and t the target, which rises linearly over the first steps. Weights and gates descend, the two multipliers ascend.

Otherwise than in DPHuBERT the multipliers are no parameters of the optimiser. Adam's steps have one size, however small the gap
between s and t is: while the target rises the multipliers grow, and they need as long to fall again, in which the sparsity
overshoots. Here they ascend by the gap itself, and lambda2 does not start at zero, so that the sparsity follows the target
closely. Neither the learning-rate schedule nor the clipping of gradients touches them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from sslim.batch import Batch, StepOutput
from sslim.models import SpeechModel


class GateSet(Protocol):
    """What this objective asks of gates; they are an ``nn.Module``."""

    def attach(self, model: SpeechModel) -> None:
        """Makes a model compute with the gates."""
        ...

    def sample(self) -> None:
        """Draws the gates that training mode has until the next call."""
        ...

    def expected_sparsity(self) -> Tensor:
        """Returns the share of parameters that is expected to be gone, with gradient."""
        ...

    def largest_sparsity(self) -> float:
        """Returns that share when everything is closed."""
        ...


@dataclass(frozen=True, kw_only=True)
class GatedConfig:
    """Settings of training with gates.

    Attributes:
        sparsity: Share of the model's parameters, heads of objectives left out, that is to go.
        ramp_steps: Steps over which the target rises to that, from what the gates' start closes.
        learning_rate_factor: Learning rate of the gates as a multiple of the weights'; DPHuBERT's rates are 0.02 and 2e-4.
        stiffness: Start of lambda2: how hard a gap pulls at once.
        ascent: Rate at which the multipliers ascend: lambda1 changes by this times the gap at every step, lambda2 by this times
            its square.
    """

    sparsity: float = 0.75
    ramp_steps: int = 5_000
    learning_rate_factor: float = 100.0
    stiffness: float = 50.0
    ascent: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 < self.sparsity < 1.0:
            raise ValueError(f"sparsity is {self.sparsity}; expected a share of the parameters, above 0 and below 1")
        if self.learning_rate_factor <= 0:
            raise ValueError(f"learning_rate_factor is {self.learning_rate_factor}; it must be above 0")
        for name in ("ramp_steps", "stiffness", "ascent"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")

    def target(self, step: int, start: float) -> float:
        """Returns the target at a step.

        Args:
            step: Counted from 0.
            start: Sparsity at the start.
        """
        progress = min(1.0, step / self.ramp_steps) if self.ramp_steps else 1.0
        return start + (self.sparsity - start) * progress


@dataclass(frozen=True, kw_only=True)
class PreparedGated:
    """What the inner objective prepared, and the micro-batch's share of the Lagrangian.

    Attributes:
        inner: Of the inner objective.
        weights: Its weights, and one micro-batch.
    """

    inner: Any
    weights: dict[str, Tensor]


class Gated(nn.Module):
    """Objective: another objective on a gated model, and the Lagrangian of its sparsity.

    Every micro-batch has gates of its own. The Lagrangian enters once a step, whatever the number of micro-batches. Validation
    runs the model as it would be cut and gives the inner objective's loss alone.

    Attributes:
        multipliers: lambda1 and lambda2.

    Args:
        objective: Holds the model as its ``student`` or ``model``, with parameters initialised.
        gates: Gates for that model; they are attached to it.
        config: Settings.

    Raises:
        ValueError: There is no model to gate, or the gates cannot take away so much.
    """

    multipliers: Tensor

    def __init__(self, objective: nn.Module, gates: GateSet, config: GatedConfig) -> None:
        super().__init__()
        names = [name for name in ("student", "model") if isinstance(getattr(objective, name, None), SpeechModel)]
        if not names:
            raise ValueError(f"{type(objective).__name__} holds no model that could have gates")
        if config.sparsity > (largest := gates.largest_sparsity()):
            raise ValueError(
                f"sparsity {config.sparsity:g} is asked for, but with every gate closed {largest:.3f} of the parameters are "
                "gone: ask for less, or gate more"
            )
        self.objective, self.config = objective, config
        self.gates = gates
        self.register_buffer("multipliers", torch.tensor([0.0, config.stiffness]))
        self._start = gates.expected_sparsity().item()
        self._target: float | None = None
        gates.attach(getattr(objective, names[0]))
        for name in ("set_gradient_checkpointing", "end_step"):
            if hasattr(objective, name):
                setattr(self, name, getattr(objective, name))

    def learning_rate_factors(self) -> Mapping[str, float]:
        """Gates learn faster than weights."""
        return {"gates": self.config.learning_rate_factor}

    @torch.no_grad()
    def begin_step(self, step: int, generator: torch.Generator) -> None:
        """Sets the step's target and lets the multipliers ascend; the inner objective's turn follows."""
        self._target = self.config.target(step, self._start)
        gap = self.gates.expected_sparsity().float() - self._target
        self.multipliers += self.config.ascent * torch.stack([gap, gap.square()])
        if hasattr(self.objective, "begin_step"):
            self.objective.begin_step(step, generator)  # type: ignore[operator]

    def prepare(self, batch: Batch, generator: torch.Generator) -> PreparedGated:
        """As the inner objective does."""
        inner = self.objective.prepare(batch, generator)  # type: ignore[operator]
        return PreparedGated(
            inner=inner, weights={**inner.weights, "micro_batches": torch.ones((), device=batch.inputs.device)}
        )

    def forward(self, prepared: PreparedGated, totals: dict[str, Tensor]) -> StepOutput:
        """Returns the inner loss, while training with this micro-batch's share of the Lagrangian.

        Raises:
            RuntimeError: While training, when no step was begun.
        """
        if self.training:
            self.gates.sample()
        output = cast(StepOutput, self.objective(prepared.inner, totals))
        sparsity = self.gates.expected_sparsity().float()
        metrics = {"sparsity": sparsity.detach()}
        loss = output.loss
        if self.training:
            if self._target is None:
                raise RuntimeError("begin_step was not called: there is no target")
            gap = sparsity - self._target
            first, second = self.multipliers.unbind()
            loss = loss + (first * gap + second * gap.square()) / totals["micro_batches"]
            metrics |= {"target": torch.tensor(self._target), "lambda1": first, "lambda2": second}
        count = torch.ones((), device=sparsity.device)
        return StepOutput(loss=loss, metrics={**output.metrics, **{name: (value, count) for name, value in metrics.items()}})
