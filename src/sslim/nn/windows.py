"""Windowed attention in chunks: queries in runs, each with the keys that its windows reach, O(T * window) instead of O(T * T).

The result is that of the band mask (``attention_mask``) for every length, padding included; only the work differs. One
layer of 256 channels and 4 heads, 2 utterances, one CPU core, milliseconds with the band mask and in chunks: 300 frames and
a window of 32, 9.3 and 6.4 (with gradients 19 and 18); 750 frames and a window of 128, 32 and 25 (93 and 74); 3000 frames
and a window of 32, 399 and 70 (1170 and 172). Chunks of 32 to 256 queries differ little; below some twice as many frames as
a chunk has keys, the mask wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

WindowRule = Literal["band", "lighthubert"]  # lighthubert: see sslim.nn.reference_windows
MIN_CHUNK = 64  # queries in a chunk at least: shorter runs make the matrix products too small
MIN_GAIN = 2.0  # chunks are used where they compare this many times fewer pairs of frames than the band mask


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """How a padded batch of T frames is cut into C chunks.

    Attributes:
        size: Queries Q in a chunk.
        before: Keys before the first query of a chunk.
        after: Keys after its last query.
        num_frames: T.
        mask: (B * C, 1, Q, K) bool, True where a query may look at a key; K is before + Q + after.
    """

    size: int
    before: int
    after: int
    num_frames: int
    mask: Tensor

    @property
    def num_keys(self) -> int:
        return self.before + self.size + self.after

    @property
    def reach(self) -> int:
        """The largest distance between a query and a key of its chunk."""
        return self.size - 1 + max(self.before, self.after)

    @property
    def _padding(self) -> int:
        return -self.num_frames % self.size

    def queries(self, x_BTNH: Tensor) -> Tensor:
        """Cuts (B, T, N, H) into (B * C, Q, N, H); the last chunk is filled up with zeros."""
        padded = F.pad(x_BTNH, (0, 0, 0, 0, 0, self._padding))
        return padded.unflatten(1, (-1, self.size)).flatten(0, 1)

    def keys(self, x_BTNH: Tensor) -> Tensor:
        """Cuts (B, T, N, H) into overlapping (B * C, K, N, H)."""
        padded = F.pad(x_BTNH, (0, 0, 0, 0, self.before, self._padding + self.after))
        return padded.unfold(1, self.num_keys, self.size).movedim(-1, 2).flatten(0, 1)

    def join(self, x_BQNH: Tensor, batch: int) -> Tensor:
        """Puts (B * C, Q, N, H) together again as (B, T, N, H)."""
        return x_BQNH.unflatten(0, (batch, -1)).flatten(1, 2)[:, : self.num_frames]


def window_chunks(
    batch: int, lengths_B: Tensor | None, num_frames: int, *, causal: bool, window: int, device: torch.device
) -> Chunks:
    """Returns the chunks whose mask is the band of ``attention_mask``: a frame sees valid frames in its window, and itself.

    Args:
        batch: B.
        lengths_B: Valid frames of each row; None when nothing is padded.
        num_frames: Padded length T.
        causal: Whether a frame sees only itself and the frames before it.
        window: Frames seen on each side.
        device: Where to build the mask.
    """
    size = max(window, MIN_CHUNK)
    before, after = window, 0 if causal else window
    query_CQ1 = torch.arange(0, num_frames, size, device=device)[:, None, None] + torch.arange(size, device=device)[:, None]
    key_C1K = query_CQ1[:, :1] - before + torch.arange(before + size + after, device=device)
    distance_CQK = query_CQ1 - key_C1K
    near_CQK = (distance_CQK.abs() <= window) & ((distance_CQK >= 0) | (not causal)) & (key_C1K >= 0)
    # A causal mask needs no lengths: padding lies to the right of every valid query.
    end_B = torch.full((batch,), num_frames, device=device) if lengths_B is None or causal else lengths_B.clamp(min=1)
    real_BC1K = key_C1K < end_B[:, None, None, None]
    mask_BCQK = (near_CQK & real_BC1K) | (distance_CQK == 0)
    return Chunks(size=size, before=before, after=after, num_frames=num_frames, mask=mask_BCQK.flatten(0, 1)[:, None])


def chunks_are_faster(num_frames: int, *, causal: bool, window: int) -> bool:
    """Whether chunks beat the band mask for ``num_frames`` frames."""
    keys = max(window, MIN_CHUNK) + (1 if causal else 2) * window
    return num_frames >= MIN_GAIN * keys
