"""Ranks over all maps of a model under one budget of parameters.

What a map loses at a rank is the share of its energy beyond it. Against its parameters the loss of a map falls along a convex
curve, which the step to the whole map joins along a tangent. Going down all curves at once, always where a parameter saved
costs least, gives the best ranks for every budget that is met exactly on the way (Everett 1963, Operations Research 11(3));
what the last step saved too much goes back to ranks one by one.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Map:
    """A linear map of a block.

    Attributes:
        block: Number of the block, from 0.
        name: Which of the block's maps, as in ``LinearRanks``.
        in_dim: Input width.
        out_dim: Output width.
        rank: Of its factors; None where it is whole.
    """

    block: int
    name: str
    in_dim: int
    out_dim: int
    rank: int | None

    def size(self, rank: int | None) -> int:
        """Parameters of its weight, whole (None) or at a rank; the bias is left out."""
        return self.in_dim * self.out_dim if rank is None else rank * (self.in_dim + self.out_dim)

    @property
    def form(self) -> int | None:
        """The rank at which it computes what it does in fewest parameters: that of its factors, or None for whole."""
        return self.rank if self.rank is not None and self.size(self.rank) < self.size(None) else None

    def at(self, rank: int) -> int | None:
        """Returns ``rank`` where its factors are smaller than what there is, else the form as it is."""
        return rank if self.size(rank) < self.size(self.form) else self.form


def ranks_within(maps: Sequence[Map], shares: Sequence[Sequence[float]], budget: int) -> list[int | None]:
    """Chooses the ranks that lose least energy.

    Args:
        maps: The maps.
        shares: The energy of each map by direction, falling, as shares of the map's own: all maps count alike.
        budget: Parameters that all their weights together may have; at least those of rank 1 everywhere.

    Returns:
        A rank for each map, None for whole ones. No map could be given one more rank within the budget.
    """
    curves = [_Curve(part, energies) for part, energies in zip(maps, shares, strict=True)]
    ranks, spare = [part.form for part in maps], budget - sum(curve.size for curve in curves)
    walks = [curve.steps() for curve in curves]
    waiting = [(*step, number) for number, walk in enumerate(walks) for step in [next(walk, None)] if step is not None]
    heapq.heapify(waiting)
    while spare < 0:
        _, rank, number = heapq.heappop(waiting)
        spare += maps[number].size(ranks[number]) - maps[number].size(rank)
        ranks[number] = rank
        if (following := next(walks[number], None)) is not None:
            heapq.heappush(waiting, (*following, number))
    return _spent(curves, ranks, spare)


class _Curve:
    """What a map loses at every rank below the form that it has."""

    def __init__(self, part: Map, shares: Sequence[float]) -> None:
        self.form, self.size, self.unit = part.form, part.size(part.form), part.in_dim + part.out_dim
        self.losses = [1.0]
        for share in shares[: (self.size - 1) // self.unit]:
            self.losses.append(max(0.0, self.losses[-1] - share))

    def _slope(self, rank: int) -> float:
        """Loss for each parameter that going from the form to a rank saves."""
        return self.losses[rank] / (self.size - rank * self.unit)

    def steps(self) -> Iterator[tuple[float, int]]:
        """Yields the loss for each parameter saved, rising, and the rank after the step; down to rank 1."""
        if len(self.losses) < 2:
            return
        first = min(range(len(self.losses) - 1, 0, -1), key=self._slope)
        yield self._slope(first), first
        for rank in range(first - 1, 0, -1):
            yield (self.losses[rank] - self.losses[rank + 1]) / self.unit, rank

    def back(self, rank: int) -> Iterator[tuple[float, int, int | None]]:
        """Yields what one rank more, and the form again, gain for each parameter, cost and are."""
        if rank + 1 < len(self.losses):
            yield (self.losses[rank] - self.losses[rank + 1]) / self.unit, self.unit, rank + 1
        yield self._slope(rank), self.size - rank * self.unit, self.form


def _spent(curves: Sequence[_Curve], ranks: list[int | None], spare: int) -> list[int | None]:
    """Gives ranks back while parameters are left for any, always where one gains most."""
    while True:
        options = [
            (gain, price, number, after)
            for number, (curve, rank) in enumerate(zip(curves, ranks, strict=True))
            if rank is not None and rank != curve.form
            for gain, price, after in curve.back(rank)
            if price <= spare
        ]
        if not options:
            return ranks
        _, price, number, after = max(options, key=lambda option: option[:2])
        ranks[number], spare = after, spare - price
