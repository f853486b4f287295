"""Our dropout has the distribution of torch's: rate, scale, independence, gradients, and a function of the global seed."""

import pytest
import torch

from sslim.nn.dropout import dropout


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_rate_and_scale(probability: float) -> None:
    torch.manual_seed(0)
    y = dropout(torch.ones(1001, 1000), probability, True)
    assert abs((y == 0).float().mean().item() - probability) < 0.002  # four standard errors of a million draws
    assert torch.unique(y).tolist() == pytest.approx([0.0, 1 / (1 - probability)], rel=1e-3)
    assert abs(y.mean().item() - 1) < 0.02


def test_neighbours_are_independent() -> None:
    """Four elements share a draw; their joint rates must be those of independent ones, in every position."""
    torch.manual_seed(1)
    zero = dropout(torch.ones(250_000, 4), 0.3, True) == 0
    for i in range(4):
        assert abs(zero[:, i].float().mean().item() - 0.3) < 0.005
        for j in range(i):
            assert abs((zero[:, i] & zero[:, j]).float().mean().item() - 0.09) < 0.005
    assert abs((zero[:, 0] & zero[:, 0]).float().mean().item() - 0.09) > 0.1  # the control: an element with itself


def test_gradient_is_the_mask() -> None:
    torch.manual_seed(2)
    x = torch.randn(50, 50, requires_grad=True)
    y = dropout(x, 0.4, True)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y != 0).float() / 0.6, rtol=1e-3, atol=1e-3)


def test_seed_training_and_extremes() -> None:
    x = torch.randn(33, 7)
    torch.manual_seed(3)
    first = dropout(x, 0.5, True)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x, 0.5, True))
    assert not torch.equal(first, dropout(x, 0.5, True))
    assert dropout(x, 0.5, False) is x
    assert dropout(x, 0.0, True) is x
    assert (dropout(x, 1.0, True) == 0).all()
