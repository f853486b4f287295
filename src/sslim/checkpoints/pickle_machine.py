"""A pickle interpreter that cannot execute anything.

Python's own unpickler calls whatever the file names. This one walks the opcodes (``pickletools.genops`` parses them and does no
more) and has no way to import, call or set an attribute: a name is a :class:`Global`, which is two strings. Applying a global
gives a plain container, a :class:`TensorRef` or :class:`ArrayRef` (numbers that say where the data would be), or, for every
name not in ``BUILDERS``, an inert :class:`Placeholder`. There is no fallback to Python's unpickler.

What is counted and bounded: opcodes, bytes, size of integers, kinds of dictionary keys (a nested tuple as key would be hashed
over and over), items copied by builders, and later (``restricted_pickle``) depth and expanded size of the result.
"""

from __future__ import annotations

import math
import pickletools
import re
import struct
import warnings
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

from sslim.checkpoints.pickle_values import (
    ArrayRef,
    DtypeRef,
    Global,
    Placeholder,
    RefusedPickleError,
    StorageRef,
    TensorRef,
)

MAX_OPCODES = 5_000_000  # a 12-layer checkpoint with Adam state has about 40,000
MAX_PICKLE_BYTES = 64 << 20  # its pickle has about 100 kB; tensors lie outside it
MAX_INTEGER_BITS = 128  # torch's legacy magic number has 77
MAX_TENSOR_DIMS = 16

STORAGE_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_NUMPY_CODE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c(?:8|16))")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise RefusedPickleError(reason)


def rebuild_tensor(machine: Machine, *args: Any) -> TensorRef:
    """Storage, offset, size, stride (and what autograd would want, which is dropped) to a checked view."""
    _require(len(args) >= 4 and isinstance(args[0], StorageRef), "holds a malformed tensor")
    storage, offset, size, stride = args[:4]
    well_formed = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= MAX_TENSOR_DIMS
    well_formed = well_formed and all(map(_is_count, (offset, *size, *stride)))
    _require(well_formed, "holds a tensor with a malformed or negative offset, size or stride")
    num_elements = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if num_elements else offset - 1
    inside = last < storage.num_elements and num_elements <= storage.num_elements
    _require(inside, f"holds a tensor of size {size} that reaches beyond its storage of {storage.num_elements} numbers")
    return TensorRef(storage, offset, size, stride)


def _rebuild_parameter(machine: Machine, *args: Any) -> TensorRef:
    _require(bool(args) and isinstance(args[0], TensorRef), "holds a malformed parameter")
    return args[0]


def _rebuild_from_type(machine: Machine, *args: Any) -> Any:
    well_formed = len(args) >= 3 and isinstance(args[0], Global) and isinstance(args[2], tuple)
    _require(well_formed, "holds a malformed tensor subclass")
    _require(args[0].path != "torch._tensor._rebuild_from_type_v2", "holds a tensor subclass of itself")
    return machine.apply(args[0], args[2])


def _mapping(machine: Machine, *args: Any) -> dict[Any, Any]:
    """``OrderedDict``, ``defaultdict`` and ``Counter``: a plain dictionary, the default factory is forgotten."""
    args = args[1:] if args and (args[0] is None or isinstance(args[0], Global)) else args
    result: dict[Any, Any] = {}
    if args:
        pairs = list(args[0].items()) if isinstance(args[0], dict) else args[0]
        _require(isinstance(pairs, list), "holds a malformed dictionary")
        machine.charge(len(pairs))
        for pair in pairs:
            _require(isinstance(pair, list | tuple) and len(pair) == 2, "holds a malformed dictionary")
            result[machine.check_key(pair[0])] = pair[1]
    return result


def _sequence(kind: type) -> Callable[..., Any]:
    def build(machine: Machine, *args: Any) -> Any:
        values = args[0] if args else ()
        _require(isinstance(values, list | tuple) and len(args) <= 1, f"holds a malformed {kind.__name__}")
        machine.charge(len(values))
        return kind(map(machine.check_key, values)) if kind in (set, frozenset) else kind(values)

    return build


