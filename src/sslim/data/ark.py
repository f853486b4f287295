"""Kaldi archives (``ark``): reading every kind of object by memory map, writing float matrices and vectors.

The layout is described in Kaldi's documentation (``io.html``, ``compressed-matrix.h``). One utterance of a huge archive costs
one header and one copy. Bytes that make no sense raise :class:`KaldiError` with the key, the place and what was found.

Shape suffixes: ``T`` rows (frames), ``F`` columns (features).
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

COMPRESSED = {"CM": 1, "CM2": 2, "CM3": 1}  # token of a compressed matrix: bytes an element takes
PLAIN = {"FM": ("<f4", 2), "DM": ("<f8", 2), "FV": ("<f4", 1), "DV": ("<f8", 1)}  # token: (element, dimensions)
ACCEPTED_TOKENS = ", ".join([*PLAIN, *COMPRESSED])
INT_DTYPE = np.dtype([("size", "i1"), ("value", "<i4")])  # each element of an integer vector repeats its size
OPEN_ARCHIVES = 64


class KaldiError(ValueError):
    """A table that cannot be read; the message names the key, the file and what was found."""


class Header(NamedTuple):
    """Where and how an object lies in an archive.

    Attributes:
        token: Kaldi's type token (``FM``, ``CM2``, ...), ``int`` for an integer vector, ``text`` for a text object.
        shape: (T, F) or (n,); () for text, whose shape is known only after parsing.
        begin: First byte of the data.
        end: Byte after the data.
    """

    token: str
    shape: tuple[int, ...]
    begin: int
    end: int


@lru_cache(maxsize=OPEN_ARCHIVES)
def _map(path: str, size: int, changed_ns: int) -> mmap.mmap:
    """Maps an archive; size and time of change are part of the key, so a rewritten file is mapped anew."""
    del changed_ns
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)


def open_archive(path: str | Path) -> mmap.mmap:
    """Memory-maps an archive, read only; maps are kept open and shared.

    Raises:
        KaldiError: It is missing, empty or compressed with gzip.
    """
    try:
        status = os.stat(path)
        if status.st_size == 0:
            raise KaldiError(f"archive {path} is empty")
        data = _map(str(path), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise KaldiError(f"archive {path} cannot be opened ({error.strerror})") from error
    if data[:2] == b"\x1f\x8b":
        raise KaldiError(f"archive {path} is compressed with gzip, unpack it first")
    return data


def _int32(data: mmap.mmap, at: int, where: str) -> int:
    """Reads one of Kaldi's basic integers: a byte 4, then int32."""
    found = data[at : at + 5]
    if len(found) < 5:
        raise KaldiError(f"{where}: the header is truncated, {len(found)} bytes of 5 are left")
    if found[0] != 4:
        raise KaldiError(f"{where}: expected the size byte 4 before a dimension, found {found[0]}")
    value = struct.unpack("<i", found[1:])[0]
    if value < 0:
        raise KaldiError(f"{where}: the dimension {value} is negative")
    return value


def _compressed_header(data: mmap.mmap, token: str, at: int, where: str) -> Header:
    found = data[at : at + 16]
    if len(found) < 16:
        raise KaldiError(f"{where}: the header is truncated, {len(found)} bytes of 16 are left")
    minimum, spread, rows, columns = struct.unpack("<ffii", found)
    if rows < 0 or columns < 0 or not np.isfinite([minimum, spread]).all():
        raise KaldiError(
            f"{where}: the compressed header (minimum {minimum}, range {spread}, {rows} x {columns}) makes no sense"
        )
    num_bytes = rows * columns * COMPRESSED[token] + (columns * 8 if token == "CM" else 0)
    return Header(token, (rows, columns), at, at + 16 + num_bytes)


def read_header(data: mmap.mmap, offset: int, where: str) -> Header:
    """Reads what stands before the data of the object at ``offset`` and checks that the data fit into the file.

    Args:
        data: The archive.
        offset: Byte just past the key and its space.
        where: What to call the object in an error.

    Raises:
        KaldiError: Unknown type, nonsensical dimensions, or truncated.
    """
    if not 0 <= offset < len(data):
        raise KaldiError(f"{where}: the offset lies beyond the archive's {len(data)} bytes")
    if data[offset : offset + 2] != b"\0B":
        if data[offset : offset + 4] == b"RIFF":
            raise KaldiError(f"{where}: the archive holds wav audio, extract it to files first")
        return Header("text", (), offset, offset)
    at = offset + 2
    if data[at : at + 1] == b"\4":
        count = _int32(data, at, where)
        header = Header("int", (count,), at + 5, at + 5 + count * INT_DTYPE.itemsize)
    else:
        token = data[at : at + 6].split(b" ", 1)[0].decode("latin-1")
        at += len(token) + 1
        if token in PLAIN:
            num_dimensions = PLAIN[token][1]
            shape = tuple(_int32(data, at + 5 * i, where) for i in range(num_dimensions))
            begin = at + 5 * num_dimensions
            # Python's own integers: a corrupt header such as 2^31 x 2^31 must not overflow into a small number.
            header = Header(token, shape, begin, begin + _product(shape) * np.dtype(PLAIN[token][0]).itemsize)
        elif token in COMPRESSED:
            header = _compressed_header(data, token, at, where)
        else:
            raise KaldiError(f"{where}: found the type {token!r}, accepted are {ACCEPTED_TOKENS}, integer vectors and text")
    if header.end > len(data):
        size = " x ".join(map(str, header.shape))
        raise KaldiError(
            f"{where}: truncated, {token_name(header)} of {size} ends at byte {header.end} but the archive has {len(data)}"
        )
    return header


