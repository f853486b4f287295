"""Supernets in two stages (LightHuBERT): the whole net first, then a random subnet at every step.

LightHuBERT released no training code: what is known is the loss, its target, two stages of which the second starts from the
first, and one random subnet a step. Everything else in the recipes here (learning rates, steps, batches) is sslim's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sslim import __version__
from sslim.checkpoints import load_model, save_model
from sslim.checkpoints.model_files import model_path
from sslim.config import from_plain, nearest, override, read_json, to_plain
from sslim.data.batching import CorpusBatches
from sslim.data.corpus import Corpus
from sslim.data.labels import LabelStore
from sslim.models import ModelConfig, SpeechModel, build_model, with_head
from sslim.models.elastic import check_supernet, subnet_parameters
from sslim.models.encoding import give_features
from sslim.models.lighthubert import lighthubert
from sslim.models.search_space import LIGHTHUBERT_BASE, LIGHTHUBERT_SMALL, SPACES, SearchSpace
from sslim.models.speech import restore_statistics
from sslim.nn.heads import ClusterHeadConfig, HeadConfig, MaskEmbeddingConfig
from sslim.objectives import MaskedPrediction, MaskedPredictionConfig, MaskingConfig
from sslim.objectives.distillation import Distillation, DistillationConfig, heads_for
from sslim.objectives.once_for_all import OnceForAll, OnceForAllConfig
from sslim.objectives.teacher import TargetConfig
from sslim.recipes.corpus_batches import DataConfig, make_batches, split_utterances
from sslim.recipes.distil_recipes import mini_distillation
from sslim.recipes.pretrain import label_set
from sslim.recipes.small_runs import MINI_DATA, mini_training
from sslim.training import OptimizerConfig, ScheduleConfig, Trainer, TrainerConfig, TrainingResult, join_processes

Stage = Literal[1, 2]
PREDICTION, MASK = "masked_prediction", "mask"
MAY_CHANGE = ("sslim", "corpus.folder", "init_from", "teacher", "recipe.about")


@dataclass(frozen=True, kw_only=True)
class SupernetRecipe:
    """Everything that decides the training of a supernet, apart from its data, teacher and stage.

    Attributes:
        name: Short name.
        about: Paper, hardware, time.
        model: Architecture of the whole net; None for the teacher's.
        space: What its subnets can be.
        objective: What is learnt from the teacher: one head on the final output, since depths differ.
        prediction: What is learnt from labels instead, where a label set is named.
        once_for_all: How the second stage chooses subnets.
        training: Optimiser, schedule, length of the first stage.
        stage2: Top-level settings of ``training`` that differ in the second stage.
        data: Batches.
    """

    name: str
    about: str
    model: ModelConfig | None = None
    space: SearchSpace
    objective: DistillationConfig
    prediction: MaskedPredictionConfig = MaskedPredictionConfig()
    once_for_all: OnceForAllConfig = OnceForAllConfig()
    training: TrainerConfig
    stage2: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = DataConfig()


def load_whole(path: Path) -> SpeechModel:
    """Loads a model, a supernet with all its parts; the folder of a run or of a compression stands for the model it made.

    Raises:
        ValueError: The run is not finished, or nothing readable is there.
    """
    path = model_path(path)
    try:
        return load_model(path, subnet="whole")
    except ValueError:  # no supernet, or not readable at all: then this says so
        return load_model(path)


def initial_supernet(
    recipe: SupernetRecipe, teacher: SpeechModel, heads: dict[str, HeadConfig], init_from: Path | None
) -> tuple[SpeechModel, str]:
    """Returns the supernet to start from, and where its tensors come from.

    These are those of ``init_from`` (the first stage's run, or any other model), else the teacher's where the recipe's net has
    the teacher's description, else new ones. Heads of another description are drawn anew.

    Raises:
        ValueError: The net cannot hold the space.
    """
    generator = torch.Generator().manual_seed(recipe.training.seed)
    wanted = recipe.model or teacher.config
    if init_from is not None:
        model, origin = load_whole(init_from), str(init_from)
    elif _same_net(wanted, teacher.config):
        model, origin = copy.deepcopy(teacher), "teacher"
    else:
        model, origin = build_model(replace(wanted, heads={}), generator), "random"
    model = _with_these_heads(model, heads, generator)
    model.config = replace(model.config, search_space=recipe.space)
    try:
        check_supernet(model.config)
    except ValueError as error:
        raise ValueError(f"this {model.config.family} model cannot be a supernet of that space: {error}") from error
    return model.train(), origin


def _with_these_heads(model: SpeechModel, heads: dict[str, HeadConfig], generator: torch.Generator) -> SpeechModel:
    """Heads of the same description stay, the others are drawn, and those that are not trained go."""
    state = model.state_dict()
    bare = SpeechModel(
        replace(model.config, heads={name: head for name, head in model.config.heads.items() if heads.get(name) == head}),
        model.provenance,
    )
    restore_statistics(bare, state)
    places = bare.state_dict().keys()
    bare.load_state_dict({name: tensor for name, tensor in state.items() if name in places}, strict=True)
    for name, head in heads.items():
        bare = with_head(bare, name, head, generator)
    return bare


def _same_net(wanted: ModelConfig, found: ModelConfig) -> bool:
    """Whether two descriptions have the same tensors; dropout and layer drop do not count."""
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layer_drop": 0.0}
    encoders = [replace(config.encoder, **quiet) for config in (wanted, found)]  # type: ignore[arg-type]
    return encoders[0] == encoders[1] and (wanted.frontend, wanted.projection) == (found.frontend, found.projection)


def stage_training(recipe: SupernetRecipe, stage: Stage) -> TrainerConfig:
    """Returns the trainer's settings of a stage."""
    return recipe.training if stage == 1 else override(recipe.training, recipe.stage2, f"stage2 of recipe {recipe.name}")


def train_supernet(
    recipe: SupernetRecipe,
    teacher_path: Path,
    corpus_folder: Path,
    output: Path,
    *,
    stage: Stage,
    labels_name: str | None = None,
    init_from: Path | None = None,
    say: Callable[[str], None] = print,
) -> TrainingResult:
    """Trains a supernet, or goes on with what ``output`` holds; the supernet is then in ``output/model``.

    Args:
        recipe: What to train.
        teacher_path: What is learnt from, and started from where the nets agree.
        corpus_folder: A prepared corpus.
        output: Run folder.
        stage: 1 trains the whole net, 2 its subnets.
        labels_name: Label set of the corpus to predict, instead of the teacher's layers.
        init_from: Model or run to start from, for stage 2 usually stage 1's.
        say: Where notes for the user go.

    Raises:
        ValueError: Anything about data, models or settings that cannot work.
    """
    training = stage_training(recipe, stage)
    if training.compile and stage == 2:
        raise ValueError("--compile: every step has another subnet, which would be compiled anew; leave it out in stage 2")
    with join_processes(training.device) as processes:
        say = say if processes.is_main else (lambda _: None)
        corpus, teacher = Corpus.open(corpus_folder), load_whole(teacher_path)
        give_features(teacher, corpus)
        labels = None if labels_name is None else corpus.labels(label_set(corpus, labels_name))
        heads = _heads(recipe, teacher, labels)
        model, origin = initial_supernet(recipe, teacher, heads, init_from)
        give_features(model, corpus)
        batches, validation, counts = _plan(recipe, corpus, labels, model, training.seed)
        say(f"{_summary(recipe, model, stage, origin)}; {counts}")
        description = _described(replace(recipe, training=training, stage2={}), corpus, labels) | {
            "stage": stage,
            "teacher": str(teacher_path),
            "init_from": None if init_from is None else str(init_from),
            "num_parameters": model.num_parameters(),
        }
        model.provenance.append({"step": "supernet", "stage": stage, "recipe": recipe.name, "corpus": corpus.name})
        return Trainer(
            _objective(recipe, model, teacher, labels, stage),
            batches,
            training,
            output,
            save_model=lambda folder: save_model(model, folder),
            validation=validation,
            description=description,
            may_change=MAY_CHANGE,
            processes=processes,
        ).run()


def _heads(recipe: SupernetRecipe, teacher: SpeechModel, labels: LabelStore | None) -> dict[str, HeadConfig]:
    net = recipe.model or teacher.config
    width, feature_dim = net.encoder.dim, net.projection.feature_dim
    if labels is None:
        return heads_for(recipe.objective, width, feature_dim, teacher.config.encoder.dim)
    mask = {MASK: MaskEmbeddingConfig(dim=width)} if recipe.prediction.mask_at == "projection" else {}
    return {PREDICTION: ClusterHeadConfig(num_clusters=labels.num_clusters), **mask}


def _objective(
    recipe: SupernetRecipe, model: SpeechModel, teacher: SpeechModel, labels: LabelStore | None, stage: Stage
) -> nn.Module:
    inner: nn.Module
    if labels is not None:
        inner = MaskedPrediction(model, recipe.prediction)
    else:
        inner = Distillation(model, teacher, recipe.objective, bf16=recipe.training.precision == "bf16")
    return inner if stage == 1 else OnceForAll(inner, recipe.once_for_all)


def _plan(
    recipe: SupernetRecipe, corpus: Corpus, labels: LabelStore | None, model: SpeechModel, seed: int
) -> tuple[CorpusBatches, CorpusBatches | None, str]:
    """Returns micro-batches to train on, to validate on where there are utterances for that, and how many there are of both."""
    train, valid = split_utterances(corpus, recipe.data, seed)
    batches = make_batches(corpus, labels, train, model, recipe.data, seed, shuffle=True)
    validation = make_batches(corpus, labels, valid, model, recipe.data, seed, shuffle=False) if len(valid) else None
    return batches, validation, f"{len(train):,} utterances to train on, {len(valid):,} to validate on"


def _summary(recipe: SupernetRecipe, model: SpeechModel, stage: Stage, origin: str) -> str:
    least, most = (subnet_parameters(model.config, name, with_heads=False) for name in ("min", "max"))
    count = recipe.space.num_subnets()
    return f"{recipe.name}, stage {stage}: {count:,} subnets of {least:,} to {most:,} parameters, started from {origin}"


def _described(recipe: SupernetRecipe, corpus: Corpus, labels: LabelStore | None) -> dict[str, Any]:
    return {
        "format_version": 1,
        "kind": "supernet",
        "sslim": __version__,
        "recipe": to_plain(recipe),
        "corpus": {"name": corpus.name, "folder": str(corpus.path), "digest": corpus.digest},
        "labels": labels and {"name": labels.name, "num_clusters": labels.num_clusters, "origin": labels.origin},
    }


MINI_SPACE = SearchSpace(
    dims=(96, 128, 160, 192), num_heads=(1, 2, 3), feedforward_ratios=(2.0, 3.0, 4.0), num_layers=(2, 3, 4)
)


def supernet_mini() -> SupernetRecipe:
    """Subnets of a 4-layer log-Mel model of width 192 (``melhubert-mini``), which the teacher is: minutes on one CPU core."""
    return SupernetRecipe(
        name="supernet-mini",
        about="own; 29,484 subnets of a melhubert-mini, each stage about 20 minutes on one CPU core",
        space=MINI_SPACE,
        objective=mini_distillation(),
        prediction=MaskedPredictionConfig(masking=MaskingConfig(probability=0.7, span_length=5), unmasked_weight=0.5),
        training=mini_training(2_000, lr=5e-4),
        data=MINI_DATA,
    )


def _lighthubert(name: str, space: SearchSpace) -> SupernetRecipe:
    """Known of the original: L1 to the mean of HuBERT Base's last 8 feed-forward outputs, no bias, spans of 10 hidden frames.

    Not known, and therefore sslim's own: learning rates, steps, batches, which frames count, instance norm of the targets.
    """
    return SupernetRecipe(
        name=name,
        about="own settings after LightHuBERT (arXiv 2203.15610), whose training code is unreleased; full size, never run",
        model=lighthubert(space=None),
        space=space,
        objective=DistillationConfig(
            target=TargetConfig(layers=tuple(range(5, 13)), average=True, source="feedforward", instance_norm=True),
            cosine_weight=0.0,
            masking=MaskingConfig(probability=0.65, span_length=10),
            loss_frames="masked",
            head_bias=False,
        ),
        training=TrainerConfig(
            total_steps=400_000,
            precision="bf16",
            optimizer=OptimizerConfig(kind="adamw", lr=5e-4, betas=(0.9, 0.98), weight_decay=0.01),
            schedule=ScheduleConfig(kind="linear", warmup_share=0.03),
        ),
        stage2={
            "total_steps": 200_000,
            "optimizer": {"kind": "adamw", "lr": 2e-4, "betas": [0.9, 0.98], "weight_decay": 0.01},
        },
        data=DataConfig(batch_s=240.0, crop_s=20.0, min_s=2.0),
    )


RECIPES = {
    "supernet-mini": supernet_mini,
    "lighthubert-base": lambda: _lighthubert("lighthubert-base", LIGHTHUBERT_BASE),
    "lighthubert-small": lambda: _lighthubert("lighthubert-small", LIGHTHUBERT_SMALL),
}


def read_recipe(name: str) -> SupernetRecipe:
    """Returns a recipe by its name, or from a JSON file (a run's ``run.json`` will do).

    Raises:
        ValueError: No such recipe, or a file that holds none.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if not name.endswith(".json"):
        known = ", ".join(RECIPES)
        raise ValueError(f"no recipe {name!r}{nearest(name, RECIPES)}; there are {known}, or a JSON file")
    values = read_json(name)
    return from_plain(SupernetRecipe, values.get("recipe", values) if isinstance(values, dict) else values, name)


def read_space(name: str) -> SearchSpace:
    """Returns a search space by its name, or from a JSON file.

    Raises:
        ValueError: No such space, or a file that holds none.
    """
    spaces = {**SPACES, "mini": MINI_SPACE}
    if name in spaces:
        return spaces[name]
    if not name.endswith(".json"):
        raise ValueError(f"no search space {name!r}{nearest(name, spaces)}; there are {', '.join(spaces)}, or a JSON file")
    return from_plain(SearchSpace, read_json(name), name)
