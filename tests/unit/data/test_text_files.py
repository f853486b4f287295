"""Lists, tables and transcripts that others wrote: with a byte-order mark, with blank lines, or in no UTF-8 at all."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from sslim.cli import main
from sslim.data.audio_sources import SourceOptions
from sslim.data.corpus import Corpus
from sslim.data.prepare import detect_source, load_source
from sslim.data.text_files import open_table, read_lines

LATIN = "Müller".encode("latin-1")


@pytest.fixture
def chapter(tmp_path: Path) -> Path:
    folder = tmp_path / "train-clean-5" / "19" / "198"
    folder.mkdir(parents=True)
    for i in range(2):
        noise = 0.1 * np.random.default_rng(i).standard_normal(8000)
        soundfile.write(folder / f"19-198-000{i}.flac", noise, 16000)
    return folder


def test_a_mark_at_the_start_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbffirst\r\nsecond\n")
    assert read_lines(path) == ["first", "second"]
    with pytest.raises(ValueError, match=r"nowhere.txt cannot be read \(No such file"):
        read_lines(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match=r"nowhere.csv cannot be read \(No such file"), open_table(tmp_path / "nowhere.csv"):
        pass


def test_transcripts_have_blank_lines_but_are_in_utf8(chapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    transcript = chapter / "19-198.trans.txt"
    transcript.write_text("\ufeff19-198-0000 ONE\n\n19-198-0001 TWO\n\n")
    command = ["prepare", str(tmp_path / "train-clean-5"), str(tmp_path / "c")]
    assert main(command) == 0
    assert Corpus.open(tmp_path / "c").column("text") == ["ONE", "TWO"]
    transcript.write_bytes(b"19-198-0000 " + LATIN)
    assert main([*command[:2], str(tmp_path / "d")]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "19-198.trans.txt is not text in UTF-8 (invalid start byte at byte 13)" in error


@pytest.mark.parametrize(
    "content", [b"file_path,length,label\n" + LATIN + b".wav,1,None\n", b"file_path,length,label\n\x00" + b"x" * 200_000]
)
def test_tables_that_are_none_are_named(tmp_path: Path, capsys: pytest.CaptureFixture, content: bytes) -> None:
    folder = tmp_path / "len_for_bucket"
    folder.mkdir()
    (folder / "train.csv").write_bytes(content)
    assert main(["prepare", str(folder), str(tmp_path / "c"), "--kind", "len-for-bucket"]) == 2
    assert "train.csv is not a CSV or TSV file in UTF-8" in " ".join(capsys.readouterr().err.split())


def test_a_table_of_lengths_in_any_folder_is_known_by_its_root(chapter: Path, tmp_path: Path) -> None:
    table = tmp_path / "lists" / "train-clean-5.csv"
    table.parent.mkdir()
    table.write_text("\ufefffile_path,length,label\n" + "".join(f"train-clean-5/19-198-000{i}.npy,30,None\n" for i in range(2)))
    assert detect_source(table.parent)[0] == "numpy"
    options = SourceOptions(audio_root=tmp_path)
    kind, reason = detect_source(table.parent, options)
    assert (kind, reason) == (
        "len-for-bucket",
        "--audio-root is given, and train-clean-5.csv has the columns file_path, length, label",
    )
    assert main(["prepare", str(table.parent), str(tmp_path / "c"), "--audio-root", str(tmp_path)]) == 0
    assert Corpus.open(tmp_path / "c").ids() == ["19-198-0000", "19-198-0001"]
    with pytest.raises(
        ValueError, match=r"nothing lies below .*/lists, the --audio-root; of tables of .npy features leave that"
    ):
        load_source(table.parent, "len-for-bucket", SourceOptions(audio_root=table.parent))
