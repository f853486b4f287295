"""Gated relative position bias of WavLM: a learnt number for each distance and head, scaled by what the query sees.

Chen et al. 2022, "WavLM" (arXiv 2110.13900), section III-A: the bias of query i and key j is ``r_i * d(i - j)``. ``d`` is a
table over distance buckets (T5, Raffel et al. 2020) that all layers share; the gate ``r_i`` is each layer's own and depends
on the input of its attention, head by head. A model whose heads were pruned keeps the whole table and whole gates and says
which original heads are left (``head_ids``), so a head keeps its own column and its own part of the input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GATE_UNITS = 8  # two gates, each the sum of four outputs


@dataclass(frozen=True, kw_only=True)
class RelativePositionsConfig:
    """Relative positions of an encoder.

    Attributes:
        num_buckets: Distance buckets of the table, half of them for keys after the query (``num_buckets``).
        max_distance: Distance in frames from which on everything falls into the last bucket (``max_distance``).
        num_heads: Heads of the table: those of the model before any were pruned.
    """

    num_buckets: int = 320
    max_distance: int = 800
    num_heads: int = 12

    def __post_init__(self) -> None:
        if self.num_buckets < 4 or self.num_buckets % 2:
            raise ValueError(f"num_buckets is {self.num_buckets}, expected an even number from 4")
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"max_distance {self.max_distance} must be above {self.num_buckets // 4}, up to which distances have their own "
                f"bucket among {self.num_buckets}"
            )


def distance_buckets(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Returns the bucket of each distance ``key - query`` in frames, int64.

    Half of the buckets are for positive distances. In each half, the first half holds one distance each; beyond, buckets widen
    logarithmically up to ``max_distance``. Counterpart: T5's ``_relative_position_bucket`` (bidirectional).
    """
    half = num_buckets // 2
    exact = half // 2
    size = distance.abs()
    ratio = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    wide = (exact + ratio * (half - exact)).long().clamp(max=half - 1)
    return (distance > 0).long() * half + torch.where(size < exact, size, wide)


def by_query_and_key(distances_NR: Tensor, num_queries: int, num_keys: int, before: int) -> Tensor:
    """Spreads numbers over distances to queries and keys: the first query sits at key ``before``.

    Args:
        distances_NR: (N, R) numbers of the distances ``-(R - 1) / 2`` to ``(R - 1) / 2``.
        num_queries: Consecutive queries Q.
        num_keys: Consecutive keys K.
        before: Keys before the first query.

    Returns:
        (N, Q, K): what belongs to the distance ``k - before - q``.
    """
    if num_queries == 0:  # an utterance shorter than a frame
        return distances_NR.new_zeros(len(distances_NR), 0, num_keys)
    first = distances_NR.shape[1] // 2 - before - (num_queries - 1)
    needed = distances_NR.narrow(1, first, num_queries + num_keys - 1)
    return needed.unfold(1, num_keys, 1).flip(1)


class RelativePositions(nn.Module):
    """The table over distances that every layer shares (``rel_attn_embed`` of the first layer in WavLM)."""

    def __init__(self, config: RelativePositionsConfig) -> None:
        super().__init__()
        self.config = config
        self.table = nn.Parameter(torch.empty(config.num_buckets, config.num_heads))

    def initialize(self, generator: torch.Generator | None) -> None:
        """N(0, 0.02), BERT's initialisation of embeddings."""
        nn.init.normal_(self.table, 0.0, 0.02, generator=generator)

    def forward(self, reach: int) -> Tensor:
        """Returns (N, 2 * reach + 1): each head's number for the distances ``-reach`` to ``reach``."""
        distance = torch.arange(-reach, reach + 1, device=self.table.device)
        buckets = distance_buckets(distance, self.config.num_buckets, self.config.max_distance)
        return self.table[buckets].transpose(0, 1)


class RelativeGate(nn.Module):
    """A layer's gates on the bias (``gru_rel_pos_linear`` and ``gru_rel_pos_const``).

    Args:
        num_heads: Heads before any were pruned; the model's width is that times ``head_dim``.
        head_dim: Width of a head.
        head_ids: The heads that are left, counted from 0.
    """

    def __init__(self, num_heads: int, head_dim: int, head_ids: tuple[int, ...]) -> None:
        super().__init__()
        self.head_ids = None if head_ids == tuple(range(num_heads)) else list(head_ids)
        self.num_heads, self.head_dim = num_heads, head_dim
        self.linear = nn.Linear(head_dim, GATE_UNITS)
        self.scale = nn.Parameter(torch.ones(num_heads))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns (B, T, N), the factor on the bias of each query; x is the input of the attention."""
        x_BTNH = x_BTD.unflatten(-1, (self.num_heads, self.head_dim))
        scale_N: Tensor = self.scale
        if self.head_ids is not None:
            x_BTNH, scale_N = x_BTNH[:, :, self.head_ids], scale_N[self.head_ids]
        reset_BTN, update_BTN = self.linear(x_BTNH).unflatten(-1, (2, GATE_UNITS // 2)).sum(-1).sigmoid().unbind(-1)
        return reset_BTN * (update_BTN * scale_N - 1.0) + 2.0

    def select(self, distances_NR: Tensor) -> Tensor:
        """Returns the rows of the heads that are left."""
        return distances_NR if self.head_ids is None else distances_NR[self.head_ids]
