"""Head-ablation curves: heads are taken away one after another, in the order of a metric, and what is left is measured.

A head is taken away by setting its context to zero where it enters the output map, which is what pruning it does (the map's
bias stays). A block that runs at several depths loses it at one of them only. After Yang et al. 2020 (arXiv 2006.03265), who
prune the heads of each category in turn and compare with heads taken at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sslim.models.encoding import Inputs, encode_utterances
from sslim.models.speech import SpeechModel

Place = tuple[int, int]  # layer and head, both from 1


@dataclass(frozen=True, kw_only=True)
class AblationCurve:
    """What is left after so many heads of an order.

    Attributes:
        order: Its name.
        removed: Numbers of heads that were taken away.
        values: What was measured at each.
        first: The heads (layer, head) in the order in which they went.
    """

    order: str
    removed: list[int]
    values: list[float]
    first: list[Place]


@contextmanager
def heads_removed(model: SpeechModel, places: Sequence[Place]) -> Iterator[None]:
    """Takes heads away for as long as the context lasts.

    Args:
        model: The model; its tensors stay as they are.
        places: Layer and head, from 1.

    Raises:
        ValueError: A head that the model does not have.
    """
    config = model.config.transformer
    lost: dict[int, list[int]] = {}
    for layer, head in places:
        heads = config.blocks[config.depth_map[layer - 1]].num_heads if 1 <= layer <= config.num_layers else 0
        if not 1 <= head <= heads:
            raise ValueError(f"there is no head {head} in layer {layer}: that layer has {heads} heads, counted from 1")
        lost.setdefault(layer - 1, []).append(head - 1)
    depth = -1

    def start(*_: Any) -> None:
        nonlocal depth
        depth = -1

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def silence(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if depth not in lost:
            return inputs
        block = config.blocks[config.depth_map[depth]]
        context_BTNH = inputs[0].unflatten(-1, (block.num_heads, block.head_dim)).clone()
        context_BTNH[..., lost[depth], :] = 0.0
        return (context_BTNH.flatten(-2), *inputs[1:])

    hooks = [model.transformer.register_forward_pre_hook(start)]
    for block in model.transformer.blocks:
        hooks.append(block.register_forward_pre_hook(enter))
        if block.attention is not None:
            hooks.append(block.attention.output.register_forward_pre_hook(silence))  # type: ignore[union-attr]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def distance_from_whole(model: SpeechModel, inputs: Inputs, *, batch_s: float = 60.0) -> Callable[[SpeechModel], float]:
    """Returns a measure: the mean over utterances of ``||h' - h|| / ||h||`` at the final output, h being the whole model's.

    Args:
        model: The whole model, in eval mode; its outputs are kept in memory.
        inputs: Utterances of at least one frame.
        batch_s: Seconds of padded audio in a batch.
    """

    def finals(running: SpeechModel) -> dict[int, Tensor]:
        return {position: final for position, _, final in encode_utterances(running, inputs, batch_s=batch_s)}

    whole = finals(model)

    def measure(changed: SpeechModel) -> float:
        ratios = [(final - whole[position]).norm() / whole[position].norm() for position, final in finals(changed).items()]
        return float(torch.stack(ratios).double().mean())

    return measure


def counts_to_measure(num_heads: int, num_points: int) -> list[int]:
    """Returns up to ``num_points`` numbers of heads from 0 to all of them, evenly spread."""
    return sorted(set(np.linspace(0, num_heads, max(2, min(num_points, num_heads + 1))).round().astype(int).tolist()))


def random_orders(places: Sequence[Place], count: int, seed: int) -> dict[str, list[Place]]:
    """Returns ``random 1``, ... to the heads shuffled by the seed."""
    orders = {}
    for number in range(1, count + 1):
        shuffled = np.random.default_rng([seed, number]).permutation(len(places))
        orders[f"random {number}"] = [places[i] for i in shuffled]
    return orders


def ablate(
    model: SpeechModel,
    orders: Mapping[str, Sequence[Place]],
    measure: Callable[[SpeechModel], float],
    *,
    num_points: int = 13,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[AblationCurve]:
    """Measures a curve for each order.

    Args:
        model: In eval mode.
        orders: Name to heads (layer, head), the first to go first.
        measure: A model with its heads taken away to a number; the same heads are measured once.
        num_points: Numbers of heads on a curve, none and all included.
        tell: Called with measurements done and in all.
    """
    if num_points < 2:
        raise ValueError(f"num_points is {num_points}; a curve needs at least 2 points")
    plans = {name: counts_to_measure(len(places), num_points) for name, places in orders.items()}
    total, done = sum(map(len, plans.values())), 0
    known: dict[frozenset[Place], float] = {}
    curves = []
    for name, places in orders.items():
        values = []
        for count in plans[name]:
            gone = frozenset(places[:count])
            if gone not in known:
                with heads_removed(model, sorted(gone)):
                    known[gone] = measure(model)
            values.append(known[gone])
            done += 1
            tell(done, total)
        curves.append(AblationCurve(order=name, removed=plans[name], values=values, first=list(places)))
    return curves
