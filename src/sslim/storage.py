"""Writing to disk so that nothing half-written is ever taken for whole.

A folder is written under a temporary name beside its place, every file synced, digests of all files put in ``digests.json``,
and then renamed. A reader that checks the digests detects a torn or altered folder. Only safetensors and JSON are written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslim.config import dump_json

if TYPE_CHECKING:
    from torch import Tensor

DIGESTS = "digests.json"
LONGEST_NAME = 255  # bytes that file systems allow


class TornFolderError(ValueError):
    """A folder whose files do not match its digests."""


def sync(path: Path) -> None:
    """Forces a file or folder entry to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_file_target(path: Path) -> None:
    """Says before long work whether a file can be written at its end.

    Raises:
        ValueError: ``path`` is a folder, or its folder neither exists nor can be made.
    """
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; give the name of a file")
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
        raise ValueError(f"{path} cannot be written: a name in it is longer than {LONGEST_NAME} bytes")
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))  # a link to nowhere is in the way
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{path} cannot be written: {above} is {'not writable' if above.is_dir() else 'no folder'}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``: what is written there becomes ``path`` when the block ends without an error.

    An old file stays until the new one is whole and on disk; nothing else is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a whole text file or leaves the old one in place."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Any) -> None:
    """Writes a whole JSON file or leaves the old one in place."""
    write_text_atomically(path, dump_json(values))


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / DIGESTS)


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes ``folder`` when the block ends well, and disappears when it fails.

    An existing folder is replaced only after the new one is complete.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        digests = {p.relative_to(temporary).as_posix(): file_digest(p) for p in _files(temporary)}
        (temporary / DIGESTS).write_text(dump_json(digests), encoding="utf-8")
        for path in [*_files(temporary), temporary / DIGESTS, temporary]:
            sync(path)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
            os.rename(temporary, folder)
            shutil.rmtree(old)
        else:
            os.rename(temporary, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_folder(folder: str | Path) -> None:
    """Checks every file of a folder against its digests.

    Raises:
        TornFolderError: Digests are missing, or a file is missing, added or altered.
    """
    folder = Path(folder)
    try:
        digests = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TornFolderError(f"{folder} has no readable {DIGESTS}: it was not written completely") from error
    present = {p.relative_to(folder).as_posix() for p in _files(folder)}
    for name in sorted(present ^ set(digests)):
        raise TornFolderError(f"{folder}: {name} is {'missing' if name in digests else 'not in ' + DIGESTS}")
    for name, digest in digests.items():
        if file_digest(folder / name) != digest:
            raise TornFolderError(f"{folder}: {name} does not match its digest, it is torn or altered")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file; shared storage is copied, order follows the names."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())}
    save_file(plain, path, metadata=dict(metadata or {}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file onto the CPU.

    Raises:
        ValueError: It is not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from error
