"""The published distillation losses for any pair of student and teacher, and which layers they compare by default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sslim.config import nearest
from sslim.models import ModelConfig
from sslim.objectives import DistillationConfig, LogitDistillationConfig, MaskingConfig, TargetConfig
from sslim.objectives.model_inputs import mask_place

DistilObjective = DistillationConfig | LogitDistillationConfig


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """Layers that a user names.

    Attributes:
        teacher: Teacher layers.
        student: The student's layer for each; None where only the teacher's were named.
    """

    teacher: tuple[int, ...]
    student: tuple[int, ...] | None = None


def read_layers(text: str) -> LayerChoice:
    """Reads ``4,8,12`` (teacher layers) or ``2:4,4:8`` (student layer: teacher layer).

    Raises:
        ValueError: Neither.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        if all(":" in part for part in parts):
            pairs = [tuple(map(int, part.split(":", 1))) for part in parts]
            return LayerChoice(student=tuple(pair[0] for pair in pairs), teacher=tuple(pair[1] for pair in pairs))
        return LayerChoice(teacher=tuple(map(int, parts)))
    except ValueError as error:
        raise ValueError(
            f"--layers is {text!r}; expected teacher layers such as 4,8,12, or student:teacher pairs such as 2:4,4:8"
        ) from error


def thirds(num_layers: int) -> tuple[int, ...]:
    """Returns the layers at a third, two thirds and the end: 4, 8 and 12 of 12."""
    return tuple(sorted({max(1, round(num_layers * part / 3)) for part in (1, 2, 3)}))


def _counterpart(layer: int, teacher_layers: int, student_layers: int) -> int:
    """The student layer at the same relative depth; 0 stays 0 and no other layer becomes 0."""
    return 0 if layer == 0 else max(1, round(layer * student_layers / teacher_layers))


