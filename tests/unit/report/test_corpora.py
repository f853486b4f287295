"""The page states what a corpus holds, what was set aside and why, and how good its targets are."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sslim.data.corpus import Corpus
from sslim.data.labels import LabelStore
from sslim.data.prepare import prepare
from sslim.data.sources import Source, SourceUtterance
from sslim.report import build_report

RATE = 16000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """Four utterances of half an hour's 1,800th part each, two speakers, one file that is no audio."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    utterances = []
    for i in range(4):
        path = folder / f"u{i}.wav"
        soundfile.write(path, 0.1 * random.normal(size=9 * RATE), RATE)
        utterances.append(SourceUtterance(id=f"u{i}", audio=path, speaker=f"speaker{i % 2}"))
    bad = folder / "<bad>.wav"
    bad.write_bytes(b"this is no audio")
    utterances.append(SourceUtterance(id="bad", audio=bad, speaker="speaker2"))
    source = Source(name="four & one", utterances=utterances, num_utterances=5)
    corpus = prepare(source, folder / "corpus", max_bad=0.5, jobs=1).corpus
    labels = [np.arange(int(n)) % 7 for n in corpus.num_frames]
    LabelStore.write(
        corpus.path / "labels" / "k7", labels, frame_period_s=0.01, num_clusters=7, corpus_digest=corpus.digest,
        origin={"features": "log-Mel", "seed": 3}, quality={"perplexity": 6.543, "purity": 0.321, "counts": [1, 2]},
    )  # fmt: skip
    return corpus


def words(text: str) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", text, flags=re.DOTALL).split())


def test_sizes_targets_and_quarantine_are_shown(corpus):
    shown = words(build_report([corpus.path]))
    for expected in ("Corpus four &amp; one", "4 utterances", "0.01 hours", "2 speakers", "1 quarantined"):
        assert expected in shown
    assert "k7 7 10 6.543 0.321 features log-Mel, seed 3" in shown
    assert "1 file was set aside, for 1 reason" in shown
    assert "&lt;bad&gt;.wav" in shown


def test_a_run_brings_its_corpus_along_once(corpus, tmp_path):
    import json

    run = tmp_path / "run"
    run.mkdir()
    config = {"config": {"corpus": {"name": "four & one", "folder": str(corpus.path)}}}
    (run / "run.json").write_text(json.dumps(config), encoding="utf-8")
    assert build_report([run]).count("Corpus four &amp; one") == 1
    assert build_report([run, corpus.path]).count("Corpus four &amp; one") == 1
    config["config"]["corpus"]["folder"] = str(Path(tmp_path) / "gone")
    (run / "run.json").write_text(json.dumps(config), encoding="utf-8")
    assert "Corpus four" not in build_report([run])  # control
