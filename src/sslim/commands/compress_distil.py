"""``sslim compress distil``: trains a small student on the layers or the cluster probabilities of a teacher."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    from sslim.models import ModelConfig, SpeechModel
    from sslim.objectives.teacher_init import TeacherInitConfig
    from sslim.recipes.distil_recipes import DistilRecipe


@dataclass(frozen=True, kw_only=True)
class Options:
    """Distil TEACHER into STUDENT on CORPUS. The same command continues an interrupted run.

    Labels are needed only where --alpha gives them a weight. Examples:
    `sslim compress distil distil-plain-mini runs/teacher corpora/speech --output runs/distilled`,
    `sslim compress distil distil-plain-mini runs/teacher corpora/speech --loss logits --temperature 2 --output runs/small`.

    Attributes:
        student: A recipe (distil-hubert, distil-alhubert-small, distil-plain-mini, …), a JSON file with one, a model
            preset's name, or a model folder or file to start from.
        teacher: Model to learn from: a native folder, a run, or a foreign checkpoint.
        corpus: Folder made by `sslim prepare`.
        output: Run folder.
        loss: distil-hubert (prediction heads), distil-alhubert (layer to layer), dp-hubert (layer to layer through maps),
            data2vec (mean of the last layers at hidden frames) or logits (cluster probabilities, of a teacher that was
            trained to predict clusters). Default: the recipe's, else distil-hubert.
        layers: Teacher layers such as 4,8,12, or pairs of student and teacher layers such as 2:4,4:8. Counted from 1; 0 is the
            input projection.
        init_from_teacher: Teacher layers that the student's blocks start as, in order, such as 1,3 (0 leaves a block random);
            front-end, projection and positions are copied too. `none` starts everything at random.
        temperature: With logits, what both sets of logits are divided by.
        alpha: With logits, weight of the teacher; the labels have the rest. Default: 1, which needs no labels.
        scale_by_temperature: With logits, multiply the teacher's term by the square of the temperature.
        frames: With logits, all (nothing is hidden, all frames count) or masked (teacher and student see the same hidden
            frames, which alone count).
        teacher_sees_all: With logits and --frames masked, hide frames from the student only.
        labels: With logits and --alpha below 1, the label set; needed when the corpus has several.
        cache_teacher: Folder for the teacher's outputs: made once, reused later. The teacher then sees whole utterances.
        steps: Optimiser steps.
        minutes: Stop after this long, at the end of a step.
        batch_s: Seconds of audio in a micro-batch.
        accumulate: Micro-batches of a step on each process.
        learning_rate: Peak learning rate.
        precision: fp32, or bf16 autocast (the teacher too).
        compile: Compile the objective with torch.compile.
        gradient_checkpointing: Recompute activations instead of keeping them.
        device: auto, cpu or cuda.
        threads: CPU threads for torch; 0 leaves torch's own choice.
        seed: Decides everything random.
        tensorboard: Write TensorBoard events too.
        set: Any other setting of the recipe as KEY=VALUE with a dotted key, e.g. objective.cosine_weight=0.5.
    """

    student: tyro.conf.Positional[str]
    teacher: tyro.conf.Positional[Path]
    corpus: tyro.conf.Positional[Path]
    output: Path
    loss: str | None = None
    layers: str | None = None
    init_from_teacher: str | None = None
    temperature: float | None = None
    alpha: float | None = None
    scale_by_temperature: bool = False
    frames: Literal["all", "masked"] | None = None
    teacher_sees_all: bool = False
    labels: str | None = None
    cache_teacher: Path | None = None
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


def _init(text: str) -> TeacherInitConfig | None:
    from sslim.objectives.teacher_init import TeacherInitConfig

    if text == "none":
        return None
    try:
        return TeacherInitConfig(layers=tuple(int(part) for part in text.split(",")))
    except ValueError as error:
        raise ValueError(f"--init-from-teacher is {text!r}; expected teacher layers such as 1,3, or none") from error


def _with_logit_settings(recipe: DistilRecipe, options: Options) -> DistilRecipe:
    """The recipe with the options that belong to the loss ``logits``."""
    from sslim.objectives import LogitDistillationConfig, MaskingConfig

    names = ("temperature", "alpha", "scale_by_temperature", "frames", "teacher_sees_all")
    values = {name: getattr(options, name) for name in names}
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    if not given:
        return recipe
    objective = recipe.objective
    if not isinstance(objective, LogitDistillationConfig):
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} belongs to --loss logits, and the loss is {recipe.loss}")
    frames = given.pop("frames", None)
    if frames is not None:
        given["masking"] = (objective.masking or MaskingConfig()) if frames == "masked" else None
    return replace(recipe, objective=replace(objective, **given))


def _recipe(options: Options, teacher: ModelConfig) -> tuple[DistilRecipe, SpeechModel | None]:
    """The recipe with what the command line changes, and the student to start from if it exists already."""
    from sslim.commands.pretrain import changed, changes_of
    from sslim.recipes.distil import load_teacher
    from sslim.recipes.distil_losses import loss_for, read_layers, with_layers
    from sslim.recipes.distil_recipes import DistilRecipe, named_recipe, recipe_for_model

    layers = None if options.layers is None else read_layers(options.layers)
    student = None
    if Path(options.student).exists() and not options.student.endswith(".json"):
        student = load_teacher(Path(options.student)).model
        found: DistilRecipe | ModelConfig = student.config
    else:
        found = named_recipe(options.student)
    if not isinstance(found, DistilRecipe):
        recipe = recipe_for_model(options.student, found, teacher, options.loss or "distil-hubert", layers)
    elif options.loss is not None:
        recipe = replace(found, loss=options.loss, objective=loss_for(options.loss, found.model, teacher, layers))
    elif layers is not None:
        recipe = replace(found, objective=with_layers(found.objective, layers, found.model, teacher))
    else:
        recipe = found
    recipe = _with_logit_settings(recipe, options)
    if options.init_from_teacher is not None:
        recipe = replace(recipe, init=_init(options.init_from_teacher))
    recipe = changed(recipe, changes_of(options))  # type: ignore[arg-type,assignment]
    if student is not None and recipe.model != replace(student.config, search_space=None):
        raise ValueError(
            f"--set changes the model, but {options.student} is a model that exists: only a recipe's can be changed"
        )
    return recipe, student


def main(options: Options) -> None:
    """Trains and says where the student is."""
    import torch

    from sslim.recipes.distil import distil, load_teacher

    if options.threads:
        torch.set_num_threads(options.threads)
    teacher = load_teacher(options.teacher)
    recipe, student = _recipe(options, teacher.model.config)
    result = distil(
        recipe,
        teacher,
        options.corpus,
        options.output,
        student=student,
        student_name=None if student is None else options.student,
        labels_name=options.labels,
        cache_teacher=options.cache_teacher,
    )
    if not result.finished:
        print(f"stopped at step {result.step}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(result.exit_code)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"student: {options.output / 'model'}   next: sslim probe … or sslim report {options.output}")
