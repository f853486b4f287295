"""Writes a Mockingjay, TERA or AALBERT checkpoint in S3PRL's later container, an APC, VQ-APC or NPC in theirs.

Plain types only: dictionaries, lists, strings, numbers and tensors, so ``torch.load(weights_only=True)`` reads it too. What the
layout cannot say is refused with the reason. S3PRL's own later code no longer stacks frames: it cannot run a model with
``downsample_rate`` above 1, though the container has held such models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslim.checkpoints.exporters.predictive import predictive_contents
from sslim.checkpoints.importers.s3prl import ACTIVATIONS, UPSTREAMS
from sslim.checkpoints.importers.s3prl_frontends import audio_of
from sslim.checkpoints.importers.s3prl_names import ALIASES, STATE_NORM, foreign_name
from sslim.frontends import SpectralFrontendConfig
from sslim.models import ModelConfig, SpeechModel
from sslim.models.reconstruction import HEAD
from sslim.models.storage import INT8
from sslim.nn.encoder import EncoderConfig, LinearRanks
from sslim.nn.heads import SpectrogramHeadConfig
from sslim.nn.positions import SinusoidPositionsConfig
from sslim.storage import atomic_file


def export_s3prl(model: SpeechModel, path: str | Path) -> None:
    """Writes ``model`` to ``path``.

    Shared layers are written once for each depth, and a pre-norm model's norms under both of their names. Its norms of
    intermediate states, which only S3PRL's returned states go through, are ones and zeros, as training leaves them.

    Args:
        model: A Mockingjay, TERA or AALBERT; or an APC, VQ-APC or NPC, see ``sslim.checkpoints.exporters.predictive``.
        path: The file to write, usually ``*.ckpt``; an old one is replaced when the new one is complete.

    Raises:
        ValueError: The layout cannot express the model; the sentence says what.
    """
    path = Path(path)
    contents = s3prl_contents(model) if isinstance(model.config.encoder, EncoderConfig) else predictive_contents(model)
    with atomic_file(path) as temporary, temporary.open("wb") as file:  # a path would name the archive inside
        torch.save(contents, file)


def s3prl_contents(model: SpeechModel) -> dict[str, Any]:
    """Returns the checkpoint's contents; see :func:`export_s3prl`."""
    config = model.config
    if reason := _inexpressible_ends(config) or _inexpressible_encoder(config.transformer):
        raise ValueError(f"S3PRL's layout cannot express this model: {reason}")
    weights: dict[str, dict[str, Tensor]] = {"Transformer": {}, "SpecHead": {}}
    for name, tensor in model.state_dict().items():
        for key, other in _foreign_names(name, config.transformer):
            weights[key][other] = tensor.detach().cpu().float().clone(memory_format=torch.contiguous_format)
    if config.transformer.norm_placement == "pre":
        weights["Transformer"] |= _state_norms(config.transformer)
    upstream: dict[str, Any] = {"transformer": _settings(config), "task": {"sequence_length": 0}}
    if config.chunking is not None:
        upstream["task"]["sequence_length"] = config.chunking.max_frames
    if isinstance(config.frontend, SpectralFrontendConfig):
        upstream["audio"] = audio_of(config.frontend, _target_dim(config))
    arguments = {"upstream": UPSTREAMS[config.family]} if config.family in UPSTREAMS else {}
    contents = {"Optimizer": {}, "Step": 0, "Args": arguments, "Config": {"runner": {}}, "Upstream_Config": upstream}
    return contents | {key: tensors for key, tensors in weights.items() if tensors}


def _stack(config: ModelConfig) -> int:
    return config.projection.stack if config.frontend is None else getattr(config.frontend, "stack", 1)


def _target_dim(config: ModelConfig) -> int:
    head = config.heads.get(HEAD)
    width = head.output_dim if isinstance(head, SpectrogramHeadConfig) else config.projection.stacked_dim
    return width // _stack(config)


def _foreign_names(name: str, encoder: EncoderConfig) -> list[tuple[str, str]]:
    """Where a native tensor goes: its key and name there; several times for a shared layer or a norm with two names."""
    if name.startswith("encoder.final_norm."):
        return [("Transformer", f"{STATE_NORM}{encoder.num_layers}.{name.rpartition('.')[2]}")]
    words = name.split(".")
    depths = [int(words[2])] if words[1] == "blocks" else []
    if depths:
        depths = [depth for depth, block in enumerate(encoder.depth_map) if block == depths[0]]
    places = []
    for native in [".".join([*words[:2], str(depth), *words[3:]]) for depth in depths] or [name]:
        place = foreign_name(native)
        assert place is not None, name
        places.append(place)
    if encoder.norm_placement == "pre" and depths:
        places += [("Transformer", second) for _, first in list(places) if (second := _second_name(first)) is not None]
    return places


