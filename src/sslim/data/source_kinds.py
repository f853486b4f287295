"""The kinds of source that ``sslim prepare`` reads, and how it tells which one a path is."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

from sslim.config import nearest
from sslim.data.audio_sources import (
    AUDIO_SUFFIXES,
    BACKGROUND,
    COMMAND_LISTS,
    DIGIT_COLUMNS,
    DIGIT_NAME,
    LIBRISPEECH_NAME,
    SourceOptions,
    audio_files,
)
from sslim.data.length_tables import LEN_FOR_BUCKET
from sslim.data.metadata import PATH_COLUMNS, read_header
from sslim.data.sources import Source, SourceLabels, SourceUtterance
from sslim.data.text_files import ENCODING

NUM_NAMES_LOOKED_AT = 200  # files whose names decide between layouts that differ in names only
NUMPY_COLUMNS = ("file_path", "label_path", "length")
S3PRL_COLUMNS = ("file_path", "length", "label")


@dataclass(frozen=True, kw_only=True)
class SourceKind:
    """One kind of source.

    Attributes:
        about: What it is, for people.
        recognise: Path to the reason why it is of this kind, None when it is not.
        reader: ``module:function``, imported when needed.
        options: Fields of ``SourceOptions`` that it knows.
    """

    about: str
    recognise: Callable[[Path], str | None]
    reader: str
    options: tuple[str, ...] = ()


def _kaldi(path: Path) -> str | None:
    """A data directory or a folder of several."""
    for folder in (path, *_folders(path)):
        for name in ("wav.scp", "feats.scp"):
            if (folder / name).is_file():
                return f"{folder.relative_to(path) / name} is there"
    return None


def _melhubert(path: Path) -> str | None:
    for folder in (path, *_folders(path)):
        for pattern in ("*.mean-var", "*.bas.scp"):
            for found in sorted(folder.glob(pattern)):
                return f"{found.relative_to(path)} is there"
    return None


def _ark(path: Path) -> str | None:
    from sslim.data.ark_folders import find_archives

    first = next(iter(find_archives(path)), None)
    return None if first is None else f"{first.name if path.is_file() else first.relative_to(path)} is there, without a list"


def _s3prl_tables(path: Path) -> Iterator[Path]:
    for table in [path] if path.is_file() else sorted(path.glob("*.csv")):
        if table.suffix.lower() == ".csv" and set(S3PRL_COLUMNS) <= set(_header(table)):
            yield table


def _length_table(path: Path) -> str | None:
    """S3PRL's columns, over audio."""
    for table in _s3prl_tables(path):
        if LEN_FOR_BUCKET in table.resolve().parent.name:
            return f"{table.name} lies in a folder {LEN_FOR_BUCKET}"
        with table.open(encoding=ENCODING, errors="replace") as file:
            listed = [line.strip() for line in islice(file, 1, 3)]
        if any(f"{suffix}," in f"{line.lower()}," for line in listed for suffix in AUDIO_SUFFIXES):
            return f"{table.name} has the columns {', '.join(S3PRL_COLUMNS)} and lists audio"
    return None


def _numpy(path: Path) -> str | None:
    for table in [path] if path.is_file() else sorted(path.glob("*.csv")):
        columns = _header(table) if table.suffix.lower() == ".csv" else []
        for known in (NUMPY_COLUMNS, S3PRL_COLUMNS):
            if set(known) <= set(columns):
                return f"{table.name} has the columns {', '.join(known)}"
    return None


def _speech_commands(path: Path) -> str | None:
    for name in COMMAND_LISTS:
        if (path / name).is_file():
            return f"{name} is there"
    return f"the folder {BACKGROUND} is there" if (path / BACKGROUND).is_dir() else None


def _digits(path: Path) -> str | None:
    if (path / "index.csv").is_file() and set(DIGIT_COLUMNS) <= set(_header(path / "index.csv")):
        return f"index.csv has the columns {', '.join(DIGIT_COLUMNS)}"
    names = _names(path)
    return "its files are named DIGIT_SPEAKER_TAKE" if names and all(map(DIGIT_NAME.fullmatch, names)) else None


