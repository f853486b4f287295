"""Which subnet of a supernet the command line means: a name, JSON, or a file with JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ACCEPTED = "default, max, min, whole, a JSON object or a .json file"


def subnet_choice(text: str | None) -> str | Mapping[str, Any] | None:
    """Returns what ``load_model(subnet=…)`` takes.

    Args:
        text: ``default``, ``max``, ``min``, ``whole``; a JSON object; or the name of a .json file that holds one.

    Raises:
        ValueError: Neither a word nor a JSON object; or the file does not exist.
    """
    if text is None or not (text.lstrip().startswith("{") or text.endswith(".json")):
        return text
    if text.endswith(".json"):
        path = Path(text)
        if not path.is_file():
            raise ValueError(f"--subnet {text}: there is no such file")
        text = path.read_text()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--subnet is not JSON ({error}); accepted: {ACCEPTED}") from error
    if not isinstance(value, dict):
        raise ValueError(f"--subnet holds a {type(value).__name__}; accepted: {ACCEPTED}")
    return value
