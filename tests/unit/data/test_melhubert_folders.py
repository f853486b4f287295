"""MelHuBERT's Kaldi folders, the references' CSV lists and S3PRL's: what is read, what is moved, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from sslim.data.ark import write_ark_scp
from sslim.data.label_layout import LayoutError, label_period_s, period_in_name
from sslim.data.melhubert_folders import melhubert_source, read_mean_var
from sslim.data.numpy_lists import numpy_source

LENGTHS = {"103-1240-0000": 61, "103-1240-0001": 40, "84-1": 3, "84-2": 95}


def features(key: str) -> np.ndarray:
    rng = np.random.default_rng(sum(map(ord, key)))
    return (12 + 0.05 * np.arange(40) + 3 * rng.normal(size=(LENGTHS[key], 40))).astype(np.float32)


def labels(key: str, ratio: int) -> np.ndarray:
    return np.random.default_rng(LENGTHS[key]).integers(0, 512, -(-LENGTHS[key] // ratio))


def write_mean_var(path: Path) -> None:
    frames = np.concatenate([features(key) for key in LENGTHS]).astype(np.float64)
    path.write_text(f"{frames.sum(0).tolist()}\n{(frames**2).sum(0).tolist()}\n{len(frames)}\n")


def write_bas(stem: Path, values: dict[str, np.ndarray], *, stated_folder: str = "/wherever/it/was") -> None:
    """Labels as text, a line each, and the list of where each line starts."""
    stem.parent.mkdir(exist_ok=True)
    with Path(f"{stem}.bas").open("wb") as text, Path(f"{stem}.bas.scp").open("w") as scp:
        for key, value in values.items():
            text.write(key.encode() + b"\n")
            scp.write(f"{key} {stated_folder}/{stem.name}.bas:{text.tell()}\n")
            text.write(" ".join(map(str, value)).encode() + b"\n.\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """libri-360's layout, with absolute paths of another machine."""
    made = tmp_path / "made"
    made.mkdir()
    write_ark_scp(made, ((key, features(key)) for key in LENGTHS), name="train-clean-360")
    write_bas(made / "train-clean-360-k512-e10", {key: labels(key, 1) for key in LENGTHS})
    write_mean_var(made / "train-clean-360.mean-var")
    return made.rename(tmp_path / "libri-360-data")


def test_libri_360_folder(folder: Path) -> None:
    source = melhubert_source(folder)
    utterances = {u.id: u for u in source.utterances}
    assert source.name == "train-clean-360"
    assert list(utterances) == list(LENGTHS)
    (label_set,) = source.labels.values()
    assert label_set.frame_period_s == 0.01
    assert label_set.num_clusters == 512
    for key in LENGTHS:
        np.testing.assert_array_equal(utterances[key].read_features(), features(key))
        np.testing.assert_array_equal(label_set.read(key), labels(key, 1))
    mean, std, name = source.statistics
    frames = np.concatenate([features(key) for key in LENGTHS])
    np.testing.assert_allclose(mean, frames.mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, frames.std(0), rtol=1e-4)
    assert not np.allclose(std, frames.std(0, ddof=1), rtol=1e-4)  # the population's, as the reference has it
    assert name == "train-clean-360.mean-var"
    assert source.frontend.features.window == "hamming"
    assert source.frontend.features.waveform_scale == 32768
    with pytest.raises(KeyError):
        label_set.read("nobody")


def test_libri_960_layout_with_two_label_sets(folder: Path) -> None:
    root = folder.parent / "libri-960"
    (root / "fbank").mkdir(parents=True)
    for suffix in ("ark", "scp", "mean-var"):
        shutil.copy(folder / f"train-clean-360.{suffix}", root / "fbank" / f"train-960.{suffix}")
    (root / "fbank" / "train-960.ark").rename(root / "fbank" / "train-clean-360.ark")
    (root / "stage2-cluster-20ms" / "split200").mkdir(parents=True)
    write_bas(root / "kmeans" / "train-960-kmeans", {key: labels(key, 1) for key in LENGTHS})
    write_bas(root / "stage2-cluster-20ms" / "split200" / "train_960.hubert8", {key: labels(key, 2) for key in LENGTHS})
    source = melhubert_source(root)
    assert {name: s.frame_period_s for name, s in source.labels.items()} == {"kmeans": 0.01, "stage2-cluster-20ms": 0.02}
    np.testing.assert_array_equal(source.labels["stage2-cluster-20ms"].read("84-2"), labels("84-2", 2))
    assert source.num_utterances == 4
    assert source.statistics[2] == "train-960.mean-var"
    shutil.move(root / "kmeans", root / "stage2-cluster-10ms")
    write_bas(root / "stage2-cluster-10ms" / "train-960-kmeans", {key: labels(key, 2) for key in LENGTHS})
    with pytest.raises(
        LayoutError, match=r"stage2-cluster-10ms: 103-1240-0000 has 31 labels for 61 frames.*covers 0\.02 s, not 0\.01"
    ):
        melhubert_source(root)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"1 2 512 4", "label 512 is not within 0 to 511"),
        (b"1 2 -1", "label -1"),
        (b"1 x 2", "whole numbers"),
        (b"", "vector of whole"),
    ],
)
def test_bad_labels_name_the_utterance(folder: Path, line: bytes, message: str) -> None:
    bas = folder / "train-clean-360-k512-e10.bas"
    raw = bas.read_bytes().split(b"\n")
    raw[-3] = line
    bas.write_bytes(b"\n".join(raw))
    (label_set,) = melhubert_source(folder).labels.values()
    np.testing.assert_array_equal(label_set.read("84-1"), labels("84-1", 1))
    with pytest.raises(LayoutError, match=f"84-2 in .*{message}"):
        label_set.read("84-2")


