"""Search for subnets of a supernet: at random, by evolution within budgets, or for a whole Pareto front (NSGA-II).

Evolution follows once-for-all networks and AutoFormer (Cai et al. 2020; Chen et al. 2021, section 3.4): keep the best of all
that was seen, half of a generation are mutations of these and half their crossovers. The Pareto form is NSGA-II (Deb et
al. 2002): tournaments by front and crowding, the next generation is the best of parents and children.

What a subnet's loss is comes from outside (``recipes.search``). A search is a pure function of its settings and that loss: the
random numbers do not depend on what the journal already holds, so a search that was killed and goes on takes the same course.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sslim.compress.budgets import Budget, Costs, check_feasible, fits, nothing_fits, repair
from sslim.compress.genome import Genome, cross, draw, from_subnet, mutate, to_subnet
from sslim.compress.pareto import pareto_front, rank
from sslim.compress.search_journal import Fitness, SearchJournal
from sslim.models.search_space import SearchSpace, Subnet

MAX_TRIES = 200  # in a row that find no new subnet within the budgets, before it is taken that there is none


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Settings of a search.

    Attributes:
        algorithm: ``random``, ``evolution`` (one best subnet within the budgets) or ``pareto`` (loss against ``objectives``).
        population: Subnets in a generation.
        generations: Generations after the first one; random search evaluates as many subnets in all.
        objectives: Costs that ``pareto`` minimises beside the loss, and that the reported front is made of.
        parents_share: Share of the population, best first, that evolution breeds from.
        crossover_share: Share of children with two parents; the others are mutations of one.
        gene_rate: Probability that a mutation draws a block's heads or ratio anew.
        size_rate: The same for width and for depth.
        seed: Decides everything random.
    """

    algorithm: Literal["random", "evolution", "pareto"] = "evolution"
    population: int = 32
    generations: int = 10
    objectives: tuple[str, ...] = ("params",)
    parents_share: float = 0.25
    crossover_share: float = 0.5
    gene_rate: float = 0.15
    size_rate: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.population < 4 or self.generations < 0:
            raise ValueError(f"population {self.population} and generations {self.generations} must be at least 4 and 0")
        for name in ("parents_share", "crossover_share", "gene_rate", "size_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if not self.objectives:
            raise ValueError("a search needs at least one cost beside the loss")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An evaluated subnet.

    Attributes:
        genome: Its genes.
        subnet: Its sizes.
        fitness: Its loss.
        costs: Cost by name.
    """

    genome: Genome
    subnet: Subnet
    fitness: Fitness
    costs: dict[str, float]

    @property
    def loss(self) -> float:
        return self.fitness.loss


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Outcome of a search.

    Attributes:
        candidates: Everything evaluated, in order; all within the budgets.
        best: The one of least loss.
        front: Those that no other beats in loss and in every objective, by rising loss.
        num_evaluated: Evaluations that this process did itself.
        trust: Kendall's tau between the losses on two halves of the validation data; None without halves.
    """

    candidates: tuple[Candidate, ...]
    best: Candidate
    front: tuple[Candidate, ...]
    num_evaluated: int
    trust: float | None


class _Search:
    """State of a running search."""

    def __init__(
        self,
        space: SearchSpace,
        fitness: Callable[[Subnet], Fitness],
        costs: Costs,
        budgets: Sequence[Budget],
        config: SearchConfig,
        journal: SearchJournal,
        say: Callable[[str], None],
    ) -> None:
        self.space, self.fitness, self.costs, self.budgets = space, fitness, costs, tuple(budgets)
        self.config, self.journal, self.say = config, journal, say
        self.rng = random.Random(config.seed)
        self.seen: dict[Subnet, Candidate] = {}
        self.num_evaluated = 0

    def evaluate(self, genomes: Sequence[Genome]) -> list[Candidate]:
        """Returns the genomes' candidates; what the journal knows is not evaluated again."""
        done = []
        for genome in genomes:
            subnet = to_subnet(self.space, genome)
            if subnet not in self.journal.known:
                self.journal.add(subnet, self.fitness(subnet))
                self.num_evaluated += 1
            fitness = self.journal.known[subnet]
            self.seen[subnet] = Candidate(genome=genome, subnet=subnet, fitness=fitness, costs=self.costs(subnet))
            done.append(self.seen[subnet])
        return done

    def new(self, propose: Callable[[], Genome], count: int, taken: Sequence[Genome] = ()) -> list[Genome]:
        """Returns up to ``count`` proposals within the budgets, neither seen nor taken; fewer where there are no more."""
        found: dict[Subnet, Genome] = {to_subnet(self.space, genome): genome for genome in taken}
        start, failures = len(found), 0
        while len(found) - start < count and failures < MAX_TRIES:
            genome = repair(self.space, propose(), self.costs, self.budgets, self.rng)
            subnet = None if genome is None else to_subnet(self.space, genome)
            if genome is None or subnet is None or subnet in self.seen or subnet in found:
                failures += 1
                continue
            found[subnet], failures = genome, 0
        return list(found.values())[start:]

    def draw(self) -> Genome:
        """Draws a subnet; within the budgets by redrawing where that is quick, so that shrinking does not shape the draw."""
        genome = draw(self.space, self.rng)
        for _ in range(10):
            if fits(self.costs(to_subnet(self.space, genome)), self.budgets):
                break
            genome = draw(self.space, self.rng)
        return genome

    def first(self) -> list[Genome]:
        """The first generation: smallest, largest and default subnet where they fit, and drawn ones."""
        known = [self.space.smallest(), self.space.largest(), *([self.space.default] if self.space.default else [])]
        known = [net for net in dict.fromkeys(known) if self.space.contains(net) and fits(self.costs(net), self.budgets)]
        genomes = [from_subnet(self.space, subnet) for subnet in known]
        genomes += self.new(self.draw, self.config.population - len(genomes), genomes)
        if not genomes:
            raise ValueError(nothing_fits(self.costs, self.budgets))
        return genomes

    def child(self, parent: Callable[[], Candidate]) -> Genome:
        """One child: a mutation of a parent, or the crossover of two."""
        config, genome = self.config, parent().genome
        if self.rng.random() < config.crossover_share:
            return cross(self.space, genome, parent().genome, self.rng)
        return mutate(self.space, genome, self.rng, gene_rate=config.gene_rate, size_rate=config.size_rate)

    def children(self, parent: Callable[[], Candidate]) -> list[Genome]:
        """A generation; where parents have no new children left, it is filled up with drawn subnets."""
        genomes = self.new(lambda: self.child(parent), self.config.population)
        return genomes + self.new(self.draw, self.config.population - len(genomes), genomes)

    def objectives(self, candidate: Candidate) -> tuple[float, ...]:
        return (candidate.loss, *(candidate.costs[name] for name in self.config.objectives))

    def breed(self, population: list[Candidate]) -> list[Candidate]:
        """One generation: returns the next population."""
        size = self.config.population
        if self.config.algorithm == "random":
            return self.evaluate(self.new(self.draw, size))
        if self.config.algorithm == "evolution":
            best = sorted(self.seen.values(), key=lambda candidate: candidate.loss)
            best = best[: max(2, round(size * self.config.parents_share))]
            return self.evaluate(self.children(lambda: self.rng.choice(best)))
        ranks = rank([self.objectives(candidate) for candidate in population])

        def tournament() -> Candidate:
            return population[min(self.rng.randrange(len(ranks)), self.rng.randrange(len(ranks)), key=lambda i: ranks[i])]

        both = population + self.evaluate(self.children(tournament))
        ranks = rank([self.objectives(candidate) for candidate in both])
        return [both[i] for i in sorted(range(len(both)), key=lambda i: ranks[i])[:size]]

    def run(self) -> SearchResult:
        """Runs all generations."""
        population = self.evaluate(self.first())
        for generation in range(self.config.generations + 1):
            if generation:
                before = len(self.seen)
                population = self.breed(population)
                if len(self.seen) == before:
                    self.say(f"generation {generation}: no subnet within the budgets is left to try")
                    break
            best = min(self.seen.values(), key=lambda candidate: candidate.loss)
            self.say(f"generation {generation}: {len(self.seen)} subnets, best loss {best.loss:.5g}")
        candidates = tuple(self.seen.values())
        front = [candidates[i] for i in pareto_front([self.objectives(candidate) for candidate in candidates])]
        return SearchResult(
            candidates=candidates,
            best=min(candidates, key=lambda candidate: candidate.loss),
            front=tuple(front),
            num_evaluated=self.num_evaluated,
            trust=trust([candidate.fitness.halves for candidate in candidates]),
        )


def search(
    space: SearchSpace,
    fitness: Callable[[Subnet], Fitness],
    costs: Costs,
    budgets: Sequence[Budget],
    config: SearchConfig,
    *,
    journal: SearchJournal | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> SearchResult:
    """Searches a space.

    Args:
        space: Choices.
        fitness: Loss of a subnet; must give the same for the same subnet. Called once for each subnet at most.
        costs: Costs of a subnet; those that ``budgets`` and ``config.objectives`` name must be there.
        budgets: Bounds that every evaluated subnet keeps.
        config: Algorithm and its numbers.
        journal: What was evaluated before, and where to keep what is now; None for memory only.
        say: Told after every generation.

    Raises:
        ValueError: No subnet can meet a budget, or an objective is no cost.
    """
    for name in config.objectives:
        if name not in costs.functions:
            raise ValueError(f"there is no cost {name!r} to search over; there are {', '.join(costs.functions)}")
    check_feasible(space, costs, budgets)
    return _Search(space, fitness, costs, budgets, config, journal or SearchJournal(None, {}), say).run()


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float:
    """Returns Kendall's tau-b of two rankings, from -1 to 1; NaN where one of them is constant."""
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    signs_x, signs_y = (np.sign(values[:, None] - values[None, :]) for values in (first, second))
    pairs = float(np.abs(signs_x).sum() * np.abs(signs_y).sum())
    return float((signs_x * signs_y).sum() / pairs**0.5) if pairs else float("nan")


def trust(halves: Sequence[Sequence[float]]) -> float | None:
    """Returns Kendall's tau between losses on the first and second half, over subnets whose losses are finite; None without."""
    finite = [pair for pair in halves if len(pair) == 2 and np.isfinite(pair).all()]
    if len(finite) < 2:
        return None
    tau = kendall_tau([a for a, _ in finite], [b for _, b in finite])
    return tau if np.isfinite(tau) else None
