"""Non-autoregressive predictive coding (NPC): estimate each frame from its neighbourhood, itself and its neighbours left out.

Liu, Chung and Glass (arXiv 2011.00406, equation 1). What is left out is decided by the encoder's convolutions
(``sslim.nn.conv_encoder``), not by altering the input, so that every frame is a target in every step. The loss is the mean
absolute difference over real frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from sslim.batch import Batch, StepOutput
from sslim.models import ModelConfig, SpeechModel
from sslim.nn.conv_encoder import ConvEncoderConfig
from sslim.objectives.feature_prediction import (
    Distance,
    PreparedPrediction,
    check_feature_head,
    estimate,
    prepare_prediction,
    score,
)

HEAD = "npc"


@dataclass(frozen=True, kw_only=True)
class NpcConfig:
    """Settings of non-autoregressive prediction.

    Attributes:
        distance: Absolute (``l1``) or squared (``mse``) difference.
    """

    kind: Literal["npc"] = "npc"
    distance: Distance = "l1"


def check_blind(config: ModelConfig) -> None:
    """Raises ValueError for an encoder whose frames see themselves, which they would only have to copy."""
    if not isinstance(config.encoder, ConvEncoderConfig):
        raise ValueError(
            "non-autoregressive prediction needs a convolutional encoder with masked taps, and the "
            f"{config.encoder.kind} encoder of this {config.family} model sees the frame that it would predict"
        )


class Npc(nn.Module):
    """Objective: predict the features of every frame from frames around it.

    Args:
        model: Model with a convolutional encoder and a head ``npc`` (``regression`` or ``spectrogram``), as wide as its
            features.
        config: Settings.

    Raises:
        ValueError: The encoder sees each frame itself, the front-end is learnt, or the head is missing or of another width.
    """

    def __init__(self, model: SpeechModel, config: NpcConfig) -> None:
        super().__init__()
        check_blind(model.config)
        check_feature_head(model.config, HEAD)
        self.model, self.config = model, config

    def prepare(self, batch: Batch, generator: torch.Generator) -> PreparedPrediction:
        """Computes features, which are the targets too.

        Raises:
            ValueError: The batch does not hold what the model takes.
        """
        return prepare_prediction(self.model, batch, generator, shift=0)

    def forward(self, prepared: PreparedPrediction, totals: dict[str, torch.Tensor]) -> StepOutput:
        """Loss over this micro-batch's share of the frames that ``totals`` counts over the whole step."""
        estimate_BTF, metrics = estimate(self.model, prepared, HEAD)
        return score(estimate_BTF, prepared, totals, self.config.distance, metrics)
