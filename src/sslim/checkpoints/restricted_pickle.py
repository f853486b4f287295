"""Reads foreign checkpoints: ``torch.save`` files of any age and plain pickles, as tensors and plain containers.

:mod:`sslim.checkpoints.pickle_machine` interprets the pickle without ever executing anything; this module finds the pickle and
the tensors' bytes in the file, checks that they are there, and maps them. ``torch.load`` and Python's unpickler are not used
and there is no fallback to them.

Tensors are copy-on-write views of the memory-mapped file, so a 1 GB checkpoint takes little memory; its optimiser state, two
thirds of it, is not even looked at when it is skipped.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslim.checkpoints.pickle_machine import MAX_PICKLE_BYTES, Machine
from sslim.checkpoints.pickle_values import (
    ArrayRef,
    DtypeRef,
    Global,
    Placeholder,
    RefusedPickleError,
    StorageRef,
    TensorRef,
)

MAX_DEPTH = 64  # of containers in containers; checkpoints have about 6
MAX_EXPANDED = 64 << 20  # nodes and characters of the result written out as a tree
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
OPTIMISER_KEYS = frozenset({"Optimizer", "optimizer", "last_optimizer_state", "Scheduler", "RandomState"})


class CheckpointError(ValueError):
    """A file or folder that is no readable checkpoint; the message is one sentence that names it."""


@dataclass(frozen=True, kw_only=True)
class _Extent:
    """Where a storage's bytes lie in the file; ``crc`` is their checksum where the container has one."""

    start: int
    num_bytes: int
    crc: int | None = None


