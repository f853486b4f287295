"""The convolutional front-end of wav2vec 2.0 and HuBERT: learnt features of the waveform.

Frames are rows here, (B, T, C), and a convolution of stride s is a few matrix products over views: the taps ``i * s`` to
``(i + 1) * s - 1`` of all outputs together are one strided matrix of the input, so nothing is copied or transposed.

The group norm of the first layer (one group for each channel, over time) is folded into that layer's weights. The mean and
variance of a linear map's outputs follow from the mean and covariance of its inputs, a few numbers for each utterance:
``mean(w x) = w mean(x)`` and ``var(w x) = w cov(x) w'``. So its statistics cover exactly the valid frames, whatever an
utterance is batched with, and no pass over the widest activations is needed.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslim.audio import num_conv_frames, num_conv_stack_frames, stack_reach
from sslim.batch import Padded, valid_mask, zero_padding
from sslim.frontends.config import ConvFrontendConfig, ConvLayerConfig

NORM_EPS = 1e-5
CHUNK_FRAMES = 64  # output frames computed at a time without gradients: what lies between the layers then stays in the cache


class ScaledGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a factor (fairseq's ``GradMultiply``)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


class ConvLayer(nn.Module):
    """Convolution, optional norm, GELU (``conv_layers.N`` in fairseq).

    Args:
        in_channels: Inputs.
        config: Kernel, stride, outputs.
        bias: Whether the convolution has one.
        norm: ``group`` (over time), ``layer`` (over channels) or None.
    """

    def __init__(self, in_channels: int, config: ConvLayerConfig, *, bias: bool, norm: str | None) -> None:
        super().__init__()
        self.config, self.in_channels, self.norm_kind = config, in_channels, norm
        self.weight = nn.Parameter(torch.empty(config.channels, in_channels, config.kernel))
        self.bias = nn.Parameter(torch.zeros(config.channels)) if bias else None
        self.norm: nn.LayerNorm | nn.GroupNorm | None = None
        if norm == "layer":
            self.norm = nn.LayerNorm(config.channels, NORM_EPS)
        elif norm == "group":
            self.norm = nn.GroupNorm(config.channels, config.channels, NORM_EPS)

    def initialize(self, generator: torch.Generator | None) -> None:
        """Kaiming-normal weights as in wav2vec 2.0; biases zero."""
        nn.init.kaiming_normal_(self.weight, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def matrices(self, weight: Tensor) -> list[Tensor]:
        """Splits weights (..., C', C, K) into one (..., taps * C, C') matrix for each stride's worth of taps."""
        by_tap = weight.transpose(-1, -2).contiguous()  # (..., C', K, C)
        return [taps.flatten(-2).transpose(-1, -2) for taps in by_tap.split(self.config.stride, dim=-2)]

    def windows(self, x_BTC: Tensor) -> list[Tensor]:
        """Returns the inputs that belong to :meth:`matrices`, views of ``x_BTC`` (B, T', taps * C)."""
        batch, num_frames, channels = x_BTC.shape
        kernel, stride = self.config.kernel, self.config.stride
        outputs = num_conv_frames(num_frames, kernel, stride)
        row, step, _ = x_BTC.stride()
        return [
            x_BTC.as_strided(
                (batch, outputs, min(stride, kernel - first) * channels),
                (row, stride * step, 1),
                x_BTC.storage_offset() + first * step,
            )
            for first in range(0, kernel, stride)
        ]

    def convolve(self, x_BTC: Tensor, matrices: list[Tensor], bias: Tensor | None) -> Tensor:
        """Sum of products of windows and matrices; weights may be one set for all or one for each utterance."""
        total: Tensor | None = None
        for window, matrix in zip(self.windows(x_BTC.contiguous()), matrices, strict=True):
            total = _product(window, matrix, bias if total is None else total)
        return cast(Tensor, total)

    def forward(self, x_BTC: Tensor, matrices: list[Tensor], bias: Tensor | None) -> Tensor:
        """Returns (B, T', C') of weights from :meth:`matrices`; a group norm must be in them already."""
        y_BTC = self.convolve(x_BTC, matrices, bias)
        if self.norm_kind == "layer":
            y_BTC = cast(nn.LayerNorm, self.norm)(y_BTC)
        return F.gelu(y_BTC) if torch.is_grad_enabled() else torch.ops.aten.gelu_(y_BTC)


def _product(x_BTK: Tensor, matrix: Tensor, added: Tensor | None) -> Tensor:
    """Returns ``x @ matrix + added``: (K, C) matrices serve all rows, (B, K, C) ones a row each; ``added`` broadcasts."""
    if matrix.dim() == 3:
        return x_BTK @ matrix if added is None else torch.baddbmm(added, x_BTK, matrix)
    if len(x_BTK) == 1:  # a view of one row needs no copy, whatever its stride
        x_TK = x_BTK[0]
        product = x_TK @ matrix if added is None else torch.addmm(added if added.dim() == 1 else added[0], x_TK, matrix)
        return product[None]
    batched = matrix.expand(len(x_BTK), -1, -1)
    if added is None:
        return torch.bmm(x_BTK, batched)
    return torch.baddbmm(added, x_BTK, batched)


