"""Named features: one name, one definition, which travels with corpora and models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sslim import load_model, save_model
from sslim.config import dump_json, from_plain, to_plain
from sslim.data.feature_presets import EARLIER, PRESETS, feature_preset, preset_name, recorded_name
from sslim.frontends import FrontendConfig, SpectralFrontendConfig, StoredFeaturesConfig, build_frontend
from sslim.models import build_model
from sslim.models.reconstruction import reconstruction_model

COMPUTED = {name: preset.frontend for name, preset in PRESETS.items() if preset.frontend is not None and name != "fmllr40"}


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "waveform"])
def test_a_definition_survives_json_and_keeps_its_name(name: str) -> None:
    frontend = feature_preset(name)
    assert frontend is not None
    text = dump_json(to_plain(frontend))
    assert from_plain(FrontendConfig, json.loads(text)) == frontend
    stacked = replace(frontend, stack=3, stack_tail="drop")
    assert preset_name(stacked) == f"{name}@{PRESETS[name].version}"
    assert preset_name(replace(frontend, cepstra=5)) is None  # another front-end has no name


@pytest.mark.parametrize("name", ["fbank160-librosa", "mfcc39-librosa", "linear1025", "fbank80-speaker", "logmel80"])
def test_a_saved_model_computes_the_features_it_was_made_for(name: str, tmp_path: Path) -> None:
    frontend = COMPUTED[name]
    config = reconstruction_model("test", frontend, num_layers=1, dim=8, num_heads=2, feedforward_dim=16)
    model = build_model(config, torch.Generator().manual_seed(0)).eval()
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert loaded.config.frontend == model.config.frontend
    assert preset_name(loaded.config.frontend) == f"{name}@1"  # type: ignore[arg-type]
    waveform = 0.1 * torch.randn(1, 5000, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([5000])
    assert torch.equal(loaded.encode(waveform, lengths).final, model.encode(waveform, lengths).final)


def test_stored_features_make_a_model_that_takes_no_waveforms(tmp_path: Path) -> None:
    frontend = feature_preset("fmllr40")
    config = reconstruction_model("test", frontend, num_layers=1, dim=8, num_heads=2, feedforward_dim=16)
    save_model(build_model(config, torch.Generator().manual_seed(0)), tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    with pytest.raises(ValueError, match="fMLLR features cannot be computed from a waveform"):
        loaded.encode(torch.zeros(1, 5000), torch.tensor([5000]))
    features = torch.randn(1, 30, 40, generator=torch.Generator().manual_seed(1))
    assert loaded.encode_features(features, torch.tensor([30])).final.abs().sum() > 0


def test_earlier_definitions_stay() -> None:
    assert feature_preset("spectrogram@2") == feature_preset("spectrogram")
    assert feature_preset("spectrogram@1") == EARLIER["spectrogram", 1] != feature_preset("spectrogram")
    assert [recorded_name(name) for name in ("spectrogram", "spectrogram@1", "fbank80@1")] == [
        "spectrogram@2",
        "spectrogram",  # what corpora of that time have recorded
        "fbank80",
    ]
    assert preset_name(EARLIER["spectrogram", 1]) == "spectrogram@1"


def test_every_version_that_was_is_still_there() -> None:
    for name, preset in PRESETS.items():
        assert all((name, version) in EARLIER for version in range(1, preset.version))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("fbank160", "no features 'fbank160'; did you mean 'fbank160-librosa'"),
        ("spectrogram@3", "'spectrogram' have the versions 1 to 2, not '3'"),
        ("fbank80@x", "versions 1 to 1, not 'x'"),
    ],
)
def test_unknown_names(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        feature_preset(name)


def test_frames_of_one_second() -> None:
    """The three framings that S3PRL mixes up: Kaldi's, centred, and centred every 12.5 ms."""
    counts = {name: build_frontend(frontend).num_frames(16000) for name, frontend in COMPUTED.items()}
    assert (counts["fbank80"], counts["fbank80-librosa"], counts["mel80-librosa"]) == (98, 101, 81)
    assert set(counts.values()) == {98, 100, 101, 81}


def test_the_energy_of_the_spectrogram_has_torchaudios_floor() -> None:
    """torchaudio's ``energy_floor`` is 1 by default: the logarithm of a quiet frame's energy is 0, not negative."""
    rng = np.random.default_rng(0)
    waveform = np.concatenate([0.01 * rng.standard_normal(4000), 0.5 * rng.standard_normal(4000)]).astype(np.float32)
    frames = np.stack([waveform[t * 160 : t * 160 + 400] for t in range(48)]).astype(np.float64)
    energy = ((frames - frames.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)

    def bins(name: str) -> np.ndarray:
        frontend = feature_preset(name)
        assert isinstance(frontend, SpectralFrontendConfig)
        return build_frontend(frontend).base_features(torch.from_numpy(waveform)[None], torch.tensor([8000])).values[0].numpy()

    np.testing.assert_allclose(bins("spectrogram")[:, 0], np.maximum(np.log(energy), 0.0), atol=1e-5)
    np.testing.assert_allclose(bins("spectrogram@1")[:, 0], np.log(energy), atol=1e-5)
    assert (energy < 1).sum() > 10
    np.testing.assert_array_equal(bins("spectrogram")[:, 1:], bins("spectrogram@1")[:, 1:])


def test_stored_features_of_no_width_are_refused() -> None:
    with pytest.raises(ValueError, match="x features are 0 wide"):
        build_frontend(SpectralFrontendConfig(features=StoredFeaturesConfig(name="x", dim=0, frame_shift_ms=10.0)))
    with pytest.raises(ValueError, match="both must be above zero and finite"):
        build_frontend(SpectralFrontendConfig(features=StoredFeaturesConfig(name="x", dim=1, frame_shift_ms=0.0)))
    for shift_ms in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="both must be above zero and finite"):
            build_frontend(SpectralFrontendConfig(features=StoredFeaturesConfig(name="x", dim=1, frame_shift_ms=shift_ms)))
