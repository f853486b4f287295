"""Convolutions over frames whose output does not see the frame it stands for: the encoder of non-autoregressive coding.

Liu, Chung and Glass, "Non-Autoregressive Predictive Coding for Learning Speech Representations from Local Dependencies" (arXiv
2011.00406, section 2): a stack of convolution blocks, and from the output of every block a convolution whose middle taps are
hidden. Block k reaches k frames to each side, and so the hidden middle grows by one frame on each side from block to block: no
path leads from the frames around t, ``mask`` of them, to the sum of these convolutions at t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslim.batch import EncoderOutput, valid_mask, zero_padding
from sslim.nn.dropout import dropout
from sslim.nn.quantizer import Quantizer, QuantizerConfig
from sslim.nn.recurrent import ended

BLOCK_KERNEL = 3  # taps of a block's convolution; one frame more on each side for every block
MOMENTUM, EPS = 0.1, 1e-5  # of batch norms


@dataclass(frozen=True, kw_only=True)
class ConvEncoderConfig:
    """Description of NPC's convolutions.

    Attributes:
        input_dim: Width of the frames that enter.
        dim: Channels D of everything after.
        num_blocks: Convolution blocks, each with a masked convolution over its output.
        kernel: Taps of the masked convolutions, odd.
        mask: Frames of the input around t that the output at t does not depend on, odd.
        batch_norm: Whether blocks have batch norms.
        residual: Whether a block's input is added to its output, in all blocks but the first.
        activation: Of the blocks; that of the masked convolutions is tanh.
        dropout: In the blocks.
        quantizer: What quantises the sum of the masked convolutions on its way to the heads; None for nothing.
    """

    kind: Literal["convolutional"] = "convolutional"
    input_dim: int
    dim: int = 512
    num_blocks: int = 4
    kernel: int = 15
    mask: int = 5
    batch_norm: bool = True
    residual: bool = True
    activation: Literal["relu", "tanh"] = "relu"
    dropout: float = 0.1
    quantizer: QuantizerConfig | None = None

    def __post_init__(self) -> None:
        if min(self.input_dim, self.dim, self.num_blocks) < 1:
            raise ValueError(f"input_dim {self.input_dim}, dim {self.dim} and num_blocks {self.num_blocks} must be at least 1")
        if self.kernel % 2 == 0 or self.mask % 2 == 0 or self.mask < 1 or self.mask + 2 * self.num_blocks >= self.kernel:
            raise ValueError(
                f"kernel {self.kernel} and mask {self.mask} must be odd, and kernel larger than mask + 2 * num_blocks, "
                f"{self.mask + 2 * self.num_blocks}: the last masked convolution would have no taps"
            )
        if self.quantizer is not None:
            self.quantizer.check(self.dim, "a frame")

    @property
    def num_layers(self) -> int:
        """Layers that are returned: each block, each masked convolution, and their sum."""
        return 2 * self.num_blocks + 1

    @property
    def layer_dims(self) -> tuple[int, ...]:
        """Widths of the N + 1 layers."""
        return (self.input_dim, *(self.dim,) * self.num_layers)

    @property
    def causal(self) -> bool:
        """Whether a frame depends on no later one: never."""
        return False

    @property
    def reach(self) -> int:
        """Frames on each side that the final output sees, of which it does not see the next ``mask // 2``."""
        return self.kernel // 2 + self.num_blocks * (BLOCK_KERNEL // 2)

    def num_taps(self, block: int) -> int:
        """Taps on each side of a masked convolution that are not hidden; blocks count from 0."""
        return (self.kernel - self.mask) // 2 - (block + 1) * (BLOCK_KERNEL // 2)


