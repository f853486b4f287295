"""Joint distillation and pruning (DPHuBERT): a model whose heads, units and channels have gates learns from a frozen copy of
itself, or from another teacher, until the wanted share of its parameters is gone; then it is cut.

DPHuBERT distils the cut model once more; that is an ordinary distillation (``distil`` with the cut model as student), which
finds the linear maps of the first one among the model's heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sslim.checkpoints import save_model
from sslim.compress.gate_cut import cut_gates
from sslim.compress.gates import GateConfig, Gates, gate_values
from sslim.frontends import ConvFrontendConfig
from sslim.models import ModelConfig, SpeechModel
from sslim.models.speech import with_settings
from sslim.objectives.gated import Gated, GatedConfig
from sslim.recipes.corpus_batches import DataConfig
from sslim.recipes.distil import NamedTeacher, distil
from sslim.recipes.distil_losses import loss_for
from sslim.recipes.distil_recipes import DistilRecipe
from sslim.storage import write_json
from sslim.training import OptimizerConfig, ScheduleConfig, TrainerConfig, TrainingResult

GATES_FILE = "gates.json"
LOSS = "dp-hubert"
TOLERANCE = 0.02  # of the sparsity that is reached, before the user is told how to come closer


@dataclass(frozen=True, kw_only=True)
class GatesRecipe(DistilRecipe):
    """Everything that decides training with gates, apart from its data, teacher and start.

    ``model`` is the model that is to be pruned and ``init`` means nothing: it starts from its own tensors.

    Attributes:
        gates: What is gated.
        lagrangian: How much is to go, and how fast.
        dropout: Whether the student trains with its own dropout (DPHuBERT). Without it the gates are the only noise between
            student and teacher.
    """

    gates: GateConfig = GateConfig()
    lagrangian: GatedConfig = GatedConfig()
    dropout: bool = False


def dphubert_recipe(student: ModelConfig, teacher: ModelConfig) -> GatesRecipe:
    """DPHuBERT's first stage: AdamW 2e-4 and 0.02 for gates, warm-up 15,000 of 50,000 updates, clip 10, 640 s an update.

    Unlike the reference this takes utterances of any length, and a new order in every epoch.
    """
    return GatesRecipe(
        name="dphubert",
        about="arXiv 2305.17651, 960 h, 50,000 updates, 18 A100 hours, HuBERT Base to 23.59 M parameters; not trained here",
        loss=LOSS,
        model=student,
        objective=loss_for(LOSS, student, teacher),
        dropout=True,
        training=TrainerConfig(
            total_steps=50_000,
            accumulate=4,
            max_grad_norm=10.0,
            precision="bf16",
            save_every=5000,
            validate_every=5000,
            optimizer=OptimizerConfig(kind="adamw", lr=2e-4),
            schedule=ScheduleConfig(kind="linear", warmup_steps=15_000),
        ),
        data=DataConfig(batch_s=160.0, crop_s=15.62),
    )


def gates_mini_recipe(student: ModelConfig, teacher: ModelConfig) -> GatesRecipe:
    """Half of a small model's parameters in 2,000 updates, minutes on one CPU core for ``melhubert-mini``."""
    return GatesRecipe(
        name="gates-mini",
        about="own; half of a model of a few million parameters, minutes on one CPU core",
        loss=LOSS,
        model=student,
        objective=loss_for(LOSS, student, teacher),
        lagrangian=GatedConfig(sparsity=0.5, ramp_steps=500),
        training=TrainerConfig(
            total_steps=2_000,
            max_grad_norm=5.0,
            log_every=20,
            validate_every=200,
            save_every=500,
            optimizer=OptimizerConfig(kind="adamw", lr=5e-4, betas=(0.9, 0.98), weight_decay=0.01),
            schedule=ScheduleConfig(kind="linear", warmup_share=0.05),
        ),
        data=DataConfig(batch_s=30.0, crop_s=10.0),
    )


