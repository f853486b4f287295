"""Sources that are folders of audio files: any folder, LibriSpeech, Free Spoken Digits, Speech Commands.

Files are listed in the order of their names, so that a corpus does not depend on the file system. An utterance's id is its path
inside the folder without the suffix (LibriSpeech: the file's name, which is unique there).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sslim.data.metadata import Metadata, find_metadata, read_header, read_metadata
from sslim.data.sources import SPLIT_ROLES, Source, SourceUtterance, split_role
from sslim.data.text_files import read_lines

AUDIO_SUFFIXES = frozenset(
    (
        ".wav",
        ".flac",
        ".ogg",
        ".oga",
        ".opus",
        ".mp3",
        ".aif",
        ".aiff",
        ".aifc",
        ".au",
        ".caf",
        ".w64",
        ".rf64",
        ".sph",
        ".nist",
    )
)  # what libsndfile reads and people have
LIBRISPEECH_NAME = re.compile(r"(?P<speaker>\d+)-(?P<chapter>\d+)-(?P<number>\d{4,})")
DIGIT_NAME = re.compile(r"(?P<digit>\d)_(?P<speaker>[^_]+)_(?P<take>\d+)")
DIGIT_COLUMNS = ("path", "speaker", "digit", "take")
NUM_DIGIT_TEST_TAKES = 5  # takes 0-4 are the published test set
COMMAND_LISTS = {"validation_list.txt": "dev", "testing_list.txt": "test"}
BACKGROUND = "_background_noise_"


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What a user may say about a source.

    Attributes:
        metadata: CSV or TSV file for a folder of audio; None to look for one.
        label_column: Its column that holds the label.
        speaker_column: Its column that holds the speaker.
        stored_features: Read the features that a Kaldi directory holds although it has audio, too.
        frame_shift_ms: Of stored features of which nothing says it.
        audio_root: Folder that the files of a table of lengths lie in.
        features: Name of the features that are asked for; of stored features it says what they are.
    """

    metadata: Path | None = None
    label_column: str | None = None
    speaker_column: str | None = None
    stored_features: bool = False
    frame_shift_ms: float | None = None
    audio_root: Path | None = None
    features: str | None = None


def audio_files(folder: Path) -> Iterator[Path]:
    """Yields the audio files below a folder, sorted by path within each folder; hidden files and folders are left out.

    Links to folders are followed, each real folder once.
    """
    seen = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES:
                yield Path(here, name)


def relative_id(path: Path, folder: Path) -> str:
    """Returns the path inside ``folder`` without its suffix, parts joined by ``/``."""
    return path.relative_to(folder).with_suffix("").as_posix()


def folder_name(path: Path) -> str:
    """Returns a short name for a source."""
    path = path.resolve()
    return path.name or "corpus"


def folder_split(name: str) -> str | None:
    """Returns the split that a folder's name stands for: ``train``, ``dev``, ``test``, or the name where it says more."""
    return SPLIT_ROLES.get(name.lower()) or (name if split_role(name) else None)


def _source(name: str, utterances: list[SourceUtterance], path: Path, what: str, note: str | None = None) -> Source:
    if not utterances:
        raise ValueError(f"{path} holds no audio files ({what}); known suffixes are {' '.join(sorted(AUDIO_SUFFIXES))}")
    return Source(name=name, utterances=utterances, num_utterances=len(utterances), note=note)


# ---- any folder ------------------------------------------------------------------------------------------------------


def folder_source(path: Path, options: SourceOptions) -> Source:
    """Reads a folder of audio, with all that a metadata file says; without one, folders train, dev and test become splits.

    So do ``train-clean-100`` and the like, under their own names.

    Args:
        path: The folder, or a metadata file inside it.
        options: The metadata file, if it is elsewhere, and its columns.

    Raises:
        ValueError: Nothing is found, or the metadata file is malformed.
    """
    folder, metadata_path = (path.parent, path) if path.is_file() else (path, options.metadata or find_metadata(path))
    if options.metadata is not None and not options.metadata.is_file():
        raise ValueError(f"the metadata file {options.metadata} does not exist")
    if metadata_path is not None:
        metadata = read_metadata(
            metadata_path, folder, label_column=options.label_column, speaker_column=options.speaker_column
        )
        return _metadata_source(folder, metadata)
    for option in ("label_column", "speaker_column"):
        if getattr(options, option) is not None:
            raise ValueError(
                f"--{option.replace('_', '-')} needs a metadata file, {folder} holds none: pass it with --metadata"
            )
    utterances = []
    for audio in audio_files(folder):
        parts = audio.relative_to(folder).parts
        split = folder_split(parts[0]) if len(parts) > 1 else None
        utterances.append(SourceUtterance(id=relative_id(audio, folder), audio=audio, split=split))
    return _source(folder_name(folder), utterances, folder, "searched in all its folders")


