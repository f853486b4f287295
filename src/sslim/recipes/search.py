"""Searching a supernet: where space, fitness, costs, search and report meet.

A search's folder holds ``journal.jsonl`` (every evaluation), ``latency.json`` (when latency counts), and at the end
``search.json``, ``table.txt``, ``pareto.png`` and the models that were asked for, ``front-1``, ``front-2``, … by rising cost.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sslim import __version__
from sslim.checkpoints import load_model, save_model
from sslim.checkpoints.model_files import model_path, tensors_digest
from sslim.checkpoints.native import DESCRIPTION
from sslim.compress.budgets import Budget, Costs, check_feasible
from sslim.compress.pareto import spread
from sslim.compress.search import Candidate, SearchConfig, SearchResult, search
from sslim.compress.search_journal import SearchJournal
from sslim.config import read_json, to_plain
from sslim.data.corpus import Corpus
from sslim.models import ModelConfig, SpeechModel
from sslim.models.elastic import check_supernet, count_parameters, extract_model, subnet_config
from sslim.models.encoding import give_features
from sslim.models.search_space import SearchSpace, Subnet
from sslim.profiling import Conditions, LatencyTable, count_macs, measure_latency
from sslim.profiling.latency import check_device, measure_whole
from sslim.recipes.pretrain import label_set
from sslim.recipes.subnet_fitness import FitnessConfig, build_fitness, halves_of, held_out
from sslim.recipes.supernet import load_whole, read_recipe
from sslim.report.pareto import SEARCH, draw_front, read_points
from sslim.storage import file_digest, write_json, write_text_atomically
from sslim.targets.journal import only_one

LATENCY, TABLE, PICTURE = "latency.json", "table.txt", "pareto.png"
FORMAT_VERSION = 1
MAY_GROW = ("search.generations",)  # a longer search goes on from a shorter one
MAX_MEASURED = 8  # whole nets of the front whose latency is measured


@dataclass(frozen=True, kw_only=True)
class SearchRecipe:
    """Everything that decides a search, apart from its models and data.

    Attributes:
        search: Algorithm.
        budgets: Bounds.
        fitness: What a loss is measured on.
        conditions: Length of audio for MACs and latency; batch, threads and device for latency.
        latency: Whether latency is measured although no budget or objective asks for it.
        latency_repeats: Rounds of every measurement at least.
        latency_least_s: Seconds that every measurement takes at least.
        latency_nets: Whole nets that check the sums of parts.
    """

    search: SearchConfig = SearchConfig()
    budgets: tuple[Budget, ...] = ()
    fitness: FitnessConfig = FitnessConfig()
    conditions: Conditions = Conditions()
    latency: bool = False
    latency_repeats: int = 10
    latency_least_s: float = 15.0
    latency_nets: int = 12

    def __post_init__(self) -> None:
        if self.latency_repeats < 1:
            raise ValueError(f"latency is to be measured in {self.latency_repeats} rounds; expected 1 or more")

    @property
    def needs_latency(self) -> bool:
        names = {*self.search.objectives, *(budget.name for budget in self.budgets)}
        return self.latency or "latency_ms" in names


@dataclass(kw_only=True)
class _Outcome:
    """What is written about a search.

    Attributes:
        result: What was found.
        names: Of the subnets that are extracted.
        measured_ms: Latency of whole nets.
        slowness: Measured latency over predicted: the median, and the largest distance from it as a share.
    """

    result: SearchResult
    names: dict[Subnet, str] = field(default_factory=dict)
    measured_ms: dict[Subnet, float] = field(default_factory=dict)
    slowness: tuple[float, float] | None = None


def run_search(
    recipe: SearchRecipe,
    supernet_path: Path,
    teacher_path: Path | None,
    corpus_path: Path,
    output: Path,
    *,
    labels_name: str | None = None,
    extract: int = 0,
    device: str = "cpu",
    say: Callable[[str], None] = print,
) -> SearchResult:
    """Searches, or goes on with what ``output`` holds, and writes the results there.

    Args:
        recipe: What to search for.
        supernet_path: A supernet: a native folder with a search space, or a foreign one.
        teacher_path: Model whose frames are the targets; None with labels.
        corpus_path: A prepared corpus; its validation part is used.
        output: Folder of the search.
        labels_name: Label set for masked prediction in place of a teacher.
        extract: Models of the front to write.
        device: Where losses are computed.
        say: Where notes for the user go.

    Raises:
        ValueError: Anything about models, data, budgets or settings that cannot work; another search in the folder.
    """
    _check_request(output, extract, device)
    supernet, space = _load_supernet(supernet_path)
    analytic = [budget for budget in recipe.budgets if budget.name != "latency_ms"]
    check_feasible(space, subnet_costs(supernet.config, recipe.conditions, None), analytic)  # before anything is measured
    corpus = Corpus.open(corpus_path)
    recipe = _as_trained(recipe, supernet_path, corpus, say)
    halves_of(corpus, recipe.fitness)  # refuses what is too little before anything is measured
    supernet_path, teacher_path = model_path(supernet_path), None if teacher_path is None else model_path(teacher_path)
    labels = None if labels_name is None else corpus.labels(label_set(corpus, labels_name))
    give_features(supernet, corpus)
    teacher = None if labels is not None else _load_teacher(teacher_path, corpus)
    with only_one(output):
        table = _latency(recipe, supernet.config, output, say)
        settings = {
            "kind": "search",
            "format_version": FORMAT_VERSION,
            "supernet": tensors_digest(supernet_path),
            "teacher": tensors_digest(teacher_path) if teacher is not None and teacher_path is not None else None,
            "corpus": corpus.digest,
            "labels": None if labels is None else labels.digest,
            "latency": None if table is None else file_digest(output / LATENCY),
            **to_plain(replace(recipe, latency=False)),
        }
        costs = subnet_costs(supernet.config, recipe.conditions, table)
        check_feasible(space, costs, recipe.budgets)  # before anything is written or run
        if (journal := SearchJournal(output, settings, MAY_GROW)).num_read:
            say(f"going on: {journal.num_read} subnets were evaluated before")
        fitness = build_fitness(supernet, teacher, corpus, labels, recipe.fitness, device, say)
        result = search(space, fitness, costs, recipe.budgets, recipe.search, journal=journal, say=say)
        _finish(_Outcome(result=result), recipe, supernet.to("cpu"), settings, table, output, extract, say)
        return result


def _check_request(output: Path, extract: int, device: str) -> None:
    if extract < 0:
        raise ValueError(f"{extract} models are to be extracted; expected 0 or more")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; name a folder for the search")
    check_device(device)


def _load_supernet(path: Path) -> tuple[SpeechModel, SearchSpace]:
    supernet = load_whole(path)
    if supernet.config.search_space is None:
        raise ValueError(f"{path} is no supernet: it has no search space")
    return supernet, check_supernet(supernet.config)


def _load_teacher(path: Path | None, corpus: Corpus) -> SpeechModel:
    if path is None:
        raise ValueError("a search needs a teacher, or labels for masked prediction")
    teacher = load_model(path)
    give_features(teacher, corpus)
    return teacher


def _as_trained(recipe: SearchRecipe, supernet_path: Path, corpus: Corpus, say: Callable[[str], None]) -> SearchRecipe:
    """Takes loss and held-out utterances from the run that made the supernet, where there is one and the recipe names none."""
    run = next(
        (folder / "run.json" for folder in (supernet_path, supernet_path.parent) if (folder / "run.json").is_file()), None
    )
    described = {} if run is None else read_json(run)
    if run is None or described.get("kind") != "supernet":
        return recipe
    trained, fitness = read_recipe(str(run)), recipe.fitness
    fitness = replace(
        fitness, objective=fitness.objective or trained.objective, prediction=fitness.prediction or trained.prediction
    )
    if described["corpus"]["digest"] != corpus.digest:
        return replace(recipe, fitness=fitness)
    unseen = replace(
        fitness,
        valid_split=fitness.valid_split or trained.data.valid_split,
        train_splits=trained.data.train_splits,
        valid_share=trained.data.valid_share,
        split_seed=trained.training.seed,
    )
    if (count := len(held_out(corpus, unseen))) < 2:
        say(f"the supernet's training held out {count} utterances, which is too few: others, which it learnt from, join them")
        return replace(recipe, fitness=fitness)
    return replace(recipe, fitness=unseen)


def subnet_costs(config: ModelConfig, conditions: Conditions, table: LatencyTable | None) -> Costs:
    """Returns the costs of a supernet's subnets: parameters without heads, MACs per second, and latency with a table."""

    @lru_cache(maxsize=4096)
    def described(subnet: Subnet) -> ModelConfig:
        return subnet_config(config, subnet)

    def macs(subnet: Subnet) -> float:
        if config.frontend is None:  # then a frame is taken as 10 ms, as for latency
            return count_macs(described(subnet), num_frames=round(100 * conditions.seconds)).total / conditions.seconds
        return count_macs(described(subnet), seconds=conditions.seconds).per_second

    functions: dict[str, Callable[[Subnet], float]] = {
        "params": lambda subnet: count_parameters(described(subnet), with_heads=False),
        "macs": macs,
    }
    if table is not None:
        functions["latency_ms"] = lambda subnet: table.predict(described(subnet))
    return Costs(functions)


