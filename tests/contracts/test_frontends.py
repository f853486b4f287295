"""What every front-end promises: one body over a table of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sslim.batch import Padded
from sslim.data.feature_presets import PRESETS
from sslim.frontends import (
    HUBERT_CONV_LAYERS,
    ConvFrontend,
    ConvFrontendConfig,
    FilterbankConfig,
    Frontend,
    MfccConfig,
    NormalizationConfig,
    SpectralFrontend,
    SpectralFrontendConfig,
    SpectrogramConfig,
    StftConfig,
    StoredFeaturesConfig,
    build_frontend,
)

MELHUBERT = FilterbankConfig(num_mel_bins=40, window="hamming", waveform_scale=32768.0)
GLOBAL = NormalizationConfig(kind="global")
UTTERANCE = NormalizationConfig(kind="utterance", unbiased=True, eps=1e-10)

FRONTENDS: dict[str, SpectralFrontendConfig] = {
    "melhubert 10 ms": SpectralFrontendConfig(features=MELHUBERT, normalization=GLOBAL),
    "melhubert 20 ms": SpectralFrontendConfig(features=MELHUBERT, normalization=GLOBAL, stack=2),
    "three, tail dropped": SpectralFrontendConfig(features=MELHUBERT, stack=3, stack_tail="drop"),
    "s3prl fbank": SpectralFrontendConfig(features=FilterbankConfig(num_mel_bins=80), deltas=2, normalization=UTTERANCE),
    "s3prl mfcc": SpectralFrontendConfig(features=MfccConfig(), deltas=2, normalization=UTTERANCE),
    "s3prl spectrogram": SpectralFrontendConfig(features=SpectrogramConfig(), normalization=UTTERANCE),
    "s3prl log-Mel": SpectralFrontendConfig(features=StftConfig(level_db=-25.0), normalization=UTTERANCE),
    "s3prl linear, stacked": SpectralFrontendConfig(
        features=StftConfig(num_mel_bins=0, level_db=-25.0), normalization=UTTERANCE, stack=3, stack_tail="drop"
    ),
    "s3prl cepstra": SpectralFrontendConfig(
        features=StftConfig(num_mel_bins=128, log_offset=1e-6), cepstra=13, deltas=2, normalization=UTTERANCE
    ),
    "centred, energy": SpectralFrontendConfig(features=FilterbankConfig(snip_edges=False, use_energy=True), deltas=1),
    "cepstra of the filterbank": SpectralFrontendConfig(
        features=MELHUBERT, cepstra=13, deltas=2, normalization=NormalizationConfig(kind="utterance")
    ),
    "utterance, stacked": SpectralFrontendConfig(
        features=MELHUBERT, normalization=NormalizationConfig(kind="utterance"), stack=2
    ),
}
FRONTENDS |= {
    f"preset {name}": preset.frontend
    for name, preset in PRESETS.items()
    if preset.frontend is not None and not isinstance(preset.frontend.features, StoredFeaturesConfig)
    if name.endswith(("-librosa", "-speaker", "1025")) or name == "spectrogram"
}
WIDTHS = (9, 12, 7, 10, 8, 11, 6)
CONV = tuple(replace(layer, channels=width) for layer, width in zip(HUBERT_CONV_LAYERS, WIDTHS, strict=True))
CONVOLUTIONS: dict[str, ConvFrontendConfig] = {
    "convolutions, group norm": ConvFrontendConfig(layers=CONV, gradient_scale=0.1),
    "convolutions, group norm, factors": ConvFrontendConfig(layers=CONV, bias=True, channel_scale=True),
    "convolutions, layer norm": ConvFrontendConfig(layers=CONV, norm="layer", bias=True, normalize_waveform=True),
}
EVERY = [*FRONTENDS, *CONVOLUTIONS]
LENGTHS = (0, 1, 79, 80, 239, 240, 399, 400, 401, 559, 560, 561, 719, 720, 721, 879, 880, 1039, 1040, 3333)


def build(name: str) -> SpectralFrontend:
    frontend = build_frontend(FRONTENDS[name])
    if frontend.config.normalization.kind == "global":
        generator = torch.Generator().manual_seed(5)
        mean, std = torch.randn(40, generator=generator) + 10, torch.rand(40, generator=generator) + 2
        frontend.set_statistics(mean, std, source="drawn")
    return frontend


def build_convolutions(name: str) -> ConvFrontend:
    frontend = build_frontend(CONVOLUTIONS[name])
    generator = torch.Generator().manual_seed(5)
    frontend.initialize(generator)
    with torch.no_grad():  # norms, biases and factors other than ones and zeros
        for parameter in frontend.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return frontend


def build_any(name: str) -> SpectralFrontend | ConvFrontend:
    return build(name) if name in FRONTENDS else build_convolutions(name)


@dataclass(frozen=True, kw_only=True)
class Speechlike:
    """Noise whose level changes, in rows of several lengths, with large garbage beyond them."""

    lengths: tuple[int, ...] = (8000, 5000, 3333, 1, 400, 7999)

    def batch(self, garbage: float = 0.0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(6)
        waveform = torch.randn(len(self.lengths), max(self.lengths), generator=generator)
        waveform *= 0.1 * torch.linspace(0, 40, waveform.shape[1]).sin().abs()
        for row, length in enumerate(self.lengths):
            waveform[row, length:] = garbage
        return waveform, torch.tensor(self.lengths)


def single(frontend: Frontend, waveform: Tensor) -> Tensor:
    return frontend(waveform[None], torch.tensor([len(waveform)])).values[0]


def matches_singles(frontend: Frontend, garbage: float, lengths: Tensor | None = None) -> bool:
    waveform, true_lengths = Speechlike().batch(garbage)
    output = frontend(waveform, true_lengths if lengths is None else lengths)
    for row, length in enumerate(true_lengths.tolist()):
        alone = single(frontend, waveform[row, :length])
        if len(alone) != int(output.lengths[row]) or (output.values[row, len(alone) :] != 0).any():
            return False
        if len(alone) and (output.values[row, : len(alone)] - alone).abs().max() > 1e-5:
            return False
    return True


@pytest.mark.parametrize("name", FRONTENDS)
def test_attributes_agree_with_output(name: str) -> None:
    frontend = build(name)
    assert isinstance(frontend, Frontend)
    waveform, lengths = Speechlike().batch()
    base = frontend.base_features(waveform, lengths)
    output = frontend.finish(base)
    assert base.values.shape == (len(lengths), frontend.num_base_frames(8000), frontend.base_dim)
    assert output.values.shape == (len(lengths), frontend.num_frames(8000), frontend.feature_dim)
    assert torch.equal(output.values, frontend(waveform, lengths).values)
    assert frontend.frame_shift_s == pytest.approx(frontend.base_frame_shift_s * frontend.stack)
    assert isinstance(frontend.num_frames(8000), int)
    assert output.values.std() > 0.1  # not a constant


@pytest.mark.parametrize("name", EVERY)
def test_length_formula_is_the_real_length(name: str) -> None:
    frontend = build_any(name)
    waveform = torch.randn(max(LENGTHS), generator=torch.Generator().manual_seed(7))
    counts = []
    for num_samples in LENGTHS:
        output = frontend(waveform[None, :num_samples], torch.tensor([num_samples]))
        assert output.lengths.tolist() == [frontend.num_frames(num_samples)] == [output.values.shape[1]]
        assert output.values.isfinite().all()
        if name in FRONTENDS:
            base = frontend.base_features(waveform[None, :num_samples], torch.tensor([num_samples]))
            assert base.lengths.tolist() == [frontend.num_base_frames(num_samples)] == [base.values.shape[1]]
            assert frontend.num_stacked_frames(int(base.lengths[0])) == int(output.lengths[0])
        counts.append(int(output.lengths[0]))
    assert counts == sorted(counts)
    assert counts[0] == counts[1] == 0 < counts[-1]  # neither nothing nor one sample is a frame
    frame = round(frontend.frame_shift_s * frontend.sample_rate)
    assert frontend.num_frames(3333) != frontend.num_frames(3333 + frame)  # a formula that ignores its argument would fail


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("garbage", [0.0, 1.0])
def test_an_utterance_does_not_depend_on_its_batch(name: str, garbage: float) -> None:
    assert matches_singles(build_any(name), garbage)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_attributes_of_convolutions_agree_with_output(name: str) -> None:
    frontend = build_convolutions(name)
    assert isinstance(frontend, Frontend)
    output = frontend(*Speechlike().batch())
    assert output.values.shape == (6, frontend.num_frames(8000), frontend.feature_dim) == (6, 24, 6)
    assert frontend.frame_shift_s == frontend.base_frame_shift_s == 320 / frontend.sample_rate
    assert (frontend.base_dim, frontend.statistics_source) == (0, None)
    assert output.values.std() > 0.05  # not a constant
    for refused in (lambda: frontend.base_features(*Speechlike().batch()), lambda: frontend.finish(output)):
        with pytest.raises(ValueError, match="convolutional front-end"):
            refused()


@pytest.mark.parametrize("name", EVERY)
def test_lost_lengths_would_be_noticed(name: str) -> None:
    frontend = build_any(name)
    assert not matches_singles(frontend, 1.0, torch.full((len(Speechlike().lengths),), 8000))


@pytest.mark.parametrize("name", FRONTENDS)
def test_padding_of_stored_features_never_enters(name: str) -> None:
    frontend = build(name)
    base = frontend.base_features(*Speechlike().batch())
    expected = frontend.finish(base)
    wider = torch.nn.functional.pad(base.values, (0, 0, 0, 5))
    result = frontend.finish(Padded(values=wider, lengths=base.lengths))
    assert torch.equal(result.lengths, expected.lengths)
    size = expected.values.shape[1]
    torch.testing.assert_close(result.values[:, :size], expected.values, rtol=0, atol=1e-5)
    assert (result.values[:, size:] == 0).all()
    longer = frontend.finish(Padded(values=wider, lengths=base.lengths + 5))  # padding taken for frames shows
    assert not torch.equal(longer.lengths, expected.lengths)


@pytest.mark.parametrize("name", EVERY)
def test_silence_is_finite_and_so_is_its_gradient(name: str) -> None:
    frontend = build_any(name)
    for level in (0.0, 0.25):  # digital silence, and nothing but an offset
        waveform = torch.full((2, 4000), level).requires_grad_()
        output = frontend(waveform, torch.tensor([4000, 1234]))
        assert output.values.isfinite().all()
        output.values.square().sum().backward()
        assert waveform.grad is not None
        assert waveform.grad.isfinite().all()
    broken = frontend(torch.full((1, 4000), float("nan")), torch.tensor([4000]))
    assert not broken.values.isfinite().all()  # the check sees what is not finite


@pytest.mark.parametrize("name", EVERY)
def test_gradient_reaches_every_sample_of_a_frame_and_no_other(name: str) -> None:
    frontend = build_any(name)
    waveform, lengths = Speechlike(lengths=(4000, 2000)).batch()
    waveform.requires_grad_()
    output = frontend(waveform, lengths)
    weights = torch.randn(output.values.shape, generator=torch.Generator().manual_seed(8))
    (output.values * weights).sum().backward()
    assert waveform.grad is not None
    assert waveform.grad.isfinite().all()
    assert (waveform.grad[0, 400:3000] != 0).float().mean() > 0.9
    assert (waveform.grad[1, 2000:] == 0).all()


@pytest.mark.parametrize("name", FRONTENDS)
def test_float16_store_gives_nearly_the_same(name: str) -> None:
    frontend = build(name)
    base = frontend.base_features(*Speechlike().batch())
    stored = frontend.finish(Padded(values=base.values.half(), lengths=base.lengths))
    assert stored.values.dtype == torch.float32
    # float16 has 11 bits: 0.008 at log-Mel values around 16, times 1 / std
    assert (stored.values - frontend.finish(base).values).abs().mean() < 0.01


@pytest.mark.parametrize("name", EVERY)
def test_equal_input_equal_output(name: str) -> None:
    waveform, lengths = Speechlike().batch()
    first, second = build_any(name)(waveform, lengths), build_any(name)(waveform, lengths)
    assert torch.equal(first.values, second.values)  # no dither
    assert not torch.equal(first.values, build_any(name)(waveform * 0.5 + 1e-3 * waveform.square(), lengths).values)
