"""Deltas, normalisation and stacking: against loops, and padding never enters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sslim.batch import Padded
from sslim.frontends.context import append_deltas, delta, stack_frames
from sslim.frontends.normalization import normalize_globally, normalize_per_utterance

LENGTHS = [9, 1, 0, 6, 2]


def batch(poison: float = 0.0) -> Padded:
    """Random features of five lengths; ``poison`` is put beyond each length."""
    values = torch.randn(len(LENGTHS), max(LENGTHS), 3, generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(LENGTHS):
        values[row, length:] = poison
    return Padded(values=values, lengths=torch.tensor(LENGTHS))


def rows(features: Padded) -> list[np.ndarray]:
    return [features.values[b, :n].numpy() for b, n in enumerate(features.lengths.tolist())]


def slope(x_TF: np.ndarray, window: int) -> np.ndarray:
    """Least-squares slope of the line through the 2 * window + 1 frames around each, edges repeated."""
    padded = np.pad(x_TF, ((window, window), (0, 0)), mode="edge")
    offsets = np.arange(-window, window + 1)
    return np.array([np.polyfit(offsets, padded[t : t + 2 * window + 1], 1)[0] for t in range(len(x_TF))])


@pytest.mark.parametrize("window", [1, 2, 3])
def test_deltas_are_regression_slopes_of_valid_frames(window: int) -> None:
    features = batch(poison=float("nan"))
    result = append_deltas(features, 2, window)
    assert (result.values[..., 3:].isfinite()).all()  # what lies beyond the lengths is never read
    for x, y in zip(rows(features), rows(result), strict=True):
        if len(x):
            first = slope(x, window)
            expected = np.concatenate([x, first, slope(first, window)], axis=1)
            np.testing.assert_allclose(y, expected, atol=1e-5)


def test_reading_padding_would_show_in_deltas() -> None:
    poisoned = batch(poison=100.0)
    blind = delta(Padded(values=poisoned.values, lengths=torch.full((len(LENGTHS),), max(LENGTHS))))
    assert (blind.values[3, :6] - delta(poisoned).values[3, :6]).abs().max() > 1.0


def test_padding_of_deltas_is_zero() -> None:
    result = delta(batch(poison=7.0))
    for row, length in enumerate(LENGTHS):
        assert (result.values[row, length:] == 0).all()


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-10, 0.1])
def test_utterance_normalization_uses_valid_frames_only(unbiased: bool, eps: float) -> None:
    result = normalize_per_utterance(batch(poison=50.0), unbiased=unbiased, eps=eps)
    for row, (x, y) in enumerate(zip(rows(batch()), rows(result), strict=True)):
        assert (result.values[row, len(x) :] == 0).all()
        if len(x) == 1:
            assert (y == 0).all()  # no deviation to divide by
        elif len(x):
            expected = (x - x.mean(axis=0)) / (x.std(axis=0, ddof=int(unbiased)) + eps)
            np.testing.assert_allclose(y, expected, atol=1e-5)


def test_the_two_divisors_differ() -> None:
    difference = normalize_per_utterance(batch(), unbiased=True).values - normalize_per_utterance(batch()).values
    assert difference[0].abs().max() > 0.05


def test_constant_channels_become_exact_zeros() -> None:
    values = torch.full((1, 1000, 2), -15.942385).requires_grad_()  # the logarithm of the floor: a rounded mean would differ
    result = normalize_per_utterance(Padded(values=values, lengths=torch.tensor([1000])), unbiased=True, eps=1e-10)
    assert (result.values == 0).all()
    result.values.sum().backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()
    naive = (values.detach() - values.detach().mean(dim=1, keepdim=True)) / 1e-10
    assert naive.abs().max() > 1.0  # what subtracting a float32 mean gives


def test_global_normalization() -> None:
    mean, std = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 2.0])
    result = normalize_globally(batch(poison=float("nan")), mean, std, eps=0.25)
    for x, y in zip(rows(batch()), rows(result), strict=True):
        np.testing.assert_allclose(y, (x - mean.numpy()) / (std.numpy() + 0.25), rtol=1e-6)
    assert (result.values[1, 1:] == 0).all()


@pytest.mark.parametrize("stack", [1, 2, 3, 4])
@pytest.mark.parametrize("tail", ["pad", "drop"])
def test_stacking_concatenates_consecutive_frames(stack: int, tail: str) -> None:
    features = batch()
    result = stack_frames(features, stack, tail)  # type: ignore[arg-type]
    for x, y in zip(rows(features), rows(result), strict=True):
        whole = len(x) // stack
        if tail == "pad" and len(x) % stack:
            x = np.concatenate([x, np.zeros((stack - len(x) % stack, 3), np.float32)])
            whole += 1
        assert len(y) == whole
        np.testing.assert_array_equal(y, x[: whole * stack].reshape(whole, stack * 3))
    for row, length in enumerate(result.lengths.tolist()):
        assert (result.values[row, length:] == 0).all()


def test_missing_partner_is_zero_after_normalization() -> None:
    mean, std = torch.full((3,), 5.0), torch.ones(3)
    odd = Padded(values=batch().values[:1, :9], lengths=torch.tensor([9]))
    right = stack_frames(normalize_globally(odd, mean, std), 2)
    assert right.values.shape == (1, 5, 6)
    assert (right.values[0, 4, 3:] == 0).all()
    assert (right.values[0, 4, :3] != 0).all()
    stacked_first = stack_frames(odd, 2)  # the other order would put -mean / std there
    wrong = normalize_globally(stacked_first, mean.repeat(2), std.repeat(2))
    assert (wrong.values[0, 4, 3:] == -5).all()


def test_no_frames_at_all() -> None:
    empty = Padded(values=torch.zeros(2, 0, 3), lengths=torch.tensor([0, 0]))
    result = stack_frames(normalize_per_utterance(append_deltas(empty, 2)), 2)
    assert result.values.shape == (2, 0, 18)
    assert result.lengths.tolist() == [0, 0]
