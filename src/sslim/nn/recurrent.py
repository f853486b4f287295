"""A stack of recurrent layers that see the past only: the encoder of autoregressive predictive coding.

Chung, Hsu, Tang and Glass, "An Unsupervised Autoregressive Model for Speech Representation Learning" (arXiv 1904.03240); with
quantisers between or after the layers, "Vector-Quantized Autoregressive Predictive Coding" (arXiv 2005.08392).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn

from sslim.batch import EncoderOutput, zero_padding
from sslim.config import OMIT_DEFAULT
from sslim.nn.dropout import dropout
from sslim.nn.quantizer import Quantizer, QuantizerConfig


@dataclass(frozen=True, kw_only=True)
class RecurrentEncoderConfig:
    """Description of a stack of gated recurrent units (GRU) that run forward in time.

    Attributes:
        input_dim: Width of the frames that enter.
        dims: Hidden units of each layer.
        residual: Whether a layer's input is added to its output wherever both are equally wide.
        dropout: On the output of layers before the residual is added, and inside the pre-net.
        prenet_dims: Hidden units of linear layers with ReLU before the first recurrent one; none as a rule.
        quantizers: What quantises each layer's output on its way to the next layer, or of the last one to the heads: one for
            each layer, None for none; empty without any.
        drop_last: Whether on that of the last layer, too, as in S3PRL's later version; in its first and the authors' not.
    """

    kind: Literal["recurrent"] = "recurrent"
    input_dim: int
    dims: tuple[int, ...]
    residual: bool = True
    dropout: float = 0.1
    prenet_dims: tuple[int, ...] = ()
    quantizers: tuple[QuantizerConfig | None, ...] = field(default=(), metadata={OMIT_DEFAULT: True})
    drop_last: bool = field(default=False, metadata={OMIT_DEFAULT: True})

    def __post_init__(self) -> None:
        if not self.dims or min(self.input_dim, *self.dims, *self.prenet_dims) < 1:
            raise ValueError(
                f"input_dim {self.input_dim}, dims {self.dims} and prenet_dims {self.prenet_dims} must be widths above 0, and "
                "dims at least one"
            )
        if self.quantizers and len(self.quantizers) != len(self.dims):
            raise ValueError(
                f"quantizers has {len(self.quantizers)} entries for {len(self.dims)} layers; expected one for each, or none"
            )
        for number, (dim, quantizer) in enumerate(zip(self.dims, self.quantizers, strict=False), 1):
            if quantizer is not None:
                quantizer.check(dim, f"layer {number}")

    @property
    def dim(self) -> int:
        """Width of the final output."""
        return self.dims[-1]

    @property
    def num_layers(self) -> int:
        """Recurrent layers N."""
        return len(self.dims)

    @property
    def layer_dims(self) -> tuple[int, ...]:
        """Widths of the N + 1 layers: of what enters the first one, then of what each gives."""
        return ((self.prenet_dims or (self.input_dim,))[-1], *self.dims)

    @property
    def causal(self) -> bool:
        """Whether a frame depends on no later one: always."""
        return True


class RecurrentEncoder(nn.Module):
    """Pre-net, then recurrent layers with residuals; state zero before the first frame."""

    def __init__(self, config: RecurrentEncoderConfig) -> None:
        super().__init__()
        self.config = config
        widths = (config.input_dim, *config.prenet_dims)
        self.prenet = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.layers = nn.ModuleList(nn.GRU(*pair, batch_first=True) for pair in pairwise(config.layer_dims))
        chosen = {str(i): Quantizer(quantizer) for i, quantizer in enumerate(config.quantizers) if quantizer is not None}
        self.quantizers = nn.ModuleDict(chosen)

    @property
    def final_quantizer(self) -> Quantizer | None:
        """What quantises the last layer's output; None for nothing."""
        last = str(len(self.layers) - 1)
        return cast(Quantizer, self.quantizers[last]) if last in self.quantizers else None

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """torch's defaults: U(-1/sqrt(D), 1/sqrt(D)) of the input width for linear layers, of the hidden one for GRUs."""
        widths = (self.config.input_dim, *self.config.prenet_dims)[: len(self.prenet)]
        for part, fan_in in zip([*self.prenet, *self.layers], [*widths, *self.config.dims], strict=True):
            for parameter in part.parameters():
                nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5, generator=generator)
        for quantizer in self.quantizers.values():
            quantizer.initialize(generator)  # type: ignore[operator]

    def forward(
        self,
        x_BTD: Tensor,
        lengths_B: Tensor | None = None,
        *,
        keep_layers: bool = False,
        generator: torch.Generator | None = None,
        states: list[Tensor | None] | None = None,
    ) -> EncoderOutput:
        """Encodes a padded batch. Padding follows the frames, and so can change none of them.

        Args:
            x_BTD: Output of the input projection.
            lengths_B: Valid frames; None when nothing is padded.
            keep_layers: Whether to return every layer, not the final output alone.
            generator: Draws the quantisers' noise while training; None for torch's own.
            states: Each layer's hidden state (1, B, D) before the first frame, None for zeros; replaced by that after the last
                frame. None as a whole begins with zeros and keeps nothing.

        Returns:
            ``layers[0]`` is what enters the first recurrent layer; ``layers[k]`` what layer k gives, before a quantiser;
            ``final`` the last of them, or its codes where it is quantised.
        """
        x_BTD = x_BTD if lengths_B is None else zero_padding(x_BTD, lengths_B)
        for linear in self.prenet:
            x_BTD = dropout(linear(x_BTD).relu(), self.config.dropout, self.training)
        layers = [x_BTD]
        for number, layer in enumerate(self.layers):
            given_BTD = x_BTD
            x_BTD, state = self._run(cast(nn.GRU, layer), given_BTD, None if states is None else states[number])
            if states is not None:
                states[number] = state
            if number + 1 < len(self.layers) or self.config.drop_last:
                x_BTD = dropout(x_BTD, self.config.dropout, self.training)
            if self.config.residual and x_BTD.shape[-1] == given_BTD.shape[-1]:
                x_BTD = x_BTD + given_BTD
            layers.append(x_BTD)
            if str(number) in self.quantizers:
                x_BTD = self.quantizers[str(number)](x_BTD, lengths_B, generator)
        return ended(x_BTD, layers, lengths_B, keep_layers=keep_layers)

    def _run(self, layer: nn.GRU, x_BTD: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns a layer's output and its state after the last frame."""
        if not x_BTD.numel():  # torch wants at least one frame
            return x_BTD.new_zeros(*x_BTD.shape[:2], layer.hidden_size), state
        if x_BTD.is_cuda and not self.training and torch.is_grad_enabled():
            with torch.backends.cudnn.flags(enabled=False):  # it has a backward pass in training mode alone
                return layer(x_BTD, state)
        return layer(x_BTD, state)


def ended(final_BTD: Tensor, layers: list[Tensor], lengths_B: Tensor | None, *, keep_layers: bool) -> EncoderOutput:
    """Returns an output that is zero beyond each length; ``final`` stays the last layer where it is that very tensor."""
    is_last = final_BTD is layers[-1]
    if lengths_B is None:
        lengths_B = torch.full((len(final_BTD),), final_BTD.shape[1], dtype=torch.long, device=final_BTD.device)
    else:
        kept = range(len(layers)) if keep_layers else range(0)
        layers = [zero_padding(layer, lengths_B) if i in kept else layer for i, layer in enumerate(layers)]
        final_BTD = layers[-1] if is_last and keep_layers else zero_padding(final_BTD, lengths_B)
    return EncoderOutput(final=final_BTD, layers=tuple(layers) if keep_layers else (), lengths=lengths_B)
