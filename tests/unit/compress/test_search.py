"""The search: genomes, budgets and repair, fronts, evolution against random search, resuming."""

import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslim.compress.budgets import Budget, Costs, amount, check_feasible, fits, parse_budget, repair
from sslim.compress.genome import cross, draw, from_subnet, kept_blocks, mutate, neighbours, to_subnet
from sslim.compress.pareto import crowding, dominates, pareto_front, rank, sort_fronts, spread
from sslim.compress.search import SearchConfig, SearchResult, kendall_tau, search, trust
from sslim.compress.search_journal import JOURNAL, Fitness, SearchJournal
from sslim.models.search_space import LIGHTHUBERT_SMALL, SearchSpace, Subnet

SPACE = SearchSpace(
    dims=(16, 32, 48),
    num_heads=(1, 2, 3),
    feedforward_ratios=(2.0, 3.0, 4.0),
    num_layers=(2, 3, 4),
    kept_layers={"2": (0, 3), "3": (0, 1, 3), "4": (0, 1, 2, 3)},
)
SHARED = SearchSpace(dims=(16, 32), num_heads=(1, 2), feedforward_ratios=(1.0, 2.0), num_layers=(2, 4), depth_map=(0, 0, 1, 1))
SPACES = st.sampled_from([SPACE, SHARED, LIGHTHUBERT_SMALL])
SEEDS = st.integers(0, 10_000)


def size(subnet: Subnet) -> float:
    """Like parameters."""
    layers = zip(subnet.num_heads, subnet.feedforward_dims, strict=True)
    return subnet.dim * sum(64 * heads + units for heads, units in layers)


def depth(subnet: Subnet) -> float:
    """Like latency: not the same order as size."""
    return 10.0 * subnet.num_layers + sum(subnet.num_heads)


def smooth_loss(subnet: Subnet) -> Fitness:
    """Width and depth help with falling returns, and late layers want heads, early ones units."""
    count = subnet.num_layers
    late = sum((i + 1) * heads for i, heads in enumerate(subnet.num_heads)) / count
    early = sum((count - i) * units / subnet.dim for i, units in enumerate(subnet.feedforward_dims)) / count
    loss = 30 / subnet.dim + 3 / count + 2 / (1 + late) + 2 / (1 + early)
    return Fitness(loss=loss, halves=(loss * 1.01, loss * 0.99))


def costs() -> Costs:
    return Costs({"params": size, "latency_ms": depth})


@settings(max_examples=60, deadline=None)
@given(SPACES, SEEDS)
def test_every_move_stays_inside_the_space(space: SearchSpace, seed: int) -> None:
    rng = random.Random(seed)
    first, second = draw(space, rng), draw(space, rng)
    moves = [first, cross(space, first, second, rng), mutate(space, first, rng, gene_rate=0.5, size_rate=0.5)]
    moves += list(neighbours(space, first, 1)) + list(neighbours(space, first, -1))
    for genome in moves:
        subnet = to_subnet(space, genome)
        assert space.contains(subnet)
        assert from_subnet(space, subnet) == genome
        assert len(genome.heads) == len(genome.ratios) == len(kept_blocks(space, genome.num_layers))


def test_crossover_takes_a_block_from_a_parent_that_has_it() -> None:
    rng = random.Random(1)
    shallow = replace(draw(SPACE, rng), num_layers=2, heads=(1, 1), ratios=(2.0, 2.0))
    deep = replace(shallow, num_layers=4, heads=(3, 3, 3, 3), ratios=(4.0, 4.0, 4.0, 4.0))
    children = [cross(SPACE, shallow, deep, rng) for _ in range(40)]
    assert {child.num_layers for child in children} == {2, 4}
    assert all(child.heads[1:3] == (3, 3) for child in children if child.num_layers == 4)  # only the deep parent has them
    assert {child.heads[3] for child in children if child.num_layers == 4} == {1, 3}  # the second block of the shallow one


