"""The mean of each speaker, over all that they say, against Kaldi's two steps written out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sslim.data.corpus_writer import CorpusWriter
from sslim.data.feature_presets import feature_preset
from sslim.data.prepare import prepare
from sslim.data.sources import Source, SourceUtterance
from sslim.frontends import NormalizationConfig, SpectralFrontendConfig, build_frontend
from sslim.models import build_model
from sslim.models.encoding import reads_stored_features
from sslim.models.reconstruction import reconstruction_model

SPEAKERS = ("a", "b", "a", "a", "b")


def recordings(folder: Path) -> list[SourceUtterance]:
    folder.mkdir()
    utterances = []
    for i, speaker in enumerate(SPEAKERS):
        rng = np.random.default_rng(i)
        soundfile.write(folder / f"{i}.wav", (0.02 + 0.1 * (speaker == "b")) * rng.standard_normal(4000 + 1600 * i), 16000)
        utterances.append(SourceUtterance(id=str(i), audio=folder / f"{i}.wav", speaker=speaker))
    return utterances


def source(utterances: list[SourceUtterance], **more) -> Source:
    return Source(name="s", utterances=iter(utterances), num_utterances=len(utterances), **more)


def preset(name: str) -> SpectralFrontendConfig:
    frontend = feature_preset(name)
    assert frontend is not None
    return frontend


def raw(utterance: SourceUtterance, name: str) -> np.ndarray:
    frontend = build_frontend(replace(preset(name), normalization=NormalizationConfig()))
    waveform = torch.from_numpy(soundfile.read(utterance.audio, dtype="float32")[0])
    return frontend.base_features(waveform[None], torch.tensor([len(waveform)])).values[0].numpy()


def test_a_corpus_lacks_the_mean_of_all_frames_of_each_speaker(tmp_path: Path) -> None:
    utterances = recordings(tmp_path / "audio")
    corpus = prepare(source(utterances), tmp_path / "c", preset("mfcc39-speaker"), jobs=2).corpus
    features = [raw(utterance, "mfcc39-speaker") for utterance in utterances]
    for i, speaker in enumerate(SPEAKERS):
        own = np.concatenate([values for values, other in zip(features, SPEAKERS, strict=True) if other == speaker])
        wanted = features[i] - own.mean(axis=0, dtype=np.float64)
        np.testing.assert_allclose(corpus.features(i).astype(np.float64), wanted, rtol=2**-10, atol=1e-3)
        alone = features[i] - features[i].mean(axis=0)
        assert np.abs(wanted - alone).max() > 0.1  # the control: an utterance's own mean is another


def test_a_waveform_alone_lacks_its_own_mean() -> None:
    frontend = build_frontend(preset("fbank80-speaker"))
    waveform = 0.1 * torch.randn(2, 6000, generator=torch.Generator().manual_seed(0))
    output = frontend(waveform, torch.tensor([6000, 3000]))
    for row, length in enumerate(output.lengths.tolist()):
        assert output.values[row, :length].mean(0).abs().max() < 1e-4
        assert output.values[row, :length].std(0).min() > 0.1


def test_interrupted_or_not_the_result_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utterances = recordings(tmp_path / "audio")
    (tmp_path / "audio/1.wav").write_bytes(b"broken")
    settings = {"max_bad": 0.3, "commit_period_s": 0.0}
    for name, jobs in (("one", 1), ("three", 3)):
        prepare(source(utterances), tmp_path / name, preset("fbank80-speaker"), jobs=jobs, **settings)
    added = []

    def add(self: CorpusWriter, utterance: SourceUtterance, *arguments: object, **more: object) -> None:
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(utterance.id)
        original_add(self, utterance, *arguments, **more)

    original_add = CorpusWriter.add
    with monkeypatch.context() as patch:
        patch.setattr(CorpusWriter, "add", add)
        with pytest.raises(KeyboardInterrupt):
            prepare(source(utterances), tmp_path / "interrupted", preset("fbank80-speaker"), **settings)
    outcome = prepare(source(utterances), tmp_path / "interrupted", preset("fbank80-speaker"), **settings)
    assert outcome.num_continued == 3  # two that were kept and the broken one between them
    for name in ("three", "interrupted"):
        for path in (tmp_path / "one" / "features").iterdir():
            assert path.read_bytes() == (tmp_path / name / "features" / path.name).read_bytes()


def test_speakers_are_needed_for_audio_but_not_for_what_is_stored(tmp_path: Path) -> None:
    nameless = [replace(utterance, speaker=None) for utterance in recordings(tmp_path / "audio")]
    with pytest.raises(ValueError, match=r"need the speakers, and utterance '0' of s has none: give them with utt2spk"):
        prepare(source(nameless), tmp_path / "c", preset("fbank80-speaker"))
    stored = np.random.default_rng(0).standard_normal((50, 80)).astype(np.float32)
    taken = [SourceUtterance(id="x", read_features=partial(np.copy, stored))]
    corpus = prepare(source(taken, frontend=preset("fbank80-speaker")), tmp_path / "d").corpus
    np.testing.assert_allclose(corpus.features(0).astype(np.float32), stored, rtol=2**-10, atol=1e-3)


def test_models_tell_features_without_the_mean_from_those_with_it(tmp_path: Path) -> None:
    corpus = prepare(source(recordings(tmp_path / "audio")), tmp_path / "c", preset("fbank80-speaker")).corpus
    without = preset("fbank80-speaker")
    sizes = {"num_layers": 1, "dim": 8, "num_heads": 2, "feedforward_dim": 8}
    for frontend, fits in ((without, True), (replace(without, normalization=NormalizationConfig(kind="utterance")), False)):
        model = build_model(reconstruction_model("test", frontend, **sizes), torch.Generator().manual_seed(0))
        assert reads_stored_features(model, corpus) is fits
