"""Label sets that come with a source: written beside the features, whatever is missing counted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sslim.data import prepare as module
from sslim.data.corpus import Corpus, CorpusError
from sslim.data.feature_presets import MELHUBERT
from sslim.data.prepare import prepare
from sslim.data.sources import Source, SourceLabels, SourceUtterance

SOURCE = Source(
    name="s",
    utterances=[
        SourceUtterance(id=f"{i:03d}", read_features=lambda i=i: np.full((23 + i, 40), i, np.float32)) for i in range(12)
    ],
    num_utterances=12,
    frontend=MELHUBERT,
)


class StoppedError(Exception):
    """Stands for whatever ends a process."""


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_label_sets_are_written_and_missing_ones_counted(tmp_path):
    labels = {f"{i:03d}": np.arange(23 + i) % 5 for i in range(12)}
    del labels["004"]
    labels["007"] = np.array([0, 5])  # 5 clusters: 0 to 4

    def read(name: str) -> np.ndarray:
        if name == "008":
            raise ValueError("torn")
        return labels[name]

    entry = SourceLabels(frame_period_s=0.01, num_clusters=5, read=read, origin={"codebook": "theirs"})
    source = replace(SOURCE, labels={"kmeans": entry})
    outcome = prepare(source, tmp_path / "c")
    assert outcome.missing_labels == {"kmeans": 3}
    assert outcome.corpus.label_names() == ["kmeans"]
    store = outcome.corpus.labels("kmeans")
    assert (store.num_clusters, store.frame_period_s, store.corpus_digest) == (5, 0.01, outcome.corpus.digest)
    assert store.origin["codebook"] == "theirs"
    np.testing.assert_array_equal(store.get(3), labels["003"])
    for i in (4, 7, 8):
        with pytest.raises(ValueError):
            store.get(i)
    with pytest.raises(ValueError, match="no labels 'kmean'; did you mean 'kmeans'"):
        outcome.corpus.labels("kmean")


def test_an_interruption_among_the_labels_is_made_good(tmp_path, monkeypatch):
    entry = SourceLabels(frame_period_s=0.01, num_clusters=5, read=lambda name: np.arange(5))
    source = replace(SOURCE, labels={"a": entry, "b": entry})
    prepare(source, tmp_path / "c")
    original = module._write_labels

    def fail_on_second(folder, name, labels):
        if name == "b":
            raise StoppedError
        return original(folder, name, labels)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_labels", fail_on_second)
        with pytest.raises(StoppedError):
            prepare(source, tmp_path / "d")
    with pytest.raises(CorpusError, match="not finished"):
        Corpus.open(tmp_path / "d")
    prepare(source, tmp_path / "d")
    assert contents(tmp_path / "d") == contents(tmp_path / "c")