class FrameNorm(nn.Module):
    """Batch norm over the valid frames of (B, T, D); in eval mode it is a fixed scale and shift of each channel.

    With several processes each one keeps running statistics of its own frames, and the main one's are saved.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def initialize(self) -> None:
        """Scale one, shift zero, no statistics yet."""
        for tensor, value in ((self.weight, 1.0), (self.bias, 0.0), (self.running_mean, 0.0), (self.running_var, 1.0)):
            nn.init.constant_(tensor, value)

    def forward(self, x_BTD: Tensor, valid_BT: Tensor | None) -> Tensor:
        with torch.autocast(x_BTD.device.type, enabled=False):
            x_BTD = x_BTD.float()
            frames_MD = x_BTD.flatten(0, 1) if valid_BT is None else x_BTD[valid_BT]
            if not self.training or len(frames_MD) < 2:  # one frame has no variance
                scale_D = self.weight * (self.running_var + EPS).rsqrt()
                return torch.addcmul(self.bias - self.running_mean * scale_D, x_BTD, scale_D)
            normed_MD = F.batch_norm(
                frames_MD,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                training=True,
                momentum=MOMENTUM,
                eps=EPS,
            )
            if valid_BT is None:
                return normed_MD.view(x_BTD.shape)
            return torch.zeros_like(x_BTD).masked_scatter(valid_BT[..., None], normed_MD)


class ConvBlock(nn.Module):
    """Convolution over three frames and a linear map, each with its norm; residual; activation (``ConvBlock`` of NPC)."""

    def __init__(self, input_dim: int, config: ConvEncoderConfig, *, residual: bool) -> None:
        super().__init__()
        self.dropout, self.residual = config.dropout, residual
        self.activation = torch.relu if config.activation == "relu" else torch.tanh
        self.conv = nn.Conv1d(input_dim, config.dim, BLOCK_KERNEL, padding=BLOCK_KERNEL // 2)
        self.linear = nn.Linear(config.dim, config.dim)
        self.conv_norm = FrameNorm(config.dim) if config.batch_norm else None
        self.linear_norm = FrameNorm(config.dim) if config.batch_norm else None

    def forward(self, x_BTD: Tensor, valid_BT: Tensor | None) -> Tensor:
        """Padding must be zero; what it is afterwards does not matter to the valid frames."""
        out_BTD = self.conv(x_BTD.transpose(1, 2)).transpose(1, 2)
        out_BTD = self.activation(out_BTD if self.conv_norm is None else self.conv_norm(out_BTD, valid_BT))
        out_BTD = self.linear(out_BTD)
        out_BTD = out_BTD if self.linear_norm is None else self.linear_norm(out_BTD, valid_BT)
        out_BTD = dropout(out_BTD, self.dropout, self.training)
        return self.activation(out_BTD + x_BTD if self.residual else out_BTD)


class MaskedConv(nn.Module):
    """Convolution without its middle taps, then tanh (``MaskConvBlock`` of NPC).

    The weight has all taps, as in the reference's files; the hidden ones take part in nothing and are not computed.

    Args:
        dim: Channels.
        kernel: Taps K, odd.
        num_taps: Taps on each side that are not hidden.
    """

    def __init__(self, dim: int, kernel: int, num_taps: int) -> None:
        super().__init__()
        self.num_taps = num_taps
        self.weight = nn.Parameter(torch.empty(dim, dim, kernel))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Padding must be zero."""
        kernel, taps = self.weight.shape[-1], self.num_taps
        reach = kernel // 2
        padded_BDT = F.pad(x_BTD.transpose(1, 2), (reach, reach))
        length = x_BTD.shape[1] + taps - 1
        past_BDT = F.conv1d(padded_BDT[..., :length], self.weight[..., :taps], self.bias)
        future_BDT = F.conv1d(padded_BDT[..., kernel - taps :], self.weight[..., kernel - taps :])
        return torch.tanh(past_BDT + future_BDT).transpose(1, 2)


class ConvEncoder(nn.Module):
    """Blocks, a masked convolution over each, their sum, and maybe its codes."""

    def __init__(self, config: ConvEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(
            ConvBlock(config.dim if i else config.input_dim, config, residual=config.residual and i > 0)
            for i in range(config.num_blocks)
        )
        self.masked = nn.ModuleList(MaskedConv(config.dim, config.kernel, config.num_taps(i)) for i in range(config.num_blocks))
        self.quantizer = None if config.quantizer is None else Quantizer(config.quantizer)

    @property
    def final_quantizer(self) -> Quantizer | None:
        """What quantises the sum of the masked convolutions; None for nothing."""
        return self.quantizer

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """torch's default for convolutions and linear layers: U(-1/sqrt(n), 1/sqrt(n)) for n inputs of an output."""
        for module in self.modules():
            if isinstance(module, FrameNorm):
                module.initialize()
            elif isinstance(module, nn.Conv1d | nn.Linear | MaskedConv):
                bound = (module.weight[0].numel()) ** -0.5
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                assert module.bias is not None
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        if self.quantizer is not None:
            self.quantizer.initialize(generator)

    def forward(
        self,
        x_BTD: Tensor,
        lengths_B: Tensor | None = None,
        *,
        keep_layers: bool = False,
        generator: torch.Generator | None = None,
    ) -> EncoderOutput:
        """Encodes a padded batch; every convolution sees zeros beyond an utterance's ends.

        Args:
            x_BTD: Output of the input projection.
            lengths_B: Valid frames; None when nothing is padded.
            keep_layers: Whether to return every layer, not the final output alone.
            generator: Draws the quantiser's noise while training; None for torch's own.

        Returns:
            ``layers[0]`` is the input, ``layers[2 k - 1]`` the output of block k, ``layers[2 k]`` that of its masked
            convolution, the last layer their sum; ``final`` is that sum, or its codes where it is quantised.
        """
        valid_BT = None if lengths_B is None else valid_mask(lengths_B, x_BTD.shape[1])
        x_BTD = x_BTD if lengths_B is None else zero_padding(x_BTD, lengths_B)
        layers, total_BTD = [x_BTD], torch.zeros((), device=x_BTD.device)
        for block, masked in zip(self.blocks, self.masked, strict=True):
            if x_BTD.shape[1]:
                x_BTD = block(x_BTD, valid_BT)
                x_BTD = x_BTD if lengths_B is None else zero_padding(x_BTD, lengths_B)
                unseen_BTD = masked(x_BTD)
            else:
                x_BTD = unseen_BTD = x_BTD.new_zeros(len(x_BTD), 0, self.config.dim)
            total_BTD = total_BTD + unseen_BTD
            layers += [x_BTD, unseen_BTD]
        layers.append(total_BTD)
        final_BTD = total_BTD if self.quantizer is None else self.quantizer(total_BTD, lengths_B, generator)
        return ended(final_BTD, layers, lengths_B, keep_layers=keep_layers)
