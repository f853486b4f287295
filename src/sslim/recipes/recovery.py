"""Training after a cut: the smaller model learns again what the whole one knew.

By default it is distilled from the model before compression, layer to layer (L1 and cosine at a third, two thirds and the end
of the depth, as DPHuBERT's second stage), which needs no labels and works for every family. With labels it goes on with masked
prediction, as MelHuBERT's compression does; a model that restores features can go on with that. Weights that were pruned to
zero stay zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from sslim.checkpoints import save_model
from sslim.compress.weights import IterativeWeightPruning, held_zeros
from sslim.data.corpus import Corpus
from sslim.models import ModelConfig, SpeechModel
from sslim.nn.heads import ClusterHeadConfig
from sslim.objectives import DistillationConfig, MaskedPredictionConfig
from sslim.objectives.model_inputs import mask_place
from sslim.objectives.reconstruction import check_reconstruction
from sslim.recipes.calibration import MASKING
from sslim.recipes.calibration import RECONSTRUCTION as RESTORING
from sslim.recipes.corpus_batches import DataConfig
from sslim.recipes.distil import NamedTeacher, distil
from sslim.recipes.distil_losses import LOSSES, LayerChoice, dp_hubert, loss_for, thirds
from sslim.recipes.distil_recipes import DistilRecipe
from sslim.recipes.pretrain import HEAD, PretrainRecipe, pretrain
from sslim.training import OptimizerConfig, ScheduleConfig, TrainerConfig, TrainingResult

LAYERS, PREDICTION, RECONSTRUCTION = "layers", "prediction", "reconstruction"
Wrap = Callable[[nn.Module], nn.Module]  # an objective to another that does something more
Write = Callable[[SpeechModel, Path], None]  # how a model is saved


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """How a cut model is trained again.

    Attributes:
        loss: ``layers``: layer to layer from the model before compression; ``prediction``: masked prediction of labels;
            ``reconstruction``: masked reconstruction by the model's own head (Mockingjay, TERA, AALBERT); or a loss of
            ``sslim compress distil`` (``distil-hubert``, ``distil-alhubert``, ``dp-hubert``, ``data2vec``, ``logits``).
        labels: Label set of the corpus, for ``prediction``.
        steps: Updates.
        minutes: Stop after this much training time.
        learning_rate: Peak; linear warm-up over 5 % of the steps, then linear to zero.
        batch_s: Seconds of audio in a micro-batch.
        crop_s: Longer utterances are cut to this.
        accumulate: Micro-batches of a step.
        precision: ``fp32`` or ``bf16`` autocast.
        device: Where to train.
        seed: Decides everything random.
    """

    loss: str = LAYERS
    labels: str | None = None
    steps: int = 2_000
    minutes: float | None = None
    learning_rate: float = 3e-4
    batch_s: float = 30.0
    crop_s: float = 10.0
    accumulate: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        known = (LAYERS, PREDICTION, RECONSTRUCTION, *LOSSES)
        if self.loss not in known:
            raise ValueError(f"recovery with the loss {self.loss!r} is not known; there are {', '.join(known)}")
        if (self.labels is not None) != (self.loss == PREDICTION):
            raise ValueError(
                f"recovery has the loss {self.loss!r} and labels {self.labels!r}: "
                "labels belong to the loss 'prediction', and it needs them"
            )
        if self.steps < 1:
            raise ValueError(f"recovery has {self.steps} steps; expected at least 1")


def layer_loss(student: ModelConfig, teacher: ModelConfig) -> DistillationConfig:
    """Returns the loss of ``layers``: DPHuBERT's without its target 0, the output of the projection, which no method cuts.

    Where widths agree, as they do after every cut, layers are compared as they are, without linear maps.
    """
    depth = teacher.encoder.num_layers
    loss = dp_hubert(student, teacher, LayerChoice(teacher=thirds(depth)))
    return replace(loss, map_groups=()) if student.encoder.dim == teacher.encoder.dim else loss


def _training(config: RecoveryConfig, schedule: ScheduleConfig | None) -> TrainerConfig:
    return TrainerConfig(
        total_steps=config.steps,
        max_minutes=config.minutes,
        accumulate=config.accumulate,
        max_grad_norm=5.0,
        precision=config.precision,
        device=config.device,
        seed=config.seed,
        log_every=max(1, min(50, config.steps // 20)),
        save_every=500,
        optimizer=OptimizerConfig(kind="adamw", lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
        schedule=schedule or ScheduleConfig(kind="linear", warmup_share=0.05),
    )


def keeping_zeros(model: SpeechModel) -> Wrap:
    """Wraps an objective so that the zeros of a weight-pruned model stay; other models are trained as they are."""
    masks = held_zeros(model)
    return (lambda objective: IterativeWeightPruning(objective, masks=masks)) if masks else (lambda objective: objective)


def recover(
    model: SpeechModel,
    teacher: NamedTeacher,
    corpus_folder: Path,
    output: Path,
    config: RecoveryConfig,
    *,
    wrap: Wrap | None = None,
    write: Write = save_model,
    schedule: ScheduleConfig | None = None,
    pruning: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> TrainingResult:
    """Trains a cut model, or goes on with what ``output`` holds; the result is in ``output/model``.

    Args:
        model: The cut model; it is trained in place.
        teacher: The model before compression, for distillation.
        corpus_folder: A prepared corpus.
        output: Run folder.
        config: Loss, length, data.
        wrap: What is done to the objective; None keeps the zeros of a pruned model.
        write: Writes the model to the folder ``model`` of every checkpoint, and at the end of the run.
        schedule: Learning rate over the steps, where it is not the usual one.
        pruning: What ``wrap`` prunes, and when, as plain JSON values for ``run.json``; None where it prunes nothing.
        say: Where notes for the user go.

    Raises:
        ValueError: Anything about data, models or settings that cannot work.
    """
    data = DataConfig(batch_s=config.batch_s, crop_s=config.crop_s)
    settings: dict[str, Any] = {"name": "recovery", "training": _training(config, schedule), "data": data}
    common: dict[str, Any] = {"wrap": wrap or keeping_zeros(model), "write": write, "pruning": pruning, "say": say}
    if config.loss == PREDICTION:
        head, labels = model.config.heads.get(HEAD), Corpus.open(corpus_folder).labels(str(config.labels))
        keep = getattr(head, "num_clusters", None) == labels.num_clusters
        heads = {HEAD: ClusterHeadConfig(num_clusters=1), **model.config.heads}
        recipe = PretrainRecipe(
            about=f"masked prediction of {config.labels} after compression",
            model=replace(model.config, heads=heads),  # as many clusters as the labels have
            objective=MaskedPredictionConfig(masking=MASKING, mask_at=mask_place(model.config)),
            **settings,
        )
        return pretrain(recipe, corpus_folder, config.labels, output, start=model, keep_head=keep, **common)
    if config.loss == RECONSTRUCTION:
        check_reconstruction(model.config, RESTORING)
        about = "masked reconstruction after compression"
        recipe = PretrainRecipe(about=about, model=model.config, objective=RESTORING, **settings)
        return pretrain(recipe, corpus_folder, None, output, start=model, **common)
    whole = teacher.model.config
    loss = layer_loss(model.config, whole) if config.loss == LAYERS else loss_for(config.loss, model.config, whole)
    distillation = DistilRecipe(
        about=f"{config.loss} from {teacher.name} after compression",
        loss=config.loss,
        model=model.config,
        objective=loss,
        **settings,
    )
    return distil(distillation, teacher, corpus_folder, output, student=model, student_name="cut", **common)
