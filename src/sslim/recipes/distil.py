"""Distillation: the place where corpus, teacher, student, objective and trainer meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sslim import __version__
from sslim.checkpoints import load_model, save_model
from sslim.checkpoints.model_files import model_path
from sslim.config import to_plain
from sslim.data.batching import CorpusBatches, FrameFacts
from sslim.data.corpus import Corpus
from sslim.data.labels import LabelStore
from sslim.models import ModelConfig, SpeechModel, build_model, with_head
from sslim.models.encoding import give_features, reads_stored_features
from sslim.nn.heads import HeadConfig
from sslim.objectives import (
    Distillation,
    DistillationConfig,
    LogitDistillation,
    LogitDistillationConfig,
    heads_for,
    logit_heads,
    model_digest,
    start_maps_as_identity,
)
from sslim.objectives.frame_alignment import align_frames
from sslim.objectives.masked_prediction import HEAD
from sslim.objectives.teacher_cache import CachedBatches, TeacherCache
from sslim.objectives.teacher_init import init_from_teacher
from sslim.recipes.corpus_batches import frame_facts, make_batches, split_utterances
from sslim.recipes.distil_losses import DistilObjective
from sslim.recipes.distil_recipes import DistilRecipe
from sslim.recipes.pretrain import PRUNING, check_data, give_statistics, label_set, without_statistics
from sslim.training import Processes, Trainer, TrainingResult, join_processes
from sslim.training.distributed import pick_device

MAY_CHANGE = ("sslim", "corpus.folder", "teacher.name", "student", "cache_teacher", "recipe.about", PRUNING)


@dataclass(frozen=True, kw_only=True)
class NamedTeacher:
    """A teacher and what a run calls it.

    Attributes:
        model: The model.
        name: Its path as given.
    """

    model: SpeechModel
    name: str


def load_teacher(path: Path) -> NamedTeacher:
    """Loads a teacher: any model that ``load_model`` reads, or the folder of a run or a compression.

    Raises:
        ValueError: The run is not finished, or the model cannot be read.
    """
    return NamedTeacher(model=load_model(model_path(path)), name=str(path))


def _heads(objective: DistilObjective, student: ModelConfig, teacher: ModelConfig) -> dict[str, HeadConfig]:
    """What the objective needs on a student, by name."""
    if isinstance(objective, LogitDistillationConfig):
        return logit_heads(objective, student, teacher)
    return heads_for(objective, student.encoder.dim, student.projection.feature_dim, teacher.encoder.dim)


def _objective(recipe: DistilRecipe, student: SpeechModel, teacher: SpeechModel) -> Distillation | LogitDistillation:
    bf16 = recipe.training.precision == "bf16"
    if isinstance(recipe.objective, LogitDistillationConfig):
        return LogitDistillation(student, teacher, recipe.objective, bf16=bf16)
    return Distillation(student, teacher, recipe.objective, bf16=bf16)


def initial_student(
    recipe: DistilRecipe,
    teacher: SpeechModel,
    corpus: Corpus,
    student: SpeechModel | None,
    say: Callable[[str], None],
) -> SpeechModel:
    """Builds the recipe's student, or takes one that exists, and gives it the heads that the objective needs.

    Heads that a loaded student has already (of the same description) are kept. Statistics come from the student, the teacher
    (where its front-end is taken over), or the corpus. ``say`` is told what could not be taken over from the teacher.

    Raises:
        ValueError: Something that the recipe asks to be taken over does not fit.
    """
    generator = torch.Generator().manual_seed(recipe.training.seed)
    model = build_model(without_statistics(recipe.model), generator) if student is None else student
    kept = dict(model.config.heads) if student is not None else {}
    heads = _heads(recipe.objective, model.config, teacher.config)
    for name, head in heads.items():
        model = with_head(model, name, head, generator)
    if isinstance(recipe.objective, DistillationConfig) and not any(name in kept for name in heads):
        start_maps_as_identity(model, recipe.objective)
    for note in init_from_teacher(model, teacher, recipe.init) if recipe.init is not None else []:
        say(f"note: from the teacher: {note}")
    give_statistics(model, corpus)
    return model


def shared_facts(corpus: Corpus, student: SpeechModel, teacher: SpeechModel) -> tuple[FrameFacts, FrameFacts, FrameFacts]:
    """Tells what both models read from a corpus: stored features where these are the own ones of both, else waveforms.

    Returns:
        Facts for batching (of the one with the longer frame period, so that crops start on frames of both), and the student's
        and the teacher's own in the same stored units.

    Raises:
        ValueError: The frame periods cannot be aligned, or the corpus does not hold what they read.
    """
    align_frames(teacher.frontend, student.frontend)
    waveforms = not (reads_stored_features(student, corpus) and reads_stored_features(teacher, corpus))
    mine, theirs = (frame_facts(corpus, model, waveforms=waveforms) for model in (student, teacher))
    return (mine if mine.hop >= theirs.hop else theirs), mine, theirs


def _labels(
    recipe: DistilRecipe, corpus: Corpus, name: str | None, student: SpeechModel, say: Callable[[str], None]
) -> LabelStore | None:
    """The labels that have a weight beside the teacher; None where none has.

    Raises:
        ValueError: A label set is named for nothing, there is none, or it does not fit corpus or student.
    """
    objective = recipe.objective
    if not isinstance(objective, LogitDistillationConfig) or not objective.needs_labels:
        if name is not None:
            raise ValueError(
                f"label set {name!r} is named, but {recipe.loss} does not use labels: leave it out, or lower alpha"
            )
        return None
    labels = corpus.labels(label_set(corpus, name))
    clusters = getattr(student.config.heads[HEAD], "num_clusters", None)
    if labels.num_clusters != clusters:
        raise ValueError(
            f"label set {labels.name} has {labels.num_clusters} clusters, teacher and student have heads over {clusters}"
        )
    for note in check_data(corpus, labels, student):
        say(f"note: {note}")
    return labels


def _batches(
    recipe: DistilRecipe,
    corpus: Corpus,
    labels: LabelStore | None,
    utterances: np.ndarray,
    models: tuple[SpeechModel, SpeechModel],
    *,
    shuffle: bool,
) -> CorpusBatches:
    """Plans micro-batches over the utterances in which both models have a frame; labels are at the student's."""
    facts, *own = shared_facts(corpus, *models)
    lengths = (corpus.num_samples if facts.is_waveform else corpus.num_frames)[utterances]
    long_enough = np.array([all(one.num_frames(length) >= 1 for one in own) for length in lengths.tolist()], dtype=bool)
    if not long_enough.any():
        raise ValueError(f"no utterance of corpus {corpus.name} is as long as a frame of teacher and student")
    batches = make_batches(
        corpus,
        None,
        utterances[long_enough],
        models[0],
        recipe.data,
        recipe.training.seed,
        shuffle=shuffle,
        facts=facts,
    )
    if labels is None:
        return batches
    return CorpusBatches(corpus, batches.plan, own[0], labels=labels, utterances=batches.utterances, noise=batches.noise)


