"""librosa's features as S3PRL v0.1 stored them, against definitions written out in float64.

The code was compared with librosa 0.11 itself (``pad_mode="reflect"``, librosa's default before 0.10) on a LibriSpeech
utterance, with and without a second of digital silence: log-Mel within 1e-6, MFCC within 2e-4, their deltas within 2e-5.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sslim.batch import Padded
from sslim.data.feature_presets import PRESETS
from sslim.frontends import SpectralFrontend, SpectralFrontendConfig, StftConfig, StftMfccConfig, build_frontend
from sslim.frontends.config import DecibelConfig
from sslim.frontends.context import savitzky_golay

RATE = 16000


def sound(num_samples: int = 8000) -> np.ndarray:
    """Noise in bursts, with digital silence between them."""
    rng = np.random.default_rng(0)
    level = np.repeat(rng.uniform(0.0, 0.3, 20), -(-num_samples // 20))[:num_samples]
    waveform = level * rng.standard_normal(num_samples)
    waveform[3000:5000] = 0.0
    return waveform.astype(np.float32)


def frames(waveform: np.ndarray, size: int, hop: int) -> np.ndarray:
    padded = np.pad(waveform.astype(np.float64), size // 2, mode="reflect")
    return np.stack([padded[t * hop : t * hop + size] for t in range(1 + len(waveform) // hop)])


def magnitude(waveform: np.ndarray, size: int, window: int, hop: int) -> np.ndarray:
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    before = (size - window) // 2
    return np.abs(np.fft.rfft(frames(waveform, size, hop) * np.pad(hann, (before, size - window - before))))


def slaney_hz(mel: float) -> float:
    """200 / 3 Hz a Mel up to 1 kHz, then 27 steps to a factor of 6.4."""
    return 200 / 3 * mel if mel < 15 else 1000 * np.exp(np.log(6.4) / 27 * (mel - 15))


def slaney(num_mel_bins: int, size: int) -> np.ndarray:
    """(C, F), one number at a time."""
    top = 15 + 27 * np.log(8000 / 1000) / np.log(6.4)
    points = [slaney_hz(top * i / (num_mel_bins + 1)) for i in range(num_mel_bins + 2)]
    weights = np.zeros((size // 2 + 1, num_mel_bins))
    for c in range(size // 2 + 1):
        hz = c * RATE / size
        for f in range(num_mel_bins):
            left, centre, right = points[f : f + 3]
            weights[c, f] = max(0.0, min((hz - left) / (centre - left), (right - hz) / (right - centre))) * 2 / (right - left)
    return weights


def log_mel(waveform: np.ndarray, size: int, window: int, hop: int) -> np.ndarray:
    return np.log(magnitude(waveform, size, window, hop) ** 2 @ slaney(80, size) + 1e-6)


def mfcc(waveform: np.ndarray) -> np.ndarray:
    level = 10 * np.log10(np.maximum(magnitude(waveform, 400, 400, 160) ** 2 @ slaney(128, 400), 1e-10))
    level = np.maximum(level, level.max() - 80)
    order, band = np.arange(13), np.arange(128)[:, None]
    cepstra = level @ (np.sqrt(2 / 128) * np.cos(np.pi / 128 * (band + 0.5) * order))
    cepstra[:, 0] = np.sqrt((frames(waveform, 400, 160) ** 2).mean(axis=1))
    return cepstra


def linear(waveform: np.ndarray) -> np.ndarray:
    emphasized = waveform.astype(np.float64) - 0.97 * np.concatenate([[0.0], waveform[:-1].astype(np.float64)])
    level = 20 * np.log10(np.maximum(1e-5, magnitude(emphasized, 2048, 800, 200))) - 20
    return np.clip((level + 100) / 100, 0, 1)


def derivative(values: np.ndarray, order: int) -> np.ndarray:
    """Polynomials fitted by numpy, over nine frames; at the edges those of the outermost nine."""
    result = np.zeros_like(values)
    for t in range(len(values)):
        middle = min(max(t, 4), len(values) - 5)
        fitted = np.polynomial.polynomial.polyfit(np.arange(-4, 5), values[middle - 4 : middle + 5], order)
        result[t] = fitted[order] * order  # the derivative of that order is constant
    return result


STATIC = {
    "fbank240-librosa": (lambda x: log_mel(x, 400, 400, 160), 2e-6),
    "mel240-librosa": (lambda x: log_mel(x, 2048, 800, 200), 2e-6),
    "mfcc39-librosa": (mfcc, 5e-4),
    "linear1025": (linear, 1e-6),
}


def built(name: str) -> SpectralFrontend:
    config = PRESETS[name].frontend
    assert config is not None
    return build_frontend(config)


@pytest.mark.parametrize("name", STATIC)
def test_static_features_deltas_and_normalisation(name: str) -> None:
    define, tolerance = STATIC[name]
    waveform, frontend = sound(), built(name)
    lengths = torch.tensor([len(waveform)])
    base = frontend.base_features(torch.from_numpy(waveform)[None], lengths)
    static = define(waveform)
    np.testing.assert_allclose(base.values[0], static, rtol=0, atol=tolerance)
    deltas = [derivative(static, order) for order in range(1, frontend.config.deltas + 1)]
    whole = np.concatenate([static, *deltas], axis=1)
    np.testing.assert_allclose(frontend.unnormalized(base).values[0], whole, rtol=0, atol=tolerance)
    normalized = (whole - whole.mean(axis=0)) / (whole.std(axis=0) + 1e-16)
    moving = whole.std(axis=0) > 1e-4  # bins cut at 0 all the time are zeros here, rounding errors over 1e-16 there
    np.testing.assert_allclose(frontend.finish(base).values[0, :, moving], normalized[:, moving], rtol=0, atol=1e-3)


def test_other_definitions_would_show() -> None:
    waveform = torch.from_numpy(sound())[None]
    lengths = torch.tensor([waveform.shape[1]])

    def features(config: StftConfig | StftMfccConfig) -> torch.Tensor:
        return build_frontend(SpectralFrontendConfig(features=config)).base_features(waveform, lengths).values

    slaneys = StftConfig(mel_scale="slaney", log_offset=1e-6)
    assert (features(slaneys) - features(StftConfig(log_offset=1e-6))).abs().median() > 0.5
    assert (features(StftMfccConfig()) - features(StftMfccConfig(range_db=20.0))).abs().max() > 1.0
    assert (features(StftMfccConfig())[..., 0] - features(StftMfccConfig(rms=False))[..., 0]).abs().min() > 1.0


@pytest.mark.parametrize(
    ("name", "counts"), [("fbank160-librosa", (101, 608)), ("mel160-librosa", (81, 487)), ("linear1025", (81, 487))]
)
def test_frames_of_one_second_and_of_six(name: str, counts: tuple[int, int]) -> None:
    assert tuple(built(name).num_frames(num_samples) for num_samples in (16000, 97200)) == counts


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("num_frames", [9, 10, 23])
def test_savitzky_golay_is_a_fitted_polynomial(order: int, num_frames: int) -> None:
    generator = torch.Generator().manual_seed(num_frames)
    values = torch.randn(2, 30, 3, generator=generator, dtype=torch.float64)
    result = savitzky_golay(Padded(values=values, lengths=torch.tensor([num_frames, 30])), order)
    expected = derivative(values[0, :num_frames].numpy(), order)
    np.testing.assert_allclose(result.values[0, :num_frames], expected, atol=1e-12)
    assert (result.values[0, num_frames:] == 0).all()
    np.testing.assert_allclose(result.values[1], derivative(values[1].numpy(), order), atol=1e-12)


def test_less_than_a_window_is_extended_by_its_last_frame() -> None:
    values = torch.randn(1, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    longer = torch.cat([values, values[:, -1:].expand(-1, 4, -1)], dim=1).numpy()[0]
    for order in (1, 2):
        result = savitzky_golay(Padded(values=values, lengths=torch.tensor([5])), order).values[0]
        np.testing.assert_allclose(result, derivative(longer, order)[:5], atol=1e-12)
        constant = savitzky_golay(Padded(values=torch.full((1, 5, 2), 0.1), lengths=torch.tensor([5])), order).values
        assert (constant == 0).all()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (StftConfig(preemphasis=1.5), "preemphasis is 1.5"),
        (StftConfig(decibels=DecibelConfig()), "expected num_mel_bins 0 and log false"),
        (StftConfig(num_mel_bins=0, log=False, decibels=DecibelConfig(range_db=0.0)), "above zero"),
        (StftMfccConfig(num_coefficients=129), "num_coefficients is 129; with 128 Mel channels"),
        (StftMfccConfig(range_db=0.0), "range_db above zero"),
        (StftMfccConfig(spectrum=StftConfig(num_mel_bins=128)), "spectrum.log false"),
    ],
)
def test_impossible_transforms_are_refused(config: StftConfig | StftMfccConfig, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build_frontend(SpectralFrontendConfig(features=config))
