"""The one slicing rule: which part of every tensor belongs to a chosen set of units.

Running a subnet inside its supernet, extracting it, pruning heads or feed-forward rows and dropping layers all call
:func:`slice_encoder`, so they cannot disagree. The rule for each tensor is a row of ``AXES``; nothing else knows it.

Weight-normalised positions are folded before they are sliced (LightHuBERT's rule): the norm of a slice is not the slice of the
norm. Their group-wise kernel keeps its number of groups, so its second axis keeps a prefix, as LightHuBERT trained it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.func import functional_call

from sslim.batch import EncoderOutput
from sslim.nn.encoder import BlockConfig, Encoder, EncoderConfig
from sslim.nn.positions import ConvPositionsConfig, fold_weight_norm

# What the axes of a tensor count: model channels, attention inner width (heads times head width), feed-forward units,
# the channels of one group of the positions, or None for an axis that is never cut.
_LINEARS = {
    "attention.query": ("heads", "channels"),
    "attention.key": ("heads", "channels"),
    "attention.value": ("heads", "channels"),
    "attention.output": ("channels", "heads"),
    "feedforward.up": ("units", "channels"),
    "feedforward.down": ("channels", "units"),
}
AXES: dict[str, tuple[str | None, ...]] = {
    "attention_norm.weight": ("channels",),
    "attention_norm.bias": ("channels",),
    "feedforward_norm.weight": ("channels",),
    "feedforward_norm.bias": ("channels",),
    "input_norm.weight": ("channels",),
    "input_norm.bias": ("channels",),
    "final_norm.weight": ("channels",),
    "final_norm.bias": ("channels",),
    "positions.weight": ("channels", "group", None),
    "positions.bias": ("channels",),
}
for _name, (_out, _in) in _LINEARS.items():
    AXES[f"{_name}.weight"] = (_out, _in)
    AXES[f"{_name}.bias"] = (_out,)
    AXES[f"{_name}.inner.weight"] = (None, _in)
    AXES[f"{_name}.outer.weight"] = (_out, None)
    AXES[f"{_name}.outer.bias"] = (_out,)

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class Units:
    """Which parts of an encoder are kept, as original indices counted from 0.

    Attributes:
        channels: Kept model channels.
        heads: For each block, its kept heads.
        feedforward: For each block, its kept feed-forward units.
        depths: Kept positions of ``depth_map``.
    """

    channels: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    feedforward: tuple[tuple[int, ...], ...]
    depths: tuple[int, ...]

    @classmethod
    def full(cls, config: EncoderConfig) -> Units:
        """Everything."""
        return cls(
            channels=tuple(range(config.dim)),
            heads=tuple(tuple(range(block.num_heads)) for block in config.blocks),
            feedforward=tuple(tuple(range(block.feedforward_dim)) for block in config.blocks),
            depths=tuple(range(config.num_layers)),
        )

    @classmethod
    def prefix(
        cls,
        config: EncoderConfig,
        *,
        dim: int | None = None,
        num_heads: Sequence[int] | None = None,
        feedforward_dims: Sequence[int] | None = None,
        num_layers: int | None = None,
    ) -> Units:
        """The first channels, heads and units of every block, and the first layers: a supernet's usual subnet."""
        full = cls.full(config)
        heads = full.heads if num_heads is None else tuple(h[:n] for h, n in zip(full.heads, num_heads, strict=True))
        rows = full.feedforward
        if feedforward_dims is not None:
            rows = tuple(u[:n] for u, n in zip(rows, feedforward_dims, strict=True))
        return cls(channels=full.channels[:dim], heads=heads, feedforward=rows, depths=full.depths[:num_layers])

    def check(self, config: EncoderConfig) -> None:
        """Raises ValueError unless every index exists in ``config`` and none is repeated."""
        full = Units.full(config)
        if len(self.heads) != len(full.heads) or len(self.feedforward) != len(full.feedforward):
            raise ValueError(f"units describe {len(self.heads)} blocks, the encoder has {len(config.blocks)}")
        pairs = [("channels", self.channels, full.channels), ("depths", self.depths, full.depths)]
        pairs += [
            (f"heads of block {b}", kept, whole) for b, (kept, whole) in enumerate(zip(self.heads, full.heads, strict=True))
        ]
        rows = zip(self.feedforward, full.feedforward, strict=True)
        pairs += [(f"feed-forward units of block {b}", kept, whole) for b, (kept, whole) in enumerate(rows)]
        for name, kept, whole in pairs:
            if len(set(kept)) != len(kept) or not set(kept) <= set(whole):
                raise ValueError(f"{name}: {kept} are not distinct members of 0 to {len(whole) - 1}")


def _expand(heads: Sequence[int], head_dim: int) -> list[int]:
    return [head * head_dim + i for head in heads for i in range(head_dim)]


def _take(tensor: Tensor, axis: int, kept: Sequence[int]) -> Tensor:
    """Narrow where ``kept`` is a prefix (a view, no copy), index otherwise."""
    if len(kept) == tensor.shape[axis] and list(kept) == list(range(len(kept))):
        return tensor
    if list(kept) == list(range(len(kept))):
        return tensor.narrow(axis, 0, len(kept))
    return tensor.index_select(axis, torch.tensor(kept, device=tensor.device))


