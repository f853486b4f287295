"""Masked prediction of cluster ids (HuBERT, Hsu et al. 2021, section II-B; MelHuBERT's plain cross-entropy form)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslim.batch import IGNORED_LABEL, Batch, Padded, StepOutput, valid_mask
from sslim.models import SpeechModel
from sslim.objectives.masking import MaskingConfig, span_mask

HEAD = "masked_prediction"


@dataclass(frozen=True, kw_only=True)
class MaskedPredictionConfig:
    """Settings of masked prediction.

    Attributes:
        masking: Which frames are hidden.
        masked_weight: Weight of the mean cross-entropy over masked frames (``pred_masked_weight``).
        unmasked_weight: Weight of the mean over the other real frames (``pred_nomask_weight``).
        mask_at: Hide frames in the ``features`` or after the ``projection`` (``mask_before_proj``).
    """

    masking: MaskingConfig = MaskingConfig()
    masked_weight: float = 1.0
    unmasked_weight: float = 0.0
    mask_at: Literal["features", "projection"] = "features"


@dataclass(frozen=True, kw_only=True)
class PreparedMaskedPrediction:
    """A micro-batch with its mask drawn.

    Attributes:
        features: Front-end output.
        labels_BT: Targets, ``IGNORED_LABEL`` where there is none.
        mask_BT: True where hidden.
        weights: Frames that each loss term covers.
    """

    features: Padded
    labels_BT: Tensor
    mask_BT: Tensor
    weights: dict[str, Tensor]


class MaskedPrediction(nn.Module):
    """Objective: predict the cluster of every hidden frame from what is left.

    Args:
        model: Model with a cluster head named ``masked_prediction``.
        config: Settings.
    """

    def __init__(self, model: SpeechModel, config: MaskedPredictionConfig) -> None:
        super().__init__()
        if HEAD not in model.config.heads:
            raise ValueError(f"the model has no head {HEAD!r}; its heads are {sorted(model.config.heads) or 'none'}")
        self.model, self.config = model, config
        width = model.config.heads[HEAD].mask_embedding_dim
        expected = model.config.projection.feature_dim if config.mask_at == "features" else model.config.encoder.dim
        if width is not None and width != expected:
            raise ValueError(f"the mask embedding has width {width}, masking at the {config.mask_at} needs {expected}")

    @property
    def num_clusters(self) -> int:
        return self.model.config.heads[HEAD].num_clusters

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recomputes block activations in the backward pass instead of keeping them."""
        self.model.encoder.gradient_checkpointing = enabled

    def features_of(self, batch: Batch) -> Padded:
        """Front-end output of a batch; without gradient unless it holds waveforms."""
        frontend = self.model.frontend
        if batch.is_waveform:
            return frontend(batch.inputs.float(), batch.lengths)  # type: ignore[misc]
        inputs = Padded(values=batch.inputs.float(), lengths=batch.lengths)
        return inputs if frontend is None else frontend.finish(inputs)

    def prepare(self, batch: Batch, generator: torch.Generator) -> PreparedMaskedPrediction:
        """Computes features and draws the mask.

        Raises:
            ValueError: No labels, labels of another length than the features, or a label the head does not have.
        """
        if batch.labels is None:
            raise ValueError("masked prediction needs labels: make some with `sslim cluster` and name them with --labels")
        features = self.features_of(batch)
        num_frames = features.values.shape[1]
        if batch.labels.shape[1] != num_frames:
            raise ValueError(
                f"labels of {batch.ids[0]} and others have {batch.labels.shape[1]} frames, the features have {num_frames}"
            )
        if int(batch.labels.max()) >= self.num_clusters:
            raise ValueError(f"label {int(batch.labels.max())} found, but the head has {self.num_clusters} clusters")
        mask_BT = span_mask(features.lengths.cpu(), num_frames, self.config.masking, generator).to(features.values.device)
        real_BT = valid_mask(features.lengths, num_frames) & (batch.labels != IGNORED_LABEL)
        weights = {"masked": (real_BT & mask_BT).sum(), "unmasked": (real_BT & ~mask_BT).sum()}
        labels_BT = batch.labels.masked_fill(~real_BT, IGNORED_LABEL)
        return PreparedMaskedPrediction(features=features, labels_BT=labels_BT, mask_BT=mask_BT, weights=weights)

    def logits(self, features: Padded, mask_BT: Tensor | None) -> Tensor:
        """Returns (B, T, K) for features with the frames of ``mask_BT`` hidden (none when it is None)."""
        head = self.model.heads[HEAD]
        hidden = 0.0 if head.mask_embedding is None else cast(Tensor, head.mask_embedding)
        at_features = self.config.mask_at == "features"
        if mask_BT is not None and at_features:
            features = Padded(values=_hide(features.values, mask_BT, hidden), lengths=features.lengths)
        embedded = self.model.embed(features)
        values = embedded.values
        if mask_BT is not None and not at_features:
            values = _hide(values, mask_BT, hidden)
        return head(self.model.encoder(values, embedded.lengths).final)

    def forward(self, prepared: PreparedMaskedPrediction, totals: dict[str, Tensor]) -> StepOutput:
        """Loss over this micro-batch's share of the frames that ``totals`` counts over the whole step.

        All frames go through the head, so shapes are static for ``torch.compile`` and unmasked accuracy costs nothing more.
        """
        logits_BTK = self.logits(prepared.features, prepared.mask_BT).float()
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


def _hide(x_BTF: Tensor, mask_BT: Tensor, value: Tensor | float) -> Tensor:
    return torch.where(mask_BT[..., None], torch.as_tensor(value, dtype=x_BTF.dtype, device=x_BTF.device), x_BTF)


def _entropy(p_K: Tensor) -> Tensor:
    return torch.special.entr(p_K).sum()


def uniform_loss(num_clusters: int) -> float:
    """Cross-entropy in nats of a guess that knows nothing."""
    return math.log(num_clusters)
