"""Subnets of a supernet: run in place, extracted as ordinary models, counted without building them.

Running and extracting cut the encoder by the one slicing rule (``sslim.nn.slicing``); this module adds what lies around the
encoder. The front-end, the norm over its features and the output side of every head are never cut; the input projection loses
rows, the heads columns, and a mask embedding as wide as the model its end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from sslim.batch import EncoderOutput, Padded
from sslim.config import to_plain
from sslim.frontends import ConvFrontendConfig, FrontendConfig
from sslim.models.search_space import SearchSpace, Subnet, units_of
from sslim.models.speech import ModelConfig, Projection, SpeechModel, restore_statistics
from sslim.models.storage import require_float
from sslim.nn.encoder import BlockConfig, EncoderConfig
from sslim.nn.encoders import build_encoder
from sslim.nn.heads import (
    CodewordHeadConfig,
    HeadConfig,
    MaskEmbeddingConfig,
    SpectrogramHeadConfig,
    SplitHeadConfig,
    build_head,
)
from sslim.nn.positions import ConvPositionsConfig
from sslim.nn.relative_positions import GATE_UNITS
from sslim.nn.slicing import Units, encoder_view, place, slice_config, slice_tensor

Choice = Subnet | str | Mapping[str, Any]


def resolve_subnet(config: ModelConfig, choice: Choice) -> Subnet:
    """Returns the subnet that a user names, see ``SearchSpace.subnet``.

    Raises:
        ValueError: The model has no search space, or the space has no such subnet.
    """
    if isinstance(choice, Subnet):
        return choice
    if config.search_space is None:
        raise ValueError(
            f"subnet {choice!r} is asked for, but this {config.family} model is no supernet: it has no search space"
        )
    return config.search_space.subnet(choice)


def check_supernet(config: ModelConfig) -> SearchSpace:
    """Checks that a model can hold every subnet of its search space, and returns the space.

    Raises:
        ValueError: There is no space, or the model cannot hold it.
    """
    space = config.search_space
    if space is None:
        raise ValueError(f"this {config.family} model is no supernet: it has no search space")
    space.check(config.transformer)
    if not config.projection.linear and space.dims != (config.transformer.dim,):
        raise ValueError(
            f"without a linear projection the width of the model is that of its features: dims of the search space must be "
            f"({config.transformer.dim},), not {space.dims}"
        )
    return space


def model_units(config: ModelConfig, choice: Choice) -> Units:
    """Returns the units of a subnet; without a search space, of the first heads, units and layers.

    Raises:
        ValueError: The supernet cannot hold the subnet.
    """
    return units_of(config.transformer, config.search_space or "prefix", resolve_subnet(config, choice))


def slice_model_config(config: ModelConfig, units: Units) -> ModelConfig:
    """Returns the description of what :func:`slice_model` leaves: an ordinary model without a search space."""
    dim = len(units.channels)
    encoder = slice_config(config.transformer, units)
    if dim < config.transformer.dim and isinstance(encoder.positions, ConvPositionsConfig):
        encoder = replace(encoder, positions=replace(encoder.positions, weight_norm=False))  # folded before it is cut
    heads = {name: _slice_head(head, config.transformer.dim, dim) for name, head in config.heads.items()}
    return replace(config, encoder=encoder, heads=heads, search_space=None)


def subnet_config(config: ModelConfig, subnet: Choice) -> ModelConfig:
    """Returns the description of a subnet as the ordinary model that :func:`extract_model` makes of it."""
    return slice_model_config(config, model_units(config, subnet))


def _slice_head(head: HeadConfig, dim: int, new_dim: int) -> HeadConfig:
    return replace(head, dim=new_dim) if isinstance(head, MaskEmbeddingConfig) and head.dim == dim else head


def _head_axes(head: HeadConfig, dim: int) -> dict[str, tuple[str | None, ...]]:
    """Returns the axes of a head's tensors that count model channels; the tensors not named are never cut."""
    if isinstance(head, MaskEmbeddingConfig):
        return {"embedding": ("channels",)} if head.dim == dim else {}
    names = {
        CodewordHeadConfig: "projection.weight",
        SplitHeadConfig: "inner.weight",
        SpectrogramHeadConfig: "inner.weight",
    }
    return {names.get(type(head), "linear.weight"): (None, "channels")}


def model_view(model: SpeechModel, units: Units) -> SpeechModel:
    """Returns the subnet as a model whose tensors are slices of the supernet's: it runs, and gradients reach the supernet.

    For one forward and backward pass, see ``sslim.nn.slicing.encoder_view``. The front-end is the supernet's own.
    """
    require_float(model)
    config = slice_model_config(model.config, units)
    kept, dim = {"channels": units.channels}, model.config.transformer.dim
    with torch.device("meta"):
        projection = Projection(config.projection, config.transformer.dim)
        heads = nn.ModuleDict({name: build_head(config.transformer.dim, head) for name, head in config.heads.items()})
    whole = dict(model.projection.named_parameters())
    cut = {"linear.weight": ("channels", None), "linear.bias": ("channels",)}
    place(projection, {name: slice_tensor(tensor, cut.get(name, ()), kept) for name, tensor in whole.items()})
    for name, head in model.config.heads.items():
        axes = _head_axes(head, dim)
        tensors = dict(model.heads[name].named_parameters())
        place(heads[name], {leaf: slice_tensor(tensor, axes.get(leaf, ()), kept) for leaf, tensor in tensors.items()})
    view = copy.copy(model)
    view.config, view.provenance = config, list(model.provenance)
    parts = {"projection": projection, "encoder": encoder_view(model.transformer, units), "heads": heads}
    view._modules = {**model._modules, **{name: part.train(model.training) for name, part in parts.items()}}
    return view