def _encode(machine: Machine, *args: Any) -> bytes:
    """``_codecs.encode(text, "latin1")``, how protocol 2 writes bytes."""
    well_formed = len(args) == 2 and isinstance(args[0], str) and args[1] in ("latin1", "latin-1")
    _require(well_formed, "holds malformed bytes")
    machine.charge(len(args[0]))
    try:
        return args[0].encode("latin-1")
    except UnicodeEncodeError as error:
        raise RefusedPickleError("holds malformed bytes") from error


def _dtype(machine: Machine, *args: Any) -> Any:
    match = _NUMPY_CODE.fullmatch(args[0]) if args and isinstance(args[0], str) else None
    return DtypeRef(match[1], "|" if match[1][1:] == "1" else "<") if match else Placeholder("numpy", "dtype", args)


def _array(machine: Machine, *args: Any) -> ArrayRef:
    return ArrayRef()


def _array_of_buffer(machine: Machine, *args: Any) -> Any:
    """How protocol 5 writes arrays: bytes, dtype, shape, order."""
    array = ArrayRef()
    if len(args) == 4:
        machine.fill_array(array, (1, args[2], args[1], args[3] == "F", args[0]))
    return array


def _scalar(machine: Machine, *args: Any) -> Any:
    if len(args) == 2 and isinstance(args[0], DtypeRef) and isinstance(args[1], bytes):
        return ArrayRef(args[0], (), False, args[1], scalar=True)
    return Placeholder("numpy", "scalar", args)


BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _sequence(tuple),
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _mapping,
    "collections.Counter": _mapping,
    "_codecs.encode": _encode,
    "numpy.dtype": _dtype,
} | {
    f"{module}.{name}": builder
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    for name, builder in (("_reconstruct", _array), ("scalar", _scalar))
}
BUILDERS |= {f"{module}._frombuffer": _array_of_buffer for module in ("numpy.core.numeric", "numpy._core.numeric")}
for _kind in (set, frozenset, list, tuple):
    BUILDERS[f"builtins.{_kind.__name__}"] = BUILDERS[f"__builtin__.{_kind.__name__}"] = _sequence(_kind)

_MARK = object()
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_VALUES = frozenset((*_NUMBERS, *_TEXTS, "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"))
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}


