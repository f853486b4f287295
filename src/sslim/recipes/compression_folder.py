"""The folder of a compression: whose it is, so that the same command goes on and another one is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sslim import __version__
from sslim.config import read_json
from sslim.data.corpus import Corpus
from sslim.objectives import model_digest
from sslim.recipes.distil import NamedTeacher
from sslim.storage import write_json

PLAN = "pipeline.json"


def claim(output: Path, kind: str, plan: Any, model: NamedTeacher, corpus_folder: Path | None) -> None:
    """Notes what a folder is for, or compares that with what it was for.

    Args:
        output: The folder; made when it is missing.
        kind: What the plan is, ``pipeline`` or ``recipe``.
        plan: Plain JSON values that decide the result.
        model: What is compressed.
        corpus_folder: The corpus, if there is one.

    Raises:
        ValueError: The folder holds another compression, or something else.
    """
    corpus = None if corpus_folder is None else Corpus.open(corpus_folder)
    values = {
        "format_version": 1,
        "kind": "compression",
        "sslim": __version__,
        kind: plan,
        "model": {"name": model.name, "digest": model_digest(model.model)},
        "corpus": None if corpus is None else {"folder": str(corpus.path), "digest": corpus.digest},
    }
    path = output / PLAN
    if path.is_file():
        before = read_json(path)
        for key in (kind, "model", "corpus"):
            if _identity(before.get(key)) != _identity(json.loads(json.dumps(values[key]))):
                raise ValueError(f"{output} holds the compression of another {key}: choose another --output, or delete it")
        return
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and holds no compression: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, values)


def _identity(value: Any) -> Any:
    """Digests tell models and corpora; their names and folders may change."""
    return value["digest"] if isinstance(value, Mapping) and "digest" in value else value
