"""Batches of unequal lengths without work on padding: rows of similar length are run together, and the results put in place.

On a CPU a row costs what its own frames cost, whether it shares a batch or not, so padding is pure loss there. On an
accelerator one large batch is usually faster, so batches stay whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sslim.batch import EncoderOutput

LEAST_SHARE = 0.9  # rows run together when the shortest has at least this share of the longest's length


def length_groups(lengths: list[int]) -> list[list[int]]:
    """Rows by falling length, cut wherever the next is shorter than ``LEAST_SHARE`` of its group's longest."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not groups or lengths[row] < LEAST_SHARE * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return groups


def is_worth_splitting(values: Tensor, lengths_B: Tensor) -> bool:
    """Whether a batch (B, T or S, ...) is on the CPU, without gradients, and has rows of clearly unequal length."""
    if values.device.type != "cpu" or torch.is_grad_enabled() or len(values) < 2:
        return False
    return int(lengths_B.min()) < LEAST_SHARE * values.shape[1]


def encode_in_groups(
    encode: Callable[[Tensor, Tensor], EncoderOutput], values: Tensor, lengths_B: Tensor, num_frames: int
) -> EncoderOutput:
    """Encodes groups of similar rows one after another.

    Args:
        encode: Waveforms or features and their lengths to an output.
        values: (B, S) or (B, T, F).
        lengths_B: Valid samples or frames.
        num_frames: Frames T of the whole padded batch.

    Returns:
        What ``encode`` would give for the whole batch, zero beyond each length; attention weights are left out.
    """
    whole: EncoderOutput | None = None
    for rows in length_groups(lengths_B.tolist()):
        part = encode(values[rows, : int(lengths_B[rows].max())], lengths_B[rows])
        if whole is None:
            whole = _room_for(part, len(values), num_frames)
        pairs = [(whole.final, part.final), (whole.embed, part.embed), *zip(whole.layers, part.layers, strict=True)]
        if part.layers and part.final is part.layers[-1]:
            pairs = pairs[1:]
        for target, source in pairs:
            if target is not None and source is not None:
                target[rows, : source.shape[1]] = source
        whole.lengths[rows] = part.lengths
    assert whole is not None
    return whole


def _room_for(part: EncoderOutput, batch: int, num_frames: int) -> EncoderOutput:
    def room(like: Tensor) -> Tensor:
        return like.new_zeros(batch, num_frames, like.shape[-1])

    layers = tuple(room(layer) for layer in part.layers)
    same = bool(part.layers) and part.final is part.layers[-1]
    return EncoderOutput(
        final=layers[-1] if same else room(part.final),
        lengths=part.lengths.new_zeros(batch),
        layers=layers,
        embed=None if part.embed is None else room(part.embed),
    )
