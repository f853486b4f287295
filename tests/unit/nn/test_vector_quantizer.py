"""Vector quantisation: hard choices, soft gradients, noise from a generator that padding does not disturb."""

import pytest
import torch

from sslim.nn.quantizer import Quantizer, QuantizerConfig, gumbel_noise

GROUPS = QuantizerConfig(num_codes=(5, 7), code_dims=(4, 8), temperature=0.5)


def quantizer(config=GROUPS):
    made = Quantizer(config)
    made.initialize(torch.Generator().manual_seed(0))
    return made


def frames(batch=3, length=11):
    return torch.randn(batch, length, 12, generator=torch.Generator().manual_seed(1))


def is_code(group, x_MD):
    """(M,) whether each frame is one of the group's codes."""
    return (x_MD[:, None] - group.codes[None]).abs().amax(-1).amin(-1) < 1e-6


def test_in_eval_mode_the_code_of_the_largest_logit_is_taken():
    made, x_BTD = quantizer().eval(), frames()
    chosen_BTD = made(x_BTD)
    for index, (group, channels) in enumerate(zip(made.groups, (slice(0, 4), slice(4, 12)), strict=True)):
        logits = x_BTD[..., channels] @ group.weight.T + group.bias
        assert torch.equal(chosen_BTD[..., channels], group.codes[logits.argmax(-1)])
        assert torch.equal(made.choices(x_BTD)[..., index], logits.argmax(-1))
    assert torch.equal(chosen_BTD, made(x_BTD))


def test_while_training_codes_are_drawn_as_often_as_the_softmax_says():
    made = quantizer(QuantizerConfig(num_codes=(3,), code_dims=(2,), temperature=0.3)).train()
    x_BTD = torch.tensor([0.7, -1.2]).expand(1, 20_000, 2)
    drawn = made(x_BTD, generator=torch.Generator().manual_seed(0))[0]
    (group,) = made.groups
    assert is_code(group, drawn).all()
    shares = torch.stack([(drawn - code).abs().amax(-1) < 1e-6 for code in group.codes]).float().mean(1)
    expected = (x_BTD[0, 0] @ group.weight.T + group.bias).softmax(-1)
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)
    assert expected.max() < 0.9  # the control: it does not always take the largest


def test_gradients_are_those_of_the_soft_choice():
    made = quantizer(QuantizerConfig(num_codes=(5,), code_dims=(4,), temperature=0.7)).train()
    x_BTD = frames()[:1, :6, :4].requires_grad_()
    weights = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(2))
    (made(x_BTD, generator=torch.Generator().manual_seed(3)) * weights).sum().backward()
    (group,) = made.groups
    found = x_BTD.grad.clone()
    x_BTD.grad = None
    noise = gumbel_noise(6, 5, x_BTD.device, torch.Generator().manual_seed(3))
    soft = ((x_BTD[0] @ group.weight.T + group.bias + noise) / 0.7).softmax(-1) @ group.codes
    (soft * weights[0]).sum().backward()
    torch.testing.assert_close(found, x_BTD.grad)
    assert found.abs().max() > 0


def test_padding_changes_no_draw():
    made, x_BTD = quantizer().train(), frames()
    lengths_B = torch.tensor([11, 4, 7])
    padded = torch.cat([x_BTD, torch.full((3, 5, 12), 9.0)], dim=1)
    whole = made(x_BTD, lengths_B, torch.Generator().manual_seed(0))
    longer = made(padded, lengths_B, torch.Generator().manual_seed(0))
    torch.testing.assert_close(longer[:, :11], whole)
    assert not longer[1, 4:].any()
    assert not torch.equal(whole, made(x_BTD, lengths_B, torch.Generator().manual_seed(1)))  # the control: noise there is


def test_code_entropy_counts_valid_frames_alone():
    made, lengths_B = quantizer().eval(), torch.tensor([6, 6])
    x_BTD = frames(1, 1).expand(2, 12, 12).clone()
    x_BTD[:, 6:] = frames(2, 6)
    assert made.code_entropy(x_BTD, lengths_B) == 0
    assert made.code_entropy(x_BTD, torch.tensor([12, 12])) > 0.1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_codes": (3,), "code_dims": (4, 4)}, "must name the same groups"),
        ({"num_codes": (), "code_dims": ()}, "at least one"),
        ({"num_codes": (0,), "code_dims": (4,)}, "must be above 0"),
        ({"num_codes": (3,), "code_dims": (4,), "temperature": 0.0}, "temperature 0 must be above 0"),
    ],
)
def test_senseless_codebooks_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        QuantizerConfig(**settings)
