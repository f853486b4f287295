"""Kaldi lists (``scp``) and data directories (``wav.scp`` or ``feats.scp``, ``segments``, ``utt2spk``, ``text``) as a source.

Nothing that a list names is ever executed: an entry that is a command (``... |``) is an error for that utterance. Archives may
have been moved together with their list; they are then found by base name.

Shape suffixes: ``T`` rows (frames), ``F`` columns (features).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from sslim.data.ark import KaldiError, read_ark, read_object, read_shape, write_ark_scp
from sslim.data.sources import Source, SourceUtterance
from sslim.data.stored_features import StoredAs, recognised, stored_as
from sslim.data.text_files import ENCODING
from sslim.frontends.config import FilterbankConfig, NormalizationConfig, SpectralFrontendConfig

__all__ = [
    "KaldiError", "Locator", "ScpEntry", "kaldi_source", "precomputed_frontend", "read_ark", "read_entry", "read_entry_shape",
    "read_matrix", "read_object", "read_scp", "read_shape", "read_table", "write_ark_scp",
]  # fmt: skip

MELHUBERT_DIM = 40


@dataclass(frozen=True, slots=True)
class ScpEntry:
    """One line of an ``scp`` list.

    Attributes:
        key: Utterance.
        path: Archive or file, where it was found; as stated when it was not.
        offset: Byte in an archive; None when the line names a whole file.
        ranges: ``[first:last]`` of rows and of columns, both inclusive as in Kaldi; empty for all.
        problem: Why the entry cannot be read, e.g. because it is a command; None when it can be tried.
    """

    key: str
    path: Path
    offset: int | None = None
    ranges: tuple[slice, ...] = ()
    problem: str | None = None


_SPECIFIER = re.compile(r"(?P<path>.*?)(?::(?P<offset>\d+))?(?:\[(?P<ranges>[\d:, ]*)\])?")


def _range(text: str, key: str) -> slice:
    parts = text.strip().split(":")
    if parts in ([""], ["", ""]):
        return slice(None)
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise KaldiError(f"{key}: the range {text!r} is not first:last")
    return slice(int(parts[0]), int(parts[1]) + 1)


class Locator:
    """Finds the files that a list names, also after the list and its archives have been moved together.

    Tried in turn: the path as stated (a relative one from the list's folder, from up to three folders above it, because Kaldi
    recipes write paths relative to the recipe's folder, then from the working directory), then its base name in the list's
    folder.

    Attributes:
        moved: Stated paths that were found by base name only.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.moved: list[str] = []
        self._found: dict[str, Path] = {}

    def __call__(self, stated: str) -> Path:
        """Returns where ``stated`` is; as stated when it is nowhere."""
        if stated not in self._found:
            self._found[stated] = self._search(stated)
        return self._found[stated]

    def _search(self, stated: str) -> Path:
        path = Path(stated)
        if path.is_absolute():
            bases = [path]
        else:
            parents = [self.folder, *list(self.folder.resolve().parents)[:3]]
            bases = [*(parent / path for parent in parents), path]
        for candidate in bases:
            if candidate.exists():
                return candidate
        candidate = self.folder / path.name
        if candidate.exists():
            self.moved.append(stated)
            return candidate
        return path


def parse_scp_value(key: str, value: str, locate: Locator) -> ScpEntry:
    """Reads the second part of an ``scp`` line; what can never be read becomes an entry with a ``problem``."""
    if value.endswith("|") or value.startswith("|"):
        problem = f"{key}: the list names a command ({value[:60]}); commands are not run, extract its output to a file first"
        return ScpEntry(key, Path(), problem=problem)
    match = _SPECIFIER.fullmatch(value)
    assert match is not None  # the path alone matches anything
    path = locate(match["path"])
    if path.suffix == ".gz":
        return ScpEntry(key, path, problem=f"{key}: {path} is compressed with gzip, unpack it first")
    ranges = () if match["ranges"] is None else tuple(_range(part, key) for part in match["ranges"].split(","))
    if len(ranges) > 2:
        raise KaldiError(f"{key}: [{match['ranges']}] has {len(ranges)} ranges, at most rows and columns are accepted")
    return ScpEntry(key, path, None if match["offset"] is None else int(match["offset"]), ranges)


def read_table(path: str | Path) -> dict[str, str]:
    """Reads a text table (``utt2spk``, ``text``, ``scp``, ...): key to the rest of its line; blank lines are skipped.

    Raises:
        KaldiError: A key comes twice, or the file is not text.
        OSError: It cannot be opened.
    """
    table: dict[str, str] = {}
    try:
        with open(path, encoding=ENCODING) as file:
            for number, line in enumerate(file, 1):
                parts = line.split(None, 1)
                if not parts:
                    continue
                if parts[0] in table:
                    raise KaldiError(f"{path} line {number}: the key {parts[0]!r} comes a second time")
                table[parts[0]] = parts[1].strip() if len(parts) == 2 else ""
    except UnicodeDecodeError as error:
        raise KaldiError(f"{path} is not a text table ({error.reason} at byte {error.start})") from error
    return table


def read_scp(path: str | Path, locate: Locator | None = None) -> dict[str, ScpEntry]:
    """Reads an ``scp`` list: key to its entry, in the list's order.

    Args:
        path: The list.
        locate: Finds moved archives; by default a :class:`Locator` of the list's folder.

    Raises:
        KaldiError: A line without a value, a key that comes twice, or a malformed range.
        OSError: It cannot be opened.
    """
    locate = locate or Locator(Path(path).parent)
    table = read_table(path)
    empty = [key for key, value in table.items() if not value]
    if empty:
        raise KaldiError(f"{path}: the line of {empty[0]!r} names no file")
    return {key: parse_scp_value(key, value, locate) for key, value in table.items()}


def read_entry(entry: ScpEntry) -> np.ndarray:
    """Reads the object that an ``scp`` line names, cut to its ranges.

    Raises:
        KaldiError: As for :func:`read_object`, or the entry is a command or its range leaves the matrix.
    """
    if entry.problem:
        raise KaldiError(entry.problem)
    array = read_object(entry.path, entry.offset or 0, key=entry.key)
    for axis, part in enumerate(entry.ranges):
        size = array.shape[axis] if axis < array.ndim else 0
        if part.stop is not None and not part.start < part.stop <= size:
            raise KaldiError(f"{entry.key}: the range {part.start}:{part.stop - 1} is not within 0:{size - 1} of axis {axis}")
    return array[entry.ranges] if entry.ranges else array


def read_matrix(entry: ScpEntry, dim: int | None = None) -> np.ndarray:
    """Reads a matrix as float32 (T, F).

    Args:
        entry: Line of an ``scp`` list.
        dim: Columns it must have; None for any.

    Raises:
        KaldiError: As for :func:`read_entry`, or it is no matrix of ``dim`` columns.
    """
    array = read_entry(entry)
    if array.ndim != 2 or (dim is not None and array.shape[1] != dim):
        wanted = "a matrix" if dim is None else f"a matrix of {dim} columns"
        raise KaldiError(f"{entry.key} in {entry.path}: expected {wanted}, found the shape {array.shape}")
    return np.ascontiguousarray(array, dtype=np.float32)


def precomputed_frontend(dim: int) -> tuple[SpectralFrontendConfig, str]:
    """Describes stored features of which only the dimension is known.

    An archive does not say how its features were made, so this is an assumption, stated in the second value: 40 dimensions are
    MelHuBERT's filterbank (Hamming window), any other number is Kaldi's default filterbank with that many channels.

    Returns:
        The description and one sentence for the user.
    """
    normalization = NormalizationConfig(kind="global")
    if dim == MELHUBERT_DIM:
        features = FilterbankConfig(num_mel_bins=dim, window="hamming", waveform_scale=32768.0)
        return (
            SpectralFrontendConfig(features=features, normalization=normalization),
            "stored features have 40 dimensions and are taken for MelHuBERT's log-Mel filterbank (Hamming window, 10 ms)",
        )
    features = FilterbankConfig(num_mel_bins=dim, waveform_scale=32768.0)
    return (
        SpectralFrontendConfig(features=features, normalization=normalization),
        f"stored features have {dim} dimensions and are taken for Kaldi's default log-Mel filterbank with that many channels"
        " (10 ms); if they are anything else, models trained on them cannot be given waveforms",
    )


def read_entry_shape(entry: ScpEntry) -> tuple[int, ...]:
    """Returns the shape of what an ``scp`` line names, from its header where it has no ranges.

    Raises:
        KaldiError: As for :func:`read_entry`.
    """
    if entry.problem or entry.ranges:
        return read_entry(entry).shape
    return read_shape(entry.path, entry.offset or 0, key=entry.key)


def first_dim(entries: Mapping[str, ScpEntry], where: Path) -> int:
    """Returns the number of columns of the first matrix that can be read.

    Raises:
        KaldiError: None of the first hundred can; the message is that of the first.
    """
    reason: KaldiError | None = None
    for entry in list(entries.values())[:100]:
        try:
            shape = read_entry_shape(entry)
        except KaldiError as error:
            reason = reason or error
            continue
        if len(shape) == 2 and shape[1] > 0:
            return shape[1]
        reason = reason or KaldiError(f"{entry.key} in {entry.path}: expected a matrix, found the shape {shape}")
    raise KaldiError(f"{where} lists no readable matrix: {reason}" if reason else f"{where} lists nothing")


def _refuse(reason: str) -> np.ndarray:
    raise KaldiError(reason)


def _optional_table(path: Path) -> dict[str, str]:
    return read_table(path) if path.exists() else {}


def _read_segments(path: Path) -> dict[str, tuple[str, float, float | None]]:
    """Reads ``segments``: utterance to recording, start and duration in seconds (None up to the recording's end, as end -1)."""
    segments: dict[str, tuple[str, float, float | None]] = {}
    for key, value in read_table(path).items():
        words = value.split()
        try:
            recording, start_s, end_s = words[0], float(words[1]), float(words[2])
        except (IndexError, ValueError):
            raise KaldiError(
                f"{path}: the line of {key!r} is not: recording, start and end in seconds, but {value!r}"
            ) from None
        if not (0 <= start_s < end_s < float("inf") or (end_s == -1 and 0 <= start_s < float("inf"))):
            raise KaldiError(
                f"{path}: {key!r} runs from {start_s} to {end_s} s, the start must be 0 or more and before the end"
            )
        segments[key] = (recording, start_s, None if end_s == -1 else end_s - start_s)
    return segments


def _with_audio(utterance: SourceUtterance, entry: ScpEntry, start_s: float, duration_s: float | None) -> SourceUtterance:
    """Adds the audio; where there is none, adds a reading that fails, so that the utterance goes into quarantine."""
    problem = entry.problem
    if problem is None and entry.offset is not None:
        problem = f"{utterance.id}: the audio is inside {entry.path} at byte {entry.offset}, extract it to a file first"
    if problem is not None:
        return replace(utterance, read_features=partial(_refuse, problem))
    return replace(utterance, audio=entry.path, start_s=start_s, duration_s=duration_s)


def _audio_set(folder: Path, locate: Locator, split: str | None) -> list[SourceUtterance]:
    recordings = read_scp(folder / "wav.scp", locate)
    if recordings and all(entry.problem for entry in recordings.values()):
        first = next(iter(recordings.values()))
        raise KaldiError(f"every entry of {folder / 'wav.scp'} is unusable, the first: {first.problem}")
    if (folder / "segments").exists():
        segments = _read_segments(folder / "segments")
    else:
        segments = {key: (key, 0.0, None) for key in recordings}
    speakers, texts = _optional_table(folder / "utt2spk"), _optional_table(folder / "text")
    utterances = []
    for key, (recording, start_s, duration_s) in segments.items():
        missing = ScpEntry(recording, Path(), problem=f"{key}: its recording {recording!r} is not in {folder / 'wav.scp'}")
        entry = recordings.get(recording, missing)
        plain = SourceUtterance(id=key, speaker=speakers.get(key), text=texts.get(key), split=split)
        utterances.append(_with_audio(plain, entry, start_s, duration_s))
    return utterances


def _feature_set(
    folder: Path, entries: Mapping[str, ScpEntry], dim: int, split: str | None, kept: StoredAs | None
) -> list[SourceUtterance]:
    speakers, texts = _optional_table(folder / "utt2spk"), _optional_table(folder / "text")
    utterances = []
    for key, entry in entries.items():
        read = partial(read_matrix, entry, dim)
        utterances.append(
            SourceUtterance(
                id=key,
                read_features=read if kept is None else kept.reading(read),
                speaker=speakers.get(key),
                text=texts.get(key),
                split=split,
            )
        )
    return utterances


def _find_sets(path: Path) -> list[tuple[Path, str | None]]:
    """Returns the data directories: ``path`` itself, or its sub-folders, whose names then become the split."""
    lists = ("wav.scp", "feats.scp")
    if any((path / name).is_file() for name in lists):
        return [(path, None)]
    children = sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
    sets: list[tuple[Path, str | None]] = [
        (child, child.name) for child in children if any((child / name).is_file() for name in lists)
    ]
    if not sets:
        raise KaldiError(f"{path} is no Kaldi data directory: neither it nor a folder in it has wav.scp or feats.scp")
    return sets


def check_unique(utterances: Sequence[SourceUtterance], where: Path) -> None:
    """Raises KaldiError when two utterances have the same id."""
    seen: set[str] = set()
    for utterance in utterances:
        if utterance.id in seen:
            raise KaldiError(f"{where}: the utterance {utterance.id!r} comes a second time")
        seen.add(utterance.id)


def moved_note(locators: Sequence[Locator]) -> list[str]:
    """Returns a sentence about files found by base name only; none when every path was right."""
    moved = [stated for locate in locators for stated in locate.moved]
    if not moved:
        return []
    return [
        f"{len(moved)} stated paths do not exist (the first: {moved[0]}); files of that name beside the list are read instead"
    ]


def _described(
    dim: int, where: str, named: str | None, frame_shift_ms: float | None
) -> tuple[SpectralFrontendConfig, str, StoredAs | None]:
    """Description of stored features, a sentence, and which columns of them to keep; None for all."""
    if named is None and frame_shift_ms is None and recognised(dim, where, kaldi=True) is None:
        return *precomputed_frontend(dim), None
    found = stored_as(dim, where, features=named, frame_shift_ms=frame_shift_ms, kaldi=True)
    return found.frontend, found.sentence, found


def kaldi_source(
    path: str | Path, *, features: bool = False, named: str | None = None, frame_shift_ms: float | None = None
) -> Source:
    """Reads a Kaldi data directory, or a folder of several (``train``, ``dev``, ... become the split).

    Audio (``wav.scp``, with ``segments`` if present) is preferred over stored features. ``utt2spk`` gives speakers, ``text``
    transcripts; ``utt2dur`` is not needed and not read. An entry that is a command, lies in an archive of audio or cannot be
    found is an error of that utterance when it is read.

    Args:
        path: The folder.
        features: Read ``feats.scp`` although there is ``wav.scp``.
        named: What the user says stored features are, see :func:`sslim.data.stored_features.stored_as`.
        frame_shift_ms: What the user says of their frame period.

    Raises:
        ValueError: No usable list, malformed tables, an id that comes twice, or stored features that are not as said.
    """
    path = Path(path)
    sets = _find_sets(path)
    stored = features or not all((folder / "wav.scp").is_file() for folder, _ in sets)
    lacking = [folder for folder, _ in sets if stored and not (folder / "feats.scp").is_file()]
    if lacking:
        raise KaldiError(
            f"{lacking[0]} has no feats.scp" + ("" if features else ", and other folders beside it have no wav.scp")
        )
    locators = [Locator(folder) for folder, _ in sets]
    utterances: list[SourceUtterance] = []
    frontend, notes = None, []
    if stored:
        lists = [read_scp(folder / "feats.scp", locate) for (folder, _), locate in zip(sets, locators, strict=True)]
        for (folder, _), entries in zip(sets, lists, strict=True):
            if not entries:
                raise KaldiError(f"{folder / 'feats.scp'} lists nothing")
        dim = first_dim(lists[0], sets[0][0] / "feats.scp")
        frontend, sentence, kept = _described(dim, "/".join(path.resolve().parts[-2:]), named, frame_shift_ms)
        notes.append(sentence)
        for (folder, split), entries in zip(sets, lists, strict=True):
            utterances += _feature_set(folder, entries, dim, split, kept)
    else:
        if frame_shift_ms is not None:
            raise KaldiError(
                f"--frame-shift-ms {frame_shift_ms:g} is for stored features, and {path} has audio (see --stored-features)"
            )
        for (folder, split), locate in zip(sets, locators, strict=True):
            utterances += _audio_set(folder, locate, split)
    check_unique(utterances, path)
    notes += moved_note(locators)
    return Source(
        name=path.resolve().name,
        utterances=utterances,
        num_utterances=len(utterances),
        frontend=frontend,
        note="; ".join(notes) or None,
    )
