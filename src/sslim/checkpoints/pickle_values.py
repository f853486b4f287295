"""What a pickle is read into: names, references to numbers outside it, and placeholders. None of these can do anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class RefusedPickleError(ValueError):
    """A pickle that is malformed or over a limit; the message continues a sentence that begins with the file's name."""


@dataclass(frozen=True, slots=True)
class Global:
    """A module's attribute that the pickle names. It is never looked up."""

    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Placeholder:
    """What stands for any object of a class that is not read.

    Attributes:
        module: Module of its class.
        name: Name of its class.
        args: What its constructor would have been given.
        state: What would have become its attributes; for ``argparse.Namespace`` the dictionary of settings.
        items: What would have been appended to it.
        entries: What would have been set in it by key.
    """

    module: str
    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: list[tuple[Any, Any]] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<placeholder of {self.module}.{self.name}>"


@dataclass(eq=False, slots=True)
class StorageRef:
    """A block of numbers outside the pickle.

    Attributes:
        key: Its name in the file.
        dtype: torch dtype's name, e.g. ``float32``.
        num_elements: Numbers in it, as the pickle claims.
    """

    key: str
    dtype: str
    num_elements: int


@dataclass(frozen=True, eq=False, slots=True)
class TensorRef:
    """A view of a storage, checked to lie inside it and to be no larger than it."""

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False, slots=True)
class DtypeRef:
    """A plain numeric numpy dtype, e.g. ``u4``; ``order`` is ``<``, ``>`` or ``|``."""

    code: str
    order: str = "<"


@dataclass(eq=False, slots=True)
class ArrayRef:
    """A numpy array whose bytes are in the pickle; ``dtype`` is None until its state is set."""

    dtype: DtypeRef | None = None
    shape: tuple[int, ...] = ()
    fortran: bool = False
    data: bytes = b""
    scalar: bool = False
