"""Budgets of a search: what a subnet may cost, and how one that costs too much is made to fit."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sslim.compress.genome import Genome, draw, neighbours, to_subnet
from sslim.config import nearest
from sslim.models.search_space import SearchSpace, Subnet

UNITS = {
    "params": "parameters",
    "macs": "multiply-accumulates for each second of audio",
    "latency_ms": "milliseconds",
}
FEASIBLE_TRIES = 40  # repairs of drawn subnets that all fail before it is taken that nothing lies within the budgets
_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_NUMBER = r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*([kmgt]?)"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bounds of one cost.

    Attributes:
        name: ``params``, ``macs`` (of each second of audio) or ``latency_ms``.
        maximum: What a subnet may cost at most.
        minimum: What it must cost at least; 0 for no such bound.
    """

    name: str
    maximum: float
    minimum: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in UNITS:
            raise ValueError(f"there is no budget {self.name!r}{nearest(self.name, UNITS)}; there are {', '.join(UNITS)}")
        if not 0 <= self.minimum <= self.maximum or self.maximum <= 0:
            raise ValueError(f"the budget {self.name} from {self.minimum:g} to {self.maximum:g} leaves nothing to choose")


def parse_budget(text: str) -> Budget:
    """Reads ``params=1.2M``, ``macs=0.5G``, ``latency_ms=20``, or with a lower bound ``params=0.9M..1.2M``.

    Raises:
        ValueError: Anything else.
    """
    match = re.fullmatch(rf"\s*(\w+)\s*=\s*(?:{_NUMBER}\s*\.\.\s*)?{_NUMBER}\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError(f"the budget {text!r} cannot be read; write it like params=1.2M, macs=0.5G or latency_ms=20")
    name, low, low_unit, high, high_unit = match.groups()
    minimum = 0.0 if low is None else float(low) * _FACTORS[low_unit.lower()]
    return Budget(name=name, maximum=float(high) * _FACTORS[high_unit.lower()], minimum=minimum)


class Costs:
    """What subnets cost, each computed once.

    Args:
        functions: Name to cost of a subnet.
    """

    def __init__(self, functions: Mapping[str, Callable[[Subnet], float]]) -> None:
        self.functions = dict(functions)
        self._known: dict[Subnet, dict[str, float]] = {}

    def __call__(self, subnet: Subnet) -> dict[str, float]:
        if subnet not in self._known:
            self._known[subnet] = {name: cost(subnet) for name, cost in self.functions.items()}
        return self._known[subnet]

    def nearest(self, budgets: Sequence[Budget]) -> dict[str, float]:
        """Returns the costs of that subnet among those asked for which comes nearest to the budgets."""
        return min(self._known.values(), key=lambda costs: misses(costs, budgets))


def excess(costs: Mapping[str, float], budgets: Sequence[Budget]) -> list[Budget]:
    """Returns the budgets whose maximum is exceeded."""
    return [budget for budget in budgets if costs[budget.name] > budget.maximum]


def amount(value: float) -> str:
    """Returns a cost for people: whole numbers from a thousand on, else four digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def fits(costs: Mapping[str, float], budgets: Sequence[Budget]) -> bool:
    """Whether every cost lies within its bounds."""
    return all(budget.minimum <= costs[budget.name] <= budget.maximum for budget in budgets)


def check_feasible(space: SearchSpace, costs: Costs, budgets: Sequence[Budget]) -> None:
    """Finds out before anything is searched that the budgets cannot be met, or not all of them by one subnet.

    Raises:
        ValueError: The smallest subnet exceeds a maximum, the largest stays below a minimum, or nothing was found in between.
    """
    smallest, largest = costs(space.smallest()), costs(space.largest())
    for budget in budgets:
        if budget.name not in smallest:
            raise ValueError(f"the budget {budget.name} needs a cost of that name; there are {', '.join(smallest)}")
        least, most, unit = smallest[budget.name], largest[budget.name], UNITS[budget.name]
        if least > budget.maximum:
            raise ValueError(
                f"the smallest subnet has {amount(least)} {unit}, more than the budget of {amount(budget.maximum)}"
            )
        if most < budget.minimum:
            raise ValueError(f"the largest subnet has {amount(most)} {unit}, less than the {amount(budget.minimum)} asked for")
    rng = random.Random(0)
    if fits(smallest, budgets) or fits(largest, budgets):
        return
    if not any(repair(space, draw(space, rng), costs, budgets, rng) for _ in range(FEASIBLE_TRIES)):
        raise ValueError(nothing_fits(costs, budgets))


def nothing_fits(costs: Costs, budgets: Sequence[Budget]) -> str:
    """Returns the sentence for budgets within which no subnet was found: it names the nearest one that was looked at."""
    nearest_costs = costs.nearest(budgets)
    wanted = " and ".join(
        f"{f'{amount(budget.minimum)} to ' if budget.minimum else ''}{amount(budget.maximum)} {UNITS[budget.name]}"
        for budget in budgets
    )
    found = " and ".join(amount(nearest_costs[name]) for name in dict.fromkeys(budget.name for budget in budgets))
    return f"no subnet was found within {wanted}; the nearest has {found}: widen the budget"


def misses(costs: Mapping[str, float], budgets: Sequence[Budget]) -> float:
    """Returns how far costs lie outside their bounds, as shares of these, summed; 0 where they fit."""
    over = sum(max(0.0, costs[budget.name] / budget.maximum - 1.0) for budget in budgets)
    return over + sum(max(0.0, 1.0 - costs[budget.name] / budget.minimum) for budget in budgets if budget.minimum)


def repair(space: SearchSpace, genome: Genome, costs: Costs, budgets: Sequence[Budget], rng: random.Random) -> Genome | None:
    """Makes a genome fit: a gene a step smaller while it costs too much, a step larger while it costs too little.

    Of the steps that lower (raise) what is wrong, one is drawn at a time. Shrinking ends at the smallest subnet at the latest.
    Between a maximum and a minimum that lie close the walk may go to and fro; it is given up after a bounded number of steps.

    Returns:
        The genome, or None when the walk led nowhere.
    """
    num_genes = 2 + 2 * len(space.blocks(max(space.num_layers)))
    for _ in range(4 * num_genes * _choices(space)):
        now = costs(to_subnet(space, genome))
        wrong, step = excess(now, budgets), -1
        if not wrong:
            wrong, step = [budget for budget in budgets if now[budget.name] < budget.minimum], 1
        if not wrong:
            return genome
        moves = list(neighbours(space, genome, step))
        rng.shuffle(moves)
        for move in moves:
            then = costs(to_subnet(space, move))
            if any(step * (then[budget.name] - now[budget.name]) > 0 for budget in wrong):
                genome = move
                break
        else:
            return None
    return None


def _choices(space: SearchSpace) -> int:
    return max(map(len, (space.dims, space.num_heads, space.feedforward_ratios, space.num_layers)))
