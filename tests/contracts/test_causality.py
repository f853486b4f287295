"""Causal models see no sample beyond those under their frames; whatever ``future_seen`` complains of is seen indeed.

Two probes: the sound after a moment is replaced, and the gradients of what was before it are looked at. What must not depend on
the future has to stay the same to the last bit; the controls show that both probes find every kind of leak.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sslim.checkpoints import load_model, save_model
from sslim.frontends import HUBERT_CONV_LAYERS, ConvFrontendConfig, NormalizationConfig, StftConfig
from sslim.frontends.streaming import frame_samples
from sslim.models import PRESETS, ModelConfig, ProjectionConfig, SpeechModel, build_model, slice_model
from sslim.models.causality import future_seen, require_causal
from sslim.models.chunking import ChunkingConfig
from sslim.models.melhubert import SIZES, melhubert
from sslim.models.streaming import StreamingEncoder, encode_in_pieces
from sslim.nn.encoder import Encoder, EncoderConfig
from sslim.nn.slicing import Units
from sslim.recipes.pretrain_recipes import RECIPES

CAUSAL = [name for name in PRESETS if "causal" in name] + ["apc-tiny", "apc-mini", "vq-apc-tiny"]
TINY = PRESETS["melhubert-causal-tiny"]
RATE = 16000


def shallow(config: ModelConfig) -> ModelConfig:
    """At most two layers: a leak is no matter of depth."""
    encoder = config.encoder
    if isinstance(encoder, EncoderConfig) and encoder.dim > 200:
        encoder = replace(encoder, blocks=encoder.blocks[:1], depth_map=(0, 0))
    return replace(config, encoder=encoder)


def made(config: ModelConfig) -> SpeechModel:
    model = build_model(config, torch.Generator().manual_seed(0))
    if getattr(config.frontend, "normalization", NormalizationConfig()).kind == "global":
        dim = model.frontend.normalized_dim  # type: ignore[union-attr]
        model.set_statistics(torch.full((dim,), 4.0), torch.full((dim,), 3.0), source="made up")
    return model


def sound(seconds: float, seed: int = 1) -> Tensor:
    return 0.1 * torch.randn(1, round(seconds * RATE), generator=torch.Generator().manual_seed(seed))


def reach_of(model: SpeechModel, num_frames: int) -> int:
    """The samples that this many frames may depend on."""
    span, hop = frame_samples(model.frontend)  # type: ignore[arg-type]
    return (num_frames - 1) * hop + span


def change_by_the_future(model: SpeechModel, seconds: float = 0.8) -> float:
    """The largest change of the first half's layers when all sound after it is another, and louder."""
    waveform_BS = sound(seconds)
    half = model.frontend.num_frames(waveform_BS.shape[1]) // 2  # type: ignore[union-attr]
    changed_BS = waveform_BS.clone()
    changed_BS[:, reach_of(model, half) :] = 5.0 * sound(seconds, seed=2)[:, reach_of(model, half) :]
    with torch.inference_mode():
        before, after = model.encode(waveform_BS), model.encode(changed_BS)
    assert (before.layers[-1] - after.layers[-1])[:, half:].abs().max() > 1e-3  # it is seen by those that may see it
    pairs = zip((*before.layers, before.final), (*after.layers, after.final), strict=True)
    return max((a - b)[:, :half].abs().max().item() for a, b in pairs)


def gradient_from_the_future(model: SpeechModel, seconds: float = 0.5) -> float:
    """The largest gradient of the first half's last layer by the samples after those under it."""
    waveform_BS = sound(seconds).requires_grad_()
    half = model.frontend.num_frames(waveform_BS.shape[1]) // 2  # type: ignore[union-attr]
    model.encode(waveform_BS).layers[-1][:, :half].square().sum().backward()
    gradient_BS = waveform_BS.grad
    assert gradient_BS is not None
    last = reach_of(model, half)
    assert gradient_BS[:, :last].abs().max() > 0
    return gradient_BS[:, last:].abs().max().item()


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_presets_never_leak(name: str) -> None:
    config = PRESETS[name]()
    assert future_seen(config) is None
    model = made(shallow(config))
    assert change_by_the_future(model) == 0.0
    assert gradient_from_the_future(model) == 0.0


@pytest.mark.parametrize("size", SIZES)
def test_causal_presets_are_their_twins_but_for_what_they_see(size: str) -> None:
    causal, plain = PRESETS[f"melhubert-causal-{size}"](), PRESETS[f"melhubert-{size}"]()
    positions = replace(causal.transformer.positions, causal=False)
    assert replace(causal, encoder=replace(causal.transformer, causal=False, positions=positions)) == plain
    assert future_seen(plain) is not None


