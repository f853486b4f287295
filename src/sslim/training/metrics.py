"""Metrics: sums over a window of steps, and the log they are written to."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslim.training.distributed import Processes

WALL_CLOCK_FIELDS = ("audio_seconds_per_second", "data_wait_share", "step_s", "elapsed_s")
"""Fields of train records that differ between two runs of the same command; all others are equal bit for bit on a CPU."""


class Sums:
    """Sums and counts by name; kept on the device in float64, so that adding costs no waiting.

    Args:
        device: Where the values come from.
        plain: What ``plain()`` gave earlier.
    """

    def __init__(self, device: torch.device, plain: Mapping[str, list[float]] | None = None) -> None:
        self.device = device
        self._sums = {name: torch.tensor(v, dtype=torch.float64, device=device) for name, v in (plain or {}).items()}

    def add(self, values: Mapping[str, tuple[Tensor | float, Tensor | float]]) -> None:
        """Adds (sum, count) pairs."""
        for name, pair in values.items():
            both = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device).detach() for v in pair])
            self._sums[name] = self._sums[name] + both if name in self._sums else both

    def merge(self, other: Sums) -> None:
        """Adds another's sums to these."""
        self.add({name: (both[0], both[1]) for name, both in other._sums.items()})

    def plain(self) -> dict[str, list[float]]:
        """Returns name to [sum, count] as Python floats; their JSON text gives the same values back."""
        if not self._sums:
            return {}
        rows = torch.stack(list(self._sums.values())).tolist()
        return dict(zip(self._sums, rows, strict=True))

    def gathered(self, processes: Processes) -> dict[str, list[float]]:
        """Returns the sums over all processes, in every process."""
        total: dict[str, list[float]] = {}
        for part in processes.gather(self.plain()):
            for name, (value, count) in part.items():
                before = total.get(name, [0.0, 0.0])
                total[name] = [before[0] + value, before[1] + count]
        return total


def means(sums: Mapping[str, list[float]]) -> dict[str, float | None]:
    """Returns sum / count by name; None where nothing was counted or the mean is not finite (JSON has no NaN)."""
    result: dict[str, float | None] = {}
    for name, (value, count) in sums.items():
        mean = value / count if count else math.nan
        result[name] = mean if math.isfinite(mean) else None
    return result


class Stopwatch:
    """Wall-clock figures of the steps since the last record.

    Attributes:
        audio_s: Seconds of audio this process has trained on.
        steps: Steps done.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Starts anew."""
        self._began, self._waited_s, self.audio_s, self.steps = time.perf_counter(), 0.0, 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what happens inside as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what happens inside: validation and saving are no part of a step."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def figures(self, processes: Processes) -> dict[str, float]:
        """Returns the wall-clock fields of a train record and starts anew."""
        took_s = max(time.perf_counter() - self._began, 1e-9)
        audio_s = sum(processes.gather(self.audio_s))
        figures = {
            "audio_seconds_per_second": round(audio_s / took_s, 2),
            "data_wait_share": round(self._waited_s / took_s, 4),
            "step_s": round(took_s / max(self.steps, 1), 6),
        }
        self.restart()
        return figures


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line with ``step`` and ``kind`` (``train``, ``valid``, ``event``).

    Args:
        path: The file; None (other processes) writes nothing.
        position: Bytes of it that count; what a killed run wrote after its last checkpoint is cut off. None keeps all.
        tensorboard: Folder for TensorBoard events.
        step: Step that the run starts from, so that TensorBoard drops what comes again.

    Raises:
        ValueError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self, path: Path | None, *, position: int | None = None, tensorboard: Path | None = None, step: int = 0
    ) -> None:
        self._file = None if path is None else path.open("a", encoding="utf-8")
        self._writer: Any = None
        if self._file is not None and position is not None and position < self._file.seek(0, os.SEEK_END):
            self._file.truncate(position)
            self._file.seek(0, os.SEEK_END)
        if tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError("tensorboard = True needs the tensorboard package: pip install 'sslim[track]'") from error
            self._writer = SummaryWriter(str(tensorboard), purge_step=step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds a line; it is in the file when this returns."""
        if self._file is None:
            return
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def position(self) -> int:
        """Forces the lines to disk and returns the file's size in bytes."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Reads ``metrics.jsonl``; a last line that is cut short (the run was killed while writing it) is left out.

    Args:
        path: The file, or the run's folder.
        kind: Only records of this kind.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    lines = path.read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines[:-1]]
    return [record for record in records if kind is None or record["kind"] == kind]
