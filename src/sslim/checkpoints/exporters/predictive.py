"""The contents of an APC, VQ-APC or NPC checkpoint in S3PRL's later layout (``config`` and ``model``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslim.checkpoints.importers.predictive_names import (
    CODEBOOK,
    COUNTER,
    NPC,
    apc_names,
    foreign_names,
    predictive_audio_of,
)
from sslim.frontends import SpectralFrontendConfig
from sslim.models import ModelConfig, SpeechModel
from sslim.models.predictive import APC_HEAD, NPC_HEAD
from sslim.models.storage import INT8
from sslim.nn.conv_encoder import ConvEncoderConfig
from sslim.nn.encoder import Encoder
from sslim.nn.heads import RegressionHeadConfig
from sslim.nn.quantizer import QuantizerConfig
from sslim.nn.recurrent import RecurrentEncoderConfig


def predictive_contents(model: SpeechModel) -> dict[str, Any]:
    """Returns the checkpoint's contents, plain types and tensors only.

    Args:
        model: A model with a recurrent or a convolutional encoder.

    Raises:
        ValueError: The layout cannot express the model; the sentence says what.
    """
    config, encoder = model.config, model.config.encoder
    assert isinstance(encoder, RecurrentEncoderConfig | ConvEncoderConfig)
    assert not isinstance(model.encoder, Encoder)
    recurrent = isinstance(encoder, RecurrentEncoderConfig)
    reason = _inexpressible_ends(config, APC_HEAD if recurrent else NPC_HEAD)
    if isinstance(encoder, RecurrentEncoderConfig):
        reason = reason or _inexpressible_layers(encoder)
        paras, table = _apc_settings(encoder), apc_names(encoder.num_layers)
    else:
        paras, table = _npc_settings(encoder), NPC
    if reason is not None:
        raise ValueError(f"S3PRL's layout cannot express this model: {reason}")
    assert isinstance(config.frontend, SpectralFrontendConfig)
    groups = 0 if model.encoder.final_quantizer is None else len(model.encoder.final_quantizer.groups)
    foreign = foreign_names(table, max(encoder.num_layers, groups))
    weights: dict[str, Tensor] = {}
    for native, tensor in model.state_dict().items():
        name = foreign[native]
        value = tensor.detach().cpu().float()
        if name.endswith(CODEBOOK):
            value = value.T
        elif not recurrent and name.endswith("linear.weight"):
            value = value[..., None]
        weights[name] = value.clone(memory_format=torch.contiguous_format)
    if isinstance(encoder, ConvEncoderConfig):
        weights |= _fixed_tensors(encoder)
    return {"config": {"model": {"paras": paras}, "data": {"audio": predictive_audio_of(config.frontend)}}, "model": weights}


def _inexpressible_ends(config: ModelConfig, name: str) -> str | None:
    """Says what the layout has no words for, or None."""
    if config.storage in INT8:
        return f"its weights are stored as {config.storage}: export the model before that"
    if config.projection.norm or config.projection.linear or config.projection.stack > 1:
        return "its features do not enter the encoder as they are"
    if config.frontend is None:
        return "it has no front-end, and S3PRL computes the features of these models from waveforms"
    if not isinstance(config.frontend, SpectralFrontendConfig) or predictive_audio_of(config.frontend) is None:
        return "its front-end is not Kaldi's filterbank with a Hamming window, as it is or normalised for each utterance"
    if config.heads != {name: RegressionHeadConfig(output_dim=config.encoder.input_dim)}:
        found = ", ".join(f"{other} ({each.kind})" for other, each in sorted(config.heads.items()))
        return f"it must have the linear head {name!r} back to its features and no other, it has {found or 'none'}"
    return None


def _inexpressible_layers(encoder: RecurrentEncoderConfig) -> str | None:
    if len(set(encoder.dims)) > 1:
        return f"its layers have {', '.join(map(str, encoder.dims))} units, it has one number for all"
    if encoder.prenet_dims:
        return "it has a pre-net"
    if any(quantizer is not None for quantizer in encoder.quantizers[:-1]):
        return "a layer before the last one is quantised"
    if encoder.residual and encoder.input_dim == encoder.dim:
        return "its first layer has a residual, which S3PRL's has not"
    return None


def _quantizer_settings(quantizer: QuantizerConfig | None) -> dict[str, Any]:
    if quantizer is None:
        return {}
    return {
        "vq": {
            "codebook_size": list(quantizer.num_codes),
            "code_dim": list(quantizer.code_dims),
            "gumbel_temperature": quantizer.temperature,
        }
    }


def _apc_settings(encoder: RecurrentEncoderConfig) -> dict[str, Any]:
    return {
        "num_layers": encoder.num_layers,
        "hidden_size": encoder.dim,
        "dropout": encoder.dropout,
        "residual": encoder.residual,
        **_quantizer_settings(encoder.quantizers[-1] if encoder.quantizers else None),
    }


def _npc_settings(encoder: ConvEncoderConfig) -> dict[str, Any]:
    return {
        "kernel_size": encoder.kernel,
        "mask_size": encoder.mask,
        "n_blocks": encoder.num_blocks,
        "hidden_size": encoder.dim,
        "dropout": encoder.dropout,
        "residual": encoder.residual,
        "batch_norm": encoder.batch_norm,
        "activate": encoder.activation,
        "disable_cross_layer": False,
        **_quantizer_settings(encoder.quantizer),
    }


def _fixed_tensors(encoder: ConvEncoderConfig) -> dict[str, Tensor]:
    """The masks of convolutions, and the counters of batch norms, which decide nothing."""
    tensors: dict[str, Tensor] = {}
    for block in range(encoder.num_blocks):
        taps = encoder.num_taps(block)
        mask = torch.ones(encoder.dim, encoder.dim, encoder.kernel)
        mask[..., taps : encoder.kernel - taps] = 0
        tensors[f"masked_convs.{block}.conv_mask"] = mask
        for norm in (1, 2) if encoder.batch_norm else ():
            tensors[f"blocks.{block}.bn{norm}.{COUNTER}"] = torch.tensor(0)
    return tensors