@settings(max_examples=60, deadline=None)
@given(SPACES, SEEDS, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_repair_ends_within_every_maximum(space: SearchSpace, seed: int, share: float, other: float) -> None:
    cost = costs()
    small, large = cost(space.smallest()), cost(space.largest())
    budgets = [
        Budget(name=name, maximum=small[name] + part * (large[name] - small[name]))
        for name, part in (("params", share), ("latency_ms", other))
    ]
    rng = random.Random(seed)
    start = draw(space, rng)
    repaired = repair(space, start, cost, budgets, rng)
    assert repaired is not None
    assert fits(cost(to_subnet(space, repaired)), budgets)
    if fits(cost(to_subnet(space, start)), budgets):
        assert repaired == start


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_repair_grows_into_a_minimum_or_gives_up(seed: int) -> None:
    cost, rng = costs(), random.Random(seed)
    low = Budget(name="params", minimum=30_000, maximum=40_000)
    repaired = repair(SPACE, draw(SPACE, rng), cost, [low], rng)
    assert repaired is None or fits(cost(to_subnet(SPACE, repaired)), [low])
    nothing = Budget(name="latency_ms", minimum=36.5, maximum=36.6)  # costs are whole numbers
    assert repair(SPACE, draw(SPACE, rng), cost, [nothing], rng) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("params=1.2M", Budget(name="params", maximum=1.2e6)),
        ("macs = 0.5g", Budget(name="macs", maximum=5e8)),
        ("latency_ms=20", Budget(name="latency_ms", maximum=20.0)),
        ("params=900k..1.2M", Budget(name="params", minimum=9e5, maximum=1.2e6)),
        ("params=1e6", Budget(name="params", maximum=1e6)),
    ],
)
def test_budgets_are_read(text: str, expected: Budget) -> None:
    assert parse_budget(text) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("params", "write it like params=1.2M"),
        ("parms=1M", "no budget 'parms'; did you mean 'params'"),
        ("params=2M..1M", "leaves nothing"),
        ("params=0", "leaves nothing"),
        ("params=1X", "cannot be read"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_budget(text)


def test_a_budget_below_the_smallest_subnet_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"smallest subnet has 3,072 parameters, more than the budget of 100"):
        check_feasible(SPACE, costs(), [Budget(name="params", maximum=100)])
    with pytest.raises(ValueError, match="largest subnet has 52 milliseconds, less than the 99"):
        check_feasible(SPACE, costs(), [Budget(name="latency_ms", minimum=99, maximum=100)])
    tight = [Budget(name="params", minimum=70_000, maximum=80_000), Budget(name="latency_ms", maximum=22)]
    sentence = r"within 70,000 to 80,000 parameters and 22 milliseconds; the nearest has [\d,]+ and \d+: widen the budget"
    with pytest.raises(ValueError, match=sentence):
        search(SPACE, smooth_loss, costs(), tight, SearchConfig(population=4, generations=1))


def test_budgets_that_leave_little_are_met_and_those_that_leave_nothing_named_soon() -> None:
    """About a hundred of 22,113 subnets have exactly this size; the nearest to an empty range is named after few looks."""
    exact = [Budget(name="params", minimum=41_472, maximum=41_472)]
    found = costs()
    check_feasible(SPACE, found, exact)
    assert found.nearest(exact)["params"] == 41_472
    empty = [Budget(name="params", minimum=41_473, maximum=41_474)]
    with pytest.raises(ValueError, match=r"no subnet was found within 41,473 to 41,474 parameters; the nearest has 41,472"):
        check_feasible(SPACE, costs(), empty)
    looked_at: list[Subnet] = []

    def counted(subnet: Subnet) -> float:
        looked_at.append(subnet)
        return size(subnet)

    with pytest.raises(ValueError, match="no subnet was found within"):
        check_feasible(
            LIGHTHUBERT_SMALL, Costs({"params": counted}), [Budget(name="params", minimum=12_000_001, maximum=12_000_002)]
        )
    assert len(looked_at) < 40_000  # of 951,892,141,473


def test_amounts_are_readable() -> None:
    assert [amount(value) for value in (169_728.0, 1e9, 999.4, 11.927)] == ["169,728", "1,000,000,000", "999.4", "11.93"]


POINTS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 3)), min_size=1, max_size=30)


