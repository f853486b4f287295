"""``sslim pretrain``: trains a model, or goes on with a run."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from sslim.recipes.pretrain import PretrainRecipe


@dataclass(frozen=True, kw_only=True)
class Options:
    """Pre-train RECIPE on CORPUS. The same command continues an interrupted run.

    Attributes:
        recipe: Name of a recipe, or a JSON file with one (a run's run.json will do). Not with --model-config.
        corpus: Folder made by `sslim prepare`. With --model-config it may be left out: the runner's CSV files are prepared.
        output: Run folder.
        labels: Label set made by `sslim cluster`; needed when the corpus has several. Not for recipes that learn without
            labels, such as tera-mini.
        model_config: MelHuBERT's model YAML, as it is.
        runner_config: MelHuBERT's runner YAML, as it is.
        init_from: Model to start from: a native folder, a run, or a foreign checkpoint.
        init_optimizer: Take over the optimiser state of the run given to --init-from.
        keep_head: Keep the prediction head of --init-from (its labels, or the features to restore, must be the same).
        iterations: Cluster and train this many times, as the recipe's targets say: MFCC first, then a layer of the model
            before. Runs are OUTPUT/iteration-1 and so on; --labels and --init-from are for the first.
        steps: Optimiser steps.
        minutes: Stop after this long, at the end of a step.
        batch_s: Seconds of audio in a micro-batch.
        accumulate: Micro-batches of a step on each process.
        learning_rate: Peak learning rate.
        precision: fp32, or bf16 autocast.
        compile: Compile the objective with torch.compile.
        gradient_checkpointing: Recompute activations instead of keeping them.
        device: auto, cpu or cuda.
        threads: CPU threads for torch; 0 leaves torch's own choice.
        seed: Decides everything random.
        tensorboard: Write TensorBoard events too.
        set: Any other setting of the recipe as KEY=VALUE with a dotted key, e.g. objective.masking.span_length=10.
    """

    recipe: tyro.conf.Positional[str | None] = None
    corpus: tyro.conf.Positional[Path | None] = None
    output: Annotated[Path, tyro.conf.arg(aliases=["-n"])]
    labels: str | None = None
    model_config: Annotated[Path | None, tyro.conf.arg(aliases=["-g"])] = None
    runner_config: Annotated[Path | None, tyro.conf.arg(aliases=["-c"])] = None
    init_from: Annotated[Path | None, tyro.conf.arg(aliases=["-i"])] = None
    init_optimizer: bool = False
    keep_head: bool = False
    iterations: int | None = None
    steps: int | None = None
    minutes: float | None = None
    batch_s: float | None = None
    accumulate: int | None = None
    learning_rate: float | None = None
    precision: Literal["fp32", "bf16"] | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] | None = None
    threads: int = 0
    seed: int | None = None
    tensorboard: bool = False
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()


# Flag -> dotted key of the recipe; None means the flag was not given.
FLAGS = {
    "steps": "training.total_steps",
    "minutes": "training.max_minutes",
    "batch_s": "data.batch_s",
    "accumulate": "training.accumulate",
    "learning_rate": "training.optimizer.lr",
    "precision": "training.precision",
    "device": "training.device",
    "seed": "training.seed",
}
SWITCHES = ("compile", "gradient_checkpointing", "tensorboard")


def changes_of(options: Options) -> dict[str, Any]:
    """Returns the dotted keys that the command line changes, with their values."""
    changes = {key: getattr(options, flag) for flag, key in FLAGS.items() if getattr(options, flag) is not None}
    changes |= {f"training.{name}": True for name in SWITCHES if getattr(options, name)}
    if options.steps is not None:
        changes["training.epochs"] = None
    for text in options.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text!r} is not of the form KEY=VALUE")
        try:
            changes[key] = json.loads(value)
        except json.JSONDecodeError:
            changes[key] = value
    return changes


def changed(recipe: PretrainRecipe, changes: dict[str, Any]) -> PretrainRecipe:
    """Returns the recipe with dotted keys replaced, checked as strictly as a recipe file."""
    from sslim.config import from_plain, to_plain

    values = to_plain(recipe)
    for dotted, value in changes.items():
        section, *path = [values, *dotted.split(".")]
        for name in path[:-1]:
            if isinstance(section, dict) and section.get(name) is None:
                section[name] = {}  # not set so far; whether there is such a setting shows when all is read
            section = section[name] if isinstance(section, dict) else None
        if not isinstance(section, dict):
            raise ValueError(f"the recipe has no setting {dotted!r}: {'.'.join(path[:-1])} has no parts")
        section[path[-1]] = value
    return from_plain(type(recipe), values, "recipe")


def _recipe(options: Options) -> tuple[PretrainRecipe, tuple[str, ...]]:
    from sslim.config import nearest
    from sslim.recipes.melhubert_yaml import read_melhubert_yaml
    from sslim.recipes.pretrain import read_recipe
    from sslim.recipes.pretrain_recipes import RECIPES

    if (options.model_config is None) != (options.runner_config is None):
        raise ValueError("--model-config and --runner-config belong together: give both")
    if options.model_config is not None and options.runner_config is not None:
        return read_melhubert_yaml(options.model_config, options.runner_config)
    if options.recipe is None:
        raise ValueError(f"no recipe given: name one of {', '.join(RECIPES)}, or a JSON file")
    if options.recipe in RECIPES:
        return RECIPES[options.recipe](), ()
    if options.recipe.endswith(".json"):
        return read_recipe(Path(options.recipe)), ()
    raise ValueError(
        f"no recipe {options.recipe!r}{nearest(options.recipe, RECIPES)}; there are {', '.join(RECIPES)}, or a JSON file"
    )


def _corpus(options: Options, sets: tuple[str, ...]) -> Path:
    """The corpus given, or one prepared beside the run folder from the CSV files that the runner names."""
    given = options.corpus
    if options.model_config is not None and given is None and options.recipe is not None:
        given = Path(options.recipe)  # with the YAML files the only positional argument is the corpus
    if given is not None:
        return given
    from sslim.recipes.melhubert_yaml import corpus_of_sets

    return corpus_of_sets(sets, options.output, print)


def main(options: Options) -> None:
    """Trains and says where the model is."""
    import torch

    from sslim.recipes.iterations import pretrain_iterations
    from sslim.recipes.pretrain import pretrain
    from sslim.recipes.report_example import add_example

    if options.threads:
        torch.set_num_threads(options.threads)
    recipe, sets = _recipe(options)
    recipe = changed(recipe, changes_of(options))
    corpus, output = _corpus(options, sets), options.output
    start: dict[str, Any] = {
        "init_from": options.init_from,
        "init_optimizer": options.init_optimizer,
        "keep_head": options.keep_head,
    }
    if options.iterations is None:
        result = pretrain(recipe, corpus, options.labels, output, **start)
    else:
        if options.steps is not None:  # asked for on the command line, so for every iteration
            recipe = replace(recipe, targets=tuple(replace(targets, steps=None) for targets in recipe.targets))
        result = pretrain_iterations(
            recipe, corpus, output, num_iterations=options.iterations, labels_name=options.labels, start=start
        )
        output = output / f"iteration-{options.iterations}"
    if not result.finished:
        print(f"stopped at step {result.step}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(result.exit_code)
    if int(os.environ.get("RANK", "0")) == 0:
        add_example(output, recipe, corpus)
        print(f"model: {output / 'model'}   next: sslim probe … or sslim report {output}")
