"""Causal encoders that go on from where they stopped: frames in pieces give what they give as a whole.

A stream keeps what later frames still need: the last frames before the convolutional positions (their kernel's width less one),
keys and values of every block application (as far as its window reaches), or the hidden states of recurrent layers. What
streams of one encoder share, a folded kernel laid out for few frames at a time, is made once by :class:`EncoderStreams`.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sslim.batch import EncoderOutput
from sslim.nn.encoder import Encoder
from sslim.nn.encoders import AnyEncoder
from sslim.nn.past import Continuation, Past, continuation_mask
from sslim.nn.positions import ConvPositions, SinusoidPositions, grouped_convolution, sinusoids
from sslim.nn.recurrent import RecurrentEncoder

# Frames up to which matrix products beat torch's convolution on a CPU, which lays out the kernel anew in every call. With 768
# channels in 16 groups and 128 taps, milliseconds of product and convolution on one core: 1 frame 0.9 and 7.8, 8 frames 2.0 and
# 8.1, 32 frames 6.7 and 7.5, 128 frames 40 and 17.
MAX_PRODUCT_FRAMES = 32


class CausalConvolution:
    """The convolution of causal positions over frames whose predecessors are given.

    Args:
        positions: Whose kernel; it is folded here, so that what changes it later has no effect.
    """

    def __init__(self, positions: ConvPositions) -> None:
        kernel_DCK = positions.kernel().detach()
        self.groups, self.size = positions.config.groups, positions.config.kernel_size
        self.bias = positions.bias.detach()
        # (G, C * K, C'): the inputs of a group's outputs in the order in which frames are unfolded
        self.matrix = kernel_DCK.unflatten(0, (self.groups, -1)).flatten(2).transpose(1, 2).contiguous()

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """Maps ``size - 1`` frames of context and T new ones, (B, size - 1 + T, D), to (B, T, D)."""
        batch, num_frames, dim = len(x_BTD), x_BTD.shape[1] - self.size + 1, x_BTD.shape[2]
        if x_BTD.device.type != "cpu" or batch * num_frames > MAX_PRODUCT_FRAMES:
            kernel_DCK = self.matrix.transpose(1, 2).reshape(dim, -1, self.size)
            return grouped_convolution(x_BTD.transpose(1, 2), kernel_DCK, self.bias, self.groups).transpose(1, 2)
        windows_GMI = x_BTD.unfold(1, self.size, 1).reshape(batch * num_frames, self.groups, -1).transpose(0, 1)
        products_GMC = windows_GMI @ self.matrix.to(x_BTD.dtype)
        return products_GMC.transpose(0, 1).reshape(batch, num_frames, dim) + self.bias.to(x_BTD.dtype)


class TransformerStream:
    """A causal Transformer in eval mode over pieces of a sequence.

    Args:
        encoder: The Transformer.
        convolution: Its convolutional positions; None without such.
    """

    def __init__(self, encoder: Encoder, convolution: CausalConvolution | None) -> None:
        self.encoder, self.convolution = encoder, convolution
        self.num_frames = 0
        self._context_BTD: Tensor | None = None  # the frames that the next convolution still sees
        blocks = [encoder.config.blocks[index] for index in encoder.config.depth_map]
        self._pasts = [Past(block.attention_window) if block.num_heads else None for block in blocks]

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the stream holds."""
        context = 0 if self._context_BTD is None else self._context_BTD.numel() * self._context_BTD.element_size()
        return context + sum(past.num_bytes for past in self._pasts if past is not None)

    def push(self, x_BTD: Tensor, *, keep_layers: bool = False) -> EncoderOutput:
        """Encodes the next frames (B, T, D), T at least 1; B must stay the same."""
        encoder, num_new = self.encoder, x_BTD.shape[1]
        x_BTD = self._with_positions(x_BTD)
        x_BTD = x_BTD if encoder.input_norm is None else encoder.input_norm(x_BTD)
        masks = self._masks(num_new, x_BTD.device)
        distances_NR = None
        if encoder.relative_positions is not None:
            distances_NR = encoder.relative_positions(max((mask.shape[1] for mask in masks.values()), default=1) - 1)
        layers = [x_BTD]
        for index, past in zip(encoder.config.depth_map, self._pasts, strict=True):
            seen = None if past is None else Continuation(past=past, mask=masks[past.window])
            x_BTD, _ = encoder.blocks[index](x_BTD, seen, distances_NR)
            layers.append(x_BTD)
        self.num_frames += num_new
        final_BTD = x_BTD if encoder.final_norm is None else encoder.final_norm(x_BTD)
        lengths_B = torch.full((len(x_BTD),), num_new, device=x_BTD.device)
        return EncoderOutput(final=final_BTD, lengths=lengths_B, layers=tuple(layers) if keep_layers else ())

    def _masks(self, num_new: int, device: torch.device) -> dict[int | None, Tensor]:
        """The mask of each distinct window."""
        pasts = {past.window: past for past in self._pasts if past is not None}
        return {window: continuation_mask(num_new, past.num_frames, window, device) for window, past in pasts.items()}

    def _with_positions(self, x_BTD: Tensor) -> Tensor:
        if isinstance(self.encoder.positions, SinusoidPositions):
            codes_TD = sinusoids(x_BTD.shape[1], x_BTD.shape[2], start=self.num_frames, device=x_BTD.device)
            return x_BTD + codes_TD.to(x_BTD.dtype)
        if self.convolution is None:
            return x_BTD
        before = self.convolution.size - 1
        if self._context_BTD is None:
            self._context_BTD = x_BTD.new_zeros(len(x_BTD), before, x_BTD.shape[2])
        whole_BTD = torch.cat([self._context_BTD, x_BTD], dim=1)
        self._context_BTD = whole_BTD[:, whole_BTD.shape[1] - before :].clone()
        return x_BTD + F.gelu(self.convolution(whole_BTD))


class RecurrentStream:
    """Recurrent layers in eval mode over pieces of a sequence.

    Args:
        encoder: The layers.
    """

    def __init__(self, encoder: RecurrentEncoder) -> None:
        self.encoder = encoder
        self._states: list[Tensor | None] = [None] * encoder.config.num_layers

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the stream holds."""
        return sum(state.numel() * state.element_size() for state in self._states if state is not None)

    def push(self, x_BTD: Tensor, *, keep_layers: bool = False) -> EncoderOutput:
        """Encodes the next frames (B, T, D), T at least 1; B must stay the same."""
        return self.encoder(x_BTD, keep_layers=keep_layers, states=self._states)


class EncoderStreams:
    """Opens streams of one causal encoder, which share its folded kernel.

    Args:
        encoder: In eval mode; whoever makes streams has seen to it that it is causal.
    """

    def __init__(self, encoder: AnyEncoder) -> None:
        assert encoder.config.causal
        assert not encoder.training
        self.encoder = encoder
        positions = encoder.positions if isinstance(encoder, Encoder) else None
        self.convolution = CausalConvolution(positions) if isinstance(positions, ConvPositions) else None

    def open(self) -> TransformerStream | RecurrentStream:
        """Returns a stream before its first frame."""
        if isinstance(self.encoder, Encoder):
            return TransformerStream(self.encoder, self.convolution)
        return RecurrentStream(cast(RecurrentEncoder, self.encoder))
