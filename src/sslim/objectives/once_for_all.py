"""Once-for-all training: any objective on subnets of a supernet, drawn anew at every step (LightHuBERT's second stage).

LightHuBERT (Wang et al., Interspeech 2022) trains one random subnet a step. The sandwich rule (Yu and Huang 2019, "Universally
slimmable networks") trains the largest, the smallest and a few random ones on the same batch and averages their gradients. A
step has the same subnets for every micro-batch and on every process, drawn from (seed, step) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sslim.batch import Batch, StepOutput
from sslim.models import SpeechModel
from sslim.models.elastic import check_supernet, model_units, model_view
from sslim.models.search_space import Subnet


@dataclass(frozen=True, kw_only=True)
class OnceForAllConfig:
    """Settings of once-for-all training.

    Attributes:
        sandwich: Random subnets that join the largest and the smallest at every step; None trains one random subnet alone.
            Activations of all of them are held at once.
    """

    sandwich: int | None = None

    def __post_init__(self) -> None:
        if self.sandwich is not None and self.sandwich < 0:
            raise ValueError(f"sandwich is {self.sandwich}; expected a number of random subnets from 0, or none at all")


class OnceForAll(nn.Module):
    """Objective: another objective, on subnets.

    What is drawn or computed before the trained layers (masks, a teacher's targets) belongs to the inner objective's
    ``prepare`` and is shared by the subnets of a step. Validation runs the largest, the smallest and the default subnet and
    adds their metrics under ``max_``, ``min_`` and ``default_``.

    Args:
        objective: Holds the supernet as its ``student`` or ``model`` and runs it in ``forward`` alone.
        config: Settings.

    Raises:
        ValueError: The model has no search space, or cannot hold it.
    """

    def __init__(self, objective: nn.Module, config: OnceForAllConfig) -> None:
        super().__init__()
        names = [name for name in ("student", "model") if isinstance(getattr(objective, name, None), SpeechModel)]
        if not names:
            raise ValueError(f"{type(objective).__name__} holds no model to take subnets of")
        self.objective, self.config, self._name = objective, config, names[0]
        self.space = check_supernet(self.supernet.config)
        layers = getattr(getattr(objective, "config", None), "student_layers", None)
        if layers is not None and len(self.space.num_layers) > 1:
            raise ValueError(f"student_layers {layers} name layers that shallower subnets lack; match the final output instead")
        self.subnets: tuple[Subnet, ...] = ()
        if hasattr(objective, "set_gradient_checkpointing"):
            self.set_gradient_checkpointing = objective.set_gradient_checkpointing

    @property
    def supernet(self) -> SpeechModel:
        return getattr(self.objective, self._name)

    def begin_step(self, step: int, generator: torch.Generator) -> None:
        """Draws the subnets of a step; the generator is the same on every process."""
        if self.config.sandwich is None:
            self.subnets = (self.space.sample(generator),)
            return
        random = [self.space.sample(generator) for _ in range(self.config.sandwich)]
        self.subnets = (self.space.largest(), self.space.smallest(), *random)

    def prepare(self, batch: Batch, generator: torch.Generator) -> Any:
        """As the inner objective does."""
        return self.objective.prepare(batch, generator)  # type: ignore[operator]

    def forward(self, prepared: Any, totals: dict[str, Tensor]) -> StepOutput:
        """Returns the mean loss of the step's subnets; metrics add up over them.

        Raises:
            RuntimeError: While training, when no step was begun.
        """
        if not self.training:
            return self._validate(prepared, totals)
        if not self.subnets:
            raise RuntimeError("begin_step was not called: no subnet is chosen")
        outputs = [self._run(subnet, prepared, totals) for subnet in self.subnets]
        metrics = {}
        for name in outputs[0].metrics:
            sums, counts = zip(*(output.metrics[name] for output in outputs), strict=True)
            metrics[name] = (sum(sums[1:], sums[0]), sum(counts[1:], counts[0]))
        loss = torch.stack([output.loss for output in outputs]).mean()
        return StepOutput(loss=loss, metrics=metrics)

    def _validate(self, prepared: Any, totals: dict[str, Tensor]) -> StepOutput:
        named = {"max": self.space.largest(), "min": self.space.smallest()}
        if self.space.default is not None:
            named["default"] = self.space.default
        outputs = {name: self._run(subnet, prepared, totals) for name, subnet in named.items()}
        metrics = dict(outputs["max"].metrics)
        for name, output in outputs.items():
            metrics |= {f"{name}_{key}": value for key, value in output.metrics.items()}
        loss = torch.stack([output.loss for output in outputs.values()]).mean()
        return StepOutput(loss=loss, metrics=metrics)

    def _run(self, subnet: Subnet, prepared: Any, totals: dict[str, Tensor]) -> StepOutput:
        with self._on(subnet):
            return self.objective(prepared, totals)

    @contextmanager
    def _on(self, subnet: Subnet) -> Iterator[None]:
        """Puts the subnet in the supernet's place. The view lives as long as the graph, for checkpointed blocks too."""
        supernet = self.supernet
        self.objective._modules[self._name] = model_view(supernet, model_units(supernet.config, subnet))
        try:
            yield
        finally:
            self.objective._modules[self._name] = supernet
