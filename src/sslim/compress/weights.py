"""Pruning of single weights: the smallest (or random) ones of the encoder's matrices become zero and stay zero.

Han et al. 2015 (arXiv 1506.02626) prune by magnitude and train on; MelHuBERT's compression (Lin et al., arXiv 2211.09949) does
so over the whole encoder in many steps, biases included. Here a pruned model is an ordinary model whose tensors hold exact
zeros: no masks and no other names are saved with it. What is zero is what was pruned, whoever did it, and pruning goes on.

Zeros are multiplied like any other number. Without a sparse kernel a pruned model takes the same time and memory as before.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sslim.batch import Batch, StepOutput
from sslim.compress.calibration import Calibration
from sslim.compress.weight_schedule import Progress, PruningSchedule, advance
from sslim.config import to_plain
from sslim.models import ModelConfig, SpeechModel
from sslim.models.elastic import count_parameters
from sslim.models.storage import require_float

STEP = "weights"  # the method's name in a model's provenance
MAPS = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.output",
    "feedforward.up",
    "feedforward.down",
)  # the maps of a block whose matrices (both factors of a factored one) are pruned


@dataclass(frozen=True, kw_only=True)
class WeightChoice:
    """Which weights go first.

    Attributes:
        scope: ``global``: chosen over the whole encoder; ``layer``: the same share of every block. (A block that several layers
            share counts once.)
        score: ``magnitude``: the smallest go first; ``random``: drawn.
        biases: Whether the biases of the matrices are pruned with them, in the same pool; the reference does so.
        seed: Decides the draw. With one seed, pruning in steps removes what pruning at once does.
    """

    scope: Literal["global", "layer"] = "global"
    score: Literal["magnitude", "random"] = "magnitude"
    biases: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class WeightPruning(WeightChoice):
    """Settings of pruning at once.

    Attributes:
        sparsity: Share of all weights of the encoder's matrices that is zero afterwards, those included that were before.
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity is {self.sparsity}; expected a share from 0 below 1")


def prunable_weights(model: SpeechModel, *, biases: bool) -> dict[str, nn.Parameter]:
    """Returns the encoder's matrices by their names in the model, in a fixed order, with their biases where these count."""
    starts = tuple(f"{part}." for part in MAPS)
    return {
        f"encoder.blocks.{number}.{name}": parameter
        for number, block in enumerate(model.transformer.blocks)
        for name, parameter in block.named_parameters()
        if name.startswith(starts) and (biases or name.endswith(".weight"))
    }


def sparsity_of(model: SpeechModel, *, biases: bool) -> float:
    """Returns the share of the encoder's matrices that is zero, with their biases where these count."""
    weights = prunable_weights(model, biases=biases)
    return _count_zeros(weights.values()) / max(_size(weights), 1)


def remaining_parameters(config: ModelConfig, settings: WeightPruning, *, with_heads: bool = True) -> int:
    """Counts the parameters that are not pruned, from a description of a model without zeros."""
    with torch.device("meta"):
        pools = _pools(prunable_weights(SpeechModel(config), biases=settings.biases), settings.scope)
    pruned = sum(round(settings.sparsity * _size(pool)) for pool in pools.values())
    return count_parameters(config, with_heads=with_heads) - pruned


@torch.no_grad()
def prune_weights(model: SpeechModel, settings: WeightPruning, calibration: Calibration | None = None) -> SpeechModel:
    """Returns a model with the least important weights set to zero, in eval mode; every shape stays.

    The numbers of zeros are exact: ``round(sparsity * weights)`` of each pool. Weights that are zero already come first, so a
    sparsity is absolute and what was pruned stays so; a layer that has more zeros than its share keeps them.

    Args:
        model: Any model; it stays as it is.
        settings: How many and which.
        calibration: Not looked at: weights are judged by themselves.

    Raises:
        ValueError: The model has more zeros than asked for already, or is quantised.
    """
    require_float(model)
    pruned = copy.deepcopy(model).eval()
    pruned.zero_grad(set_to_none=True)
    weights = prunable_weights(pruned, biases=settings.biases)
    zeros, total = _count_zeros(weights.values()), _size(weights)
    if 0 < round(settings.sparsity * total) < zeros:
        raise ValueError(
            f"sparsity is {settings.sparsity:g}, and {zeros / total:.4g} of the model's weights are zero already; expected more"
        )
    if settings.sparsity:
        for name, mask in choose_zeros(weights, settings.sparsity, settings).items():
            weights[name].masked_fill_(mask, 0.0)
    pruned.provenance.append({"step": STEP, **to_plain(settings), **_outcome(weights)})
    return pruned