def coarse_num_frames(lengths_B: Tensor, num_samples: int, num_frames: int) -> Tensor:
    """Returns the frames that fairseq's HuBERT counts as real: those whose chunk of samples has any real one.

    A chunk has ``num_samples // num_frames`` samples, less than a frame sees.

    Args:
        lengths_B: Valid samples.
        num_samples: Padded samples S.
        num_frames: Frames T of S samples.
    """
    chunk = num_samples // max(num_frames, 1)
    return ((lengths_B + chunk - 1) // chunk).clamp(max=num_frames)


class ConvFrontend(nn.Module):
    """Waveform normalisation (optional), then the convolutions. See :class:`~sslim.frontends.base.Frontend`.

    Args:
        config: Its description.

    Raises:
        ValueError: No layer, or a layer whose stride exceeds its kernel (samples would be skipped).
    """

    def __init__(self, config: ConvFrontendConfig) -> None:
        super().__init__()
        if not config.layers:
            raise ValueError("a convolutional front-end needs at least one layer")
        for number, layer in enumerate(config.layers, 1):
            if min(layer.channels, layer.kernel, layer.stride) < 1 or layer.stride > layer.kernel:
                raise ValueError(f"convolution {number} has {layer}: all must be positive and the stride at most the kernel")
        self.config = config
        inputs = (1, *(layer.channels for layer in config.layers[:-1]))
        norms = ["layer" if config.norm == "layer" else "group" if index == 0 else None for index in range(len(config.layers))]
        self.layers = nn.ModuleList(
            ConvLayer(channels, layer, bias=config.bias, norm=norm)
            for channels, layer, norm in zip(inputs, config.layers, norms, strict=True)
        )
        self.feature_dim = config.layers[-1].channels
        self.scale = nn.Parameter(torch.ones(self.feature_dim)) if config.channel_scale else None
        self.sample_rate, self.base_dim, self.stack = config.sample_rate, 0, 1
        self.statistics_source: str | None = None
        self._geometry = tuple((layer.kernel, layer.stride) for layer in config.layers)
        self._reach, self._hop = stack_reach(self._geometry)
        self.frame_shift_s = self.base_frame_shift_s = self._hop / config.sample_rate

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draws the convolutions anew."""
        for layer in self.layers:
            cast(ConvLayer, layer).initialize(generator)

    def num_frames(self, num_samples: int) -> int:
        return num_conv_stack_frames(num_samples, self._geometry)

    def num_base_frames(self, num_samples: int) -> int:
        return self.num_frames(num_samples)

    def num_stacked_frames(self, num_base_frames: int) -> int:
        return num_base_frames

    def base_features(self, waveform_BS: Tensor, lengths_B: Tensor) -> Padded:
        raise ValueError("a convolutional front-end is learnt: it has no features that could be stored")

    def finish(self, base: Padded) -> Padded:
        raise ValueError("a convolutional front-end takes waveforms, not stored features")

    def set_statistics(self, mean_F: Tensor, std_F: Tensor, *, source: str) -> None:
        raise ValueError("a convolutional front-end has no global statistics")

    def forward(self, waveform_BS: Tensor, lengths_B: Tensor) -> Padded:
        """Returns (B, T, C) features, zero beyond each row's frames; gradients are scaled by ``config.gradient_scale``.

        Args:
            waveform_BS: (B, S) in [-1, 1].
            lengths_B: Valid samples; what lies beyond them does not matter.
        """
        factor = self.config.gradient_scale
        with torch.set_grad_enabled(torch.is_grad_enabled() and factor != 0.0):
            features = self._features(waveform_BS.float(), lengths_B)
        if factor not in (0.0, 1.0) and features.values.requires_grad:
            features = Padded(values=cast(Tensor, ScaledGradient.apply(features.values, factor)), lengths=features.lengths)
        return features

    def _features(self, waveform_BS: Tensor, lengths_B: Tensor) -> Padded:
        num_samples = waveform_BS.shape[1]
        num_frames = self.num_frames(num_samples)
        if num_frames == 0:
            return Padded(
                values=waveform_BS.new_zeros(len(waveform_BS), 0, self.feature_dim), lengths=torch.zeros_like(lengths_B)
            )
        waveform_BS = waveform_BS.masked_fill(~valid_mask(lengths_B, num_samples), 0.0)
        if self.config.normalize_waveform:
            waveform_BS = normalize_waveform(waveform_BS, lengths_B, self.config.waveform_eps)
        reference = self.config.compat == "reference"
        frames_B = num_conv_stack_frames(lengths_B, self._geometry)
        if reference and self.config.reference_mask == "coarse":
            frames_B = coarse_num_frames(lengths_B, num_samples, num_frames)
        covered_B = torch.full_like(lengths_B, num_samples) if reference else lengths_B
        weights = self._weights(waveform_BS, covered_B)
        if torch.is_grad_enabled() or waveform_BS.device.type != "cpu":
            values = self._convolve(waveform_BS, weights)
        else:
            values = self._convolve_in_chunks(waveform_BS, weights, num_frames)
        return Padded(values=zero_padding(values, frames_B), lengths=frames_B)

    def _weights(self, waveform_BS: Tensor, covered_B: Tensor) -> list[tuple[list[Tensor], Tensor | None]]:
        """Matrices and bias of every layer; with a group norm the first has one set a row, (B, taps, C') and (B, 1, C')."""
        layers = [cast(ConvLayer, layer) for layer in self.layers]
        weights: list[tuple[list[Tensor], Tensor | None]] = [(layer.matrices(layer.weight), layer.bias) for layer in layers]
        if layers[0].norm_kind == "group":
            kernel, bias = self._normalized_kernel(waveform_BS, covered_B)
            weights[0] = (layers[0].matrices(kernel), bias)
        return weights

    def _normalized_kernel(self, waveform_BS: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """The first layer's kernel (B, C, 1, K) and bias (B, 1, C) with its group norm folded in."""
        first = cast(ConvLayer, self.layers[0])
        norm = cast(nn.GroupNorm, first.norm)
        with torch.autocast(waveform_BS.device.type, enabled=False):
            mean_BK, covariance_BKK = window_moments(waveform_BS, lengths_B, first.config.kernel, first.config.stride)
            weight_CK = first.weight[:, 0].double()
            variance_BC = torch.einsum("ck,bkl,cl->bc", weight_CK, covariance_BKK, weight_CK).clamp(min=0.0)
            gain_BC = norm.weight.double() / (variance_BC + norm.eps).sqrt()
            kernel = (gain_BC[..., None] * weight_CK)[:, :, None]
            bias_BC = norm.bias.double() - gain_BC * (mean_BK @ weight_CK.T)
        return kernel.to(first.weight.dtype), bias_BC[:, None].to(first.weight.dtype)

    def _convolve(self, waveform_BS: Tensor, weights: list[tuple[list[Tensor], Tensor | None]]) -> Tensor:
        x_BTC = waveform_BS[..., None]
        for layer, (matrices, bias) in zip(self.layers, weights, strict=True):
            x_BTC = layer(x_BTC, matrices, bias)
        return x_BTC if self.scale is None else x_BTC * self.scale

    def _convolve_in_chunks(
        self, waveform_BS: Tensor, weights: list[tuple[list[Tensor], Tensor | None]], num_frames: int
    ) -> Tensor:
        """The same, row by row and ``CHUNK_FRAMES`` at a time."""
        values = waveform_BS.new_empty(len(waveform_BS), num_frames, self.feature_dim)
        for row in range(len(waveform_BS)):
            own = weights
            if (first := weights[0])[0][0].dim() == 3:
                own = [([matrix[row] for matrix in first[0]], cast(Tensor, first[1])[row, 0]), *weights[1:]]
            for start in range(0, num_frames, CHUNK_FRAMES):
                stop = min(start + CHUNK_FRAMES, num_frames)
                piece = waveform_BS[row : row + 1, start * self._hop : (stop - 1) * self._hop + self._reach]
                values[row, start:stop] = self._convolve(piece, own)[0]
        return values


def normalize_waveform(waveform_BS: Tensor, lengths_B: Tensor, eps: float) -> Tensor:
    """Returns the waveforms with zero mean and unit variance over their valid samples; zero beyond them."""
    counts_B1 = lengths_B.clamp(min=1)[:, None]
    valid_BS = valid_mask(lengths_B, waveform_BS.shape[1])
    mean_B1 = (waveform_BS * valid_BS).sum(1, keepdim=True, dtype=torch.float64) / counts_B1
    centred_BS = (waveform_BS - mean_B1.to(waveform_BS.dtype)).masked_fill(~valid_BS, 0.0)
    variance_B1 = centred_BS.square().sum(1, keepdim=True, dtype=torch.float64) / counts_B1
    return centred_BS * (variance_B1 + eps).rsqrt().to(waveform_BS.dtype)


def window_moments(waveform_BS: Tensor, lengths_B: Tensor, kernel: int, stride: int) -> tuple[Tensor, Tensor]:
    """Returns mean (B, K) and covariance (B, K, K), float64, of the windows that a convolution sees in the valid samples."""
    windows_BTK = waveform_BS.detach().unfold(1, kernel, stride)
    counts_B = num_conv_frames(lengths_B, kernel, stride)
    valid_BT1 = valid_mask(counts_B, windows_BTK.shape[1])[..., None]
    windows_BTK = windows_BTK.double().masked_fill(~valid_BT1, 0.0)
    counts_B1 = counts_B.clamp(min=1)[:, None]
    mean_BK = windows_BTK.sum(1) / counts_B1
    centred_BTK = (windows_BTK - mean_BK[:, None]).masked_fill(~valid_BT1, 0.0)
    return mean_BK, centred_BTK.transpose(1, 2) @ centred_BTK / counts_B1[..., None]
