"""Distillation of hidden layers: a small student learns what a frozen teacher makes of the same speech.

One objective covers the losses of

- DistilHuBERT (Chang et al., ICASSP 2022): prediction heads on the student's last layer estimate several teacher layers;
- DistilALHuBERT: student layers are matched to teacher layers, the last one included;
- DPHuBERT (Peng et al., Interspeech 2023): likewise, through linear maps that layers may share;
- data2vec and LightHuBERT's first stage: one head estimates the average of the teacher's last layers at hidden frames.

They differ in settings only; ``LOSSES`` in ``sslim.recipes.distil_losses`` has them. Unlike in the references padding enters no
loss: every mean is over real frames of the step's global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from sslim.batch import Batch, EncoderOutput, Padded, StepOutput, valid_mask
from sslim.config import OMIT_DEFAULT
from sslim.models import SpeechModel
from sslim.nn.heads import HeadConfig, MaskEmbeddingConfig, RegressionHeadConfig, SplitHeadConfig
from sslim.objectives.distances import Distance, Similarity, frame_cosine, frame_distance, similarity_loss, sum_over_frames
from sslim.objectives.frame_alignment import align_frames
from sslim.objectives.masking import MaskingConfig, span_mask
from sslim.objectives.model_inputs import (
    MASK,
    MaskPlace,
    check_feature_penalty,
    check_mask_place,
    count_frames,
    feature_square,
    features_of,
    has_trained_frontend,
    hide_frames,
    trained_inputs,
)
from sslim.objectives.teacher import TargetConfig, Teacher, check_widths

HEAD = "distillation"


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Settings of distillation.

    Attributes:
        target: Teacher layers that are learnt from.
        student_layers: The student's layer for each target, counted from 1; the last one is its final output, 0 the output of
            its input projection. None: the head ``distillation`` on the final output estimates every target.
        map_groups: Student layers that reach the teacher through a linear map, one map for each group, under the head
            ``distillation_K`` of its first layer K. Other layers are compared as they are and must be as wide as the teacher.
        distance: Mean absolute (``l1``) or squared (``l2``) difference.
        distance_weight: Its weight.
        cosine: ``log_sigmoid`` is -log sigmoid(cosine), ``raw`` is -cosine.
        cosine_weight: Its weight; 0 leaves it out.
        over_targets: Mean over targets (DistilHuBERT), or sum (DistilALHuBERT).
        masking: Which frames are hidden from the student; None hides none. The teacher always sees all.
        mask_at: Hide frames in the ``features`` or after the ``projection``.
        loss_frames: Frames that count: ``all``, or only the ``masked`` ones.
        feature_penalty: Weight of the mean square of a convolutional front-end's output over real frames.
        head_bias: Whether regression heads and maps have a bias (LightHuBERT's has none).
    """

    kind: Literal["layers"] = field(default="layers", metadata={OMIT_DEFAULT: True})
    target: TargetConfig
    student_layers: tuple[int, ...] | None = None
    map_groups: tuple[tuple[int, ...], ...] = ()
    distance: Distance = "l1"
    distance_weight: float = 1.0
    cosine: Similarity = "log_sigmoid"
    cosine_weight: float = 1.0
    over_targets: Literal["mean", "sum"] = "mean"
    masking: MaskingConfig | None = None
    mask_at: MaskPlace = "projection"
    loss_frames: Literal["all", "masked"] = "all"
    feature_penalty: float = 0.0
    head_bias: bool = True

    def __post_init__(self) -> None:
        if self.student_layers is not None and len(self.student_layers) != self.target.num_targets:
            raise ValueError(
                f"student_layers names {len(self.student_layers)} layers for {self.target.num_targets} targets; "
                "each target needs one"
            )
        mapped = [layer for group in self.map_groups for layer in group]
        for layer in mapped:
            if layer not in (self.student_layers or ()):
                raise ValueError(f"map_groups names student layer {layer}, which is not among student_layers")
            if mapped.count(layer) > 1:
                raise ValueError(f"map_groups names student layer {layer} twice")
        if self.loss_frames == "masked" and self.masking is None:
            raise ValueError("loss_frames is 'masked', but no masking is set: no frame would count")

    def map_of(self, layer: int) -> str | None:
        """Returns the head that maps a student layer to the teacher's width; None when it is compared as it is."""
        return next((f"{HEAD}_{group[0]}" for group in self.map_groups if layer in group), None)


