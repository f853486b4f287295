"""Phone alignments of LibriSpeech that others have published, as seconds: those of CPC and those of the Montreal aligner.

CPC's file (``converted_aligned_phones.txt``; Rivière et al., "Unsupervised pretraining transfers well across languages", arXiv
2002.02848) holds one whole number below 41 for every frame of Kaldi: a window of 25 ms every 10 ms. Label j therefore tells of
the sound around 10 j + 12.5 ms, not around 10 j ms, where S3PRL lays it over frames that are centred on their times. The
Montreal aligner's files, TextGrids or text with ``start end phone``, are in seconds of the recording, and stay as they are.

Both become segments in seconds; ``sslim.data.alignment`` then finds the one that the middle of any front-end's frame lies in.
"""

from __future__ import annotations

import codecs
import mmap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from sslim.data.sources import Segment, Source, SourceUtterance
from sslim.data.text_files import read_lines
from sslim.data.textgrids import read_textgrid

CPC_FILE = "converted_aligned_phones.txt"
CPC_SHIFT_S, CPC_WINDOW_S = 0.01, 0.025
NUM_CPC_PHONES = 41
NUM_TRIED = 20  # alignments, of which one at least must be readable
UNALIGNED_FILE = "unaligned.txt"


class AlignmentError(ValueError):
    """Alignments that cannot be read; the message names the file and what was found."""


@dataclass(frozen=True, kw_only=True)
class PhoneAlignments:
    """Alignments of many utterances, read one at a time.

    Attributes:
        kind: ``cpc`` (symbols are whole numbers, ``"0"`` to ``"40"``) or ``montreal`` (phone names).
        ids: Names of the utterances that have an alignment; of files, their paths without suffix.
        unaligned: Utterances that the aligner gave up on, where the source lists them.
        read: Utterance id to its segments, in the order of time; KeyError without one, AlignmentError when it is malformed.
    """

    kind: Literal["cpc", "montreal"]
    ids: frozenset[str]
    unaligned: frozenset[str]
    read: Callable[[str], tuple[Segment, ...]]
    _by_last: dict[str, str] = field(default_factory=dict, repr=False)  # what follows the last / -> the one name that ends so

    def __post_init__(self) -> None:
        lasts = Counter(name.rpartition("/")[2] for name in self.ids)
        self._by_last.update({last: name for name in self.ids if lasts[last := name.rpartition("/")[2]] == 1})

    def get(self, utterance_id: str) -> tuple[Segment, ...] | None:
        """Returns the segments of an utterance, None without any; see :meth:`name_of`.

        Raises:
            AlignmentError: Its alignment is malformed.
        """
        name = self.name_of(utterance_id)
        return None if name is None else self.read(name)

    def name_of(self, utterance_id: str) -> str | None:
        """Returns the name under which an utterance is aligned, None when it is not.

        It is the utterance's id, or the only name that has the same part after the last ``/``.
        """
        last = utterance_id.rpartition("/")[2]
        if self.unaligned & {utterance_id, last}:
            return None
        return utterance_id if utterance_id in self.ids else self._by_last.get(last)


def read_phone_alignments(path: str | Path) -> PhoneAlignments:
    """Opens alignments of either kind.

    Args:
        path: ``converted_aligned_phones.txt``, a folder that holds it, or a folder of the Montreal aligner's files.

    Raises:
        AlignmentError: It is neither.
    """
    path = Path(path)
    if not path.exists():
        raise AlignmentError(f"the alignments {path} do not exist")
    if path.suffix.lower() == ".textgrid" and path.is_file():
        raise AlignmentError(f"{path} is the alignment of one utterance; give the folder that holds it")
    if path.is_file():
        return read_cpc_alignments(path)
    if (path / CPC_FILE).is_file():
        return read_cpc_alignments(path / CPC_FILE)
    return read_montreal_alignments(path)


# ---- CPC -------------------------------------------------------------------------------------------------------------


def read_cpc_alignments(path: str | Path) -> PhoneAlignments:
    """Opens CPC's file: each line an utterance's id and one whole number for every frame of 10 ms.

    Raises:
        AlignmentError: It cannot be opened, is empty, or an utterance comes twice.
    """
    path = Path(path)
    data, places = _lines_by_id(path)

    def read(utterance_id: str) -> tuple[Segment, ...]:
        begin, end = places[utterance_id]
        return cpc_segments(_labels(data[begin:end], f"{path}, {utterance_id}"))

    return PhoneAlignments(kind="cpc", ids=frozenset(places), unaligned=frozenset(), read=read)