def test_a_missing_feature_list_or_two_are_refused(folder: Path) -> None:
    shutil.copy(folder / "train-clean-360.scp", folder / "other.scp")
    with pytest.raises(LayoutError, match=r"2 files \*\.scp.*other\.scp, train-clean-360\.scp"):
        melhubert_source(folder)
    with pytest.raises(LayoutError, match="no MelHuBERT data folder"):
        melhubert_source(folder.parent)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1.0]\n[2.0]\n", "three lines"),
        ("__import__('os').system('false')\n[1]\n1\n", "three lines"),
        ("[1.0, 2.0]\n[2.0]\n3\n", "do not fit"),
        ("[1.0]\n[1.0]\n1\n", "not positive"),
        ("[1.0]\n[2.0]\n0\n", "0 frames|0.0 frames"),
        ("[NaN]\n[2.0]\n1\n", "not positive"),
    ],
)
def test_mean_var_is_parsed_and_never_run(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.mean-var").write_text(text)
    with pytest.raises(LayoutError, match=message):
        read_mean_var(tmp_path / "x.mean-var")


def test_label_period_rules() -> None:
    assert label_period_s([("a", 100, 99), ("b", 61, 62)], declared_s=None, name="n") == 0.01
    assert label_period_s([("short", 3, 2), ("a", 61, 30), ("b", 61, 31)], declared_s=None, name="n") == 0.02
    with pytest.raises(LayoutError, match=r"b has 31 labels for 61 frames.*as in a"):
        label_period_s([("a", 61, 61), ("b", 61, 31)], declared_s=None, name="n")
    with pytest.raises(LayoutError, match=r"n: a has 55 labels for 61 frames.*neither"):
        label_period_s([("a", 61, 55)], declared_s=None, name="n")
    with pytest.raises(LayoutError, match=r"covers 0.01 s, not 0.02 s \(declared\)"):
        label_period_s([("a", 61, 61)], declared_s=0.02, name="n")
    with pytest.raises(LayoutError, match="declare it"):
        label_period_s([("a", 2, 2)], declared_s=None, name="n")
    with pytest.raises(LayoutError, match=r"not 0\.04"):
        label_period_s([], declared_s=0.04, name="n")
    assert period_in_name("stage2-cluster-20ms") == 0.02
    assert period_in_name("kmeans") is None


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """The references' prepared layout, at another place than its list says."""
    root = tmp_path / "prepared"
    mean, std = np.linspace(12, 14, 40), np.linspace(3, 4, 40)
    for name in ("feature", "cluster_20ms"):
        (root / name).mkdir(parents=True)
    np.save(root / "mean-std.npy", np.stack([mean, std]))
    rows = ["file_path,label_path,length"]
    for key in LENGTHS:
        np.save(root / "feature" / f"{key}.npy", (features(key) - mean) / std)
        np.save(root / "cluster_20ms" / f"{key}.npy", labels(key, 2).astype(np.int64))
        rows.append(f"/old/place/feature/{key}.npy,/old/place/cluster_20ms/{key}.npy,{len(labels(key, 2))}")
    (root / "libri960-stg2-20ms.csv").write_text("\n".join(rows) + "\n")
    return root


def test_numpy_list_is_unnormalised_and_its_length_unit_found(lists: Path) -> None:
    for path in (lists, lists / "libri960-stg2-20ms.csv"):
        source = numpy_source(path)
        utterances = {u.id: u for u in source.utterances}
        assert list(utterances) == list(LENGTHS)
        label_set = source.labels["cluster_20ms"]
        assert label_set.frame_period_s == 0.02  # the list's lengths are half the frames
        for key in LENGTHS:
            np.testing.assert_allclose(utterances[key].read_features(), features(key), atol=1e-5)
            np.testing.assert_array_equal(label_set.read(key), labels(key, 2))
        mean, std, name = source.statistics
        np.testing.assert_allclose(mean, np.linspace(12, 14, 40), rtol=1e-6)
        np.testing.assert_allclose(std, np.linspace(3, 4, 40), rtol=1e-6)
        assert name == "mean-std.npy"
        assert "undone" in source.note


def test_raw_features_beside_a_mean_are_not_unnormalised(lists: Path) -> None:
    for key in LENGTHS:
        np.save(lists / "feature" / f"{key}.npy", features(key))
    source = numpy_source(lists)
    np.testing.assert_array_equal(next(iter(source.utterances)).read_features(), features("103-1240-0000"))
    assert "not normalised" in source.note


def test_missing_torn_and_pickled_files_are_errors_of_their_utterance(lists: Path) -> None:
    (lists / "feature" / "103-1240-0000.npy").unlink()
    torn = lists / "feature" / "84-2.npy"
    torn.write_bytes(torn.read_bytes()[:500])
    np.save(lists / "feature" / "84-1.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(lists / "cluster_20ms" / "103-1240-0001.npy", np.array([1.0, 2.0]))
    for line in ("/old/place/feature/x.npy,/old/place/cluster_20ms/x.npy,20", "/old/feature/y.npy,/old/cluster_20ms/y.npy,20"):
        with (lists / "libri960-stg2-20ms.csv").open("a") as file:
            file.write(line + "\n")
    np.save(lists / "feature" / "x.npy", np.zeros((40, 40)) + np.arange(40))
    np.save(lists / "cluster_20ms" / "x.npy", np.arange(20))
    np.save(lists / "feature" / "y.npy", np.zeros((40, 39)))
    source = numpy_source(lists)
    utterances = {u.id: u for u in source.utterances}
    assert utterances["x"].read_features().shape == (40, 40)
    for key, message in (
        ("103-1240-0000", "does not exist, nor does feature/103-1240-0000.npy"),
        ("84-2", "not a readable"),
        ("84-1", "not a readable .*allow_pickle=False"),
        ("y", r"shape \(frames, 40\), found \(40, 39\)"),
    ):
        with pytest.raises(LayoutError, match=message):
            utterances[key].read_features()
    with pytest.raises(LayoutError, match="vector of whole numbers, found float64"):
        source.labels["cluster_20ms"].read("103-1240-0001")


def test_two_lists_of_one_corpus_are_one_corpus_with_two_label_sets(lists: Path) -> None:
    (lists / "cluster_10ms").mkdir()
    text = (lists / "libri960-stg2-20ms.csv").read_text().replace("cluster_20ms", "cluster_10ms")
    (lists / "libri960-stg2-10ms.csv").write_text(text)
    for key in LENGTHS:
        np.save(lists / "cluster_10ms" / f"{key}.npy", labels(key, 1))
    source = numpy_source(lists)
    assert source.num_utterances == 4
    assert {name: s.frame_period_s for name, s in source.labels.items()} == {"cluster_10ms": 0.01, "cluster_20ms": 0.02}


def test_commas_in_paths(tmp_path: Path) -> None:
    for name in ("feature, old", "cluster"):
        (tmp_path / name).mkdir()
    np.save(tmp_path / "feature, old" / "a,b.npy", features("84-2"))
    np.save(tmp_path / "cluster" / "a,b.npy", labels("84-2", 1))
    (tmp_path / "x.csv").write_text("file_path,label_path,length\n/old/feature, old/a,b.npy,/old/cluster/a,b.npy,95\n")
    (utterance,) = numpy_source(tmp_path).utterances
    np.testing.assert_array_equal(utterance.read_features(), features("84-2"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,speaker\na,b\n", "found 'path,speaker' and 1 lines"),
        ("", "0 lines"),
        ("file_path,label_path,length\n", "0 lines"),
        ("file_path,label_path,length\na.npy,1\n", "line 2: expected file_path,label_path,length"),
        ("file_path,label_path,length\nf/a.npy,c/a.npy,1\nf/a.npy,c/a.npy,1\n", "'a' comes a second time"),
    ],
)
def test_malformed_lists(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(LayoutError, match=message):
        numpy_source(tmp_path)


@pytest.mark.parametrize(("name", "shift_ms"), [("libri_mel160", 12.5), ("libri_fbank80", 10.0)])
def test_s3prl_lists(tmp_path: Path, name: str, shift_ms: float) -> None:
    root = tmp_path / name
    for split, number in (("train-clean-100", 3), ("dev-clean", 2)):
        (root / split).mkdir(parents=True)
        lines = [",file_path,length,label"]
        for i in range(number):
            np.save(root / split / f"{split}-{i}.npy", np.full((20 + i, 80), i, np.float32))
            lines.append(f"{i},{split}/{split}-{i}.npy,{20 + i},{'None' if i else 'happy'}")
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    source = numpy_source(root)
    utterances = {u.id: u for u in source.utterances}
    assert set(utterances) == {"train-clean-100/train-clean-100-0", "train-clean-100/train-clean-100-1"} | {
        "train-clean-100/train-clean-100-2", "dev-clean/dev-clean-0", "dev-clean/dev-clean-1"
    }  # fmt: skip
    last = utterances["train-clean-100/train-clean-100-2"]
    np.testing.assert_array_equal(last.read_features(), np.full((22, 80), 2, np.float32))
    assert (last.split, last.label) == ("train-clean-100", None)
    assert utterances["dev-clean/dev-clean-0"].label == "happy"
    assert source.labels == {}
    assert source.statistics is None
    assert source.frontend.features.frame_shift_ms == shift_ms
    assert "librosa" in source.note
