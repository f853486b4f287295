"""Alignments laid over frames: which phone (or other symbol) a frame belongs to.

A frame belongs to the segment that its centre falls into.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sslim.audio import stack_reach
from sslim.data.sources import Segment
from sslim.frontends.config import (
    ConvFrontendConfig,
    FilterbankConfig,
    FrontendConfig,
    StftConfig,
    StftMfccConfig,
    StoredFeaturesConfig,
)

NO_SEGMENT = -1
ROUNDING_S = (
    1e-7  # far below a sample; so that a centre on a boundary belongs to what begins there, whatever float64 makes of it
)


def frame_length_s(config: FrontendConfig) -> float:
    """Returns the seconds of sound that a frame of the front-end's output sees, counted from the start of its shift.

    With ``snip_edges`` frame t sees t shifts to t shifts + window, and a stacked one from its first window's start to its last
    one's end. Without, windows are centred on their shifts, so a frame stands for its shifts alone. A frame of a centred
    transform stands for the very moment that its shift starts with: no seconds at all, unless several are stacked.
    """
    if isinstance(config, ConvFrontendConfig):
        return stack_reach([(layer.kernel, layer.stride) for layer in config.layers])[0] / config.sample_rate
    features = config.features
    if isinstance(features, StftMfccConfig):
        features = features.spectrum
    if isinstance(features, StftConfig) or (isinstance(features, StoredFeaturesConfig) and features.centred):
        return features.frame_shift_ms * (config.stack - 1) / 1000
    if isinstance(features, StoredFeaturesConfig):
        return (features.frame_shift_ms * (config.stack - 1) + features.frame_length_ms) / 1000
    bank = features if isinstance(features, FilterbankConfig) else features.filterbank
    if not bank.snip_edges:
        return bank.frame_shift_ms * config.stack / 1000
    return (bank.frame_shift_ms * (config.stack - 1) + bank.frame_length_ms) / 1000


def frame_segments(
    alignment: Sequence[Segment], num_frames: int, frame_shift_s: float, frame_length_s: float | None = None
) -> np.ndarray:
    """Finds the segment of every frame.

    Args:
        alignment: Segments in any order; where two overlap, the one that starts later counts.
        num_frames: T.
        frame_shift_s: Seconds from one frame to the next.
        frame_length_s: Seconds that a frame sees from there on; None for the shift itself.

    Returns:
        (T,) int64 index into ``alignment``, ``NO_SEGMENT`` where there is none.

    Raises:
        ValueError: A segment ends before it starts.
    """
    for segment in alignment:
        if not segment.end_s >= segment.start_s:
            raise ValueError(
                f"segment {segment.symbol!r} ends at {segment.end_s:g} s, before its start at {segment.start_s:g} s"
            )
    if not alignment:
        return np.full(num_frames, NO_SEGMENT, dtype=np.int64)
    order = np.argsort([segment.start_s for segment in alignment], kind="stable")
    starts_s = np.array([alignment[i].start_s for i in order])
    ends_s = np.array([alignment[i].end_s for i in order])
    length_s = frame_shift_s if frame_length_s is None else frame_length_s
    centres_s = np.arange(num_frames) * frame_shift_s + length_s / 2 + ROUNDING_S
    places = np.searchsorted(starts_s, centres_s, side="right") - 1
    inside = (places >= 0) & (centres_s < ends_s[places])
    return np.where(inside, order[places], NO_SEGMENT).astype(np.int64)


def frame_symbols(
    alignment: Sequence[Segment], num_frames: int, frame_shift_s: float, frame_length_s: float | None = None
) -> list[str | None]:
    """Returns the symbol of every frame, None where there is no segment; arguments and errors as for :func:`frame_segments`."""
    segments = frame_segments(alignment, num_frames, frame_shift_s, frame_length_s)
    return [None if i == NO_SEGMENT else alignment[i].symbol for i in segments.tolist()]
