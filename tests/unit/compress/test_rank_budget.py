"""Ranks under a budget: against trying everything, and what holds for any maps and spectra."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslim.compress.rank_budget import Map, ranks_within


def falling(values: list[float]) -> list[float]:
    total = sum(values)
    return [value / total for value in sorted(values, reverse=True)]


def lost(part: Map, shares: list[float], rank: int | None) -> float:
    return 0.0 if rank == part.form else sum(shares[rank:])


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Map], list[list[float]]]:
    maps, shares = [], []
    for number in range(draw(st.integers(1, 5))):
        in_dim, out_dim = draw(st.integers(1, 14)), draw(st.integers(1, 14))
        rank = draw(st.one_of(st.none(), st.integers(1, min(in_dim, out_dim))))
        maps.append(Map(block=number, name="up", in_dim=in_dim, out_dim=out_dim, rank=rank))
        known = rank or min(in_dim, out_dim)  # a factored map has no energy beyond its rank
        energies = draw(st.lists(st.floats(1e-6, 1.0), min_size=known, max_size=known))
        shares.append(falling(energies) + [0.0] * (min(in_dim, out_dim) - known))
    return maps, shares


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problems(), st.floats(0.0, 1.2))
def test_any_budget_is_met_and_used(problem: tuple[list[Map], list[list[float]]], share: float) -> None:
    maps, shares = problem
    today = sum(part.size(part.form) for part in maps)
    least = sum(min(part.size(1), part.size(part.form)) for part in maps)
    budget = int(least + share * (today - least))
    ranks = ranks_within(maps, shares, budget)
    sizes = [part.size(rank) for part, rank in zip(maps, ranks, strict=True)]
    assert sum(sizes) <= max(budget, least)
    for part, rank, size in zip(maps, ranks, sizes, strict=True):
        assert size <= min(part.size(part.rank), part.size(None))
        if rank != part.form:
            assert rank is not None
            assert rank >= 1
            more = min(part.size(rank + 1), part.size(part.form))
            assert sum(sizes) - size + more > budget
    if budget >= today:
        assert ranks == [part.form for part in maps]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_among_maps_of_one_shape_nothing_is_better(data: st.DataObject) -> None:
    """Maps that are factored already have convex curves and ranks of one price: going down greedily is the optimum."""
    maps = [Map(block=number, name="up", in_dim=9, out_dim=20, rank=5) for number in range(3)]
    shares = [falling(data.draw(st.lists(st.floats(0.01, 1.0), min_size=5, max_size=5))) + [0.0] * 4 for _ in maps]
    total = data.draw(st.integers(3, 15))
    ranks = ranks_within(maps, shares, 29 * total)
    best = min(
        sum(lost(part, of_part, rank) for part, of_part, rank in zip(maps, shares, tried, strict=True))
        for tried in itertools.product(range(1, 6), repeat=3)
        if sum(tried) <= total
    )
    assert sum(lost(part, of_part, rank) for part, of_part, rank in zip(maps, shares, ranks, strict=True)) == pytest.approx(
        best
    )


def test_whole_maps_are_given_up_last_where_their_energy_is_spread() -> None:
    """A flat spectrum has nothing to save, a steep one nearly everything; both are of one size."""
    flat, steep = (Map(block=number, name="query", in_dim=12, out_dim=12, rank=None) for number in range(2))
    shares = [falling([1.0] * 12), falling([0.3**k for k in range(12)])]
    assert ranks_within([flat, steep], shares, 144 + 100) == [None, 4]
    assert ranks_within([flat, steep], shares, 144 + 144) == [None, None]
    tight = ranks_within([flat, steep], shares, 144)
    assert tight[0] is not None
    assert tight[1] is not None
    assert 24 * sum(tight) == 144


def test_sizes_and_forms() -> None:
    whole = Map(block=0, name="up", in_dim=6, out_dim=12, rank=None)
    assert (whole.size(None), whole.size(3), whole.form) == (72, 54, None)
    assert [whole.at(rank) for rank in (1, 3, 4, 6)] == [1, 3, None, None]  # four ranks are 72 numbers: no gain
    factored = Map(block=0, name="up", in_dim=6, out_dim=12, rank=3)
    assert factored.form == 3
    assert [factored.at(rank) for rank in (1, 2, 3, 4)] == [1, 2, 3, 3]
    wasteful = Map(block=0, name="up", in_dim=6, out_dim=12, rank=5)
    assert wasteful.form is None
    assert [wasteful.at(rank) for rank in (3, 5)] == [3, None]
