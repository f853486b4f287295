"""Whether a file can be written is said before the work that it is for, not after it."""

from pathlib import Path

import pytest

from sslim.storage import check_file_target


def test_what_can_be_written_passes_and_nothing_is_made(tmp_path: Path) -> None:
    check_file_target(tmp_path / "card.json")
    check_file_target(tmp_path / "new" / "folder" / "card.json")
    (tmp_path / "old.json").write_text("{}")
    check_file_target(tmp_path / "old.json")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    for path, sentence in (
        (tmp_path, "is a folder; give the name of a file"),
        (tmp_path / "file" / "card.json", "file is no folder"),
        (tmp_path / "link" / "card.json", "link is no folder"),
        (tmp_path / ("x" * 300) / "card.json", "a name in it is longer than 255 bytes"),
        (tmp_path / f"{'ü' * 130}.json", "a name in it is longer than 255 bytes"),
    ):
        with pytest.raises(ValueError, match=sentence):
            check_file_target(path)
