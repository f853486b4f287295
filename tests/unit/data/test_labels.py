"""Label stores and how labels are laid over frames."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sslim.batch import IGNORED_LABEL
from sslim.data.labels import LabelError, LabelStore, align_labels, packed_type
from sslim.storage import DIGESTS, TornFolderError, file_digest

FACTS = {"frame_period_s": 0.02, "corpus_digest": "abc", "origin": {"kind": "features"}, "quality": {"perplexity": 3.5}}


def write(folder: Path, labels: list, num_clusters: int = 500, **changes) -> LabelStore:
    return LabelStore.write(folder, labels, num_clusters=num_clusters, **{**FACTS, **changes})


@pytest.mark.parametrize(("num_clusters", "kind"), [(1, "u1"), (256, "u1"), (257, "u2"), (65536, "u2"), (65537, "i4")])
def test_round_trip_in_the_smallest_type(tmp_path, num_clusters, kind):
    rng = np.random.default_rng(0)
    written = [rng.integers(0, num_clusters, n) for n in (7, 1, 30)]
    written[2][-1] = num_clusters - 1  # the largest must survive: one type smaller would wrap it around
    store = write(tmp_path / "labels", [written[0], None, written[1], np.zeros(0, dtype=np.int64), written[2]], num_clusters)
    assert store.packed.dtype == np.dtype(kind)
    for i, expected in ((0, written[0]), (2, written[1]), (3, []), (4, written[2])):
        np.testing.assert_array_equal(store.get(i), expected)
        assert store.get(i).dtype == np.int64
    assert not store.has(1)
    with pytest.raises(LabelError, match="utterance number 1"):
        store.get(1)
    assert store.lengths.tolist() == [7, 0, 1, 0, 30]
    assert store.counts().tolist() == np.bincount(np.concatenate(written), minlength=num_clusters).tolist()
    assert (store.frame_period_s, store.corpus_digest, store.origin, store.quality, store.name) == (
        0.02,
        "abc",
        {"kind": "features"},
        {"perplexity": 3.5},
        "labels",
    )


def test_equal_labels_have_equal_digests_and_others_do_not(tmp_path):
    first, second = write(tmp_path / "a", [np.array([1, 2])]), write(tmp_path / "b", [np.array([1, 2])])
    other, moved = write(tmp_path / "c", [np.array([1, 3])]), write(tmp_path / "d", [np.array([1]), np.array([2])])
    assert first.digest == second.digest
    assert len({first.digest, other.digest, moved.digest}) == 3


def test_a_worker_gets_the_place_not_the_labels(tmp_path):
    store = write(tmp_path / "labels", [np.arange(400), np.arange(400)])
    store.get(0)
    state = store.__getstate__()
    assert not any(isinstance(value, np.ndarray) for value in state.values())
    assert any(isinstance(value, dict) and "labels" in value for value in store.__dict__.values())  # it did hold them
    np.testing.assert_array_equal(copy.copy(store).get(1), np.arange(400))


def test_codebook_comes_back(tmp_path):
    centroids = torch.randn(3, 5)
    store = write(tmp_path / "a", [np.array([2])], 3, codebook={"centroids": centroids})
    assert torch.equal(store.codebook()["centroids"], centroids)
    with pytest.raises(LabelError, match="no codebook"):
        write(tmp_path / "b", [np.array([2])], 3).codebook()
    with pytest.raises(LabelError, match="4 centroids"):
        write(tmp_path / "c", [np.array([2])], 4, codebook={"centroids": centroids}).codebook()


@pytest.mark.parametrize("labels", [[0, 500], [-1, 0], [0.0, 1.0]])
def test_what_is_no_cluster_is_refused_and_nothing_is_written(tmp_path, labels):
    with pytest.raises(LabelError, match=r"utterance number 1|float64"):
        write(tmp_path / "labels", [np.array([1]), np.array(labels)])
    assert list(tmp_path.iterdir()) == []


def test_a_torn_folder_is_refused(tmp_path):
    folder = tmp_path / "labels"
    write(folder, [np.arange(100)])
    path = folder / "labels.safetensors"
    whole = path.read_bytes()
    altered = whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:]
    for torn in (whole[:-1], altered, b""):
        path.write_bytes(torn)
        with pytest.raises(TornFolderError):
            LabelStore.open(folder)
    path.write_bytes(whole)
    assert LabelStore.open(folder).get(0)[-1] == 99  # the control


def _rewrite(folder: Path, **changes) -> None:
    """Changes ``labels.json`` and makes the digests fit, as another program would."""
    path = folder / "labels.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    digests = json.loads((folder / DIGESTS).read_text())
    (folder / DIGESTS).write_text(json.dumps({**digests, "labels.json": file_digest(path)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"period": 1}, "unknown key 'period'"),
        ({"origin": None}, "lacks the key 'origin'"),
        ({"num_labels": 99}, "contradicts"),
        ({"num_utterances": 2}, "contradicts"),
        ({"num_clusters": 20}, "packed as"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path, changes, message):
    folder = tmp_path / "labels"
    write(folder, [np.arange(100)])
    _rewrite(folder)
    LabelStore.open(folder)  # the control: rewriting alone does no harm
    _rewrite(folder, **changes)
    with pytest.raises(LabelError, match=message):
        LabelStore.open(folder)


def test_a_folder_without_labels_is_named(tmp_path):
    with pytest.raises(LabelError, match=f"{tmp_path} holds no labels"):
        LabelStore.open(tmp_path)


def test_packed_type_limits():
    for wrong in (0, -1, 2**31):
        with pytest.raises(ValueError, match="num_clusters"):
            packed_type(wrong)


# ---- align_labels -----------------------------------------------------------------------------------------------------------


def align(labels, label_ms: float, frame_ms: float, num_frames: int) -> list[int]:
    return align_labels(
        np.asarray(labels), label_period_s=label_ms / 1000, frame_period_s=frame_ms / 1000, num_frames=num_frames
    ).tolist()


def test_equal_periods_keep_every_label():
    assert align([5, 6, 7], 10, 10, 3) == [5, 6, 7]
    assert align([5, 6, 7], 20, 20, 3) == [5, 6, 7]


def test_finer_labels_give_the_first_of_every_pair():
    assert align([5, 6, 7, 8], 10, 20, 2) == [5, 7]
    assert align([5, 6, 7, 8, 9], 10, 20, 3) == [5, 7, 9]
    assert align([5, 6, 7, 8, 9, 4], 10, 30, 2) == [5, 8]


def test_a_20_ms_file_one_frame_short_is_padded_never_halved():
    """The reference halves any label file that does not have exactly as many labels as frames."""
    labels = np.arange(99)
    assert align(labels, 20, 20, 100) == [*range(99), IGNORED_LABEL]
    assert align(np.arange(101), 20, 20, 100) == list(range(100))
    halved = [*labels[::2].tolist(), *[0] * 50]  # what the reference trains on
    assert align(labels, 20, 20, 100) != halved


@pytest.mark.parametrize("num_labels", [98, 102, 50, 200, 0])
def test_more_than_one_label_off_is_an_error(num_labels):
    with pytest.raises(LabelError, match=rf"{num_labels} labels of 20 ms.* 100 frames of 20 ms"):
        align(np.zeros(num_labels, dtype=int), 20, 20, 100)


def test_10_ms_labels_said_to_last_20_ms_are_an_error():
    with pytest.raises(LabelError, match="do not fit"):
        align(np.zeros(200, dtype=int), 20, 20, 100)
    with pytest.raises(LabelError, match="one in 2 is 50"):
        align(np.zeros(100, dtype=int), 10, 20, 100)


@pytest.mark.parametrize(("label_ms", "frame_ms"), [(20, 10), (10, 15), (0, 10), (10, 10.2)])
def test_periods_that_do_not_divide_are_an_error(label_ms, frame_ms):
    with pytest.raises(LabelError, match="whole number of labels"):
        align([1, 2, 3], label_ms, frame_ms, 3)


def test_labels_must_be_whole_numbers():
    with pytest.raises(LabelError, match="float64"):
        align([0.0, 1.0], 10, 10, 2)


@given(st.integers(2, 300), st.integers(1, 4), st.integers(-1, 1))
def test_a_frame_always_gets_the_label_at_its_start(num_frames, finer, off):
    labels = np.arange(num_frames * finer + off)
    aligned = align(labels, 10, 10 * finer, num_frames)
    assert len(aligned) == num_frames
    for t, label in enumerate(aligned):
        assert label == t * finer or (label == IGNORED_LABEL and t == num_frames - 1 and t * finer >= len(labels))
