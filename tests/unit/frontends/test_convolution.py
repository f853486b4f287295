"""The convolutional front-end against torch's own convolutions, alone and in batches."""

from dataclasses import replace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslim.frontends import ConvFrontend, ConvFrontendConfig, ConvLayerConfig, build_frontend
from sslim.frontends import convolution as module
from sslim.frontends.convolution import ConvLayer, coarse_num_frames, window_moments

SMALL = tuple(
    ConvLayerConfig(channels=c, kernel=k, stride=s)
    for c, k, s in [(12, 10, 5), (8, 3, 2), (8, 3, 2), (10, 3, 2), (8, 3, 2), (8, 2, 2), (6, 2, 2)]
)
VARIANTS = [
    ConvFrontendConfig(layers=SMALL),
    ConvFrontendConfig(layers=SMALL, norm="layer"),
    ConvFrontendConfig(layers=SMALL, norm="layer", bias=True, normalize_waveform=True),
    ConvFrontendConfig(layers=SMALL, bias=True, channel_scale=True),
    ConvFrontendConfig(
        layers=(ConvLayerConfig(channels=4, kernel=7, stride=3), ConvLayerConfig(channels=5, kernel=5, stride=1))
    ),
]


def frontend(config: ConvFrontendConfig) -> ConvFrontend:
    built = build_frontend(config)
    generator = torch.Generator().manual_seed(0)
    built.initialize(generator)
    for name, parameter in built.named_parameters():
        if "norm" in name or "bias" in name or name == "scale":
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") or name == "scale" else 0.0, 0.3, generator=generator)
    return built


def plain(built: ConvFrontend, waveform_BS: Tensor) -> Tensor:
    """The textbook form: channels first, torch's convolution, norm and GELU one after another."""
    if built.config.normalize_waveform:
        waveform_BS = F.layer_norm(waveform_BS, waveform_BS.shape[1:], eps=built.config.waveform_eps)
    x_BCT = waveform_BS[:, None]
    for child in built.layers:
        layer = cast(ConvLayer, child)
        x_BCT = F.conv1d(x_BCT, layer.weight, layer.bias, stride=layer.config.stride)
        if layer.norm_kind == "group":
            x_BCT = cast(nn.GroupNorm, layer.norm)(x_BCT)
        elif layer.norm_kind == "layer":
            x_BCT = cast(nn.LayerNorm, layer.norm)(x_BCT.transpose(1, 2)).transpose(1, 2)
        x_BCT = F.gelu(x_BCT)
    x_BTC = x_BCT.transpose(1, 2)
    return x_BTC if built.scale is None else x_BTC * built.scale


def noise(*shape: int) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(1)) + 0.02


