"""The one Transformer encoder: every block with its own widths, run in the order that ``depth_map`` gives.

Plain, pruned, low-rank, sliced, shared-layer and shallow models are all this class with another :class:`EncoderConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sslim.batch import EncoderOutput, zero_padding
from sslim.nn.attention import SelfAttention, attention_mask
from sslim.nn.dropout import dropout
from sslim.nn.linear import linear
from sslim.nn.positions import ConvPositions, ConvPositionsConfig, PositionsConfig, SinusoidPositions

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
        ranks: Rank of each linear map.
    """

    num_heads: int
    head_dim: int
    feedforward_dim: int
    attention_window: int | None = None
    ranks: LinearRanks = LinearRanks()


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
    """

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

    @property
    def num_layers(self) -> int:
        """Block applications N."""
        return len(self.depth_map)


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
        self.attention = self.feedforward = None
        if block.num_heads:
            ranks = (block.ranks.query, block.ranks.key, block.ranks.value, block.ranks.output)
            self.attention = SelfAttention(
                config.dim,
                block.num_heads,
                block.head_dim,
                dropout=config.attention_dropout,
                causal=config.causal,
                ranks=ranks,
            )
            self.attention_norm = nn.LayerNorm(config.dim, config.layer_norm_eps)
        if block.feedforward_dim:
            self.feedforward = FeedForward(config, block)
            self.feedforward_norm = nn.LayerNorm(config.dim, config.layer_norm_eps)

    def forward(self, x_BTD: Tensor, mask: Tensor | None, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        weights = None
        if self.attention is not None:
            residual = x_BTD
            x_BTD = self.attention_norm(x_BTD) if self.pre_norm else x_BTD
            x_BTD, weights = self.attention(x_BTD, mask, need_weights=need_weights)
            x_BTD = residual + dropout(x_BTD, self.dropout, self.training)
            x_BTD = x_BTD if self.pre_norm else self.attention_norm(x_BTD)
        if self.feedforward is not None:
            residual = x_BTD
            x_BTD = self.feedforward_norm(x_BTD) if self.pre_norm else x_BTD
            x_BTD = residual + dropout(self.feedforward(x_BTD), self.dropout, self.training)
            x_BTD = x_BTD if self.pre_norm else self.feedforward_norm(x_BTD)
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
            elif isinstance(module, ConvPositions):
                module.initialize(generator)
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
        mask_of = self._masks(x_BTD, lengths_B)
        x_BTD = self._enter(x_BTD, lengths_B)
        layers, attentions = [x_BTD], []
        for depth in self.config.depth_map:
            if self.training and self.config.layer_drop and torch.rand(()).item() < self.config.layer_drop:
                layers.append(x_BTD)
                continue
            block, mask = self.blocks[depth], mask_of[self.config.blocks[depth].attention_window]
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x_BTD, weights = checkpoint(block, x_BTD, mask, need_weights, use_reentrant=False)
            else:
                x_BTD, weights = block(x_BTD, mask, need_weights)
            layers.append(x_BTD)
            if weights is not None:
                attentions.append(weights)
        final = x_BTD if self.final_norm is None else self.final_norm(x_BTD)
        return self._leave(final, layers if keep_layers else [], attentions, lengths_B)

    def _masks(self, x_BTD: Tensor, lengths_B: Tensor | None) -> dict[int | None, Tensor | None]:
        windows = {block.attention_window for block in self.config.blocks}
        return {
            window: attention_mask(
                lengths_B,
                x_BTD.shape[1],
                causal=self.config.causal,
                window=window,
                device=x_BTD.device,
            )
            for window in windows
        }

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