def read_pickle(path: str | Path, *, skip: Collection[str] = ()) -> Any:
    """Reads a pickled checkpoint without executing anything in it.

    Args:
        path: A ``torch.save`` file (zip, or the older sequence of pickles) or a plain pickle.
        skip: Top-level keys whose values are not needed; a placeholder takes their place.

    Returns:
        Dictionaries, lists, tuples, sets, strings, bytes, numbers, booleans, None, tensors and arrays; any other object is a
        :class:`Placeholder`. It is a finite tree: no cycles, and small when written out. Tensors are views of the mapped file:
        copy those that are to outlive it.

    Raises:
        CheckpointError: The file is something else, truncated, damaged, or built to do harm.
        OSError: The file cannot be opened.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a checkpoint file")
    with path.open("rb") as file:
        head = file.read(512)
        if not head:
            raise CheckpointError(f"{path} is an empty file")
        try:
            _refuse_other_kinds(head)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if head.startswith(b"PK"):
                root, extents = _read_zip(path, mapped)
            else:
                root, extents = _read_legacy(mapped)
            return _Finisher(mapped, extents).finish(root, skip)
        except RefusedPickleError as error:
            raise CheckpointError(f"{path} {error}") from error


def _refuse_other_kinds(head: bytes) -> None:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise RefusedPickleError("is an HTML page, not a checkpoint (did a download need a login?)")
    if text.startswith(b"version https://git-lfs"):
        raise RefusedPickleError("is a git-lfs pointer, not the file itself: run `git lfs pull`")
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 1 << 32:
        raise RefusedPickleError("is a safetensors file, not a pickled checkpoint: give the folder it belongs to")
    kinds = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z", b"RIFF": "RIFF", b"\x89HDF": "HDF5"}
    for magic, kind in kinds.items():
        if head.startswith(magic):
            raise RefusedPickleError(f"is a {kind} file, not a checkpoint")
    if head[257:262] == b"ustar":
        raise RefusedPickleError("is a tar archive, not a checkpoint")
    if not head.startswith((b"PK", b"\x80")):
        raise RefusedPickleError("is not a checkpoint: it is neither a torch file nor a pickle of protocol 2 or later")


def _read_zip(path: Path, mapped: mmap.mmap) -> tuple[Any, dict[str, _Extent]]:
    """Container of torch 1.6 and later: ROOT/data.pkl and one stored entry ROOT/data/KEY for each storage."""
    entries = _zip_entries(path, mapped)
    pickles = [name for name in entries if name == "data.pkl" or (name.count("/") == 1 and name.endswith("/data.pkl"))]
    if len(pickles) != 1:
        raise RefusedPickleError(f"is a zip archive with {len(pickles)} data.pkl, a checkpoint has one")
    prefix = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{prefix}byteorder")
    if order is not None and mapped[order.start : order.start + order.num_bytes] != b"little":
        raise RefusedPickleError("was written on a big-endian machine, which is not supported")
    extent = entries[pickles[0]]
    if extent.num_bytes > MAX_PICKLE_BYTES:
        raise RefusedPickleError(f"holds a pickle of {extent.num_bytes >> 20} MiB, too large to be a checkpoint's")
    data = mapped[extent.start : extent.start + extent.num_bytes]
    if zlib.crc32(data) != extent.crc:
        raise RefusedPickleError("is damaged: its pickle does not match its checksum")
    root = Machine(io.BytesIO(data)).run()
    folder = f"{prefix}data/"
    return root, {name.removeprefix(folder): extent for name, extent in entries.items() if name.startswith(folder)}


def _zip_entries(path: Path, mapped: mmap.mmap) -> dict[str, _Extent]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, OverflowError, struct.error, EOFError) as error:
        raise RefusedPickleError(f"is truncated or damaged: a zip archive without its directory ({error})") from error
    if sum(info.file_size for info in infos) > len(mapped):
        raise RefusedPickleError("is a zip archive that unpacks to more than its own size (a zip bomb?)")
    return {info.filename: _zip_extent(info, mapped) for info in infos}


def _zip_extent(info: zipfile.ZipInfo, mapped: mmap.mmap) -> _Extent:
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
        raise RefusedPickleError(f"has a compressed or encrypted entry {info.filename[:80]!r}, which torch never writes")
    header = mapped[info.header_offset : info.header_offset + 30]
    if len(header) != 30 or not header.startswith(b"PK\x03\x04"):
        raise RefusedPickleError("is truncated or damaged: an entry of its zip archive is missing")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name_length + extra_length
    if start + info.file_size > len(mapped):
        raise RefusedPickleError("is truncated: an entry of its zip archive reaches beyond its end")
    return _Extent(start=start, num_bytes=info.file_size, crc=info.CRC)


def _read_legacy(mapped: mmap.mmap) -> tuple[Any, dict[str, _Extent]]:
    """Container of torch 0.4 to 1.5: magic, protocol, system, object, storage keys (five pickles), then the storages.

    A file whose first pickle is not the magic number is a plain pickle.
    """
    first = _run_at(mapped)
    if first.root != LEGACY_MAGIC:
        if first.storages:
            raise RefusedPickleError("is a plain pickle that refers to storages it does not have")
        return first.root, {}
    if _run_at(mapped).root != LEGACY_PROTOCOL:
        raise RefusedPickleError("is a torch file of an unknown protocol")
    system = _run_at(mapped).root
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise RefusedPickleError("was written on a big-endian machine, which is not supported")
    main = _run_at(mapped)
    keys = _run_at(mapped).root
    if not isinstance(keys, list) or len(set(map(str, keys))) != len(keys):
        raise RefusedPickleError("is damaged: its list of storages is malformed")
    extents, position = {}, mapped.tell()
    for key in keys:
        storage = main.storages.get(key) if isinstance(key, str) else None
        if storage is None:
            raise RefusedPickleError("lists a storage that no tensor uses")
        count = mapped[position : position + 8]
        if len(count) != 8 or struct.unpack("<q", count)[0] != storage.num_elements:
            raise RefusedPickleError("is truncated or damaged: a storage has another size than its tensors say")
        num_bytes = storage.num_elements * _dtype(storage).itemsize
        extents[key] = _Extent(start=position + 8, num_bytes=num_bytes)
        position += 8 + num_bytes
    if position > len(mapped):
        raise RefusedPickleError("is truncated: its last storages are missing")
    return main.root, extents


@dataclass(frozen=True)
class _Run:
    root: Any
    storages: dict[str, StorageRef]


def _run_at(mapped: mmap.mmap) -> _Run:
    machine = Machine(mapped)  # type: ignore[arg-type]
    return _Run(machine.run(), machine.storages)


def _dtype(storage: StorageRef) -> torch.dtype:
    return getattr(torch, storage.dtype)


class _Finisher:
    """Turns what the machine left into new plain containers with tensors; refuses cycles and trees that explode."""

    def __init__(self, mapped: mmap.mmap, extents: dict[str, _Extent]) -> None:
        self.mapped, self.extents = mapped, extents
        self.storages: dict[str, Tensor] = {}
        self.done: dict[int, tuple[Any, int]] = {}  # id of a visited object -> (its plain form, its expanded size)
        self.open: set[int] = set()

    def finish(self, root: Any, skip: Collection[str]) -> Any:
        if skip and isinstance(root, dict):
            kept = {key: Placeholder("sslim", "skipped") if key in skip else value for key, value in root.items()}
            return self.plain(kept, 0)[0]
        return self.plain(root, 0)[0]

    def plain(self, value: Any, depth: int) -> tuple[Any, int]:
        """Returns the plain form of ``value`` and its size when written out as a tree."""
        if value is None or isinstance(value, bool | int | float | complex):
            return value, 1
        if isinstance(value, str | bytes):
            return value, 1 + len(value)
        if id(value) in self.done:
            return self.done[id(value)]
        if id(value) in self.open or depth > MAX_DEPTH:
            raise RefusedPickleError("holds containers nested in themselves or too deeply")
        self.open.add(id(value))
        result = self._convert(value, depth + 1)
        self.open.remove(id(value))
        if result[1] > MAX_EXPANDED:
            raise RefusedPickleError("holds containers that repeat each other beyond any checkpoint's size")
        self.done[id(value)] = result
        return result

    def _convert(self, value: Any, depth: int) -> tuple[Any, int]:
        if isinstance(value, dict):
            keys, key_sizes = self._all(value, depth)
            values, sizes = self._all(value.values(), depth)
            return dict(zip(keys, values, strict=True)), 1 + key_sizes + sizes
        if isinstance(value, list | tuple | set | frozenset):
            values, sizes = self._all(value, depth)
            return type(value)(values), 1 + sizes
        if isinstance(value, TensorRef):
            return self._tensor(value), 1 + len(value.size)
        if isinstance(value, ArrayRef):
            return _array(value), 1 + len(value.data)
        if isinstance(value, Placeholder):
            return self._placeholder(value, depth)
        if isinstance(value, Global):
            return Placeholder(value.module, value.name), 1
        if isinstance(value, DtypeRef):
            return Placeholder("numpy", "dtype", (f"{value.order}{value.code}",)), 1
        assert isinstance(value, StorageRef), value
        return Placeholder("torch", "Storage", (value.key,)), 1

    def _all(self, values: Collection[Any] | Any, depth: int) -> tuple[list[Any], int]:
        pairs = [self.plain(value, depth) for value in values]
        return [plain for plain, _ in pairs], sum(size for _, size in pairs)

    def _placeholder(self, value: Placeholder, depth: int) -> tuple[Placeholder, int]:
        if value.module.startswith("omegaconf") and isinstance(value.state, dict):  # settings that refer back to their parents
            value.state = {key: item for key, item in value.state.items() if key != "_parent"}
        parts = (value.args, value.state, value.items, value.entries)
        (args, state, items, entries), size = self._all(parts, depth)
        return Placeholder(value.module, value.name, args, state, items, entries), 1 + size

    def _tensor(self, ref: TensorRef) -> Tensor:
        storage = ref.storage
        if storage.key not in self.storages:
            self.storages[storage.key] = self._storage(storage)
        return self.storages[storage.key].as_strided(ref.size, ref.stride, ref.offset)

    def _storage(self, storage: StorageRef) -> Tensor:
        """Maps a storage: a view where its bytes are aligned, a copy otherwise (legacy files) and of booleans."""
        dtype, extent = _dtype(storage), self.extents.get(storage.key)
        num_bytes = storage.num_elements * dtype.itemsize
        if extent is None or extent.num_bytes < num_bytes:
            raise RefusedPickleError(f"is truncated: storage {storage.key[:20]!r} has fewer bytes than its tensors need")
        view = memoryview(self.mapped)[extent.start : extent.start + extent.num_bytes]
        if extent.crc is not None and zlib.crc32(view) != extent.crc:
            raise RefusedPickleError(f"is damaged: storage {storage.key[:20]!r} does not match its checksum")
        if num_bytes == 0:
            return torch.empty(0, dtype=dtype)
        if dtype is torch.bool:  # any byte but 0 and 1 would be undefined as a boolean
            return torch.frombuffer(view[:num_bytes], dtype=torch.uint8) != 0
        if extent.start % dtype.itemsize:
            return torch.frombuffer(bytearray(view[:num_bytes]), dtype=dtype)
        return torch.frombuffer(view[:num_bytes], dtype=dtype)


def _array(ref: ArrayRef) -> Any:
    if ref.dtype is None:
        return Placeholder("numpy", "ndarray")
    dtype = np.dtype(f"{ref.dtype.order}{ref.dtype.code}")
    if math.prod(ref.shape) * dtype.itemsize != len(ref.data):
        raise RefusedPickleError(f"holds an array of shape {ref.shape} with {len(ref.data)} bytes")
    array = np.frombuffer(ref.data, dtype).reshape(ref.shape, order="F" if ref.fortran else "C")
    return array[()].item() if ref.scalar else array
