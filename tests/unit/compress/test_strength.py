"""How strongly to compress: the largest model within a size, and within a latency on a machine whose speed comes and goes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from sslim.compress.budgets import Budget, parse_budget
from sslim.compress.strength import (
    LOOKS,
    Stopwatch,
    reached_in_words,
    size_of,
    stopwatch,
    within_latency,
    within_size,
)
from sslim.models import ModelConfig
from sslim.models.elastic import count_parameters
from sslim.models.melhubert import melhubert
from sslim.profiling import Conditions, count_macs

WHOLE = melhubert(num_layers=2, dim=32, num_heads=4, feedforward_dim=1000, conv_kernel_size=16, conv_groups=4)


def quiet(_: str) -> None:
    """Nobody listens."""


def rows(keep: float) -> ModelConfig:
    """A share of the feed-forward units."""
    return of_width(max(1, round(keep * 1000)))


def of_width(units: int) -> ModelConfig:
    blocks = tuple(replace(block, feedforward_dim=units) for block in WHOLE.encoder.blocks)
    return replace(WHOLE, encoder=replace(WHOLE.encoder, blocks=blocks))


def units_of(config: ModelConfig) -> int:
    return config.encoder.blocks[0].feedforward_dim


def true_ms(config: ModelConfig) -> float:
    return 4.0 + 0.016 * units_of(config)


class Machine:
    """Takes ``true_ms`` where nothing else runs; its load is another in every measurement, and jitter in every round."""

    def __init__(self, seed: int, load: tuple[float, float] = (0.7, 1.5)) -> None:
        self.rng, self.load, self.measurements = np.random.default_rng(seed), load, 0

    def __call__(self, configs: Mapping[str, ModelConfig]) -> dict[str, list[float]]:
        self.measurements += 1
        load = self.rng.uniform(*self.load)
        times: dict[str, list[float]] = {name: [] for name in configs}
        for _ in range(30):
            spike = 2.0 if self.rng.random() < 0.1 else 1.0
            for name, config in configs.items():
                times[name].append(true_ms(config) * load * spike * self.rng.normal(1.0, 0.05))
        return times


def latency(milliseconds: float) -> Budget:
    return Budget(name="latency_ms", maximum=milliseconds)


@pytest.mark.parametrize("name", ["params", "macs"])
@pytest.mark.parametrize("share", [0.35, 0.5, 0.81])
def test_no_larger_model_is_within_a_size(name: str, share: float) -> None:
    conditions = Conditions(seconds=2.0)

    def cost(config: ModelConfig) -> float:
        return size_of(config, name, conditions)

    maximum = cost(of_width(1)) + share * (cost(WHOLE) - cost(of_width(1)))
    found = within_size(rows, Budget(name=name, maximum=maximum), cost, least=0.001, say=quiet)
    assert cost(found.config) == found.cost <= maximum < cost(of_width(units_of(found.config) + 1))
    assert found.config == rows(found.keep)


def heads_and_units(keep: float, coarse: float | None = None) -> ModelConfig:
    """A share of four heads, and of the feed-forward units."""
    heads = max(1, round(4 * (coarse or keep)))
    blocks = tuple(replace(block, num_heads=heads, feedforward_dim=max(1, round(100 * keep))) for block in WHOLE.encoder.blocks)
    return replace(WHOLE, encoder=replace(WHOLE.encoder, blocks=blocks))


@pytest.mark.parametrize("name", ["params", "macs"])
@pytest.mark.parametrize("share", [0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.97])
def test_small_parts_fill_what_large_ones_leave_of_a_size(name: str, share: float) -> None:
    def cost(config: ModelConfig) -> float:
        return size_of(config, name, Conditions(seconds=2.0))

    least = cost(heads_and_units(0.01))
    budget = Budget(name=name, maximum=least + share * (cost(heads_and_units(1.0)) - least))
    found = within_size(heads_and_units, budget, cost, least=0.01, say=quiet, coarse="coarse")
    assert found.config == heads_and_units(found.keep, found.keep_coarse)
    assert 0.98 * budget.maximum <= found.cost <= budget.maximum
    one = within_size(heads_and_units, budget, cost, least=0.01, say=quiet)
    assert one.cost <= found.cost
    assert one.keep_coarse is None


def test_one_share_of_all_parts_misses_a_size_that_shares_of_their_own_meet() -> None:
    """The control, and what is said: the size is that of four heads and a few units less than go with them."""
    said: list[str] = []

    def cost(config: ModelConfig) -> float:
        return size_of(config, "params", Conditions())

    budget = Budget(name="params", maximum=cost(heads_and_units(0.85, 1.0)))
    one = within_size(heads_and_units, budget, cost, least=0.01, say=quiet)
    found = within_size(heads_and_units, budget, cost, least=0.01, say=said.append, coarse="coarse")
    assert one.cost < 0.97 * budget.maximum
    assert found.cost == budget.maximum
    assert said == [f"keeping {found.keep:.4f} (coarse {found.keep_coarse:.4f}): {found.cost:,.0f} parameters"]
    near = parse_budget(f"params={found.cost - 200:.0f}..{found.cost + 200:.0f}")
    assert within_size(heads_and_units, near, cost, least=0.01, say=quiet, coarse="coarse").cost >= near.minimum
    with pytest.raises(ValueError, match="give a wider range"):
        within_size(heads_and_units, near, cost, least=0.01, say=quiet)


def test_of_models_that_fill_a_size_the_more_even_one_is_taken() -> None:
    """Just below the step to three heads: with two of them all units would be left, with three about as large a share."""

    def cost(config: ModelConfig) -> float:
        return size_of(config, "params", Conditions())

    budget = Budget(name="params", maximum=cost(heads_and_units(0.62, 0.75)))
    found = within_size(heads_and_units, budget, cost, least=0.01, say=quiet, coarse="coarse")
    assert (found.config.encoder.blocks[0].num_heads, found.config.encoder.blocks[0].feedforward_dim) == (3, 62)


def test_what_fits_whole_is_not_divided() -> None:
    budget = parse_budget("params=1G")
    found = within_size(heads_and_units, budget, lambda config: 5.0, least=0.1, say=quiet, coarse="coarse")
    assert (found.keep, found.keep_coarse) == (1.0, None)
    with pytest.raises(ValueError, match="more than the budget"):
        within_size(heads_and_units, parse_budget("params=1"), lambda config: 5.0, least=0.1, say=quiet, coarse="coarse")


def test_sizes_are_those_of_the_profile() -> None:
    assert size_of(WHOLE, "params", Conditions()) == count_parameters(WHOLE, with_heads=False)
    assert size_of(WHOLE, "macs", Conditions(seconds=3.0)) == count_macs(WHOLE, seconds=3.0).per_second


def test_macs_of_a_second_need_a_front_end() -> None:
    with pytest.raises(ValueError, match=r"this melhubert model has no front-end, .*: give a budget in params"):
        size_of(replace(WHOLE, frontend=None), "macs", Conditions())
    assert size_of(replace(WHOLE, frontend=None), "params", Conditions()) == size_of(WHOLE, "params", Conditions())


def test_what_fits_already_stays_whole() -> None:
    assert within_size(rows, parse_budget("params=1G"), lambda config: 5.0, least=0.1, say=quiet).keep == 1.0
    machine = Machine(0)
    watch = Stopwatch(reference=WHOLE, time=machine)
    assert within_latency(rows, latency(100.0), watch, least=0.001, say=quiet).keep == 1.0
    assert machine.measurements == 1


@pytest.mark.parametrize("target", [6.0, 9.0, 15.0])
def test_a_latency_is_met_though_the_load_of_the_machine_changes(target: float) -> None:
    for seed in range(8):
        machine = Machine(seed)
        watch = Stopwatch(reference=WHOLE, time=machine)
        found = within_latency(rows, latency(target), watch, least=0.001, say=quiet)
        typical = statistics.median(watch.reference_ms) / true_ms(WHOLE)  # how much slower the machine was than without load
        assert 0.9 * target <= typical * true_ms(found.config) <= 1.1 * target, seed
        assert machine.measurements <= LOOKS + 1


def test_times_of_different_moments_would_miss_it() -> None:
    """The control: a median of each model alone is off by the load of its moment, ratios to the whole model are not."""
    machine = Machine(1)
    small = of_width(300)
    watch = Stopwatch(reference=WHOLE, time=machine)
    for _ in range(6):
        watch.measure(small)
    typical = statistics.median(watch.reference_ms) / true_ms(WHOLE)
    assert watch.latency_ms(small) == pytest.approx(typical * true_ms(small), rel=0.03)
    alone = [statistics.median(machine({"model": small})["model"]) / (typical * true_ms(small)) for _ in range(6)]
    assert max(abs(ratio - 1.0) for ratio in alone) > 0.15


def test_where_few_sizes_exist_the_largest_that_fits_is_taken() -> None:
    def quarters(keep: float) -> ModelConfig:
        return of_width(250 * max(1, round(4 * keep)))

    machine = Machine(3, load=(0.95, 1.05))
    found = within_latency(quarters, latency(14.0), Stopwatch(reference=WHOLE, time=machine), least=0.25, say=quiet)
    assert units_of(found.config) == 500  # 12 ms; 750 units take 16
    assert machine.measurements <= 6


def test_it_is_said_what_cannot_be_met() -> None:
    with pytest.raises(ValueError, match=r"the smallest model that this method leaves has 1,234 parameters, more than .* 10: "):
        within_size(rows, parse_budget("params=10"), lambda config: 1234.0 * units_of(config), least=0.001, say=quiet)
    watch = Stopwatch(reference=WHOLE, time=Machine(0))
    with pytest.raises(ValueError, match=r"the smallest model that this method leaves takes .* milliseconds, more than .* 1: "):
        within_latency(rows, latency(1.0), watch, least=0.001, say=quiet)


def test_a_lower_bound_counts() -> None:
    def cost(config: ModelConfig) -> float:
        return 300.0 * (units_of(config) // 300)

    assert within_size(rows, parse_budget("params=550..650"), cost, least=0.001, say=quiet).cost == 600.0
    with pytest.raises(ValueError, match="has 600, less than the 700 asked for: give a wider range"):
        within_size(rows, parse_budget("params=700..850"), cost, least=0.001, say=quiet)


def test_a_real_stopwatch_finds_the_larger_model_slower() -> None:
    watch = stopwatch(WHOLE, Conditions(seconds=0.3))
    fast = replace(watch, time=lambda configs: watch.time(configs, repeats=5, least_s=0.0))  # type: ignore[call-arg]
    big = melhubert(num_layers=12, dim=512, num_heads=8, feedforward_dim=2048, conv_kernel_size=16, conv_groups=4)
    for config in (WHOLE, big):
        fast.measure(config)
    assert fast.latency_ms(big) > fast.latency_ms(WHOLE) > 0


@pytest.mark.parametrize(
    ("reached", "told"),
    [
        (10.5, "10.5 milliseconds as measured, 5.0% above the budget of 10"),
        (9.0, "9 milliseconds as measured, 10.0% below the budget of 10"),
        (10.001, "10 milliseconds as measured, on the budget of 10"),
    ],
)
def test_the_distance_is_told(reached: float, told: str) -> None:
    assert reached_in_words(reached, latency(10.0)) == told


def test_it_is_said_what_was_found() -> None:
    said: list[str] = []
    found = within_size(rows, parse_budget("params=40"), lambda config: 0.1 * units_of(config), least=0.001, say=said.append)
    assert said == [f"keeping {found.keep:.4f}: 40 parameters"]
