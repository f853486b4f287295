"""A corpus folder: what ``sslim prepare`` writes and everything else reads.

========================  =======================================================================================
``corpus.json``           format version, name, front-end, counts, where it comes from; its SHA-256 is the corpus's digest
``manifest.jsonl``        one utterance per line
``index.safetensors``     columns: num_frames, num_samples, shard, row (the first), offset (of the manifest's lines and end)
``features/``             float16 shards of raw base features (before deltas, normalisation and stacking)
``statistics.safetensors``  mean, std (after deltas), count
``quarantine.jsonl``      utterances that could not be read: id, path, reason
``labels/NAME/``          frame targets
========================  =======================================================================================

Opening reads the index only, so that 200,000 utterances open in milliseconds; manifest lines are read when asked for.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sslim.config import from_plain, nearest, read_json
from sslim.data.sources import Segment
from sslim.data.store import FeatureStore
from sslim.frontends.config import SpectralFrontendConfig

if TYPE_CHECKING:
    from sslim.data.labels import LabelStore

FORMAT_VERSION = 1
DESCRIPTION, MANIFEST, INDEX, FEATURES = "corpus.json", "manifest.jsonl", "index.safetensors", "features"
STATISTICS, QUARANTINE, LABELS = "statistics.safetensors", "quarantine.jsonl", "labels"
PREPARATION = "preparation.json"  # the journal; present only while a corpus is unfinished
COLUMNS = ("speaker", "label", "text", "split")
WAVEFORM_SAMPLE_RATE = 16000  # of corpora without features


class CorpusError(ValueError):
    """A folder that is not a whole corpus; the message is one sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One utterance of a corpus.

    Attributes:
        id: Unique name.
        index: Its place in the corpus.
        audio: File with its sound; None when only features exist.
        start_s: Where it starts in that file.
        duration_s: Its length.
        speaker: Speaker's name.
        label: Class of the whole utterance.
        text: Transcript.
        split: For example train, dev, test.
        alignment: Symbols with their times.
        misaligned: Why there is none although a file has one; None otherwise.
    """

    id: str
    index: int
    audio: Path | None
    start_s: float
    duration_s: float
    speaker: str | None = None
    label: str | None = None
    text: str | None = None
    split: str | None = None
    alignment: tuple[Segment, ...] | None = None
    misaligned: str | None = None


class Corpus:
    """Read access to a corpus folder; see :meth:`open`.

    Attributes:
        path: The folder.
        name: Short name.
        description: Everything in ``corpus.json``.
        frontend_config: Description of the stored features; None when there are none.
        num_frames: (N,) int64 base frames of each utterance.
        num_samples: (N,) int64 samples at the front-end's rate.
        sample_rate: That rate in Hz.
        base_dim: Width of the stored features; 0 without features.
        base_frame_shift_s: Seconds from one stored frame to the next.
    """

    def __init__(self, path: Path, description: dict[str, Any], index: dict[str, np.ndarray]) -> None:
        self.path, self.description = path, description
        self.name: str = description["name"]
        plain = description["frontend"]
        self.frontend_config = None if plain is None else from_plain(SpectralFrontendConfig, plain, str(path / DESCRIPTION))
        self.sample_rate: int = description["sample_rate"]
        self.base_dim: int = description["base_dim"]
        self.base_frame_shift_s: float = description["base_frame_shift_s"]
        self.num_frames = index["num_frames"].astype(np.int64)
        self.num_samples = index["num_samples"].astype(np.int64)
        self._shard, self._row, self._offset = index["shard"], index["row"], index["offset"]
        self._store = FeatureStore(path / FEATURES, self.base_dim)
        self._columns: dict[str, list[str | None]] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """Opens a corpus without reading its manifest or its features.

        Raises:
            CorpusError: The folder is not a corpus, is unfinished, or a part of it is missing.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        folder = Path(folder)
        if (folder / PREPARATION).exists():
            raise CorpusError(f"{folder} is not finished: run the same `sslim prepare` again, it continues where it stopped")
        if not (folder / DESCRIPTION).is_file():
            raise CorpusError(f"{folder} is not a corpus: it has no {DESCRIPTION}; `sslim prepare SOURCE {folder}` makes one")
        description = read_json(folder / DESCRIPTION)
        version = description.get("format_version") if isinstance(description, dict) else None
        if version != FORMAT_VERSION:
            raise CorpusError(f"{folder / DESCRIPTION} has format version {version!r}, this sslim reads {FORMAT_VERSION}")
        try:
            index = load_file(folder / INDEX)
            corpus = cls(folder, description, index)
        except (OSError, SafetensorError, KeyError) as error:
            raise CorpusError(
                f"{folder} is incomplete: {INDEX} or a value in {DESCRIPTION} cannot be read ({error})"
            ) from error
        corpus._check()
        return corpus

    def _check(self) -> None:
        """Sizes only: a torn copy is found without reading data."""
        if len(self) != self.description["num_utterances"]:
            raise CorpusError(
                f"{self.path}: {INDEX} has {len(self)} utterances, {self.description['num_utterances']} are expected"
            )
        manifest = self.path / MANIFEST
        size = manifest.stat().st_size if manifest.is_file() else 0
        if size != int(self._offset[-1]):
            raise CorpusError(
                f"{manifest} has {size} bytes instead of {int(self._offset[-1])}: the corpus is incomplete or altered"
            )
        if self.base_dim:
            rows = np.bincount(self._shard, weights=self.num_frames) if len(self) else np.zeros(0)
            self._store.check_sizes(rows.astype(np.int64))

    def __len__(self) -> int:
        return len(self.num_frames)

    def __repr__(self) -> str:
        return f"Corpus({str(self.path)!r}, {len(self)} utterances)"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of ``corpus.json``, which holds those of the manifest and the index: tells a corpus from another."""
        return hashlib.sha256((self.path / DESCRIPTION).read_bytes()).hexdigest()

    def duration_s(self, indices: Sequence[int] | np.ndarray | None = None) -> float:
        """Returns the seconds of speech in the given utterances, or in all."""
        samples = self.num_samples if indices is None else self.num_samples[np.asarray(indices, dtype=np.int64)]
        return float(samples.sum()) / self.sample_rate

    # ---- manifest ----------------------------------------------------------------------------------------------------

    @cached_property
    def _manifest(self) -> mmap.mmap:
        descriptor = os.open(self.path / MANIFEST, os.O_RDONLY)
        try:
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)

    def _record(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"corpus {self.name} has utterances 0 to {len(self) - 1}, not {i}")
        return json.loads(self._manifest[int(self._offset[i]) : int(self._offset[i + 1])])

    def utterance(self, i: int) -> Utterance:
        """Returns utterance ``i`` (0-based); reads one line of the manifest."""
        record = self._record(i)
        alignment = record.get("alignment")
        return Utterance(
            id=record["id"],
            index=i,
            audio=None if record.get("audio") is None else self.path / record["audio"],
            start_s=record.get("start_s", 0.0),
            duration_s=float(self.num_samples[i]) / self.sample_rate,
            **{name: record.get(name) for name in COLUMNS},
            alignment=None if alignment is None else tuple(Segment(symbol=s, start_s=a, end_s=b) for s, a, b in alignment),
            misaligned=record.get("misaligned"),
        )

    def _read_columns(self) -> None:
        names = ("id", *COLUMNS)
        columns: dict[str, list[str | None]] = {name: [] for name in names}
        with (self.path / MANIFEST).open("rb") as file:
            for line in file:
                record = json.loads(line)
                for name in names:
                    columns[name].append(record.get(name))
        self._columns = columns

    def ids(self) -> list[str]:
        """Returns all ids in order; reads the whole manifest once."""
        return [str(name) for name in self._column("id")]

    def column(self, name: str) -> list[str | None]:
        """Returns ``speaker``, ``label``, ``text`` or ``split`` of all utterances; reads the whole manifest once.

        Raises:
            ValueError: There is no such column.
        """
        if name not in COLUMNS:
            raise ValueError(f"a corpus has no column {name!r}{nearest(name, COLUMNS)}; its columns are {', '.join(COLUMNS)}")
        return self._column(name)

    def _column(self, name: str) -> list[str | None]:
        if not self._columns:
            self._read_columns()
        return list(self._columns[name])

    # ---- features and audio ------------------------------------------------------------------------------------------

    def features(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns base features of utterance ``i`` as a memory-mapped (T, F) float16 view, without copying.

        Args:
            i: Which utterance.
            start: First base frame.
            stop: End (exclusive); None or beyond the end for all.

        Raises:
            ValueError: The corpus has no features.
        """
        if not self.base_dim:
            raise ValueError(
                f"corpus {self.name} was prepared without features; `sslim prepare --features melhubert` stores them"
            )
        first, num_frames = int(self._row[i]), int(self.num_frames[i])
        stop = num_frames if stop is None else min(stop, num_frames)
        return self._store.rows(int(self._shard[i]), first + start, first + max(start, stop))

    def waveform(self, i: int) -> np.ndarray:
        """Returns the sound of utterance ``i``: (S,) float32 at ``sample_rate``.

        Raises:
            ValueError: There is no audio or it cannot be read.
        """
        from sslim.audio import read_audio

        record = self._record(i)
        if record.get("audio") is None:
            raise ValueError(f"utterance {record['id']} of corpus {self.name} has features only, no audio")
        return read_audio(
            self.path / record["audio"],
            sample_rate=self.sample_rate,
            start_s=record.get("start_s", 0.0),
            duration_s=record.get("duration_s"),
        )

    @cached_property
    def statistics(self) -> tuple[np.ndarray, np.ndarray, str] | None:
        """Mean and standard deviation of the features after deltas, float32, and where they come from."""
        from safetensors.numpy import load_file

        if self.description["statistics"] is None:
            return None
        tensors = load_file(self.path / STATISTICS)
        return tensors["mean"].astype(np.float32), tensors["std"].astype(np.float32), self.description["statistics"]

    # ---- labels and quarantine ---------------------------------------------------------------------------------------

    def label_names(self) -> list[str]:
        """Returns the names of the label sets."""
        folder = self.path / LABELS
        return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")) if folder.is_dir() else []

    def labels(self, name: str) -> LabelStore:
        """Opens a label set.

        Raises:
            ValueError: There is none of that name.
        """
        from sslim.data.labels import LabelStore

        names = self.label_names()
        if name not in names:
            known = f"it has {', '.join(names)}" if names else "it has none; `sslim cluster` makes one"
            raise ValueError(f"corpus {self.name} has no labels {name!r}{nearest(name, names)}; {known}")
        return LabelStore.open(self.path / LABELS / name)

    @property
    def num_quarantined(self) -> int:
        """Utterances that could not be read when the corpus was prepared."""
        return int(self.description["num_quarantined"])

    def quarantine(self) -> list[dict[str, str]]:
        """Returns the utterances that could not be read: id, path and reason."""
        with (self.path / QUARANTINE).open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_manifest"}  # a worker maps it itself