def _librispeech(path: Path) -> str | None:
    names = _names(path)
    if names and all(map(LIBRISPEECH_NAME.fullmatch, names)):
        return "its files are named SPEAKER-CHAPTER-NUMBER"
    return None


def _folder(path: Path) -> str | None:
    if path.is_file():
        known = path.suffix.lower() in (".csv", ".tsv") and set(PATH_COLUMNS) & set(_header(path))
        return f"{path.name} has a column {min(known)}" if known else None
    first = next(audio_files(path), None)
    return None if first is None else f"it holds audio files, for example {first.relative_to(path)}"


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []


def _names(path: Path) -> list[str]:
    return [audio.stem for audio in islice(audio_files(path), NUM_NAMES_LOOKED_AT)] if path.is_dir() else []


def _header(path: Path) -> list[str]:
    try:
        return read_header(path)
    except ValueError:  # some other kind of file, which recognising must survive
        return []


SOURCES: dict[str, SourceKind] = {  # in the order in which they are tried
    "kaldi": SourceKind(
        about="Kaldi data directory (wav.scp or feats.scp)",
        recognise=_kaldi,
        reader="sslim.data.kaldi:kaldi_source",
        options=("stored_features", "frame_shift_ms"),
    ),
    "melhubert": SourceKind(
        about="MelHuBERT data folder (feature scp, .bas labels, .mean-var)",
        recognise=_melhubert,
        reader="sslim.data.melhubert_folders:melhubert_source",
    ),
    "ark": SourceKind(
        about="folder of Kaldi archives *.ark without lists, or of such folders",
        recognise=_ark,
        reader="sslim.data.ark_folders:ark_source",
        options=("frame_shift_ms",),
    ),
    "len-for-bucket": SourceKind(
        about="S3PRL's tables of lengths (CSV with file_path, length, label over audio)",
        recognise=_length_table,
        reader="sslim.data.length_tables:length_table_source",
        options=("audio_root",),
    ),
    "numpy": SourceKind(
        about="CSV with file_path, label_path, length (MelHuBERT) or file_path, length, label (S3PRL) over .npy files",
        recognise=_numpy,
        reader="sslim.data.numpy_lists:numpy_source",
        options=("frame_shift_ms",),
    ),
    "speech-commands": SourceKind(
        about="Speech Commands (a folder for each word)",
        recognise=_speech_commands,
        reader="sslim.data.audio_sources:speech_commands_source",
    ),
    "digits": SourceKind(
        about="Free Spoken Digits (DIGIT_SPEAKER_TAKE.wav)",
        recognise=_digits,
        reader="sslim.data.audio_sources:digits_source",
    ),
    "librispeech": SourceKind(
        about="LibriSpeech (SPEAKER-CHAPTER-NUMBER.flac)",
        recognise=_librispeech,
        reader="sslim.data.audio_sources:librispeech_source",
    ),
    "folder": SourceKind(
        about="any folder of audio, with a CSV or TSV file if there is one",
        recognise=_folder,
        reader="sslim.data.audio_sources:folder_source",
        options=("metadata", "label_column", "speaker_column"),
    ),
}


def kinds_sentence() -> str:
    """Returns the kinds and what they are, for an error or a help text."""
    return "; ".join(f"{name}: {kind.about}" for name, kind in SOURCES.items())


def check_kind(name: str) -> None:
    """Checks the name of a kind.

    Raises:
        ValueError: There is no such kind.
    """
    if name not in SOURCES:
        raise ValueError(f"there is no kind of source {name!r}{nearest(name, SOURCES)}; the kinds are {', '.join(SOURCES)}")