def token_name(header: Header) -> str:
    """Returns a type's name for an error."""
    return "an integer vector" if header.token == "int" else f"type {header.token}"


def _product(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _decode_compressed(data: mmap.mmap, header: Header) -> np.ndarray:
    """Expands a compressed matrix to float32 (T, F), by the formulas of ``compressed-matrix.cc``."""
    rows, columns = header.shape
    minimum, spread = np.frombuffer(data, "<f4", 2, header.begin)
    begin = header.begin + 16
    if header.token == "CM2":
        codes_TF = np.frombuffer(data, "<u2", rows * columns, begin).reshape(rows, columns)
        return minimum + codes_TF.astype(np.float32) * (spread / np.float32(65535.0))
    if header.token == "CM3":
        codes_TF = np.frombuffer(data, "u1", rows * columns, begin).reshape(rows, columns)
        return minimum + codes_TF.astype(np.float32) * (spread / np.float32(255.0))
    # CM: for each column the 0th, 25th, 75th and 100th percentile; a byte interpolates linearly between two of them.
    percentiles_F4 = np.frombuffer(data, "<u2", columns * 4, begin).reshape(columns, 4).astype(np.float32)
    p0, p25, p75, p100 = (minimum + spread * (percentiles_F4 / np.float32(65535.0))).T[:, :, None]
    codes_FT = np.frombuffer(data, "u1", rows * columns, begin + columns * 8).reshape(columns, rows).astype(np.float32)
    low = p0 + (p25 - p0) * (codes_FT / np.float32(64.0))
    middle = p25 + (p75 - p25) * ((codes_FT - 64.0) / np.float32(128.0))
    high = p75 + (p100 - p75) * ((codes_FT - 192.0) / np.float32(63.0))
    return np.ascontiguousarray(np.where(codes_FT <= 64, low, np.where(codes_FT <= 192, middle, high)).T, dtype=np.float32)


def _parse_text(data: mmap.mmap, offset: int, where: str) -> tuple[np.ndarray, int]:
    """Reads a text object: ``[ ... ]`` is a float vector, or a matrix when it spans lines; a bare line is an integer vector."""
    line_end = data.find(b"\n", offset)
    line_end = len(data) if line_end < 0 else line_end
    if data[offset:line_end].lstrip()[:1] != b"[":
        words = data[offset:line_end].split()
        try:
            return np.array([int(word) for word in words], dtype=np.int32), line_end
        except (ValueError, OverflowError):
            found = data[offset : min(line_end, offset + 20)]
            raise KaldiError(f"{where}: expected a matrix, a vector or whole numbers, found {found!r}") from None
    begin = data.find(b"[", offset) + 1
    end = data.find(b"]", begin)
    if end < 0:
        raise KaldiError(f"{where}: truncated, the closing ] of a text object is missing")
    body = data[begin:end]
    rows = [row.split() for row in body.split(b"\n") if row.strip()]
    if len({len(row) for row in rows}) > 1:
        raise KaldiError(
            f"{where}: rows of a text matrix have {sorted({len(row) for row in rows})} columns, not one number of them"
        )
    try:
        values = np.array([[float(word) for word in row] for row in rows], dtype=np.float32)
    except ValueError as error:
        raise KaldiError(f"{where}: a text object holds something that is no number ({error})") from None
    if b"\n" in body:
        return values.reshape(len(rows), -1) if rows else np.zeros((0, 0), np.float32), end + 1
    return values.reshape(-1), end + 1


def _decode(data: mmap.mmap, offset: int, where: str) -> tuple[np.ndarray, int]:
    """Returns the object at ``offset`` as an array of its own and the byte after it."""
    header = read_header(data, offset, where)
    if header.token == "text":
        return _parse_text(data, offset, where)
    if header.token in COMPRESSED:
        return _decode_compressed(data, header), header.end
    count = _product(header.shape)
    if header.token == "int":
        elements = np.frombuffer(data, INT_DTYPE, count, header.begin)
        if not (elements["size"] == 4).all():
            raise KaldiError(f"{where}: an element of an integer vector is not marked as 4 bytes")
        return elements["value"].astype(np.int32), header.end
    # Copied: data in an archive are not aligned, and the map must not be kept alive by a result.
    return np.frombuffer(data, PLAIN[header.token][0], count, header.begin).reshape(header.shape).copy(), header.end


def read_object(path: str | Path, offset: int = 0, *, key: str = "?") -> np.ndarray:
    """Reads one matrix (T, F) or vector (n,): float32, float64 or int32 as stored, compressed matrices as float32.

    Args:
        path: The archive.
        offset: Byte just past the key and its space, as an ``scp`` list states it.
        key: What to call the object in an error.

    Raises:
        KaldiError: It is missing, truncated or of an unknown kind.
    """
    return _decode(open_archive(path), offset, f"{key} in {path} at byte {offset}")[0]


def read_shape(path: str | Path, offset: int = 0, *, key: str = "?") -> tuple[int, ...]:
    """Returns the shape of an object without reading its data (text is parsed).

    Raises:
        KaldiError: As for :func:`read_object`.
    """
    data = open_archive(path)
    where = f"{key} in {path} at byte {offset}"
    header = read_header(data, offset, where)
    return _parse_text(data, offset, where)[0].shape if header.token == "text" else header.shape


def _places(path: str | Path) -> Iterator[tuple[str, int, str]]:
    """Yields (key, offset of the object, what to call it) of every object of an archive, in order."""
    data = open_archive(path)
    at = 0
    while at < len(data):
        if data[at : at + 1].isspace():
            at += 1
            continue
        end = data.find(b" ", at)
        key = data[at:end]
        if end < 0 or b"\n" in key or b"\0" in key:
            raise KaldiError(f"{path}: expected a key and a space at byte {at}, found {data[at : at + 20]!r}")
        name = key.decode("utf-8", "replace")
        where = f"{name} in {path} at byte {end + 1}"
        yield name, end + 1, where
        header = read_header(data, end + 1, where)
        at = _parse_text(data, end + 1, where)[1] if header.token == "text" else header.end


def read_ark(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (key, array) of every object of an archive, binary or text, in order.

    Raises:
        KaldiError: As for :func:`read_object`.
    """
    data = open_archive(path)
    for name, offset, where in _places(path):
        yield name, _decode(data, offset, where)[0]


def list_ark(path: str | Path) -> dict[str, int]:
    """Returns the offset of every object of an archive by its key, from the headers alone, as an ``scp`` list states it.

    Raises:
        KaldiError: As for :func:`read_object`, or a key comes twice.
    """
    offsets: dict[str, int] = {}
    for name, offset, _ in _places(path):
        if name in offsets:
            raise KaldiError(f"{path}: the key {name!r} comes a second time, at byte {offset}")
        offsets[name] = offset
    return offsets


def write_ark_scp(
    folder: str | Path, items: Iterable[tuple[str, np.ndarray]], *, name: str = "feats", location: str | Path | None = None
) -> int:
    """Writes ``NAME.ark`` and ``NAME.scp`` with float32 matrices (T, F) and vectors (n,); both appear only when complete.

    Args:
        folder: Where to write.
        items: (key, array) pairs, any number of them; they are not kept in memory.
        name: Stem of both files.
        location: Folder that the list names for the archive, when ``folder`` is renamed afterwards; by default ``folder``.

    Returns:
        The number of objects written.

    Raises:
        ValueError: A key is empty, holds white space or comes twice, or an array has neither one nor two dimensions.
    """
    folder = Path(folder)
    archive = Path(location if location is not None else folder).resolve() / f"{name}.ark"
    seen: set[str] = set()
    temporary = [folder / f".{name}.{suffix}.{os.getpid()}.tmp" for suffix in ("ark", "scp")]
    try:
        with temporary[0].open("wb") as ark, temporary[1].open("w", encoding="utf-8") as scp:
            for key, array in items:
                if not key or key.split() != [key] or key in seen:
                    raise ValueError(f"{key!r} cannot be a Kaldi key: keys are unique, not empty and free of white space")
                seen.add(key)
                values = np.ascontiguousarray(array, dtype="<f4")
                if values.ndim not in (1, 2):
                    raise ValueError(f"{key}: Kaldi archives hold matrices and vectors, not an array of shape {values.shape}")
                ark.write(key.encode() + b" ")
                scp.write(f"{key} {archive}:{ark.tell()}\n")
                ark.write(b"\0B" + (b"FM " if values.ndim == 2 else b"FV "))
                ark.write(b"".join(struct.pack("<bi", 4, size) for size in values.shape))
                ark.write(values.tobytes())
            for file in (ark, scp):
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary[0], folder / f"{name}.ark")
        os.replace(temporary[1], folder / f"{name}.scp")
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    return len(seen)