def _latency(recipe: SearchRecipe, config: ModelConfig, output: Path, say: Callable[[str], None]) -> LatencyTable | None:
    """The folder's table, measured first where there is none; how well its sums agree with whole nets is told."""
    if not recipe.needs_latency:
        return None
    path = output / LATENCY
    if path.is_file():
        table = LatencyTable.load(path)
        table.require(recipe.conditions)
        say(f"latency as measured before: {path}")
    else:
        assert config.search_space is not None
        nets = min(recipe.latency_nets, config.search_space.num_subnets())
        table = measure_latency(
            config,
            recipe.conditions,
            repeats=recipe.latency_repeats,
            least_s=recipe.latency_least_s,
            whole_nets=nets if nets >= 3 else 0,
            say=say,
        )
        table.save(path)
    if (line := table.additivity) is not None:
        say(f"sums of parts against {len(line.measured_ms)} whole nets: {_errors(line.median_error, line.max_error)}")
        if line.corrected_median_error is not None and line.corrected_max_error is not None:
            say(f"corrected by a line: {_errors(line.corrected_median_error, line.corrected_max_error)}")
    return table


def _errors(median: float, largest: float) -> str:
    return f"median error {100 * median:.1f} %, largest {100 * largest:.1f} %"


def _finish(
    outcome: _Outcome,
    recipe: SearchRecipe,
    supernet: SpeechModel,
    settings: dict[str, Any],
    table: LatencyTable | None,
    output: Path,
    extract: int,
    say: Callable[[str], None],
) -> None:
    """Names, measures, extracts and writes."""
    by_cost = sorted(outcome.result.front, key=lambda candidate: candidate.costs[recipe.search.objectives[0]])
    prices = [candidate.costs[recipe.search.objectives[0]] for candidate in by_cost]
    chosen = [by_cost[i] for i in _with_best(spread(prices, extract), by_cost)] if extract else []
    outcome.names = {candidate.subnet: f"front-{number}" for number, candidate in enumerate(chosen, 1)}
    if len(chosen) < extract:
        say(f"the front has {len(by_cost)} subnets: that many models are written, not {extract}")
    if table is not None:
        _measure(outcome, chosen or [by_cost[i] for i in spread(prices, MAX_MEASURED)], recipe, supernet.config)
    if chosen:
        _remove_others(output, set(outcome.names.values()))
    for candidate in chosen:
        name = outcome.names[candidate.subnet]
        save_model(extract_model(supernet, candidate.subnet), output / name)
        say(f"{name}: {candidate.costs['params']:,.0f} parameters, loss {candidate.loss:.5g}: {output / name}")
    rows = [_row(candidate, outcome) for candidate in outcome.result.candidates]
    trust = outcome.result.trust
    values = {
        "format_version": FORMAT_VERSION,
        "sslim": __version__,
        "settings": settings,
        "kendall_tau": trust,
        "additivity": None if table is None else to_plain(table.additivity),
        "machine": None if table is None else table.machine,
        "candidates": rows,
    }
    write_json(output / SEARCH, values)
    _write_table(outcome, output / TABLE, by_cost)
    if importlib.util.find_spec("matplotlib") is None:
        say('no picture: pip install "sslim[report]" brings matplotlib')
    else:
        draw_front(read_points(output), output / PICTURE, x=recipe.search.objectives[0])
    if trust is not None:
        say(f"Kendall's tau between the losses on two halves of the validation data: {trust:.2f}")


