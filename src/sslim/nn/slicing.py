"""The one slicing rule: which part of every tensor belongs to a chosen set of units.

Running a subnet inside its supernet, extracting it, pruning heads or feed-forward rows and dropping layers all call
:func:`slice_encoder`, so they cannot disagree. The rule for each tensor is a row of ``AXES``; nothing else knows it.

Weight-normalised positions are folded before they are sliced (LightHuBERT's rule): the norm of a slice is not the slice of the
norm. Their group-wise kernel keeps its number of groups, so its second axis keeps a prefix, as LightHuBERT trained it.

The gate of a head in gated relative positions reads that head's own share of the channels. So channels go by whole heads from
the end there, and a head can stay only as long as its channels do.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sslim.batch import EncoderOutput
from sslim.nn.encoder import Block, BlockConfig, Encoder, EncoderConfig, original_heads
from sslim.nn.positions import ConvPositionsConfig, fold_weight_norm
from sslim.nn.windows import WindowRule

# What the axes of a tensor count: model channels, attention inner width (heads times head width), feed-forward units,
# the channels of one group of the positions, the heads whose gates' channels are kept, or None for an axis that is never cut.
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
    "relative_positions.table": (None, "gated"),  # with the gates: a block's head_ids say which heads are left
    "attention.gate.linear.weight": (None, None),
    "attention.gate.linear.bias": (None,),
    "attention.gate.scale": ("gated",),
}
for _name, (_out, _in) in _LINEARS.items():
    AXES[f"{_name}.weight"] = (_out, _in)
    AXES[f"{_name}.bias"] = (_out,)
    AXES[f"{_name}.inner.weight"] = (None, _in)
    AXES[f"{_name}.outer.weight"] = (_out, None)
    AXES[f"{_name}.outer.bias"] = (_out,)

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Units:
    """Which parts of an encoder are kept, as original indices counted from 0.

    Attributes:
        channels: Kept model channels.
        heads: For each block, its kept heads.
        feedforward: For each block, its kept feed-forward units.
        depths: Kept positions of ``depth_map``.
        windows: For each block, its attention window (frames on each side, None for all); None as a whole: as they are.
        window_rule: ``BlockConfig.window_rule`` of ``windows``; blocks whose windows stay as they are keep their own.
    """

    channels: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    feedforward: tuple[tuple[int, ...], ...]
    depths: tuple[int, ...]
    windows: tuple[int | None, ...] | None = None
    window_rule: WindowRule = "band"

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
        for per_block in (self.heads, self.feedforward, self.windows):
            if per_block is not None and len(per_block) != len(config.blocks):
                raise ValueError(f"units describe {len(per_block)} blocks, the encoder has {len(config.blocks)}")
        pairs = [("channels", self.channels, full.channels), ("depths", self.depths, full.depths)]
        pairs += [
            (f"heads of block {b}", kept, whole) for b, (kept, whole) in enumerate(zip(self.heads, full.heads, strict=True))
        ]
        rows = zip(self.feedforward, full.feedforward, strict=True)
        pairs += [(f"feed-forward units of block {b}", kept, whole) for b, (kept, whole) in enumerate(rows)]
        for name, kept, whole in pairs:
            if len(set(kept)) != len(kept) or not set(kept) <= set(whole):
                raise ValueError(f"{name}: {kept} are not distinct members of 0 to {len(whole) - 1}")
        _gated_heads(config, self)


def _gated_heads(config: EncoderConfig, units: Units) -> int:
    """Counts the heads, kept or not, whose gates find all their channels; 0 without relative positions.

    Raises:
        ValueError: Channels that are not the first heads' own, or a kept head whose channels are cut.
    """
    relative, width = config.relative_positions, len(units.channels)
    if relative is None:
        return 0
    head_dim = config.dim // relative.num_heads
    if width % head_dim or units.channels != tuple(range(width)):
        raise ValueError(
            f"the gates of relative positions read {head_dim} channels for each head, so only the last channels can be cut, "
            f"{head_dim} at a time: {width} of {config.dim} cannot be kept like that"
        )
    count = width // head_dim
    for block in {config.depth_map[depth] for depth in units.depths}:
        originals = original_heads(config.blocks[block])
        if last := [originals[head] for head in units.heads[block] if originals[head] >= count]:
            raise ValueError(
                f"at width {width} the gates of relative positions find the channels of {count} heads, "
                f"but head {max(last) + 1} is to be kept"
            )
    return count


@dataclass(frozen=True)
class _Spaced:
    """The first ``count`` of the indices that lie less than ``width`` after a multiple of ``period``."""

    period: int
    width: int
    count: int


_Kept = range | _Spaced | Tensor  # the first ones, evenly spaced runs, or anything else


@lru_cache(maxsize=1024)
def _compact(kept: tuple[int, ...]) -> _Kept:
    """Returns the shortest form of kept indices: prefixes and LightHuBERT's blocks are taken as views, without an index."""
    if kept == tuple(range(len(kept))):
        return range(len(kept))
    breaks = [i for i in range(1, len(kept)) if kept[i] != kept[i - 1] + 1]
    if kept[0] == 0 and breaks:
        spaced = _Spaced(kept[breaks[0]], breaks[0], len(kept))
        if all(index == i // spaced.width * spaced.period + i % spaced.width for i, index in enumerate(kept)):
            return spaced
    return torch.tensor(kept)


@lru_cache(maxsize=1024)
def _columns(heads: tuple[int, ...], head_dim: int) -> _Kept:
    return _compact(tuple(head * head_dim + i for head in heads for i in range(head_dim)))


def _runs(tensor: Tensor, axis: int, kept: _Spaced) -> list[tuple[Tensor, int, int]]:
    """Returns what ``kept`` names along an axis as views, with where each lies in the result: whole runs together, the rest."""
    runs = min(kept.count // kept.width, tensor.shape[axis] // kept.period)
    parts, done = [], runs * kept.width
    if runs:
        folded = tensor.narrow(axis, 0, runs * kept.period).unflatten(axis, (runs, kept.period))
        parts.append((folded.narrow(axis + 1, 0, kept.width), 0, done))
    while done < kept.count:
        size = min(kept.width, kept.count - done)
        parts.append((tensor.narrow(axis, runs * kept.period, size).unsqueeze(axis), done, done + size))
        runs, done = runs + 1, done + size
    return parts


def _gaps(tensor: Tensor, axis: int, kept: _Spaced) -> list[Tensor]:
    """Returns what ``kept`` leaves out along an axis as views."""
    runs = min(kept.count // kept.width, tensor.shape[axis] // kept.period)
    gaps, done, place = [], runs * kept.width, runs * kept.period
    if runs:
        folded = tensor.narrow(axis, 0, place).unflatten(axis, (runs, kept.period))
        gaps.append(folded.narrow(axis + 1, kept.width, kept.period - kept.width))
    while place < tensor.shape[axis]:
        size, period = min(kept.width, kept.count - done), min(kept.period, tensor.shape[axis] - place)
        gaps.append(tensor.narrow(axis, place + size, period - size))
        done, place = done + size, place + period
    return gaps


class _Cut(torch.autograd.Function):
    """Prefixes and evenly spaced runs of several axes in one step: the gradient is filled in once, not once for each axis."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, prefix: tuple[int, ...], axis: int, spaced: _Spaced | None) -> Tensor:
        ctx.shape, ctx.prefix, ctx.axis, ctx.spaced = tensor.shape, prefix, axis, spaced
        corner = _Cut.corner(tensor, prefix)
        if spaced is None:
            return corner
        cut = tensor.new_empty([*corner.shape[:axis], spaced.count, *corner.shape[axis + 1 :]])
        for part, start, stop in _runs(corner, axis, spaced):
            cut.narrow(axis, start, stop - start).view_as(part).copy_(part)
        return cut

    @staticmethod
    def corner(tensor: Tensor, prefix: tuple[int, ...]) -> Tensor:
        for axis, size in enumerate(prefix):
            if size < tensor.shape[axis]:
                tensor = tensor.narrow(axis, 0, size)
        return tensor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        whole = gradient.new_empty(ctx.shape)  # zeros only where nothing is written: memory is what this costs
        corner = whole
        for axis, size in enumerate(ctx.prefix):
            corner.narrow(axis, size, ctx.shape[axis] - size).zero_()
            corner = corner.narrow(axis, 0, size)
        if ctx.spaced is None:
            corner.copy_(gradient)
            return whole, None, None, None
        for gap in _gaps(corner, ctx.axis, ctx.spaced):
            gap.zero_()
        for part, start, stop in _runs(corner, ctx.axis, ctx.spaced):
            part.copy_(gradient.narrow(ctx.axis, start, stop - start).view_as(part))
        return whole, None, None, None


def _slice(tensor: Tensor, axes: Sequence[str | None], kept: Mapping[str, _Kept]) -> Tensor:
    prefix = list(tensor.shape)
    spaced: dict[int, _Spaced] = {}
    indices: dict[int, Tensor] = {}
    for axis, kind in enumerate(axes):
        part = None if kind is None else kept.get(kind)
        if isinstance(part, range):
            prefix[axis] = len(part)
        elif isinstance(part, _Spaced):
            spaced[axis] = part
        elif part is not None:
            indices[axis] = part
    cuts: list[tuple[int, _Spaced | None]] = [*spaced.items()]
    if not cuts and tuple(prefix) != tuple(tensor.shape):
        cuts = [(0, None)]
    for axis, runs in cuts:
        tensor = _Cut.apply(tensor, tuple(prefix), axis, runs)
        prefix = list(tensor.shape)
    for axis, index in indices.items():
        tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def slice_tensor(tensor: Tensor, axes: Sequence[str | None], kept: Mapping[str, Sequence[int]]) -> Tensor:
    """Cuts every axis of ``tensor`` that ``kept`` names; a view where all of them keep a prefix."""
    return _slice(tensor, axes, {kind: _compact(tuple(indices)) for kind, indices in kept.items()})


def fold_positions(config: EncoderConfig, state: Mapping[str, Tensor]) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """Returns the same encoder with its weight-normalised positions as a plain kernel."""
    state = dict(state)
    if isinstance(config.positions, ConvPositionsConfig) and config.positions.weight_norm:
        state["positions.weight"] = fold_weight_norm(state.pop("positions.gain"), state.pop("positions.direction"))
        config = replace(config, positions=replace(config.positions, weight_norm=False))
    return config, state


def _head_ids(config: EncoderConfig, block: BlockConfig, kept: Sequence[int]) -> tuple[int, ...] | None:
    """Numbers of the kept heads in the table of relative positions; None where they are the first ones."""
    if config.relative_positions is None:
        return None
    ids = tuple(original_heads(block)[head] for head in kept)
    return None if ids == tuple(range(len(ids))) else ids


def slice_config(config: EncoderConfig, units: Units) -> EncoderConfig:
    """Returns the description of what :func:`slice_encoder` leaves; blocks that no kept depth uses disappear."""
    used = sorted({config.depth_map[depth] for depth in units.depths})
    windows = [(block.attention_window, block.window_rule) for block in config.blocks]
    if units.windows is not None:
        windows = [(window, "band" if window is None else units.window_rule) for window in units.windows]
    blocks = tuple(
        replace(
            config.blocks[b],
            num_heads=len(units.heads[b]),
            feedforward_dim=len(units.feedforward[b]),
            attention_window=windows[b][0],
            window_rule=windows[b][1],
            head_ids=_head_ids(config, config.blocks[b], units.heads[b]),
        )
        for b in used
    )
    depth_map = tuple(used.index(config.depth_map[depth]) for depth in units.depths)
    relative = config.relative_positions
    if relative is not None:
        relative = replace(relative, num_heads=_gated_heads(config, units))
    return replace(config, dim=len(units.channels), blocks=blocks, depth_map=depth_map, relative_positions=relative)


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
    groups = config.positions.groups if isinstance(config.positions, ConvPositionsConfig) else 1
    shared: dict[str, _Kept] = {
        "channels": _compact(units.channels),
        "group": range(len(units.channels) // groups),
        "gated": range(_gated_heads(config, units)),
    }
    used = sorted({config.depth_map[depth] for depth in units.depths})
    kept_in = {
        block: {
            **shared,
            "heads": _columns(units.heads[block], config.blocks[block].head_dim),
            "units": _compact(units.feedforward[block]),
        }
        for block in used
    }
    sliced = {}
    for name, tensor in state.items():
        if name in ("positions.gain", "positions.direction"):
            continue
        if not (match := _BLOCK.fullmatch(name)):
            sliced[name] = _slice(tensor, AXES[name], shared)
            continue
        block, rest = int(match[1]), match[2]
        if block in used and not _is_emptied(rest, config.blocks[block], units, block):
            sliced[f"blocks.{used.index(block)}.{rest}"] = _slice(tensor, AXES[rest], kept_in[block])
    if isinstance(config.positions, ConvPositionsConfig) and config.positions.weight_norm:
        gain, direction = state["positions.gain"], state["positions.direction"]
        if len(units.channels) == config.dim:  # the kernel stays as it is
            return slice_config(config, units), sliced | {"positions.gain": gain, "positions.direction": direction}
        part = _slice(direction, AXES["positions.weight"], shared)  # first, since cutting a product costs more memory
        sliced["positions.weight"] = fold_weight_norm(gain, direction, part)
        config = replace(config, positions=replace(config.positions, weight_norm=False))
    return slice_config(config, units), sliced


def _is_emptied(name: str, config: BlockConfig, units: Units, block: int) -> bool:
    part, _, _ = name.partition(".")
    if part.endswith("_norm") and config.keep_norms:
        return False
    return not (units.heads[block] if part.startswith("attention") else units.feedforward[block])


@lru_cache(maxsize=256)
def _meta_encoder(config: EncoderConfig) -> Encoder:
    with torch.device("meta"):
        return Encoder(config)


@lru_cache(maxsize=256)
def _meta_block(config: EncoderConfig, block: BlockConfig) -> Block:
    with torch.device("meta"):
        return Block(config, block)


def _twin(module: M) -> M:
    """Copies the modules, not the parameters."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    twin._modules = {name: None if child is None else _twin(child) for name, child in module._modules.items()}
    return twin


def place(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts tensors in the places of a module's parameters, gradients and all; no other name is touched.

    Raises:
        KeyError: A name that the module does not have.
    """
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf not in owner._parameters:
            raise KeyError(name)
        owner._parameters[leaf] = tensor  # type: ignore[assignment]


def encoder_view(encoder: Encoder, units: Units) -> Encoder:
    """Returns the subnet as an encoder whose tensors are the slices themselves: it runs, and gradients reach the supernet.

    It is made for one forward and backward pass (slices that are no views hold the values of now) and has no parameters of its
    own; see :func:`extract_subnet` for a standalone encoder. Blocks and their shapes come from a cache: a new subnet costs
    milliseconds, not the building of a model.
    """
    config, state = slice_encoder(encoder.config, dict(encoder.named_parameters()), units)
    bare = replace(config, blocks=(), depth_map=())
    view = _twin(_meta_encoder(bare))
    shape = replace(bare, positions=None)
    view.blocks = nn.ModuleList([_twin(_meta_block(shape, block)) for block in config.blocks])
    view.config, view.gradient_checkpointing = config, encoder.gradient_checkpointing
    place(view, state)
    return view.train(encoder.training)


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
    return encoder_view(encoder, units)(x_BTD, lengths_B, **options)


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
    "encoder_view",
    "extract_subnet",
    "fold_positions",
    "place",
    "run_subnet",
    "slice_config",
    "slice_encoder",
    "slice_tensor",
]