def held_zeros(model: SpeechModel) -> dict[str, Tensor]:
    """Returns what a pruned model holds at zero, wherever it was pruned: tensor name to mask, True at its exact zeros.

    Matrices without zeros have no mask. Biases have one only where the provenance says that biases were pruned: those of a new
    model are zero and mean to grow.
    """
    weights = prunable_weights(model, biases=_biases_were_pruned(model.provenance))
    masks = {name: parameter.detach() == 0 for name, parameter in weights.items()}
    return {name: mask for name, mask in masks.items() if bool(mask.any())}


def _biases_were_pruned(provenance: Iterable[Mapping[str, Any]]) -> bool:
    return any(
        entry.get("masked_biases") is True or (entry.get("step") == STEP and entry.get("biases") is True)
        for entry in provenance
    )


@torch.no_grad()
def choose_zeros(weights: Mapping[str, Tensor], sparsity: float, choice: WeightChoice) -> dict[str, Tensor]:
    """Chooses what becomes zero: tensor name to mask, True for exactly ``round(sparsity * weights)`` entries of each pool.

    A threshold is found by counting, first the upper and then the lower halves of the scores' bits, one tensor at a time:
    memory for one tensor is enough, where sorting a pool of 85 million takes gigabytes. Of equal scores the first go.

    Args:
        weights: Tensors by their names in the model; float32 decides.
        sparsity: Share, from 0 below 1. More is masked where more is zero already.
        choice: Pools and scores.
    """
    numbered = {name: number for number, name in enumerate(weights)}
    masks: dict[str, Tensor] = {}
    for pool in _pools(weights, choice.scope).values():
        scores = [partial(SCORES[choice.score], tensor, choice.seed, numbered[name]) for name, tensor in pool.items()]
        count = round(sparsity * _size(pool))
        chosen = _smallest(scores, max(count, _count_zeros(pool.values())))
        masks |= {name: mask.view(tensor.shape) for (name, tensor), mask in zip(pool.items(), chosen, strict=True)}
    return {name: masks[name] for name in weights}


def _pools(weights: Mapping[str, Tensor], scope: str) -> dict[str, dict[str, Tensor]]:
    """Groups tensors by the number of their block, or all under the empty name."""
    pools: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        key = name.split(".")[2] if scope == "layer" else ""  # the block's number
        pools.setdefault(key, {})[name] = tensor
    return pools


def _magnitudes(tensor: Tensor, seed: int, number: int) -> Tensor:
    """(W,) int32 in the order of the magnitudes: the bits of floating-point numbers without sign rise with them."""
    return tensor.detach().float().abs().flatten().view(torch.int32)


def _draws(tensor: Tensor, seed: int, number: int) -> Tensor:
    """(W,) int32 drawn on the CPU, 0 where the weight is zero already."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    drawn = torch.randint(1, 2**31 - 1, (tensor.numel(),), dtype=torch.int32, generator=generator)
    return drawn.to(tensor.device).masked_fill_(tensor.detach().flatten() == 0, 0)


SCORES: dict[str, Callable[[Tensor, int, int], Tensor]] = {"magnitude": _magnitudes, "random": _draws}


def _smallest(scores: Sequence[Callable[[], Tensor]], count: int) -> list[Tensor]:
    """Marks the ``count`` smallest of several vectors of int32 from 0, of equal ones the first."""
    if not scores:
        return []
    upper = sum(torch.bincount(score() >> 16, minlength=2**15).cpu() for score in scores)
    bucket, below = _reaching(upper, count)  # type: ignore[arg-type]
    in_bucket = (values[values >> 16 == bucket] & 0xFFFF for values in (score() for score in scores))
    lower = sum(torch.bincount(values, minlength=2**16).cpu() for values in in_bucket)
    value, below_in_bucket = _reaching(lower, count - below)  # type: ignore[arg-type]
    threshold, left = (bucket << 16) + value, count - below - below_in_bucket
    masks = []
    for score in scores:
        values = score()
        mask = values < threshold
        equal = (values == threshold).nonzero()[:left, 0]
        mask[equal] = True
        left -= len(equal)
        masks.append(mask)
    return masks


def _reaching(counts: Tensor, wanted: int) -> tuple[int, int]:
    """Returns the first bin with which ``wanted`` are reached, and how many lie below it."""
    reached = counts.cumsum(0)
    index = int((reached < wanted).sum())
    return index, int(reached[index - 1]) if index else 0


def _count_zeros(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() - int(torch.count_nonzero(tensor)) for tensor in tensors)


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _outcome(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """How many weights are zero, in all and in every block, by the blocks' numbers from 0."""
    blocks = _pools(weights, "layer")
    return {
        "zeros": _count_zeros(weights.values()),
        "of": _size(weights),
        "zeros_of_blocks": {number: _count_zeros(pool.values()) for number, pool in blocks.items()},
    }


