"""What is asked of features: ``TASKS`` maps a task's name to the classes of a corpus's utterances or frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sslim.config import nearest
from sslim.data.corpus import Corpus

NO_CLASS = -1  # frames outside of every segment


@dataclass(frozen=True, kw_only=True)
class Task:
    """A classification task over a corpus.

    Attributes:
        name: Its name.
        unit: Whether utterances or frames are classified.
        indices: (n,) corpus indices of the utterances that have classes.
        classes: Names of the classes.
        classes_N: (n,) int64 class of each utterance; None for frame tasks.
        frame_classes: Position, number of frames, frame period in seconds to (T,) int64 classes, ``NO_CLASS`` where there
            is none; None for utterance tasks.
        num_without: Utterances left out because the manifest has no class for them.
    """

    name: str
    unit: Literal["utterance", "frame"]
    indices: np.ndarray
    classes: tuple[str, ...]
    classes_N: np.ndarray | None = None
    frame_classes: Callable[[int, int, float], np.ndarray] | None = None
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


def phone_task(corpus: Corpus, column: str) -> Task:
    """Classification of frames by the symbols of the manifest's alignments; a frame belongs to the segment at its middle.

    Raises:
        ValueError: No utterance has an alignment, or there is one symbol only.
    """
    from sslim.data.alignment import frame_symbols, overhang_s

    alignments = {i: alignment for i in range(len(corpus)) if (alignment := corpus.utterance(i).alignment)}
    if not alignments:
        raise ValueError(f"no utterance of corpus {corpus.name!r} has an alignment, so there are no {column} to classify")
    names = sorted({segment.symbol for alignment in alignments.values() for segment in alignment})
    if len(names) < 2:
        raise ValueError(f"the alignments of corpus {corpus.name!r} have the symbol {names[0]!r} only; a probe needs two")
    indices = np.array(sorted(alignments), dtype=np.int64)
    number = {name: i for i, name in enumerate(names)}
    beyond_s = overhang_s(corpus)

    def frame_classes(position: int, num_frames: int, frame_period_s: float) -> np.ndarray:
        segments = alignments[int(indices[position])]
        symbols = frame_symbols(segments, num_frames, frame_period_s, frame_period_s + beyond_s)
        return np.array([NO_CLASS if symbol is None else number[symbol] for symbol in symbols], dtype=np.int64)

    return Task(
        name=column,
        unit="frame",
        indices=indices,
        classes=tuple(names),
        frame_classes=frame_classes,
        num_without=len(corpus) - len(indices),
    )


TASKS: dict[str, Callable[[Corpus, str], Task]] = {"label": column_task, "speaker": column_task, "phones": phone_task}


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
        raise ValueError(f"the task {name!r} takes its classes from alignments, not from the column {column!r}")
    return TASKS[name](corpus, column or name)
