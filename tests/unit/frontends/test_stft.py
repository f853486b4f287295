"""Centred transforms against torch's own and against Mel triangles written out in Hz."""

import math

import pytest
import torch

from sslim.frontends import SpectralFrontendConfig, StftConfig, build_frontend

HANN = torch.hann_window(400, periodic=True, dtype=torch.float64)


def waveform(num_samples: int = 5000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.1 * torch.randn(num_samples, generator=generator) * torch.linspace(0.1, 1.0, num_samples)


def power(samples: torch.Tensor, **options: object) -> torch.Tensor:
    """(T, C) by torch's transform, which mirrors the waveform itself."""
    settings: dict = {"n_fft": 400, "hop_length": 160, "win_length": 400, "window": HANN, **options}
    return torch.stft(samples.double(), return_complex=True, center=True, pad_mode="reflect", **settings).abs().square().T


def features_of(config: StftConfig, samples: torch.Tensor, **finish: object) -> torch.Tensor:
    frontend = build_frontend(SpectralFrontendConfig(features=config, **finish))  # type: ignore[arg-type]
    return frontend(samples[None], torch.tensor([len(samples)])).values[0].double()


def triangles(num_mel_bins: int) -> torch.Tensor:
    """(C, F): HTK's scale, slopes in Hz, one number at a time."""
    top = 2595 * math.log10(1 + 8000 / 700)
    points = [700 * (10 ** (top * i / (num_mel_bins + 1) / 2595) - 1) for i in range(num_mel_bins + 2)]
    weights = torch.zeros(201, num_mel_bins, dtype=torch.float64)
    for c in range(201):
        hz = 40.0 * c
        for f in range(num_mel_bins):
            left, centre, right = points[f : f + 3]
            if left < hz <= centre:
                weights[c, f] = (hz - left) / (centre - left)
            elif centre < hz < right:
                weights[c, f] = (right - hz) / (right - centre)
    return weights


def test_bins_are_the_power_of_torchs_transform() -> None:
    samples = waveform()
    ours = features_of(StftConfig(num_mel_bins=0, log=False), samples)
    assert ours.shape == (32, 201)
    torch.testing.assert_close(ours, power(samples), rtol=1e-5, atol=1e-9)
    shifted = power(samples.roll(1))
    assert (ours - shifted).abs().max() > 1e-2  # the control


def test_windows_shorter_than_the_transform_lie_in_its_middle() -> None:
    samples = waveform()
    ours = features_of(StftConfig(num_mel_bins=0, log=False, num_bins=257), samples)
    torch.testing.assert_close(ours, power(samples, n_fft=512), rtol=1e-5, atol=1e-9)


def test_log_mel_channels_at_a_level() -> None:
    samples = waveform()
    level = samples.double() * (10 ** (-25 / 20) / (samples.double().square().mean().sqrt() + 1e-10))
    expected = (power(level) @ triangles(80) + 1e-10).log()
    ours = features_of(StftConfig(level_db=-25.0), samples)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(features_of(StftConfig(level_db=-25.0), 7 * samples), expected, rtol=0, atol=1e-5)
    assert (features_of(StftConfig(), samples) - expected).abs().min() > 0.01  # the control: without level


def test_cepstra_of_128_channels_are_torchaudios_mfcc() -> None:
    samples = waveform()
    log_mel = (power(samples) @ triangles(128) + 1e-6).log()
    k, n = torch.arange(13, dtype=torch.float64), torch.arange(128, dtype=torch.float64)[:, None]
    dct = torch.cos(math.pi / 128 * (n + 0.5) * k) * math.sqrt(2 / 128)
    dct[:, 0] /= math.sqrt(2)
    ours = features_of(StftConfig(num_mel_bins=128, log_offset=1e-6), samples, cepstra=13)
    torch.testing.assert_close(ours, log_mel @ dct, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("num_samples", "num_frames"), [(0, 0), (200, 0), (201, 2), (16000, 101), (97200, 608)])
def test_frame_counts(num_samples: int, num_frames: int) -> None:
    frontend = build_frontend(SpectralFrontendConfig(features=StftConfig()))
    assert frontend.num_frames(num_samples) == num_frames
    assert torch.equal(frontend.features.num_frames(torch.tensor([num_samples])), torch.tensor([num_frames]))


def test_chunks_of_long_audio_join(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = waveform(20000)
    whole = features_of(StftConfig(level_db=-25.0), samples)
    monkeypatch.setattr("sslim.frontends.stft.CHUNK_FRAMES", 7)
    torch.testing.assert_close(features_of(StftConfig(level_db=-25.0), samples), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_bins": 101}, "windows of 400 samples every 160 with num_bins 101: expected 2 to 200 samples"),
        ({"num_mel_bins": -1}, "num_mel_bins is -1"),
        ({"log_offset": 0.0}, "log_offset is 0"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build_frontend(SpectralFrontendConfig(features=StftConfig(**settings)))
