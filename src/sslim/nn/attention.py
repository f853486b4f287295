"""Multi-head self-attention whose number of heads and head width are free of the model's width.

Scaled dot-product attention runs in torch's fused kernel; the explicit form is used only when the weights are asked for.
Masks are boolean, True where a query may look at a key. A relative position bias is added to the scores beside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslim.batch import valid_mask
from sslim.nn.dropout import dropout
from sslim.nn.linear import linear
from sslim.nn.past import Continuation
from sslim.nn.reference_windows import ReferenceWindows
from sslim.nn.relative_positions import RelativeGate, by_query_and_key
from sslim.nn.windows import Chunks

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
        gate: Gates of a relative position bias; None without one.
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
        gate: RelativeGate | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.dropout, self.causal = dropout, causal
        inner_dim = num_heads * head_dim
        self.query = linear(dim, inner_dim, ranks[0])
        self.key = linear(dim, inner_dim, ranks[1])
        self.value = linear(dim, inner_dim, ranks[2])
        self.output = linear(inner_dim, dim, ranks[3])
        self.gate = gate

    def forward(
        self,
        x_BTD: Tensor,
        mask: Tensor | Chunks | ReferenceWindows | Continuation | None = None,
        distances_NR: Tensor | None = None,
        *,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends.

        Args:
            x_BTD: Input.
            mask: Which keys each query sees, broadcastable to (B, N, T, T), the chunks of windowed attention, LightHuBERT's
                windows (these without distances), or for a stream the past that x continues and is added to.
            distances_NR: What ``RelativePositions`` gives for a reach of at least T - 1, that of the chunks, or K - 1 for the K
                keys of a continuation.
            need_weights: Whether to return the weights; not with chunks, which have none for distant frames.

        Returns:
            The attended (B, T, D) and, when asked for, the weights (B, N, T, T).
        """
        if need_weights and isinstance(mask, Chunks):
            raise ValueError("chunked attention has no whole matrix of weights: give the mask instead of chunks")
        shape = (self.num_heads, self.head_dim)
        q_BTNH, k_BTNH, v_BTNH = (part(x_BTD).unflatten(-1, shape) for part in (self.query, self.key, self.value))
        if isinstance(mask, ReferenceWindows):
            kernel = partial(self._attend, bias=None, need_weights=need_weights)
            context_BTNH, weights = mask.attend([q_BTNH, k_BTNH, v_BTNH], kernel)
            return self.output(context_BTNH.flatten(-2)), weights
        bias = None if distances_NR is None else self._bias(x_BTD, distances_NR, mask)
        if isinstance(mask, Chunks):
            parts = [mask.queries(q_BTNH), mask.keys(k_BTNH), mask.keys(v_BTNH)]
            context_BTNH, weights = self._attend(parts, mask.mask, bias, need_weights=False)
            context_BTNH = mask.join(context_BTNH, len(x_BTD))
        elif isinstance(mask, Continuation):
            parts = [q_BTNH, *mask.past.extend(k_BTNH, v_BTNH)]
            context_BTNH, weights = self._attend(parts, mask.mask, bias, need_weights=need_weights)
        else:
            context_BTNH, weights = self._attend([q_BTNH, k_BTNH, v_BTNH], mask, bias, need_weights=need_weights)
        return self.output(context_BTNH.flatten(-2)), weights

    def _bias(self, x_BTD: Tensor, distances_NR: Tensor, mask: Tensor | Chunks | Continuation | None) -> Tensor:
        """Returns (B, N, T, T), for chunks (B * C, N, Q, K), for a continuation (B, N, T, K): the gated bias on the scores."""
        assert self.gate is not None
        gate_BTN, distances_NR = self.gate(x_BTD), self.gate.select(distances_NR)
        if isinstance(mask, Chunks):
            gate_BTN = mask.queries(gate_BTN[..., None]).squeeze(-1)
            bias_NQK = by_query_and_key(distances_NR, mask.size, mask.num_keys, mask.before)
        elif isinstance(mask, Continuation):
            bias_NQK = by_query_and_key(distances_NR, x_BTD.shape[1], mask.mask.shape[1], mask.before)
        else:
            bias_NQK = by_query_and_key(distances_NR, x_BTD.shape[1], x_BTD.shape[1], 0)
        return gate_BTN.transpose(1, 2)[..., None] * bias_NQK

    def _attend(
        self, parts: Sequence[Tensor], mask: Tensor | None, bias: Tensor | None, *, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values (B, T, N, H) to the context (B, T, N, H), and the weights when asked for."""
        q_BNTH, k_BNTH, v_BNTH = (part.transpose(1, 2) for part in parts)
        probability = self.dropout if self.training else 0.0
        explicit = need_weights or _explicit_is_faster(q_BNTH, probability)
        if mask is None and self.causal and (explicit or bias is not None):
            size = q_BNTH.shape[2]
            mask = torch.ones(size, size, dtype=torch.bool, device=q_BNTH.device).tril()
        if explicit:
            weights = self._weights(q_BNTH, k_BNTH, mask, bias)
            context_BNTH = dropout(weights, probability, self.training) @ v_BNTH
            return context_BNTH.transpose(1, 2), weights if need_weights else None
        causal = self.causal and mask is None
        if bias is not None:
            mask = (bias if mask is None else bias.masked_fill(~mask, float("-inf"))).to(q_BNTH.dtype)
        context_BNTH = F.scaled_dot_product_attention(
            q_BNTH, k_BNTH, v_BNTH, attn_mask=mask, dropout_p=probability, is_causal=causal
        )
        return context_BNTH.transpose(1, 2), None

    def _weights(self, q_BNTH: Tensor, k_BNTH: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        scores_BNTT = (q_BNTH / math.sqrt(self.head_dim)) @ k_BNTH.transpose(-1, -2)
        scores_BNTT = scores_BNTT if bias is None else scores_BNTT + bias
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
