"""What autoregressive and non-autoregressive predictive coding share: a head that estimates features from the encoder's output.

The features that enter the model are the target too, at the same frame or a later one. A frame is scored where the target lies
wholly in the utterance: neither padding is scored nor a stack of frames that the utterance does not fill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sslim.batch import Batch, Padded, StepOutput, valid_mask
from sslim.models import ModelConfig, SpeechModel
from sslim.models.stacking import stack_given
from sslim.nn.encoder import Encoder
from sslim.nn.heads import HeadConfig, RegressionHeadConfig, SpectrogramHeadConfig
from sslim.objectives.model_inputs import frontend_output
from sslim.objectives.reconstruction import num_stacked, spectral_frontend

Distance = Literal["l1", "mse"]
TERM = "frames"  # the one term of the loss


@dataclass(frozen=True, kw_only=True)
class PreparedPrediction:
    """A micro-batch with its targets.

    Attributes:
        inputs: What enters the model.
        features_BTF: The same, stacked where the model stacks.
        target_BTF: What is to be estimated at each frame.
        scored_BT: True where the target lies in the utterance.
        noise_seed: Of the quantisers' noise.
        weights: Frames that are scored.
    """

    inputs: Padded
    features_BTF: Tensor
    target_BTF: Tensor
    scored_BT: Tensor
    noise_seed: int
    weights: dict[str, Tensor]


def feature_head(config: ModelConfig, old: HeadConfig | None) -> RegressionHeadConfig | SpectrogramHeadConfig:
    """Returns the description of the head that a model needs: one like ``old``, or a linear map to the (stacked) features.

    Raises:
        ValueError: The front-end is learnt, so that there are no fixed features to predict.
    """
    spectral_frontend(config)
    width = config.projection.stacked_dim
    if isinstance(old, SpectrogramHeadConfig):
        return SpectrogramHeadConfig(
            hidden_dim=old.hidden_dim, output_dim=width, activation=old.activation, layer_norm_eps=old.layer_norm_eps
        )
    return RegressionHeadConfig(output_dim=width, bias=not isinstance(old, RegressionHeadConfig) or old.bias)


def check_feature_head(config: ModelConfig, name: str) -> None:
    """Raises ValueError unless the model has a head ``name`` that gives as many features as enter it, which are fixed."""
    wanted, head = feature_head(config, config.heads.get(name)), config.heads.get(name)
    if head != wanted:
        found = (
            "no such head" if head is None else f"one of kind {head.kind!r} for {getattr(head, 'output_dim', 'no')} features"
        )
        raise ValueError(
            f"the model needs a head {name!r} of kind 'regression' or 'spectrogram' for {wanted.output_dim} features, it has "
            f"{found}"
        )


def whole_frames(model: SpeechModel, batch: Batch) -> tuple[Padded, Tensor, Tensor]:
    """Returns what enters a model, its features (B, T, F) stacked, and (B,) how many frames lie wholly in the utterance.

    Raises:
        ValueError: The batch holds waveforms and the model takes features.
    """
    given, frontend = Padded(values=batch.inputs.float(), lengths=batch.lengths), model.frontend
    stack = num_stacked(model.config)
    if frontend is None:
        inputs = Padded(values=frontend_output(model, given).values, lengths=given.lengths // stack * stack)
        features = stack_given(inputs, stack)
        return inputs, features.values, features.lengths
    base = frontend.base_features(given.values, given.lengths) if batch.is_waveform else given
    features = frontend.finish(base)
    return features, features.values, torch.minimum(base.lengths // stack, features.lengths)


@torch.no_grad()
def prepare_prediction(model: SpeechModel, batch: Batch, generator: torch.Generator, *, shift: int) -> PreparedPrediction:
    """Computes features, and as the target of frame t those of frame ``t + shift``; draws the seed of the noise.

    Raises:
        ValueError: The batch does not hold what the model takes.
    """
    inputs, features_BTF, whole_B = whole_frames(model, batch)
    scored_BT = valid_mask(whole_B - shift, features_BTF.shape[1])
    target_BTF = torch.roll(features_BTF, -shift, dims=1) if shift else features_BTF  # what comes round is not scored
    seed = int(torch.randint(2**62, (), generator=generator))
    return PreparedPrediction(
        inputs=inputs,
        features_BTF=features_BTF,
        target_BTF=target_BTF,
        scored_BT=scored_BT,
        noise_seed=seed,
        weights={TERM: scored_BT.sum()},
    )


def estimate(model: SpeechModel, prepared: PreparedPrediction, head: str) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Runs a model.

    Args:
        model: The model.
        prepared: The micro-batch.
        head: Name of the head.

    Returns:
        (B, T, F) estimates, and for a quantised model a metric: the entropy in nats of its codes, each group's in turn.
    """
    embedded, encoder = model.embed(prepared.inputs), model.encoder
    if isinstance(encoder, Encoder):
        return model.heads[head](encoder(embedded.values, embedded.lengths).final), {}
    noise = torch.Generator(embedded.values.device).manual_seed(prepared.noise_seed)
    quantizer = encoder.final_quantizer
    output = encoder(embedded.values, embedded.lengths, keep_layers=quantizer is not None, generator=noise)
    metrics: dict[str, tuple[Tensor, Tensor]] = {}
    if quantizer is not None:
        with torch.no_grad():
            entropy, count = quantizer.code_entropy(output.layers[-1], embedded.lengths), prepared.weights[TERM]
            metrics["code_entropy"] = (entropy * count, count)
    return model.heads[head](output.final), metrics


def score(
    estimate_BTF: Tensor,
    prepared: PreparedPrediction,
    totals: dict[str, Tensor],
    distance: Distance,
    metrics: dict[str, tuple[Tensor, Tensor]],
) -> StepOutput:
    """Returns the loss over this micro-batch's share of the frames that ``totals`` counts, and metrics of guesses beside it.

    ``mean_frame_loss`` is that of each utterance's mean frame; ``same_frame_loss``, for targets ahead, that of the frame that
    the model is given.
    """
    count, scored_BT = prepared.weights[TERM], prepared.scored_BT

    def total(guess_BTF: Tensor) -> Tensor:
        difference_BTF = guess_BTF.float() - prepared.target_BTF
        error_BT = (difference_BTF.abs() if distance == "l1" else difference_BTF.square()).mean(-1)
        return error_BT.where(scored_BT, 0.0).sum()

    loss = total(estimate_BTF)
    with torch.no_grad():
        real_BT1 = scored_BT[..., None]
        mean_B1F = prepared.target_BTF.where(real_BT1, 0.0).sum(1, keepdim=True) / real_BT1.sum(1, keepdim=True).clamp(min=1)
        metrics = metrics | {
            "predicted_loss": (loss.detach(), count),
            "mean_frame_loss": (total(mean_B1F.expand_as(prepared.target_BTF)), count),
        }
        if prepared.target_BTF is not prepared.features_BTF:
            metrics["same_frame_loss"] = (total(prepared.features_BTF), count)
    return StepOutput(loss=loss / totals[TERM], metrics=metrics)
