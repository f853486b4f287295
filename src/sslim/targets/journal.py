"""The work folder of a clustering: what is needed to go on after being killed at any moment.

========================  =======================================================================================
``job.json``              everything that decides the result; another job does not continue this one
``progress.json``         stage, batches of it that are done, committed sizes
``frames.bin``            the sample, float32 (n, F), removed once the codebook is there
``kmeans.safetensors``    state of k-means
``labels.bin``            packed labels in the order of the batches
``rows.bin``              for each utterance labelled: number, labels (int64), inertia (float64)
========================  =======================================================================================

Files are synced before ``progress.json`` is replaced; what lies beyond the sizes stated there is cut off.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sslim.config import dump_json, read_json
from sslim.storage import sync, write_json
from sslim.targets.kmeans import KMeansState

JOB, PROGRESS, FRAMES, KMEANS = "job.json", "progress.json", "frames.bin", "kmeans.safetensors"
LABELS, ROWS = "labels.bin", "rows.bin"
ROW_TYPE = np.dtype([("utterance", "<i8"), ("num_labels", "<i8"), ("inertia", "<f8")])
COMMIT_PERIOD_S = 10.0  # at most this much work is lost when the process is killed
STAGES = ("sample", "fit", "label")


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[Path]:
    """Makes the folder and keeps a second process out of it; the lock disappears with the process, however it ends.

    Raises:
        ValueError: Another process is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    except BlockingIOError as error:
        raise ValueError(f"another process is writing {folder}: wait for it") from error
    finally:
        os.close(descriptor)


class Journal:
    """How far the work is.

    Args:
        folder: The work folder, locked with :func:`only_one`. What another job left there is removed.
        job: Everything that decides the result, plain JSON values.
        commit_period_s: Seconds between the points from which killed work continues.

    Attributes:
        stage: Stage that is being worked at.
        batch: Batches of it that are done.
        continued: Whether there was anything to continue.
    """

    def __init__(self, folder: Path, job: dict[str, Any], commit_period_s: float = COMMIT_PERIOD_S) -> None:
        self.folder, self.commit_period_s = folder, commit_period_s
        self.stage, self.batch = STAGES[0], 0
        self._label_bytes = self._row_bytes = 0
        self.continued = (folder / PROGRESS).is_file() and (folder / JOB).read_text(encoding="utf-8") == dump_json(job)
        if self.continued:
            progress = read_json(folder / PROGRESS)
            self.stage, self.batch = progress["stage"], progress["batch"]
            self._label_bytes, self._row_bytes = progress["label_bytes"], progress["row_bytes"]
        else:
            for path in folder.iterdir():
                path.unlink()
            write_json(folder / JOB, job)
        self._committed = time.monotonic()

    def commit(self, *paths: Path) -> None:
        """Makes everything up to now survive, after syncing the files that were written."""
        for path in paths:
            sync(path)
        progress = {"stage": self.stage, "batch": self.batch, "label_bytes": self._label_bytes, "row_bytes": self._row_bytes}
        write_json(self.folder / PROGRESS, progress)
        self._committed = time.monotonic()

    def is_due(self) -> bool:
        """Whether the last commit was long enough ago."""
        return time.monotonic() - self._committed >= self.commit_period_s

    def enter(self, stage: str) -> None:
        """Begins the next stage."""
        self.stage, self.batch = stage, 0
        self.commit()

    def sample(self, num_frames: int, dim: int) -> np.memmap:
        """Maps the file of the sample for reading and writing: (n, F) float32."""
        path = self.folder / FRAMES
        mode = "r+" if path.is_file() and path.stat().st_size == num_frames * dim * 4 else "w+"
        return np.memmap(path, dtype="<f4", mode=mode, shape=(num_frames, dim))  # type: ignore[call-overload]

    def drop_sample(self) -> None:
        (self.folder / FRAMES).unlink(missing_ok=True)

    def kmeans_state(self, device: str) -> KMeansState | None:
        """Reads the state of k-means, if there is one."""
        path = self.folder / KMEANS
        return KMeansState.load(path, device) if path.is_file() else None

    def save_kmeans(self, state: KMeansState) -> None:
        state.save(self.folder / KMEANS)
        self._committed = time.monotonic()

    @contextlib.contextmanager
    def label_files(self, kind: np.dtype[Any]) -> Iterator[LabelFiles]:
        """Opens the files of labels where the last commit left them."""
        with (self.folder / LABELS).open("ab") as labels, (self.folder / ROWS).open("ab") as rows:
            labels.truncate(self._label_bytes)
            rows.truncate(self._row_bytes)
            yield LabelFiles(self, labels, rows, kind)

    def add_bytes(self, labels: int, rows: int) -> None:
        self._label_bytes += labels
        self._row_bytes += rows

    def remove(self) -> None:
        shutil.rmtree(self.folder)


class LabelFiles:
    """Appends labels of utterances in any order; made by :meth:`Journal.label_files`."""

    def __init__(self, journal: Journal, labels: Any, rows: Any, kind: np.dtype[Any]) -> None:
        self._journal, self._labels, self._rows, self._kind = journal, labels, rows, kind

    def add(self, utterance: int, labels_T: np.ndarray, inertia: float) -> None:
        packed = labels_T.astype(self._kind).tobytes()
        self._labels.write(packed)
        self._rows.write(np.array([(utterance, len(labels_T), inertia)], dtype=ROW_TYPE).tobytes())
        self._journal.add_bytes(len(packed), ROW_TYPE.itemsize)

    def commit(self) -> None:
        for file in (self._labels, self._rows):
            file.flush()
        self._journal.commit(Path(self._labels.name), Path(self._rows.name))


class WorkLabels:
    """Reads what :class:`LabelFiles` wrote, by utterance.

    Attributes:
        inertia: Sum over all utterances, added in their order.
    """

    def __init__(self, folder: Path, kind: np.dtype[Any], num_utterances: int) -> None:
        rows = np.fromfile(folder / ROWS, dtype=ROW_TYPE)
        size = (folder / LABELS).stat().st_size
        self._packed = np.memmap(folder / LABELS, dtype=kind, mode="r") if size else np.zeros(0, dtype=kind)
        offsets = np.concatenate([[0], np.cumsum(rows["num_labels"])])
        self._start = np.full(num_utterances, -1, dtype=np.int64)
        self._stop = np.full(num_utterances, -1, dtype=np.int64)
        self._start[rows["utterance"]], self._stop[rows["utterance"]] = offsets[:-1], offsets[1:]
        assert len(rows) == num_utterances == len(np.unique(rows["utterance"])), "every utterance is labelled once"
        assert offsets[-1] == len(self._packed)
        self.inertia = float(np.sum(rows["inertia"][np.argsort(rows["utterance"], kind="stable")]))

    def get(self, i: int) -> np.ndarray:
        return np.asarray(self._packed[self._start[i] : self._stop[i]])
