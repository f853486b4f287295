"""Noise on waveforms: as loud as asked for, as often, the same for the same batch, and never in validation or in targets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sslim.config import from_plain, to_plain
from sslim.data.audio_sources import SourceOptions, folder_source
from sslim.data.corpus import Corpus
from sslim.data.noise import Noise, NoiseConfig
from sslim.data.prepare import prepare
from sslim.frontends import NormalizationConfig
from sslim.models import SpeechModel, build_model
from sslim.models.reconstruction import log_mel_frontend, reconstruction_model
from sslim.objectives.reconstruction import Reconstruction, ReconstructionConfig
from sslim.recipes.corpus_batches import DataConfig, make_batches

RATE = 16000


def signal(num_samples: int = 8000) -> np.ndarray:
    return (0.3 * np.sin(np.arange(num_samples) * 0.05) * np.linspace(0, 1, num_samples)).astype(np.float32)


def snr_db(clean: np.ndarray, noisy: np.ndarray) -> float:
    added = noisy.astype(np.float64) - clean
    return 10 * np.log10(np.mean(clean.astype(np.float64) ** 2) / np.mean(added**2))


@pytest.fixture
def noises(tmp_path: Path) -> Path:
    folder = tmp_path / "noises"
    folder.mkdir()
    soundfile.write(folder / "long.wav", 0.5 * np.random.default_rng(1).uniform(-1, 1, 20000), RATE)
    soundfile.write(folder / "short.flac", 0.1 * np.sin(np.arange(1500) * 0.9), 8000)  # goes round, at another rate
    return folder


@pytest.mark.parametrize("recorded", [False, True])
def test_the_measured_ratio_is_one_of_those_asked_for(noises: Path, recorded: bool) -> None:
    config = NoiseConfig(proportion=1.0, folder=str(noises) if recorded else None)
    noise, generator, clean = Noise(config, RATE), np.random.default_rng(0), signal()
    found = [snr_db(clean, noise.add(clean, generator)) for _ in range(60)]
    nearest = np.array([min(config.snrs_db, key=lambda wanted, ratio=ratio: abs(wanted - ratio)) for ratio in found])
    np.testing.assert_allclose(found, nearest, atol=1e-3)
    assert set(nearest) == {3.0, 6.0, 9.0}


def test_the_share_of_noisy_utterances() -> None:
    noise, generator, clean = Noise(NoiseConfig(proportion=0.15), RATE), np.random.default_rng(0), signal(400)
    share = np.mean([noise.add(clean, generator) is not clean for _ in range(2000)])
    assert abs(share - 0.15) < 4 * (0.15 * 0.85 / 2000) ** 0.5


def test_recordings_begin_anywhere_and_both_are_used(noises: Path) -> None:
    noise, generator, clean = Noise(NoiseConfig(proportion=1.0, folder=str(noises)), RATE), np.random.default_rng(0), signal()
    added = [noise.add(clean, generator) - clean for _ in range(12)]
    normed = np.stack([values / np.linalg.norm(values) for values in added])
    alike = np.abs(normed @ normed.T - np.eye(12))
    assert alike.max() < 0.999  # no two the same
    tonal = np.abs(np.fft.rfft(normed)).max(axis=1) ** 2 / (np.abs(np.fft.rfft(normed)) ** 2).sum(axis=1)
    assert (tonal > 0.3).any()  # the sine
    assert (tonal < 0.1).any()  # the noise


def test_silence_stays_silent(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    silent = np.zeros(100, np.float32)
    assert Noise(NoiseConfig(proportion=1.0), RATE).add(silent, generator) is silent
    (tmp_path / "n").mkdir()
    soundfile.write(tmp_path / "n" / "zero.wav", np.zeros(500), RATE)
    clean = signal(300)
    assert Noise(NoiseConfig(proportion=1.0, folder=str(tmp_path / "n")), RATE).add(clean, generator) is clean


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    for settings, sentence in (
        ({"proportion": 0.0}, "proportion is 0"),
        ({"proportion": 1.5}, "proportion is 1.5"),
        ({"snrs_db": ()}, "one or more numbers of dB"),
        ({"snrs_db": (float("nan"),)}, "one or more numbers of dB"),
    ):
        with pytest.raises(ValueError, match=sentence):
            NoiseConfig(**settings)
    with pytest.raises(ValueError, match="is not a folder"):
        Noise(NoiseConfig(folder=str(tmp_path / "none")), RATE)
    with pytest.raises(ValueError, match="holds no audio files"):
        Noise(NoiseConfig(folder=str(tmp_path)), RATE)
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"bad\.wav"):
        Noise(NoiseConfig(folder=str(tmp_path)), RATE)


def test_the_setting_is_left_out_of_json_where_there_is_none() -> None:
    assert "noise" not in to_plain(DataConfig())
    noisy = DataConfig(noise=NoiseConfig(proportion=0.3, folder="noises"))
    assert from_plain(DataConfig, to_plain(noisy)) == noisy


# ---- in batches ------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    folder = tmp_path / "audio"
    folder.mkdir()
    for i in range(6):
        soundfile.write(folder / f"{i}.flac", 0.5 * signal(8000 + 900 * i), RATE)
    frontend = replace(log_mel_frontend(), normalization=NormalizationConfig(kind="utterance"))
    return prepare(folder_source(folder, SourceOptions()), tmp_path / "c", frontend).corpus


def small_model(corpus: Corpus) -> SpeechModel:
    sizes = {"num_layers": 1, "dim": 8, "num_heads": 2, "feedforward_dim": 8}
    return build_model(reconstruction_model("test", corpus.frontend_config, **sizes), torch.Generator().manual_seed(0))


def batches_of(corpus: Corpus, noise: NoiseConfig | None, *, shuffle: bool = True, seed: int = 3):
    return make_batches(corpus, None, np.arange(6), small_model(corpus), DataConfig(noise=noise), seed, shuffle=shuffle)


def test_batches_are_noisy_waveforms_with_the_clean_ones_beside_them(corpus: Corpus) -> None:
    assert not batches_of(corpus, None)[0, 0].is_waveform  # its own features are stored
    noisy = batches_of(corpus, NoiseConfig(proportion=1.0, snrs_db=(6.0,)))
    batch = noisy[0, 0]
    assert batch.is_waveform
    assert batch.clean is not None
    for row, length in enumerate(batch.lengths.tolist()):
        clean, heard = batch.clean[row].numpy(), batch.inputs[row].numpy()
        assert snr_db(clean[:length], heard[:length]) == pytest.approx(6.0, abs=1e-3)
        assert (heard[length:] == 0).all()
        np.testing.assert_allclose(clean[:length], corpus.waveform(int(batch.ids[row]))[:length])


def test_noise_is_a_function_of_seed_epoch_and_batch(corpus: Corpus) -> None:
    config = NoiseConfig(proportion=1.0)
    first, again = batches_of(corpus, config), batches_of(corpus, config)
    again[1, 0]  # another batch in between changes nothing
    assert torch.equal(first[0, 0].inputs, again[0, 0].inputs)
    assert not torch.equal(first[0, 0].inputs - first[0, 0].clean, first[1, 0].inputs - first[1, 0].clean)
    assert first.digest != batches_of(corpus, None).digest
    assert first.digest != batches_of(corpus, replace(config, proportion=0.5)).digest


def test_validation_is_clean(corpus: Corpus) -> None:
    batch = batches_of(corpus, NoiseConfig(proportion=1.0), shuffle=False)[0, 0]
    assert batch.is_waveform
    assert batch.clean is None
    length = int(batch.lengths[0])
    np.testing.assert_allclose(batch.inputs[0, :length], corpus.waveform(int(batch.ids[0]))[:length])


def test_reconstruction_restores_the_clean_features(corpus: Corpus) -> None:
    batch = batches_of(corpus, NoiseConfig(proportion=1.0, snrs_db=(3.0,)))[0, 0]
    objective = Reconstruction(small_model(corpus), ReconstructionConfig())
    noisy_features, target, _ = objective.features_and_target(batch)
    clean = objective.features_and_target(replace(batch, inputs=batch.clean, clean=None))[1]
    assert torch.equal(target, clean)
    assert (noisy_features.values - clean).abs().mean() > 0.1  # the control: what is heard is not what is restored


def test_noise_on_stored_features_is_refused(tmp_path: Path, corpus: Corpus) -> None:
    from sslim.data.batching import CorpusBatches

    plain = batches_of(corpus, None)
    with pytest.raises(ValueError, match="noise is added to waveforms"):
        CorpusBatches(corpus, plain.plan, plain.facts, noise=Noise(NoiseConfig(), RATE))
