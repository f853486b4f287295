"""Depth pruning: layers that change their input least are left out.

How much a layer (or a run of layers) changes what it is given is the angle between the frames that enter and those that leave,
the measure of Gromov et al. 2024, "The unreasonable ineffectiveness of the deeper layers" (arXiv 2403.17887, section 2), there
for runs; Men et al. 2024, "ShortGPT" (arXiv 2403.03853), rank single layers by the cosine. Dorszewski et al. 2024, "How
redundant is the Transformer stack in speech representation models?" (arXiv 2409.16302) find layers of speech models redundant
by such measures. Here every valid frame of all calibration speech counts, and single layers go one after the other, each
measured in the model that the ones before it left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sslim.batch import Padded, valid_mask
from sslim.compress.calibration import Calibration
from sslim.compress.importance import check_amount, share_of
from sslim.compress.origins import cut
from sslim.config import to_plain
from sslim.models import ModelConfig, SpeechModel
from sslim.models.elastic import model_view, slice_model_config
from sslim.nn.encoder import BlockConfig
from sslim.nn.slicing import Units


@dataclass(frozen=True, kw_only=True)
class DepthPruning:
    """Settings of depth pruning; give one of ``keep`` and ``num_layers``.

    Attributes:
        keep: Share of the layers that is kept, above 0 up to 1, at least one layer. A block that runs at several depths counts
            as often.
        num_layers: Layers that are kept.
        choose: ``greedy``: the layer of the smallest angle goes, the rest is measured anew, and so on; ``run``: the layers that
            go follow one another, the run of the smallest angle between what enters the first and leaves the last.
    """

    keep: float | None = None
    num_layers: int | None = None
    choose: Literal["greedy", "run"] = "greedy"

    def __post_init__(self) -> None:
        check_amount(self.keep, self.num_layers, "num_layers")


def layer_angles(model: SpeechModel, features: Sequence[Padded], *, run: int = 1) -> Tensor:
    """Measures how far every run of layers turns the frames that it is given.

    Args:
        model: In eval mode.
        features: Front-end output; all valid frames of all batches count alike.
        run: Layers of a run.

    Returns:
        (num_layers - run + 1,) float64 on the CPU: the mean angle between what enters layer k + 1 and what leaves layer k +
        run, as a share of a half turn (0 the same direction, 1 the opposite one).
    """
    angles, num_frames = torch.zeros(model.num_layers - run + 1, dtype=torch.float64), 0
    for batch in features:
        with torch.no_grad():
            output = model.encode_features(batch.values, batch.lengths)
        valid_BT = valid_mask(output.lengths, output.final.shape[1])
        frames = [layer[valid_BT].double() for layer in output.layers]
        angles += torch.stack([_angles(before, after).sum().cpu() for before, after in zip(frames, frames[run:], strict=False)])
        num_frames += int(valid_BT.sum())
    return angles / max(num_frames, 1)


def prune_depth(model: SpeechModel, settings: DepthPruning, calibration: Calibration | None = None) -> SpeechModel:
    """Returns a model with fewer layers: one round of pruning.

    Blocks that no layer uses any more disappear; a block that others still use stays. The note in the provenance holds the
    positions in the given model's ``depth_map`` that were removed, from 0 and in the order of their removal, and original
    numbers of what is left (see ``origins``).

    Args:
        model: Any model; it stays as it is.
        settings: How many layers, and how they are chosen.
        calibration: Speech whose features the layers are measured on.

    Returns:
        A physically smaller model in eval mode. It computes what the given model computes when the removed layers pass on what
        they are given.

    Raises:
        ValueError: No calibration speech, more layers than there are, or angles that are not finite.
    """
    num_layers = model.config.transformer.num_layers
    chosen = _chosen(model, settings, calibration, num_layers - _num_kept(settings, num_layers))
    return cut(model, _without(model.config, chosen), {"step": "depth", **to_plain(settings), "removed_depths": chosen})


def depth_left(
    model: SpeechModel, settings: DepthPruning, calibration: Calibration | None = None
) -> Callable[[float], ModelConfig]:
    """Returns what :func:`prune_depth` leaves for any share of the layers; no layer is measured twice.

    Args:
        model: Any model.
        settings: How layers are chosen; their ``keep`` and ``num_layers`` do not count.
        calibration: Speech whose features the layers are measured on.

    Raises:
        ValueError: As :func:`prune_depth`; the function that is returned, too.
    """
    known: dict[int, list[int]] = {}
    if settings.choose == "greedy":  # what goes first goes first, however many go
        order = _chosen(model, settings, calibration, model.config.transformer.num_layers - 1)
        known = {number: order[:number] for number in range(model.num_layers)}

    def left(keep: float) -> ModelConfig:
        number = model.num_layers - share_of(keep, model.num_layers)
        if number not in known:
            known[number] = _chosen(model, settings, calibration, number)
        return slice_model_config(model.config, _without(model.config, known[number]))

    return left


def depth_config(config: ModelConfig, settings: DepthPruning) -> ModelConfig:
    """Returns a description with the sizes that :func:`prune_depth` leaves, found without a model or data.

    It has the first layers; which ones are really kept is the data's choice, but the number of parameters is the same.

    Raises:
        ValueError: More layers than there are, or the number of parameters depends on the choice: layers differ in size, or
            share blocks of which one may or may not be left without a layer.
    """
    encoder = config.transformer
    num_kept = _num_kept(settings, encoder.num_layers)
    uses = [encoder.depth_map.count(block) for block in set(encoder.depth_map)]
    alike = len({_size(encoder.blocks[block]) for block in set(encoder.depth_map)}) == 1 and max(uses) == 1
    all_stay = encoder.num_layers - num_kept < min(uses)
    if not alike and not all_stay:
        raise ValueError("layers differ in size or share blocks: the size left depends on which ones data says are redundant")
    whole = Units.full(encoder)
    return slice_model_config(config, replace(whole, depths=whole.depths[:num_kept]))


def _angles(before: Tensor, after: Tensor) -> Tensor:
    """Angle between rows as a share of a half turn; by arctangent, which is exact for small angles as arccosine is not."""
    before, after = (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-30) for x in (before, after))
    return 2 / math.pi * torch.atan2((before - after).norm(dim=-1), (before + after).norm(dim=-1))


def _chosen(model: SpeechModel, settings: DepthPruning, calibration: Calibration | None, num_dropped: int) -> list[int]:
    if calibration is None:
        raise ValueError("layers are chosen by what they do to speech, but there is no calibration speech: name a corpus")
    was_training = model.training
    try:
        return _CHOICES[settings.choose](model.eval(), calibration.features, num_dropped)
    finally:
        model.train(was_training)


def _without(config: ModelConfig, dropped: Sequence[int]) -> Units:
    whole = Units.full(config.transformer)
    return replace(whole, depths=tuple(depth for depth in whole.depths if depth not in dropped))


def _num_kept(settings: DepthPruning, num_layers: int) -> int:
    num_kept = share_of(settings.keep, num_layers) if settings.keep is not None else settings.num_layers or 0
    if num_kept > num_layers:
        raise ValueError(f"num_layers is {num_kept}, but the model has {num_layers} layers; expected 1 to {num_layers}")
    return num_kept


def _greedy(model: SpeechModel, features: Sequence[Padded], num_dropped: int) -> list[int]:
    whole = Units.full(model.config.transformer)
    left, dropped = list(whole.depths), []
    for _ in range(num_dropped):
        with torch.no_grad():
            thinned = model_view(model, replace(whole, depths=tuple(left)))
        dropped.append(left.pop(_smallest(layer_angles(thinned, features))))
    return dropped


def _run(model: SpeechModel, features: Sequence[Padded], num_dropped: int) -> list[int]:
    if not num_dropped:
        return []
    first = _smallest(layer_angles(model, features, run=num_dropped))
    return list(range(first, first + num_dropped))


def _smallest(angles: Tensor) -> int:
    if not bool(torch.isfinite(angles).all()):
        raise ValueError("angles between layers are not finite: the model or its calibration features are broken")
    return int(angles.argmin())


def _size(block: BlockConfig) -> BlockConfig:
    """A block's description without what has no influence on its size."""
    return replace(block, attention_window=None, window_rule="band", head_ids=None)


_CHOICES = {"greedy": _greedy, "run": _run}