def _metadata_source(folder: Path, metadata: Metadata) -> Source:
    utterances = []
    for row in metadata.rows:
        inside = row.audio.is_relative_to(folder)
        name = relative_id(row.audio, folder) if inside else Path(row.listed).with_suffix("").as_posix()
        utterances.append(
            SourceUtterance(id=name, audio=row.audio, speaker=row.speaker, label=row.label, text=row.text, split=row.split)
        )
    note = f"{metadata.path.name} lists {len(utterances):,} files"
    listed = {row.audio for row in metadata.rows}
    unlisted = sum(audio not in listed for audio in audio_files(folder))
    if unlisted:
        note += f"; {unlisted:,} audio files that it does not list are left out"
    if metadata.unused_columns:
        note += f"; columns not used: {', '.join(metadata.unused_columns)} (--label-column and --speaker-column choose others)"
    return _source(folder_name(folder), utterances, metadata.path, "it lists none", note)


# ---- LibriSpeech -----------------------------------------------------------------------------------------------------


def librispeech_source(path: Path, options: SourceOptions) -> Source:
    """Reads LibriSpeech (or LibriLight's finetuning sets): ``SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac``.

    The speaker comes from the file's name, the text from ``SPEAKER-CHAPTER.trans.txt``, the split is the subset's name. Any
    folder above or inside a subset will do.

    Raises:
        ValueError: There are no such files, or a transcript is malformed.
    """
    utterances, texts = [], {}
    folder = None
    for audio in audio_files(path):
        match = LIBRISPEECH_NAME.fullmatch(audio.stem)
        if match is None:
            continue
        if audio.parent != folder:
            folder = audio.parent
            texts = _transcripts(folder)
        chapter_folders = (match["speaker"], match["chapter"]) == (folder.parent.name, folder.name)
        utterances.append(
            SourceUtterance(
                id=audio.stem,
                audio=audio,
                speaker=match["speaker"],
                text=texts.get(audio.stem),
                split=folder.resolve().parent.parent.name if chapter_folders else None,
            )
        )
    return _source(folder_name(path), utterances, path, "named SPEAKER-CHAPTER-NUMBER, as in LibriSpeech")


def _transcripts(folder: Path) -> dict[str, str]:
    texts = {}
    for path in sorted(folder.glob("*.trans.txt")):
        for number, line in enumerate(read_lines(path), start=1):
            if not line.strip():
                continue
            name, _, text = line.partition(" ")
            if not LIBRISPEECH_NAME.fullmatch(name):
                raise ValueError(f"{path}, line {number} starts with {name!r} instead of SPEAKER-CHAPTER-NUMBER")
            texts[name] = text.strip()
    return texts


# ---- Free Spoken Digits ----------------------------------------------------------------------------------------------


def digits_source(path: Path, options: SourceOptions) -> Source:
    """Reads the Free Spoken Digit Dataset: ``DIGIT_SPEAKER_TAKE.wav``, or an ``index.csv`` with path, speaker, digit and take.

    The label is the digit. Takes 0 to 4 are the test set, as its authors define it, the others are for training.

    Raises:
        ValueError: There are no such files.
    """
    index = path / "index.csv"
    if index.is_file() and set(DIGIT_COLUMNS) <= set(read_header(index)):
        speakers = read_metadata(index, path, label_column="digit", speaker_column="speaker")
        takes = read_metadata(index, path, label_column="take")
        found = [(row.audio, row.label, row.speaker, take.label) for row, take in zip(speakers.rows, takes.rows, strict=True)]
    else:
        matches = ((audio, DIGIT_NAME.fullmatch(audio.stem)) for audio in audio_files(path))
        found = [(audio, match["digit"], match["speaker"], match["take"]) for audio, match in matches if match is not None]
    utterances = []
    for audio, digit, speaker, take in found:
        if take is None or not take.isdigit():
            raise ValueError(f"{audio}: its take is {take!r} instead of a whole number")
        split = "test" if int(take) < NUM_DIGIT_TEST_TAKES else "train"
        name = relative_id(audio, path) if audio.is_relative_to(path) else audio.stem
        utterances.append(SourceUtterance(id=name, audio=audio, speaker=speaker, label=digit, split=split))
    return _source(folder_name(path), utterances, path, "named DIGIT_SPEAKER_TAKE, as in Free Spoken Digits")


# ---- Speech Commands -------------------------------------------------------------------------------------------------


def speech_commands_source(path: Path, options: SourceOptions) -> Source:
    """Reads Speech Commands: ``WORD/SPEAKER_nohash_TAKE.wav`` with ``validation_list.txt`` and ``testing_list.txt``.

    The label is the word, the lists become the splits dev and test, all else is train; background noise is left out.

    Raises:
        ValueError: There are no such files.
    """
    splits = {}
    for name, split in COMMAND_LISTS.items():
        if (path / name).is_file():
            splits.update({line.strip(): split for line in read_lines(path / name)})
    utterances = []
    for audio in audio_files(path):
        relative = audio.relative_to(path)
        if len(relative.parts) != 2 or relative.parts[0] == BACKGROUND:
            continue
        speaker, found, _ = audio.stem.partition("_nohash_")
        utterances.append(
            SourceUtterance(
                id=relative_id(audio, path),
                audio=audio,
                speaker=speaker if found else None,
                label=relative.parts[0],
                split=splits.get(relative.as_posix(), "train"),
            )
        )
    return _source(folder_name(path), utterances, path, "in folders named by word, as in Speech Commands")
