"""Distillation recipes: the published students of HuBERT, and small ones for a log-Mel teacher on two CPU cores.

The small ones are made for the teacher that ``sslim pretrain melhubert-mini`` gives (4 layers, 192 wide, 20 ms frames). The
same student trained from scratch, for comparison, is that recipe with the student's blocks::

    sslim compress distil distil-plain-mini TEACHER CORPUS --output distilled
    sslim pretrain melhubert-mini CORPUS --labels LABELS --output scratch --set 'model.encoder.blocks=[B,B]' \
        --set 'model.encoder.depth_map=[0,1]'

where B is ``{"num_heads":3,"head_dim":64,"feedforward_dim":768}``; for distil-shared-mini the depth map is ``[0,1,0,1]``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sslim.config import from_plain, nearest, read_json
from sslim.models import PRESETS, ModelConfig
from sslim.models.distilhubert import distilalhubert, distilhubert
from sslim.models.hubert import hubert
from sslim.models.lighthubert import lighthubert
from sslim.models.melhubert import melhubert
from sslim.objectives import DistillationConfig, TargetConfig
from sslim.objectives.masking import MaskingConfig
from sslim.objectives.teacher_init import TeacherInitConfig
from sslim.recipes.corpus_batches import DataConfig
from sslim.recipes.distil_losses import DistilObjective, LayerChoice, distil_alhubert, loss_for
from sslim.recipes.small_runs import MINI_DATA, mini_training
from sslim.training import OptimizerConfig, ScheduleConfig, TrainerConfig


@dataclass(frozen=True, kw_only=True)
class DistilRecipe:
    """Everything that decides a distillation run, apart from its data and teacher.

    Attributes:
        name: Short name.
        about: Paper, hardware, time and expected number.
        loss: The published loss that the objective is, or is made from.
        model: The student's architecture; heads are added as the objective needs them.
        objective: What is learnt.
        init: What the student takes over from the teacher; None starts it at random.
        training: Optimiser, schedule, length.
        data: Batches.
    """

    name: str
    about: str
    loss: str
    model: ModelConfig
    objective: DistilObjective
    init: TeacherInitConfig | None = None
    training: TrainerConfig
    data: DataConfig = DataConfig()


_HUBERT_BASE = hubert()


def _published(batch: int) -> tuple[TrainerConfig, DataConfig]:
    """DistilHuBERT's settings: AdamW 2e-4, warm-up 7 %, linear to 0 at 200,000 updates, clip 5, crops of 15.6 s.

    The reference's own AdamW multiplies the weight decay by the bias-corrected step size and has epsilon elsewhere; torch's is
    used here.
    """
    training = TrainerConfig(
        total_steps=200_000,
        max_grad_norm=5.0,
        save_every=5000,
        validate_every=5000,
        optimizer=OptimizerConfig(kind="adamw", lr=2e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01),
        schedule=ScheduleConfig(kind="linear", warmup_share=0.07),
    )
    return training, DataConfig(batch_s=None, max_utterances=batch, crop_s=15.62)


def distil_hubert_recipe() -> DistilRecipe:
    """DistilHuBERT: 2 layers, heads for layers 4, 8 and 12 of HuBERT Base."""
    student, (training, data) = distilhubert(), _published(24)
    return DistilRecipe(
        name="distil-hubert",
        about="arXiv 2110.01900, 960 h, 200,000 updates of 24 utterances; not trained here",
        loss="distil-hubert",
        model=student,
        objective=loss_for("distil-hubert", student, _HUBERT_BASE),
        init=TeacherInitConfig(layers=(1, 2)),
        training=training,
        data=data,
    )


def _distil_alhubert(size: str, num_layers: int, repeats: int) -> DistilRecipe:
    """DistilALHuBERT: a stack run over and over, matched to layers 2, 4, …, 12 of HuBERT Base."""
    student, (training, data) = distilalhubert(num_layers=num_layers, repeats=repeats), _published(8)
    return DistilRecipe(
        name=f"distil-alhubert-{size}",
        about=f"DistilALHuBERT, {num_layers} layers {repeats} times, 960 h, 200,000 updates of 8 utterances; not trained here",
        loss="distil-alhubert",
        model=student,
        objective=loss_for("distil-alhubert", student, _HUBERT_BASE),
        init=TeacherInitConfig(layers=tuple(range(1, num_layers + 1))),
        training=training,
        data=data,
    )


def light_hubert_recipe() -> DistilRecipe:
    """LightHuBERT's first stage: the whole net learns the mean of HuBERT Base's last 8 feed-forward outputs at hidden frames.

    The authors' learning rate, batch and steps are not published; these are data2vec's, with fewer steps.
    """
    student = replace(lighthubert(None), search_space=None)
    return DistilRecipe(
        name="light-hubert-stage1",
        about="after arXiv 2203.15610 (targets and loss) and data2vec audio base (the rest, fewer steps); not trained here",
        loss="data2vec",
        model=student,
        objective=loss_for("data2vec", student, _HUBERT_BASE),
        training=TrainerConfig(
            total_steps=200_000,
            accumulate=16,
            save_every=5000,
            validate_every=5000,
            optimizer=OptimizerConfig(kind="adam", lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01),
            schedule=ScheduleConfig(kind="linear", warmup_share=0.03),
        ),
        data=DataConfig(batch_s=237.5, crop_s=20.0, min_s=2.0),
    )


HIDDEN = MaskingConfig(probability=0.4, span_length=5)  # from the student alone; better in minutes than nothing hidden (LOG.md)


def mini_distillation() -> DistillationConfig:
    """The mean of the last two of a teacher's 4 layers, normalised over time, while frames are hidden from the student.

    After data2vec and LightHuBERT, but every frame counts.
    """
    return DistillationConfig(
        target=TargetConfig(layers=(3, 4), average=True, source="layer", instance_norm=True),
        cosine_weight=0.0,
        masking=HIDDEN,
        head_bias=False,
    )


def _mini_student(num_layers: int, repeats: int) -> tuple[ModelConfig, ModelConfig]:
    """A student of ``melhubert-mini``, as wide as it, with about a million parameters; and that teacher."""
    teacher = melhubert(
        num_layers=4, dim=192, num_heads=3, feedforward_dim=768, conv_kernel_size=32, conv_groups=8, dropout=0.0
    )
    blocks, depths = teacher.transformer.blocks[:num_layers], tuple(range(num_layers)) * repeats
    return replace(teacher, encoder=replace(teacher.transformer, blocks=blocks, depth_map=depths), heads={}), teacher


def distil_plain_mini() -> DistilRecipe:
    """2 plain layers, started as layers 1 and 3 of the teacher, learn its layers 2 and 4 while frames are hidden from them."""
    student, teacher = _mini_student(num_layers=2, repeats=1)
    layers = distil_alhubert(student, teacher, LayerChoice(student=(1, 2), teacher=(2, 4)))
    return DistilRecipe(
        name="distil-plain-mini",
        about="own; 2 layers of width 192 from a 4-layer teacher, 1 million parameters, minutes on one CPU core",
        loss="distil-alhubert",
        model=student,
        objective=replace(layers, distance="l1", over_targets="mean", masking=HIDDEN),
        init=TeacherInitConfig(layers=(1, 3)),
        training=mini_training(2_000, warmup_share=0.07),
        data=MINI_DATA,
    )


def distil_shared_mini() -> DistilRecipe:
    """2 layers run twice, started as layers 1 and 2 of the teacher, learn the mean of its last layers at their end.

    Held to layers of the teacher half-way, as DistilALHuBERT would, they end below the same net from scratch (LOG.md).
    """
    return DistilRecipe(
        name="distil-shared-mini",
        about="own; 2 layers of width 192 run twice, from a 4-layer teacher, 1 million parameters, minutes on one CPU core",
        loss="data2vec",
        model=_mini_student(num_layers=2, repeats=2)[0],
        objective=mini_distillation(),
        init=TeacherInitConfig(layers=(1, 2)),
        training=mini_training(2_000, warmup_share=0.07),
        data=MINI_DATA,
    )


RECIPES = {
    "distil-hubert": distil_hubert_recipe,
    "distil-alhubert-small": lambda: _distil_alhubert("small", 2, 6),
    "distil-alhubert-middle": lambda: _distil_alhubert("middle", 3, 4),
    "distil-alhubert-large": lambda: _distil_alhubert("large", 4, 3),
    "light-hubert-stage1": light_hubert_recipe,
    "distil-plain-mini": distil_plain_mini,
    "distil-shared-mini": distil_shared_mini,
}


def recipe_for_model(
    name: str, model: ModelConfig, teacher: ModelConfig, loss: str, layers: LayerChoice | None
) -> DistilRecipe:
    """Returns a recipe that trains any student with any of the losses."""
    return DistilRecipe(
        name=name,
        about=f"own; {name} with the loss of {loss}",
        loss=loss,
        model=replace(model, search_space=None),
        objective=loss_for(loss, model, teacher, layers),
        training=TrainerConfig(
            total_steps=25_000,
            max_grad_norm=5.0,
            validate_every=1000,
            optimizer=OptimizerConfig(kind="adamw", lr=2e-4, betas=(0.9, 0.98), weight_decay=0.01),
            schedule=ScheduleConfig(kind="linear", warmup_share=0.07),
        ),
    )


def named_recipe(name: str) -> DistilRecipe | ModelConfig:
    """Returns a recipe by its name or from a JSON file (a run's ``run.json`` will do), or a preset's architecture.

    A preset's heads are left out: a loss adds those it trains, and a student should have no other.

    Raises:
        ValueError: There is none of that name.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if name.endswith(".json"):
        values = read_json(name)
        return from_plain(DistilRecipe, values.get("recipe", values) if isinstance(values, dict) else values, name)
    if name in PRESETS:
        return replace(PRESETS[name](), heads={})
    known = {**RECIPES, **PRESETS}
    raise ValueError(
        f"no student {name!r}{nearest(name, known)}; there are the recipes {', '.join(RECIPES)}, the presets "
        f"{', '.join(PRESETS)}, a JSON file with a recipe, or a model folder"
    )
