"""One body over the table of tasks: each probe solves a synthetic task, finds chance in shuffled labels, and never peeks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sslim.data.corpus import Utterance
from sslim.data.sources import Segment
from sslim.models import PRESETS, build_model
from sslim.models.encoding import corpus_inputs, encode_utterances
from sslim.models.melhubert import melhubert_frontend
from sslim.probes import TASKS, NamedModel, ProbeConfig, SplitConfig, load_task, probe
from sslim.probes.classifiers import ClassifierConfig
from sslim.probes.evaluate import FRAME_CLASSIFIER, entries_of, run_protocol, store
from sslim.probes.protocol import divide

NUM_UTTERANCES, NUM_SPEAKERS, NUM_SYMBOLS, DIM, SHIFT_S = 120, 4, 3, 40, 0.01


class FakeCorpus:
    """In memory, what a probe asks of a corpus; label, speaker and phones move features in directions of their own."""

    name, path, digest, base_dim, sample_rate = "fake", Path("fake"), "0" * 64, DIM, 16000
    base_frame_shift_s, num_quarantined = SHIFT_S, 0

    def __init__(self, seed=0):
        random = np.random.default_rng(seed)
        self.frontend_config = melhubert_frontend(10)
        directions = {
            name: random.normal(size=(n, DIM)) for name, n in (("label", 3), ("speaker", NUM_SPEAKERS), ("phones", NUM_SYMBOLS))
        }
        self.columns = {"label": [], "speaker": [], "split": [None] * NUM_UTTERANCES}
        self.alignments, self.stored = [], []
        for i in range(NUM_UTTERANCES):
            label, speaker = i % 3, (i // 3) % NUM_SPEAKERS
            lengths = 2 * random.integers(4, 12, size=random.integers(2, 6))
            symbols = random.integers(NUM_SYMBOLS, size=len(lengths))
            ends = np.cumsum(lengths) * SHIFT_S
            phones = np.repeat(symbols, lengths)
            noise = random.normal(size=(len(phones), DIM))
            moved = 1.5 * directions["label"][label] + 1.5 * directions["speaker"][speaker] + 3 * directions["phones"][phones]
            self.stored.append((moved + 0.5 * noise).astype(np.float16))
            self.columns["label"].append(f"word{label}")
            self.columns["speaker"].append(f"speaker{speaker}")
            starts = ends - lengths * SHIFT_S
            self.alignments.append(
                tuple(
                    Segment(symbol=f"p{s}", start_s=float(a), end_s=float(b))
                    for s, a, b in zip(symbols, starts, ends, strict=True)
                )
            )
        self.num_frames = np.array([len(x) for x in self.stored])
        self.num_samples = self.num_frames * 160 + 240

    def __len__(self):
        return NUM_UTTERANCES

    def column(self, name):
        return list(self.columns[name])

    def features(self, i, start=0, stop=None):
        return self.stored[i][start:stop]

    def utterance(self, i):
        return Utterance(id=f"u{i}", index=i, audio=None, start_s=0.0, duration_s=1.0, alignment=self.alignments[i])


@pytest.fixture(scope="module")
def corpus():
    return FakeCorpus()


@pytest.fixture(scope="module")
def tiny():
    model = build_model(PRESETS["melhubert-tiny"](), torch.Generator().manual_seed(3))
    model.set_statistics(torch.zeros(DIM), torch.full((DIM,), 3.0), source="made up")
    return NamedModel(name="tiny", model=model)


def config_for(task, **changes):
    return ProbeConfig(**{"task": task, "num_seeds": 1, "max_frames": None, **changes})


@pytest.mark.parametrize("task", TASKS)
def test_probe_solves_a_synthetic_task(task, corpus, tiny):
    card = probe(corpus, [tiny], config_for(task, num_seeds=2))
    assert [row["kind"] for row in card["rows"]] == ["features", "random", "model"]
    for row in card["rows"]:
        assert row["mean"] > 0.95, row["name"]
        assert row["n"] == 2
        assert sum(row["layer_weights"]) == pytest.approx(1.0, abs=1e-3)
    assert card["chance"] < 0.6


@pytest.mark.parametrize("task", TASKS)
def test_shuffled_labels_leave_chance(task, corpus, tiny):
    card = probe(corpus, [tiny], config_for(task, shuffle_labels=True, baselines=False))
    (row,) = card["rows"]
    num_test = card["protocol"]["utterances"]["test"] * (20 if card["unit"] == "frame" else 1)
    assert abs(row["mean"] - card["chance"]) < 3 * (0.25 / num_test) ** 0.5
    assert "shuffled" in card["protocol"]["labels"]


@pytest.mark.parametrize("task", TASKS)
def test_equal_seeds_give_equal_scores(task, corpus, tiny):
    config = config_for(task, num_seeds=2, hidden_dim=8)
    one, two = (probe(corpus, [tiny], config)["rows"] for _ in range(2))
    assert one == two


def prepared(task, corpus, tiny, config):
    loaded = load_task(task, corpus)
    (entry,) = entries_of(corpus, [tiny], replace(config, baselines=False), loaded.unit)
    return loaded, store(entry.represent(0), corpus, loaded, config)


@pytest.mark.parametrize("task", TASKS)
def test_test_part_has_no_say(task, corpus, tiny):
    """Other labels and other features in the test part: the same choices, the same weights, another score."""
    config = config_for(task)
    loaded, stored = prepared(task, corpus, tiny, config)
    division = divide(loaded.classes_N, [None] * NUM_UTTERANCES, corpus.column("speaker"), SplitConfig())
    options = {
        "layers": slice(None),
        "num_classes": len(loaded.classes),
        "config": ClassifierConfig() if loaded.unit == "utterance" else FRAME_CLASSIFIER,
        "seed": 0,
    }
    before = run_protocol(stored, division, **options)
    rows = stored.examples(division.test, slice(None)).rows
    x_LNP, y_N = stored.x_LNP.clone(), stored.y_N.clone()
    x_LNP[:, rows] *= -3
    y_N[rows] = (y_N[rows] + 1) % len(loaded.classes)
    after = run_protocol(replace(stored, x_LNP=x_LNP, y_N=y_N), division, **options)
    assert after.fitted[0].setting == before.fitted[0].setting
    assert after.fitted[0].dev_accuracy == before.fitted[0].dev_accuracy
    for old, new in zip(before.fitted[0].classifier.parameters(), after.fitted[0].classifier.parameters(), strict=True):
        assert torch.equal(old, new)
    assert after.test[0] < before.test[0] - 0.3
    # control: the same change in the train part does change the weights
    train = stored.examples(division.train, slice(None)).rows
    y_N = stored.y_N.clone()
    y_N[train] = y_N[train.flip(0)]
    third = run_protocol(replace(stored, y_N=y_N), division, **options)
    assert not torch.equal(third.fitted[0].classifier.output.weight, before.fitted[0].classifier.output.weight)


@pytest.mark.parametrize("task", TASKS)
def test_padding_changes_nothing(task, corpus, tiny):
    """One utterance at a time and all in one padded batch give the same stored features."""
    single = prepared(task, corpus, tiny, config_for(task, batch_s=0.01))[1]
    batched = prepared(task, corpus, tiny, config_for(task, batch_s=1e6))[1]
    assert torch.equal(single.y_N, batched.y_N)
    by_frame = load_task(task, corpus).unit == "frame"
    tolerance = 4e-3 if by_frame else 1e-5  # frames are kept in float16
    torch.testing.assert_close(single.x_LNP, batched.x_LNP, rtol=0, atol=tolerance)
    # control: pooling over padding, as S3PRL's first speaker probe did, is another number
    if not by_frame:
        inputs = corpus_inputs(tiny.model, corpus, np.arange(NUM_UTTERANCES))
        longest = int(corpus.num_frames.max() + 1) // 2
        position, layers, _ = list(encode_utterances(tiny.model, inputs))[-1]
        padded = layers[-1].sum(0) / longest
        assert (padded - single.x_LNP[-1, position, : len(padded)]).abs().max() > 1e-2


def test_digits_of_unseen_speakers_protocol(corpus, tiny):
    config = config_for("label", split=SplitConfig(folds="speaker"), pooling="mean-std", num_seeds=2)
    card = probe(corpus, [tiny], config)
    for row in card["rows"]:
        assert [len(folds) for folds in row["fold_scores"]] == [NUM_SPEAKERS] * 2
        assert row["scores"] == pytest.approx([np.mean(folds) for folds in row["fold_scores"]], abs=1e-4)
        assert row["mean"] > 0.9
    with pytest.raises(ValueError, match="cannot be learnt with speaker folds"):
        probe(corpus, [tiny], replace(config, task="speaker"))


def test_layers(corpus, tiny):
    rows = probe(corpus, [tiny], config_for("label", layer="all", baselines=False))["rows"]
    assert [row["layer"] for row in rows] == ["0", "1", "2"]
    (only,) = probe(corpus, [tiny], config_for("label", layer="1", baselines=False))["rows"]
    assert only["scores"] == rows[1]["scores"]
    for layer, number in (("last", 2), ("mean", None)):
        (row,) = probe(corpus, [tiny], config_for("label", layer=layer, baselines=False))["rows"]
        assert row["layer"] == ("2" if number else "mean")
        assert (row["scores"] == rows[2]["scores"]) or number is None
    with pytest.raises(ValueError, match="no layer 3; this model has 0"):
        probe(corpus, [tiny], config_for("label", layer="3", baselines=False))
