"""Autoregressive predictive coding: estimate the features some frames ahead from those up to now.

Chung, Hsu, Tang and Glass (arXiv 1904.03240, equation 1): the encoder sees the past only, and its output at frame t estimates
frame ``t + shift``, mean absolute difference. Recurrent encoders are what the paper trains; a causal Transformer does as well
(Chung and Glass, arXiv 1910.12607). With quantisers in the encoder it is VQ-APC (arXiv 2005.08392). Only real targets are
scored, unlike in the references, which average over the padded batch.

A front-end that normalises each utterance by its own mean and variance has seen all of it, as S3PRL's has: so much of the
future reaches every frame. It is allowed, so that models of the reference can be trained on; a model that is to run on speech
as it comes needs global statistics. Deltas look ahead by their window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from sslim.batch import Batch, StepOutput
from sslim.models import ModelConfig, SpeechModel
from sslim.objectives.feature_prediction import (
    Distance,
    PreparedPrediction,
    check_feature_head,
    estimate,
    prepare_prediction,
    score,
)

HEAD = "autoregressive"


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig:
    """Settings of autoregressive prediction.

    Attributes:
        shift: Frames ahead, at the model's own frame period (``n_future`` in S3PRL, ``time_shift`` before).
        distance: Absolute (``l1``) or squared (``mse``) difference.
    """

    kind: Literal["autoregressive"] = "autoregressive"
    shift: int = 5
    distance: Distance = "l1"

    def __post_init__(self) -> None:
        if self.shift < 1:
            raise ValueError(f"shift is {self.shift}; expected at least 1 frame ahead")


def check_causal(config: ModelConfig) -> None:
    """Raises ValueError for an encoder whose frames see those after them, which they would only have to copy."""
    if not config.encoder.causal:
        raise ValueError(
            f"autoregressive prediction needs a causal encoder, and the {config.encoder.kind} encoder of this {config.family} "
            "model sees the frames that it would predict: take a recurrent encoder, or a Transformer with causal=True"
        )


class Autoregressive(nn.Module):
    """Objective: predict the features ``shift`` frames ahead.

    Args:
        model: Model with a causal encoder and a head ``autoregressive`` (``regression`` or ``spectrogram``) as wide as its
            features.
        config: Settings.

    Raises:
        ValueError: The encoder is not causal, the front-end is learnt, or the head is missing or of another width.
    """

    def __init__(self, model: SpeechModel, config: AutoregressiveConfig) -> None:
        super().__init__()
        check_causal(model.config)
        check_feature_head(model.config, HEAD)
        self.model, self.config = model, config

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recomputes block activations in the backward pass instead of keeping them.

        Raises:
            ValueError: The encoder is no Transformer.
        """
        kind = self.model.config.encoder.kind
        if enabled and kind != "transformer":
            raise ValueError(f"gradient checkpointing is for Transformers, and this encoder is {kind}: leave it off")
        self.model.transformer.gradient_checkpointing = enabled

    def prepare(self, batch: Batch, generator: torch.Generator) -> PreparedPrediction:
        """Computes features and targets.

        Raises:
            ValueError: The batch does not hold what the model takes.
        """
        return prepare_prediction(self.model, batch, generator, shift=self.config.shift)

    def forward(self, prepared: PreparedPrediction, totals: dict[str, torch.Tensor]) -> StepOutput:
        """Loss over this micro-batch's share of the frames that ``totals`` counts over the whole step."""
        estimate_BTF, metrics = estimate(self.model, prepared, HEAD)
        return score(estimate_BTF, prepared, totals, self.config.distance, metrics)