@pytest.mark.parametrize("config", VARIANTS)
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_torchs_convolutions_with_and_without_gradients(config: ConvFrontendConfig, batch: int) -> None:
    built, waveform_BS = frontend(config), noise(batch, 4000)
    lengths_B = torch.full((batch,), 4000)
    expected = plain(built, waveform_BS)
    trained = built(waveform_BS, lengths_B)
    with torch.no_grad():
        frozen = built(waveform_BS, lengths_B)
    assert trained.values.shape[1] == built.num_frames(4000)
    torch.testing.assert_close(trained.values, expected, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(frozen.values, expected, atol=5e-6, rtol=1e-5)
    parameters = [p for name, p in built.named_parameters() if name != "layers.0.bias" or config.norm == "layer"]
    ours = torch.autograd.grad(trained.values.square().sum(), parameters)
    theirs = torch.autograd.grad(expected.square().sum(), parameters)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, atol=1e-4 * float(other.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("config", VARIANTS)
@pytest.mark.parametrize("training", [False, True])
def test_an_utterance_has_the_same_features_whatever_it_is_batched_with(config: ConvFrontendConfig, training: bool) -> None:
    built, waveform_BS = frontend(config), noise(3, 5000)
    lengths_B = torch.tensor([5000, 3111, 450])
    with torch.set_grad_enabled(training):
        together = built(waveform_BS, lengths_B)  # what lies beyond the lengths is noise, not zeros
        for row, length in enumerate(lengths_B.tolist()):
            alone = built(waveform_BS[row : row + 1, :length], torch.tensor([length]))
            frames = built.num_frames(length)
            assert together.lengths[row] == alone.lengths[0] == frames
            torch.testing.assert_close(together.values[row, :frames], alone.values[0], atol=1e-5, rtol=1e-5)
            assert not together.values[row, frames:].any()


def test_chunks_meet_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    built, waveform_BS = frontend(VARIANTS[0]), noise(1, 9000)
    with torch.no_grad():
        whole = built(waveform_BS, torch.tensor([9000])).values
        for size in (1, 2, 5, 27):
            monkeypatch.setattr(module, "CHUNK_FRAMES", size)
            torch.testing.assert_close(built(waveform_BS, torch.tensor([9000])).values, whole, atol=2e-6, rtol=1e-5)


def test_frame_arithmetic_of_the_published_stack() -> None:
    built = build_frontend(ConvFrontendConfig())
    counts = {399: 0, 400: 1, 719: 1, 720: 2, 10000: 31, 16000: 49, 16320: 50, 250000: 781}
    assert {samples: built.num_frames(samples) for samples in counts} == counts
    assert built.frame_shift_s == pytest.approx(0.02)
    assert sum(p.numel() for p in built.parameters()) == 4_200_448


def test_gradients_into_the_stack_are_scaled_and_zero_freezes_it() -> None:
    whole = frontend(VARIANTS[0])
    tenth, frozen = (frontend(replace(VARIANTS[0], gradient_scale=scale)) for scale in (0.1, 0.0))
    waveform_BS, lengths_B = noise(2, 2000), torch.tensor([2000, 1500])
    gradients = []
    for built in (whole, tenth):
        built(waveform_BS, lengths_B).values.square().sum().backward()
        gradients.append(cast(Tensor, cast(ConvLayer, built.layers[2]).weight.grad))
    torch.testing.assert_close(gradients[1], 0.1 * gradients[0])
    output = frozen(waveform_BS, lengths_B).values
    assert not output.requires_grad
    torch.testing.assert_close(output, whole(waveform_BS, lengths_B).values.detach(), atol=1e-5, rtol=1e-5)


def test_compat_lets_group_statistics_see_padding_as_the_reference_does() -> None:
    exact = frontend(VARIANTS[0])
    reference = build_frontend(replace(VARIANTS[0], compat="reference"))
    reference.load_state_dict(exact.state_dict())
    waveform_BS = noise(2, 4000)
    waveform_BS[1, 2000:] = 0
    lengths_B = torch.tensor([4000, 2000])
    expected = plain(exact, waveform_BS)
    with torch.no_grad():
        as_reference, own = reference(waveform_BS, lengths_B), exact(waveform_BS, lengths_B)
    frames = exact.num_frames(2000)
    torch.testing.assert_close(as_reference.values[1, :frames], expected[1, :frames], atol=5e-6, rtol=1e-5)
    assert (own.values[1, :frames] - expected[1, :frames]).abs().max() > 1e-2


def fairseqs_count(length: int, padded: int, frames: int) -> int:
    """Its mask of frames: the samples that do not fill the last chunk cut off, a chunk is padding when all its samples are."""
    padding = torch.arange(padded) >= length
    return int((~padding[: padded - padded % frames].view(frames, -1).all(-1)).sum())


def test_coarse_mask_counts_chunks_that_hold_any_real_sample() -> None:
    built = build_frontend(ConvFrontendConfig())
    surplus = []
    for padded in range(4000, 40000, 1777):
        frames = built.num_frames(padded)
        lengths = [*range(400, padded, 701), padded - 1, padded]
        counts = coarse_num_frames(torch.tensor(lengths), padded, frames).tolist()
        assert counts == [fairseqs_count(length, padded, frames) for length in lengths]
        surplus += [count - built.num_frames(length) for count, length in zip(counts, lengths, strict=True)]
    assert set(surplus) == {0, 1, 2}  # never a frame less than convolution arithmetic
    assert surplus.count(1) > surplus.count(0)
    assert coarse_num_frames(torch.tensor([4800, 3200]), 4800, 14).tolist() == [14, 10]  # the specification's own example


def test_silence_and_constant_offsets_give_finite_features() -> None:
    for config in VARIANTS:
        with torch.no_grad():
            for level in (0.0, 0.5):
                values = frontend(config)(torch.full((1, 3000), level), torch.tensor([3000])).values
                assert values.isfinite().all()


def test_moments_are_those_of_the_valid_windows() -> None:
    waveform_BS = noise(1, 100)
    mean_BK, covariance_BKK = window_moments(waveform_BS, torch.tensor([57]), 10, 5)
    windows = torch.stack([waveform_BS[0, start : start + 10] for start in range(0, 57 - 9, 5)]).double()
    torch.testing.assert_close(mean_BK[0], windows.mean(0))
    torch.testing.assert_close(covariance_BKK[0], torch.cov(windows.T, correction=0))


def test_too_short_input_has_no_frames() -> None:
    features = frontend(VARIANTS[0])(noise(1, 300), torch.tensor([300]))
    assert features.values.shape == (1, 0, 6)
    assert features.lengths.tolist() == [0]


def test_impossible_descriptions_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        build_frontend(ConvFrontendConfig(layers=()))
    with pytest.raises(ValueError, match=r"convolution 1 has .* stride at most the kernel"):
        build_frontend(ConvFrontendConfig(layers=(ConvLayerConfig(channels=4, kernel=2, stride=3),)))
    with pytest.raises(ValueError, match="learnt"):
        frontend(VARIANTS[0]).base_features(noise(1, 400), torch.tensor([400]))