def _pairs(layers: LayerChoice, student: ModelConfig, teacher: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Student and teacher layers; those of the student at the same relative depth unless they are named."""
    depths = teacher.encoder.num_layers, student.encoder.num_layers
    return layers.student or tuple(_counterpart(layer, *depths) for layer in layers.teacher), layers.teacher


def _only_teacher(layers: LayerChoice, loss: str) -> tuple[int, ...]:
    if layers.student is not None:
        raise ValueError(f"{loss} learns with the student's last layer alone: name teacher layers only, not pairs")
    return layers.teacher


def distil_hubert(student: ModelConfig, teacher: ModelConfig, layers: LayerChoice | None = None) -> DistillationConfig:
    """Prediction heads on the last layer for a third, two thirds and all of the teacher; L1 - log sigmoid(cos), means."""
    chosen = layers or LayerChoice(teacher=thirds(teacher.encoder.num_layers))
    return DistillationConfig(target=TargetConfig(layers=_only_teacher(chosen, "the loss 'distil-hubert'")))


def distil_alhubert(student: ModelConfig, teacher: ModelConfig, layers: LayerChoice | None = None) -> DistillationConfig:
    """Every second layer and the last, layer to layer; L2 - log sigmoid(cos), summed over layers.

    A pre-norm student is compared before its norms, where the reference compares what the next layer's norm gives.
    """
    if layers is None:
        depths = teacher.encoder.num_layers, student.encoder.num_layers
        mine = tuple(range(depths[1], 0, -2))[::-1]
        layers = LayerChoice(student=mine, teacher=tuple(max(1, round(layer * depths[0] / depths[1])) for layer in mine))
    student_layers, teacher_layers = _pairs(layers, student, teacher)
    same_width = student.encoder.dim == teacher.encoder.dim
    return DistillationConfig(
        target=TargetConfig(layers=teacher_layers),
        student_layers=student_layers,
        map_groups=() if same_width else tuple((layer,) for layer in dict.fromkeys(student_layers)),
        distance="l2",
        over_targets="sum",
    )


def dp_hubert(student: ModelConfig, teacher: ModelConfig, layers: LayerChoice | None = None) -> DistillationConfig:
    """Projection output and layers at thirds; L1 - cos, means; one linear map for the projection, one that the others share."""
    chosen = layers or LayerChoice(teacher=(0, *thirds(teacher.encoder.num_layers)))
    student_layers, teacher_layers = _pairs(chosen, student, teacher)
    distinct = tuple(dict.fromkeys(student_layers))
    groups = (tuple(layer for layer in distinct if layer == 0), tuple(layer for layer in distinct if layer))
    return DistillationConfig(
        target=TargetConfig(layers=teacher_layers),
        student_layers=student_layers,
        map_groups=tuple(group for group in groups if group),
        cosine="raw",
    )


def data2vec(student: ModelConfig, teacher: ModelConfig, layers: LayerChoice | None = None) -> DistillationConfig:
    """The mean of the last two thirds of the teacher's feed-forward outputs (8 of 12), at hidden frames; L1 alone.

    LightHuBERT's first stage. Whether it normalised the targets and which frames counted is not published; here they are
    normalised over time and hidden frames count. Layers without a feed-forward part (of a pruned teacher) are left out.
    """
    encoder = teacher.transformer
    whole = [layer for layer, block in enumerate(encoder.depth_map, 1) if encoder.blocks[block].feedforward_dim]
    last = tuple(layer for layer in whole if layer > encoder.num_layers - max(1, round(2 * encoder.num_layers / 3)))
    chosen = (last or tuple(whole)) if layers is None else _only_teacher(layers, "the loss 'data2vec'")
    return DistillationConfig(
        target=TargetConfig(layers=chosen, average=True, source="feedforward", instance_norm=True),
        cosine_weight=0.0,
        masking=MaskingConfig(probability=0.65, span_length=10, edges="reference"),
        loss_frames="masked",
        head_bias=False,
    )


def logits(student: ModelConfig, teacher: ModelConfig, layers: LayerChoice | None = None) -> LogitDistillationConfig:
    """The teacher's cluster probabilities alone, at temperature 1, with nothing hidden: MelHuBERT's compression as shipped."""
    if layers is not None:
        raise ValueError("the loss 'logits' learns from the head over clusters and from no layer: leave the layers out")
    return LogitDistillationConfig(mask_at=mask_place(student), teacher_mask_at=mask_place(teacher))


LOSSES: dict[str, Callable[[ModelConfig, ModelConfig, LayerChoice | None], DistilObjective]] = {
    "distil-hubert": distil_hubert,
    "distil-alhubert": distil_alhubert,
    "dp-hubert": dp_hubert,
    "data2vec": data2vec,
    "logits": logits,
}


def loss_for(name: str, student: ModelConfig, teacher: ModelConfig, layers: LayerChoice | None = None) -> DistilObjective:
    """Returns the settings of a published loss.

    Args:
        name: One of ``LOSSES``.
        student: The student's description.
        teacher: The teacher's.
        layers: Other layers than the loss would choose.

    Raises:
        ValueError: No such loss.
    """
    if name not in LOSSES:
        raise ValueError(f"no loss {name!r}{nearest(name, LOSSES)}; there are {', '.join(LOSSES)}")
    return LOSSES[name](student, teacher, layers)


def with_layers(config: DistilObjective, layers: LayerChoice, student: ModelConfig, teacher: ModelConfig) -> DistilObjective:
    """Returns the settings with other layers and all else the same; maps are shared by the same rule as in DPHuBERT."""
    if isinstance(config, LogitDistillationConfig):
        return logits(student, teacher, layers)  # which refuses them
    if config.student_layers is None:
        return replace(config, target=replace(config.target, layers=_only_teacher(layers, "this loss")))
    student_layers, teacher_layers = _pairs(layers, student, teacher)
    groups = dp_hubert(student, teacher, layers).map_groups if config.map_groups else ()
    return replace(
        config,
        target=replace(config.target, layers=teacher_layers),
        student_layers=student_layers,
        map_groups=groups,
    )
