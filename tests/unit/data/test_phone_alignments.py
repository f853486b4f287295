"""Published phone alignments: where each label lies in time, and what malformed files are told."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from sslim.audio import centred_num_frames, kaldi_num_frames
from sslim.cli import main
from sslim.data.alignment import frame_symbols
from sslim.data.corpus import Corpus
from sslim.data.phone_alignments import (
    cpc_segments,
    read_cpc_alignments,
    read_cpc_labels,
    read_montreal_alignments,
    read_phone_alignments,
    with_alignments,
)
from sslim.data.sources import Segment, Source, SourceUtterance

NUM_SAMPLES = 16000


def labels(num_samples: int = NUM_SAMPLES) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 41, kaldi_num_frames(num_samples, 400, 160) // 3).repeat(3)


def symbols(segments: tuple[Segment, ...], num_frames: int, window_s: float) -> list[int | None]:
    found = frame_symbols(segments, num_frames, 0.01, window_s)
    return [None if symbol is None else int(symbol) for symbol in found]


def test_kaldis_frames_get_their_own_labels_back() -> None:
    expected = labels()
    assert symbols(cpc_segments(expected), len(expected), 0.025) == expected.tolist()


def test_centred_frames_get_the_label_whose_window_is_nearest() -> None:
    """Frame i is centred on 10 i ms, label j on 10 j + 12.5 ms: label i - 1, not label i as in S3PRL."""
    expected = labels(NUM_SAMPLES)
    num_frames = centred_num_frames(NUM_SAMPLES, 400, 160)
    found = symbols(cpc_segments(expected), num_frames, 0.0)
    assert found[0] == expected[0]
    assert found[1 : len(expected) + 1] == expected.tolist()
    assert found[: len(expected)] != expected.tolist()  # the control: laid over without the shift
    assert found[len(expected) + 2 :] == [None] * (num_frames - len(expected) - 2)  # beyond the last window


def write_cpc(path: Path, **utterances: np.ndarray) -> Path:
    path.write_text("".join(f"{name.replace('_', '-')} {' '.join(map(str, values))}\n" for name, values in utterances.items()))
    return path


def test_cpcs_file_is_read_by_utterance(tmp_path: Path) -> None:
    first, second = labels(), labels(9000)
    path = write_cpc(tmp_path / "converted_aligned_phones.txt", a_1=first, a_2=second)
    for found in (read_phone_alignments(path), read_phone_alignments(tmp_path)):
        assert found.kind == "cpc"
        assert found.ids == {"a-1", "a-2"}
        assert found.get("train-clean-100/a/a-2") == cpc_segments(second)
        assert found.get("a-3") is None
    stored = dict(read_cpc_labels(path))
    np.testing.assert_array_equal(stored["a-1"], first)
    np.testing.assert_array_equal(stored["a-2"], second)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "cannot be opened"),
        ("\n\n", "holds no alignments"),
        ("a 1 2\na 3\n", "'a' comes a second time"),
        ("a 1 2.5\n", "expected whole numbers"),
        ("a 41\n", "from 0 to 40, one for every 10 ms, found 41 to 41"),
        ("a\n", "found none"),
    ],
)
def test_malformed_cpc_files(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "converted_aligned_phones.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_cpc_alignments(path)


def montreal(root: Path) -> Path:
    folder = root / "libri_alignment" / "train-clean-360" / "14"
    folder.mkdir(parents=True)
    (folder / "14-208-0000.txt").write_text("0.0 0.12 sil\n0.12 0.31 AH0\n\n0.31 0.5 T\n")
    (folder / "14-208-0001.txt").write_text("0 1 sil\n")
    (folder.parent / "unaligned.txt").write_text("14-208-0001 no path\n14-208-0009\n")
    return root / "libri_alignment"


def test_montreal_files_are_seconds_of_the_recording(tmp_path: Path) -> None:
    found = read_phone_alignments(montreal(tmp_path))
    assert found.kind == "montreal"
    assert found.unaligned == {"14-208-0001", "14-208-0009"}
    assert found.get("14-208-0001") is None  # there is a file, but the aligner gave up
    segments = found.get("14-208-0000")
    assert segments == (
        Segment(symbol="sil", start_s=0.0, end_s=0.12),
        Segment(symbol="AH0", start_s=0.12, end_s=0.31),
        Segment(symbol="T", start_s=0.31, end_s=0.5),
    )
    # 50 ms windows every 12.5 ms, centred: frame 10 stands for 125 ms, frame 9 for 112.5 ms
    assert frame_symbols(segments, 12, 0.0125, 0.0)[9:11] == ["sil", "AH0"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0 1\n", "line 1: expected start, end and phone, found '0 1'"),
        ("0 x sil\n", "line 1: expected start"),
        ("0 1 sil\n0.5 0.4 A\n", "line 2: expected start, end and phone in the order of time"),
        ("1 2 A\n0 1 B\n", "line 2"),
        ("\n", "is empty"),
    ],
)
def test_malformed_montreal_files(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    alignments = read_montreal_alignments(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        alignments.get("a")


def textgrid(*tiers: str, encoding: str = "utf-8") -> bytes:
    """A TextGrid in Praat's long format with the two intervals `` `` and ``AH0`` in each tier."""
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", "xmax = 0.5", "tiers? <exists>"]
    lines += [f"size = {len(tiers)}", "item []:"]
    for number, name in enumerate(tiers, start=1):
        lines += [f"    item [{number}]:", '        class = "IntervalTier"', f'        name = "{name}"']
        lines += ["        xmin = 0", "        xmax = 0.5", "        intervals: size = 2"]
        for index, (start, end, text) in enumerate([("0", "0.12", ""), ("0.12", "0.5", "AH0")], start=1):
            lines += [f"        intervals [{index}]:", f"            xmin = {start}", f"            xmax = {end}"]
            lines += [f'            text = "{text}"']
    return ("\n".join(lines) + "\n").encode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("tier", ["phones", "14 - phones"])
