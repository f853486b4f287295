"""Multi-head self-attention whose number of heads and head width are free of the model's width.

Scaled dot-product attention runs in torch's fused kernel; the explicit form is used only when the weights are asked for.
Masks are boolean, True where a query may look at a key.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslim.batch import valid_mask
from sslim.nn.dropout import dropout
from sslim.nn.linear import linear

MAX_EXPLICIT_FRAMES = 512


def attention_mask(
    lengths_B: Tensor | None, num_frames: int, *, causal: bool, window: int | None, device: torch.device
) -> Tensor | None:
    """Builds the mask that :class:`SelfAttention` takes, broadcastable to (B, N, T, T), or None where all may be seen.

    A frame always sees itself, so no row is empty, padding included. With ``causal`` alone no padding mask is needed:
    padding lies to the right of every valid query, and the fused kernel has a causal mode (see ``SelfAttention``).

    Args:
        lengths_B: Valid frames of each row; None when nothing is padded.
        num_frames: Padded length T.
        causal: Whether a frame sees only itself and the frames before it.
        window: Frames seen on each side; None for all.
        device: Where to build it.
    """
    mask = None
    if lengths_B is not None and not causal:
        mask = valid_mask(lengths_B.clamp(min=1), num_frames)[:, None, None, :]
    if window is None:
        return mask
    t = torch.arange(num_frames, device=device)
    distance_TT = t[:, None] - t[None, :]
    near_TT = (distance_TT.abs() <= window) & ((distance_TT >= 0) | (not causal))
    return near_TT[None, None] if mask is None else (near_TT & mask) | (distance_TT == 0)


class SelfAttention(nn.Module):
    """Self-attention with biased query, key, value and output maps (``self_attn`` in fairseq).

    Args:
        dim: Model width D.
        num_heads: N. Zero is not accepted: a block without attention has no ``SelfAttention`` at all.
        head_dim: H. ``num_heads * head_dim`` need not equal ``dim``.
        dropout: Probability on attention weights while training.
        causal: Whether frames see only the past; the fused kernel's own causal mode is used when no mask is given.
        ranks: Rank of the query, key, value and output maps; None for whole matrices.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        *,
        dropout: float = 0.0,
        causal: bool = False,
        ranks: tuple[int | None, int | None, int | None, int | None] = (None, None, None, None),
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.dropout, self.causal = dropout, causal
        inner_dim = num_heads * head_dim
        self.query = linear(dim, inner_dim, ranks[0])
        self.key = linear(dim, inner_dim, ranks[1])
        self.value = linear(dim, inner_dim, ranks[2])
        self.output = linear(inner_dim, dim, ranks[3])

    def forward(self, x_BTD: Tensor, mask: Tensor | None = None, *, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Returns the attended (B, T, D) and, when asked for, the weights (B, N, T, T)."""
        batch, num_frames, _ = x_BTD.shape
        shape = (batch, num_frames, self.num_heads, self.head_dim)
        q_BNTH = self.query(x_BTD).view(shape).transpose(1, 2)
        k_BNTH = self.key(x_BTD).view(shape).transpose(1, 2)
        v_BNTH = self.value(x_BTD).view(shape).transpose(1, 2)
        weights = None
        probability = self.dropout if self.training else 0.0
        if need_weights or _explicit_is_faster(q_BNTH, probability):
            weights = self._weights(q_BNTH, k_BNTH, mask)
            context_BNTH = dropout(weights, probability, self.training) @ v_BNTH
        else:
            context_BNTH = F.scaled_dot_product_attention(
                q_BNTH, k_BNTH, v_BNTH, attn_mask=mask, dropout_p=probability, is_causal=self.causal and mask is None
            )
        context_BTD = context_BNTH.transpose(1, 2).reshape(batch, num_frames, self.num_heads * self.head_dim)
        return self.output(context_BTD), weights if need_weights else None

    def _weights(self, q_BNTH: Tensor, k_BNTH: Tensor, mask: Tensor | None) -> Tensor:
        scores_BNTT = (q_BNTH / math.sqrt(self.head_dim)) @ k_BNTH.transpose(-1, -2)
        if mask is None and self.causal:
            size = scores_BNTT.shape[-1]
            mask = torch.ones(size, size, dtype=torch.bool, device=scores_BNTT.device).tril()
        if mask is not None:
            scores_BNTT = scores_BNTT.masked_fill(~mask, float("-inf"))
        return scores_BNTT.softmax(-1).to(q_BNTH.dtype)


def _explicit_is_faster(q_BNTH: Tensor, probability: float) -> bool:
    """Where torch's fused kernel is not the best one: on a CPU.

    With dropout it falls back to explicit weights and a slow mask; in bf16 on short inputs two matrix products beat it
    (375 frames: 10 against 14 ms a layer; 750 frames: 80 against 63).
    """
    if q_BNTH.device.type != "cpu":
        return False
    return probability > 0.0 or (q_BNTH.dtype == torch.bfloat16 and q_BNTH.shape[2] <= MAX_EXPLICIT_FRAMES)
