"""Corpora in memory: features in which a label, a speaker and phones have directions of their own, and plain sounds."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sslim.data.corpus import Utterance
from sslim.data.sources import Segment
from sslim.models import PRESETS, build_model
from sslim.models.melhubert import melhubert_frontend
from sslim.probes import NamedModel

DIM, SHIFT_S = 40, 0.01


class FeatureCorpus:
    """What a probe asks of a corpus that stores 40 features every 10 ms."""

    name, path, digest, base_dim, sample_rate = "fake", Path("fake"), "0" * 64, DIM, 16000
    base_frame_shift_s, num_quarantined = SHIFT_S, 0

    def __init__(self, num_utterances=60, num_phones=3, seed=0, after=False):
        """``after``: the features of a frame tell of the phone of the frame before the last."""
        random = np.random.default_rng(seed)
        self.frontend_config = melhubert_frontend(10)
        self.directions = {name: random.normal(size=(3, DIM)) for name in ("label", "speaker")}
        self.directions["phones"] = random.normal(size=(num_phones, DIM))
        self.columns = {"label": [], "speaker": [], "split": [None] * num_utterances}
        self.alignments, self.stored = [], []
        for i in range(num_utterances):
            label, speaker = i % 3, (i // 3) % 3
            lengths = 2 * random.integers(2, 6, size=random.integers(2, 5))
            symbols = random.integers(num_phones, size=len(lengths))
            ends = np.cumsum(lengths) * SHIFT_S
            phones = np.repeat(symbols, lengths)
            heard = np.concatenate([phones[:4], phones[:-4]]) if after else phones
            moved = sum(1.5 * self.directions[name][at] for name, at in (("label", label), ("speaker", speaker)))
            noise = random.normal(size=(len(phones), DIM))
            self.stored.append((moved + 3 * self.directions["phones"][heard] + 0.5 * noise).astype(np.float16))
            self.columns["label"].append(f"word{label}")
            self.columns["speaker"].append(f"speaker{speaker}")
            starts = ends - lengths * SHIFT_S
            pairs = zip(symbols, starts, ends, strict=True)
            self.alignments.append(tuple(Segment(symbol=f"p{s}", start_s=float(a), end_s=float(b)) for s, a, b in pairs))
        self.num_frames = np.array([len(x) for x in self.stored])
        self.num_samples = self.num_frames * 160 + 240

    def __len__(self):
        return len(self.stored)

    def ids(self):
        return [f"u{i:02d}" for i in range(len(self))]

    def column(self, name):
        return list(self.columns[name])

    def features(self, i, start=0, stop=None):
        return self.stored[i][start:stop]

    def utterance(self, i):
        return Utterance(id=f"u{i:02d}", index=i, audio=None, start_s=0.0, duration_s=1.0, alignment=self.alignments[i])


class ToneCorpus:
    """Two pitches as labels; waveforms only."""

    name, path, digest, base_dim, sample_rate = "tones", Path("tones"), "1" * 64, 0, 16000
    base_frame_shift_s, num_quarantined, frontend_config = 0.0, 0, None

    def __init__(self, num_utterances=24):
        random = np.random.default_rng(0)
        self.sounds = []
        for i in range(num_utterances):
            time_s = np.arange(random.integers(3000, 6000)) / 16000
            tone = 0.2 * np.sin(2 * np.pi * (500, 1500)[i % 2] * time_s)
            self.sounds.append((tone + 0.01 * random.normal(size=len(time_s))).astype(np.float32))
        self.num_samples = np.array([len(x) for x in self.sounds])
        self.num_frames = np.zeros(num_utterances, dtype=np.int64)

    def __len__(self):
        return len(self.sounds)

    def column(self, name):
        return [("low", "high")[i % 2] if name == "label" else None for i in range(len(self))]

    def waveform(self, i):
        return self.sounds[i]

    def utterance(self, i):
        return Utterance(id=f"t{i}", index=i, audio=None, start_s=0.0, duration_s=1.0)


@pytest.fixture(scope="session")
def spoken():
    return FeatureCorpus(num_utterances=90)


@pytest.fixture(scope="session")
def late_phones():
    return FeatureCorpus(after=True)


@pytest.fixture(scope="session")
def tones():
    return ToneCorpus()


@pytest.fixture(scope="session")
def tiny_model():
    model = build_model(PRESETS["melhubert-tiny"](), torch.Generator().manual_seed(3))
    model.set_statistics(torch.zeros(DIM), torch.full((DIM,), 3.0), source="made up")
    return NamedModel(name="tiny", model=model)