def slice_tensor(tensor: Tensor, axes: Sequence[str | None], kept: Mapping[str, Sequence[int]]) -> Tensor:
    """Cuts every axis of ``tensor`` that ``kept`` names."""
    for axis, kind in enumerate(axes):
        if kind is not None and kind in kept:
            tensor = _take(tensor, axis, kept[kind])
    return tensor


def fold_positions(config: EncoderConfig, state: Mapping[str, Tensor]) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """Returns the same encoder with its weight-normalised positions as a plain kernel."""
    state = dict(state)
    if isinstance(config.positions, ConvPositionsConfig) and config.positions.weight_norm:
        state["positions.weight"] = fold_weight_norm(state.pop("positions.gain"), state.pop("positions.direction"))
        config = replace(config, positions=replace(config.positions, weight_norm=False))
    return config, state


def slice_config(config: EncoderConfig, units: Units) -> EncoderConfig:
    """Returns the description of what :func:`slice_encoder` leaves; blocks that no kept depth uses disappear."""
    used = sorted({config.depth_map[depth] for depth in units.depths})
    blocks = tuple(
        replace(config.blocks[b], num_heads=len(units.heads[b]), feedforward_dim=len(units.feedforward[b])) for b in used
    )
    depth_map = tuple(used.index(config.depth_map[depth]) for depth in units.depths)
    return replace(config, dim=len(units.channels), blocks=blocks, depth_map=depth_map)


def slice_encoder(config: EncoderConfig, state: Mapping[str, Tensor], units: Units) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """Returns the description and the tensors of the kept units; gradients flow to ``state``.

    Args:
        config: The whole encoder.
        state: Its parameters, named as in ``Encoder.state_dict()``.
        units: What is kept. Full units return every tensor unchanged, weight norm unfolded.

    Raises:
        ValueError: Units that the encoder does not have.
        KeyError: A tensor that no row of ``AXES`` describes.
    """
    if units == Units.full(config):
        return config, dict(state)
    units.check(config)
    if len(units.channels) < config.dim:
        config, state = fold_positions(config, state)
    groups = config.positions.groups if isinstance(config.positions, ConvPositionsConfig) else 1
    shared = {"channels": units.channels, "group": range(len(units.channels) // groups)}
    used = sorted({config.depth_map[depth] for depth in units.depths})
    sliced = {}
    for name, tensor in state.items():
        if name in ("positions.gain", "positions.direction"):  # all channels kept: the kernel stays as it is
            sliced[name] = tensor
            continue
        if not (match := _BLOCK.fullmatch(name)):
            sliced[name] = slice_tensor(tensor, AXES[name], shared)
            continue
        block, rest = int(match[1]), match[2]
        if block not in used or _is_emptied(rest, units, block):
            continue
        heads = _expand(units.heads[block], config.blocks[block].head_dim)
        kept = {**shared, "heads": heads, "units": units.feedforward[block]}
        sliced[f"blocks.{used.index(block)}.{rest}"] = slice_tensor(tensor, AXES[rest], kept)
    return slice_config(config, units), sliced


def _is_emptied(name: str, units: Units, block: int) -> bool:
    part = name.split(".")[0].removesuffix("_norm")
    return not (units.heads[block] if part == "attention" else units.feedforward[block])


@lru_cache(maxsize=64)
def _skeleton(config: EncoderConfig) -> Encoder:
    with torch.device("meta"):
        return Encoder(config)


def run_subnet(
    encoder: Encoder, units: Units, x_BTD: Tensor, lengths_B: Tensor | None = None, **options: bool
) -> EncoderOutput:
    """Runs the subnet that ``units`` choose inside ``encoder``; equal to extracting it and running that.

    Args:
        encoder: The whole encoder (supernet); its training mode is used, gradients reach its parameters.
        units: The subnet.
        x_BTD: Input of the subnet's width, ``len(units.channels)``.
        lengths_B: Valid frames.
        **options: ``keep_layers`` and ``need_weights`` of ``Encoder.forward``.
    """
    config, state = slice_encoder(encoder.config, dict(encoder.named_parameters()), units)
    skeleton = _skeleton(config)
    skeleton.train(encoder.training)
    return functional_call(skeleton, state, (x_BTD, lengths_B), options, strict=True)


def extract_subnet(encoder: Encoder, units: Units) -> Encoder:
    """Returns a standalone encoder with copies of the kept units' tensors."""
    config, state = slice_encoder(encoder.config, encoder.state_dict(), units)
    standalone = Encoder(config).to(next(iter(state.values())).device)
    standalone.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, strict=True)
    return standalone.train(encoder.training)


__all__ = [
    "AXES",
    "BlockConfig",
    "Units",
    "extract_subnet",
    "fold_positions",
    "run_subnet",
    "slice_config",
    "slice_encoder",
    "slice_tensor",
]
