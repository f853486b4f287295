"""Position encodings: the convolution of wav2vec 2.0 / HuBERT and the sinusoids of the Transformer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_BF16_GROUP = 16  # channels in a group from which torch's CPU kernel for bf16 can be relied on


@dataclass(frozen=True, kw_only=True)
class ConvPositionsConfig:
    """Convolutional positions (wav2vec 2.0, section 2; ``conv_pos`` and ``conv_pos_groups`` in fairseq).

    Attributes:
        kernel_size: Taps.
        groups: Channel groups; must divide the width.
        weight_norm: Whether the kernel is stored as gain and direction for each tap; False after folding.
        causal: Pad on the left only, so that no future frame is seen.
    """

    kind: Literal["convolution"] = "convolution"
    kernel_size: int = 128
    groups: int = 16
    weight_norm: bool = True
    causal: bool = False


@dataclass(frozen=True, kw_only=True)
class SinusoidPositionsConfig:
    """Fixed sinusoids (Vaswani et al. 2017, section 3.5), interleaved: even channels sine, odd channels cosine."""

    kind: Literal["sinusoid"] = "sinusoid"


PositionsConfig = ConvPositionsConfig | SinusoidPositionsConfig


def tap_norms(kernel_DCK: Tensor) -> Tensor:
    """Returns (1, 1, K): the norm of each tap over both channel axes."""
    # one axis after the other: ten times as fast as ``vector_norm`` over both, and exact to 1e-7
    return kernel_DCK.square().sum(1).sum(0).sqrt()[None, None]


def fold_weight_norm(gain_11K: Tensor, direction_DCK: Tensor, part: Tensor | None = None) -> Tensor:
    """Returns the plain kernel ``gain * direction / norm``, the norm of each tap over both channel axes.

    Counterpart: ``weight_norm(dim=2)`` with ``weight_g`` (1, 1, K) and ``weight_v`` (D, D / groups, K).

    Args:
        gain_11K: Gain of each tap.
        direction_DCK: The whole direction.
        part: Channels of the direction, when only these of the kernel are wanted; the norm stays that of the whole.
    """
    return (direction_DCK if part is None else part) * (gain_11K / tap_norms(direction_DCK))


def split_weight_norm(kernel_DCK: Tensor) -> tuple[Tensor, Tensor]:
    """Returns gain (1, 1, K) and direction of a plain kernel, which :func:`fold_weight_norm` makes the same kernel again.

    A tap of zeros gets gain 0 and a direction of ones.
    """
    gain_11K = tap_norms(kernel_DCK)
    return gain_11K, torch.where(gain_11K == 0, torch.ones_like(kernel_DCK), kernel_DCK)


class ConvPositions(nn.Module):
    """Adds ``gelu(conv(x))`` to x (``pos_conv.0`` in fairseq). x must be zero on padding."""

    def __init__(self, dim: int, config: ConvPositionsConfig) -> None:
        super().__init__()
        self.config = config
        shape = (dim, dim // config.groups, config.kernel_size)
        if config.weight_norm:
            self.gain = nn.Parameter(torch.empty(1, 1, config.kernel_size))
            self.direction = nn.Parameter(torch.empty(shape))
        else:
            self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(dim))

    def initialize(self, generator: torch.Generator | None) -> None:
        """N(0, sqrt(4 / (kernel * width))) as in wav2vec 2.0; the gain is the norm of that kernel; bias zero."""
        kernel = self.direction if self.config.weight_norm else self.weight
        std = math.sqrt(4.0 / (self.config.kernel_size * kernel.shape[0]))
        nn.init.normal_(kernel, 0.0, std, generator=generator)
        if self.config.weight_norm:
            with torch.no_grad():
                self.gain.copy_(tap_norms(kernel))
        nn.init.zeros_(self.bias)

    def kernel(self) -> Tensor:
        """Returns the plain kernel (D, D / groups, K)."""
        return fold_weight_norm(self.gain, self.direction) if self.config.weight_norm else self.weight

    def forward(self, x_BTD: Tensor) -> Tensor:
        size = self.config.kernel_size
        left, right = (size - 1, 0) if self.config.causal else (size // 2, (size - 1) // 2)
        if x_BTD.shape[1] == 0:
            return x_BTD
        x_BDT = F.pad(x_BTD.transpose(1, 2), (left, right))
        return x_BTD + F.gelu(grouped_convolution(x_BDT, self.kernel(), self.bias, self.config.groups)).transpose(1, 2)


def grouped_convolution(x_BDT: Tensor, kernel_DCK: Tensor, bias_D: Tensor, groups: int) -> Tensor:
    """``conv1d`` without padding; on a CPU in float32 where bf16 is asked for and groups are narrow.

    With torch 2.13 and AMX, groups of 2 to 14 channels (an even number) and 8 to 128 taps (likewise) give nonsense there, as
    large as the right result; pytorch/pytorch issue 163347 has another such case.
    """
    device = x_BDT.device.type
    asked = device == "cpu" and (x_BDT.dtype == torch.bfloat16 or torch.is_autocast_enabled(device))
    if not asked or kernel_DCK.shape[1] >= MIN_BF16_GROUP:
        return F.conv1d(x_BDT, kernel_DCK, bias_D, groups=groups)
    with torch.autocast(device, enabled=False):
        y_BDT = F.conv1d(x_BDT.float(), kernel_DCK.float(), bias_D.float(), groups=groups)
    return y_BDT.to(x_BDT.dtype)


def sinusoids(num_frames: int, dim: int, *, start: int = 0, device: torch.device | None = None) -> Tensor:
    """Returns (T, D) codes of the frames from ``start``: sine or cosine (even, odd i) of ``p / 10000 ** (2 * (i // 2) / D)``.

    Computed in float64 and rounded once, as the S3PRL reference does.
    """
    position = torch.arange(start, start + num_frames, dtype=torch.float64, device=device)[:, None]
    channel = torch.arange(dim, device=device)
    angle = position / 10000 ** (2 * (channel // 2).double() / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


class SinusoidPositions(nn.Module):
    """Adds fixed sinusoids to x; the table grows with the longest input seen and is no part of the state."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.table_TD = torch.empty(0, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        num_frames = x_BTD.shape[1]
        if self.table_TD.shape[0] < num_frames or self.table_TD.device != x_BTD.device:
            self.table_TD = sinusoids(num_frames, self.dim, device=x_BTD.device)
        return x_BTD + self.table_TD[:num_frames].to(x_BTD.dtype)