class IterativeWeightPruning(nn.Module):
    """Objective: another objective, on a model whose pruned weights stay zero and become more on a schedule.

    Masks are buffers of this module, so a run resumes exactly and the model's own tensors are all that its folder holds.
    Gradients of pruned weights are cleared as they arrive, before anything adds them up or measures them, and the optimiser's
    moments when the weights are pruned: no momentum and no weight decay moves a zero. (In the reference pruned weights drift
    under their old momentum.) Learning goes on with the moments of the other weights and the same learning rate.

    Without a schedule the zeros of a pruned model are kept while it is trained on.

    Attributes:
        progress: Where the run stands, see ``Progress.to_numbers``; with a schedule.
        history: For each pruning the updates done and how often it was put off; likewise.
        sparsity: Share of masked weights; likewise.

    Args:
        objective: Holds one speech model, which it trains.
        schedule: When how much is pruned; None prunes nothing.
        choice: Which weights.
        masks: What is zero from the start, as :func:`held_zeros` gives it; None asks the model.
        before_pruning: Called on every process with the updates done and the sparsity before a pruning, to save the model.

    Raises:
        ValueError: The objective holds no model or several, masks do not fit it, or the model is as sparse as the schedule's
            first step already (see ``PruningSchedule.above``).
    """

    progress: Tensor
    history: Tensor
    sparsity: Tensor

    def __init__(
        self,
        objective: nn.Module,
        schedule: PruningSchedule | None = None,
        choice: WeightChoice = WeightChoice(),
        *,
        masks: Mapping[str, Tensor] | None = None,
        before_pruning: Callable[[int, float], None] | None = None,
    ) -> None:
        super().__init__()
        models = [module for module in objective.modules() if isinstance(module, SpeechModel)]
        if len(models) != 1:
            raise ValueError(f"{type(objective).__name__} trains {len(models)} speech models; weights are pruned in one")
        self.objective, self.schedule, self.choice, self.before_pruning = objective, schedule, choice, before_pruning
        self._settled = False
        held = dict(held_zeros(models[0]) if masks is None else masks)
        if schedule is not None:
            self._plan(schedule, held)
        self.masks = nn.Module()
        self._add_masks(held)
        self._hold(None)
        if hasattr(objective, "set_gradient_checkpointing"):
            self.set_gradient_checkpointing = objective.set_gradient_checkpointing

    def _add_masks(self, held: Mapping[str, Tensor]) -> None:
        weights = self._weights()
        for name, mask in held.items():
            if name not in weights or mask.shape != weights[name].shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"there is a mask of {mask.dtype} for {name} with shape {tuple(mask.shape)}; the model has no such matrix"
                )
            self.masks.register_buffer(_buffer_name(name), mask.to(weights[name].device, copy=True))
            if weights[name].requires_grad:
                weights[name].register_post_accumulate_grad_hook(partial(_clear_gradient, weakref.ref(self), name))

    def _plan(self, schedule: PruningSchedule, held: dict[str, Tensor]) -> None:
        """Adds the state of a schedule, and to ``held`` masks of what it may prune."""
        pool = self._pool()
        for name, parameter in pool.items():
            held.setdefault(name, torch.zeros_like(parameter, dtype=torch.bool))
        sparsity = sparsity_of(self.model, biases=self.choice.biases)
        if sparsity >= schedule.sparsities[0]:
            raise ValueError(
                f"the model has sparsity {sparsity:.4g} already and the schedule begins with {schedule.sparsities[0]:g}; "
                "expected only steps above that"
            )
        self.register_buffer("progress", torch.tensor(schedule.start().to_numbers(), dtype=torch.float64))
        self.register_buffer("history", torch.zeros(len(schedule.sparsities), 2, dtype=torch.int64))  # update, extensions
        masked = sum(int(held[name].sum()) for name in pool)
        self.register_buffer("sparsity", torch.tensor(masked / max(_size(pool), 1)))

    @property
    def model(self) -> SpeechModel:
        """The model that is pruned."""
        return next(module for module in self.objective.modules() if isinstance(module, SpeechModel))

    def _weights(self) -> dict[str, nn.Parameter]:
        return prunable_weights(self.model, biases=True)

    def _pool(self) -> dict[str, nn.Parameter]:
        return prunable_weights(self.model, biases=self.choice.biases)

    def mask(self, name: str) -> Tensor:
        """Returns the mask of a tensor of the model, True where it is held at zero."""
        return getattr(self.masks, _buffer_name(name))

    def begin_step(self, step: int, generator: torch.Generator) -> None:
        """As the inner objective does, if it does anything."""
        if hasattr(self.objective, "begin_step"):
            self.objective.begin_step(step, generator)  # type: ignore[operator]

    def prepare(self, batch: Batch, generator: torch.Generator) -> Any:
        """As the inner objective does."""
        return self.objective.prepare(batch, generator)  # type: ignore[operator]

    def forward(self, prepared: Any, totals: dict[str, Tensor]) -> StepOutput:
        """As the inner objective does; with a schedule the metrics have the ``sparsity``."""
        output = self.objective(prepared, totals)
        if self.schedule is None:
            return output
        return replace(output, metrics={**output.metrics, "sparsity": (self.sparsity, torch.ones_like(self.sparsity))})

    @torch.no_grad()
    def end_step(self, step: int, loss: float, optimizer: Optimizer) -> None:
        """Prunes where the schedule says so; ``step`` counts from 0, ``loss`` is that of the whole step."""
        if hasattr(self.objective, "end_step"):
            self.objective.end_step(step, loss, optimizer)  # type: ignore[operator]
        if not self._settled:  # moments that came from elsewhere know nothing of the masks
            self._hold(optimizer)
            self._settled = True
        if self.schedule is None:
            return
        before = self._progress()
        progress, action = advance(self.schedule, before, step + 1, loss)
        if action == "prune":
            self._prune(self.schedule, progress.prunings - 1, [step + 1, before.extensions], optimizer)
        self.progress.copy_(torch.tensor(progress.to_numbers(), dtype=torch.float64))

    def _progress(self) -> Progress:
        return Progress.from_numbers(self.progress.tolist())

    def _prune(self, schedule: PruningSchedule, number: int, facts: list[int], optimizer: Optimizer) -> None:
        if self.before_pruning is not None:
            self.before_pruning(facts[0], float(self.sparsity))
        chosen = choose_zeros(self._pool(), schedule.sparsities[number], self.choice)
        for name, mask in chosen.items():
            self.mask(name).copy_(mask)
        self._hold(optimizer)
        self.history[number] = torch.tensor(facts)
        self.sparsity.fill_(sum(int(mask.sum()) for mask in chosen.values()) / max(_size(chosen), 1))

    @torch.no_grad()
    def _hold(self, optimizer: Optimizer | None) -> None:
        """Clears the masked weights, and what the optimiser remembers of them."""
        weights = self._weights()
        for buffer in self.masks._buffers:
            parameter = weights[_tensor_name(buffer)]
            state = {} if optimizer is None else optimizer.state.get(parameter, {})
            moments = [value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape]
            for tensor in (parameter, *moments):
                tensor.masked_fill_(getattr(self.masks, buffer), 0.0)

    @property
    def steps_needed(self) -> int:
        """Updates of the whole run, recovery included, if no pruning is put off from now on; 0 without a schedule."""
        return 0 if self.schedule is None else self._progress().steps_needed(self.schedule)

    @property
    def shortfall(self) -> str | None:
        """A sentence on the prunings that were not made; None where the list is done."""
        if self.schedule is None:
            return None
        progress, listed = self._progress(), self.schedule.sparsities
        if progress.prunings == len(listed):
            return None
        reached = f"sparsity {float(self.sparsity):.4g} is reached of the {listed[-1]:g} asked for"
        left = f"{len(listed) - progress.prunings} of {len(listed)} prunings were not made"
        if progress.stopped:
            return f"{reached}: {left}, the loss did not come to rest until update {progress.last_step}"
        return f"{reached}: {left}, the next would be considered after update {progress.next_check}"

    def record(self) -> dict[str, Any]:
        """Returns the entry of the model's provenance: settings, and every pruning with its update and extensions."""
        entry: dict[str, Any] = {"step": STEP, **to_plain(self.choice), **_outcome(self._pool())}
        if self.schedule is None:
            return entry
        steps = zip(self.schedule.sparsities, self.history.tolist(), strict=True)
        prunings = [{"sparsity": value, "update": update, "extensions": put_off} for value, (update, put_off) in steps]
        return {**entry, "schedule": to_plain(self.schedule), "prunings": prunings[: self._progress().prunings]}


def _clear_gradient(owner: weakref.ref[IterativeWeightPruning], name: str, parameter: Tensor) -> None:
    """Hook of a parameter. It dies with its module: the same model can be trained without masks later."""
    pruning = owner()
    if pruning is not None and parameter.grad is not None:
        parameter.grad.masked_fill_(pruning.mask(name), 0.0)


def _buffer_name(name: str) -> str:
    return name.replace(".", "/")  # torch allows no dots in the name of a buffer


def _tensor_name(buffer: str) -> str:
    return buffer.replace("/", ".")
