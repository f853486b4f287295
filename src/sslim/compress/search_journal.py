"""The journal of a search: a line for each evaluation, so that a search that was killed goes on without repeating any.

The first line is the search's settings; another search in the same folder is refused. Each further line is an evaluated subnet.
Lines are synced one by one. A last line that was torn when the process died is cut off.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslim.config import from_plain, to_plain
from sslim.models.search_space import Subnet
from sslim.storage import sync, write_text_atomically

JOURNAL = "journal.jsonl"


@dataclass(frozen=True, kw_only=True)
class Fitness:
    """How good a subnet is; smaller is better.

    Attributes:
        loss: What the search minimises; infinite for a subnet whose loss is not finite.
        halves: The loss on two disjoint halves of the validation data, to judge the ranking by; may be empty.
    """

    loss: float
    halves: tuple[float, ...] = ()


class SearchJournal:
    """Evaluations on disk.

    Args:
        folder: Where; made if missing. None keeps nothing.
        settings: Everything that decides the search's course, plain JSON values.
        may_grow: Dotted names of settings that may differ from the first writing (the number of generations).

    Attributes:
        known: What has been evaluated.
        num_read: How many of these an earlier process did.

    Raises:
        ValueError: The folder holds another search, or a line in the middle cannot be read.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], may_grow: tuple[str, ...] = ()) -> None:
        self.known: dict[Subnet, Fitness] = {}
        self.path = None if folder is None else folder / JOURNAL
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            header = json.loads(json.dumps(dict(settings)))
            if self.path.is_file():
                self._read(self.path, header, may_grow)
            else:
                write_text_atomically(self.path, json.dumps(header, ensure_ascii=False) + "\n")
        self.num_read = len(self.known)

    def add(self, subnet: Subnet, fitness: Fitness) -> None:
        """Keeps an evaluation, on disk before this returns."""
        self.known[subnet] = fitness
        if self.path is None:
            return
        row = {"subnet": to_plain(subnet), "loss": _plain(fitness.loss), "halves": [_plain(half) for half in fitness.halves]}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path, header: Mapping[str, Any], may_grow: tuple[str, ...]) -> None:
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        lines = whole.decode("utf-8", errors="replace").split("\n")
        try:
            rows = [json.loads(line) for line in lines]
            if len(rows) == 1 and not torn:  # nothing was evaluated: nothing is lost
                write_text_atomically(path, json.dumps(header, ensure_ascii=False) + "\n")
                return
            if (different := _difference(rows[0], header, may_grow)) is not None:
                raise ValueError(f"{path.parent} holds another search ({different}); choose another --output")
            for row in rows[1:]:
                subnet = from_plain(Subnet, row["subnet"], path.name)
                self.known[subnet] = Fitness(loss=_number(row["loss"]), halves=tuple(map(_number, row["halves"])))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a journal that this search wrote ({error}); choose another --output") from error
        if torn:
            with path.open("r+b") as file:
                file.truncate(len(whole) + 1)
            sync(path)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.inf if value is None else float(value)


def _difference(old: Any, new: Any, may_grow: tuple[str, ...], name: str = "") -> str | None:
    """Names the first setting that differs."""
    if name in may_grow or old == new:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            if (found := _difference(old.get(key), new.get(key), may_grow, f"{name}.{key}" if name else key)) is not None:
                return found
        return None
    return f"{name} was {_short(old)}, now {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
