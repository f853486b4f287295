"""Masked reconstruction: restore the features of which something was altered (Mockingjay, TERA, AALBERT in S3PRL).

The model sees altered features (``sslim.objectives.alteration``) and its head ``reconstruction`` estimates the whole ones, or
other features of the same frames, such as the linear spectrum. Only what was altered is scored: every channel of the frames
that spans cover, and the zeroed channels of all others; everything where nothing is hidden. As in the reference, which takes
the mean over the selected elements of a batch, the loss is the mean over those of the whole step. Neither padding is scored nor
a stack of frames that the utterance does not fill.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from sslim.batch import Batch, Padded, StepOutput, valid_mask
from sslim.frontends import SpectralFrontend, SpectralFrontendConfig, build_frontend
from sslim.models import ModelConfig, SpeechModel
from sslim.models.stacking import stack_given
from sslim.nn.heads import HeadConfig, SpectrogramHeadConfig
from sslim.objectives.alteration import AlterationConfig, altered_features, draw_alteration
from sslim.objectives.model_inputs import frontend_output

HEAD = "reconstruction"


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Settings of masked reconstruction.

    Attributes:
        alteration: What is altered.
        distance: Absolute (``l1``) or squared (``mse``) difference (``task.loss``).
        target: Features to restore instead of the model's own (``target`` in S3PRL's ``online`` and ``audio`` sections): not
            stacked, framed as the model's are, normalised for each utterance or not at all. Where their base features are not
            the model's, both are computed from waveforms.
    """

    kind: Literal["reconstruction"] = "reconstruction"
    alteration: AlterationConfig = AlterationConfig()
    distance: Literal["l1", "mse"] = "l1"
    target: SpectralFrontendConfig | None = None


@dataclass(frozen=True, kw_only=True)
class PreparedReconstruction:
    """A micro-batch, altered.

    Attributes:
        inputs: What enters the model: altered features.
        target_BTO: Features to restore.
        lengths_B: Frames that are scored.
        time_BT: True on frames all of whose channels are.
        channels_BO: True on channels that are in the other frames too.
        weights: Elements that are scored.
    """

    inputs: Padded
    target_BTO: Tensor
    lengths_B: Tensor
    time_BT: Tensor
    channels_BO: Tensor
    weights: dict[str, Tensor]


def spectral_frontend(config: ModelConfig) -> SpectralFrontendConfig | None:
    """Returns the front-end of a model that can restore its features; None where these come from outside.

    Raises:
        ValueError: The front-end is learnt.
    """
    if config.frontend is None or isinstance(config.frontend, SpectralFrontendConfig):
        return config.frontend
    raise ValueError(f"the front-end of this {config.family} model is learnt: it has no fixed features that could be restored")


def num_stacked(config: ModelConfig) -> int:
    """Returns how many frames a model concatenates into one."""
    return config.projection.stack if config.frontend is None else getattr(config.frontend, "stack", 1)


def restored_dim(config: ModelConfig, target: SpectralFrontendConfig | None) -> int:
    """Returns how many features a model's head has to restore in each frame, the stacked ones together."""
    return config.projection.stacked_dim if target is None else build_frontend(target).feature_dim * num_stacked(config)


def needs_waveforms(config: ModelConfig, objective: ReconstructionConfig) -> bool:
    """Whether the target cannot be computed from stored features, even where the model's own are stored."""
    frontend, target = spectral_frontend(config), objective.target
    return frontend is not None and target is not None and target.features != frontend.features


def reconstruction_head(config: ModelConfig, objective: ReconstructionConfig, old: HeadConfig | None) -> SpectrogramHeadConfig:
    """Returns the description of the head that a model needs, otherwise like an ``old`` one where there is one of its kind."""
    width = restored_dim(config, objective.target)
    if isinstance(old, SpectrogramHeadConfig):
        return replace(old, output_dim=width)
    return SpectrogramHeadConfig(hidden_dim=config.encoder.dim, output_dim=width)


