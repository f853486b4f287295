"""CSV and TSV files that say more about the audio files of a folder: speaker, label, text, split."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

from sslim.config import nearest
from sslim.data.text_files import open_table

FOUND_AUTOMATICALLY = ("index.csv", "metadata.csv", "index.tsv", "metadata.tsv")
PATH_COLUMNS = ("path", "file_name", "filename", "file", "audio")  # the first that is there is used
OPTIONAL_COLUMNS = ("speaker", "label", "text", "split")


@dataclass(frozen=True, kw_only=True)
class MetadataRow:
    """One line.

    Attributes:
        audio: The file it is about; may not exist.
        listed: How the file names it.
        speaker: Speaker's name.
        label: Class of the whole utterance.
        text: Transcript.
        split: For example train, dev, test.
    """

    audio: Path
    listed: str
    speaker: str | None
    label: str | None
    text: str | None
    split: str | None


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """A metadata file.

    Attributes:
        path: The file.
        rows: In its order.
        root: Folder its paths start from.
        unused_columns: Columns that nothing was taken from.
    """

    path: Path
    rows: tuple[MetadataRow, ...]
    root: Path
    unused_columns: tuple[str, ...]


def find_metadata(folder: Path) -> Path | None:
    """Returns the metadata file in a folder, None without one.

    Raises:
        ValueError: There are several.
    """
    present = [folder / name for name in FOUND_AUTOMATICALLY if (folder / name).is_file()]
    if len(present) > 1:
        raise ValueError(f"{folder} holds {present[0].name} and {present[1].name}: choose one with --metadata")
    return present[0] if present else None


def read_header(path: Path) -> list[str]:
    """Returns the column names of a CSV or TSV file, empty when it has no first line.

    Raises:
        ValueError: It is no such file.
    """
    with open_table(path) as file:
        return [name.strip() for name in next(_reader(path, file), [])]


def read_metadata(path: Path, folder: Path, *, label_column: str | None = None, speaker_column: str | None = None) -> Metadata:
    """Reads a metadata file.

    Its paths may start from ``folder``, from the file's own folder, or from the folder above; the first that fits the first
    row that exists is taken for all rows.

    Args:
        path: CSV (commas) or TSV (tabs) with a header line.
        folder: The folder of audio.
        label_column: Column that holds the label, default ``label``.
        speaker_column: Column that holds the speaker, default ``speaker``.

    Raises:
        ValueError: A column is missing, a row is malformed, the file is empty, or no path exists.
    """
    header, lines = _read_lines(path)
    path_at, columns = _columns(path, header, label_column, speaker_column)
    listed = [line[path_at].strip() for line in lines]
    for number, name in enumerate(listed, start=2):
        if not name:
            raise ValueError(f"{path}, row {number}: column {header[path_at]!r} is empty")
    root = _root(path, folder, listed)
    rows = []
    for name, line in zip(listed, lines, strict=True):
        values = {column: line[at].strip() or None if at is not None else None for column, at in columns.items()}
        rows.append(MetadataRow(audio=Path(os.path.abspath(root / name)), listed=name, **values))
    used = {path_at, *(at for at in columns.values() if at is not None)}
    unused = tuple(name for at, name in enumerate(header) if at not in used)
    return Metadata(path=path, rows=tuple(rows), root=root, unused_columns=unused)


def _reader(path: Path, file):  # type: ignore[no-untyped-def]  # csv has no public name for its reader's type
    return csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)


def _read_lines(path: Path) -> tuple[list[str], list[list[str]]]:
    with open_table(path) as file:
        reader = _reader(path, file)
        header = [name.strip() for name in next(reader, [])]
        lines = []
        for line in reader:
            if not line:
                continue
            if len(line) != len(header):
                raise ValueError(f"{path}, line {reader.line_num} has {len(line)} fields, its header has {len(header)}")
            lines.append(line)
    if not lines:
        raise ValueError(f"{path} lists no files: it needs a header line and one row for each audio file")
    return header, lines


def _columns(
    path: Path, header: list[str], label_column: str | None, speaker_column: str | None
) -> tuple[int, dict[str, int | None]]:
    """Position of the path, and those of the optional columns, None for one that is not there."""
    path_column = next((name for name in PATH_COLUMNS if name in header), None)
    if path_column is None:
        hint = nearest("path", header).replace("did you mean", "is it")
        raise ValueError(f"{path} has no column 'path'; its columns are {', '.join(header)}{hint}")
    columns: dict[str, int | None] = {}
    chosen = {"label": label_column, "speaker": speaker_column}
    for column in OPTIONAL_COLUMNS:
        name = chosen.get(column) or column
        if name not in header and chosen.get(column):
            raise ValueError(f"{path} has no column {name!r}{nearest(name, header)}; its columns are {', '.join(header)}")
        columns[column] = header.index(name) if name in header else None
    return header.index(path_column), columns


def _root(path: Path, folder: Path, listed: list[str]) -> Path:
    candidates = list(dict.fromkeys((folder, path.parent, Path(os.path.abspath(path)).parent.parent)))
    for name in listed:
        for root in candidates:
            if (root / name).is_file():
                return root
    raise ValueError(f"none of the {len(listed)} files that {path} lists exists, for example {candidates[0] / listed[0]}")
