"""The doctor refuses what would waste a run, names the utterance, and finds nothing wrong with a sound corpus."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sslim.data.corpus import Corpus
from sslim.data.doctor import examine
from sslim.data.labels import LabelStore
from sslim.data.prepare import prepare
from sslim.data.sources import Source, SourceUtterance
from sslim.models.melhubert import melhubert_frontend

LENGTHS = (120, 81, 60, 200)
CLUSTERS = 5


def features(i: int) -> np.ndarray:
    return np.random.default_rng(i).normal(10, 3, (LENGTHS[i], 40)).astype(np.float32)


def corpus(folder: Path, change: Callable[[int, np.ndarray], np.ndarray] = lambda i, x: x) -> Corpus:
    utterances = [
        SourceUtterance(id=f"utt{i}", read_features=lambda i=i: change(i, features(i)))  # type: ignore[misc]
        for i in range(len(LENGTHS))
    ]
    source = Source(name="made", utterances=utterances, num_utterances=len(LENGTHS), frontend=melhubert_frontend(10))
    return prepare(source, folder, max_bad=1.0).corpus


def labels(
    made: Corpus,
    change: Callable[[int, np.ndarray], np.ndarray | None] = lambda i, y: y,
    *,
    frame_period_s: float = 0.01,
    corpus_digest: str | None = None,
    num_clusters: int = CLUSTERS,
) -> LabelStore:
    stride = round(frame_period_s / 0.01)
    values = [change(i, np.arange(length)[::stride] % CLUSTERS) for i, length in enumerate(LENGTHS)]
    return LabelStore.write(
        made.path / "labels" / "made", values, frame_period_s=frame_period_s, num_clusters=num_clusters,
        corpus_digest=corpus_digest or made.digest, origin={}, quality={},
    )  # fmt: skip


def problems(made: Corpus, store: LabelStore | None, *, stack: int = 2, fatal: bool = True) -> list[str]:
    found = examine(made, store, frame_period_s=0.01 * stack, stack=stack)
    return [problem.sentence for problem in found if problem.fatal or not fatal]


@pytest.mark.parametrize("period_s", [0.01, 0.02])
def test_a_sound_corpus_has_no_problems(tmp_path: Path, period_s: float) -> None:
    made = corpus(tmp_path / "c")
    assert problems(made, labels(made, frame_period_s=period_s), fatal=False) == []
    assert problems(made, None, fatal=False) == []


def test_silence_is_found_and_named(tmp_path: Path) -> None:
    made = corpus(tmp_path / "c", lambda i, x: np.full_like(x, -15.9424) if i == 2 else x)
    assert problems(made, labels(made)) == ["utterance utt2 is silent: its 60 frames are all the same"]


def test_non_finite_features_are_found_and_named(tmp_path: Path) -> None:
    made = corpus(tmp_path / "c")
    shard = next((made.path / "features").glob("shard-*"))
    stored = np.memmap(shard, dtype="<f2", mode="r+").reshape(-1, 40)
    stored[LENGTHS[0] + 7, 3] = np.nan
    stored.flush()
    assert problems(Corpus.open(made.path), labels(made)) == ["utterance utt1 has a non-finite feature at frame 7"]


LABEL_FAULTS: dict[str, tuple[dict, str]] = {
    "missing": ({"change": lambda i, y: None if i == 1 else y}, "utterance utt1 has no labels in made"),
    "constant": ({"change": lambda i, y: y * 0 + 3 if i == 3 else y}, "utterance utt3: all its 200 labels are 3"),
    "short": (
        {"change": lambda i, y: y[:-9] if i == 0 else y},
        "utterance utt0: 111 labels of 10 ms, of which one in 2 is 56, do not fit 60",
    ),
    "other corpus": ({"corpus_digest": "f" * 64}, "labels made were made for another corpus than made"),
    "half the rate declared wrongly": ({"frame_period_s": 0.04}, "labels made last 40 ms and the model's frames 20 ms"),
    "dead clusters": ({"num_clusters": 12}, "7 of the 12 clusters of made are dead"),
}  # fmt: skip


@pytest.mark.parametrize("name", LABEL_FAULTS)
def test_label_faults_are_found_and_named(tmp_path: Path, name: str) -> None:
    settings, sentence = LABEL_FAULTS[name]
    made = corpus(tmp_path / "c")
    found = problems(made, labels(made, **settings))
    assert found
    assert found[0].startswith(sentence)


def test_a_label_file_of_half_the_length_is_not_halved_again(tmp_path: Path) -> None:
    """Reference trap (spec/melhubert.md 6.2 no. 23): 20 ms labels one frame short were subsampled as if they were 10 ms."""
    made = corpus(tmp_path / "c")
    one_short = labels(made, lambda i, y: y[:-1], frame_period_s=0.02)
    assert problems(made, one_short) == []
    two_short = labels(made, lambda i, y: y[:-2], frame_period_s=0.02)
    assert problems(made, two_short)[0].startswith("utterance utt0: 58 labels of 20 ms do not fit 60 frames")


def test_a_limited_look_is_a_sample(tmp_path: Path) -> None:
    made = corpus(tmp_path / "c", lambda i, x: np.full_like(x, 1.0))
    found = examine(made, None, frame_period_s=0.02, stack=2, max_seconds=0.0)
    assert {problem.sentence.split(" is ")[0] for problem in found} <= {f"utterance utt{i}" for i in range(len(LENGTHS))}
    assert found