RECIPES: dict[str, Callable[[ModelConfig, ModelConfig], GatesRecipe]] = {
    "dphubert": dphubert_recipe,
    "gates-mini": gates_mini_recipe,
}


def train_gates(
    recipe: GatesRecipe,
    model: NamedTeacher,
    corpus_folder: Path,
    output: Path,
    *,
    teacher: NamedTeacher | None = None,
    cache_teacher: Path | None = None,
    say: Callable[[str], None] = print,
) -> TrainingResult:
    """Trains gates and weights together, or goes on with what ``output`` holds; the cut model is then in ``output/model``.

    ``model/`` of every checkpoint is the model as the gates of the moment cut it, with their values in ``gates.json`` beside
    it; the whole student and its gates are among the objective's tensors.

    Args:
        recipe: How to train, see ``RECIPES``.
        model: What is pruned; it stays as it is.
        corpus_folder: A prepared corpus; labels are not needed.
        output: Run folder, as of ``distil``, with ``gates.json``.
        teacher: Whom it learns from; None for itself, before anything is pruned.
        cache_teacher: Folder for the teacher's outputs, made once and reused.
        say: Where notes for the user go.

    Raises:
        ValueError: More is to go than gates can take, or anything else about data, models or settings that cannot work.
    """
    if recipe.training.compile:
        raise ValueError("compile is asked for, but gates are drawn anew at every step and hooked onto the model: leave it out")
    whole, generator = model.model.config, torch.Generator().manual_seed(recipe.training.seed)
    teacher = teacher or NamedTeacher(model=copy.deepcopy(model.model), name=model.name)
    gates = Gates(whole, recipe.gates, generator)

    def write(student: SpeechModel, folder: Path) -> None:
        small = cut_gates(student, gates)
        save_model(with_settings(small, _as_before(small.config, whole)), folder)
        write_json(folder.parent / GATES_FILE, {"format_version": 1, **gate_values(gates)})
        if folder.parent == output:
            say(_outcome(small.num_parameters(with_heads=False) / gates.num_parameters, recipe.lagrangian.sparsity))

    return distil(
        recipe,
        teacher,
        corpus_folder,
        output,
        student=with_settings(model.model, _for_training(whole, recipe)),
        student_name=model.name,
        cache_teacher=cache_teacher,
        wrap=lambda objective: Gated(objective, gates, recipe.lagrangian),
        write=write,
        say=say,
    )


def _outcome(left: float, sparsity: float) -> str:
    """What became of the target."""
    told = f"{1 - left:.1%} of the parameters are gone, {sparsity:.1%} were asked for"
    return told if abs(1 - left - sparsity) < TOLERANCE else f"{told}: train for more steps, or let the gates learn faster"


def _for_training(config: ModelConfig, recipe: GatesRecipe) -> ModelConfig:
    """The description to train with.

    No layer is ever dropped, since layers are compared one by one. The gradient into gated convolutions is the whole one:
    scaled down, as in pre-training, the loss would defend channels less than the Lagrangian attacks them.
    """
    quiet = {} if recipe.dropout else {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    encoder = replace(config.transformer, layer_drop=0.0, **quiet)  # type: ignore[arg-type]
    frontend = config.frontend
    if isinstance(frontend, ConvFrontendConfig) and recipe.gates.channels is not None:
        frontend = replace(frontend, gradient_scale=1.0)
    return replace(config, encoder=encoder, frontend=frontend)


def _as_before(config: ModelConfig, whole: ModelConfig) -> ModelConfig:
    """Gives a cut model's description the settings back that :func:`_for_training` changed."""
    names = ("dropout", "attention_dropout", "activation_dropout", "layer_drop")
    encoder = replace(config.transformer, **{name: getattr(whole.transformer, name) for name in names})
    frontend = config.frontend
    if isinstance(frontend, ConvFrontendConfig) and isinstance(whole.frontend, ConvFrontendConfig):
        frontend = replace(frontend, gradient_scale=whole.frontend.gradient_scale)
    return replace(config, encoder=encoder, frontend=frontend)
