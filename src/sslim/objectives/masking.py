"""Span masks over frames, drawn for a whole batch at once from a generator.

``edges="reference"`` has the semantics of fairseq's ``compute_mask_indices`` as MelHuBERT calls it: n spans start at distinct
frames of ``[0, T - length)``, so the last frame of an utterance is never masked and the first ones seldom.
``edges="reachable"`` lets spans start before the first frame and end after the last, so every frame is masked with the same
probability.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sslim.batch import valid_mask


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """How frames are masked.

    Attributes:
        probability: Expected ``spans * length / frames``; overlaps make the masked share smaller (``mask_prob``).
        span_length: Frames of a span (``mask_length``).
        length_distribution: ``static``; ``uniform`` in (length_other, 2 * span_length]; ``normal`` with standard deviation
            length_other, at least 1; ``poisson`` (``mask_selection``).
        length_other: Second parameter of the distribution (``mask_other``).
        min_spans: Spans that even the shortest utterance gets (``min_masks``).
        overlap: Whether spans may overlap (not ``no_mask_overlap``).
        min_space: Frames between spans that may not overlap (``mask_min_space``).
        edges: ``reachable`` or ``reference``, see the module's docstring.
        same_count: Unmask frames at random until all utterances of a batch have as many masked frames as the one with the
            fewest (``require_same_masks``, the published "oldmask" models). Masks then depend on the batch.
    """

    probability: float = 0.7
    span_length: int = 5
    length_distribution: Literal["static", "uniform", "normal", "poisson"] = "static"
    length_other: float = 0.0
    min_spans: int = 2
    overlap: bool = True
    min_space: int = 1
    edges: Literal["reachable", "reference"] = "reachable"
    same_count: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"mask probability {self.probability} is not between 0 and 1")
        if self.span_length < 1:
            raise ValueError(f"span_length {self.span_length} is not at least 1")


def _span_lengths(config: MaskingConfig, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    mean, other = config.span_length, config.length_other
    if config.length_distribution == "static":
        return torch.full(shape, mean)
    if config.length_distribution == "uniform":
        return torch.randint(int(other), 2 * mean + 1, shape, generator=generator)
    if config.length_distribution == "normal":
        return (torch.randn(shape, generator=generator) * other + mean).round().long().clamp(min=1)
    return torch.poisson(torch.full(shape, float(mean)), generator=generator).long()


def _smallest_n(scores: Tensor, n_B: Tensor) -> Tensor:
    """Returns bool of ``scores``' shape, True at the ``n_B[b]`` smallest scores of each row."""
    rank = scores.argsort(dim=1).argsort(dim=1)
    return rank < n_B[:, None]


def _mark(starts: Tensor, ends: Tensor, active: Tensor, num_frames: int) -> Tensor:
    """Returns (B, T) bool: the union of ``[start, end)`` over the active spans, clipped to the frames."""
    edges = torch.zeros(len(starts), num_frames + 1, dtype=torch.long)
    edges.scatter_add_(1, starts.clamp(0, num_frames), active.long())
    edges.scatter_add_(1, ends.clamp(0, num_frames), -active.long())
    return edges.cumsum(1)[:, :num_frames] > 0


def _overlapping(config: MaskingConfig, lengths_B: Tensor, n_B: Tensor, generator: torch.Generator) -> Tensor:
    max_n, num_frames = int(n_B.max()), int(lengths_B.max())
    spans_BN = _span_lengths(config, (len(lengths_B), max_n), generator)
    active_BN = torch.arange(max_n)[None, :] < n_B[:, None]
    if config.edges == "reference":
        shortest_B = spans_BN.masked_fill(~active_BN, num_frames + 1).amin(1)
        shortest_B = torch.where(lengths_B - shortest_B <= n_B, lengths_B - n_B - 1, shortest_B)
        first, candidates_B = 0, (lengths_B - shortest_B).clamp(min=1)
    else:
        first, candidates_B = 1 - config.span_length, lengths_B + config.span_length - 1
    width = int(candidates_B.max())
    scores = torch.rand(len(lengths_B), width, generator=generator).masked_fill(~valid_mask(candidates_B, width), 2.0)
    max_n = min(max_n, width)
    starts_BN = scores.topk(max_n, dim=1, largest=False).indices + first
    active_BN = active_BN[:, :max_n] & (torch.arange(max_n)[None, :] < candidates_B[:, None])
    ends_BN = starts_BN + spans_BN[:, :max_n]
    return _mark(starts_BN, ends_BN, active_BN & (ends_BN > 0), num_frames)


def _separate(config: MaskingConfig, lengths_B: Tensor, n_B: Tensor, generator: torch.Generator) -> Tensor:
    """Spans with a gap between them, uniform over all placements; spans that do not fit are dropped."""
    max_n, num_frames = int(n_B.max()), int(lengths_B.max())
    spans_BN = _span_lengths(config, (len(lengths_B), max_n), generator).clamp(min=1)
    needed_BN = (spans_BN + config.min_space).cumsum(1) - config.min_space
    active_BN = (torch.arange(max_n)[None, :] < n_B[:, None]) & (needed_BN <= lengths_B[:, None])
    count_B = active_BN.sum(1)
    used_B = torch.where(count_B > 0, needed_BN.gather(1, (count_B - 1).clamp(min=0)[:, None])[:, 0], 0)
    # Stars and bars: n sorted draws from the free frames, then each span is moved right by the spans before it.
    free_B = lengths_B - used_B
    draws = torch.rand(len(lengths_B), max_n, generator=generator).masked_fill(~active_BN, 2.0).sort(1).values
    offsets_BN = (draws.clamp(max=1.0) * (free_B[:, None] + 1)).long().clamp(max=free_B[:, None])
    before_BN = (spans_BN + config.min_space).cumsum(1) - (spans_BN + config.min_space)
    starts_BN = offsets_BN + before_BN
    return _mark(starts_BN, starts_BN + spans_BN, active_BN, num_frames)


def span_mask(lengths_B: Tensor, num_frames: int, config: MaskingConfig, generator: torch.Generator) -> Tensor:
    """Draws the mask of a padded batch.

    Args:
        lengths_B: (B,) real frames on the CPU.
        num_frames: Padded length T.
        config: How to mask.
        generator: CPU generator; the mask is a pure function of its state and the lengths.

    Returns:
        (B, T) bool, True where masked; never on padding.
    """
    mask_BT = torch.zeros(len(lengths_B), num_frames, dtype=torch.bool)
    if config.probability == 0.0 or int(lengths_B.max()) == 0:
        return mask_BT
    expected_B = config.probability * lengths_B / config.span_length
    n_B = (expected_B + torch.rand(len(lengths_B), generator=generator)).floor().long().clamp(min=config.min_spans)
    n_B = torch.minimum(n_B, lengths_B)
    place = _overlapping if config.overlap else _separate
    drawn = place(config, lengths_B, n_B, generator) & valid_mask(lengths_B, int(lengths_B.max()))
    if config.same_count:
        scores = torch.rand(drawn.shape, generator=generator).masked_fill(~drawn, 2.0)
        drawn = _smallest_n(scores, drawn.sum(1).min().expand(len(drawn))) & drawn
    mask_BT[:, : drawn.shape[1]] = drawn
    return mask_BT