def heads_for(config: DistillationConfig, student_dim: int, feature_dim: int, teacher_dim: int) -> dict[str, HeadConfig]:
    """Returns the heads that the objective needs on a student, by name.

    Args:
        config: Settings.
        student_dim: The student's width.
        feature_dim: Width of its front-end's features.
        teacher_dim: The teacher's width.
    """
    heads: dict[str, HeadConfig] = {}
    if config.student_layers is None:
        count = config.target.num_targets
        heads[HEAD] = (
            RegressionHeadConfig(output_dim=teacher_dim, bias=config.head_bias)
            if config.target.average
            else SplitHeadConfig(num_tasks=count, hidden_dim=student_dim, output_dim=teacher_dim)
        )
    for group in config.map_groups:
        heads[f"{HEAD}_{group[0]}"] = RegressionHeadConfig(output_dim=teacher_dim, bias=config.head_bias)
    if config.masking is not None:
        heads[MASK] = MaskEmbeddingConfig(dim=student_dim if config.mask_at == "projection" else feature_dim)
    return heads


@torch.no_grad()
def start_maps_as_identity(student: SpeechModel, config: DistillationConfig) -> list[str]:
    """Makes the maps of ``map_groups`` pass layers on unchanged, where widths are equal (DPHuBERT); returns their names."""
    started = []
    for name in [f"{HEAD}_{group[0]}" for group in config.map_groups]:
        linear = cast(nn.Linear, student.heads[name].linear)
        if linear.in_features == linear.out_features:
            nn.init.eye_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
            started.append(name)
    return started


@dataclass(frozen=True, kw_only=True)
class PreparedDistillation:
    """A micro-batch with the teacher's pass done and the mask drawn.

    Attributes:
        inputs: What enters the student's trained part: features (B, T, F), or samples (B, S) where the front-end is trained.
        targets_BTLD: The teacher's targets on the student's frames, float32.
        counted_BT: True on frames that count in the loss.
        mask_BT: True on frames hidden from the student; None when none is.
        weights: Frames that each loss term covers.
    """

    inputs: Padded
    targets_BTLD: Tensor
    counted_BT: Tensor
    mask_BT: Tensor | None
    weights: dict[str, Tensor] = field(default_factory=dict)


