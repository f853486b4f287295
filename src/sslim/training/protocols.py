"""What the trainer asks of the parts it is given. It knows nothing else about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sslim.batch import Batch, StepOutput


class Prepared(Protocol):
    """A micro-batch with everything random already drawn.

    Attributes:
        weights: How many frames (or other units) each loss term covers in this micro-batch; 0-d tensors.
    """

    @property
    def weights(self) -> dict[str, Tensor]: ...


class Objective(Protocol):
    """An ``nn.Module`` that holds the model and turns micro-batches into losses.

    The loss of a step is the mean of each term over all frames of the *global* batch: micro-batches and processes only add
    up their sums. So the trainer first prepares every micro-batch of the step, adds up the weights, and then hands the
    totals to each ``forward``, whose loss is ``sum over terms of coefficient * sum_of_term / totals[term]``.

    ``prepare`` runs on the device without autocast; ``forward`` runs under autocast when bf16 is asked for and is what gets
    compiled: layers that are trained belong there. An objective may also have ``set_gradient_checkpointing(enabled)``;
    ``begin_step(step, generator)``, called before a training step with a generator that is the same on all processes;
    ``end_step(step, loss, optimizer)``, called after one on all processes with the loss of the whole step, the same number on
    each, unless the step was skipped because something was not finite; and ``learning_rate_factors()``, which maps names of
    parameters or of modules to multiples of the run's learning rate, for parameters that get no weight decay either. A frozen
    teacher keeps itself in eval mode (by overriding ``train``) and has ``requires_grad`` off, which keeps it out of the
    optimiser.
    """

    def prepare(self, batch: Batch, generator: torch.Generator) -> Any:
        """Returns a ``Prepared``; everything random comes from the generator (CPU) or, for dropout, the global state."""
        ...

    def forward(self, prepared: Any, totals: dict[str, Tensor]) -> StepOutput:
        """Returns this micro-batch's share of the step's loss, and metrics that add up."""
        ...


class BatchSource(Protocol):
    """Micro-batches by epoch and index, for example ``CorpusBatches``.

    Attributes:
        num_batches: Micro-batches in every epoch.
        digest: Tells one source from another; a run does not resume on another one.
    """

    @property
    def num_batches(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        """Micro-batch ``(epoch, index)``, a pure function of the two."""
        ...


Record = Mapping[str, Any]  # one line of metrics.jsonl
Sentinel = Callable[[Sequence[Record]], str | None]  # train records so far, oldest first, to a warning
SaveModel = Callable[[Path], None]  # writes the native model folder
BatchCheck = Callable[[Batch], None]  # raises ValueError with one sentence
