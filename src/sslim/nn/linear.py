"""Linear maps, whole or as two factors of a given rank."""

from __future__ import annotations

from torch import Tensor, nn


class FactoredLinear(nn.Module):
    """``outer(inner(x))``: a linear map of rank at most ``rank``; only the outer factor has a bias.

    It holds ``rank * (in_dim + out_dim) + out_dim`` parameters, fewer than the whole matrix when
    ``rank < in_dim * out_dim / (in_dim + out_dim)``.
    """

    def __init__(self, in_dim: int, out_dim: int, rank: int) -> None:
        super().__init__()
        self.inner = nn.Linear(in_dim, rank, bias=False)
        self.outer = nn.Linear(rank, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))


def linear(in_dim: int, out_dim: int, rank: int | None) -> nn.Linear | FactoredLinear:
    """Returns a plain linear layer, or a factored one when ``rank`` is given."""
    return nn.Linear(in_dim, out_dim) if rank is None else FactoredLinear(in_dim, out_dim, rank)


def whole_matrix(part: nn.Linear | FactoredLinear) -> tuple[Tensor, Tensor]:
    """Returns the weight (out, in), multiplied out where it is factored, and the bias (out,); float64 on the CPU."""
    if isinstance(part, FactoredLinear):
        inner, outer = (factor.weight.detach().double().cpu() for factor in (part.inner, part.outer))
        return outer @ inner, part.outer.bias.detach().double().cpu()
    return part.weight.detach().double().cpu(), part.bias.detach().double().cpu()