class Machine:
    """Runs one pickle.

    Args:
        stream: Where the pickle begins; afterwards it stands behind the pickle's STOP.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.start = stream, stream.tell()
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, StorageRef] = {}
        self.budget = MAX_PICKLE_BYTES

    def run(self) -> Any:
        """Returns the object as plain containers, scalars, references and placeholders.

        Raises:
            RefusedPickleError: Truncated, malformed, or over a limit.
        """
        try:
            return self._run()
        except RefusedPickleError:
            raise
        except (ValueError, OverflowError, struct.error, EOFError, MemoryError, RecursionError) as error:
            raise RefusedPickleError(f"is truncated or damaged ({error})") from error

    def _run(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about backslashes in the names of a damaged file
            for count, (opcode, value, position) in enumerate(pickletools.genops(self.stream)):
                if count > MAX_OPCODES or (position or 0) - self.start > MAX_PICKLE_BYTES:
                    raise RefusedPickleError("holds a pickle too large to be a checkpoint's")
                if opcode.name == "STOP":
                    return self.pop()
                self.step(opcode.name, value)
        raise RefusedPickleError("is truncated: its pickle does not end")

    def step(self, name: str, value: Any) -> None:
        """Does one opcode."""
        if name in _VALUES:
            if type(value) is int and value.bit_length() > MAX_INTEGER_BITS:
                raise RefusedPickleError(f"holds an integer of {value.bit_length()} bits")
            self.stack.append(bytes(value) if isinstance(value, bytearray) else value)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif handler := getattr(self, f"_op_{name.lower()}", None):
            handler(value)
        elif name not in ("PROTO", "FRAME"):
            raise RefusedPickleError(f"uses the pickle opcode {name}, which no checkpoint needs")

    def pop(self) -> Any:
        """Takes the top of the stack, which must not be a mark."""
        _require(bool(self.stack) and self.stack[-1] is not _MARK, "is damaged: its pickle takes from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        """Looks at the top of the stack."""
        _require(bool(self.stack) and self.stack[-1] is not _MARK, "is damaged: its pickle reads an empty stack")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        """Takes everything above the last mark, and the mark."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise RefusedPickleError("is damaged: its pickle lacks a mark")

    def charge(self, amount: int) -> None:
        """Counts what a builder copies: a short pickle could ask for the same large copy a million times."""
        self.budget -= amount + 1
        _require(self.budget >= 0, "asks for more copies than a checkpoint needs")

    def check_key(self, key: Any) -> Any:
        """Returns ``key`` if hashing it is cheap and cannot be made slow."""
        parts = key if isinstance(key, tuple) and len(key) <= 16 else (key,)
        for part in parts:
            plain = part is None or isinstance(part, str | bytes | float | bool | Placeholder | Global)
            _require(
                plain or (type(part) is int and abs(part) < 1 << 64), f"has a dictionary key of type {type(part).__name__}"
            )
        return key

    def apply(self, target: Any, args: Any) -> Any:
        """What calling ``target`` stands for."""
        args = args if isinstance(args, tuple) else (args,)
        if not isinstance(target, Global):
            return Placeholder(getattr(target, "module", "?"), f"{getattr(target, 'name', '?')}()", args)
        builder = BUILDERS.get(target.path)
        return Placeholder(target.module, target.name, args) if builder is None else builder(self, *args)

    # Stack, memo
    def _op_pop(self, _: Any) -> None:
        _require(bool(self.stack), "is damaged: its pickle takes from an empty stack")
        self.stack.pop()

    def _op_dup(self, _: Any) -> None:
        self.stack.append(self.top())

    def _op_pop_mark(self, _: Any) -> None:
        self.pop_mark()

    def _op_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.top()

    def _op_put(self, index: int) -> None:
        self.memo[index] = self.top()

    def _op_get(self, index: int) -> None:
        _require(index in self.memo, "is damaged: its pickle reads what it has not stored")
        self.stack.append(self.memo[index])

    _op_binput = _op_long_binput = _op_put
    _op_binget = _op_long_binget = _op_get

    # Containers
    def _op_list(self, _: Any) -> None:
        self.stack.append(self.pop_mark())

    def _op_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_mark()))

    def _op_tuple1(self, _: Any, size: int = 1) -> None:
        values = tuple(self.pop() for _ in range(size))
        self.stack.append(values[::-1])

    def _op_tuple2(self, _: Any) -> None:
        self._op_tuple1(None, 2)

    def _op_tuple3(self, _: Any) -> None:
        self._op_tuple1(None, 3)

    def _op_dict(self, _: Any) -> None:
        values = self.pop_mark()
        self.stack.append({})
        self._set_items(values)

    def _op_frozenset(self, _: Any) -> None:
        self.stack.append(frozenset(map(self.check_key, self.pop_mark())))

    def _op_append(self, _: Any) -> None:
        self._extend([self.pop()])

    def _op_appends(self, _: Any) -> None:
        self._extend(self.pop_mark())

    def _op_additems(self, _: Any) -> None:
        self._extend(self.pop_mark())

    def _op_setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._set_items([key, value])

    def _op_setitems(self, _: Any) -> None:
        self._set_items(self.pop_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, set):
            target.update(map(self.check_key, values))
        else:
            _require(isinstance(target, list | Placeholder), "is damaged: its pickle appends to what is no list")
            (target.items if isinstance(target, Placeholder) else target).extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self.top()
        _require(len(values) % 2 == 0, "is damaged: its pickle sets a key without a value")
        pairs: Iterable[tuple[Any, Any]] = zip(values[::2], values[1::2], strict=True)
        if isinstance(target, Placeholder):
            target.entries.extend(pairs)
            return
        _require(isinstance(target, dict), "is damaged: its pickle sets a key of what is no dictionary")
        for key, value in pairs:
            target[self.check_key(key)] = value

    # Names and objects
    def _op_global(self, value: str) -> None:
        module, _, name = value.partition(" ")
        self.stack.append(Global(module, name))

    def _op_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        _require(isinstance(name, str) and isinstance(module, str), "is damaged: its pickle names an object by no name")
        self.stack.append(Global(module, name))

    def _op_reduce(self, _: Any) -> None:
        args, target = self.pop(), self.pop()
        self.stack.append(self.apply(target, args))

    _op_newobj = _op_reduce

    def _op_newobj_ex(self, _: Any) -> None:
        keywords, args, target = self.pop(), self.pop(), self.pop()
        self.stack.append(self.apply(target, (*args, keywords) if isinstance(args, tuple) and keywords else args))

    def _op_inst(self, value: str) -> None:
        args = tuple(self.pop_mark())
        self._op_global(value)
        self.stack.append(self.apply(self.pop(), args))

    def _op_obj(self, _: Any) -> None:
        values = self.pop_mark()
        _require(bool(values), "is damaged: its pickle builds an object of no class")
        self.stack.append(self.apply(values[0], tuple(values[1:])))

    def _op_build(self, _: Any) -> None:
        """Sets a state; on plain containers and tensors (``_metadata`` of a state dictionary) it is dropped."""
        state = self.pop()
        target = self.top()
        if isinstance(target, Placeholder):
            target.state = state
        elif isinstance(target, DtypeRef) and isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|"):
            target.order = state[1]
        elif isinstance(target, ArrayRef):
            self.fill_array(target, state)

    def fill_array(self, array: ArrayRef, state: Any) -> None:
        """Sets version, shape, dtype, order and bytes as numpy writes them."""
        well_formed = isinstance(state, tuple) and len(state) == 5 and isinstance(state[1], tuple)
        _require(well_formed and len(state[1]) <= MAX_TENSOR_DIMS and all(map(_is_count, state[1])), "holds a malformed array")
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, DtypeRef) or not isinstance(data, bytes):
            return  # strings and objects: the array stays without contents and becomes a placeholder
        array.dtype, array.shape, array.fortran, array.data = dtype, shape, bool(fortran), data

    def _op_binpersid(self, _: Any) -> None:
        """Protocol of ``torch.save``: ("storage", type, key, location, number of elements[, view])."""
        identity = self.pop()
        named = isinstance(identity, tuple) and len(identity) >= 2 and isinstance(identity[0], str)
        _require(named, "refers to an object outside its pickle in no known way")
        if identity[0] == "module":  # source code of a pickled class, old torch: kept out
            self.stack.append(identity[1])
            return
        well_formed = identity[0] == "storage" and len(identity) in (5, 6) and isinstance(identity[1], Global)
        well_formed = well_formed and isinstance(identity[2], str) and _is_count(identity[4])
        _require(well_formed, "refers to a storage in no known way")
        _require(len(identity) == 5 or identity[5] is None, "holds views of storages as torch 0.3 wrote them")
        dtype = STORAGE_DTYPES.get(identity[1].name)
        if dtype is None:
            self.stack.append(Placeholder(identity[1].module, identity[1].name, identity))
            return
        storage = self.storages.setdefault(identity[2], StorageRef(identity[2], dtype, identity[4]))
        same = (storage.dtype, storage.num_elements) == (dtype, identity[4])
        _require(same, f"describes storage {identity[2][:20]!r} in two ways")
        self.stack.append(storage)
