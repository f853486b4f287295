"""Long inputs cut into pieces that know nothing of each other, as S3PRL runs models trained on short ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sslim.batch import EncoderOutput


@dataclass(frozen=True, kw_only=True)
class ChunkingConfig:
    """How the reference cuts an input longer than those that the model was trained on.

    Attributes:
        max_frames: The longest input that it encodes as a whole (``task.sequence_length``, ``max_input_length``).
        compat: ``reference`` cuts longer ones as S3PRL does. None encodes every utterance as a whole.
    """

    max_frames: int
    compat: Literal["reference"] | None = None

    def __post_init__(self) -> None:
        if self.max_frames < 1:
            raise ValueError(f"max_frames is {self.max_frames}; it must be at least 1")


def chunk_spans(num_frames: int, max_frames: int) -> list[tuple[int, int]]:
    """Returns first and past-the-last frame of each chunk: as few as ``max_frames`` allows, all but the last equally long."""
    if num_frames <= max_frames:
        return [(0, num_frames)]
    count = -(-num_frames // max_frames)
    size = -(-num_frames // count)
    return [(start, min(start + size, num_frames)) for start in range(0, num_frames, size)]


def encode_in_chunks(
    encode: Callable[[Tensor, Tensor], EncoderOutput], x_BTD: Tensor, lengths_B: Tensor, max_frames: int
) -> EncoderOutput:
    """Encodes chunks one after another and joins the results; each begins at position 0 and sees itself alone.

    The padded batch is cut, not each utterance, so where the cuts lie depends on the longest one, as in the reference.

    Args:
        encode: Input of the encoder and valid frames to an output.
        x_BTD: (B, T, D).
        lengths_B: Valid frames.
        max_frames: The longest chunk.

    Returns:
        What ``encode`` gives, as for the whole; attention weights are zero between chunks.
    """
    spans = chunk_spans(x_BTD.shape[1], max_frames)
    parts = [encode(x_BTD[:, start:stop], (lengths_B - start).clamp(0, stop - start)) for start, stop in spans]
    layers = tuple(torch.cat(pieces, dim=1) for pieces in zip(*(part.layers for part in parts), strict=True))
    same = bool(layers) and parts[0].final is parts[0].layers[-1]
    weights = []
    for pieces in zip(*(part.attentions for part in parts), strict=True):
        whole = pieces[0].new_zeros(*pieces[0].shape[:2], x_BTD.shape[1], x_BTD.shape[1])
        for (start, stop), piece in zip(spans, pieces, strict=True):
            whole[..., start:stop, start:stop] = piece
        weights.append(whole)
    return EncoderOutput(
        final=layers[-1] if same else torch.cat([part.final for part in parts], dim=1),
        lengths=lengths_B,
        layers=layers,
        attentions=tuple(weights),
    )
