"""Distillation of cluster probabilities: a student's head over clusters learns what a frozen teacher's says of the same speech.

MelHuBERT's compression (Lin et al., arXiv 2211.09949; ``distillation/pretrain_expert.py``), after Hinton et al. 2015 (arXiv
1503.02531, section 2): ``(1 - alpha) CE(labels) + alpha KL(softmax(teacher / T) || softmax(student / T))``, each a mean over
frames. Deliberately otherwise than in the reference: the teacher is in eval mode, so that its targets have no dropout; means
are over real frames of the step's global batch; and what has no weight is not computed, so that the divergence alone needs no
labels and the labels alone need no teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslim.batch import IGNORED_LABEL, Batch, Padded, StepOutput, valid_mask, zero_padding
from sslim.models import ModelConfig, SpeechModel
from sslim.nn.heads import ClusterHeadConfig, CodewordHeadConfig, HeadConfig, MaskEmbeddingConfig
from sslim.objectives.distances import sum_over_frames
from sslim.objectives.frame_alignment import align_frames
from sslim.objectives.masked_prediction import HEAD, cluster_logits, frame_labels, prediction_head
from sslim.objectives.masking import MaskingConfig, span_mask
from sslim.objectives.model_inputs import (
    MASK,
    MaskPlace,
    check_mask_place,
    count_frames,
    features_of,
    frontend_output,
    has_trained_frontend,
    trained_inputs,
)


@dataclass(frozen=True, kw_only=True)
class LogitDistillationConfig:
    """Settings of distillation of cluster probabilities.

    Attributes:
        temperature: T, by which both sets of logits are divided (``T``).
        alpha: Weight of the divergence; the cross-entropy with labels has the rest (``alpha``). 1 needs no labels.
        scale_by_temperature: Whether the divergence is multiplied by T squared, so that its gradients do not shrink with T
            (Hinton et al.); the reference does not.
        masking: Which frames are hidden, from teacher and student alike, and count; None hides none and all real frames count
            (``type``).
        mask_at: Hide the student's frames in the ``features`` or after the ``projection``.
        teacher_mask_at: Likewise the teacher's; None for the student's place.
        teacher_sees_all: Whether the teacher sees hidden frames all the same.
    """

    kind: Literal["logits"] = "logits"
    temperature: float = 1.0
    alpha: float = 1.0
    scale_by_temperature: bool = False
    masking: MaskingConfig | None = None
    mask_at: MaskPlace = "features"
    teacher_mask_at: MaskPlace | None = None
    teacher_sees_all: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; expected a number above 0")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha is {self.alpha}; expected a weight from 0 (labels alone) to 1 (the teacher alone)")

    @property
    def needs_labels(self) -> bool:
        """Whether labels have a weight."""
        return self.alpha < 1.0

    @property
    def teacher_is_masked(self) -> bool:
        """Whether the teacher's output depends on the mask, so that it cannot be stored."""
        return self.masking is not None and not self.teacher_sees_all and self.alpha > 0.0


def logit_heads(config: LogitDistillationConfig, student: ModelConfig, teacher: ModelConfig) -> dict[str, HeadConfig]:
    """Returns the heads that the objective needs on a student, by name: one over the teacher's clusters, of the student's own
    kind where it has one, and a mask embedding where frames are hidden and the teacher has one.

    Args:
        config: Settings.
        student: The student's description.
        teacher: The teacher's.

    Raises:
        ValueError: The teacher has no head over clusters.
    """
    theirs, mine = prediction_head(teacher, "teacher"), student.heads.get(HEAD)
    fits = isinstance(mine, ClusterHeadConfig | CodewordHeadConfig) and mine.num_clusters == theirs.num_clusters
    heads: dict[str, HeadConfig] = {HEAD: mine if fits and mine is not None else theirs}
    if config.masking is not None and MASK in teacher.heads:
        width = student.projection.feature_dim if config.mask_at == "features" else student.encoder.input_dim
        heads[MASK] = MaskEmbeddingConfig(dim=width)
    return heads


@dataclass(frozen=True, kw_only=True)
class LogitTarget:
    """What :class:`LogitTeacher` gives, for the description of stored outputs.

    Attributes:
        logits: The head.
    """

    logits: str = HEAD