def slice_model(model: SpeechModel, units: Units) -> SpeechModel:
    """Returns a standalone model with copies of the kept units' tensors.

    Raises:
        ValueError: Units that the model does not have.
    """
    with torch.no_grad():
        view = model_view(model, units)
        state = {name: tensor.detach().clone() for name, tensor in view.state_dict().items()}
    small = SpeechModel(view.config, model.provenance).to(next(model.parameters()).device)
    restore_statistics(small, state)
    small.load_state_dict(state, strict=True)
    return small.train(model.training)


def run_subnet(model: SpeechModel, subnet: Choice, features: Padded, **options: bool) -> EncoderOutput:
    """Runs a subnet inside its supernet; equal to extracting it and running that.

    Args:
        model: The supernet; gradients reach its parameters.
        subnet: A :class:`Subnet`, or what ``SearchSpace.subnet`` takes.
        features: Front-end output (B, T, F).
        **options: ``keep_layers`` and ``need_weights`` of ``SpeechModel.encode_features``.

    Raises:
        ValueError: The supernet cannot hold the subnet.
    """
    view = model_view(model, model_units(model.config, subnet))
    return view.encode_features(features.values, features.lengths, **options)


def extract_model(model: SpeechModel, subnet: Choice) -> SpeechModel:
    """Returns a subnet as an ordinary model of its own, with the supernet's provenance and a note of the extraction.

    Raises:
        ValueError: The supernet cannot hold the subnet.
    """
    chosen = resolve_subnet(model.config, subnet)
    small = slice_model(model, model_units(model.config, chosen))
    small.provenance.append({"step": "extract", "subnet": to_plain(chosen)})
    return small


def subnet_parameters(config: ModelConfig, subnet: Choice, *, with_heads: bool = True) -> int:
    """Counts the parameters that :func:`extract_model` leaves, without building anything.

    Without heads it is LightHuBERT's ``calc_sampled_param_num`` but for the mask embedding, a head here, which is counted there
    in full.

    Args:
        config: The supernet.
        subnet: A :class:`Subnet`, or what ``SearchSpace.subnet`` takes.
        with_heads: As in ``SpeechModel.num_parameters``.
    """
    return count_parameters(subnet_config(config, subnet), with_heads=with_heads)


def count_parameters(config: ModelConfig, *, with_heads: bool = True) -> int:
    """Counts a model's parameters from its description, whatever they are stored as; equals ``SpeechModel.num_parameters``."""
    features, encoder = config.projection.stacked_dim, config.encoder
    projection = 2 * features * config.projection.norm + _linear(features, encoder.input_dim) * config.projection.linear
    total = _frontend(config.frontend) + projection
    total += _encoder(encoder) if isinstance(encoder, EncoderConfig) else _built(lambda: build_encoder(encoder))
    return total + sum(_built(partial(build_head, encoder.dim, head)) for head in config.heads.values()) * with_heads


def _linear(in_dim: int, out_dim: int, rank: int | None = None) -> int:
    return (in_dim + 1) * out_dim if rank is None else rank * (in_dim + out_dim) + out_dim


def _frontend(config: FrontendConfig | None) -> int:
    if not isinstance(config, ConvFrontendConfig):
        return 0
    total, inputs = 0, 1
    for number, layer in enumerate(config.layers):
        norm = 2 * layer.channels * (config.norm == "layer" or number == 0)
        total += layer.channels * (inputs * layer.kernel + config.bias) + norm
        inputs = layer.channels
    return total + inputs * config.channel_scale


def _encoder(config: EncoderConfig) -> int:
    total = 2 * config.dim * (config.input_norm + config.final_norm)
    if isinstance(config.positions, ConvPositionsConfig):
        positions = config.positions
        kernel = config.dim * (config.dim // positions.groups) * positions.kernel_size
        total += kernel + config.dim + positions.kernel_size * positions.weight_norm
    if config.relative_positions is not None:
        total += config.relative_positions.num_buckets * config.relative_positions.num_heads
    return total + sum(_block(config, block) for block in config.blocks)


def _block(config: EncoderConfig, block: BlockConfig) -> int:
    dim, inner, units, ranks = config.dim, block.num_heads * block.head_dim, block.feedforward_dim, block.ranks
    total = 0
    if inner:
        total += sum(_linear(dim, inner, rank) for rank in (ranks.query, ranks.key, ranks.value))
        total += _linear(inner, dim, ranks.output)
        if config.relative_positions is not None:
            total += _linear(block.head_dim, GATE_UNITS) + config.relative_positions.num_heads
    if units:
        total += _linear(dim, units, ranks.up) + _linear(units, dim, ranks.down)
    return total + 2 * dim * sum(bool(part) or block.keep_norms for part in (inner, units))


def _built(build: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())
