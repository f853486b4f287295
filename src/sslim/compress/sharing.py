"""Layer sharing: a deep model is folded into one whose few blocks run again and again.

Depth and work stay the same; of the layers' parameters those of the blocks are left. DistilALHuBERT has this form, twelve
layers from a stack of two to four, and learns it by distillation from the deep model. Orders: "Lessons on parameter sharing
across layers in Transformers" (Takase and Kiyono, arXiv 2104.06022). A folded model computes something else than the deep one,
whatever it starts from: it has to be trained again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sslim.compress.calibration import Calibration
from sslim.compress.origins import KEPT_HEADS, Origins, origins
from sslim.config import to_plain
from sslim.models import ModelConfig, SpeechModel
from sslim.models.speech import restore_statistics
from sslim.models.storage import require_float
from sslim.nn.encoder import EncoderConfig, LinearRanks

BLOCKS = "encoder.blocks."


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Settings of layer sharing.

    Attributes:
        num_blocks: Distinct blocks that are left.
        order: ``cycle``: the whole stack over and over (1 2 1 2, DistilALHuBERT's); ``sequence``: each block several times
            running (1 1 2 2).
        start: What a block starts as: ``first``: a copy of the first layer that it replaces; ``average``: the mean of all
            layers that it replaces, which must be of one shape; ``layers``: copies of the layers that ``layers`` names.
        layers: With start ``layers``, the layer of the given model, from 1, that each block starts as.
    """

    num_blocks: int
    order: Literal["cycle", "sequence"] = "cycle"
    start: Literal["first", "average", "layers"] = "first"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ValueError(f"num_blocks is {self.num_blocks}; expected at least 1")
        if (self.layers is not None) != (self.start == "layers"):
            raise ValueError(f"start is {self.start!r} and layers is {self.layers}; layers belong to the start 'layers'")
        if self.layers is not None and len(self.layers) != self.num_blocks:
            raise ValueError(f"layers names {len(self.layers)} layers for {self.num_blocks} blocks; expected one for each")


def share_layers(model: SpeechModel, settings: Sharing, calibration: Calibration | None = None) -> SpeechModel:
    """Returns a model of equal depth whose layers share a few blocks.

    The note in the provenance holds the positions in the given model's ``depth_map``, from 0, that each block comes from;
    copies keep the original numbers of their heads and units (see ``origins``), averages are new parts and count from 0.

    Args:
        model: Any model, one that shares layers already included; it stays as it is.
        settings: How many blocks, in which order, and what they start as.
        calibration: Not needed.

    Returns:
        The folded model in eval mode.

    Raises:
        ValueError: More blocks than the model has, a layer that it does not have, or layers to average that differ in shape or
            have factored maps; or a quantised model.
    """
    require_float(model)
    encoder = model.config.transformer
    config = sharing_config(model.config, settings)
    sources = _sources(encoder, settings)
    state = model.state_dict()
    folded = {name: tensor for name, tensor in state.items() if not name.startswith(BLOCKS)}
    for block, depths in enumerate(sources):
        parts = [_block_state(state, encoder.depth_map[depth]) for depth in depths]
        folded |= {f"{BLOCKS}{block}.{name}": _mean([part[name] for part in parts]) for name in parts[0]}
    small = SpeechModel(config, model.provenance).to(next(model.parameters()).device)
    restore_statistics(small, folded)
    small.load_state_dict(folded, strict=True)
    note = {"step": "sharing", **to_plain(settings), "block_depths": [list(depths) for depths in sources]}
    small.provenance.append(note | _origins_of(model, sources))
    return small.eval()


def sharing_config(config: ModelConfig, settings: Sharing) -> ModelConfig:
    """Returns the description of what :func:`share_layers` leaves, found without a model.

    Raises:
        ValueError: As :func:`share_layers`.
    """
    encoder = config.transformer
    sources = _sources(encoder, settings)
    blocks = tuple(encoder.blocks[encoder.depth_map[depths[0]]] for depths in sources)
    depth_map = tuple(_block_at(settings, depth, encoder.num_layers) for depth in range(encoder.num_layers))
    return replace(config, encoder=replace(encoder, blocks=blocks, depth_map=depth_map), search_space=None)


def _block_at(settings: Sharing, depth: int, num_layers: int) -> int:
    """The block that runs at a depth of the folded model."""
    return depth % settings.num_blocks if settings.order == "cycle" else depth * settings.num_blocks // num_layers


def _sources(encoder: EncoderConfig, settings: Sharing) -> list[list[int]]:
    """For each block the depths of the given model that it is copied or averaged from."""
    num_layers, distinct = encoder.num_layers, len(set(encoder.depth_map))
    if settings.num_blocks > distinct:
        raise ValueError(f"num_blocks is {settings.num_blocks}, but the model has {distinct} blocks; expected 1 to {distinct}")
    if settings.layers is not None:
        if wrong := [layer for layer in settings.layers if not 1 <= layer <= num_layers]:
            raise ValueError(f"layers names layer {wrong[0]}, the model has layers 1 to {num_layers}")
        return [[layer - 1] for layer in settings.layers]
    replaced: list[list[int]] = [[] for _ in range(settings.num_blocks)]
    for depth in range(num_layers):
        replaced[_block_at(settings, depth, num_layers)].append(depth)
    if settings.start == "first":
        return [depths[:1] for depths in replaced]
    for depths in replaced:
        _check_average(encoder, depths)
    return replaced


def _check_average(encoder: EncoderConfig, depths: list[int]) -> None:
    """Refuses a mean of blocks that have no common shape, or whose factors mean nothing apart from each other."""
    numbers = sorted({encoder.depth_map[depth] for depth in depths})
    first = encoder.blocks[encoder.depth_map[depths[0]]]
    for depth in depths:
        block = encoder.blocks[encoder.depth_map[depth]]
        if block != first:
            sizes = [f"{b.num_heads} heads of width {b.head_dim} and {b.feedforward_dim} units" for b in (first, block)]
            differ = " and ".join(sizes) if sizes[0] != sizes[1] else "another window, rank or choice of heads"
            raise ValueError(
                f"layers {depths[0] + 1} and {depth + 1} cannot be averaged, they have {differ}: start from 'first' or 'layers'"
            )
    if len(numbers) > 1 and first.ranks != LinearRanks():
        raise ValueError(
            f"layers {depths[0] + 1} and {depths[1] + 1} cannot be averaged, they have factored maps, and the mean of factors "
            "is no factor of the mean: start from 'first' or 'layers'"
        )


def _block_state(state: Mapping[str, Tensor], block: int) -> dict[str, Tensor]:
    prefix = f"{BLOCKS}{block}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _mean(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors).mean(0)


def _origins_of(model: SpeechModel, sources: list[list[int]]) -> dict[str, Any]:
    """Original numbers of copied blocks; where blocks are averages, the note that numbers begin anew."""
    depth_map = model.config.transformer.depth_map
    blocks = [{depth_map[depth] for depth in depths} for depths in sources]
    if any(len(members) > 1 for members in blocks):
        return {KEPT_HEADS: None}
    before, copied = origins(model), [members.pop() for members in blocks]
    kept = Origins(
        blocks=tuple(before.blocks[b] for b in copied),
        heads=tuple(before.heads[b] for b in copied),
        units=tuple(before.units[b] for b in copied),
    )
    return kept.entry()
