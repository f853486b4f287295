"""Genomes of subnets: one choice for each gene that counts, and the moves that a search makes with them.

A genome has no genes of dropped layers and one gene pair for a block that several layers share, so equal subnets have equal
genomes (LightHuBERT's search had 26 genes whatever the depth: those of dropped layers made one subnet look like many).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from sslim.models.search_space import SearchSpace, Subnet

G = TypeVar("G", int, float)


@dataclass(frozen=True, kw_only=True)
class Genome:
    """Choices of a subnet.

    Attributes:
        dim: Model width.
        num_layers: Depth.
        heads: Attention heads of each distinct block that is kept, in the order in which blocks first run.
        ratios: Feed-forward ratio of each.
    """

    dim: int
    num_layers: int
    heads: tuple[int, ...]
    ratios: tuple[float, ...]


def kept_blocks(space: SearchSpace, num_layers: int) -> tuple[int, ...]:
    """Returns the distinct blocks that a subnet of this depth keeps, in the order in which they first run."""
    return tuple(dict.fromkeys(space.blocks(num_layers)))


def to_subnet(space: SearchSpace, genome: Genome) -> Subnet:
    """Returns the subnet that a genome stands for."""
    place = {block: i for i, block in enumerate(kept_blocks(space, genome.num_layers))}
    layers = [place[block] for block in space.blocks(genome.num_layers)]
    return Subnet(
        dim=genome.dim,
        num_heads=tuple(genome.heads[i] for i in layers),
        feedforward_dims=tuple(int(genome.ratios[i] * genome.dim) for i in layers),
    )


def from_subnet(space: SearchSpace, subnet: Subnet) -> Genome:
    """Returns the genome of a subnet.

    Raises:
        ValueError: The space does not contain it.
    """
    if not space.contains(subnet):
        raise ValueError(f"the subnet {subnet} is not one of the search space's")
    blocks = space.blocks(subnet.num_layers)
    first = [blocks.index(block) for block in kept_blocks(space, subnet.num_layers)]
    ratio_of = {int(ratio * subnet.dim): ratio for ratio in reversed(space.feedforward_ratios)}
    return Genome(
        dim=subnet.dim,
        num_layers=subnet.num_layers,
        heads=tuple(subnet.num_heads[i] for i in first),
        ratios=tuple(ratio_of[subnet.feedforward_dims[i]] for i in first),
    )


def draw(space: SearchSpace, rng: random.Random) -> Genome:
    """Draws each gene uniformly from its choices (not each subnet: deep ones are far more numerous)."""
    num_layers = rng.choice(space.num_layers)
    count = len(kept_blocks(space, num_layers))
    return Genome(
        dim=rng.choice(space.dims),
        num_layers=num_layers,
        heads=tuple(rng.choice(space.num_heads) for _ in range(count)),
        ratios=tuple(rng.choice(space.feedforward_ratios) for _ in range(count)),
    )


def with_depth(space: SearchSpace, genome: Genome, num_layers: int, rng: random.Random | None) -> Genome:
    """Returns the genome at another depth: blocks in both keep their genes, new ones draw theirs (the least without rng)."""
    old = {b: i for i, b in enumerate(kept_blocks(space, genome.num_layers))}

    def genes(values: Sequence[G], choices: Sequence[G]) -> tuple[G, ...]:
        new = (lambda: min(choices)) if rng is None else (lambda: rng.choice(choices))
        return tuple(values[old[block]] if block in old else new() for block in kept_blocks(space, num_layers))

    heads, ratios = genes(genome.heads, space.num_heads), genes(genome.ratios, space.feedforward_ratios)
    return replace(genome, num_layers=num_layers, heads=heads, ratios=ratios)


def mutate(space: SearchSpace, genome: Genome, rng: random.Random, *, gene_rate: float, size_rate: float) -> Genome:
    """Draws genes anew, each with a probability: ``size_rate`` for width and depth, ``gene_rate`` for every block's own."""
    if rng.random() < size_rate:
        genome = with_depth(space, genome, rng.choice(space.num_layers), rng)
    if rng.random() < size_rate:
        genome = replace(genome, dim=rng.choice(space.dims))

    def redrawn(values: Sequence[G], choices: Sequence[G]) -> tuple[G, ...]:
        return tuple(rng.choice(choices) if rng.random() < gene_rate else value for value in values)

    return replace(
        genome, heads=redrawn(genome.heads, space.num_heads), ratios=redrawn(genome.ratios, space.feedforward_ratios)
    )


def cross(space: SearchSpace, first: Genome, second: Genome, rng: random.Random) -> Genome:
    """Takes each gene from one parent or the other (uniform crossover); of a block that only one parent has, that one's."""
    num_layers, dim = (rng.choice((getattr(first, name), getattr(second, name))) for name in ("num_layers", "dim"))
    places = [{b: i for i, b in enumerate(kept_blocks(space, parent.num_layers))} for parent in (first, second)]
    heads, ratios = [], []
    for block in kept_blocks(space, num_layers):
        owners = [(parent, place[block]) for parent, place in zip((first, second), places, strict=True) if block in place]
        head_parent, ratio_parent = rng.choice(owners), rng.choice(owners)
        heads.append(head_parent[0].heads[head_parent[1]])
        ratios.append(ratio_parent[0].ratios[ratio_parent[1]])
    return Genome(dim=dim, num_layers=num_layers, heads=tuple(heads), ratios=tuple(ratios))


def neighbours(space: SearchSpace, genome: Genome, step: int) -> Iterator[Genome]:
    """Yields the genomes with one gene a step smaller (-1) or larger (+1): width, depth, then each block's heads and ratio."""
    if (dim := _next(space.dims, genome.dim, step)) is not None:
        yield replace(genome, dim=dim)
    if (num_layers := _next(space.num_layers, genome.num_layers, step)) is not None:
        yield with_depth(space, genome, num_layers, None)
    for i, value in enumerate(genome.heads):
        if (heads := _next(space.num_heads, value, step)) is not None:
            yield replace(genome, heads=(*genome.heads[:i], heads, *genome.heads[i + 1 :]))
    for i, ratio in enumerate(genome.ratios):
        if (other := _next(space.feedforward_ratios, ratio, step)) is not None:
            yield replace(genome, ratios=(*genome.ratios[:i], other, *genome.ratios[i + 1 :]))


def _next(choices: Sequence[G], value: G, step: int) -> G | None:
    ordered = sorted(choices)
    place = ordered.index(value) + step
    return ordered[place] if 0 <= place < len(ordered) else None
