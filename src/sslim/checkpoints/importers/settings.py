"""Reads the settings of foreign checkpoints: dictionaries, namespaces, omegaconf; lenient with numbers, else strict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sslim.checkpoints.pickle_values import Placeholder
from sslim.checkpoints.restricted_pickle import CheckpointError

ACTIVATIONS = {  # fairseq's and S3PRL's names -> native ones
    "gelu": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "swish": "swish",
    "tanh": "tanh",
    "linear": "linear",
}
_MAX_NESTING = 32


class Settings:
    """Settings by name with the reference's defaults; lenient numbers but strict booleans.

    Args:
        values: The settings; names nobody asks for are ignored.
        source: The file's name, for errors.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def number(self, name: str, default: float, *, low: float = 0.0, high: float = float("inf")) -> float:
        value = self.values.get(name, default)
        try:
            number = float(value) if isinstance(value, int | float | str) else float("nan")
        except (ValueError, OverflowError):
            number = float("nan")
        if not low <= number <= high:
            raise CheckpointError(
                f"{self.source}: its setting {name} is {short(value)}, expected a number from {low:g} to {high:g}"
            )
        return number

    def count(self, name: str, default: int, *, low: int = 1, high: int = 1 << 20) -> int:
        number = self.number(name, default, low=low, high=high)
        if number != int(number):
            raise CheckpointError(f"{self.source}: its setting {name} is {number}, expected a whole number")
        return int(number)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool | int) or value not in (True, False):
            raise CheckpointError(f"{self.source}: its setting {name} is {short(value)}, expected true or false")
        return bool(value)

    def choice(self, name: str, default: str, accepted: Mapping[str, str]) -> Any:
        value = self.values.get(name, default)
        if not isinstance(value, str) or value not in accepted:
            raise CheckpointError(f"{self.source}: its setting {name} is {short(value)}, expected one of {', '.join(accepted)}")
        return accepted[value]


def state_of(args: Any) -> Mapping[str, Any]:
    """Returns the settings of a dictionary or of a pickled ``argparse.Namespace``; empty for anything else."""
    state = args.state if isinstance(args, Placeholder) else args
    return state if isinstance(state, dict) else {}


def settings_of(value: Any, depth: int = 0) -> Any:
    """Returns plain containers for settings as fairseq pickles them: dictionaries, ``argparse.Namespace``, omegaconf.

    An omegaconf container keeps its items under ``_content``, a leaf its value under ``_val`` (omegaconf 2.0 to 2.3). Objects
    of any other class stay the placeholders they are.
    """
    if depth > _MAX_NESTING:
        return value
    if isinstance(value, Placeholder) and isinstance(value.state, dict):
        if value.module.startswith("omegaconf") and ("_content" in value.state or "_val" in value.state):
            return settings_of(value.state.get("_content", value.state.get("_val")), depth + 1)
        if (value.module, value.name) == ("argparse", "Namespace"):
            return settings_of(value.state, depth + 1)
        return value
    if isinstance(value, Placeholder) and value.args and value.name != "Namespace" and not value.state:
        return settings_of(value.args[0], depth + 1) if isinstance(value.args[0], str) else value  # an enumeration's member
    if isinstance(value, dict):
        return {key: settings_of(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [settings_of(item, depth + 1) for item in value]
    return value


def plain(value: Any) -> Any:
    """JSON values of foreign settings; anything else becomes its text."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, dict):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Placeholder) and value.module == "pathlib":
        return "/".join(part for part in value.args if isinstance(part, str))
    return str(value).encode(errors="replace").decode()


def short(value: Any) -> str:
    """The value as an error shows it."""
    return repr(value)[:40]