def _resolved(
    recipe: DistilRecipe,
    corpus: Corpus,
    teacher: NamedTeacher,
    labels: LabelStore | None,
    model: SpeechModel,
    student: str | None,
    cache: Path | None,
) -> dict[str, Any]:
    told = {} if labels is None else {"labels": {"name": labels.name, "origin": labels.origin, "quality": labels.quality}}
    return {
        "format_version": 1,
        "kind": "distil",
        "sslim": __version__,
        "recipe": to_plain(replace(recipe, model=model.config)),
        "corpus": {
            "name": corpus.name,
            "folder": str(corpus.path),
            "digest": corpus.digest,
            "num_utterances": len(corpus),
            "hours": round(corpus.duration_s() / 3600, 4),
            "num_quarantined": corpus.num_quarantined,
        },
        "teacher": {
            "name": teacher.name,
            "family": teacher.model.config.family,
            "digest": model_digest(teacher.model),
            "num_layers": teacher.model.num_layers,
            "num_parameters": teacher.model.num_parameters(with_heads=False),
        },
        **told,
        "student": student,
        "cache_teacher": None if cache is None else str(cache),
        "num_parameters": model.num_parameters(),
        "num_parameters_without_heads": model.num_parameters(with_heads=False),
    }


def _with_cache(
    batches: dict[str, CorpusBatches],
    objective: Distillation | LogitDistillation,
    corpus: Corpus,
    folder: Path | None,
    recipe: DistilRecipe,
    processes: Processes,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Fills the cache on the main process and reads it on all; without a folder the batches stay as they are.

    Raises:
        ValueError: The teacher sees the mask of every step, or the folder holds something else.
    """
    if folder is None:
        return dict(batches)
    if isinstance(recipe.objective, LogitDistillationConfig) and recipe.objective.teacher_is_masked:
        raise ValueError("the teacher's frames are hidden anew in every step, which no cache can hold: let the teacher see all")
    utterances = np.concatenate([part.utterances for part in batches.values()])
    cache = TeacherCache(folder, objective.teacher, corpus)
    if processes.is_main:
        objective.to(pick_device(recipe.training.device, processes))
        cache.fill(utterances, batch_s=recipe.data.batch_s or 60.0, say=say)
    else:
        cache.wait_for(utterances)
    facts = shared_facts(corpus, objective.student, objective.teacher.model)[2]
    return {name: CachedBatches(part, cache, facts) for name, part in batches.items()}


def _give_teacher_statistics(teacher: SpeechModel, corpus: Corpus, say: Callable[[str], None]) -> None:
    """Gives a teacher that brings no statistics those of the corpus, and says so: it was hardly trained with them."""
    give_features(teacher, corpus)
    before = teacher.config
    give_statistics(teacher, corpus)
    if teacher.config != before:
        say(
            f"note: the teacher brings no mean and standard deviation; those of corpus {corpus.name} are used "
            "(`sslim import --statistics` gives it the ones it was trained with)"
        )


def _origin(recipe: DistilRecipe, description: dict[str, Any], steps: int) -> dict[str, Any]:
    """What the student's provenance tells of this run."""
    return {
        "step": "distil",
        "recipe": recipe.name,
        "loss": recipe.loss,
        "teacher": {key: description["teacher"][key] for key in ("name", "family", "digest")},
        "corpus": description["corpus"]["name"],
        **({"labels": description["labels"]["origin"]} if "labels" in description else {}),
        "seed": recipe.training.seed,
        "steps": steps,
    }


def _saver(
    model: SpeechModel, write: Callable[[SpeechModel, Path], None], origin: Callable[[], dict[str, Any]]
) -> Callable[[Path], None]:
    """Returns what writes the student to a folder, with where it comes from now as the end of its provenance."""
    before = list(model.provenance)

    def save(folder: Path) -> None:
        model.provenance = [*before, origin()]
        write(model, folder)

    return save


def distil(
    recipe: DistilRecipe,
    teacher: NamedTeacher,
    corpus_folder: Path,
    output: Path,
    *,
    student: SpeechModel | None = None,
    student_name: str | None = None,
    labels_name: str | None = None,
    cache_teacher: Path | None = None,
    wrap: Callable[[nn.Module], nn.Module] = lambda objective: objective,
    write: Callable[[SpeechModel, Path], None] = save_model,
    pruning: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> TrainingResult:
    """Trains a student, or goes on with what ``output`` holds; the trained student is then in ``output/model``.

    Args:
        recipe: What to train; its architecture is that of ``student`` where one is given.
        teacher: Whom it learns from.
        corpus_folder: A prepared corpus.
        output: Run folder: ``run.json``, ``metrics.jsonl``, ``checkpoints/``, and at the end ``model/``.
        student: A student that exists, to start from instead of a new one.
        student_name: Where it comes from.
        labels_name: Label set of the corpus, where labels have a weight; None when it has just one.
        cache_teacher: Folder for the teacher's outputs, made once and reused. With several processes the first fills it alone.
        wrap: Makes another objective of the distillation, for example one that keeps pruned weights at zero.
        write: Writes the student to the folder ``model`` of every checkpoint, and at the end of the run.
        pruning: What ``wrap`` prunes, and when, as plain JSON values for ``run.json``; None where it prunes nothing.
        say: Where notes for the user go.

    Raises:
        ValueError: Anything about data, models or settings that cannot work.
    """
    with join_processes(recipe.training.device) as processes:
        say = say if processes.is_main else (lambda _: None)
        corpus = Corpus.open(corpus_folder)
        _give_teacher_statistics(teacher.model, corpus, say)
        model = initial_student(recipe, teacher.model, corpus, student, say)
        objective = _objective(recipe, model.train(), teacher.model)
        labels = _labels(recipe, corpus, labels_name, model, say)
        batches = _plan(recipe, corpus, labels, (model, teacher.model), say)
        description = _resolved(recipe, corpus, teacher, labels, model, student_name, cache_teacher)
        description |= {} if pruning is None else {PRUNING: dict(pruning)}
        sources = _with_cache(batches, objective, corpus, cache_teacher, recipe, processes, say)
        trainer = Trainer(
            wrap(objective),
            sources.pop("train"),
            recipe.training,
            output,
            save_model=_saver(model, write, lambda: _origin(recipe, description, trainer.state.step)),
            validation=sources.pop("valid", None),
            description=description,
            may_change=MAY_CHANGE,
            processes=processes,
        )
        return trainer.run()


def _plan(
    recipe: DistilRecipe,
    corpus: Corpus,
    labels: LabelStore | None,
    models: tuple[SpeechModel, SpeechModel],
    say: Callable[[str], None],
) -> dict[str, CorpusBatches]:
    """Micro-batches to train on, and to validate on where there are utterances for that; says how many for which models."""
    train, valid = split_utterances(corpus, recipe.data, recipe.training.seed)
    batches = {"train": _batches(recipe, corpus, labels, train, models, shuffle=True)}
    if len(valid):
        batches["valid"] = _batches(recipe, corpus, labels, valid, models, shuffle=False)
    counts = ", ".join(f"{len(part.utterances):,} utterances in {name}" for name, part in batches.items())
    sizes = [part.num_parameters(with_heads=False) for part in models]
    say(f"{recipe.name}: {sizes[0]:,} parameters without heads, the teacher {sizes[1]:,}; {counts}")
    return batches
