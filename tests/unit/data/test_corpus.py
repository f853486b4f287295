"""The corpus folder: opening reads no manifest, and what is torn or foreign is refused."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from sslim.data.corpus import Corpus
from sslim.data.feature_presets import MELHUBERT
from sslim.data.prepare import prepare
from sslim.data.sources import Source, SourceUtterance
from sslim.data.store import to_float16


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    values = [np.random.default_rng(i).standard_normal((4 + i, 40)).astype(np.float32) for i in range(5)]
    utterances = [
        SourceUtterance(id=f"u{i}", read_features=lambda v=v: v, speaker=f"s{i % 2}", split="train")
        for i, v in enumerate(values)
    ]
    folder = tmp_path_factory.mktemp("corpora") / "made"
    prepare(Source(name="made", utterances=utterances, num_utterances=5, frontend=MELHUBERT), folder)
    return folder


@pytest.fixture
def corpus_folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def test_opening_and_reading_one_utterance_parse_no_other_line(corpus_folder):
    """Garbage of the same length everywhere else goes unnoticed until that line is asked for."""
    manifest = corpus_folder / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    garbage = [line if i == 3 else b"\xff" * (len(line) - 1) + b"\n" for i, line in enumerate(lines)]
    manifest.write_bytes(b"".join(garbage))
    corpus = Corpus.open(corpus_folder)
    assert corpus.utterance(3).id == "u3"
    assert corpus.features(2).shape == (6, 40)
    with pytest.raises(ValueError):
        corpus.utterance(2)


def test_features_are_views_of_the_file(corpus_folder):
    corpus = Corpus.open(corpus_folder)
    view = corpus.features(1)
    assert not view.flags.owndata
    assert not view.flags.writeable
    assert np.shares_memory(view, corpus.features(1, 2))
    assert not np.shares_memory(view, corpus.features(2))
    assert corpus.features(1, 3, 3).shape == (0, 40)


def test_durations_and_columns(corpus_folder):
    corpus = Corpus.open(corpus_folder)
    assert corpus.num_frames.tolist() == [4, 5, 6, 7, 8]
    assert corpus.duration_s() == pytest.approx(0.3)
    assert corpus.duration_s([0, 4]) == pytest.approx(0.12)
    assert corpus.utterance(4).duration_s == pytest.approx(0.08)
    assert corpus.column("speaker") == ["s0", "s1", "s0", "s1", "s0"]
    assert corpus.column("label") == [None] * 5
    with pytest.raises(ValueError, match="no column 'speakers'; did you mean 'speaker'"):
        corpus.column("speakers")
    with pytest.raises(IndexError, match="0 to 4, not 5"):
        corpus.utterance(5)


def test_a_corpus_can_be_sent_to_a_worker(corpus_folder):
    corpus = Corpus.open(corpus_folder)
    corpus.features(0), corpus.utterance(0)
    copy = pickle.loads(pickle.dumps(corpus))  # noqa: S301 - our own object
    assert len(pickle.dumps(corpus)) < 20_000
    np.testing.assert_array_equal(copy.features(3), corpus.features(3))
    assert copy.utterance(3) == corpus.utterance(3)


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (lambda f: (f / "corpus.json").unlink(), "is not a corpus"),
        (lambda f: (f / "corpus.json").write_text('{"format_version": 99}'), "format version 99"),
        (lambda f: (f / "corpus.json").write_text("[]"), "format version None"),
        (lambda f: (f / "index.safetensors").unlink(), "incomplete"),
        (lambda f: (f / "index.safetensors").write_bytes(b"short"), "incomplete"),
        (lambda f: (f / "manifest.jsonl").write_bytes((f / "manifest.jsonl").read_bytes()[:-9]), "bytes instead of"),
        (lambda f: (f / "features/shard-00000.bin").write_bytes(b"x" * 80), "80 bytes instead of 2400"),
        (lambda f: (f / "features/shard-00000.bin").unlink(), "0 bytes instead of 2400"),
        (lambda f: (f / "preparation.json").write_text("{}"), "not finished"),
        (shutil.rmtree, "is not a corpus"),
    ],
)
def test_torn_and_foreign_folders_are_refused(corpus_folder, damage, wanted):
    Corpus.open(corpus_folder)  # control
    damage(corpus_folder)
    with pytest.raises(ValueError, match=wanted):
        Corpus.open(corpus_folder)


def test_the_digest_tells_corpora_apart(made, corpus_folder, tmp_path):
    assert Corpus.open(corpus_folder).digest == Corpus.open(made).digest
    utterance = SourceUtterance(id="other", read_features=lambda: np.ones((4, 40), np.float32))
    other = prepare(
        Source(name="made", utterances=[utterance], num_utterances=1, frontend=MELHUBERT), tmp_path / "other"
    ).corpus
    assert other.digest != Corpus.open(made).digest


def test_rounding_to_float16_refuses_what_it_cannot_hold():
    values = np.array([[1.0, 65504.0]], np.float32)
    np.testing.assert_array_equal(to_float16(values), values.astype(np.float16))
    with pytest.raises(ValueError, match=r"reach 7e\+04"):
        to_float16(values + np.float32(4496))
    with pytest.raises(ValueError, match="not finite at frame 1"):
        to_float16(np.array([[1.0], [np.inf]], np.float32))
