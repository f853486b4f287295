"""Measures of labels against hand-computed values and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sslim.targets.quality import num_runs, perplexity, phone_measures


def test_hand_computed():
    """Two phones, three clusters, eight frames."""
    measures = phone_measures(np.array([[3, 1, 0], [0, 1, 3]]))
    assert measures["phone_purity"] == pytest.approx((3 + 1 + 3) / 8)
    assert measures["cluster_purity"] == pytest.approx((3 + 3) / 8)
    # H(phone) = log 2; cluster 1 leaves it whole (1/4 of the frames), the others leave nothing
    assert measures["pnmi"] == pytest.approx(3 / 4)


def test_scikit_learn_agrees():
    from sklearn.metrics import mutual_info_score

    rng = np.random.default_rng(0)
    phones = rng.integers(0, 12, 3000)
    clusters = np.where(rng.random(3000) < 0.5, phones * 3 % 20, rng.integers(0, 20, 3000))
    joint = np.zeros((12, 20), dtype=int)
    np.add.at(joint, (phones, clusters), 1)
    shares = np.bincount(phones) / 3000
    expected = mutual_info_score(phones, clusters) / -(shares * np.log(shares)).sum()
    assert phone_measures(joint)["pnmi"] == pytest.approx(expected, rel=1e-9)


def test_perfect_and_shuffled_labels():
    rng = np.random.default_rng(0)
    phones = rng.integers(0, 10, 20_000)
    for clusters, low, high in ((phones, 1.0, 1.0), (rng.permutation(phones), 0.0, 0.01)):
        joint = np.zeros((10, 10), dtype=int)
        np.add.at(joint, (phones, clusters), 1)
        assert low - 1e-9 <= phone_measures(joint)["pnmi"] <= high + 1e-9
    assert phone_measures(np.array([[5, 5]]))["pnmi"] == 0.0  # one phone: nothing to know
    with pytest.raises(ValueError, match="at least one frame"):
        phone_measures(np.zeros((2, 2)))


def test_perplexity_counts_equally_used_clusters():
    assert perplexity(np.array([7, 7, 0, 7])) == pytest.approx(3.0)
    assert perplexity(np.array([3, 1])) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert perplexity(np.zeros(3)) == 0.0


def test_runs():
    assert [num_runs(np.array(x)) for x in ([], [4], [4, 4, 4], [4, 5, 5, 4])] == [0, 1, 1, 3]
