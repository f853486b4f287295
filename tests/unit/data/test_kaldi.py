"""Kaldi archives and directories against kaldiio in both directions, and hostile bytes."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import kaldiio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslim.data.ark import KaldiError, open_archive, read_ark, read_object, read_shape, write_ark_scp
from sslim.data.kaldi import kaldi_source, read_entry, read_matrix, read_scp, read_table


def features(num_frames: int, dim: int = 40, seed: int = 0) -> np.ndarray:
    """Something like log-Mel: correlated in time, mean 12, a few outliers."""
    rng = np.random.default_rng(seed)
    values = np.cumsum(rng.normal(size=(num_frames, dim)), axis=0) * 0.5 + 12 + rng.standard_t(2, size=(num_frames, dim))
    return values.astype(np.float32)


ITEMS = {"utt-a": features(31), "utt-b": features(9, seed=1), "utt-c": features(1, seed=2)}


@pytest.mark.parametrize("method", range(1, 8))
def test_every_compression_decodes_as_kaldiio_does(tmp_path: Path, method: int) -> None:
    items = {key: np.clip(value, 0, 1) if method == 7 else np.abs(value) for key, value in ITEMS.items()}
    ark, scp = str(tmp_path / "x.ark"), str(tmp_path / "x.scp")
    kaldiio.save_ark(ark, items, scp=scp, compression_method=method)
    expected, entries = kaldiio.load_scp(scp), read_scp(scp)
    sequential = dict(read_ark(ark))
    assert list(entries) == list(items) == list(sequential)
    for key, original in items.items():
        ours = read_matrix(entries[key], 40)
        np.testing.assert_allclose(ours, expected[key], rtol=0, atol=2e-5)
        np.testing.assert_array_equal(ours, sequential[key])
        assert read_shape(entries[key].path, entries[key].offset, key=key) == original.shape
        assert ours.dtype == np.float32
        assert ours.flags.c_contiguous
        if method in (2, 3, 5):  # the automatic ranges also come near the original, so both readers are not wrong together
            assert np.abs(ours - original).mean() < 0.02 * np.ptp(original)


def test_compressed_zones_of_the_percentile_code(tmp_path: Path) -> None:
    """One column that holds every byte value, decoded by hand from the three linear zones."""
    header = struct.pack("<ffii", -10.0, 100.0, 256, 1) + struct.pack("<4H", 1000, 20000, 30000, 65000)
    (tmp_path / "x.ark").write_bytes(b"k \0BCM " + header + bytes(range(256)))
    p0, p25, p75, p100 = (-10 + 100 * u / 65535 for u in (1000, 20000, 30000, 65000))
    expected = np.interp(np.arange(256), [0, 64, 192, 255], [p0, p25, p75, p100])
    ours = read_object(tmp_path / "x.ark", 2)[:, 0]
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert not np.allclose(ours, np.interp(np.arange(256), [0, 63, 192, 255], [p0, p25, p75, p100]), atol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_floats_equal_kaldiio(tmp_path: Path, dtype: str, text: bool, dimensions: int) -> None:
    items = {key: (value if dimensions == 2 else value[:, 0]).astype(dtype) for key, value in ITEMS.items()}
    ark, scp = str(tmp_path / "x.ark"), str(tmp_path / "x.scp")
    kaldiio.save_ark(ark, items, scp=scp, text=text)
    sequential = dict(read_ark(ark))
    for key, entry in read_scp(scp).items():
        expected = np.asarray(items[key])
        np.testing.assert_array_equal(read_entry(entry), expected.astype(np.float32) if text else expected)
        np.testing.assert_array_equal(sequential[key], read_entry(entry))
        if not text:
            assert read_entry(entry).dtype == expected.dtype


@pytest.mark.parametrize("text", [False, True])
def test_integer_vectors(tmp_path: Path, text: bool) -> None:
    items = {"a": np.arange(-3, 300, dtype=np.int32), "b": np.zeros(0, np.int32), "c": np.array([7], np.int32)}
    path = tmp_path / "ali.ark"
    if text:
        path.write_text("".join(f"{key} {' '.join(map(str, value))}\n" for key, value in items.items()))
    else:
        kaldiio.save_ark(str(path), items)
    read = dict(read_ark(path))
    for key, value in items.items():
        np.testing.assert_array_equal(read[key], value)
        assert read[key].dtype == np.int32


def test_our_writer_reads_back_with_kaldiio_and_ours(tmp_path: Path) -> None:
    items = {**ITEMS, "vector": np.arange(5.0), "empty": np.zeros((0, 40))}
    assert write_ark_scp(tmp_path, items.items()) == 5
    theirs = kaldiio.load_scp(str(tmp_path / "feats.scp"))
    for key, entry in read_scp(tmp_path / "feats.scp").items():
        np.testing.assert_array_equal(theirs[key], np.asarray(items[key], np.float32))
        np.testing.assert_array_equal(read_entry(entry), np.asarray(items[key], np.float32))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["feats.ark", "feats.scp"]


@pytest.mark.parametrize("key", ["", "a b", "a\n", "utt-a"])
def test_writer_refuses_keys_and_leaves_nothing(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(key))):
        write_ark_scp(tmp_path, [("utt-a", ITEMS["utt-a"]), (key, ITEMS["utt-b"])])
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_archives_raise_kaldi_error_or_read_something(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    kind = data.draw(
        st.sampled_from([{}, {"compression_method": 2}, {"compression_method": 3}, {"text": True}, {"ints": True}])
    )
    path = str(folder / "x.ark")
    if kind == {"ints": True}:
        kaldiio.save_ark(path, {"k": np.arange(12, dtype=np.int32)})
    else:
        kaldiio.save_ark(path, {"k": ITEMS["utt-b"][:, :3]}, **kind)
    raw = bytearray(Path(path).read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(1, len(raw)))]
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, min(len(raw), 40) - 1))] = data.draw(st.integers(0, 255))
    Path(path).write_bytes(raw)
    for read in (lambda: list(read_ark(path)), lambda: read_object(path, 2), lambda: read_shape(path, 2)):
        try:
            read()
        except KaldiError as error:
            assert path in str(error)  # noqa: PT017 - the message is the subject


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x1f\x8b\x08rest", "gzip"),
        (b"k \0BXX \4", "type 'XX'.*FM, DM"),
        (b"k \0BFM \4\xff\xff\xff\x7f\4\xff\xff\xff\x7f", "truncated.*2147483647 x 2147483647"),
        (b"k \0BFM \4\xff\xff\xff\xff\4\1\0\0\0", "dimension -1 is negative"),
        (b"k \0BFM \5\1\0\0\0", "size byte 4.*found 5"),
        (b"k \0BFM \4\1", "truncated, 2 bytes of 5"),
        (b"k \0BCM \0\0\0\0", "truncated, 4 bytes of 16"),
        (b"k RIFF....", "wav audio"),
        (b"k [ 1 2\n 3 4", "closing ]"),
        (b"k [ 1 2\n 3 ]", "columns"),
        (b"k [ 1 x ]", "no number"),
        (b"k 1 2 x\n", "whole numbers"),
    ],
)
def test_bad_bytes_say_what_was_found(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.ark").write_bytes(content)
    with pytest.raises(KaldiError, match=message):
        read_object(tmp_path / "x.ark", 2, key="k")


def test_a_rewritten_archive_is_read_anew(tmp_path: Path) -> None:
    write_ark_scp(tmp_path, [("k", np.zeros((2, 2)))])
    entry = read_scp(tmp_path / "feats.scp")["k"]
    assert read_entry(entry).sum() == 0
    write_ark_scp(tmp_path, [("k", np.ones((3, 2)))])
    assert read_entry(entry).sum() == 6
    assert len(open_archive(entry.path)) == entry.offset + 2 + 3 + 10 + 24


def test_ranges_are_inclusive(tmp_path: Path) -> None:
    write_ark_scp(tmp_path, ITEMS.items())
    place = read_scp(tmp_path / "feats.scp")["utt-a"]
    stem = f"{place.path}:{place.offset}"
    (tmp_path / "cut.scp").write_text(f"a {stem}[2:4]\nb {stem}[:,0:9]\nc {stem}[0:30,39:39]\nd {stem}[5:31]\n")
    cut = read_scp(tmp_path / "cut.scp")
    whole = ITEMS["utt-a"]
    np.testing.assert_array_equal(read_entry(cut["a"]), whole[2:5])
    np.testing.assert_array_equal(read_entry(cut["b"]), whole[:, :10])
    np.testing.assert_array_equal(read_entry(cut["c"]), whole[:31, 39:])
    with pytest.raises(KaldiError, match=r"d: the range 5:31 is not within 0:30"):
        read_entry(cut["d"])


def test_tables_refuse_a_second_key(tmp_path: Path) -> None:
    (tmp_path / "utt2spk").write_text("a x\n\nb\ty z\n")
    assert read_table(tmp_path / "utt2spk") == {"a": "x", "b": "y z"}
    (tmp_path / "utt2spk").write_text("a x\nb y\na z\n")
    with pytest.raises(KaldiError, match="line 3: the key 'a'"):
        read_table(tmp_path / "utt2spk")


def data_dir(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "audio").mkdir()
    for name in ("r1", "r2"):
        (folder / "audio" / f"{name}.wav").touch()
    (folder / "wav.scp").write_text("r1 audio/r1.wav\nr2 /elsewhere/r2.wav\nr3 sox in.wav -t wav - |\nr4 wav.ark:17\n")
    (folder / "r2.wav").touch()
    (folder / "utt2spk").write_text("r1 ann\nr2 bob\nr3 ann\n")
    (folder / "text").write_text("r1 hello there\nr2\n")
    return folder


def test_audio_directory(tmp_path: Path) -> None:
    source = kaldi_source(data_dir(tmp_path / "set"))
    utterances = {u.id: u for u in source.utterances}
    assert source.frontend is None
    assert source.num_utterances == 4
    assert utterances["r1"].audio == tmp_path / "set" / "audio" / "r1.wav"
    assert (utterances["r1"].speaker, utterances["r1"].text) == ("ann", "hello there")
    assert utterances["r2"].audio == tmp_path / "set" / "r2.wav"
    assert "/elsewhere/r2.wav" in source.note
    for bad, message in (("r3", "commands are not run"), ("r4", r"inside wav\.ark at byte 17")):
        assert utterances[bad].audio is None
        with pytest.raises(KaldiError, match=f"{bad}: .*{message}"):
            utterances[bad].read_features()


def test_segments(tmp_path: Path) -> None:
    folder = data_dir(tmp_path / "set")
    (folder / "segments").write_text("u1 r1 0.5 1.75\nu2 r1 2 -1\nu3 r9 0 1\nu4 r3 0 1\n")
    utterances = {u.id: u for u in kaldi_source(folder).utterances}
    assert (utterances["u1"].start_s, utterances["u1"].duration_s) == (0.5, 1.25)
    assert (utterances["u2"].start_s, utterances["u2"].duration_s) == (2.0, None)
    with pytest.raises(KaldiError, match="recording 'r9'"):
        utterances["u3"].read_features()
    with pytest.raises(KaldiError, match="commands are not run"):
        utterances["u4"].read_features()
    (folder / "segments").write_text("u1 r1 2 1\n")
    with pytest.raises(KaldiError, match=r"'u1' runs from 2.0 to 1.0"):
        kaldi_source(folder)


def test_only_commands_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "wav.scp").write_text("a flac -c -d -s a.flac |\n")
    with pytest.raises(KaldiError, match=r"every entry.*commands are not run"):
        kaldi_source(tmp_path)
    with pytest.raises(KaldiError, match=r"neither it nor a folder in it has wav\.scp"):
        kaldi_source(tmp_path / "nowhere")


def test_commands_are_never_executed(tmp_path: Path) -> None:
    (tmp_path / "feats.scp").write_text(f"a touch {tmp_path / 'proof'} |\nb |touch {tmp_path / 'proof'}\n")
    with pytest.raises(KaldiError, match="commands are not run"):
        kaldi_source(tmp_path)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(("dim", "window"), [(40, "hamming"), (23, "povey")])
def test_stored_features_of_moved_sets(tmp_path: Path, dim: int, window: str) -> None:
    for split in ("train", "dev"):
        folder = tmp_path / "made" / split
        folder.mkdir(parents=True)
        write_ark_scp(folder, [(f"{split}-{i}", features(20 + i, dim, seed=i)) for i in range(3)])
        (folder / "utt2spk").write_text(f"{split}-0 ann\n")
    (tmp_path / "made").rename(tmp_path / "moved")
    source = kaldi_source(tmp_path / "moved")
    utterances = {u.id: u for u in source.utterances}
    np.testing.assert_array_equal(utterances["dev-2"].read_features(), features(22, dim, seed=2))
    assert (utterances["train-0"].split, utterances["train-0"].speaker) == ("train", "ann")
    assert source.frontend.features.num_mel_bins == dim
    assert source.frontend.features.window == window
    assert f"{dim} dimensions" in source.note
    assert "2 stated paths do not exist" in source.note
    for split in ("dev", "train"):  # whichever of the sets it is
        kept = (tmp_path / "moved" / split / "feats.scp").read_text()
        (tmp_path / "moved" / split / "feats.scp").write_text("\n")
        with pytest.raises(KaldiError, match=f"{split}/feats.scp lists nothing"):
            kaldi_source(tmp_path / "moved")
        (tmp_path / "moved" / split / "feats.scp").write_text(kept)


def test_wav_is_preferred_unless_features_are_asked_for(tmp_path: Path) -> None:
    folder = data_dir(tmp_path / "set")
    write_ark_scp(folder, ITEMS.items())
    assert kaldi_source(folder).frontend is None
    assert {u.id for u in kaldi_source(folder, features=True).utterances} == set(ITEMS)


def test_a_matrix_of_another_width_names_the_utterance(tmp_path: Path) -> None:
    write_ark_scp(tmp_path, [("good", features(5, 40)), ("odd", features(5, 39))])
    utterances = {u.id: u for u in kaldi_source(tmp_path).utterances}
    assert utterances["good"].read_features().shape == (5, 40)
    with pytest.raises(KaldiError, match=r"odd .*40 columns, found the shape \(5, 39\)"):
        utterances["odd"].read_features()