@given(POINTS)
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, ...]]) -> None:
    front = {points[i] for i in pareto_front(points)}
    assert front == {p for p in points if not any(dominates(q, p) for q in points)}
    assert len(front) == len(pareto_front(points))
    assert {points[i] for i in sort_fronts(points)[0]} == front


@given(POINTS)
def test_sorting_puts_every_point_behind_what_dominates_it(points: list[tuple[int, ...]]) -> None:
    fronts = sort_fronts(points)
    assert sorted(i for front in fronts for i in front) == list(range(len(points)))
    for before, after in pairwise(fronts):
        assert all(any(dominates(points[i], points[j]) for i in before) for j in after)
    ranks = rank(points)
    assert all(ranks[i][0] == number for number, front in enumerate(fronts) for i in front)


def test_crowding_is_the_box_between_neighbours() -> None:
    distance = crowding([(0.0, 4.0), (1.0, 2.0), (4.0, 0.0), (2.0, 1.0)])
    assert distance[0] == distance[2] == math.inf
    assert distance[1] == pytest.approx(2 / 4 + 3 / 4)
    assert distance[3] == pytest.approx(3 / 4 + 2 / 4)
    assert crowding([(1.0, 1.0), (1.0, 1.0), (1.0, 1.0)])[1] == 0.0


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20), st.integers(1, 20))
def test_spread_choices_are_distinct_and_keep_the_ends(values: list[float], count: int) -> None:
    values = sorted(values)
    chosen = spread(values, count)
    assert len(chosen) == len(set(chosen)) == min(count, len(values))
    assert chosen == sorted(chosen)
    if count > 1:
        assert {0, len(values) - 1} <= set(chosen)