def read_cpc_labels(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (utterance id, labels (T,) int64 of Kaldi's frames) of CPC's file, in its order.

    Raises:
        AlignmentError: As for :func:`read_cpc_alignments`, or a line holds anything but whole numbers below 41.
    """
    data, places = _lines_by_id(Path(path))
    for utterance_id, (begin, end) in places.items():
        yield utterance_id, _labels(data[begin:end], f"{path}, {utterance_id}")


def _lines_by_id(path: Path) -> tuple[mmap.mmap, dict[str, tuple[int, int]]]:
    """Maps the file; returns where the labels of each utterance begin and end."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise AlignmentError(f"the alignments {path} cannot be opened ({error})") from error
    places: dict[str, tuple[int, int]] = {}
    begin = 0
    for line in iter(data.readline, b""):
        end = begin + len(line)
        key, _, rest = line.removeprefix(codecs.BOM_UTF8 if not begin else b"").lstrip().partition(b" ")
        if key.strip():
            name = key.strip().decode("utf-8", "replace")
            if name in places:
                raise AlignmentError(f"{path}: the utterance {name!r} comes a second time")
            places[name] = (end - len(rest), end)
        begin = end
    if not places:
        raise AlignmentError(f"{path} holds no alignments: each line is an utterance's id and whole numbers")
    _labels(data[slice(*next(iter(places.values())))], f"{path}, line 1")  # another kind of file shows at once
    return data, places


def _labels(text: bytes, where: str) -> np.ndarray:
    try:
        labels_T = np.array([int(word) for word in text.split()], dtype=np.int64)
    except (ValueError, OverflowError):
        raise AlignmentError(f"{where}: expected whole numbers, found {text[:30]!r}") from None
    if len(labels_T) == 0 or labels_T.min() < 0 or labels_T.max() >= NUM_CPC_PHONES:
        found = "none" if len(labels_T) == 0 else f"{labels_T.min()} to {labels_T.max()}"
        raise AlignmentError(f"{where}: expected phones from 0 to {NUM_CPC_PHONES - 1}, one for every 10 ms, found {found}")
    return labels_T


def cpc_segments(labels_T: np.ndarray) -> tuple[Segment, ...]:
    """Returns the segments of labels of Kaldi's frames, equal neighbours joined.

    Label j covers 10 ms around the middle of its window, 10 j + 12.5 ms; the first reaches back to the start of the sound, the
    last to the end of its window.

    Args:
        labels_T: (T,) one label for every window of 25 ms every 10 ms.
    """
    first = np.flatnonzero(np.diff(labels_T, prepend=-1))
    offset_s = (CPC_WINDOW_S - CPC_SHIFT_S) / 2
    edges_s = np.round([0.0, *(first[1:] * CPC_SHIFT_S + offset_s), (len(labels_T) - 1) * CPC_SHIFT_S + CPC_WINDOW_S], 4)
    return tuple(
        Segment(symbol=str(symbol), start_s=start_s, end_s=end_s)
        for symbol, start_s, end_s in zip(labels_T[first].tolist(), edges_s[:-1].tolist(), edges_s[1:].tolist(), strict=True)
    )


# ---- Montreal aligner ------------------------------------------------------------------------------------------------


def read_montreal_alignments(folder: str | Path) -> PhoneAlignments:
    """Opens a folder of files named after their utterances, in folders of any depth, as the audio's or not.

    They are TextGrids, or text files whose lines are ``start end phone``; beside TextGrids, text files are transcripts. A file
    ``unaligned.txt`` in any of the folders lists utterances without an alignment, the first word of each line.

    Raises:
        AlignmentError: There are none.
    """
    folder = Path(folder)
    paths = sorted(folder.rglob("*"))
    lists = [path for path in paths if path.name == UNALIGNED_FILE]
    unaligned = {line.split()[0] for path in lists for line in _text_lines(path) if line.strip()}
    grids = [path for path in paths if path.suffix.lower() == ".textgrid"]
    texts = [path for path in paths if path.suffix == ".txt" and path not in lists]
    texts = [path for path in texts if not path.name.endswith(".trans.txt")]  # transcripts, where the sound lies here too
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in grids or texts}
    if not files:
        raise AlignmentError(
            f"{folder} holds no alignments: neither {CPC_FILE} nor the Montreal aligner's UTTERANCE.TextGrid or UTTERANCE.txt"
        )
    return PhoneAlignments(
        kind="montreal",
        ids=frozenset(files),
        unaligned=frozenset(unaligned),
        read=lambda utterance_id: read_montreal_file(files[utterance_id]),
    )


def _text_lines(path: Path) -> list[str]:
    try:
        return read_lines(path)
    except ValueError as error:
        raise AlignmentError(f"the alignment {error}") from error


def read_montreal_file(path: Path) -> tuple[Segment, ...]:
    """Reads the segments of one utterance: a TextGrid, or lines ``start end phone``, in seconds.

    Raises:
        AlignmentError: A line is anything else, ends before it starts, or starts before the line above; or a TextGrid cannot be
            read or has no tier of phones.
    """
    if path.suffix.lower() == ".textgrid":
        try:
            return read_textgrid(path)
        except ValueError as error:
            raise AlignmentError(str(error)) from error
    segments: list[Segment] = []
    for number, line in enumerate(_text_lines(path), start=1):
        words = line.split()
        if not words:
            continue
        try:
            start_s, end_s, symbol = float(words[0]), float(words[1]), words[2]
        except (IndexError, ValueError):
            raise AlignmentError(f"{path}, line {number}: expected start, end and phone, found {line[:40]!r}") from None
        before_s = segments[-1].start_s if segments else 0.0
        if len(words) != 3 or not before_s <= start_s <= end_s < float("inf"):
            raise AlignmentError(
                f"{path}, line {number}: expected start, end and phone in the order of time, found {line[:40]!r}"
            )
        segments.append(Segment(symbol=symbol, start_s=start_s, end_s=end_s))
    if not segments:
        raise AlignmentError(f"the alignment {path} is empty")
    return tuple(segments)


# ---- to a corpus -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Aligned:
    """Utterances with their alignments, which are read when an utterance's turn comes; a malformed one leaves its utterance."""

    utterances: list[SourceUtterance]
    alignments: PhoneAlignments

    def __iter__(self) -> Iterator[SourceUtterance]:
        for utterance in self.utterances:
            try:
                segments = self.alignments.get(utterance.id)
            except AlignmentError as error:
                yield replace(utterance, misaligned=str(error))
                continue
            yield utterance if segments is None else replace(utterance, alignment=segments)


def _check_first(alignments: PhoneAlignments, names: list[str]) -> None:
    """Reads the first few, so that files of another kind end a preparation at once; single malformed ones do not."""
    error: AlignmentError | None = None
    for name in names[:NUM_TRIED]:
        try:
            alignments.read(name)
        except AlignmentError as found:
            error = error or found
        else:
            return
    if error is not None:
        raise error


def with_alignments(source: Source, alignments: PhoneAlignments, name: str) -> Source:
    """Returns a source whose utterances have their alignments; those without one, or with a malformed one, keep what they had.

    Args:
        source: Any source.
        alignments: Found by utterance id, or by its last part (LibriSpeech's file name).
        name: What to call the alignments in a sentence.

    Raises:
        AlignmentError: Not one utterance has an alignment there, two have the same, or the first few are all malformed.
    """
    utterances = list(source.utterances)
    owners: dict[str, str] = {}
    for utterance in utterances:
        aligned = alignments.name_of(utterance.id)
        if aligned is not None and owners.setdefault(aligned, utterance.id) != utterance.id:
            raise AlignmentError(f"{name} has one alignment {aligned!r} for both {owners[aligned]!r} and {utterance.id!r}")
    found = len(owners)
    if found == 0:
        example = utterances[0].id if utterances else "none"
        raise AlignmentError(
            f"{name} aligns none of the {len(utterances):,} utterances of {source.name}: it has {min(alignments.ids)!r}, for "
            f"example, and the source {example!r}"
        )
    _check_first(alignments, list(owners))
    note = f"{found:,} of {len(utterances):,} utterances have an alignment in {name}"
    notes = [source.note, note] if source.note else [note]
    return replace(source, utterances=_Aligned(utterances, alignments), num_utterances=len(utterances), note="; ".join(notes))
