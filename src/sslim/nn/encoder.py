"""The one Transformer encoder: every block with its own widths, run in the order that ``depth_map`` gives.

Plain, pruned, low-rank, sliced, shared-layer and shallow models are all this class with another :class:`EncoderConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sslim.batch import EncoderOutput, zero_padding
from sslim.config import OMIT_DEFAULT
from sslim.nn.attention import SelfAttention, attention_mask
from sslim.nn.dropout import dropout
from sslim.nn.linear import linear
from sslim.nn.past import Continuation
from sslim.nn.positions import ConvPositions, ConvPositionsConfig, PositionsConfig, SinusoidPositions
from sslim.nn.reference_windows import ReferenceWindows, with_even_frames
from sslim.nn.relative_positions import RelativeGate, RelativePositions, RelativePositionsConfig
from sslim.nn.windows import Chunks, WindowRule, chunks_are_faster, window_chunks

Seen = Tensor | Chunks | ReferenceWindows | Continuation | None  # what the queries of a block may look at

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # the exact one, with erf
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


@dataclass(frozen=True, kw_only=True)
class LinearRanks:
    """Rank of each linear map of a block; None is a whole matrix."""

    query: int | None = None
    key: int | None = None
    value: int | None = None
    output: int | None = None
    up: int | None = None
    down: int | None = None


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Widths of one block.

    Attributes:
        num_heads: Attention heads; 0 leaves attention (and its norm) out.
        head_dim: Width of each head.
        feedforward_dim: Hidden units; 0 leaves the feed-forward part (and its norm) out.
        attention_window: Frames seen on each side; None for all.
        window_rule: ``band``: exactly those frames, for all new models. ``lighthubert``: what LightHuBERT's code computes
            instead, faults included, to run nets that were trained with it (``sslim.nn.reference_windows``); not with causal
            encoders or relative positions. Without a window the rule means nothing.
        ranks: Rank of each linear map.
        head_ids: With relative positions, which of the table's heads these are, counted from 0; None for the first ones.
        keep_norms: Whether the norm of a part that is left out stays (DPHuBERT); for post-norm encoders only.
    """

    num_heads: int
    head_dim: int
    feedforward_dim: int
    attention_window: int | None = None
    window_rule: WindowRule = "band"
    ranks: LinearRanks = LinearRanks()
    head_ids: tuple[int, ...] | None = None
    keep_norms: bool = False

    @property
    def has_reference_windows(self) -> bool:
        """Whether the block attends as LightHuBERT's windows do, not to the exact band."""
        return self.attention_window is not None and self.window_rule == "lighthubert"


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Description of an encoder.

    Attributes:
        dim: Model width D.
        blocks: The distinct blocks.
        depth_map: Which block runs at each depth, counted from 0: ``(0, 1) * 6`` is a shared stack.
        positions: Position encoding added to the input.
        norm_placement: ``post`` (original Transformer) or ``pre`` (norm before each sub-block).
        input_norm: Whether a norm follows the positions, before the first block.
        final_norm: Whether a norm follows the last block.
        layer_norm_eps: Epsilon of every layer norm.
        activation: One of ``ACTIVATIONS``.
        causal: Whether attention sees the past only; convolutional positions must be causal too.
        dropout: After the positions, attention and feed-forward.
        attention_dropout: On attention weights.
        activation_dropout: After the activation.
        layer_drop: Probability of skipping a block application while training.
        relative_positions: Gated relative position bias of WavLM on the attention scores; None without.
    """

    kind: Literal["transformer"] = field(default="transformer", metadata={OMIT_DEFAULT: True})  # the only one in older files
    dim: int
    blocks: tuple[BlockConfig, ...]
    depth_map: tuple[int, ...]
    positions: PositionsConfig | None = ConvPositionsConfig()
    norm_placement: Literal["post", "pre"] = "post"
    input_norm: bool = True
    final_norm: bool = False
    layer_norm_eps: float = 1e-5
    activation: Literal["gelu", "gelu_tanh", "relu", "swish", "tanh", "linear"] = "gelu"
    causal: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    layer_drop: float = 0.0
    relative_positions: RelativePositionsConfig | None = None

    def __post_init__(self) -> None:
        for index in self.depth_map:
            if not 0 <= index < len(self.blocks):
                raise ValueError(f"depth_map names block {index}, but there are {len(self.blocks)} blocks (counted from 0)")
        positions = self.positions
        if isinstance(positions, ConvPositionsConfig):
            if self.dim % positions.groups:
                raise ValueError(f"dim {self.dim} is not divisible by the {positions.groups} groups of the positions")
            if self.causal and not positions.causal:
                raise ValueError("a causal encoder needs causal positions: the convolution would look ahead")
        for number, block in enumerate(self.blocks):
            self._check_block(number, block)

    def _check_block(self, number: int, block: BlockConfig) -> None:
        if block.keep_norms and self.norm_placement == "pre":
            raise ValueError(f"block {number} keeps the norms of missing parts, which a pre-norm encoder has no use for")
        if block.attention_window is not None and block.attention_window < 0:
            raise ValueError(f"attention_window of block {number} is {block.attention_window}, expected 0 or more frames")
        if block.has_reference_windows:
            self._check_reference_windows(number, block)
        relative = self.relative_positions
        if relative is None:
            if block.head_ids is not None:
                raise ValueError(f"block {number} has head_ids, which only relative positions give a meaning")
            return
        if block.num_heads and relative.num_heads * block.head_dim != self.dim:
            raise ValueError(
                f"relative positions of {relative.num_heads} heads of width {block.head_dim} (block {number}) need "
                f"dim {relative.num_heads * block.head_dim}, not {self.dim}"
            )
        ids = original_heads(block)
        if len(ids) != block.num_heads or len(set(ids)) != len(ids) or not set(ids) <= set(range(relative.num_heads)):
            raise ValueError(
                f"head_ids of block {number} are {list(ids)}, expected {block.num_heads} distinct numbers "
                f"from 0 to {relative.num_heads - 1}"
            )

    def _check_reference_windows(self, number: int, block: BlockConfig) -> None:
        if block.attention_window == 0:
            raise ValueError(
                f"attention_window of block {number} is 0, expected 1 or more frames with window_rule 'lighthubert'"
            )
        if self.causal or self.relative_positions is not None:
            what = "a causal encoder" if self.causal else "an encoder with relative positions"
            raise ValueError(f"window_rule of block {number} is 'lighthubert', which {what} cannot have; expected 'band'")

    @property
    def has_reference_windows(self) -> bool:
        """Whether any block attends as LightHuBERT's windows do."""
        return any(block.has_reference_windows for block in self.blocks)

    @property
    def num_layers(self) -> int:
        """Block applications N."""
        return len(self.depth_map)

    @property
    def input_dim(self) -> int:
        """Width of the frames that enter: the model's."""
        return self.dim

    @property
    def layer_dims(self) -> tuple[int, ...]:
        """Widths of the N + 1 layers."""
        return (self.dim,) * (self.num_layers + 1)


