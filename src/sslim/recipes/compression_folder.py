"""The folder of a compression: whose it is, so that the same command goes on and another one is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sslim import __version__
from sslim.config import read_json
from sslim.data.corpus import Corpus
from sslim.objectives import model_digest
from sslim.recipes.distil import NamedTeacher
from sslim.storage import write_json

PLAN = "pipeline.json"


def claim(
    output: Path,
    kind: str,
    plan: Any,
    model: NamedTeacher,
    corpus_folder: Path | None,
    *,
    compared: Callable[[Any, Any], tuple[Any, Any]] = lambda old, new: (old, new),
) -> bool:
    """Notes what a folder is for, or compares that with what it was for; devices may differ.

    Args:
        output: The folder; made when it is missing. One in which nothing was made yet can be claimed anew.
        kind: What the plan is, ``pipeline`` or ``recipe``.
        plan: Plain JSON values that decide the result.
        model: What is compressed.
        corpus_folder: The corpus, if there is one.
        compared: The folder's plan and the new one to what of both has to be equal.

    Returns:
        Whether the folder had another plan so far.

    Raises:
        ValueError: The folder holds another compression, or something else, or is a file.
    """
    if output.is_file():
        raise ValueError(f"{output} is a file; --output names a folder")
    corpus = None if corpus_folder is None else Corpus.open(corpus_folder)
    values = {
        "format_version": 1,
        "kind": "compression",
        "sslim": __version__,
        kind: plan,
        "model": {"name": model.name, "digest": model_digest(model.model)},
        "corpus": None if corpus is None else {"folder": str(corpus.path), "digest": corpus.digest},
    }
    path, new = output / PLAN, json.loads(json.dumps(plan))
    before = read_json(path) if path.is_file() else None
    if before is None and _is_used(output):
        raise ValueError(f"{output} is not empty and holds no compression: choose another --output")
    if before is not None and _is_used(output):
        for key in ("model", "corpus"):
            if _identity(before.get(key)) != _identity(values[key]):
                raise ValueError(f"{output} holds the compression of another {key}: choose another --output, or delete it")
        change = "of another kind" if kind not in before else _change(*compared(before[kind], new))
        if change is not None:
            raise ValueError(
                f"{output} holds the compression of another {kind} ({change}): choose another --output, or delete it"
            )
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, values)
    return before is not None and _change(before.get(kind), new) is not None


def _is_used(output: Path) -> bool:
    """Whether there is anything but the plan, and hidden files, such as a killed process leaves."""
    return output.exists() and any(not path.name.startswith(".") and path.name != PLAN for path in output.iterdir())


def _identity(value: Any) -> Any:
    """Digests tell models and corpora; their names and folders may change."""
    return value["digest"] if isinstance(value, Mapping) and "digest" in value else value


def _change(old: Any, new: Any, place: str = "") -> str | None:
    """Tells the first place where a new plan is not the old one, devices left out."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        parts = [(old.get(key), new.get(key), f"{place}.{key}".lstrip(".")) for key in keys if key != "device"]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        parts = [(before, after, f"{place}[{number}]") for number, (before, after) in enumerate(zip(old, new, strict=True), 1)]
    else:
        return None if old == new else f"{place} is {_shown(old)} there and {_shown(new)} here"
    return next((change for part in parts if (change := _change(*part)) is not None), None)


def _shown(value: Any) -> str:
    return f"of {len(value)} parts" if isinstance(value, Mapping | list) else json.dumps(value)
