"""Frame targets of a corpus: one packed array of cluster numbers, and how they are laid over a model's frames.

========================  =======================================================================================
``labels.json``           format version, frame period, number of clusters, the corpus's digest, origin, quality
``labels.safetensors``    labels (uint8, uint16 or int32), offsets (N + 1,) int64, present (N,) uint8
``codebook.safetensors``  where the labels come from clustering: centroids (K, F) float32; for features also their mean and std
``digests.json``          SHA-256 of each of them
========================  =======================================================================================

An utterance may have no labels, which is not the same as having none of its frames labelled: ``present`` tells them apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sslim.batch import IGNORED_LABEL
from sslim.config import read_json
from sslim.storage import (
    DIGESTS,
    TornFolderError,
    atomic_folder,
    check_folder,
    file_digest,
    load_tensors,
    save_tensors,
    write_json,
)

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
DESCRIPTION, LABELS, CODEBOOK = "labels.json", "labels.safetensors", "codebook.safetensors"
KEYS = (
    "format_version",
    "frame_period_s",
    "num_clusters",
    "num_utterances",
    "num_labels",
    "corpus_digest",
    "origin",
    "quality",
)
PACKED_TYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("u1"), "U16": np.dtype("<u2"), "I32": np.dtype("<i4")}
COLUMN_TYPES: dict[str, dict[str, np.dtype[Any]]] = {"offsets": {"I64": np.dtype("<i8")}, "present": {"U8": np.dtype("u1")}}
CHECKED_BYTES = (
    512 * 2**20
)  # label files up to this size (1,500 h at 20 ms) are read whole and checked when opened: under a second
PERIOD_TOLERANCE = 1e-3  # how far a ratio of periods may be from a whole number; periods are written as decimal fractions


class LabelError(ValueError):
    """Labels that cannot be read, or do not fit what they are for; the message is one sentence for the user."""


def packed_type(num_clusters: int) -> np.dtype[Any]:
    """Returns the smallest of uint8, uint16 and int32 that holds 0 to ``num_clusters`` - 1.

    Raises:
        ValueError: There are none, or too many.
    """
    if not 1 <= num_clusters <= 2**31 - 1:
        raise ValueError(f"num_clusters is {num_clusters}; it must be from 1 to {2**31 - 1}")
    return PACKED_TYPES["U8" if num_clusters <= 2**8 else "U16" if num_clusters <= 2**16 else "I32"]


def align_labels(labels: np.ndarray, *, label_period_s: float, frame_period_s: float, num_frames: int) -> np.ndarray:
    """Lays labels over a model's frames.

    Which label belongs to a frame follows from the two periods alone, never from the lengths. Of labels k times finer than the
    frames the first of every k is taken (MelHuBERT's rule for frames of two stacked ones), then the count must fit.

    Args:
        labels: (T',) whole numbers, one for each ``label_period_s``.
        label_period_s: Seconds from one label to the next.
        frame_period_s: Seconds from one frame of the model to the next: ``label_period_s`` or a whole multiple.
        num_frames: Frames of the utterance.

    Returns:
        (num_frames,) int64. A missing last label is ``IGNORED_LABEL``, one too many is cut off.

    Raises:
        LabelError: The periods do not divide, or there are more than one label too few or too many.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise LabelError(f"labels are {labels.dtype} of shape {labels.shape}; expected one row of whole numbers")
    ratio = frame_period_s / label_period_s if label_period_s > 0 else 0.0
    finer = round(ratio)
    if finer < 1 or not math.isclose(ratio, finer, rel_tol=PERIOD_TOLERANCE):
        raise LabelError(
            f"labels last {1000 * label_period_s:g} ms and frames {1000 * frame_period_s:g} ms: "
            "a frame must last as long as a label or a whole number of labels"
        )
    taken = labels[::finer]
    if abs(len(taken) - num_frames) > 1:
        every = "" if finer == 1 else f", of which one in {finer} is {len(taken)},"
        raise LabelError(
            f"{len(labels)} labels of {1000 * label_period_s:g} ms{every} do not fit {num_frames} frames of "
            f"{1000 * frame_period_s:g} ms: they may differ by one at most"
        )
    aligned = np.full(num_frames, IGNORED_LABEL, dtype=np.int64)
    aligned[: len(taken)] = taken[:num_frames]
    return aligned


def _pack(labels_by_utterance: Iterable[np.ndarray | None], num_clusters: int) -> dict[str, np.ndarray]:
    kind = packed_type(num_clusters)
    pieces, lengths, present = [], [], []
    for i, labels in enumerate(labels_by_utterance):
        present.append(labels is not None)
        labels = np.zeros(0, dtype=kind) if labels is None else np.asarray(labels)
        if labels.ndim != 1 or (labels.dtype.kind not in "iu" and labels.size):
            raise LabelError(
                f"labels of utterance number {i} are {labels.dtype} of shape {labels.shape}; expected whole numbers"
            )
        if labels.size and (int(labels.min()) < 0 or int(labels.max()) >= num_clusters):
            worst = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
            raise LabelError(f"utterance number {i} has the label {worst}; {num_clusters} clusters are 0 to {num_clusters - 1}")
        pieces.append(labels.astype(kind))
        lengths.append(len(labels))
    return {
        "labels": np.concatenate([np.zeros(0, dtype=kind), *pieces]),
        "offsets": np.concatenate([[0], np.cumsum(np.array(lengths, dtype=np.int64))]).astype("<i8"),
        "present": np.array(present, dtype="u1"),
    }


def _map_columns(path: Path) -> dict[str, np.ndarray]:
    """Memory-maps the three columns; a safetensors file is a length, a JSON header and the raw values."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(header_bytes, 1 << 20)))
    columns: dict[str, np.ndarray] = {}
    for name, kinds in {"labels": PACKED_TYPES, **COLUMN_TYPES}.items():
        start, stop = header[name]["data_offsets"]
        raw = np.zeros(0, dtype="u1")  # nothing can be mapped where there is nothing
        if stop > start:
            raw = np.asarray(np.memmap(path, dtype="u1", mode="r", offset=8 + header_bytes + start, shape=(stop - start,)))
        columns[name] = raw.view(kinds[header[name]["dtype"]])
    return columns


class LabelStore:
    """Read access to a label folder; see :meth:`open`. Labels are memory-mapped.

    Attributes:
        folder: Where it is.
        name: The folder's name.
        frame_period_s: Seconds from one label to the next.
        num_clusters: K; labels are 0 to K - 1.
        num_labels: Labels of all utterances together.
        corpus_digest: Digest of the corpus they belong to.
        origin: Where they come from, plain JSON values.
        quality: Measures of them, plain JSON values.
    """

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.folder, self.name = folder, folder.name
        self.frame_period_s: float = float(description["frame_period_s"])
        self.num_clusters: int = int(description["num_clusters"])
        self.num_labels: int = int(description["num_labels"])
        self.corpus_digest: str = description["corpus_digest"]
        self.origin: dict[str, Any] = description["origin"]
        self.quality: dict[str, Any] = description["quality"]
        self._num_utterances: int = int(description["num_utterances"])

    @classmethod
    def write(
        cls,
        folder: str | Path,
        labels_by_utterance: Sequence[np.ndarray | None] | Iterable[np.ndarray | None],
        *,
        frame_period_s: float,
        num_clusters: int,
        corpus_digest: str,
        origin: dict[str, Any],
        quality: dict[str, Any],
        codebook: Mapping[str, Tensor] | None = None,
    ) -> LabelStore:
        """Writes a label folder, whole or not at all; one of that name is replaced.

        Args:
            folder: Usually ``CORPUS/labels/NAME``.
            labels_by_utterance: (T,) whole numbers for each utterance of the corpus, in its order; None where it has none.
            frame_period_s: Seconds from one label to the next.
            num_clusters: K.
            corpus_digest: ``Corpus.digest``.
            origin: Where they come from, plain JSON values.
            quality: Measures, plain JSON values.
            codebook: ``centroids`` (K, F) and what else is needed to label other speech alike, if they come from clustering.

        Raises:
            LabelError: A label is not in 0 to K - 1.
        """
        import torch

        if not frame_period_s > 0:
            raise LabelError(f"frame_period_s is {frame_period_s}; it must be above zero")
        tensors = _pack(labels_by_utterance, num_clusters)
        description = {
            "format_version": FORMAT_VERSION,
            "frame_period_s": float(frame_period_s),
            "num_clusters": num_clusters,
            "num_utterances": len(tensors["present"]),
            "num_labels": len(tensors["labels"]),
            "corpus_digest": corpus_digest,
            "origin": origin,
            "quality": quality,
        }
        with atomic_folder(folder) as temporary:
            write_json(temporary / DESCRIPTION, description)
            save_tensors(temporary / LABELS, {name: torch.from_numpy(values) for name, values in tensors.items()})
            if codebook is not None:
                save_tensors(temporary / CODEBOOK, codebook)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path) -> LabelStore:
        """Opens a label folder.

        Raises:
            LabelError: It is none, is of a newer format, or contradicts itself.
            sslim.storage.TornFolderError: A file is missing, cut short or altered.
        """
        folder = Path(folder)
        if not (folder / DESCRIPTION).is_file():
            raise LabelError(f"{folder} holds no labels: it has no {DESCRIPTION}")
        size = (folder / LABELS).stat().st_size if (folder / LABELS).is_file() else 0
        if size <= CHECKED_BYTES:
            check_folder(folder)
        elif not (folder / DIGESTS).is_file():
            raise TornFolderError(f"{folder} has no {DIGESTS}: it was not written completely")
        description = read_json(folder / DESCRIPTION)
        version = description.get("format_version") if isinstance(description, dict) else None
        if version != FORMAT_VERSION:
            raise LabelError(f"{folder / DESCRIPTION} has format version {version!r}, this sslim reads {FORMAT_VERSION}")
        for key in sorted(set(description) ^ set(KEYS)):
            raise LabelError(
                f"{folder / DESCRIPTION} {'has the unknown key' if key in description else 'lacks the key'} {key!r}"
            )
        store = cls(folder, description)
        store._check()
        return store

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        path = self.folder / LABELS
        try:
            return _map_columns(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LabelError(f"{path} is not a readable label file ({error})") from error

    def _check(self) -> None:
        labels, offsets, present = (self._columns[name] for name in ("labels", "offsets", "present"))
        sizes = (len(labels), len(offsets), len(present))
        if sizes != (self.num_labels, self._num_utterances + 1, self._num_utterances):
            raise LabelError(f"{self.folder / LABELS} has columns of {sizes} values, which contradicts {DESCRIPTION}")
        if offsets[0] != 0 or offsets[-1] != len(labels) or (np.diff(offsets) < 0).any():
            raise LabelError(f"{self.folder / LABELS}: the offsets of the utterances do not ascend from 0 to {len(labels)}")
        if labels.dtype != packed_type(self.num_clusters):
            raise LabelError(
                f"{self.folder / LABELS} is packed as {labels.dtype}, {self.num_clusters} clusters need another type"
            )

    def __len__(self) -> int:
        return self._num_utterances

    def __repr__(self) -> str:
        return f"LabelStore({str(self.folder)!r}, {len(self)} utterances, {self.num_clusters} clusters)"

    def has(self, i: int) -> bool:
        """Whether utterance ``i`` has labels."""
        if not 0 <= i < len(self):
            raise IndexError(f"labels {self.name} are for utterances 0 to {len(self) - 1}, not {i}")
        return bool(self._columns["present"][i])

    def get(self, i: int) -> np.ndarray:
        """Returns the labels of utterance ``i``: (T,) int64.

        Raises:
            LabelError: It has none.
        """
        if not self.has(i):
            raise LabelError(f"labels {self.name} have none for utterance number {i}")
        offsets = self._columns["offsets"]
        return self._columns["labels"][int(offsets[i]) : int(offsets[i + 1])].astype(np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64 number of labels of each utterance; 0 where it has none."""
        return np.diff(self._columns["offsets"])

    @property
    def packed(self) -> np.ndarray:
        """All labels in the order of the utterances, memory-mapped: (num_labels,) uint8, uint16 or int32."""
        return self._columns["labels"]

    def counts(self) -> np.ndarray:
        """Returns how often each cluster occurs: (K,) int64."""
        counts = np.zeros(self.num_clusters, dtype=np.int64)
        for start in range(0, self.num_labels, 1 << 24):  # bincount makes an int64 copy of what it counts
            counts += np.bincount(self.packed[start : start + (1 << 24)], minlength=self.num_clusters)
        return counts

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the list of digests: tells a label set from another."""
        return file_digest(self.folder / DIGESTS)

    def codebook(self) -> dict[str, Tensor]:
        """Returns ``centroids`` (K, F) float32 and whatever is stored beside them.

        Raises:
            LabelError: The labels come from no codebook.
        """
        if not (self.folder / CODEBOOK).is_file():
            raise LabelError(f"labels {self.name} have no codebook: they were not made by `sslim cluster`")
        tensors = load_tensors(self.folder / CODEBOOK)
        centroids = tensors.get("centroids")
        if centroids is None or centroids.dim() != 2 or len(centroids) != self.num_clusters:
            raise LabelError(f"{self.folder / CODEBOOK} does not hold {self.num_clusters} centroids")
        return tensors

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_columns"}  # a worker maps them itself
