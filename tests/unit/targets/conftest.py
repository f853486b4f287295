"""Small corpora of chirps: as audio files with alignments, with and without stored features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sslim.data.corpus import Corpus
from sslim.data.prepare import prepare
from sslim.data.sources import Segment, Source, SourceUtterance
from sslim.models import PRESETS, SpeechModel, build_model

PITCHES = {"a": 300.0, "i": 2400.0, "s": 5000.0}


def _utterance(folder: Path, number: int, seed: int) -> SourceUtterance:
    """A few tones one after the other, each with its symbol."""
    rng = np.random.default_rng([seed, number])
    symbols = rng.choice(list(PITCHES), rng.integers(3, 9))
    pieces, alignment, start = [], [], 0
    for symbol in symbols:
        length = int(rng.integers(800, 4000))
        time_s = np.arange(length) / 16000
        pieces.append(0.3 * np.sin(2 * np.pi * PITCHES[symbol] * time_s) + 0.01 * rng.normal(size=length))
        alignment.append(Segment(symbol=str(symbol), start_s=start / 16000, end_s=(start + length) / 16000))
        start += length
    path = folder / f"u{number:02d}.wav"
    soundfile.write(path, np.concatenate(pieces), 16000, subtype="PCM_16")
    return SourceUtterance(id=path.stem, audio=path, alignment=tuple(alignment))


def make_source(folder: Path, *, num_utterances: int = 10, seed: int = 0) -> Source:
    folder.mkdir(parents=True)
    utterances = [_utterance(folder, i, seed) for i in range(num_utterances)]
    return Source(name=folder.name, utterances=utterances, num_utterances=num_utterances)


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Source:
    return make_source(tmp_path_factory.mktemp("audio") / "chirps")


@pytest.fixture
def corpus(source, tmp_path) -> Corpus:
    """40 log-Mel features every 10 ms."""
    return prepare(source, tmp_path / "chirps", jobs=1).corpus


@pytest.fixture
def waveforms(source, tmp_path) -> Corpus:
    """The same without features."""
    return prepare(source, tmp_path / "waveforms", None, jobs=1).corpus


@pytest.fixture
def other_corpus(tmp_path) -> Corpus:
    """Other utterances, so with other statistics."""
    return prepare(make_source(tmp_path / "audio" / "dev", num_utterances=4, seed=1), tmp_path / "dev", jobs=1).corpus


@pytest.fixture
def model(corpus) -> SpeechModel:
    """A tiny MelHuBERT of 20 ms with random weights and the corpus's statistics."""
    model = build_model(PRESETS["melhubert-tiny"](), torch.Generator().manual_seed(0))
    mean, std, name = corpus.statistics
    model.set_statistics(torch.as_tensor(mean), torch.as_tensor(std), source=name)
    return model