def original_heads(block: BlockConfig) -> tuple[int, ...]:
    """Returns the numbers that a block's heads had before any were pruned, as far as its description knows them."""
    return tuple(range(block.num_heads)) if block.head_ids is None else block.head_ids


class Depths(TypedDict):
    """The two fields of :class:`EncoderConfig` that say which blocks there are and in which order they run."""

    blocks: tuple[BlockConfig, ...]
    depth_map: tuple[int, ...]


def plain_blocks(num_layers: int, num_heads: int, head_dim: int, feedforward_dim: int) -> Depths:
    """Returns ``blocks`` and ``depth_map`` of an ordinary encoder of equal, unshared blocks."""
    block = BlockConfig(num_heads=num_heads, head_dim=head_dim, feedforward_dim=feedforward_dim)
    return {"blocks": (block,) * num_layers, "depth_map": tuple(range(num_layers))}


class FeedForward(nn.Module):
    """``down(act(up(x)))`` (``fc1`` and ``fc2`` in fairseq)."""

    def __init__(self, config: EncoderConfig, block: BlockConfig) -> None:
        super().__init__()
        self.up = linear(config.dim, block.feedforward_dim, block.ranks.up)
        self.down = linear(block.feedforward_dim, config.dim, block.ranks.down)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = config.activation_dropout

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(dropout(self.activation(self.up(x_BTD)), self.dropout, self.training))