def _with_best(places: list[int], front: Sequence[Candidate]) -> list[int]:
    """Puts the subnet of least loss among those chosen, for the nearest of them: who extracts one model wants the best."""
    best = min(range(len(front)), key=lambda place: front[place].loss)
    if best in places:
        return places
    nearest = min(places, key=lambda place: abs(place - best))
    return sorted({*places, best} - {nearest})


def _remove_others(output: Path, names: set[str]) -> None:
    """Removes models that an earlier, shorter search of this folder wrote under names that the front no longer has."""
    for folder in output.glob("front-*"):
        if folder.name not in names and re.fullmatch(r"front-\d+", folder.name) and (folder / DESCRIPTION).is_file():
            shutil.rmtree(folder)


def _measure(outcome: _Outcome, nets: Sequence[Candidate], recipe: SearchRecipe, config: ModelConfig) -> None:
    """Times whole nets of the front, and judges their predictions: a factor common to all is the machine's load by now."""
    configs = {str(i): subnet_config(config, candidate.subnet) for i, candidate in enumerate(nets)}
    times = measure_whole(configs, recipe.conditions, repeats=recipe.latency_repeats, least_s=recipe.latency_least_s)
    outcome.measured_ms = {candidate.subnet: times[str(i)] for i, candidate in enumerate(nets)}
    ratios = [outcome.measured_ms[net.subnet] / net.costs["latency_ms"] for net in nets]
    middle = statistics.median(ratios)
    outcome.slowness = (middle, max(abs(ratio / middle - 1.0) for ratio in ratios))


