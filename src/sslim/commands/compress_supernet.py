"""``sslim compress supernet``: trains a supernet, the whole net or its subnets."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from sslim.recipes.supernet import SupernetRecipe


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a supernet with RECIPE from TEACHER on CORPUS. The same command continues an interrupted run.

    Stage 1 trains the whole net, stage 2 a random subnet at every step. Example:
    `sslim compress supernet supernet-mini runs/teacher/model corpora/speech --output runs/super --stage 2`.
    """

    recipe: tyro.conf.Positional[str]
    """Name of a recipe, or a JSON file with one (a run's run.json will do)."""
    teacher: tyro.conf.Positional[Path]
    """Model to learn from; the supernet starts from its tensors where their nets agree."""
    corpus: tyro.conf.Positional[Path]
    """Folder made by `sslim prepare`."""
    output: Path
    """Run folder."""
    stage: Literal[1, 2] = 2
    """1 trains the whole net, 2 its subnets."""
    labels: str | None = None
    """Learn from this label set (made by `sslim cluster`) instead of the teacher's layers."""
    space: str | None = None
    """Search space instead of the recipe's: a name or a JSON file."""
    init_from: Path | None = None
    """Model or run to start from, for stage 2 usually stage 1's."""
    sandwich: int | None = None
    """Train the largest, the smallest and so many random subnets at every step of stage 2."""
    steps: int | None = None
    """Optimiser steps."""
    minutes: float | None = None
    """Stop after this long, at the end of a step."""
    batch_s: float | None = None
    """Seconds of audio in a micro-batch."""
    accumulate: int | None = None
    """Micro-batches of a step on each process."""
    learning_rate: float | None = None
    """Peak learning rate."""
    precision: Literal["fp32", "bf16"] | None = None
    """fp32, or bf16 autocast."""
    compile: bool = False
    """Compile the objective with torch.compile; stage 1 only."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of keeping them."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where to train."""
    threads: int = 0
    """CPU threads for torch; 0 leaves torch's own choice."""
    seed: int | None = None
    """Decides everything random."""
    tensorboard: bool = False
    """Write TensorBoard events too."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Any other setting of the recipe as KEY=VALUE with a dotted key, e.g. objective.masking.span_length=10."""


def _recipe(options: Options) -> SupernetRecipe:
    """The recipe with what the command line changes; the trainer's settings are those of the stage."""
    from sslim.commands.pretrain import changed, changes_of
    from sslim.recipes.supernet import read_recipe, read_space, stage_training

    recipe = read_recipe(options.recipe)
    recipe = replace(recipe, training=stage_training(recipe, options.stage), stage2={})
    if options.space is not None:
        recipe = replace(recipe, space=read_space(options.space))
    changes: dict[str, Any] = changes_of(options)  # type: ignore[arg-type]
    if options.sandwich is not None:
        changes["once_for_all.sandwich"] = options.sandwich
    return changed(recipe, changes)  # type: ignore[arg-type,return-value]


def main(options: Options) -> None:
    """Trains and says where the supernet is."""
    import torch

    from sslim.recipes.supernet import train_supernet

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.sandwich is not None and options.stage == 1:
        raise ValueError("--sandwich belongs to stage 2: the first stage trains the whole net alone")
    result = train_supernet(
        _recipe(options),
        options.teacher,
        options.corpus,
        options.output,
        stage=options.stage,
        labels_name=options.labels,
        init_from=options.init_from,
    )
    if not result.finished:
        print(f"stopped at step {result.step}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(result.exit_code)
    if int(os.environ.get("RANK", "0")) == 0:
        model = options.output / "model"
        print(f"supernet: {model}   next: sslim compress search {model} … or sslim compress extract {model} --subnet min")