@pytest.mark.parametrize("name", [name for name, make in RECIPES.items() if "tiny" in name or "mini" in name])
def test_recipes_that_predict_the_future_do_not_see_it(name: str) -> None:
    recipe = RECIPES[name]()
    assert (future_seen(recipe.model) is None) == (recipe.objective.kind == "autoregressive")


def windowed() -> ModelConfig:
    config = melhubert(**{**SIZES["tiny"], "frame_period_ms": 10}, causal=True, attention_window=5)  # type: ignore[arg-type]
    return replace(config, encoder=replace(config.encoder, norm_placement="pre", input_norm=False, final_norm=True))


def convolutional(**settings: object) -> ModelConfig:
    layers = tuple(replace(layer, channels=12) for layer in HUBERT_CONV_LAYERS)
    settings = {"norm": "layer", **settings}
    frontend = ConvFrontendConfig(layers=layers, **settings)  # type: ignore[arg-type]
    return replace(TINY(), frontend=frontend, projection=ProjectionConfig(feature_dim=12, norm=True))


def with_frontend(**settings: object) -> ModelConfig:
    return replace(TINY(), frontend=replace(TINY().frontend, **settings))  # type: ignore[type-var]


@pytest.mark.parametrize("make", [windowed, convolutional], ids=["window, pre-norm", "convolutions"])
def test_other_causal_models_never_leak(make: Callable[[], ModelConfig]) -> None:
    model = made(make())
    assert future_seen(model.config) is None
    assert change_by_the_future(model, 2.0) == 0.0  # long enough for windowed attention in chunks
    assert gradient_from_the_future(model) == 0.0


LEAKS: dict[str, tuple[Callable[[], ModelConfig], str]] = {
    "attention": (PRESETS["melhubert-tiny"], "transformer encoder is not causal"),
    "convolutions over frames": (PRESETS["npc-tiny"], "convolutional encoder is not causal"),
    "normalisation": (lambda: with_frontend(normalization=NormalizationConfig(kind="utterance")), "'utterance'"),
    "speaker's mean": (lambda: with_frontend(normalization=NormalizationConfig(kind="speaker")), "'speaker'"),
    "level": (lambda: with_frontend(features=StftConfig(num_mel_bins=40, level_db=-25.0)), "'stft'"),
    "group norm": (lambda: convolutional(norm="group"), "norm 'group'"),
    "waveform norm": (lambda: convolutional(normalize_waveform=True), "normalize_waveform"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_what_is_refused_does_leak(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: each of these changes what was before, and has gradients from after it."""
    make, sentence = LEAKS[name]
    monkeypatch.setattr("test_causality.frame_samples", lambda frontend: (560, 320))
    model = made(make())
    with pytest.raises(ValueError, match=f"cannot be streamed: .*{sentence}"):
        require_causal(model.config)
    assert change_by_the_future(model) > 1e-4
    if name != "group norm":  # its statistics are no part of the graph
        assert gradient_from_the_future(model) > 0.0


def test_positions_that_look_ahead_are_found() -> None:
    """The reference's half-causal model: attention sees the past, the positions' convolution does not stop there."""
    model = made(TINY())
    assert isinstance(model.encoder, Encoder)
    assert change_by_the_future(model) == 0.0
    model.encoder.positions.config = replace(model.encoder.positions.config, causal=False)  # type: ignore[union-attr, arg-type]
    assert change_by_the_future(model) > 1e-4
    assert gradient_from_the_future(model) > 0.0


def test_inputs_cut_by_their_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"(chunking\.compat 'reference')"):
        require_causal(replace(TINY(), chunking=ChunkingConfig(max_frames=10, compat="reference")))


def test_what_happens_to_other_models_happens_to_causal_ones(tmp_path) -> None:
    """Saved and loaded, pruned of heads, units and layers, a causal model stays causal and streams as it encodes."""
    model = made(TINY())
    units = Units.full(model.transformer.config)
    units = replace(units, heads=((1, 3), (0, 2, 3)), feedforward=(tuple(range(9)), units.feedforward[1]), depths=(0, 1))
    for changed in (model, slice_model(model, units), slice_model(model, replace(units, depths=(1,)))):
        save_model(changed, tmp_path / str(changed.num_parameters()))
        loaded = load_model(tmp_path / str(changed.num_parameters()))
        assert loaded.config == changed.config
        assert change_by_the_future(loaded) == 0.0
        waveform_BS = sound(0.6)
        streamed = encode_in_pieces(StreamingEncoder(loaded).open(), waveform_BS[0], 1280)
        torch.testing.assert_close(streamed.final, changed.encode(waveform_BS).final, atol=1e-5, rtol=0)