def test_textgrids_are_read_and_text_beside_them_is_not(tmp_path: Path, tier: str, encoding: str) -> None:
    (tmp_path / "14").mkdir()
    (tmp_path / "14" / "14-208-0000.TextGrid").write_bytes(textgrid("words", tier, encoding=encoding))
    (tmp_path / "14" / "14-208-0000.txt").write_text("WHAT WAS SAID\n")
    found = read_phone_alignments(tmp_path)
    assert (found.kind, found.ids) == ("montreal", {"14/14-208-0000"})
    assert found.get("14-208-0000") == (
        Segment(symbol="sil", start_s=0.0, end_s=0.12),
        Segment(symbol="AH0", start_s=0.12, end_s=0.5),
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"0 1 sil\n", r"a\.TextGrid cannot be read as a TextGrid"),
        (b"", "cannot be read as a TextGrid"),
        (textgrid("phones")[:300], "cannot be read as a TextGrid"),
        (b"\xff\xfe\x00", "cannot be read as a TextGrid"),
        (textgrid("words"), "has the tiers words; expected one called phones"),
        (textgrid("A - phones", "B - phones"), "has the tiers A - phones, B - phones; expected one"),
    ],
)
def test_malformed_textgrids(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "a.TextGrid").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_montreal_alignments(tmp_path).get("a")


def test_what_holds_no_alignments_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither converted_aligned_phones\.txt nor"):
        read_phone_alignments(tmp_path)
    with pytest.raises(ValueError, match="do not exist"):
        read_phone_alignments(tmp_path / "none")
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("0 1 sil\n")
    found = read_phone_alignments(tmp_path)  # folders as the audio's
    assert (found.name_of("x/a"), found.name_of("y/a"), found.name_of("a"), found.name_of("z/a")) == ("x/a", "y/a", None, None)


