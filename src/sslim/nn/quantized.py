"""Linear maps with int8 weights: weights alone (computing in floating point), or activations too, quantised as they come.

Symmetric and without calibration: each output channel of a weight has a scale of its own, and with ``dynamic`` each frame has
one, found when it arrives. The product of the two int8 matrices is exact, and a frame's scale depends on that frame alone, so
what an utterance gets still does not depend on what it is batched with (but for the last bits of float32, which may tip a
rounding to the next integer). It is the vector-wise quantisation of Dettmers et al. 2022, "LLM.int8()" (arXiv 2208.07339, sec.
3.1), without its separate path for outliers.

On CPUs whose oneDNN multiplies int8 exactly (those with VNNI or AMX; :func:`has_int8_kernel` tries it out) the product runs on
a packed copy of the weight, made at the first call: one more byte for each weight in memory. Anywhere else (GPUs, other CPUs,
traced graphs) the same integers are multiplied as float32; outputs agree to 1e-5 of the largest.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslim.nn.relative_positions import RelativeGate

LARGEST = 127  # -128 is not used, so that the range is symmetric
SMALLEST = 1e-30  # of the largest value of a channel or frame: what is all zero has a scale too
ROWS = 128  # frames quantised at a time on a CPU: they stay in its cache


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (R, C) as int8 with the scale (R, 1) of each row: its largest absolute value is 127 afterwards."""
    scale_R1 = x.detach().abs().amax(-1, keepdim=True).float().clamp_(min=SMALLEST).div_(LARGEST)
    return torch.mul(x.detach(), scale_R1.reciprocal()).round_().to(torch.int8), scale_R1


@lru_cache(maxsize=1)
def has_int8_kernel() -> bool:
    """Whether oneDNN's int8 product is there and exact on this machine's CPU.

    On x86 without VNNI pairs of products saturate at 16 bits; rows of the largest numbers tell.
    """
    signs = torch.tensor([1, -1], dtype=torch.int8)
    extremes = torch.stack([signs[[0, 0]], signs[[1, 1]], signs]).repeat(1, 64) * LARGEST
    try:
        product = _Packed(extremes, torch.ones(len(extremes))).multiply(extremes)
    except (AttributeError, NotImplementedError, RuntimeError):  # no such operator in this torch, or none for this CPU
        return False
    return torch.equal(product, (extremes.double() @ extremes.double().T).float())


class _Packed:
    """An int8 weight as oneDNN wants it for its kernels; torch's own compiler calls the same operators.

    Args:
        weight: (out, in) int8.
        scale: (out,) float32.
    """

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.source, self.version = weight, _version(weight)
        self.weight = torch.ops.onednn.qlinear_prepack(weight, None)
        self.scale, self.zero_points = scale.float(), torch.zeros(len(weight), dtype=torch.int64)

    def fits(self, weight: Tensor, scale: Tensor) -> bool:
        """Whether it was made of this weight as it is now."""
        return self.source is weight and self.version == _version(weight) and torch.equal(self.scale, scale.float())

    def multiply(self, x: Tensor) -> Tensor:
        """Multiplies (R, in) int8 by the weight and its scales; (R, out) float32."""
        return torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 0, self.weight, self.scale, self.zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Int8Linear(nn.Module):
    """A linear map with int8 weights. It has no gradients: training it is an error.

    Args:
        in_dim: Input width.
        out_dim: Output width.
        bias: Whether there is one, in floating point.
        dynamic: Whether the input is quantised too, each frame with a scale of its own, and multiplied as int8; else the weight
            is multiplied in the input's type, which saves memory but no time.
    """

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool = True, dynamic: bool = True) -> None:
        super().__init__()
        self.dynamic = dynamic
        self.weight = nn.Parameter(torch.zeros(out_dim, in_dim, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.ones(out_dim))
        self.bias = nn.Parameter(torch.zeros(out_dim), requires_grad=False) if bias else None
        self._packed: _Packed | None = None

    scale: Tensor

    @classmethod
    def from_linear(cls, whole: nn.Linear, *, dynamic: bool = True) -> Int8Linear:
        """Returns the int8 form of a map; each output channel's largest weight becomes 127.

        Args:
            whole: The map; it stays as it is. Its weights have to be finite.
            dynamic: See the class.
        """
        with torch.device("meta"):
            small = cls(whole.in_features, whole.out_features, bias=whole.bias is not None, dynamic=dynamic)
        weight, scale_R1 = quantize_rows(whole.weight.float())
        small.weight, small.scale = nn.Parameter(weight, requires_grad=False), scale_R1.squeeze(1)
        if whole.bias is not None:
            small.bias = nn.Parameter(whole.bias.detach().clone(), requires_grad=False)
        return small.train(whole.training)

    def __getstate__(self) -> dict[str, Any]:
        """A copy packs its own weight."""
        return {**self.__dict__, "_packed": None}

    def dequantized(self) -> Tensor:
        """Returns the weight (out, in) that it stands for, float32."""
        return self.weight.float() * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to (..., out) of the same type.

        Raises:
            ValueError: The module is in training mode.
        """
        if self.training:
            raise ValueError("int8 weights have no gradients and cannot be trained: train the float model and quantise it last")
        if not self.dynamic:
            return self._scaled(F.linear(x, self.weight.to(x.dtype)), self.scale).to(x.dtype)
        rows, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], len(self.weight))
        if x.device.type == "cpu" and len(rows) and not torch.compiler.is_compiling() and has_int8_kernel():
            return self._multiplied(rows).view(shape).to(x.dtype)
        quantized, scale_R1 = quantize_rows(rows)
        with torch.autocast(x.device.type, enabled=False):
            product = F.linear(quantized.float(), self.weight.float()) * scale_R1
        return self._scaled(product, self.scale).view(shape).to(x.dtype)

    def _multiplied(self, rows: Tensor) -> Tensor:
        """The same in oneDNN's int8 kernel, (R, in) to (R, out) float32."""
        if self._packed is None or not self._packed.fits(self.weight, self.scale):
            self._packed = _Packed(self.weight, self.scale)
        parts = [quantize_rows(part) for part in rows.split(ROWS)]
        quantized, scale_R1 = parts[0] if len(parts) == 1 else (torch.cat(half) for half in zip(*parts, strict=True))
        return self._scaled(self._packed.multiply(quantized), scale_R1, in_place=True)

    def _scaled(self, product: Tensor, scale: Tensor, *, in_place: bool = False) -> Tensor:
        if self.bias is None:
            return product.mul_(scale) if in_place else product * scale
        if in_place:
            return torch.addcmul(self.bias.detach(), product, scale, out=product)
        return torch.addcmul(self.bias, product, scale)


def quantize_linears(module: nn.Module, *, dynamic: bool) -> None:
    """Puts int8 maps in the places of all linear maps in a module; factors count singly, gates of relative positions stay."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear.from_linear(child, dynamic=dynamic))
        elif not isinstance(child, RelativeGate):
            quantize_linears(child, dynamic=dynamic)