def detect_source(path: Path, options: SourceOptions | None = None) -> tuple[str, str]:
    """Tells which kind of source a path is.

    Args:
        path: A folder or a list file.
        options: What the user said about it; only kinds that know these options are considered.

    Returns:
        The kind's name and the reason.

    Raises:
        ValueError: The path does not exist or is of no known kind.
    """
    path = Path(os.path.abspath(path))
    if not path.exists():
        raise ValueError(f"the source {path} does not exist")
    given = _given(options or SourceOptions())
    candidates = {name: kind for name, kind in SOURCES.items() if set(given) <= set(kind.options)}
    for name, kind in candidates.items():
        reason = kind.recognise(path)
        if reason is not None:
            return name, reason
    if given == ["audio_root"] and (table := next(_s3prl_tables(path), None)) is not None:
        return "len-for-bucket", f"--audio-root is given, and {table.name} has the columns {', '.join(S3PRL_COLUMNS)}"
    if given and len(candidates) < len(SOURCES):
        option, fitting = given[0].replace("_", "-"), " or ".join(candidates) or "no kind"
        raise ValueError(f"{path} is not of kind {fitting}, to which --{option} applies")
    raise ValueError(f"{path} is no source that sslim knows; the kinds (--kind) are {kinds_sentence()}")


def _given(options: SourceOptions) -> list[str]:
    """Names of the options that the user set and that only some kinds know; any features can be asked for of any kind."""
    return [f.name for f in fields(options) if f.name != "features" and getattr(options, f.name) != f.default]


def load_source(path: Path, kind: str, options: SourceOptions | None = None) -> Source:
    """Reads a source of a given kind.

    Raises:
        ValueError: The path does not exist, is malformed, or an option does not fit the kind.
    """
    check_kind(kind)
    path, options = Path(os.path.abspath(path)), options or SourceOptions()
    if not path.exists():
        raise ValueError(f"the source {path} does not exist")
    known = SOURCES[kind].options
    for name in _given(options):
        if name not in known:
            fitting = ", ".join(other for other, entry in SOURCES.items() if name in entry.options)
            raise ValueError(
                f"--{name.replace('_', '-')} does not apply to {path}, which is of kind {kind}; it applies to {fitting}"
            )
    module, function = SOURCES[kind].reader.split(":")
    reader = getattr(importlib.import_module(module), function)
    stored = {"named": options.features, "frame_shift_ms": options.frame_shift_ms}
    arguments: dict[str, dict[str, Any]] = {
        "kaldi": {"features": options.stored_features, **stored},
        "melhubert": {},
        "ark": stored,
        "len-for-bucket": {"audio_root": options.audio_root},
        "numpy": stored,
    }
    return reader(path, **arguments[kind]) if kind in arguments else reader(path, options)


def merge_sources(first: Source, others: list[Source]) -> Source:
    """Puts sources into one; ids of the ``others`` get their source's name and a slash in front.

    Raises:
        ValueError: They hold different stored features.
    """
    sources = [first, *others]
    frontends = [source for source in sources if source.frontend is not None]
    for source in frontends[1:]:
        if source.frontend != frontends[0].frontend:
            raise ValueError(f"{frontends[0].name} and {source.name} hold different stored features: prepare them apart")
    prefixes = ["", *(f"{source.name}/" for source in others)]
    labels: dict[str, SourceLabels] = {}
    for prefix, source in zip(prefixes, sources, strict=True):
        for name, entry in source.labels.items():
            if name in labels:
                raise ValueError(f"{source.name} and another source both bring labels {name!r}: prepare them apart")
            labels[name] = replace(entry, read=_without_prefix(entry.read, prefix))
    utterances: list[SourceUtterance] = [
        replace(utterance, id=prefix + utterance.id) if prefix else utterance
        for prefix, source in zip(prefixes, sources, strict=True)
        for utterance in source.utterances
    ]
    notes = [f"{source.name}: {source.note}" for source in sources if source.note]
    return Source(
        name="+".join(source.name for source in sources),
        utterances=utterances,
        num_utterances=len(utterances),
        frontend=frontends[0].frontend if frontends else None,
        labels=labels,
        statistics=first.statistics if not others else None,
        note="; ".join(notes) or None,
    )


def _without_prefix(read: Callable, prefix: str) -> Callable:
    def read_stripped(utterance_id: str):  # type: ignore[no-untyped-def]
        if not utterance_id.startswith(prefix):
            raise KeyError(utterance_id)
        return read(utterance_id.removeprefix(prefix))

    return read_stripped
