"""The folder of a run: its description, one writer at a time, checkpoints that are whole.

``run.json`` what is trained and how; ``metrics.jsonl`` the log; ``sessions.jsonl`` one line for each start, with what
differs between starts of the same run (time, machine, versions); ``checkpoints/step-00001000/``; ``model/`` the finished
model.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sslim.config import read_json
from sslim.storage import TornFolderError, atomic_folder, check_folder, sync, write_json
from sslim.training.config import MAY_CHANGE


def _differences(old: Any, new: Any, path: str, may_change: Collection[str]) -> Iterator[tuple[str, Any, Any]]:
    if path in may_change:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        trainer = path.rpartition(".")[2] in ("trainer", "training")
        for key in [*old, *(k for k in new if k not in old)]:
            if not (trainer and key in MAY_CHANGE):
                yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key, may_change)
    elif old != new:
        yield path, old, new


def find_checkpoint(folder: str | Path) -> Path:
    """Returns ``folder`` if it is a checkpoint, or the newest whole checkpoint of the run that it holds.

    Raises:
        ValueError: It is neither.
    """
    folder = Path(folder)
    if not (folder / "checkpoints").is_dir():
        check_folder(folder)
        return folder
    newest = RunFolder(folder).newest_checkpoint(warn=lambda sentence: None)
    if newest is None:
        raise ValueError(f"the run in {folder} has no whole checkpoint yet")
    return newest


class RunFolder:
    """Paths and bookkeeping of one run. Only the main process writes.

    Args:
        path: The folder; made when it is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics_path = self.path / "metrics.jsonl"
        self.model_path = self.path / "model"
        self.checkpoints_path = self.path / "checkpoints"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from training in this folder; the lock ends with the process, however it ends.

        Raises:
            ValueError: Another process trains here, or a file of that name exists.
        """
        if self.path.is_file():
            raise ValueError(f"{self.path} is a file; --output names a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another process is training in {self.path}; use another --output, or stop it") from error
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                # Some cluster file systems have no locks; then nothing guards against two writers.
            yield

    def describe(self, description: Mapping[str, Any], may_change: Collection[str] = ()) -> None:
        """Writes ``run.json``, or compares it with what is there; then clears what an interrupted save has left.

        Args:
            description: Plain JSON values. Trainer settings stand under a key ``trainer`` or ``training``, on any level.
            may_change: Dotted keys that a resumed run may change, beside the trainer's own ``MAY_CHANGE``.

        Raises:
            ValueError: The folder holds something else, or a run with other settings.
        """
        path = self.path / "run.json"
        plain = json.loads(json.dumps(description))
        if path.exists():
            for key, old, new in _differences(read_json(path), plain, "", may_change):
                raise ValueError(
                    f"{self.path} holds a run with {key} = {old!r}, this command asks for {new!r}; "
                    "use another --output, or the settings in its run.json"
                )
        elif any(p.name != ".lock" for p in self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and has no run.json; choose a new folder for --output")
        write_json(path, plain)
        for leftover in [*self.path.glob(".model.*"), *self.checkpoints_path.glob(".step-*")]:
            shutil.rmtree(leftover)

    def note_session(self, facts: dict[str, Any]) -> None:
        """Adds a line to ``sessions.jsonl``."""
        with (self.path / "sessions.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"process": os.getpid(), **facts}) + "\n")

    def checkpoint_path(self, step: int) -> Path:
        """Returns the folder of the checkpoint after ``step`` updates."""
        return self.checkpoints_path / f"step-{step:08d}"

    def checkpoints(self) -> list[Path]:
        """Returns all checkpoints, newest first, torn ones included."""
        return sorted(self.checkpoints_path.glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")), reverse=True)

    def newest_checkpoint(self, warn: Callable[[str], None]) -> Path | None:
        """Returns the newest checkpoint whose digests hold; tells of each torn one that was passed over."""
        for path in self.checkpoints():
            try:
                check_folder(path)
            except TornFolderError as error:
                warn(f"checkpoint {path.name} is torn and is not used ({error})")
            else:
                return path
        return None

    def save_checkpoint(self, step: int, write: Callable[[Path], None], keep: int) -> Path:
        """Writes a checkpoint through ``write(folder)`` as a whole, then deletes all but the ``keep`` newest."""
        path = self.checkpoint_path(step)
        with atomic_folder(path) as folder:
            write(folder)
            for inner in folder.rglob("*"):
                if inner.is_dir():
                    sync(inner)
        for old in [p for p in self.checkpoints() if p != path][keep - 1 :]:
            shutil.rmtree(old)
        return path
