"""Strict reading and writing of configurations: frozen dataclasses to plain JSON values and back.

Every configuration in sslim is a frozen, keyword-only dataclass that lives beside the class it configures. Reading is strict:
an unknown key or a value of the wrong type is an error that names the key, the value and the nearest accepted name. cattrs does
the walking over types; this module only tells it to be strict and turns its errors into one sentence.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from cattrs import Converter

C = TypeVar("C")

OMIT_DEFAULT = "omit_default"  # key of a field's metadata: left out of the plain values while it has its default


class ConfigError(ValueError):
    """A configuration that cannot be read; the message is one sentence for the user."""


def _strict_number(kind: type) -> Any:
    def structure(value: Any, _: type) -> Any:
        if isinstance(value, bool) is not (kind is bool):
            raise TypeError(f"expected {kind.__name__}, got {value!r}")
        if kind is float and isinstance(value, int):
            return float(value)
        if not isinstance(value, kind):
            raise TypeError(f"expected {kind.__name__}, got {value!r}")
        return value

    return structure


def _kinds(union: Any) -> dict[str, type]:
    """Returns the members of a union of dataclasses by their ``kind``; empty for any other type."""
    if get_origin(union) not in (Union, types.UnionType):
        return {}
    members = [member for member in get_args(union) if member is not type(None)]
    if len(members) < 2 or not all(is_dataclass(member) for member in members):
        return {}
    return {get_args(get_type_hints(member)["kind"])[0]: member for member in members}


def _structure_tagged(value: Any, union: Any) -> Any:
    """Reads a union of dataclasses that are told apart by ``kind``.

    Values without one are of the member that does not write its own (``OMIT_DEFAULT``), as before there were others.
    """
    if value is None and type(None) in get_args(union):
        return None
    kinds = _kinds(union)
    unwritten = next((kind for kind, member in kinds.items() if "kind" in _omitted(member)), None)
    kind = value.get("kind", unwritten) if isinstance(value, dict) else None
    if kind not in kinds:
        raise TypeError(f"kind is {kind!r}, expected one of {', '.join(kinds)}{nearest(str(kind), kinds)}")
    return _converter().structure(value, kinds[kind])


@cache
def _converter() -> Converter:
    from cattrs import Converter

    converter = Converter(forbid_extra_keys=True, prefer_attrib_converters=False)
    for kind in (bool, int, float, str):
        converter.register_structure_hook(kind, _strict_number(kind))
    converter.register_structure_hook_func(lambda union: bool(_kinds(union)), _structure_tagged)
    converter.register_unstructure_hook_factory(lambda cls: bool(_omitted(cls)), lambda cls: _without_defaults(cls, converter))
    return converter


def _omitted(cls: Any) -> list[str]:
    """Names of the fields that are not written while they have their default."""
    return [field.name for field in fields(cls) if field.metadata.get(OMIT_DEFAULT)] if is_dataclass(cls) else []


def _without_defaults(cls: type, converter: Converter) -> Any:
    from cattrs.gen import make_dict_unstructure_fn, override

    return make_dict_unstructure_fn(cls, converter, **{name: override(omit_if_default=True) for name in _omitted(cls)})  # type: ignore[arg-type]


def nearest(name: str, accepted: Any) -> str:
    """Returns ``; did you mean 'x'?`` for the accepted name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(a) for a in accepted], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _sentences(error: BaseException, path: str) -> list[str]:
    """Flattens cattrs' exception groups into ``path: what is wrong``."""
    from cattrs.errors import AttributeValidationNote, ForbiddenExtraKeysError, IterableValidationNote

    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            path = f"{path}.{note.name}"
        elif isinstance(note, IterableValidationNote):
            path = f"{path}[{note.index}]"
    if isinstance(error, ForbiddenExtraKeysError):
        accepted = [field.name for field in fields(error.cl)]
        return [f"{path} has no key {key!r}{nearest(key, accepted)}" for key in sorted(error.extra_fields)]
    if isinstance(error, BaseExceptionGroup):
        return [sentence for inner in error.exceptions for sentence in _sentences(inner, path)]
    if isinstance(error, KeyError):
        return [f"{path.removesuffix('.' + str(error.args[0]))} lacks the key {error.args[0]!r}"]
    return [f"{path}: {error}"]


def from_plain(cls: type[C] | types.UnionType, values: Any, source: str = "configuration") -> C:
    """Builds ``cls`` from plain JSON values.

    Args:
        cls: A dataclass, or a union of dataclasses that are told apart by a ``kind`` literal.
        values: Nested dictionaries, lists, numbers and strings.
        source: What to call the whole in an error, for example the file's name.

    Raises:
        ConfigError: Unknown key, missing key, or value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source} holds a {type(values).__name__}, expected an object with keys")
    try:
        return _converter().structure(values, cls)  # type: ignore[arg-type]
    except Exception as error:
        raise ConfigError("; ".join(_sentences(error, source))) from error


def to_plain(config: Any) -> Any:
    """Returns ``config`` as nested dictionaries, lists, numbers and strings."""
    return _converter().unstructure(config)


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        ConfigError: The file is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a JSON file ({error})") from error


def dump_json(values: Any) -> str:
    """Returns the one JSON text that sslim writes: indented, key order kept, newline at the end."""
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def override(config: C, values: Mapping[str, Any], source: str = "override") -> C:
    """Returns ``config`` with the top-level ``values`` replaced, checked as strictly as when it is read."""
    plain = to_plain(config)
    unknown = [key for key in values if key not in plain]
    if unknown:
        raise ConfigError(f"{source} has no key {unknown[0]!r}{nearest(unknown[0], plain)}")
    return from_plain(type(config), {**plain, **values}, source)