def test_one_alignment_is_not_given_to_two_utterances(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0 1 sil\n")
    utterances = [SourceUtterance(id=f"{split}/a") for split in ("train", "dev")]
    source = Source(name="made", utterances=utterances, num_utterances=2)
    with pytest.raises(ValueError, match="one alignment 'a' for both 'train/a' and 'dev/a'"):
        with_alignments(source, read_phone_alignments(tmp_path), "those")


def test_prepare_puts_phones_into_the_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "train-clean-100" / "19" / "198"
    folder.mkdir(parents=True)
    for i in range(2):
        soundfile.write(folder / f"19-198-000{i}.flac", 0.1 * np.random.default_rng(i).standard_normal(NUM_SAMPLES), 16000)
    expected = labels()
    path = tmp_path / "converted_aligned_phones.txt"
    path.write_text(f"19-198-0001 {' '.join(map(str, expected))}\n20-1-0000 3 3\n")
    command = ["prepare", str(tmp_path / "train-clean-100"), str(tmp_path / "c"), "--alignments", str(path)]
    assert main(command) == 0
    assert "1 of 2 utterances have an alignment in converted_aligned_phones.txt" in " ".join(capsys.readouterr().out.split())
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.utterance(0).alignment is None
    found = corpus.utterance(1).alignment
    assert found == cpc_segments(expected)
    assert symbols(found, int(corpus.num_frames[1]), 0.025)[: len(expected)] == expected.tolist()
    assert main(["doctor", str(tmp_path / "c")]) == 0
    assert "alignments" not in capsys.readouterr().out
    path.write_text("20-1-0000 3 3\n")
    assert main([*command[:2], str(tmp_path / "d"), *command[3:]]) == 2
    assert "aligns none of the 2 utterances" in capsys.readouterr().err


def test_alignments_that_do_not_fit_their_sound_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of five files one is malformed, one is of a longer recording and one of a shorter; each utterance stays."""
    folder, grids = tmp_path / "sound", tmp_path / "aligned"
    folder.mkdir()
    grids.mkdir()
    for i, line in enumerate(("0 1 a", "0 x a", "0 1.5 a", "0 0.4 a", "0 1.04 a")):
        soundfile.write(folder / f"u{i}.wav", 0.1 * np.random.default_rng(i).standard_normal(16000), 16000)
        (grids / f"u{i}.txt").write_text(f"{line}\n")
    assert main(["prepare", str(folder), str(tmp_path / "c"), "--alignments", str(grids)]) == 0
    told = capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "c")]) == 0
    for text in (told, capsys.readouterr().out):
        assert "1 alignments were malformed and left out (mend them and prepare another folder)" in text
        assert f"another folder): {grids / 'u1.txt'}, line 1: expected start, end and phone" in text
        assert "1 of 4 alignments end after the sound (are they of these recordings?): u2 is 1.00 s long" in text
        assert "1 of 4 alignments end before half of the sound (are they of these recordings?): u3 is 1.00 s long" in text
    corpus = Corpus.open(tmp_path / "c")
    assert [corpus.utterance(i).alignment is None for i in range(5)] == [False, True, False, False, False]
    assert main(["prepare", str(folder), str(tmp_path / "d"), "--alignments", str(grids / "u1.TextGrid")]) == 2
    assert "do not exist" in capsys.readouterr().err
    (grids / "u1.TextGrid").write_text("")
    assert main(["prepare", str(folder), str(tmp_path / "d"), "--alignments", str(grids / "u1.TextGrid")]) == 2
    assert "is the alignment of one utterance; give the folder" in " ".join(capsys.readouterr().err.split())


def test_files_that_are_no_alignments_at_all_end_a_preparation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, texts = tmp_path / "sound", tmp_path / "texts"
    folder.mkdir()
    texts.mkdir()
    for i in range(3):
        soundfile.write(folder / f"u{i}.wav", 0.1 * np.random.default_rng(i).standard_normal(8000), 16000)
        (texts / f"u{i}.txt").write_text("hello world\n")
    assert main(["prepare", str(folder), str(tmp_path / "c"), "--alignments", str(texts)]) == 2
    assert "expected start, end and phone, found 'hello world'" in " ".join(capsys.readouterr().err.split())
    (texts / "u2.txt").write_text("0 0.5 a\n")
    assert main(["prepare", str(folder), str(tmp_path / "c"), "--alignments", str(texts)]) == 0


def test_a_mark_before_the_first_id_is_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "converted_aligned_phones.txt"
    path.write_bytes(b"\xef\xbb\xbfa 1 2 3\nb 4\n")
    alignments = read_phone_alignments(path)
    assert alignments.ids == {"a", "b"}
    assert [segment.symbol for segment in alignments.read("a")] == ["1", "2", "3"]
