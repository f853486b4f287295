"""From a model with trained gates to an ordinary smaller one that computes the same.

Closed heads, units and channels are cut out; the values of open ones go into the weights behind them: columns of a block's last
maps, input channels of the next convolution. Between the last convolution and the norm behind it there is no weight to take
them: they stay as the front-end's ``channel_scale`` (``dummy_weight`` in DPHuBERT). A post-norm block keeps the norm of a part
that is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sslim.compress.gate_costs import keeping_norms, with_channels
from sslim.compress.gates import Gates, Kind
from sslim.compress.origins import cut, spans
from sslim.config import to_plain
from sslim.frontends import ConvFrontendConfig, FrontendConfig
from sslim.models import ModelConfig, SpeechModel
from sslim.models.speech import restore_statistics
from sslim.models.storage import require_float
from sslim.nn.encoder import EncoderConfig
from sslim.nn.heads import MaskEmbeddingConfig
from sslim.nn.slicing import Units, slice_tensor

BLOCK_OUTPUTS: dict[Kind, str] = {"heads": "attention.output", "feedforward": "feedforward.down"}


@torch.no_grad()
def cut_gates(model: SpeechModel, gates: Gates) -> SpeechModel:
    """Returns a model without the closed parts, which computes what the gated one computes in eval mode.

    Post-norm blocks that lose their attention or feed-forward part keep its norm; pre-norm blocks lose it too. The note in the
    provenance names what is left by original numbers, from 0 (see ``origins``), channels by the model's own.

    Args:
        model: The model that the gates were trained with; it stays as it is, gates attached or not.
        gates: Its gates; their settled values count, whatever mode they are in.

    Returns:
        A physically smaller model in eval mode, without gates.
    """
    require_float(model)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    encoder = model.config.transformer
    heads, feedforward = (_fold(encoder, state, gates, kind) for kind in BLOCK_OUTPUTS)
    lost = [
        index
        for index, block in enumerate(encoder.blocks)
        if (block.num_heads and not heads[index]) or (block.feedforward_dim and not feedforward[index])
    ]
    whole = _assembled(keeping_norms(model.config, lost), state, model)
    note: dict[str, Any] = {"step": "gates", **to_plain(gates.settings)}
    channels = _channel_gates(model.config.frontend, gates)
    if channels:
        note["kept_channels"] = [spans(_open(part)) for part in channels]
    small = cut(whole, replace(Units.full(encoder), heads=heads, feedforward=feedforward), note)
    return cut_channels(small, channels) if channels else small


def _fold(encoder: EncoderConfig, state: dict[str, Tensor], gates: Gates, kind: Kind) -> tuple[tuple[int, ...], ...]:
    """Multiplies gates into the columns of the maps behind them; returns what is open in every block."""
    kept = []
    for index, block in enumerate(encoder.blocks):
        count, width = (block.num_heads, block.head_dim) if kind == "heads" else (block.feedforward_dim, 1)
        values = gates.settled(kind, index)
        kept.append(tuple(range(count)) if values is None else _open(values))
        for weight in ("weight", "inner.weight"):  # a factored map has its columns in the inner factor
            name = f"encoder.blocks.{index}.{BLOCK_OUTPUTS[kind]}.{weight}"
            if values is not None and name in state:
                state[name] *= values.repeat_interleave(width).to(state[name])
    return tuple(kept)


def _channel_gates(frontend: FrontendConfig | None, gates: Gates) -> list[Tensor]:
    """The gates of every convolution, ones where it has none; empty where no convolution is gated."""
    if not gates.channels or not isinstance(frontend, ConvFrontendConfig):
        return []
    settled = [gates.settled("channels", index) for index in range(len(frontend.layers))]
    return [torch.ones(layer.channels) if part is None else part for layer, part in zip(frontend.layers, settled, strict=True)]


def cut_channels(model: SpeechModel, gates: Sequence[Tensor]) -> SpeechModel:
    """Returns a model whose convolutions have only the channels with a gate above zero, in eval mode.

    Args:
        model: A model with a convolutional front-end; it stays as it is.
        gates: (C,) factors on the output channels of every convolution.
    """
    config, frontend = model.config, model.config.frontend
    assert isinstance(frontend, ConvFrontendConfig)
    kept = [_open(part) for part in gates]
    scaled = frontend.channel_scale or bool((gates[-1][list(kept[-1])] != 1).any())
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    weight = state["frontend.layers.0.weight"]
    for index in range(1, len(gates)):
        weight = state[f"frontend.layers.{index}.weight"]
        weight *= gates[index - 1].to(weight)[:, None]
    if scaled:
        factors = gates[-1].to(weight)
        state["frontend.scale"] = state.get("frontend.scale", torch.ones_like(factors)) * factors
    embeddings = [
        name
        for name, head in config.heads.items()
        if isinstance(head, MaskEmbeddingConfig) and head.dim == config.projection.feature_dim != config.transformer.dim
    ]
    for name, tensor in state.items():
        if (axes := _channel_axes(name, embeddings)) is not None:
            layer = int(name.split(".")[2]) if name.startswith("frontend.layers.") else len(gates)
            chosen = {"inputs": kept[layer - 1] if layer else (0,), "outputs": kept[min(layer, len(gates) - 1)]}
            state[name] = slice_tensor(tensor, axes, chosen).contiguous()
    small = with_channels(config, [len(part) for part in kept])
    assert isinstance(small.frontend, ConvFrontendConfig)
    width = small.projection.feature_dim
    small = replace(
        small,
        frontend=replace(small.frontend, channel_scale=scaled),
        heads={name: MaskEmbeddingConfig(dim=width) if name in embeddings else head for name, head in config.heads.items()},
    )
    return _assembled(small, state, model)


def _channel_axes(name: str, embeddings: Sequence[str]) -> tuple[str | None, ...] | None:
    """What the axes of a tensor count: channels that enter (``inputs``) or leave a convolution; None where they count none."""
    if name.startswith("frontend.layers."):
        return ("outputs", "inputs", None) if name.count(".") == 3 and name.endswith("weight") else ("outputs",)
    if name == "projection.linear.weight":
        return (None, "inputs")
    features = ("frontend.scale", "projection.norm.weight", "projection.norm.bias")
    return ("inputs",) if name in features or name in [f"heads.{head}.embedding" for head in embeddings] else None


def _open(values: Tensor) -> tuple[int, ...]:
    return tuple(values.nonzero().flatten().tolist())


def _assembled(config: ModelConfig, state: dict[str, Tensor], like: SpeechModel) -> SpeechModel:
    """Puts a description and its tensors together, with another model's provenance, in eval mode."""
    model = SpeechModel(config, like.provenance).to(next(like.parameters()).device)
    restore_statistics(model, state)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()