def _row(candidate: Candidate, outcome: _Outcome) -> dict[str, Any]:
    return {
        "name": outcome.names.get(candidate.subnet),
        "on_front": candidate in outcome.result.front,
        "is_best": candidate == outcome.result.best,
        "subnet": to_plain(candidate.subnet),
        "loss": candidate.loss if candidate.loss < float("inf") else None,
        "costs": candidate.costs,
        "measured_ms": outcome.measured_ms.get(candidate.subnet),
    }


def result_table(rows: Sequence[Candidate], outcome: _Outcome) -> Table:
    """Returns subnets as a table to print."""
    latency = "latency_ms" in rows[0].costs
    table = Table(title="Pareto front and the subnet of least loss", caption=_caption(outcome))
    names = ["", "width", "layers", "heads", "units", "parameters", "GMAC / s", *(["ms", "measured ms"] * latency), "loss"]
    for name in names:
        table.add_column(name, justify="right" if name else "left")
    for candidate in rows:
        subnet, costs = candidate.subnet, candidate.costs
        mark = outcome.names.get(subnet, "") + (" best" if candidate == outcome.result.best else "")
        cells = [mark.strip(), str(subnet.dim), str(subnet.num_layers), _some(subnet.num_heads), _some(subnet.feedforward_dims)]
        cells += [f"{costs['params'] / 1e6:.3f} M", f"{costs['macs'] / 1e9:.3f}"]
        if latency:
            measured = outcome.measured_ms.get(subnet)
            cells += [f"{costs['latency_ms']:.2f}", "-" if measured is None else f"{measured:.2f}"]
        table.add_row(*cells, f"{candidate.loss:.5f}")
    return table


def _caption(outcome: _Outcome) -> str:
    result = outcome.result
    trust = "" if result.trust is None else f"; Kendall's tau between two halves of the validation data {result.trust:.2f}"
    measured = ""
    if outcome.slowness is not None:
        factor, spread_share = outcome.slowness
        measured = "; ms: predicted from parts, measured ms: whole nets at the end, "
        measured += f"{factor:.2f} times the prediction give or take {100 * spread_share:.0f} %"
    return f"{len(result.candidates)} subnets evaluated{trust}{measured}"


def _some(values: Sequence[int]) -> str:
    """All values, or the one that all are."""
    return str(values[0]) if len(set(values)) == 1 else " ".join(map(str, values))


def _write_table(outcome: _Outcome, path: Path, front: Sequence[Candidate]) -> None:
    """Writes the front as it comes, by rising cost; the best subnet is on it but where losses are equal."""
    rows = [*front, *([] if outcome.result.best in front else [outcome.result.best])]
    text = StringIO()
    Console(width=160, file=text, highlight=False).print(result_table(rows, outcome))
    write_text_atomically(path, text.getvalue())