def test_kendall_tau_counts_pairs() -> None:
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1.0
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)  # one of six pairs in the other order
    assert kendall_tau([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / math.sqrt(5 * 6))  # tau-b with a tie
    assert trust([(1.0, 1.0), (math.inf, 2.0), (2.0, 3.0)]) == 1.0
    assert trust([(1.0, 1.0)]) is None
    assert trust([(), ()]) is None


@pytest.mark.parametrize("algorithm", ["random", "evolution", "pareto"])
@pytest.mark.parametrize("seed", range(3))
def test_budgets_hold_and_nothing_is_evaluated_twice(algorithm: str, seed: int) -> None:
    asked: list[Subnet] = []

    def fitness(subnet: Subnet) -> Fitness:
        asked.append(subnet)
        return smooth_loss(subnet)

    budgets = [Budget(name="params", maximum=40_000), Budget(name="latency_ms", maximum=40)]
    config = SearchConfig(algorithm=algorithm, population=10, generations=4, seed=seed)  # type: ignore[arg-type]
    result = search(SPACE, fitness, costs(), budgets, config)
    assert len(asked) == len(set(asked)) == len(result.candidates) == 50
    assert all(fits(candidate.costs, budgets) and SPACE.contains(candidate.subnet) for candidate in result.candidates)
    assert result.best.loss == min(candidate.loss for candidate in result.candidates)
    assert result.trust == 1.0
    points = [(candidate.loss, candidate.costs["params"]) for candidate in result.candidates]
    front = [(candidate.loss, candidate.costs["params"]) for candidate in result.front]
    assert not any(dominates(point, member) for point in points for member in front)


def best_losses(algorithm: str) -> list[float]:
    budgets = [Budget(name="params", maximum=12e6)]
    runs = [
        search(
            LIGHTHUBERT_SMALL,
            smooth_loss,
            costs(),
            budgets,
            SearchConfig(algorithm=algorithm, population=16, generations=9, seed=seed),  # type: ignore[arg-type]
        )
        for seed in range(5)
    ]
    assert {len(run.candidates) for run in runs} == {160}
    return [run.best.loss for run in runs]


def test_evolution_beats_random_search_at_equal_evaluations() -> None:
    evolved, drawn = best_losses("evolution"), best_losses("random")
    assert all(a < b for a, b in zip(evolved, drawn, strict=True))


def area(result: SearchResult, loss: float, params: float) -> float:
    """Area that the front dominates below a corner (hypervolume)."""
    total, right = 0.0, params
    for candidate in result.front:  # rising loss, falling cost
        total += max(0.0, loss - candidate.loss) * max(0.0, right - candidate.costs["params"])
        right = min(right, candidate.costs["params"])
    return total


def test_the_pareto_search_covers_more_than_random_search() -> None:
    def run(algorithm: str, seed: int) -> float:
        config = SearchConfig(algorithm=algorithm, population=16, generations=9, seed=seed)  # type: ignore[arg-type]
        return area(search(LIGHTHUBERT_SMALL, smooth_loss, costs(), [], config), 2.0, 16e6)

    assert all(run("pareto", seed) > run("random", seed) for seed in range(3))


def test_a_small_space_is_searched_through_and_then_left() -> None:
    result = search(SHARED, smooth_loss, costs(), [], SearchConfig(population=8, generations=50))
    assert len(result.candidates) == SHARED.num_subnets() == 40


def test_a_loss_that_is_not_finite_is_worst_and_survives_the_journal(tmp_path: Path) -> None:
    def fitness(subnet: Subnet) -> Fitness:
        return Fitness(loss=math.inf, halves=(math.inf, 1.0)) if subnet.dim == 48 else smooth_loss(subnet)

    config = SearchConfig(population=8, generations=2)
    runs = [
        search(SPACE, fitness, costs(), [], config, journal=SearchJournal(tmp_path, {"algorithm": "evolution"}))
        for _ in range(2)
    ]
    assert runs[0].candidates == runs[1].candidates
    assert runs[0].best.subnet.dim < 48
    assert "Infinity" not in (tmp_path / JOURNAL).read_text()


class KilledError(Exception):
    pass


@pytest.mark.parametrize("algorithm", ["random", "evolution", "pareto"])
@pytest.mark.parametrize("after", [1, 13, 30])
def test_a_killed_search_goes_on_to_the_same_result(tmp_path: Path, algorithm: str, after: int) -> None:
    config = SearchConfig(algorithm=algorithm, population=8, generations=4, seed=3)  # type: ignore[arg-type]
    header = {"seed": 3, "generations": 4}
    whole = search(SPACE, smooth_loss, costs(), [], config)
    asked: list[Subnet] = []

    def fitness(subnet: Subnet, limit: float = math.inf) -> Fitness:
        if len(asked) == limit:
            raise KilledError
        asked.append(subnet)
        return smooth_loss(subnet)

    with pytest.raises(KilledError):
        search(SPACE, lambda net: fitness(net, after), costs(), [], config, journal=SearchJournal(tmp_path, header))
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"subnet": {"dim": 16, "num_he')  # torn
    resumed = search(SPACE, fitness, costs(), [], config, journal=SearchJournal(tmp_path, header))
    assert len(asked) == len(set(asked)) == len(whole.candidates)
    assert resumed.num_evaluated == len(asked) - after
    assert (resumed.candidates, resumed.front, resumed.trust) == (whole.candidates, whole.front, whole.trust)
    again = search(SPACE, fitness, costs(), [], config, journal=SearchJournal(tmp_path, header))
    assert again.num_evaluated == 0
    assert again.candidates == whole.candidates


def test_another_search_in_the_folder_is_refused(tmp_path: Path) -> None:
    def journal(seed: int, generations: int) -> SearchJournal:
        header = {"config": {"seed": seed, "generations": generations}}
        return SearchJournal(tmp_path, header, ("config.generations",))

    journal(5, 3)
    journal(1, 3).add(SPACE.smallest(), Fitness(loss=1.0))  # nothing was evaluated with the first settings
    assert journal(1, 9).num_read == 1
    with pytest.raises(ValueError, match=r"holds another search \(config.seed was 1, now 2\); choose another --output"):
        journal(2, 3)
    (tmp_path / JOURNAL).write_text('{"seed": 1}\nnonsense\n{}\n')
    with pytest.raises(ValueError, match="not a journal that this search wrote"):
        journal(1, 3)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="population 2"):
        SearchConfig(population=2)
    with pytest.raises(ValueError, match=r"gene_rate is 1\.5"):
        SearchConfig(gene_rate=1.5)
    with pytest.raises(ValueError, match="there is no cost 'macs'"):
        search(SPACE, smooth_loss, costs(), [], SearchConfig(objectives=("macs",)))