def check_reconstruction(config: ModelConfig, objective: ReconstructionConfig) -> None:
    """Checks an objective against the model that is to be trained by it.

    Raises:
        ValueError: The front-end is learnt, the target cannot be computed beside the features, or the head is of another width.
    """
    frontend = spectral_frontend(config)
    if objective.target is not None:
        _check_target(frontend, objective.target, objective.alteration)
    width, head = restored_dim(config, objective.target), config.heads.get(HEAD)
    found = getattr(head, "output_dim", None)
    if found != width:
        owned = f"no head {HEAD!r}" if head is None else f"a head {HEAD!r} for {found} features"
        raise ValueError(f"the model has {owned}; there are {width} to restore")


def _check_target(
    frontend: SpectralFrontendConfig | None, target: SpectralFrontendConfig, alteration: AlterationConfig
) -> None:
    if frontend is None:
        raise ValueError("the model takes features from outside, beside which no target can be computed: leave out target")
    if target.stack != 1:
        raise ValueError(f"target.stack is {target.stack}; it follows the model's features: leave it at 1")
    if target.normalization.kind not in ("utterance", "none"):  # others need statistics beyond the utterance
        raise ValueError(f"target.normalization is {target.normalization.kind!r}; expected 'utterance' or 'none'")
    mine, theirs = build_frontend(replace(frontend, stack=1)), build_frontend(target)
    lengths = range(mine.sample_rate, mine.sample_rate + 2 * round(mine.frame_shift_s * mine.sample_rate))
    same = (mine.sample_rate, mine.frame_shift_s) == (theirs.sample_rate, theirs.frame_shift_s)
    if not same or any(mine.num_frames(length) != theirs.num_frames(length) for length in lengths):
        raise ValueError(
            f"the target ({target.features.kind}) has other frames than the model's features ({frontend.features.kind}): "
            "both need the same sample rate, frame shift and treatment of edges"
        )
    if alteration.alters_channels and not _has_same_channels(frontend, target):
        raise ValueError(
            "the target has other channels than the features whose channels are zeroed: set alteration.max_channels and "
            "alteration.max_channel_share to 0"
        )


def _has_same_channels(frontend: SpectralFrontendConfig, target: SpectralFrontendConfig) -> bool:
    names = ("features", "cepstra", "deltas")
    return all(getattr(frontend, name) == getattr(target, name) for name in names)


