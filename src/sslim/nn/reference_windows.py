"""LightHuBERT's own sliding-window attention, faults included, for subnets whose description asks for it (``slide_wsz``).

This reproduces a faulty implementation on purpose: a net trained with it was trained with exactly these faults, so another
rule would load its file and compute something else. Nothing but ``BlockConfig.window_rule == "lighthubert"`` leads here, and
reading a LightHuBERT subnet dictionary with ``slide_wsz`` is what sets it. New models use the rule ``band``: a frame sees the
frames at most ``window`` away, at every length, with padding (``attention_mask``, ``sslim.nn.windows``).

The rule, for an utterance of T frames and w = ``slide_wsz`` = 2 * window:

1. If T is odd, a frame of zeros follows the last one before the first layer (``required_seq_len_multiple`` 2). It runs through
   every layer, windowed or not, as a query; as a key it is masked. T is even from here on.
2. If T is a multiple of w, the queries and keys, which lie in memory as (frame, head, channel), are read as if they lay as
   (head, frame, channel). Position i of head n is thus piece n * T + i of the pieces of H numbers in which frames and heads
   lie, which belongs to frame (n * T + i) // N and head (n * T + i) % N. Values are read rightly. A net of one head is spared.
   So heads are not independent: taking one away changes what the others see.
3. If T is not a multiple of w, queries, keys and values get zeros on the left up to the next multiple of w, and these zero keys
   are not masked: the first ``window`` frames share their attention with zeros. Nothing is misread, as padding makes a copy.
4. Position i attends to the positions at most ``window`` away; the key of the frame from 1 is masked at its position T - 1.

Source: LightHuBERT (``SlidingAttention``, its ``stride`` mode), compared with outputs of the reference in
``tests/parity/test_lighthubert.py``: 2 with even T, 3 with even T and with the frame of 1. For odd T with T + 1 a multiple of
w, 1 and 2 together follow from how each was found to work; no output was at hand to compare.

Of a batch, the reference applies the first row's padding to all, and a window of nothing but padding makes NaN of its whole
utterance. That is not kept: each row is what it would be alone, cut to its valid frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sslim.batch import zero_padding


class Kernel(Protocol):
    """Attends with queries, keys and values (B, T, N, H) under a mask: the context (B, T, N, H), and the weights if wanted."""

    def __call__(self, parts: Sequence[Tensor], mask: Tensor | None, /) -> tuple[Tensor, Tensor | None]: ...


def with_even_frames(x_BTD: Tensor, lengths_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """Makes room for the frame of zeros after each row of odd length.

    Args:
        x_BTD: Input of the first layer.
        lengths_B: Valid frames; None when nothing is padded.

    Returns:
        The input with zeros for padding, T rounded up to an even number (2 for an input without frames), and the valid frames,
        which stay as they are.
    """
    batch, num_frames, _ = x_BTD.shape
    if lengths_B is None:
        lengths_B = torch.full((batch,), num_frames, device=x_BTD.device)
    missing = num_frames % 2 if num_frames else 2
    return F.pad(zero_padding(x_BTD, lengths_B), (0, 0, 0, missing)), lengths_B


def reference_shape(num_frames: int, window: int) -> tuple[int, int]:
    """Returns how many frames query, and how many zero keys stand before them, in an utterance of ``num_frames``."""
    even = num_frames + num_frames % 2
    return even, -even % (2 * window)


@dataclass(frozen=True, kw_only=True)
class ReferenceWindows:
    """What :class:`~sslim.nn.attention.SelfAttention` takes in place of a mask to attend as LightHuBERT's windows do.

    Attributes:
        window: Frames on each side, half of ``slide_wsz``; at least 1.
        lengths: Valid frames of each row of the batch.
    """

    window: int
    lengths: tuple[int, ...]

    def attend(self, parts: Sequence[Tensor], kernel: Kernel) -> tuple[Tensor, Tensor | None]:
        """Attends row by row.

        Args:
            parts: Queries, keys and values (B, T, N, H); T has room for the frame that makes a row's length even.
            kernel: Attention under a mask.

        Returns:
            The context (B, T, N, H), zero at padding, and the weights (B, N, T, T) if the kernel gives them. Their rows and
            columns are the positions of the rule; rows that see zero keys on the left sum to less than 1.
        """
        rows = [self._row([part[b : b + 1] for part in parts], length, kernel) for b, length in enumerate(self.lengths)]
        weights = [weights for _, weights in rows if weights is not None]
        return torch.cat([context for context, _ in rows]), torch.cat(weights) if weights else None

    def _row(self, parts: Sequence[Tensor], length: int, kernel: Kernel) -> tuple[Tensor, Tensor | None]:
        num_frames, device = parts[0].shape[1], parts[0].device
        # An utterance without frames is computed as one of zeros, so that it is as wide as the others and has no NaN.
        even, before = reference_shape(max(length, 1), self.window)
        q_BTNH, k_BTNH, v_BTNH = (part[:, :even] for part in parts)
        if before:
            k_BTNH, v_BTNH = (F.pad(part, (0, 0, 0, 0, before, 0)) for part in (k_BTNH, v_BTNH))
        else:
            q_BTNH, k_BTNH = _misread(q_BTNH), _misread(k_BTNH)
        query_T1 = torch.arange(even, device=device)[:, None]
        key_K = torch.arange(-before, even, device=device)
        seen_TK = ((query_T1 - key_K).abs() <= self.window) & (key_K < max(length, 1))
        context_BTNH, weights = kernel([q_BTNH, k_BTNH, v_BTNH], seen_TK[None, None])
        missing = num_frames - even
        weights = None if weights is None else F.pad(weights[..., before:], (0, missing, 0, missing))
        return F.pad(context_BTNH, (0, 0, 0, 0, 0, missing)), weights


def _misread(x_BTNH: Tensor) -> Tensor:
    """Reads what lies as (frame, head, channel) as (head, frame, channel): the reference's fault, see the module."""
    batch, num_frames, num_heads, head_dim = x_BTNH.shape
    return x_BTNH.reshape(batch, num_heads, num_frames, head_dim).transpose(1, 2)
