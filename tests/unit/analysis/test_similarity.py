"""CKA and canonical correlation: identity, invariance, independence, streaming, frame periods; learned layer weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sslim.analysis.layer_weights import read_layer_weights
from sslim.analysis.similarity import LayerMoments, compare_layers, measure_similarity, whitening
from sslim.frontends import NormalizationConfig
from sslim.models import build_model
from sslim.models.encoding import Inputs
from sslim.models.melhubert import melhubert

NUM_FRAMES = 4000


def frames(seed: int, dim: int = 12) -> torch.Tensor:
    """Correlated channels of unequal size, with large means."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(NUM_FRAMES, dim, generator=generator) @ torch.randn(dim, dim, generator=generator)
    return mixed + 50 * torch.randn(dim, generator=generator)


def compared(first: torch.Tensor, second: torch.Tensor, parts: int = 1, kept: float = 1.0):
    moments = LayerMoments(widths=([first.shape[1]], [second.shape[1]]))
    for a, b in zip(first.chunk(parts), second.chunk(parts), strict=True):
        moments.update([a], [b])
    found = compare_layers(moments, kept)
    return found.cka[0][0], found.cca[0][0], found.pwcca[0][0]


def test_equal_and_rotated_frames_are_one_and_unrelated_ones_almost_zero():
    x = frames(0)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(9)))[0]
    assert compared(x, x) == pytest.approx((1.0, 1.0, 1.0), abs=1e-4)
    assert compared(x, 3.0 * x @ rotation + 7.0) == pytest.approx((1.0, 1.0, 1.0), abs=1e-4)
    cka, cca, pwcca = compared(x, frames(1))
    assert cka < 0.02
    assert max(cca, pwcca) < 0.15


def test_an_invertible_map_leaves_correlations_but_not_cka():
    x = frames(0)
    stretch = torch.diag(torch.tensor([30.0] + [1.0] * 11))
    cka, cca, pwcca = compared(x, x @ stretch)
    assert (cca, pwcca) == pytest.approx((1.0, 1.0), abs=1e-3)
    assert cka < 0.9


def test_cka_is_the_definition_over_all_frames_whatever_the_batches():
    x, y = frames(0), frames(2) + frames(0) @ torch.randn(12, 12, generator=torch.Generator().manual_seed(4))
    a, b = ((z - z.mean(0)).double() for z in (x, y))
    expected = float((a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm()))
    assert compared(x, y)[0] == pytest.approx(expected, abs=1e-5)
    assert compared(x, y, parts=13) == pytest.approx(compared(x, y), abs=1e-5)
    assert 0.1 < expected < 0.95


def test_directions_without_variance_do_not_count():
    x = frames(0)
    noise = 1e-3 * torch.randn(NUM_FRAMES, 12, generator=torch.Generator().manual_seed(5))
    noisy = torch.cat([x, noise], dim=1)
    other = torch.cat([x, noise.flip(0)], dim=1)
    assert compared(noisy, other, kept=0.999)[1] == pytest.approx(1.0, abs=1e-3)
    assert compared(noisy, other, kept=1.0)[1] < 0.7  # the control: counted, they halve it
    with pytest.raises(ValueError, match="kept_variance is 0"):
        whitening(torch.eye(3, dtype=torch.float64), 0.0)
    with pytest.raises(ValueError, match="same frame everywhere"):
        whitening(torch.zeros(3, 3, dtype=torch.float64))


def tiny(frame_shift_ms: int, seed: int, num_layers: int = 2):
    config = melhubert(
        frame_period_ms=frame_shift_ms,
        num_layers=num_layers,
        dim=16,
        num_heads=2,
        feedforward_dim=32,
        conv_kernel_size=8,
        conv_groups=4,
        dropout=0.0,
    )
    frontend = replace(config.frontend, normalization=NormalizationConfig(kind="utterance", eps=1e-3))
    model = build_model(replace(config, frontend=frontend, heads={}), torch.Generator().manual_seed(seed))
    for parameter in model.encoder.blocks.parameters():  # so that layers differ clearly
        parameter.data *= 8.0
    return model


def waveforms(count: int = 6) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    values = [0.1 * torch.randn(8000 + 1234 * i, generator=generator) for i in range(count)]
    return Inputs(lengths=np.array([len(v) for v in values]), unit_s=1 / 16000, read=values.__getitem__, is_waveform=True)


def test_a_model_beside_itself_is_the_model_alone():
    model, given = tiny(20, 0), waveforms()
    alone, twice = measure_similarity([model], [given]), measure_similarity([model, model], [given, given])
    for name in ("cka", "cca", "pwcca"):
        assert np.array(getattr(alone, name)) == pytest.approx(np.array(getattr(twice, name)), abs=1e-4)
    assert np.diag(alone.cka) == pytest.approx(np.ones(3), abs=1e-5)
    assert alone.cka[0][2] < 0.999
    assert np.abs(np.array(alone.pwcca) - np.array(alone.pwcca).T).max() > 1e-4  # seen from either side


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_models_of_two_frame_periods_are_compared_at_the_slower_one(order):
    models, given = [tiny(20, 0), tiny(10, 1, num_layers=1)], waveforms()
    found = measure_similarity([models[i] for i in order], [given, given])
    slow = sum(models[0].frontend.num_frames(int(n)) for n in given.lengths)
    assert slow - len(given.lengths) <= found.num_frames <= slow
    shape = (len(found.cka), len(found.cka[0]))
    assert shape == tuple((3, 2)[i] for i in order)


def test_layer_weights_are_read_from_mixed_rows_alone():
    def row(name, layer, weights):
        return {"name": name, "layer": layer, "layer_weights": weights, "mean": 0.9, "sd": 0.01}

    card = {"task": "label", "corpus": {"name": "digits"}}
    rows = [row("log-Mel", "-", [1.0]), row("small", "mix", [0.25, 0.25, 0.5]), row("small", "2", [1.0])]
    (found,) = read_layer_weights([card | {"rows": rows}])
    assert (found.name, found.weights, found.centre) == ("small", [0.25, 0.25, 0.5], 1.25)
    with pytest.raises(ValueError, match="no row of these result cards"):
        read_layer_weights([card | {"rows": rows[:1]}])
