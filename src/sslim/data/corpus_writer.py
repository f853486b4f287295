"""Writing a corpus folder so that an interrupted preparation continues where it stopped.

Utterances are appended to shards, manifest, index and quarantine. From time to time everything is synced and the journal
(``preparation.json``) replaced by one that states how far each file is whole; whatever lies beyond is cut off when the
preparation continues. Nothing that is written depends on when that happened, so an interrupted preparation gives the same bytes
as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from sslim.config import read_json
from sslim.data import corpus as layout
from sslim.data.sources import SourceUtterance
from sslim.data.store import SHARD_BYTES, ShardWriter
from sslim.storage import file_digest, sync, write_json

PARTIAL_INDEX = "index.partial"  # rows of PARTIAL_COLUMNS, little-endian int64
PARTIAL_COLUMNS = ("num_frames", "num_samples", "shard", "row", "manifest_bytes")
INDEX_TYPES = {"num_frames": np.int32, "num_samples": np.int64, "shard": np.int32, "row": np.int64, "offset": np.int64}


@dataclass(kw_only=True)
class Progress:
    """How far a preparation is; what ``preparation.json`` holds beside the signature.

    Attributes:
        num_seen: Utterances taken from the source, quarantined ones included.
        num_kept: Utterances written.
        num_quarantined: Utterances that could not be read.
        num_samples: Samples of those written.
        ids_sha256: Digest of the ids seen, in order.
        shard: Shard being written.
        shard_bytes: Its size.
        manifest_bytes: Size of the manifest.
        quarantine_bytes: Size of the quarantine list.
        statistics: State of the running statistics.
    """

    num_seen: int = 0
    num_kept: int = 0
    num_quarantined: int = 0
    num_samples: int = 0
    ids_sha256: str = hashlib.sha256().hexdigest()
    shard: int = 0
    shard_bytes: int = 0
    manifest_bytes: int = 0
    quarantine_bytes: int = 0
    statistics: dict[str, Any] | None = None


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keeps a second preparation out of a folder; the lock disappears with the process, however it ends.

    Raises:
        ValueError: Another process is preparing the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ValueError(f"{folder} is being prepared by another process: wait for it") from error
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def begun(folder: Path, signature: Mapping[str, Any]) -> Iterator[None]:
    """Begins a preparation before anything else is in the folder, such as generated audio, unless it is begun.

    What fails before there is anything else, because something is wrong with the source, leaves the folder as it was.

    Args:
        folder: The corpus.
        signature: What decides the result.
    """
    begins = not (folder / layout.PREPARATION).exists()
    if begins:
        CorpusWriter.begin(folder, dict(signature))
    try:
        yield
    except Exception:
        if begins and [path.name for path in folder.iterdir()] == [layout.PREPARATION]:
            (folder / layout.PREPARATION).unlink()
        raise


def chain_id(digest: str, utterance_id: str) -> str:
    """Returns the digest of a sequence of ids that is longer by one."""
    return hashlib.sha256(f"{digest} {utterance_id}".encode(errors="surrogateescape")).hexdigest()


def json_line(record: dict[str, Any]) -> bytes:
    """Returns a record as one line of JSON in UTF-8; only a file name that is no UTF-8 is written in escapes."""
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(record) + "\n").encode()


class CorpusWriter:
    """Appends utterances to an unfinished corpus folder.

    Args:
        folder: The corpus; :meth:`begin` made its journal.
        dim: Width of the features; 0 for none.
        shard_bytes: Size at which a shard is closed.
    """

    def __init__(self, folder: Path, *, dim: int, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.dim = folder, dim
        journal = read_json(folder / layout.PREPARATION)
        self.signature: dict[str, Any] = journal["signature"]
        self.progress = Progress(**journal["progress"])
        features = folder / layout.FEATURES
        features.mkdir(exist_ok=True)
        state = self.progress
        self._shards = (
            ShardWriter(features, dim, shard=state.shard, num_bytes=state.shard_bytes, shard_bytes=shard_bytes) if dim else None
        )
        self._manifest = self._continue(layout.MANIFEST, state.manifest_bytes)
        self._index = self._continue(PARTIAL_INDEX, state.num_kept * len(PARTIAL_COLUMNS) * 8)
        self._quarantine = self._continue(layout.QUARANTINE, state.quarantine_bytes)
        for directory in (features, folder):
            sync(directory)

    @staticmethod
    def begin(folder: Path, signature: dict[str, Any]) -> None:
        """Writes the journal of a preparation that has done nothing yet.

        Args:
            folder: The corpus; must exist.
            signature: Everything that decides the outcome (sources, options), plain JSON values.
        """
        write_json(folder / layout.PREPARATION, {"signature": signature, "progress": asdict(Progress())})

    def _continue(self, name: str, num_bytes: int) -> IO[bytes]:
        file = (self.folder / name).open("ab")
        if file.tell() < num_bytes:
            raise ValueError(
                f"{file.name} has {file.tell()} bytes, {num_bytes} were committed: delete {self.folder} and start again"
            )
        file.truncate(num_bytes)
        return file

    def add(self, utterance: SourceUtterance, features_TF: np.ndarray | None, *, num_frames: int, num_samples: int) -> None:
        """Appends an utterance with its float16 features (None without features)."""
        shard, row = (0, 0) if self._shards is None or features_TF is None else self._shards.append(features_TF)
        line = json_line(self._manifest_record(utterance))
        self._manifest.write(line)
        self._index.write(np.array([num_frames, num_samples, shard, row, len(line)], dtype="<i8").tobytes())
        self.progress.num_kept += 1
        self.progress.num_samples += num_samples
        self.progress.manifest_bytes += len(line)
        self._seen(utterance)

    def quarantine(self, utterance: SourceUtterance, reason: str) -> None:
        """Puts an utterance that cannot be used on the list."""
        line = json_line({"id": utterance.id, "path": str(utterance.audio or utterance.id), "reason": reason})
        self._quarantine.write(line)
        self.progress.num_quarantined += 1
        self.progress.quarantine_bytes += len(line)
        self._seen(utterance)

    def first_quarantined(self, count: int) -> list[dict[str, str]]:
        """Returns the first committed entries of the quarantine list."""
        with (self.folder / layout.QUARANTINE).open(encoding="utf-8") as file:
            return [json.loads(line) for line in islice(file, count)]

    def _seen(self, utterance: SourceUtterance) -> None:
        self.progress.num_seen += 1
        self.progress.ids_sha256 = chain_id(self.progress.ids_sha256, utterance.id)

    def _manifest_record(self, utterance: SourceUtterance) -> dict[str, Any]:
        audio = utterance.audio
        if audio is not None and audio.is_relative_to(self.folder):  # a corpus with its own audio can be moved
            audio = audio.relative_to(self.folder)
        record = {
            "id": utterance.id,
            "audio": None if audio is None else audio.as_posix(),
            "start_s": utterance.start_s or None,
            "duration_s": utterance.duration_s,
            **{name: getattr(utterance, name) for name in layout.COLUMNS},
            "alignment": None
            if utterance.alignment is None
            else [[segment.symbol, segment.start_s, segment.end_s] for segment in utterance.alignment],
            "misaligned": utterance.misaligned,
        }
        return {key: value for key, value in record.items() if value is not None}

    def commit(self, statistics: dict[str, Any] | None) -> None:
        """Makes everything added so far survive a crash."""
        for file in (self._manifest, self._index, self._quarantine):
            file.flush()
            os.fsync(file.fileno())
        if self._shards is not None:
            self._shards.sync()
            self.progress.shard, self.progress.shard_bytes = self._shards.shard, self._shards.num_bytes
        self.progress.statistics = statistics
        write_json(self.folder / layout.PREPARATION, {"signature": self.signature, "progress": asdict(self.progress)})

    def close(self) -> None:
        """Closes the files; what was not committed is cut off next time."""
        for file in (self._manifest, self._index, self._quarantine):
            file.close()
        if self._shards is not None:
            self._shards.close()

    def write_index(self) -> dict[str, Any]:
        """Writes ``index.safetensors`` from the committed rows and returns the counts and digests for ``corpus.json``."""
        import torch

        from sslim.storage import atomic_file, save_tensors

        rows = np.fromfile(self.folder / PARTIAL_INDEX, dtype="<i8").reshape(-1, len(PARTIAL_COLUMNS))
        columns = dict(zip(PARTIAL_COLUMNS, rows.T, strict=True))
        columns["offset"] = np.concatenate([[0], np.cumsum(columns.pop("manifest_bytes"))])
        path = self.folder / layout.INDEX
        tensors = {name: torch.from_numpy(columns[name].astype(kind)) for name, kind in INDEX_TYPES.items()}
        with atomic_file(path) as temporary:
            save_tensors(temporary, tensors)
        return {
            "num_utterances": len(rows),
            "num_frames": int(columns["num_frames"].sum()),
            "num_samples": int(columns["num_samples"].sum()),
            "num_quarantined": self.progress.num_quarantined,
            "manifest_sha256": file_digest(self.folder / layout.MANIFEST),
            "index_sha256": file_digest(path),
        }

    def write_description(self, description: dict[str, Any]) -> None:
        """Writes ``corpus.json``; the corpus stays unfinished until :meth:`finish`."""
        for name in (layout.INDEX, layout.FEATURES):
            sync(self.folder / name)
        write_json(self.folder / layout.DESCRIPTION, description)

    def finish(self) -> None:
        """Removes the journal: from now on the folder is a corpus."""
        for path in self.folder.glob(".*.tmp"):  # left by a run that was killed while it wrote a file
            path.unlink()
        (self.folder / layout.PREPARATION).unlink()
        (self.folder / PARTIAL_INDEX).unlink(missing_ok=True)
        sync(self.folder)
