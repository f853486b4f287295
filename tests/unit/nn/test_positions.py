"""Convolutional positions in bf16, where some kernels of torch are wrong."""

import pytest
import torch

from sslim.nn.positions import ConvPositions, ConvPositionsConfig


@pytest.mark.parametrize("weight_norm", [True, False])
@pytest.mark.parametrize("whole", [False, True])  # a model in bf16, or autocast
@pytest.mark.parametrize(("dim", "groups", "kernel_size"), [(16, 2, 8), (24, 2, 8), (64, 16, 32), (32, 2, 16), (48, 1, 128)])
def test_bf16_is_near_float32(dim: int, groups: int, kernel_size: int, whole: bool, weight_norm: bool) -> None:
    """Groups of 8, 12, 4, 16 and 48 channels: the first three are those where a wrong kernel is off by the result's size."""
    config = ConvPositionsConfig(kernel_size=kernel_size, groups=groups, weight_norm=weight_norm)
    module = ConvPositions(dim, config)
    module.initialize(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(module.bias, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 30, dim, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    with torch.inference_mode():
        want = module(x) - x
        if whole:
            found = module.bfloat16()(x.bfloat16())
            assert found.dtype == torch.bfloat16
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = module(x)
    assert ((found.float() - x) - want).abs().mean() < 0.02 * want.abs().mean()


def test_float64_stays_exact() -> None:
    module = ConvPositions(16, ConvPositionsConfig(kernel_size=8, groups=2)).double()
    module.initialize(torch.Generator().manual_seed(0))
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact, rounded = module(x), module.float()(x.float())
    assert exact.dtype == torch.float64
    assert 0 < (exact - rounded).abs().max() < 1e-5
