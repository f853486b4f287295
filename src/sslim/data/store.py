"""The feature store: base features of all utterances in a few memory-mapped files.

A shard is raw little-endian float16, (rows, F) without a header; which rows belong to which utterance is in the corpus's index.
An utterance is contiguous in one shard. A shard is closed before an utterance that would take it over ``SHARD_BYTES``, so an
utterance larger than that has a shard of its own. Where shards end depends on the utterances alone, never on interruptions.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

import numpy as np

SHARD_BYTES = 256 * 2**20  # a 960-hour corpus of 40 features has about 100 shards
FLOAT16 = np.dtype("<f2")
FLOAT16_MAX = float(np.finfo(np.float16).max)


class OverflowingFeaturesError(ValueError):
    """Features that float16 cannot hold; every utterance of such a front-end is affected, so preparation stops."""


def shard_path(folder: Path, shard: int) -> Path:
    """Returns the file of a shard."""
    return folder / f"shard-{shard:05d}.bin"


def to_float16(features_TF: np.ndarray) -> np.ndarray:
    """Rounds features to what the store holds.

    Raises:
        OverflowingFeaturesError: A value is larger than float16 can hold.
        ValueError: A value is not finite.
    """
    if not np.isfinite(features_TF).all():
        frame = int(np.flatnonzero(~np.isfinite(features_TF).all(axis=1))[0])
        raise ValueError(f"features are not finite at frame {frame}")
    largest = float(np.abs(features_TF).max(initial=0.0))
    if largest > FLOAT16_MAX:
        raise OverflowingFeaturesError(
            f"features reach {largest:.4g}, which float16 shards cannot hold (at most {FLOAT16_MAX:g}): "
            "use logarithmic features or a smaller waveform_scale"
        )
    return np.ascontiguousarray(features_TF, dtype=FLOAT16)


class ShardWriter:
    """Appends utterances to shards; can go on from any committed place.

    Args:
        folder: Where the shards are; must exist.
        dim: Features per frame F.
        shard: Shard to go on in.
        num_bytes: Its committed size; what lies beyond, and later shards, is cut off.
        shard_bytes: Size at which a shard is closed.
    """

    def __init__(self, folder: Path, dim: int, *, shard: int = 0, num_bytes: int = 0, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.dim, self.shard_bytes = folder, dim, shard_bytes
        self.shard, self.num_bytes = shard, num_bytes
        for path in folder.glob("shard-*.bin"):
            if path.name > shard_path(folder, shard).name:
                path.unlink()
        self._file = self._open()

    def _open(self) -> IO[bytes]:
        file = shard_path(self.folder, self.shard).open("ab")
        if file.tell() < self.num_bytes:
            raise ValueError(f"{file.name} has {file.tell()} bytes, {self.num_bytes} were committed: delete the corpus folder")
        file.truncate(self.num_bytes)
        return file

    def append(self, features_TF: np.ndarray) -> tuple[int, int]:
        """Writes float16 features and returns (shard, first row)."""
        if self.num_bytes and self.num_bytes + features_TF.nbytes > self.shard_bytes:
            self.sync()
            self._file.close()
            self.shard, self.num_bytes = self.shard + 1, 0
            self._file = self._open()
        row = self.num_bytes // (self.dim * FLOAT16.itemsize)
        self._file.write(features_TF.data)
        self.num_bytes += features_TF.nbytes
        return self.shard, row

    def sync(self) -> None:
        """Forces everything written so far to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class FeatureStore:
    """Read access to shards; each is memory-mapped when it is first needed.

    Args:
        folder: Where the shards are.
        dim: Features per frame F.
    """

    def __init__(self, folder: Path, dim: int) -> None:
        self.folder, self.dim = folder, dim
        self._shards: dict[int, np.ndarray] = {}

    def rows(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Returns rows ``start`` to ``stop`` of a shard as a (T, F) float16 view, without copying."""
        mapped = self._shards.get(shard)
        if mapped is None:
            flat = np.memmap(shard_path(self.folder, shard), dtype=FLOAT16, mode="r")
            mapped = self._shards[shard] = np.asarray(flat).reshape(-1, self.dim)
        return mapped[start:stop]

    def check_sizes(self, rows_per_shard: np.ndarray) -> None:
        """Checks that every shard holds exactly the rows that the index gives it.

        Raises:
            ValueError: A shard is missing or has another size.
        """
        for shard, rows in enumerate(rows_per_shard.tolist()):
            path, expected = shard_path(self.folder, shard), rows * self.dim * FLOAT16.itemsize
            actual = path.stat().st_size if path.exists() else 0
            if actual != expected:
                raise ValueError(f"{path} has {actual} bytes instead of {expected}: the corpus is incomplete, prepare it again")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # a worker process maps the files itself
