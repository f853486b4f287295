"""What a batch gives the model of an objective: front-end output, frame counts, hidden frames.

Spectral features are fixed, so an objective computes them in ``prepare``. A convolutional front-end is trained: its samples are
handed on, and it runs in ``forward``, under autocast and compiled like the rest. Whether ``forward`` is given samples or
features is told by their shape.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from sslim.batch import Batch, Padded
from sslim.frontends import ConvFrontend, ConvFrontendConfig
from sslim.models import ModelConfig, SpeechModel
from sslim.nn.heads import MaskEmbeddingConfig

MASK = "mask"
MaskPlace = Literal["features", "projection"]  # where frames are hidden: in the features, or after the projection


def has_trained_frontend(model: SpeechModel) -> bool:
    """Whether the front-end learns with the rest."""
    return isinstance(model.frontend, ConvFrontend)


def mask_place(config: ModelConfig) -> MaskPlace:
    """Returns where a model's frames are hidden: where its mask embedding fits, or as its front-end's family does."""
    head, widths = config.heads.get(MASK), (config.projection.feature_dim, config.encoder.input_dim)
    if isinstance(head, MaskEmbeddingConfig) and widths[0] != widths[1]:
        return "projection" if head.dim == widths[1] else "features"
    return "projection" if isinstance(config.frontend, ConvFrontendConfig) else "features"


def check_mask_place(config: ModelConfig, place: MaskPlace, who: str = "") -> None:
    """Raises ValueError when a model's mask embedding has another width than the frames that it is to replace.

    Args:
        config: The model's description; without a mask embedding hidden frames are zeros, which always fit.
        place: Where frames are hidden.
        who: Whose it is, where several models are around.
    """
    mask = config.heads.get(MASK)
    expected = config.projection.feature_dim if place == "features" else config.encoder.input_dim
    if isinstance(mask, MaskEmbeddingConfig) and mask.dim != expected:
        owner = f"the {who}'s mask embedding" if who else "the mask embedding"
        raise ValueError(f"{owner} has width {mask.dim}, masking at the {place} needs {expected}")


def check_feature_penalty(weight: float, model: SpeechModel) -> None:
    """Raises ValueError when a penalty on features is asked for that no training could change."""
    if weight and not has_trained_frontend(model):
        raise ValueError(f"feature_penalty {weight:g} needs a convolutional front-end: set it to 0")


def frontend_output(model: SpeechModel, inputs: Padded, who: str = "model") -> Padded:
    """Returns what enters a model's projection.

    Args:
        model: The model.
        inputs: Base features (B, T, F) or samples (B, S).
        who: What a complaint calls the model.

    Raises:
        ValueError: Stored features for a model that reads waveforms, or the reverse.
    """
    frontend = model.frontend
    if inputs.values.dim() == 2:
        if frontend is None:
            raise ValueError(f"the {who} takes features, and the batch holds waveforms")
        return frontend(inputs.values, inputs.lengths)
    if isinstance(frontend, ConvFrontend):
        raise ValueError(f"the {who}'s front-end takes waveforms, and the batch holds stored features")
    return inputs if frontend is None else frontend.finish(inputs)


def trained_inputs(model: SpeechModel, batch: Batch, *, trains_frontend: bool, who: str = "model") -> Padded:
    """Returns what of a batch enters ``forward``: features without gradient, or samples where the front-end is trained.

    Args:
        model: The model that is trained.
        batch: Base features or samples.
        trains_frontend: Whether the front-end runs in ``forward``; its output is computed here otherwise.
        who: What a complaint calls the model.

    Raises:
        ValueError: Stored features for a model that reads waveforms, or the reverse.
    """
    inputs = Padded(values=batch.inputs.float(), lengths=batch.lengths)
    if trains_frontend and batch.is_waveform:
        return inputs
    with torch.no_grad():
        return frontend_output(model, inputs, who)


def count_frames(model: SpeechModel, inputs: Padded) -> tuple[int, Tensor]:
    """Returns the frames T of a padded batch and (B,) real frames; of samples by arithmetic, since nothing is computed yet."""
    if inputs.values.dim() != 2:
        return inputs.values.shape[1], inputs.lengths
    frontend = cast(ConvFrontend, model.frontend)
    return frontend.num_frames(inputs.values.shape[1]), cast(Tensor, frontend.num_frames(inputs.lengths))  # type: ignore[arg-type]


def features_of(model: SpeechModel, inputs: Padded) -> Padded:
    """Returns the front-end output of :func:`trained_inputs`, with gradients where it was given samples."""
    return cast(ConvFrontend, model.frontend)(inputs.values, inputs.lengths) if inputs.values.dim() == 2 else inputs


def hide_frames(model: SpeechModel, x_BTF: Tensor, mask_BT: Tensor) -> Tensor:
    """Returns (B, T, F) with the model's mask embedding, or zeros where it has none, in place of the frames of ``mask_BT``."""
    if MASK in model.heads:
        return model.heads[MASK](x_BTF, mask_BT)
    return x_BTF.masked_fill(mask_BT[..., None], 0.0)


def feature_square(features: Padded) -> Tensor:
    """Returns the sum over real frames of the features' mean square, 0-d; padding is zero and adds nothing."""
    return features.values.float().square().mean(-1).sum()