def _second_name(name: str) -> str | None:
    """The other name of a pre-norm layer's norm; None for a tensor that has one name alone."""
    for second, first in ALIASES.items():
        layer, found, part = name.partition(f".{first}.")
        if found and layer.count(".") == 2:  # encoder.layer.NUMBER
            return f"{layer}.{second}.{part}"
    return None


def _state_norms(encoder: EncoderConfig) -> dict[str, Tensor]:
    """The norms of the states before the last."""
    norms = {}
    for number in range(encoder.num_layers):
        norms[f"{STATE_NORM}{number}.weight"] = torch.ones(encoder.dim)
        norms[f"{STATE_NORM}{number}.bias"] = torch.zeros(encoder.dim)
    return norms


def _inexpressible_ends(config: ModelConfig) -> str | None:
    """Says what the layout has no words for, or None."""
    if config.search_space is not None:
        return "it is a supernet: export one of its subnets"
    if config.storage in INT8:
        return f"its weights are stored as {config.storage}: export the model before that"
    if config.projection.norm or not config.projection.linear:
        return "its input projection is not a linear map alone"
    if config.frontend is not None:
        frontend = config.frontend
        if not isinstance(frontend, SpectralFrontendConfig):
            return "its features are convolutions over the waveform"
        if frontend.stack > 1 and frontend.stack_tail != "drop":
            return "its front-end pads frames that do not fill a stack, where S3PRL drops them"
        if audio_of(frontend, _target_dim(config)) is None:
            return "its front-end is neither S3PRL's OnlinePreprocessor nor Kaldi features that it normalises"
    head = config.heads.get(HEAD)
    if set(config.heads) - {HEAD} or (head is not None and not isinstance(head, SpectrogramHeadConfig)):
        found = ", ".join(f"{name} ({each.kind})" for name, each in sorted(config.heads.items()))
        return f"it may have the head {HEAD!r} of kind 'spectrogram' and no other, it has {found}"
    if isinstance(head, SpectrogramHeadConfig):
        if head.hidden_dim != config.transformer.dim or head.output_dim % _stack(config):
            return f"its head has {head.hidden_dim} hidden units and {head.output_dim} outputs, neither fit to the model's"
        if (head.activation, head.layer_norm_eps) != (config.transformer.activation, config.transformer.layer_norm_eps):
            return "its head has an activation or layer_norm_eps other than the encoder's"
    return None


def _inexpressible_encoder(encoder: EncoderConfig) -> str | None:
    norms = (encoder.norm_placement, encoder.input_norm, encoder.final_norm)
    if encoder.causal:
        return "it is causal"
    if not isinstance(encoder.positions, SinusoidPositionsConfig) or encoder.relative_positions is not None:
        return "its positions are not sinusoids alone"
    if norms not in (("post", True, False), ("pre", True, True)):
        return f"norms {norms} (placement, input, final) are neither its post-norm nor its pre-norm form"
    if encoder.activation not in ACTIVATIONS.values():
        return f"S3PRL has no activation {encoder.activation!r}"
    if not encoder.depth_map:
        return "it has no layers"
    first = encoder.blocks[0]
    for number, block in enumerate(encoder.blocks, start=1):
        if block.attention_window is not None or block.ranks != LinearRanks() or block.keep_norms:
            return f"block {number} has windows, low-rank matrices or norms of missing parts"
        if block.num_heads * block.head_dim != encoder.dim:
            return f"block {number} has {block.num_heads} heads of width {block.head_dim}, not {encoder.dim} channels"
        if block != first:
            return f"blocks 1 and {number} differ in their sizes, it has one for all"
        if not block.feedforward_dim:
            return f"block {number} lacks its feed-forward part"
    if len(encoder.blocks) > 1 and encoder.depth_map != tuple(range(len(encoder.blocks))):
        return f"depth_map {encoder.depth_map} is neither one block for each layer nor one for all"
    return None


def _settings(config: ModelConfig) -> dict[str, Any]:
    encoder = config.transformer
    return {
        "input_dim": -1 if config.frontend is not None else config.projection.feature_dim,
        "downsample_rate": _stack(config),
        "hidden_size": encoder.dim,
        "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": encoder.blocks[0].num_heads,
        "intermediate_size": encoder.blocks[0].feedforward_dim,
        "hidden_act": {native: foreign for foreign, native in ACTIVATIONS.items()}[encoder.activation],
        "hidden_dropout_prob": encoder.dropout,
        "attention_probs_dropout_prob": encoder.attention_dropout,
        "initializer_range": 0.02,
        "layer_norm_eps": encoder.layer_norm_eps,
        "share_layer": len(encoder.blocks) == 1 and encoder.num_layers > 1,
        "pre_layer_norm": encoder.norm_placement == "pre",
    }
