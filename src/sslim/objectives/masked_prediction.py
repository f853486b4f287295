"""Masked prediction of cluster ids: HuBERT's codewords (Hsu et al. 2021, section II) or MelHuBERT's linear head.

What is fixed (spectral features, masks, weights) is computed in ``prepare``. A convolutional front-end is trained, so it runs
in ``forward``, under autocast and compiled like the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslim.batch import IGNORED_LABEL, Batch, Padded, StepOutput, valid_mask
from sslim.config import OMIT_DEFAULT
from sslim.models import ModelConfig, SpeechModel
from sslim.nn.dropout import dropout
from sslim.nn.heads import ClusterHeadConfig, CodewordHeadConfig
from sslim.objectives.masking import MaskingConfig, span_mask
from sslim.objectives.model_inputs import (
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

HEAD = "masked_prediction"


@dataclass(frozen=True, kw_only=True)
class MaskedPredictionConfig:
    """Settings of masked prediction.

    Attributes:
        masking: Which frames are hidden.
        masked_weight: Weight of the mean cross-entropy over masked frames (``pred_masked_weight``).
        unmasked_weight: Weight of the mean over the other real frames (``pred_nomask_weight``).
        mask_at: Hide frames in the ``features`` or after the ``projection`` (``mask_before_proj``; HuBERT does the latter).
        feature_penalty: Weight of the mean square of a convolutional front-end's output over real frames (fairseq's
            ``loss_weights``, 10 for HuBERT).
        input_dropout: Dropout after the projection, before frames are hidden (``dropout_input``).
    """

    kind: Literal["masked_prediction"] = field(default="masked_prediction", metadata={OMIT_DEFAULT: True})
    masking: MaskingConfig = MaskingConfig()
    masked_weight: float = 1.0
    unmasked_weight: float = 0.0
    mask_at: MaskPlace = "features"
    feature_penalty: float = 0.0
    input_dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PreparedMaskedPrediction:
    """A micro-batch with its mask drawn.

    Attributes:
        inputs: What enters the trained part: features (B, T, F), or samples (B, S) where the front-end is trained.
        labels_BT: Targets, ``IGNORED_LABEL`` where there is none.
        mask_BT: True where hidden.
        weights: Frames that each loss term covers.
    """

    inputs: Padded
    labels_BT: Tensor
    mask_BT: Tensor
    weights: dict[str, Tensor]


def prediction_head(config: ModelConfig, who: str) -> ClusterHeadConfig | CodewordHeadConfig:
    """Returns the description of a model's head over clusters.

    Args:
        config: The model's description.
        who: What a complaint calls the model.

    Raises:
        ValueError: It has none.
    """
    head = config.heads.get(HEAD)
    if head is None:
        raise ValueError(f"the {who} has no head {HEAD!r}; its heads are {sorted(config.heads) or 'none'}")
    if not isinstance(head, ClusterHeadConfig | CodewordHeadConfig):
        raise ValueError(f"the head {HEAD!r} is of kind {head.kind!r}; masked prediction needs 'clusters' or 'codewords'")
    return head


def frame_labels(batch: Batch, num_frames: int, num_clusters: int) -> Tensor:
    """Returns the (B, T) labels of a batch.

    Raises:
        ValueError: It has none, they are of another length than the features, or one of them is no cluster of the head.
    """
    if batch.labels is None:
        raise ValueError("masked prediction needs labels: make some with `sslim cluster` and name them with --labels")
    if batch.labels.shape[1] != num_frames:
        raise ValueError(
            f"labels of {batch.ids[0]} and others have {batch.labels.shape[1]} frames, the features have {num_frames}"
        )
    if int(batch.labels.max()) >= num_clusters:
        raise ValueError(f"label {int(batch.labels.max())} found, but the head has {num_clusters} clusters")
    return batch.labels


def cluster_logits(
    model: SpeechModel, features: Padded, mask_BT: Tensor | None, mask_at: MaskPlace, *, input_dropout: float = 0.0
) -> Tensor:
    """Returns (B, T, K): what the head over clusters makes of a model's final output.

    Args:
        model: The model.
        features: Its front-end's output.
        mask_BT: True on frames to hide; None hides none.
        mask_at: Where.
        input_dropout: Dropout after the projection, before frames are hidden.
    """
    if mask_BT is not None and mask_at == "features":
        features = Padded(values=hide_frames(model, features.values, mask_BT), lengths=features.lengths)
    embedded = model.embed(features)
    values = dropout(embedded.values, input_dropout, training=True)
    if mask_BT is not None and mask_at == "projection":
        values = hide_frames(model, values, mask_BT)
    return model.heads[HEAD](model.encoder(values, embedded.lengths).final)


class MaskedPrediction(nn.Module):
    """Objective: predict the cluster of every hidden frame from what is left.

    Args:
        model: Model with a head ``masked_prediction`` (clusters or codewords), and maybe a head ``mask`` whose vector replaces
            hidden frames; zeros do without.
        config: Settings.

    Raises:
        ValueError: The heads do not fit, or a setting needs a convolutional front-end that the model does not have.
    """

    def __init__(self, model: SpeechModel, config: MaskedPredictionConfig) -> None:
        super().__init__()
        self.model, self.config, self.num_clusters = model, config, prediction_head(model.config, "model").num_clusters
        self.trains_frontend = has_trained_frontend(model)
        check_feature_penalty(config.feature_penalty, model)
        check_mask_place(model.config, config.mask_at)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recomputes block activations in the backward pass instead of keeping them."""
        self.model.transformer.gradient_checkpointing = enabled

    def prepare(self, batch: Batch, generator: torch.Generator) -> PreparedMaskedPrediction:
        """Computes what is fixed of the features and draws the mask.

        Raises:
            ValueError: No labels, labels of another length than the features, a label the head does not have, or stored
                features for a model that reads waveforms.
        """
        inputs = trained_inputs(self.model, batch, trains_frontend=self.trains_frontend)
        num_frames, lengths_B = count_frames(self.model, inputs)
        labels_BT = frame_labels(batch, num_frames, self.num_clusters)
        mask_BT = span_mask(lengths_B.cpu(), num_frames, self.config.masking, generator).to(labels_BT.device)
        real_BT = valid_mask(lengths_B, num_frames) & (labels_BT != IGNORED_LABEL)
        weights = {"masked": (real_BT & mask_BT).sum(), "unmasked": (real_BT & ~mask_BT).sum()}
        if self.config.feature_penalty:
            weights["features"] = lengths_B.sum()
        labels_BT = labels_BT.masked_fill(~real_BT, IGNORED_LABEL)
        return PreparedMaskedPrediction(inputs=inputs, labels_BT=labels_BT, mask_BT=mask_BT, weights=weights)

    def logits(self, features: Padded, mask_BT: Tensor | None) -> Tensor:
        """Returns (B, T, K) for features with the frames of ``mask_BT`` hidden (none when it is None)."""
        probability = self.config.input_dropout if self.training else 0.0
        return cluster_logits(self.model, features, mask_BT, self.config.mask_at, input_dropout=probability)

    def forward(self, prepared: PreparedMaskedPrediction, totals: dict[str, Tensor]) -> StepOutput:
        """Loss over this micro-batch's share of the frames that ``totals`` counts over the whole step.

        All frames go through the head, so shapes are static for ``torch.compile`` and unmasked accuracy costs nothing more.
        """
        features = features_of(self.model, prepared.inputs)
        logits_BTK = self.logits(features, prepared.mask_BT).float()
        loss_BT = F.cross_entropy(logits_BTK.transpose(1, 2), prepared.labels_BT, reduction="none", ignore_index=IGNORED_LABEL)
        real_BT = prepared.labels_BT != IGNORED_LABEL
        parts = {"masked": real_BT & prepared.mask_BT, "unmasked": real_BT & ~prepared.mask_BT}
        coefficients = {"masked": self.config.masked_weight, "unmasked": self.config.unmasked_weight}
        loss = logits_BTK.new_zeros(())
        metrics = {}
        for name, part_BT in parts.items():
            total = (loss_BT * part_BT).sum()
            if coefficients[name]:
                loss = loss + coefficients[name] * total / totals[name]
            metrics[f"{name}_loss"] = (total.detach(), prepared.weights[name])
        if self.config.feature_penalty:
            squares = feature_square(features)
            loss = loss + self.config.feature_penalty * squares / totals["features"]
            metrics["feature_square"] = (squares.detach(), prepared.weights["features"])
        metrics |= self._metrics(logits_BTK.detach(), prepared.labels_BT, parts)
        return StepOutput(loss=loss, metrics=metrics)

    @torch.no_grad()
    def _metrics(self, logits_BTK: Tensor, labels_BT: Tensor, parts: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Accuracies; entropy of single predictions and of their mean (it falls to 0 on collapse); entropy of the targets."""
        correct_BT = logits_BTK.argmax(-1) == labels_BT
        metrics = {f"{name}_accuracy": ((correct_BT & part).sum().float(), part.sum()) for name, part in parts.items()}
        masked_BT = parts["masked"]
        count = masked_BT.sum()
        log_p_BTK = logits_BTK.log_softmax(-1)
        p_BTK = log_p_BTK.exp() * masked_BT[..., None]
        mean_p_K = p_BTK.sum((0, 1)) / count.clamp(min=1)
        usage_K = F.one_hot(labels_BT.clamp(min=0), self.num_clusters).float().mul_(masked_BT[..., None]).sum((0, 1))
        metrics["prediction_entropy"] = (-(p_BTK * log_p_BTK).sum(), count)
        metrics["mean_prediction_entropy"] = (_entropy(mean_p_K) * count, count)
        metrics["target_entropy"] = (_entropy(usage_K / count.clamp(min=1)) * count, count)
        return metrics


def _entropy(p_K: Tensor) -> Tensor:
    return torch.special.entr(p_K).sum()
