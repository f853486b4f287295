"""Masked convolutions: what a frame sees and does not see, by gradient; hidden taps as masks; batch norm over real frames."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sslim.nn.conv_encoder import ConvEncoder, ConvEncoderConfig, FrameNorm
from sslim.nn.quantizer import QuantizerConfig

SMALL = ConvEncoderConfig(input_dim=3, dim=8, dropout=0.0)


def encoder(config=SMALL, **settings):
    made = ConvEncoder(replace(config, **settings))
    made.initialize(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for module in made.modules():
        if isinstance(module, FrameNorm):  # other statistics than zeros and ones, and nothing that a relu cuts off
            module.running_mean.copy_(0.1 * torch.randn(len(module.running_mean), generator=generator))
            module.running_var.copy_(0.5 + torch.rand(len(module.running_var), generator=generator))
    return made.eval()


def frames(batch=3, length=40):
    return torch.randn(batch, length, 3, generator=torch.Generator().manual_seed(2))


def seen_by(made, place=20, length=41):
    """Offsets of the input frames that the final output at ``place`` has a gradient for."""
    x_BTD = frames(1, length).requires_grad_()
    made(x_BTD).final[0, place].square().sum().backward()
    return {int(frame) - place for frame in x_BTD.grad[0].abs().sum(-1).nonzero()}


def test_the_receptive_field_is_eleven_frames_with_a_blind_spot_of_two():
    made = encoder()
    assert seen_by(made) == {offset for offset in range(-11, 12) if abs(offset) > 2}
    assert (made.config.reach, made.config.mask) == (11, 5)


@pytest.mark.parametrize(("num_blocks", "kernel", "mask"), [(1, 5, 1), (2, 11, 3), (3, 15, 7)])
def test_other_sizes_are_as_blind_as_they_say(num_blocks, kernel, mask):
    made = encoder(num_blocks=num_blocks, kernel=kernel, mask=mask)
    reach = made.config.reach
    assert seen_by(made) == {offset for offset in range(-reach, reach + 1) if abs(offset) > mask // 2}


def test_one_tap_more_would_be_noticed():
    """The control: with the taps of the block before, the frame two to the side is seen."""
    made = encoder()
    for masked in made.masked:
        masked.num_taps += 1
    assert seen_by(made) == {offset for offset in range(-11, 12) if abs(offset) > 1}


def test_layers_are_blocks_masked_convolutions_and_their_sum():
    made, x_BTD = encoder(), frames()
    output = made(x_BTD, keep_layers=True)
    assert len(output.layers) == made.config.num_layers + 1 == 10
    x, total = x_BTD, 0
    for number, (block, masked) in enumerate(zip(made.blocks, made.masked, strict=True)):
        x = block(x, None)
        kept = masked.weight.clone()
        kept[..., masked.num_taps : 15 - masked.num_taps] = 0
        unseen = F.conv1d(x.transpose(1, 2), kept, masked.bias, padding=7).tanh().transpose(1, 2)
        torch.testing.assert_close(output.layers[2 * number + 1], x)
        torch.testing.assert_close(output.layers[2 * number + 2], unseen)
        total = total + unseen
    torch.testing.assert_close(output.final, total)
    assert output.final is output.layers[-1]
    assert [masked.num_taps for masked in made.masked] == [4, 3, 2, 1]


def test_a_quantiser_comes_after_the_layers():
    codes = QuantizerConfig(num_codes=(4, 4), code_dims=(4, 4))
    made, x_BTD = encoder(quantizer=codes), frames()
    output = made(x_BTD, keep_layers=True)
    torch.testing.assert_close(output.layers[-1], encoder()(x_BTD).final)
    torch.testing.assert_close(output.final, made.quantizer(output.layers[-1]))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_padding_and_neighbours_change_nothing(batch_norm):
    made, x_BTD = encoder(batch_norm=batch_norm), frames()
    lengths_B = torch.tensor([40, 13, 1])
    noisy = x_BTD.clone()
    noisy[1, 13:], noisy[2, 1:] = float("nan"), 1e9
    output = made(noisy, lengths_B, keep_layers=True)
    for row, length in enumerate(lengths_B.tolist()):
        alone = made(x_BTD[row : row + 1, :length], keep_layers=True)
        for batched, single in zip((output.final, *output.layers), (alone.final, *alone.layers), strict=True):
            torch.testing.assert_close(batched[row, :length], single[0], atol=1e-5, rtol=1e-5)
            assert not batched[row, length:].any()
    assert made(x_BTD[:, :0], torch.zeros(3, dtype=torch.long)).final.shape == (3, 0, 8)


def test_batch_norm_takes_statistics_of_real_frames_alone():
    x_BTD = frames(2, 9)
    padded = torch.cat([x_BTD, torch.full((2, 4, 3), 50.0)], dim=1)
    valid_BT = torch.arange(13)[None] < torch.tensor([9, 5])[:, None]
    norm, reference = FrameNorm(3).train(), torch.nn.BatchNorm1d(3).train()
    real_MD = torch.cat([x_BTD[0], x_BTD[1, :5]])
    expected = reference(real_MD)
    found = norm(padded, valid_BT)
    torch.testing.assert_close(found[valid_BT], expected)
    assert not found[~valid_BT].any()
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(norm, name), getattr(reference, name))
    norm.eval(), reference.eval()
    torch.testing.assert_close(norm(x_BTD, None).flatten(0, 1), reference(x_BTD.flatten(0, 1)))
    before = norm.running_var.clone()
    alone = norm.train()(x_BTD[:1, :1], None)  # one frame has no variance: the running statistics serve
    torch.testing.assert_close(alone, norm.eval()(x_BTD[:1, :1], None))
    assert torch.equal(norm.running_var, before)


def test_in_training_frames_of_one_batch_share_statistics_and_hidden_taps_learn_nothing():
    made = encoder().train()
    made(frames(), torch.tensor([40, 13, 1])).final.square().sum().backward()
    for masked in made.masked:
        hidden = masked.weight.grad[..., masked.num_taps : 15 - masked.num_taps]
        assert not hidden.any()
        assert masked.weight.grad[..., 0].any()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kernel": 14}, "must be odd"),
        ({"mask": 4}, "must be odd"),
        ({"num_blocks": 5}, "kernel 15 and mask 5 must be odd, and kernel larger than mask .* 15"),
        ({"dim": 0}, "must be at least 1"),
        ({"quantizer": QuantizerConfig(num_codes=(2,), code_dims=(4,))}, "add up to 4, a frame is 8 wide"),
    ],
)
def test_senseless_descriptions_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(SMALL, **settings)
