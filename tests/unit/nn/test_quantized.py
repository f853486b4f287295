"""int8 maps: bounds of rounding, exact integer products in both routes, frames that do not touch each other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslim.nn import quantized
from sslim.nn.encoder import BlockConfig, Encoder, EncoderConfig, LinearRanks
from sslim.nn.quantized import LARGEST, Int8Linear, has_int8_kernel, quantize_linears, quantize_rows
from sslim.nn.relative_positions import RelativePositionsConfig

SIZES = ((24, 40), (40, 24), (7, 13), (2, 3), (130, 64))


def linear_of(in_dim: int, out_dim: int, *, bias: bool = True) -> nn.Linear:
    """Rows of very different size."""
    layer = nn.Linear(in_dim, out_dim, bias=bias).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(in_dim)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layer.weight.mul_(torch.linspace(0.1, 3.0, out_dim)[:, None])
    return layer


def x_of(in_dim: int, *shape: int) -> Tensor:
    return torch.randn(*shape, in_dim, generator=torch.Generator().manual_seed(5))


def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "has_int8_kernel", lambda: False)


def by_hand(layer: nn.Linear, x: Tensor) -> Tensor:
    """The map in float64, weights and frames rounded to integers one by one."""

    def integers(rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = rows.double().abs().amax(1, keepdim=True) / 127
        return (rows.double() / scale).round(), scale

    (weight, weight_scale), (frames, frame_scale) = integers(layer.weight), integers(x.flatten(0, -2))
    product = frames @ weight.T * frame_scale * weight_scale.T + (0 if layer.bias is None else layer.bias.double())
    return product.view(*x.shape[:-1], -1)


@pytest.mark.parametrize("sizes", SIZES)
def test_weights_are_off_by_half_a_step_of_their_channel_at_most(sizes: tuple[int, int]) -> None:
    layer = linear_of(*sizes)
    small = Int8Linear.from_linear(layer)
    error = (small.dequantized() - layer.weight).abs()
    assert (error <= small.scale[:, None] * 0.5001).all()
    assert (small.weight.abs().amax(1) == LARGEST).all()
    one_scale = layer.weight.abs().max() / LARGEST  # the control: a scale for the whole matrix is worse
    assert error.sum() < ((layer.weight / one_scale).round() * one_scale - layer.weight).abs().sum()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_dynamic_is_the_integer_product_in_both_routes(sizes: tuple[int, int], bias: bool, monkeypatch) -> None:
    layer, x = linear_of(*sizes, bias=bias), x_of(sizes[0], 2, 150)
    small = Int8Linear.from_linear(layer)
    expected = by_hand(layer, x)
    fast = small(x)
    portable(monkeypatch)
    slow = small(x)
    largest = expected.abs().max()
    assert (fast - slow).abs().max() <= 1e-5 * largest
    # a quotient that ends in .5 but for float32's last bit may be rounded to the other side: one step in one place
    step = float(small.scale.max() * x.abs().max())
    assert ((slow - expected).abs() <= 1e-5 * largest).float().mean() > 0.99
    assert (slow - expected).abs().max() <= step
    assert (fast - layer(x)).norm() / layer(x).norm() < 0.02
    assert (fast - layer(x)).abs().max() > 1e-4  # the control: it is rounded at all


@pytest.mark.parametrize("sizes", SIZES)
def test_weights_alone_are_a_float_product(sizes: tuple[int, int]) -> None:
    layer, x = linear_of(*sizes), x_of(sizes[0], 3, 9)
    small = Int8Linear.from_linear(layer, dynamic=False)
    torch.testing.assert_close(small(x), F.linear(x, small.dequantized(), layer.bias), atol=5e-5, rtol=0)
    assert (small(x) - layer(x)).norm() <= (Int8Linear.from_linear(layer)(x) - layer(x)).norm()


@pytest.mark.parametrize("kernel", [True, False])
def test_a_frame_does_not_depend_on_the_others(kernel: bool, monkeypatch) -> None:
    if not kernel:
        portable(monkeypatch)
    small = Int8Linear.from_linear(linear_of(24, 40))
    x = x_of(24, 2, 170)
    x[0, 3] *= 1e4  # with one scale for all frames nothing would be left of the others
    torch.testing.assert_close(small(x)[1, 5:9], small(x[1, 5:9]), atol=1e-6, rtol=0)
    if kernel and has_int8_kernel():
        assert torch.equal(small(x)[1, 5:9], small(x[1, 5:9]))
    assert (small(x)[1] - linear_of(24, 40)(x)[1]).norm() < 0.02 * small(x)[1].norm()


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_edges(kernel: bool, dynamic: bool, monkeypatch) -> None:
    if not kernel:
        portable(monkeypatch)
    layer = linear_of(24, 40)
    layer.weight[5] = 0
    small = Int8Linear.from_linear(layer, dynamic=dynamic)
    x = x_of(24, 1, 6)
    x[0, 2] = 0
    assert torch.equal(small(x)[0, 2], layer.bias)  # silence
    assert torch.equal(small(x)[..., 5], layer.bias[5].expand(1, 6))  # a channel of zeros
    assert small(x[:, :0]).shape == (1, 0, 40)
    assert small(x[0, 0]).shape == (40,)
    assert small(x.bfloat16()).dtype == torch.bfloat16
    x[0, 4, 0] = float("nan")
    assert torch.isnan(small(x)[0, 4]).all()
    assert torch.isfinite(small(x)[0, :4]).all()


def test_a_kernel_that_saturates_is_not_used(monkeypatch) -> None:
    probe = has_int8_kernel.__wrapped__
    multiply = quantized._Packed.multiply
    if has_int8_kernel():
        assert probe()
    monkeypatch.setattr(quantized._Packed, "multiply", lambda packed, x: multiply(packed, x).clamp(max=2e6))
    assert not probe()

    def missing(*_: object) -> None:
        raise AttributeError("qlinear_prepack")

    monkeypatch.setattr(quantized._Packed, "__init__", missing)
    assert not probe()


def test_the_packed_weight_follows_the_weight() -> None:
    first, second, x = (Int8Linear.from_linear(linear_of(24, 40)), Int8Linear.from_linear(linear_of(24, 40)), x_of(24, 4))
    second.weight.neg_()
    before, other = first(x), second(x)
    copied = copy.deepcopy(first)
    assert torch.equal(copied(x), before)
    for assign in (False, True):
        changed = copy.deepcopy(first)
        changed(x)
        changed.load_state_dict(second.state_dict(), assign=assign)
        assert torch.equal(changed(x), other)
        assert not torch.equal(changed(x), before)
    first.scale.mul_(2)
    torch.testing.assert_close(first(x) - first.bias, 2 * (before - first.bias))


def test_training_is_an_error() -> None:
    small = Int8Linear.from_linear(linear_of(24, 40)).train()
    with pytest.raises(ValueError, match="train the float model and quantise it last"):
        small(x_of(24, 3))
    assert not any(parameter.requires_grad for parameter in small.parameters())


def test_every_map_of_an_encoder_changes_and_nothing_else() -> None:
    block = BlockConfig(num_heads=2, head_dim=8, feedforward_dim=12, ranks=LinearRanks(value=3))
    relative = RelativePositionsConfig(num_buckets=8, max_distance=20, num_heads=2)
    encoder = Encoder(
        EncoderConfig(dim=16, blocks=(block,), depth_map=(0, 0), positions=None, relative_positions=relative)
    ).eval()
    x = x_of(16, 1, 9)
    before = encoder(x).final.detach()
    names = {name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    quantize_linears(encoder, dynamic=True)
    changed = {name for name, module in encoder.named_modules() if isinstance(module, Int8Linear)}
    assert names - changed == {"blocks.0.attention.gate.linear"}
    assert len(changed) == 7
    assert 1e-5 < (encoder(x).final - before).norm() / before.norm() < 0.05


def test_rows_are_quantised_by_their_own_largest_value() -> None:
    integers, scale = quantize_rows(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-3, 2e-3, -2e-3]]))
    assert integers.tolist() == [[64, -127, 32], [0, 0, 0], [64, 127, -127]]
    torch.testing.assert_close(scale[[0, 2], 0], torch.tensor([2 / 127, 2e-3 / 127]))