class Block(nn.Module):
    """Attention and feed-forward, each with a residual and a norm after (post) or before (pre) it."""

    def __init__(self, config: EncoderConfig, block: BlockConfig) -> None:
        super().__init__()
        self.pre_norm, self.dropout = config.norm_placement == "pre", config.dropout
        self.attention: SelfAttention | None = None
        self.feedforward: FeedForward | None = None
        if block.num_heads:
            ranks = (block.ranks.query, block.ranks.key, block.ranks.value, block.ranks.output)
            relative = config.relative_positions
            gate = None if relative is None else RelativeGate(relative.num_heads, block.head_dim, original_heads(block))
            self.attention = SelfAttention(
                config.dim,
                block.num_heads,
                block.head_dim,
                dropout=config.attention_dropout,
                causal=config.causal,
                ranks=ranks,
                gate=gate,
            )
        if block.feedforward_dim:
            self.feedforward = FeedForward(config, block)
        self.attention_norm: nn.LayerNorm | None = None
        self.feedforward_norm: nn.LayerNorm | None = None
        if block.num_heads or block.keep_norms:
            self.attention_norm = nn.LayerNorm(config.dim, config.layer_norm_eps)
        if block.feedforward_dim or block.keep_norms:
            self.feedforward_norm = nn.LayerNorm(config.dim, config.layer_norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        mask: Seen = None,
        distances_NR: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        weights, before, after = None, self.pre_norm, not self.pre_norm
        if self.attention is not None:
            residual = x_BTD
            x_BTD = self.attention_norm(x_BTD) if before else x_BTD  # type: ignore[misc]
            x_BTD, weights = self.attention(x_BTD, mask, distances_NR, need_weights=need_weights)
            x_BTD = residual + dropout(x_BTD, self.dropout, self.training)
        if after and self.attention_norm is not None:
            x_BTD = self.attention_norm(x_BTD)
        if self.feedforward is not None:
            residual = x_BTD
            x_BTD = self.feedforward_norm(x_BTD) if before else x_BTD  # type: ignore[misc]
            x_BTD = residual + dropout(self.feedforward(x_BTD), self.dropout, self.training)
        if after and self.feedforward_norm is not None:
            x_BTD = self.feedforward_norm(x_BTD)
        return x_BTD, weights


class Encoder(nn.Module):
    """Positions, then blocks in the order of ``config.depth_map``."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.positions: ConvPositions | SinusoidPositions | None = None
        if config.positions is not None:
            conv = isinstance(config.positions, ConvPositionsConfig)
            self.positions = ConvPositions(config.dim, config.positions) if conv else SinusoidPositions(config.dim)  # type: ignore[arg-type]
        self.input_norm = nn.LayerNorm(config.dim, config.layer_norm_eps) if config.input_norm else None
        self.relative_positions: RelativePositions | None = None
        if config.relative_positions is not None:
            self.relative_positions = RelativePositions(config.relative_positions)
        self.blocks = nn.ModuleList(Block(config, block) for block in config.blocks)
        self.final_norm = nn.LayerNorm(config.dim, config.layer_norm_eps) if config.final_norm else None
        self.gradient_checkpointing = False

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """BERT initialisation: linear weights N(0, 0.02), biases zero, norms one and zero; positions their own."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ConvPositions | RelativePositions):
                module.initialize(generator)
            elif isinstance(module, RelativeGate):
                nn.init.ones_(module.scale)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(
        self, x_BTD: Tensor, lengths_B: Tensor | None = None, *, keep_layers: bool = False, need_weights: bool = False
    ) -> EncoderOutput:
        """Encodes a padded batch.

        Args:
            x_BTD: Output of the input projection.
            lengths_B: Valid frames; None when nothing is padded.
            keep_layers: Whether to return every layer, not the final output alone.
            need_weights: Whether to return attention weights (slower: the fused kernel cannot give them).
        """
        num_frames = x_BTD.shape[1]
        x_BTD = self._enter(x_BTD, lengths_B)
        if self.config.has_reference_windows:
            x_BTD, lengths_B = with_even_frames(x_BTD, lengths_B)
        mask_of = self._masks(x_BTD, lengths_B, need_weights)
        distances_NR = self._distances(x_BTD, mask_of)
        layers, attentions = [x_BTD], []
        for depth in self.config.depth_map:
            if self.training and self.config.layer_drop and torch.rand(()).item() < self.config.layer_drop:
                layers.append(x_BTD)
                continue
            described, block = self.config.blocks[depth], self.blocks[depth]
            mask = mask_of[described.attention_window, described.window_rule]
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x_BTD, weights = checkpoint(block, x_BTD, mask, distances_NR, need_weights, use_reentrant=False)
            else:
                x_BTD, weights = block(x_BTD, mask, distances_NR, need_weights)
            layers.append(x_BTD)
            if weights is not None:
                attentions.append(weights)
        final = x_BTD if self.final_norm is None else self.final_norm(x_BTD)
        if x_BTD.shape[1] > num_frames:
            final, layers = final[:, :num_frames], [layer[:, :num_frames] for layer in layers]
            attentions = [weights[..., :num_frames, :num_frames] for weights in attentions]
        return self._leave(final, layers if keep_layers else [], attentions, lengths_B)

    def _masks(self, x_BTD: Tensor, lengths_B: Tensor | None, need_weights: bool) -> dict[tuple[int | None, WindowRule], Seen]:
        """What each distinct window may see: a mask, or chunks where they are less work and no weights are asked for."""
        (batch, num_frames, _), causal = x_BTD.shape, self.config.causal
        masks: dict[tuple[int | None, WindowRule], Seen] = {}
        for window, rule in {(block.attention_window, block.window_rule) for block in self.config.blocks}:
            options: Any = {"causal": causal, "window": window, "device": x_BTD.device}
            if window is not None and rule == "lighthubert":
                assert lengths_B is not None  # with_even_frames gives them
                masks[window, rule] = ReferenceWindows(window=window, lengths=tuple(lengths_B.tolist()))
            elif window is not None and not need_weights and chunks_are_faster(num_frames, causal=causal, window=window):
                masks[window, rule] = window_chunks(batch, lengths_B, num_frames, **options)
            else:
                masks[window, rule] = attention_mask(lengths_B, num_frames, **options)
        return masks

    def _distances(self, x_BTD: Tensor, masks: Mapping[Any, Seen]) -> Tensor | None:
        """The shared table spread over every distance that a mask or a chunk has (N, R); None without relative positions."""
        if self.relative_positions is None:
            return None
        reaches = (mask.reach for mask in masks.values() if isinstance(mask, Chunks))
        return self.relative_positions(max(x_BTD.shape[1] - 1, *reaches, 0))

    def _enter(self, x_BTD: Tensor, lengths_B: Tensor | None) -> Tensor:
        x_BTD = x_BTD if lengths_B is None else zero_padding(x_BTD, lengths_B)
        x_BTD = x_BTD if self.positions is None else self.positions(x_BTD)
        x_BTD = x_BTD if self.input_norm is None else self.input_norm(x_BTD)
        return dropout(x_BTD, self.config.dropout, self.training)

    def _leave(self, final: Tensor, layers: list[Tensor], attentions: list[Tensor], lengths_B: Tensor | None) -> EncoderOutput:
        if lengths_B is None:
            lengths_B = torch.full((final.shape[0],), final.shape[1], dtype=torch.long, device=final.device)
            return EncoderOutput(final=final, layers=tuple(layers), lengths=lengths_B, attentions=tuple(attentions))
        layers = [zero_padding(layer, lengths_B) for layer in layers]
        final = layers[-1] if layers and self.final_norm is None else zero_padding(final, lengths_B)
        return EncoderOutput(final=final, layers=tuple(layers), lengths=lengths_B, attentions=tuple(attentions))
