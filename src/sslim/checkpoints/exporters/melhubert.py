"""Writes a MelHuBERT checkpoint that the reference implementation reads (the layout of December 2022 and later).

Plain types only: dictionaries, lists, strings, numbers and tensors, so ``torch.load(weights_only=True)`` reads it too. What the
layout cannot say is refused with the reason. It has no place for the front-end's mean and standard deviation: the reference
takes them from a file of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslim.checkpoints.importers.melhubert import ACTIVATIONS, FRAME_PERIODS_MS
from sslim.checkpoints.importers.melhubert_names import foreign_name
from sslim.models import ModelConfig, SpeechModel
from sslim.models.melhubert import HEAD, MASK, melhubert_frontend
from sslim.models.storage import INT8
from sslim.nn.encoder import EncoderConfig, LinearRanks
from sslim.nn.heads import ClusterHeadConfig, MaskEmbeddingConfig
from sslim.nn.positions import ConvPositionsConfig, split_weight_norm
from sslim.storage import atomic_file

CROP_S = 15  # seconds of the reference's training crops, what its sequence_length stands for


def export_melhubert(model: SpeechModel, path: str | Path) -> None:
    """Writes ``model`` to ``path``.

    Args:
        model: A MelHuBERT, head- and row-pruned and distilled ones included.
        path: The file to write, usually ``*.ckpt``; an old one is replaced when the new one is complete.

    Raises:
        ValueError: The layout cannot express the model; the sentence says what.
    """
    path = Path(path)
    contents = melhubert_contents(model)
    with atomic_file(path) as temporary, temporary.open("wb") as file:  # a path would name the archive inside
        torch.save(contents, file)


def melhubert_contents(model: SpeechModel) -> dict[str, Any]:
    """Returns the checkpoint's contents; see :func:`export_melhubert`."""
    config = model.config
    if reason := _inexpressible(config):
        raise ValueError(f"the MelHuBERT layout cannot express this model: {reason}")
    num_heads = config.transformer.dim // config.transformer.blocks[0].head_dim
    period_ms = FRAME_PERIODS_MS.get(config.projection.feature_dim)
    contents: dict[str, Any] = {
        "Optimizer": {},
        "Step": 0,
        "Args": {"mode": "melhubert", "frame_period": period_ms},
        "Runner": {"runner": {}, "optimizer": {}, "datarc": {"sets": []}},
    }
    pruned = {layer: b.num_heads for layer, b in enumerate(config.transformer.blocks) if b.num_heads < num_heads}
    if pruned:  # only the counts matter to the reference: it removes them from a new model before it loads these tensors
        kept = _kept_heads(model, num_heads)
        all_heads = set(range(num_heads))
        contents["Pruned_heads"] = [{layer: sorted(all_heads - set(kept[layer])) for layer in pruned}]
    contents["model"] = _foreign_state(model)
    contents["Upstream_Config"] = {
        "melhubert": _settings(config, num_heads),
        "task": {"sequence_length": CROP_S * 1000 // (period_ms or 10)},
    }
    return contents


def _inexpressible(config: ModelConfig) -> str | None:
    """Says what the layout has no words for, or None."""
    if not config.transformer.blocks:
        return "it has no layers"
    encoder = config.transformer
    return _inexpressible_ends(config) or _inexpressible_encoder(encoder) or _inexpressible_blocks(encoder)


def _inexpressible_ends(config: ModelConfig) -> str | None:
    width, projection = config.projection.feature_dim, config.projection
    if config.storage in INT8:
        return f"its weights are stored as {config.storage}: export the model before that"
    if projection.norm:
        return "it has a norm before the input projection"
    if projection.linear == (width == config.transformer.dim):
        return f"its {width} features are as wide as the model, where the reference has no input projection"
    if config.frontend is not None:
        normalization = getattr(config.frontend, "normalization", None)
        statistics = None if normalization is None else normalization.statistics
        period_ms = FRAME_PERIODS_MS.get(width)
        if period_ms is None or config.frontend != melhubert_frontend(period_ms, statistics):
            return "its front-end is not MelHuBERT's 40 log-Mel bins every 10 ms, stacked by two for 20 ms"
    if set(config.heads) - {MASK} != {HEAD} or not isinstance(config.heads[HEAD], ClusterHeadConfig):
        found = ", ".join(f"{name} ({head.kind})" for name, head in sorted(config.heads.items())) or "none"
        return f"it must have the head {HEAD!r} of kind 'clusters' and no other but {MASK!r}, it has {found}"
    embedding = _mask_width(config)
    if embedding not in (None, width, config.transformer.dim):
        return f"its mask embedding of width {embedding} fits neither features nor model"
    return None


def _mask_width(config: ModelConfig) -> int | None:
    """Width of the learnt vector in place of hidden frames; None where they are zeros."""
    head = config.heads.get(MASK)
    return head.dim if isinstance(head, MaskEmbeddingConfig) else None


def _inexpressible_encoder(encoder: EncoderConfig) -> str | None:
    positions = encoder.positions
    norms = (encoder.norm_placement, encoder.input_norm, encoder.final_norm)
    if not isinstance(positions, ConvPositionsConfig):
        return "its positions are not a convolution"
    if encoder.causal or positions.causal:
        return "it is causal"
    if norms not in (("post", True, False), ("pre", False, True)):
        return f"norms {norms} (placement, input, final) are neither its post-norm nor its pre-norm form"
    if encoder.layer_norm_eps != 1e-5:
        return f"layer_norm_eps is {encoder.layer_norm_eps}, the reference has 1e-05"
    if encoder.activation not in ACTIVATIONS.values():
        return f"the reference has no activation {encoder.activation!r}"
    if encoder.depth_map != tuple(range(len(encoder.blocks))):
        return f"depth_map {encoder.depth_map} shares or reorders blocks"
    return None


def _inexpressible_blocks(encoder: EncoderConfig) -> str | None:
    first = encoder.blocks[0]
    for layer, block in enumerate(encoder.blocks, start=1):
        if block.attention_window is not None:
            return f"layer {layer} attends to a window"
        if block.ranks != LinearRanks():
            return f"layer {layer} has low-rank matrices"
        if not block.num_heads or not block.feedforward_dim:
            return f"layer {layer} lacks attention or feed-forward"
        if block.feedforward_dim != first.feedforward_dim:
            widths = f"{first.feedforward_dim} and {block.feedforward_dim}"
            return f"layers 1 and {layer} have {widths} feed-forward units, it has one number for all"
        inner = block.num_heads * block.head_dim
        if block.head_dim != first.head_dim or encoder.dim % block.head_dim or inner > encoder.dim:
            heads = f"{block.num_heads} heads of width {block.head_dim}"
            return f"layer {layer} has {heads}, which are no part of equal heads over {encoder.dim} channels"
    return None


def _kept_heads(model: SpeechModel, num_heads: int) -> list[list[int]]:
    """Original numbers of the remaining heads as the import noted them; the first ones where nobody knows."""
    counts = [block.num_heads for block in model.config.transformer.blocks]
    for entry in reversed(model.provenance):
        kept = entry.get("kept_heads")
        if kept is not None and [len(heads) for heads in kept] == counts:
            return kept
    return [list(range(count)) for count in counts]


def _foreign_state(model: SpeechModel) -> dict[str, Tensor]:
    """Tensors under the reference's names; a folded positional kernel is split again, which is exact."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("frontend.")}
    if "encoder.positions.weight" in state:
        gain, direction = split_weight_norm(state.pop("encoder.positions.weight"))
        state |= {"encoder.positions.gain": gain, "encoder.positions.direction": direction}
    foreign = {}
    for name, tensor in state.items():
        key = foreign_name(name, final_norm=model.config.transformer.final_norm)
        assert key is not None, name
        foreign[key] = tensor.detach().cpu().float().clone(memory_format=torch.contiguous_format)
    return foreign


def _settings(config: ModelConfig, num_heads: int) -> dict[str, Any]:
    encoder, head = config.transformer, config.heads[HEAD]
    positions = encoder.positions
    assert isinstance(positions, ConvPositionsConfig)
    assert isinstance(head, ClusterHeadConfig)
    embedding = _mask_width(config)
    return {
        "feat_emb_dim": config.projection.feature_dim,
        "pos_emb_type": "conv",
        "pos_conv_depth": 1,
        "conv_pos": positions.kernel_size,
        "conv_pos_groups": positions.groups,
        "encoder_layers": len(encoder.blocks),
        "encoder_embed_dim": encoder.dim,
        "encoder_ffn_embed_dim": encoder.blocks[0].feedforward_dim,
        "encoder_attention_heads": num_heads,
        "activation_fn": {native: foreign for foreign, native in ACTIVATIONS.items()}[encoder.activation],
        "layer_norm_first": encoder.norm_placement == "pre",
        "attention_type": "original",
        "num_cluster": head.num_clusters,
        "learnable_mask_emb": embedding is not None,
        "mask_before_proj": embedding in (None, config.projection.feature_dim),
        "mask_prob": 0.7,
        "mask_length": 5 if config.projection.feature_dim == 80 else 10,
        "mask_selection": "static",
        "mask_other": 0.0,
        "no_mask_overlap": False,
        "mask_min_space": 1,
        "pred_masked_weight": 1.0,
        "pred_nomask_weight": 0.0,
        "skip_masked": False,
        "skip_nomask": True,
        "dropout": encoder.dropout,
        "attention_dropout": encoder.attention_dropout,
        "activation_dropout": encoder.activation_dropout,
        "encoder_layerdrop": encoder.layer_drop,
    }
