"""What preparation reads: utterances with their audio or features, from any layout on disk.

Each kind of source is one function ``(path, options) -> Source`` in a file of its own; ``SOURCES`` in ``sslim.data.prepare``
is the table of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sslim.frontends.config import SpectralFrontendConfig

SPLIT_ROLES = {
    "train": "train",
    "dev": "dev",
    "valid": "dev",
    "validation": "dev",
    "val": "dev",
    "test": "test",
}  # first words of splits' names


def split_role(name: str | None) -> str | None:
    """Returns ``train``, ``dev`` or ``test`` for the name of a split or folder, by its first word; None for any other.

    ``train-clean-100``, ``dev_other`` and ``Test`` have a role, ``training`` and ``latest`` have not.
    """
    return None if name is None else SPLIT_ROLES.get(re.split(r"[-_. ]", name.lower(), maxsplit=1)[0])


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of speech with a symbol, e.g. a phone.

    Attributes:
        symbol: Its name.
        start_s: Seconds from the utterance's start.
        end_s: Likewise, exclusive.
    """

    symbol: str
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class SourceUtterance:
    """One utterance as found.

    Attributes:
        id: Unique name; a relative path without suffix is usual.
        audio: File with its sound; None when only features exist.
        start_s: Where it starts in that file.
        duration_s: How long it is; None for the rest of the file.
        read_features: Reads base features (T, F) float32 when they are precomputed; may raise ValueError or OSError.
        speaker: Speaker's name.
        label: Class of the whole utterance.
        text: Transcript.
        split: For example train, dev, test.
        alignment: Phones or other symbols with their times.
        misaligned: Why there is no alignment although a file has one; None otherwise.
    """

    id: str
    audio: Path | None = None
    start_s: float = 0.0
    duration_s: float | None = None
    read_features: Callable[[], np.ndarray] | None = None
    speaker: str | None = None
    label: str | None = None
    text: str | None = None
    split: str | None = None
    alignment: tuple[Segment, ...] | None = None
    misaligned: str | None = None


@dataclass(frozen=True, kw_only=True)
class SourceLabels:
    """Frame targets that come with a source.

    Attributes:
        frame_period_s: Seconds a label covers.
        num_clusters: K.
        read: Utterance id to its labels (int); raises KeyError when it has none, ValueError when they cannot be read.
        origin: Where they come from, plain JSON values.
    """

    frame_period_s: float
    num_clusters: int
    read: Callable[[str], np.ndarray]
    origin: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A corpus as found on disk.

    Attributes:
        name: Short name, e.g. the folder's.
        utterances: In a fixed order; may be lazy.
        num_utterances: Their number, for the progress bar.
        frontend: Description of precomputed features; None when features are computed from audio.
        labels: Target sets by name.
        statistics: Published (mean, std, name) of the features; None to measure them.
        note: One sentence for the user about choices made while reading.
    """

    name: str
    utterances: Iterable[SourceUtterance]
    num_utterances: int
    frontend: SpectralFrontendConfig | None = None
    labels: Mapping[str, SourceLabels] = field(default_factory=dict)
    statistics: tuple[np.ndarray, np.ndarray, str] | None = None
    note: str | None = None
