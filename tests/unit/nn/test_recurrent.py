"""Recurrent encoders: their layers and residuals, no look into the future, nothing from padding, dropout where it belongs."""

import pytest
import torch

from sslim.nn.quantizer import QuantizerConfig
from sslim.nn.recurrent import RecurrentEncoder, RecurrentEncoderConfig

CODES = QuantizerConfig(num_codes=(6,), code_dims=(8,))


def encoder(**settings):
    config = RecurrentEncoderConfig(**{"input_dim": 5, "dims": (8, 8, 6), "dropout": 0.5, **settings})
    made = RecurrentEncoder(config)
    made.initialize(torch.Generator().manual_seed(0))
    return made.eval()


def frames(batch=3, length=20, width=5):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1))


def test_layers_are_those_of_torchs_recurrence_with_residuals_where_widths_agree():
    made, x_BTD = encoder(), frames()
    output = made(x_BTD, keep_layers=True)
    first = made.layers[0](x_BTD)[0]
    second = made.layers[1](first)[0] + first
    third = made.layers[2](second)[0]
    for found, expected in zip(output.layers, (x_BTD, first, second, third), strict=True):
        torch.testing.assert_close(found, expected)
    assert output.final is output.layers[-1]
    plain = encoder(residual=False)(x_BTD, keep_layers=True)
    assert not torch.allclose(plain.layers[2], second)
    assert [layer.shape[-1] for layer in output.layers] == list(made.config.layer_dims)


def test_a_pre_net_comes_first_and_counts_as_what_enters():
    made, x_BTD = encoder(prenet_dims=(7, 8)), frames()
    entered = made.prenet[1](made.prenet[0](x_BTD).relu()).relu()
    output = made(x_BTD, keep_layers=True)
    torch.testing.assert_close(output.layers[0], entered)
    torch.testing.assert_close(output.layers[1], made.layers[0](entered)[0] + entered)
    assert made.config.layer_dims == (8, 8, 8, 6)


def test_a_quantised_layer_is_returned_as_it_is_and_passed_on_as_codes():
    made, x_BTD = encoder(dims=(8, 8), quantizers=(CODES, CODES)), frames()
    output = made(x_BTD, keep_layers=True)
    codes = made.quantizers["0"](output.layers[1])
    torch.testing.assert_close(output.layers[2], made.layers[1](codes)[0] + codes)
    torch.testing.assert_close(output.final, made.quantizers["1"](output.layers[2]))
    assert made.final_quantizer is made.quantizers["1"]
    assert encoder(dims=(8, 8), quantizers=(CODES, None)).final_quantizer is None


def leak(made, place):
    """Largest change of a frame before ``place`` when that frame changes, and of the frames from there on."""
    x_BTD = frames(1)
    changed = x_BTD.clone()
    changed[:, place] += 3.0
    with torch.no_grad():
        whole, other = made(x_BTD, keep_layers=True), made(changed, keep_layers=True)
    pairs = list(zip((whole.final, *whole.layers), (other.final, *other.layers), strict=True))
    before = max(float((a - b)[:, :place].abs().max()) for a, b in pairs)
    return before, min(float((a - b)[:, place:].abs().max()) for a, b in pairs)


@pytest.mark.parametrize("settings", [{}, {"prenet_dims": (8,)}, {"dims": (8, 8), "quantizers": (None, CODES)}])
def test_no_frame_sees_a_later_one(settings):
    before, after = leak(encoder(**settings), 9)
    assert before == 0.0
    assert after > 1e-3 or "quantizers" in settings  # a code may stay what it was


def test_a_recurrence_in_both_directions_would_be_noticed():
    made = encoder()
    torch.manual_seed(0)
    both = torch.nn.GRU(5, 4, batch_first=True, bidirectional=True)
    made.layers[0] = both
    assert leak(made, 9)[0] > 1e-3


def test_padding_and_neighbours_change_nothing():
    made, x_BTD = encoder(), frames()
    lengths_B = torch.tensor([20, 7, 1])
    noisy = x_BTD.clone()
    noisy[1, 7:], noisy[2, 1:] = float("nan"), 1e9
    output = made(noisy, lengths_B, keep_layers=True)
    for row, length in enumerate(lengths_B.tolist()):
        alone = made(x_BTD[row : row + 1, :length], keep_layers=True)
        for batched, single in zip((output.final, *output.layers), (alone.final, *alone.layers), strict=True):
            torch.testing.assert_close(batched[row, :length], single[0], atol=1e-6, rtol=1e-6)
            assert not batched[row, length:].any()
    assert made(x_BTD[:, :0], torch.zeros(3, dtype=torch.long)).final.shape == (3, 0, 6)


def test_dropout_is_on_all_layers_but_the_last_or_on_it_too():
    made, x_BTD = encoder(dims=(8, 8), residual=False).train(), frames()
    torch.manual_seed(0)
    output = made(x_BTD, keep_layers=True)
    zeros = [float((layer == 0).float().mean()) for layer in output.layers]
    assert zeros[0] == 0
    assert 0.4 < zeros[1] < 0.6
    assert zeros[2] == 0
    dropped = encoder(dims=(8, 8), residual=False, drop_last=True).train()(x_BTD, keep_layers=True).layers
    assert all(0.4 < float((layer == 0).float().mean()) < 0.6 for layer in dropped[1:])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dims": ()}, "dims at least one"),
        ({"dims": (8, 0)}, "must be widths above 0"),
        ({"quantizers": (CODES,)}, "quantizers has 1 entries for 3 layers"),
        ({"quantizers": (CODES, CODES, CODES)}, r"code_dims \(8,\) add up to 8, layer 3 is 6 wide"),
    ],
)
def test_senseless_descriptions_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        RecurrentEncoderConfig(**{"input_dim": 5, "dims": (8, 8, 6), **settings})