class Distillation(nn.Module):
    """Objective: give the teacher's layers.

    The teacher is no submodule: it is moved along with the objective, but is neither trained nor saved nor ever put in training
    mode. The student runs in ``forward`` alone, through :meth:`student_outputs`, which calls :meth:`encode_student`.

    Args:
        student: Model with the heads of :func:`heads_for`.
        teacher: Any other model.
        config: Settings.
        bf16: Run the teacher under bf16 autocast.

    Raises:
        ValueError: A layer or head is missing, widths do not fit, or frame periods cannot be aligned.
    """

    def __init__(self, student: SpeechModel, teacher: SpeechModel, config: DistillationConfig, *, bf16: bool = False) -> None:
        super().__init__()
        self.student, self.config = student, config
        self.teacher = Teacher(teacher, config.target, bf16=bf16)
        self.alignment = align_frames(teacher.frontend, student.frontend)
        self.trains_frontend = has_trained_frontend(student)
        check_feature_penalty(config.feature_penalty, student)
        _check_student(student.config.heads, student.num_layers, student.config.encoder.dim, teacher.config.encoder.dim, config)
        check_widths(student.config, config.student_layers or (), "student")
        if config.masking is not None:
            check_mask_place(student.config, config.mask_at)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.teacher.apply(fn)
        return super()._apply(fn, recurse)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recomputes the student's block activations in the backward pass instead of keeping them."""
        self.student.transformer.gradient_checkpointing = enabled

    def prepare(self, batch: Batch, generator: torch.Generator) -> PreparedDistillation:
        """Runs the teacher (unless the batch brings its outputs), aligns its frames and draws the mask.

        Raises:
            ValueError: Stored features for a model that reads waveforms, or the reverse.
        """
        inputs = trained_inputs(self.student, batch, trains_frontend=self.trains_frontend, who="student")
        num_frames, lengths_B = count_frames(self.student, inputs)
        frames = self.teacher.frames(batch.inputs, batch.lengths) if batch.teacher is None else batch.teacher
        targets, counted_BT = self.alignment(
            Padded(values=frames.values.float(), lengths=frames.lengths), lengths_B, num_frames
        )
        mask_BT = None
        if self.config.masking is not None:
            mask_BT = span_mask(lengths_B.cpu(), num_frames, self.config.masking, generator).to(targets.device)
            if self.config.loss_frames == "masked":
                counted_BT = counted_BT & mask_BT
        weights = {"frames": counted_BT.sum()}
        if self.config.feature_penalty:
            weights["features"] = valid_mask(lengths_B, num_frames).sum()
        return PreparedDistillation(
            inputs=inputs,
            targets_BTLD=targets.unflatten(-1, (self.config.target.num_targets, -1)),
            counted_BT=counted_BT,
            mask_BT=mask_BT,
            weights=weights,
        )

    def student_outputs(self, features: Padded, mask_BT: Tensor | None) -> EncoderOutput:
        """Runs the student on front-end output with the frames of ``mask_BT`` hidden."""
        if mask_BT is not None and self.config.mask_at == "features":
            hidden = hide_frames(self.student, features.values, mask_BT)
            features, mask_BT = Padded(values=hidden, lengths=features.lengths), None
        return self.encode_student(features, mask_BT)

    def encode_student(self, features: Padded, mask_BT: Tensor | None = None) -> EncoderOutput:
        """Projects, hides the frames of ``mask_BT``, and encodes; ``embed`` is the projection's output before hiding."""
        embedded = self.student.embed(features)
        values = embedded.values if mask_BT is None else hide_frames(self.student, embedded.values, mask_BT)
        output = self.student.encoder(values, embedded.lengths, keep_layers=self.config.student_layers is not None)
        return EncoderOutput(final=output.final, layers=output.layers, lengths=embedded.lengths, embed=embedded.values)

    def estimates(self, output: EncoderOutput) -> Tensor:
        """Returns (B, T, L, D): what the student gives for every target."""
        if self.config.student_layers is None:
            estimate = self.student.heads[HEAD](output.final)
            return estimate[:, :, None] if self.config.target.average else estimate.transpose(1, 2)
        return torch.stack([self._estimate(output, layer) for layer in self.config.student_layers], dim=2)

    def _estimate(self, output: EncoderOutput, layer: int) -> Tensor:
        if layer == 0:
            value = cast(Tensor, output.embed)
        else:
            value = output.final if layer == len(output.layers) - 1 else output.layers[layer]
        name = self.config.map_of(layer)
        return value if name is None else self.student.heads[name](value)

    def forward(self, prepared: PreparedDistillation, totals: dict[str, Tensor]) -> StepOutput:
        """Loss over this micro-batch's share of the frames that ``totals`` counts over the whole step."""
        features = features_of(self.student, prepared.inputs)
        estimates_BTLD = self.estimates(self.student_outputs(features, prepared.mask_BT))
        loss, metrics = self.compare(estimates_BTLD, prepared.targets_BTLD, prepared.counted_BT)
        loss = loss / totals["frames"]
        if self.config.feature_penalty:
            squares = feature_square(features)
            loss = loss + self.config.feature_penalty * squares / totals["features"]
            metrics["feature_square"] = (squares.detach(), prepared.weights["features"])
        return StepOutput(loss=loss, metrics=metrics)

    def compare(
        self, estimates_BTLD: Tensor, targets_BTLD: Tensor, counted_BT: Tensor
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Returns the loss summed over the counted frames, and metrics.

        Args:
            estimates_BTLD: The student's.
            targets_BTLD: The teacher's.
            counted_BT: True on frames that count. All True counts padding, as the references do.
        """
        config, count = self.config, counted_BT.sum()
        share = 1.0 / config.target.num_targets if config.over_targets == "mean" else 1.0
        names = ("average",) if config.target.average else tuple(f"layer{layer}" for layer in config.target.layers)
        total = estimates_BTLD.new_zeros((), dtype=torch.float32)
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        distances, cosines = [], []
        for index, name in enumerate(names):
            pair = estimates_BTLD[:, :, index], targets_BTLD[:, :, index]
            distance = sum_over_frames(frame_distance(*pair, config.distance), counted_BT)
            cosine_BT = frame_cosine(*pair)
            total = total + share * config.distance_weight * distance
            if config.cosine_weight:
                similarity = sum_over_frames(similarity_loss(cosine_BT, config.cosine), counted_BT)
                total = total + share * config.cosine_weight * similarity
            distances.append(distance.detach())
            cosines.append(sum_over_frames(cosine_BT.detach(), counted_BT))
            for key, value in ((f"{name}_distance", distances[-1]), (f"{name}_cosine", cosines[-1])):
                seen, frames = metrics.get(key, (0.0, 0))  # several student layers may learn from one of the teacher's
                metrics[key] = (seen + value, frames + count)
        metrics["distance_loss"] = (torch.stack(distances).mean(), count)
        metrics["cosine"] = (torch.stack(cosines).mean(), count)
        return total, metrics


def _check_student(
    heads: dict[str, HeadConfig], num_layers: int, student_dim: int, teacher_dim: int, config: DistillationConfig
) -> None:
    wanted = heads_for(config, student_dim, student_dim, teacher_dim)
    for name, head in wanted.items():
        if name == MASK:
            continue  # hidden frames may be zeros
        found = heads.get(name)
        if found is None:
            raise ValueError(f"the student has no head {name!r}; its heads are {sorted(heads) or 'none'}")
        fields = ("kind", "num_tasks", "output_dim")
        if any(getattr(found, key, None) != getattr(head, key, None) for key in fields):
            raise ValueError(f"the student's head {name!r} is {found}, distillation needs {head}")
    for layer in config.student_layers or ():
        if not 0 <= layer <= num_layers:
            raise ValueError(f"student layer {layer} is asked for, the student has layers 0 to {num_layers}")
        if config.map_of(layer) is None and student_dim != teacher_dim:
            raise ValueError(
                f"student layer {layer} is {student_dim} wide and the teacher {teacher_dim}: name it in map_groups, which puts "
                "a linear map between them"
            )