class LogitTeacher:
    """Runs a frozen model up to its head over clusters. Like ``Teacher`` no ``nn.Module``: no training mode, no saved state.

    Args:
        model: The teacher; put in eval mode, its parameters get no gradient.
        mask_at: Where its frames are hidden, when they are.
        bf16: Run it under bf16 autocast; logits are float32 all the same.

    Raises:
        ValueError: It has no head over clusters.
    """

    def __init__(self, model: SpeechModel, mask_at: MaskPlace = "features", *, bf16: bool = False) -> None:
        self.dim = prediction_head(model.config, "teacher").num_clusters
        self.model, self.config, self.mask_at, self.bf16 = model.eval().requires_grad_(False), LogitTarget(), mask_at, bf16

    @torch.no_grad()
    def frames(self, inputs: Tensor, lengths_B: Tensor, mask: Callable[[int], Tensor] | None = None) -> Padded:
        """Returns logits at the teacher's own frame rate.

        Args:
            inputs: (B, T, F) base features, or (B, S) samples.
            lengths_B: Their valid frames or samples.
            mask: The teacher's padded frames T' to (B, T') bool, True on frames to hide; None hides none.

        Returns:
            (B, T', K) float32; zero beyond each length.
        """
        assert not self.model.training
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            features = frontend_output(self.model, Padded(values=inputs.float(), lengths=lengths_B), "teacher")
            hidden_BT = None if mask is None else mask(features.values.shape[1])
            logits_BTK = cluster_logits(self.model, features, hidden_BT, self.mask_at)
        return Padded(values=zero_padding(logits_BTK.float(), features.lengths), lengths=features.lengths)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Moves the teacher along when the objective that owns it is moved."""
        self.model._apply(function)


@dataclass(frozen=True, kw_only=True)
class PreparedLogitDistillation:
    """A micro-batch with the teacher's pass done and the mask drawn.

    Attributes:
        inputs: What enters the student's trained part: features (B, T, F), or samples (B, S) where the front-end is trained.
        targets_BTK: The teacher's probabilities at temperature T on the student's frames, float32; None where alpha is 0.
        counted_BT: True on frames that count in the divergence.
        labels_BT: ``IGNORED_LABEL`` where none counts; None where alpha is 1.
        mask_BT: True on frames hidden from the student; None when none is.
        weights: Frames that each loss term covers.
    """

    inputs: Padded
    targets_BTK: Tensor | None
    counted_BT: Tensor
    labels_BT: Tensor | None
    mask_BT: Tensor | None
    weights: dict[str, Tensor]


class LogitDistillation(nn.Module):
    """Objective: give the teacher's cluster probabilities, and the labels if they have a weight.

    The teacher is no submodule: it is moved along with the objective, but is neither trained nor saved nor ever put in training
    mode. Where its frame period differs, ``FrameAlignment`` says which of its frames belong to one of the student's; their
    probabilities are averaged, and they are hidden where the student's frame is.

    Args:
        student: Model with a head ``masked_prediction`` over clusters or codewords.
        teacher: Another model with a head over as many.
        config: Settings.
        bf16: Run the teacher under bf16 autocast.

    Raises:
        ValueError: A head is missing or the two are over different numbers of clusters, a mask embedding does not fit, or frame
            periods cannot be aligned.
    """

    def __init__(
        self, student: SpeechModel, teacher: SpeechModel, config: LogitDistillationConfig, *, bf16: bool = False
    ) -> None:
        super().__init__()
        self.num_clusters = prediction_head(student.config, "student").num_clusters
        self.student, self.config = student, config
        self.teacher = LogitTeacher(teacher, config.teacher_mask_at or config.mask_at, bf16=bf16)
        if self.teacher.dim != self.num_clusters:
            raise ValueError(
                f"the student's head is over {self.num_clusters} clusters and the teacher's over {self.teacher.dim}: "
                "probabilities of the same clusters can be compared, no others"
            )
        self.alignment = align_frames(teacher.frontend, student.frontend)
        self.trains_frontend = has_trained_frontend(student)
        if config.masking is not None:
            check_mask_place(student.config, config.mask_at, "student")
        if config.teacher_is_masked:
            check_mask_place(teacher.config, self.teacher.mask_at, "teacher")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.teacher.apply(fn)
        return super()._apply(fn, recurse)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recomputes the student's block activations in the backward pass instead of keeping them."""
        self.student.transformer.gradient_checkpointing = enabled

    def prepare(self, batch: Batch, generator: torch.Generator) -> PreparedLogitDistillation:
        """Draws the mask and runs the teacher, unless the batch brings its logits.

        Raises:
            ValueError: Labels have a weight and there are none, or they do not fit; stored features for a model that reads
                waveforms, or the reverse.
        """
        inputs = trained_inputs(self.student, batch, trains_frontend=self.trains_frontend, who="student")
        num_frames, lengths_B = count_frames(self.student, inputs)
        counted_BT, mask_BT = valid_mask(lengths_B, num_frames), None
        if self.config.masking is not None:
            mask_BT = span_mask(lengths_B.cpu(), num_frames, self.config.masking, generator).to(counted_BT.device)
            counted_BT = counted_BT & mask_BT
        weights: dict[str, Tensor] = {}
        labels_BT = targets_BTK = None
        if self.config.needs_labels:
            labels_BT = frame_labels(batch, num_frames, self.num_clusters).masked_fill(~counted_BT, IGNORED_LABEL)
            weights["labelled"] = (labels_BT != IGNORED_LABEL).sum()
        if self.config.alpha:
            targets_BTK, found_BT = self.alignment(self._probabilities(batch, mask_BT), lengths_B, num_frames)
            counted_BT = counted_BT & found_BT
            weights["frames"] = counted_BT.sum()
        return PreparedLogitDistillation(
            inputs=inputs,
            targets_BTK=targets_BTK,
            counted_BT=counted_BT,
            labels_BT=labels_BT,
            mask_BT=mask_BT,
            weights=weights,
        )

    def _probabilities(self, batch: Batch, mask_BT: Tensor | None) -> Padded:
        """The teacher's, at temperature T and its own frame rate."""
        logits = batch.teacher
        if logits is None:
            mask = None
            if mask_BT is not None and self.config.teacher_is_masked:
                mask = partial(self.alignment.teacher_mask, mask_BT)
            logits = self.teacher.frames(batch.inputs, batch.lengths, mask)
        scaled_BTK = logits.values.float() / self.config.temperature
        return Padded(values=scaled_BTK.softmax(-1), lengths=logits.lengths)

    def forward(self, prepared: PreparedLogitDistillation, totals: dict[str, Tensor]) -> StepOutput:
        """Loss over this micro-batch's share of the frames that ``totals`` counts over the whole step."""
        config, features = self.config, features_of(self.student, prepared.inputs)
        logits_BTK = cluster_logits(self.student, features, prepared.mask_BT, config.mask_at).float()
        guesses_BT, loss = logits_BTK.detach().argmax(-1), logits_BTK.new_zeros(())
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        if prepared.targets_BTK is not None:
            count, counted_BT = prepared.weights["frames"], prepared.counted_BT
            log_q_BTK = (logits_BTK / config.temperature).log_softmax(-1)
            divergence_BT = F.kl_div(log_q_BTK, prepared.targets_BTK, reduction="none").sum(-1)
            total = sum_over_frames(divergence_BT, counted_BT)
            scale = config.temperature**2 if config.scale_by_temperature else 1.0
            loss = loss + config.alpha * scale * total / totals["frames"]
            agreed = (guesses_BT == prepared.targets_BTK.argmax(-1)) & counted_BT
            metrics |= {"divergence": (total.detach(), count), "agreement": (agreed.sum().float(), count)}
        if prepared.labels_BT is not None:
            count, labels_BT = prepared.weights["labelled"], prepared.labels_BT
            total = F.cross_entropy(logits_BTK.transpose(1, 2), labels_BT, reduction="sum", ignore_index=IGNORED_LABEL)
            loss = loss + (1.0 - config.alpha) * total / totals["labelled"]
            correct = (guesses_BT == labels_BT).sum().float()  # no guess equals IGNORED_LABEL
            metrics |= {"label_loss": (total.detach(), count), "label_accuracy": (correct, count)}
        return StepOutput(loss=loss, metrics=metrics)
