"""What is asked of features: ``TASKS`` maps a task's name to the classes of a corpus's utterances or frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from sslim.config import nearest
from sslim.data.corpus import Corpus
from sslim.data.sources import Segment

NO_CLASS = -1  # frames outside of every segment
FrameClasses = Callable[[int, int, float, "float | None"], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A classification task over a corpus.

    Attributes:
        name: Its name.
        unit: Whether utterances or frames are classified.
        indices: (n,) corpus indices of the utterances that have classes.
        classes: Names of the classes.
        classes_N: (n,) int64 class of each utterance; None for frame tasks.
        frame_classes: Corpus index, number of frames, seconds from one to the next, seconds that a frame sees (None for the
            same) to (T,) int64 classes, ``NO_CLASS`` where there is none; None for utterance tasks.
        segments_of: Corpus index to its aligned segments, whose symbols are ``classes``; None where classes are of no segments.
        num_without: Utterances left out because the manifest has no class for them.
    """

    name: str
    unit: Literal["utterance", "frame"]
    indices: np.ndarray
    classes: tuple[str, ...]
    classes_N: np.ndarray | None = None
    frame_classes: FrameClasses | None = None
    segments_of: Callable[[int], Sequence[Segment]] | None = None
    num_without: int


def column_task(corpus: Corpus, column: str) -> Task:
    """Classification of utterances by a column of the manifest; classes in alphabetical order.

    Raises:
        ValueError: The column is unknown, or it has fewer than two classes.
    """
    values = corpus.column(column)
    indices = np.array([i for i, value in enumerate(values) if value is not None], dtype=np.int64)
    names, classes_N = np.unique(np.array([str(values[i]) for i in indices]), return_inverse=True)
    if len(names) < 2:
        found = f"only {str(names[0])!r}" if len(names) else "none"
        raise ValueError(
            f"column {column!r} of corpus {corpus.name!r} needs at least two classes and has {found}; "
            "`sslim prepare` takes them from a CSV or from the corpus's layout"
        )
    return Task(
        name=column,
        unit="utterance",
        indices=indices,
        classes=tuple(names.tolist()),
        classes_N=classes_N.astype(np.int64),
        num_without=len(values) - len(indices),
    )


def speaker_frames_task(corpus: Corpus, column: str) -> Task:
    """Classification of every frame by the speaker of its utterance (``speaker_frame`` of S3PRL).

    Raises:
        ValueError: There are fewer than two speakers.
    """
    task = column_task(corpus, "speaker")
    assert task.classes_N is not None
    class_of = dict(zip(task.indices.tolist(), task.classes_N.tolist(), strict=True))

    def frame_classes(index: int, num_frames: int, frame_shift_s: float, frame_length_s: float | None) -> np.ndarray:
        return np.full(num_frames, class_of[index], dtype=np.int64)

    return replace(task, name=column, unit="frame", frame_classes=frame_classes)


def phone_task(corpus: Corpus, column: str) -> Task:
    """Classification of frames by the symbols of the manifest's alignments; a frame belongs to the segment at its middle.

    Raises:
        ValueError: No utterance has an alignment, or there is one symbol only.
    """
    alignments = {i: alignment for i in range(len(corpus)) if (alignment := corpus.utterance(i).alignment)}
    if not alignments:
        raise ValueError(f"no utterance of corpus {corpus.name!r} has an alignment, so there are no {column} to classify")
    names = sorted({segment.symbol for alignment in alignments.values() for segment in alignment}, key=_order)
    if len(names) < 2:
        raise ValueError(f"the alignments of corpus {corpus.name!r} have the symbol {names[0]!r} only; a probe needs two")

    def frame_classes(index: int, num_frames: int, frame_shift_s: float, frame_length_s: float | None) -> np.ndarray:
        return segment_classes(alignments[index], names, num_frames, frame_shift_s, frame_length_s)

    return Task(
        name=column,
        unit="frame",
        indices=np.array(sorted(alignments), dtype=np.int64),
        classes=tuple(names),
        frame_classes=frame_classes,
        segments_of=alignments.__getitem__,
        num_without=len(corpus) - len(alignments),
    )


def _order(symbol: str) -> tuple[bool, int, str]:
    """Numbers by size (CPC's phones are numbers), then names by the alphabet."""
    return (False, int(symbol), symbol) if symbol.isdecimal() else (True, 0, symbol)


def segment_classes(
    segments: Sequence[Segment], names: Sequence[str], num_frames: int, frame_shift_s: float, frame_length_s: float | None
) -> np.ndarray:
    """Returns (T,) int64: the number in ``names`` of the symbol at the middle of each frame, ``NO_CLASS`` where there is none.

    Args:
        segments: Of one utterance.
        names: Of the classes.
        num_frames: T.
        frame_shift_s: Seconds from one frame to the next.
        frame_length_s: Seconds that a frame sees, from the start of its shift; None for the shift itself.
    """
    from sslim.data.alignment import frame_segments

    number = {name: i for i, name in enumerate(names)}
    classes = np.array([number[segment.symbol] for segment in segments] + [NO_CLASS], dtype=np.int64)
    return classes[frame_segments(segments, num_frames, frame_shift_s, frame_length_s)]  # no segment is -1, the last entry


TASKS: dict[str, Callable[[Corpus, str], Task]] = {
    "label": column_task,
    "speaker": column_task,
    "speaker-frames": speaker_frames_task,
    "phones": phone_task,
}


def load_task(name: str, corpus: Corpus, column: str | None = None) -> Task:
    """Returns a task's classes in ``corpus``.

    Args:
        name: A name in ``TASKS``.
        corpus: Where from.
        column: For utterance tasks: the manifest's column to use instead of the task's own.

    Raises:
        ValueError: There is no such task, or the corpus lacks what it needs.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}{nearest(name, TASKS)}; the tasks are {', '.join(TASKS)}")
    if column is not None and TASKS[name] is not column_task:
        takes = "speakers" if TASKS[name] is speaker_frames_task else "alignments"
        raise ValueError(f"the task {name!r} takes its classes from {takes}, not from the column {column!r}")
    return TASKS[name](corpus, column or name)