class Reconstruction(nn.Module):
    """Objective: restore what was altered of the features.

    Args:
        model: Model of fixed features with a head ``reconstruction`` for as many as there are to restore.
        config: Settings.

    Raises:
        ValueError: Model and settings do not fit each other.
    """

    def __init__(self, model: SpeechModel, config: ReconstructionConfig) -> None:
        super().__init__()
        check_reconstruction(model.config, config)
        self.model, self.config = model, config
        frontend, self.stack = spectral_frontend(model.config), num_stacked(model.config)
        self.target: SpectralFrontend | None = None
        if config.target is not None and frontend is not None:
            self.target = build_frontend(replace(config.target, stack=self.stack, stack_tail=frontend.stack_tail))
        band = model.config.projection.stacked_dim
        config.alteration.widest_band(band if config.alteration.mode == "reference" else band // self.stack)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recomputes block activations in the backward pass instead of keeping them."""
        self.model.transformer.gradient_checkpointing = enabled

    @torch.no_grad()
    def prepare(self, batch: Batch, generator: torch.Generator) -> PreparedReconstruction:
        """Computes features and target and draws what is altered.

        Raises:
            ValueError: The batch holds waveforms and the model takes features, or the target needs waveforms that it lacks.
        """
        features, target, whole_B = self.features_and_target(batch)
        num_frames, num_features = features.values.shape[1:]
        alteration = draw_alteration(
            features.lengths, num_frames, num_features, self.config.alteration, generator, stack=self.stack
        )
        inputs = altered_features(features, alteration)
        if self.model.config.frontend is None:  # the model stacks for itself
            values = inputs.values.reshape(len(inputs.values), num_frames * self.stack, num_features // self.stack)
            inputs = Padded(values=values, lengths=inputs.lengths * self.stack)
        hides = self.config.alteration.hides_something
        time_BT = alteration.time_BT if hides else torch.ones_like(alteration.time_BT)
        channels_BO = alteration.channels_BF
        if not self.config.alteration.alters_channels:
            channels_BO = channels_BO.new_zeros(len(channels_BO), target.shape[-1])
        in_time_B = (time_BT & valid_mask(whole_B, num_frames)).sum(1)
        scored = (in_time_B * target.shape[-1] + (whole_B - in_time_B) * channels_BO.sum(1)).sum()
        return PreparedReconstruction(
            inputs=inputs,
            target_BTO=target,
            lengths_B=whole_B,
            time_BT=time_BT,
            channels_BO=channels_BO,
            weights={HEAD: scored},
        )

    def features_and_target(self, batch: Batch) -> tuple[Padded, Tensor, Tensor]:
        """Returns the stacked features (B, T, F), the target (B, T, O), and (B,) how many frames lie wholly in the utterance.

        Raises:
            ValueError: The batch does not hold what they are computed from.
        """
        given, frontend = Padded(values=batch.inputs.float(), lengths=batch.lengths), self.model.frontend
        if frontend is None:
            whole = Padded(values=frontend_output(self.model, given).values, lengths=given.lengths // self.stack * self.stack)
            features = stack_given(whole, self.stack)
            return features, features.values, features.lengths
        base = frontend.base_features(given.values, given.lengths) if batch.is_waveform else given
        features = frontend.finish(base)
        target = features.values
        if batch.clean is not None:  # what is restored is the sound without the noise that was added
            given = Padded(values=batch.clean.float(), lengths=batch.lengths)
            base = frontend.base_features(given.values, given.lengths)
            target = frontend.finish(base).values
        if self.target is not None and needs_waveforms(self.model.config, self.config):
            if not batch.is_waveform:
                raise ValueError("the target is made of other features than those in the batch: give it waveforms")
            target = self.target(given.values, given.lengths).values
        elif self.target is not None:
            target = self.target.finish(base).values
        return features, target, torch.minimum(base.lengths // self.stack, features.lengths)

    def restore(self, inputs: Padded) -> Tensor:
        """Returns (B, T, O): what the head makes of altered features as ``prepare`` gives them."""
        embedded = self.model.embed(inputs)
        final_BTD = self.model.encoder(embedded.values, embedded.lengths).final
        return cast(Tensor, self.model.heads[HEAD](final_BTD))

    def forward(self, prepared: PreparedReconstruction, totals: dict[str, Tensor]) -> StepOutput:
        """Loss over this micro-batch's share of the elements that ``totals`` counts over the whole step."""
        restored_BTO = self.restore(prepared.inputs)
        difference_BTO = restored_BTO.to(torch.promote_types(restored_BTO.dtype, torch.float32)) - prepared.target_BTO
        real_BT1 = valid_mask(prepared.lengths_B, difference_BTO.shape[1])[..., None]
        scored_BTO = (prepared.time_BT[..., None] | prepared.channels_BO[:, None]) & real_BT1
        error_BTO = self._distance(difference_BTO)
        total, count = error_BTO.where(scored_BTO, 0.0).sum(), prepared.weights[HEAD]
        with torch.no_grad():
            rest_BTO = real_BT1 & ~scored_BTO
            guessed_BTO = self._distance(_from_mean(prepared.target_BTO, real_BT1))
            metrics = {
                "altered_loss": (total.detach(), count),
                "unaltered_loss": (error_BTO.where(rest_BTO, 0.0).sum(), rest_BTO.sum()),
                "mean_frame_loss": (guessed_BTO.where(scored_BTO, 0.0).sum(), count),
            }
        return StepOutput(loss=total / totals[HEAD], metrics=metrics)

    def _distance(self, difference: Tensor) -> Tensor:
        return difference.abs() if self.config.distance == "l1" else difference.square()


def _from_mean(target_BTO: Tensor, real_BT1: Tensor) -> Tensor:
    """Differences from each utterance's mean frame, the best guess for a model that knows nothing but the utterance."""
    mean_B1O = target_BTO.where(real_BT1, 0.0).sum(1, keepdim=True) / real_BT1.sum(1, keepdim=True).clamp(min=1)
    return target_BTO - mean_B1O
