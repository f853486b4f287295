"""How strongly to compress: the largest model that a method leaves within a budget.

Costs grow with the share that is kept. Parameters and MACs follow from a description, so the share is found by halving an
interval, and nothing is cut on the way. Latency is measured: no formula stands between the budget and the machine. As other
load changes a machine's speed from minute to minute, every candidate is timed in turns with the model before the cut, and what
was chosen is measured again before it is taken.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from sslim.compress.budgets import UNITS, Budget, amount
from sslim.models import ModelConfig
from sslim.models.elastic import count_parameters
from sslim.profiling import Conditions, count_macs
from sslim.profiling.latency import time_whole

HALVINGS = 16  # the share to 1/65,536 of its range: a unit of 12 layers of 3,072
LOOKS = 12  # measurements of latency at most
AIM, NEAR = 0.98, 0.95  # shares of a budget of latency: what is aimed at, and what is taken
GRID = 32  # shares between two models that are tried for a third
CLOSE = 0.98  # share of a budget of size from which on two models are both taken to fill it
ROUNDS, LEAST_S = 9, 1.0  # of a measurement

Plan = Callable[..., ModelConfig]  # share kept, and that of coarse parts by the name of its setting, to description
TimeInTurns = Callable[[Mapping[str, ModelConfig]], Mapping[str, Sequence[float]]]  # name to milliseconds of every round


@dataclass(frozen=True, kw_only=True)
class Found:
    """A share and what it leaves.

    Attributes:
        keep: Share kept.
        config: Description of the model that is left.
        cost: Its cost, in the budget's unit.
        keep_coarse: Share kept of the parts that go in coarse steps, where it was fixed by itself.
    """

    keep: float
    config: ModelConfig
    cost: float
    keep_coarse: float | None = None


def size_of(config: ModelConfig, name: str, conditions: Conditions) -> float:
    """Returns what a model costs wherever it runs.

    Args:
        config: The model.
        name: ``params`` (without heads) or ``macs`` (of a second of audio).
        conditions: Length of the audio that MACs hold for.

    Raises:
        ValueError: MACs of a model without a front-end, whose features have no length in seconds.
    """
    if name == "params":
        return float(count_parameters(config, with_heads=False))
    if config.frontend is None:
        raise ValueError(
            f"this {config.family} model has no front-end, so nothing says how many of its frames a second has: give a budget "
            "in params"
        )
    return count_macs(config, seconds=conditions.seconds).per_second


def within_size(
    plan: Plan,
    budget: Budget,
    cost: Callable[[ModelConfig], float],
    *,
    least: float,
    say: Callable[[str], None],
    coarse: str | None = None,
) -> Found:
    """Finds the largest share kept whose model is within a budget.

    Where some parts go in coarse steps (a head of every layer at once), one share of all would leave up to such a step unused.
    So their number is fixed at the largest share, or a step above, and the other parts fill what is left of the budget; of two
    models that both fill it, the one with the more equal shares is taken.

    Args:
        plan: Share kept, from ``least`` to 1, to description; larger shares hardly ever cost less.
        budget: What the model may cost.
        cost: Description to cost.
        least: Smallest share that the method can keep.
        say: Told what was found.
        coarse: What ``plan`` calls the share of the parts that go in coarse steps; None where there are none.

    Raises:
        ValueError: Even the smallest model costs more, or the largest one within the maximum less than the minimum.
    """
    best, above = _largest(plan, budget, cost, least)
    _check_reachable(best, budget)
    if coarse is not None and above is not None:
        best = _filled(plan, coarse, (best.keep, above), budget, cost, least)
    _check_minimum(best, budget)
    fixed = "" if best.keep_coarse is None else f" ({coarse} {best.keep_coarse:.4f})"
    say(f"keeping {best.keep:.4f}{fixed}: {_told(best, budget)}")
    return best


def _largest(
    plan: Callable[[float], ModelConfig], budget: Budget, cost: Callable[[ModelConfig], float], least: float
) -> tuple[Found, float | None]:
    """The largest share within the maximum (``least`` if none is), and one just above that is not; None where all are."""

    def look(keep: float) -> Found:
        config = plan(keep)
        return Found(keep=keep, config=config, cost=cost(config))

    best, above = look(1.0), 1.0
    if best.cost <= budget.maximum:
        return best, None
    best = look(least)
    for _ in range(HALVINGS if best.cost <= budget.maximum else 0):
        found = look((best.keep + above) / 2)
        if found.cost <= budget.maximum:
            best = found
        else:
            above = found.keep
    return best, above


def _filled(
    plan: Plan,
    coarse: str,
    shares: Sequence[float],
    budget: Budget,
    cost: Callable[[ModelConfig], float],
    least: float,
) -> Found:
    """Fills a budget with each of some shares of the coarse parts fixed, the first of which fits; returns the best."""
    filled = []
    for share in shares:
        found, _ = _largest(partial(plan, **{coarse: share}), budget, cost, least)
        filled += [replace(found, keep_coarse=share)] if found.cost <= budget.maximum else []
    largest = max(found.cost for found in filled)
    close = [found for found in filled if found.cost >= min(largest, CLOSE * budget.maximum)]
    return min(close, key=lambda found: abs(found.keep - (found.keep_coarse or 0.0)))


@dataclass(kw_only=True)
class Stopwatch:
    """Latency of models, each timed in turns with one and the same other.

    What a model takes is the median over rounds of its ratio to the reference in the same round, times the median of the
    reference over all rounds so far: load that comes and goes meets both alike.

    Attributes:
        reference: Description of the model before the cut.
        time: Times models in turns.
        reference_ms: The reference in all rounds.
        ratios: Every model that was timed, and its ratios.
    """

    reference: ModelConfig
    time: TimeInTurns
    reference_ms: list[float] = field(default_factory=list)
    ratios: list[tuple[ModelConfig, list[float]]] = field(default_factory=list)

    def measure(self, config: ModelConfig) -> None:
        """Times a model, once more where that was done before."""
        if config == self.reference:
            rounds = self.time({"reference": config})
            own = rounds["reference"]
        else:
            rounds = self.time({"reference": self.reference, "model": config})
            own = rounds["model"]
        self.reference_ms += rounds["reference"]
        ratios = [mine / whole for mine, whole in zip(own, rounds["reference"], strict=True)]
        if (known := self._ratios(config)) is not None:
            known += ratios
        else:
            self.ratios.append((config, ratios))

    def latency_ms(self, config: ModelConfig) -> float:
        """Returns the latency of a model that was timed, in milliseconds."""
        ratios = self._ratios(config)
        assert ratios is not None, "this model was not timed"
        return statistics.median(ratios) * statistics.median(self.reference_ms)

    def _ratios(self, config: ModelConfig) -> list[float] | None:
        return next((ratios for known, ratios in self.ratios if known == config), None)


def stopwatch(reference: ModelConfig, conditions: Conditions) -> Stopwatch:
    """Returns a stopwatch for models with random weights (time does not depend on them) on this machine."""
    return Stopwatch(reference=reference, time=partial(time_whole, conditions=conditions, repeats=ROUNDS, least_s=LEAST_S))


def within_latency(plan: Plan, budget: Budget, watch: Stopwatch, *, least: float, say: Callable[[str], None]) -> Found:
    """Finds a large share kept whose model is measured to be within a budget of latency, and mostly just within it.

    Shares are interpolated between models that were timed. A model is taken when it was timed twice and is at least ``NEAR``
    of the budget, or there is none between it and the next larger one, or ``LOOKS`` measurements are done.

    Args:
        plan: Share kept, from ``least`` to 1, to description.
        budget: ``latency_ms``.
        watch: Times models; its reference is the model before the cut.
        least: Smallest share that the method can keep.
        say: Told every measurement.

    Raises:
        ValueError: As :func:`within_size`.
    """
    looked: dict[float, tuple[ModelConfig, int]] = {}

    def look(keep: float, config: ModelConfig) -> Found:
        watch.measure(config)
        looked[keep] = (config, looked.get(keep, (config, 0))[1] + 1)
        found = Found(keep=keep, config=config, cost=watch.latency_ms(config))
        say(f"keeping {keep:.4f}: {_told(found, budget)}")
        return found

    def all_looked() -> list[Found]:
        return [Found(keep=keep, config=config, cost=watch.latency_ms(config)) for keep, (config, _) in sorted(looked.items())]

    best = look(1.0, plan(1.0))
    if best.cost > budget.maximum and look(least, plan(least)).cost > budget.maximum:
        _check_reachable(look(least, plan(least)), budget)
    for turn in range(LOOKS - len(looked)):
        found = all_looked()
        best = max((one for one in found if one.cost <= budget.maximum), key=lambda one: one.keep, default=found[0])
        above = next((one for one in found if one.keep > best.keep), None)
        new = None if above is None or best.cost >= NEAR * budget.maximum else _between(plan, best, above, budget, turn, found)
        if new is not None:
            look(*new)
        elif looked[best.keep][1] < 2 and above is not None:
            look(best.keep, best.config)
        else:
            break
    best = max((one for one in all_looked() if one.cost <= budget.maximum), key=lambda one: one.keep, default=all_looked()[0])
    _check_reachable(best, budget)
    _check_minimum(best, budget)
    return best


def _between(
    plan: Plan, low: Found, high: Found, budget: Budget, turn: int, looked: Sequence[Found]
) -> tuple[float, ModelConfig] | None:
    """A share between two whose model is a new one, close to where a line between them meets the aim; None where there is none.

    Every third time it is the middle: where costs are no line, interpolation may come closer from one side only.
    """
    span = high.keep - low.keep
    part = (AIM * budget.maximum - low.cost) / max(high.cost - low.cost, 1e-9) if turn % 3 < 2 else 0.5
    wanted = low.keep + min(max(part, 0.02), 0.98) * span
    grid = sorted((low.keep + span * place / GRID for place in range(1, GRID)), key=lambda keep: abs(keep - wanted))
    for keep in (wanted, *grid):
        config = plan(keep)
        if all(config != one.config for one in looked):
            return keep, config
    return None


def reached_in_words(reached: float, budget: Budget) -> str:
    """Returns what a model costs and how far that is from its budget, in words."""
    off = reached / budget.maximum - 1.0
    far = "on" if abs(off) < 0.0005 else f"{abs(off):.1%} {'above' if off > 0 else 'below'}"
    unit = UNITS[budget.name] + (" as measured" if budget.name == "latency_ms" else "")
    return f"{amount(reached)} {unit}, {far} the budget of {amount(budget.maximum)}"


def _told(found: Found, budget: Budget) -> str:
    return f"{amount(found.cost)} {UNITS[budget.name]}"


def _has(budget: Budget) -> str:
    return "takes" if budget.name == "latency_ms" else "has"


def _check_reachable(smallest: Found, budget: Budget) -> None:
    if smallest.cost > budget.maximum:
        raise ValueError(
            f"the smallest model that this method leaves {_has(budget)} {_told(smallest, budget)}, more than the budget of "
            f"{amount(budget.maximum)}: combine it with another method in a pipeline"
        )


def _check_minimum(best: Found, budget: Budget) -> None:
    if best.cost < budget.minimum:
        raise ValueError(
            f"the largest model within {amount(budget.maximum)} {UNITS[budget.name]} that this method leaves {_has(budget)} "
            f"{amount(best.cost)}, less than the {amount(budget.minimum)} asked for: give a wider range"
        )
