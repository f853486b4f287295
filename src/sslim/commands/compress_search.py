"""``sslim compress search``: the best subnets of a supernet within a budget, or the whole Pareto front."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    """Search a supernet for subnets of least loss within budgets; no subnet is trained.

    Repeating the command goes on where it stopped and gives the same result; more --generations go further. Examples:
    `sslim compress search runs/super/model runs/teacher/model corpora/speech --output search --budget params=1M`,
    `sslim compress search supernet teacher corpora/speech --output front --algorithm pareto --front latency_ms --extract 4`,
    `sslim compress search supernet none corpora/speech --labels kmeans100 --output front --algorithm pareto`.
    """

    supernet: tyro.conf.Positional[Path]
    """Run of `sslim compress supernet`, its model folder, another model folder with a search space, or a foreign supernet."""
    teacher: tyro.conf.Positional[Path]
    """Model (or run) whose frames the subnets are compared with; `none` with --labels."""
    corpus: tyro.conf.Positional[Path]
    """Folder that `sslim prepare` wrote; its validation part is used."""
    output: Path
    """Folder of the search: journal, table, picture, models."""
    budget: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=MAX"), tyro.conf.UseAppendAction] = ()
    """params=1M, macs=0.5G (for each second of audio) or latency_ms=20; also a range, params=0.9M..1M; may be repeated."""
    algorithm: Literal["random", "evolution", "pareto"] = "evolution"
    """pareto searches for the whole front of loss against --front."""
    front: tuple[Literal["params", "macs", "latency_ms"], ...] = ()
    """Costs that make up the front beside the loss; those of the budgets when not given, else parameters."""
    population: int = 32
    """Subnets in a generation."""
    generations: int = 10
    """Generations after the first."""
    seed: int = 0
    """Decides everything random."""
    extract: int = 0
    """Write so many models of the front, front-1 (cheapest), front-2, ..., the best among them, as model folders."""
    labels: str | None = None
    """Compare subnets by masked prediction of these labels, not with the teacher."""
    utterances: int = 200
    """Validation utterances at most; they are divided into two halves, to tell how far the ranking can be trusted."""
    crop_seconds: float = 10.0
    """Longer utterances are cut to this, at the same place for every subnet."""
    valid_split: str | None = None
    """Split of the corpus to validate on; when not given, what the supernet's training held out, else dev, valid or a tenth."""
    mask_probability: float | None = None
    """Share of frames hidden from the subnets, in spans of ten, and compared; when not given, as the supernet was trained."""
    target_layers: int | None = None
    """The teacher's last so many layers are what a subnet should give; when not given, as the supernet was trained."""
    latency: bool = False
    """Measure latency although no budget asks for it."""
    seconds: float = 10.0
    """Length of audio that MACs and latency are for."""
    threads: int = 1
    """Threads that latency is measured with."""
    latency_repeats: int | None = None
    """Rounds of every latency measurement, whose median counts; when not given, 10 or as many as 15 seconds allow."""
    device: str = "cpu"
    """Where losses are computed: cpu, cuda, cuda:1."""


def main(options: Options) -> None:
    """Searches and prints the table."""
    from rich.console import Console

    from sslim.compress.budgets import parse_budget
    from sslim.compress.search import SearchConfig
    from sslim.objectives.masking import MaskingConfig
    from sslim.profiling import Conditions
    from sslim.recipes.search import TABLE, SearchRecipe, run_search
    from sslim.recipes.subnet_fitness import FitnessConfig

    console = Console(stderr=True, highlight=False)
    budgets = tuple(parse_budget(text) for text in options.budget)
    hidden = None
    if options.mask_probability is not None:
        hidden = MaskingConfig(probability=options.mask_probability, span_length=10)
    rounds: dict[str, Any] = {}
    if options.latency_repeats is not None:
        rounds = {"latency_repeats": options.latency_repeats, "latency_least_s": 0.0}
    recipe = SearchRecipe(
        search=SearchConfig(
            algorithm=options.algorithm,
            population=options.population,
            generations=options.generations,
            objectives=options.front or tuple(dict.fromkeys(budget.name for budget in budgets)) or ("params",),
            seed=options.seed,
        ),
        budgets=budgets,
        fitness=FitnessConfig(
            num_utterances=options.utterances,
            crop_s=options.crop_seconds,
            valid_split=options.valid_split,
            masking=hidden,
            target_layers=options.target_layers,
            seed=options.seed,
        ),
        conditions=Conditions(seconds=options.seconds, threads=options.threads),
        latency=options.latency,
        **rounds,
    )
    run_search(
        recipe,
        options.supernet,
        None if str(options.teacher) == "none" else options.teacher,
        options.corpus,
        options.output,
        labels_name=options.labels,
        extract=options.extract,
        device=options.device,
        say=lambda text: console.print(text, soft_wrap=True),
    )
    print((options.output / TABLE).read_text(encoding="utf-8"), end="")
    console.print(f"written: {options.output}")
