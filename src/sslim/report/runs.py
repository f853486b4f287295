"""What a run left behind: its configuration, its curves, and what happened on the way."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sslim.config import read_json
from sslim.report.example import Example, load_example
from sslim.report.restoration import Restoration, load_restoration

CONFIG, METRICS = "run.json", "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run.

    Attributes:
        path: Its folder.
        config: The resolved configuration, plain JSON values; empty when it is not there.
        curves: (kind, metric) to {step: value}; kind is ``train`` or ``valid``.
        events: What is not a curve, in order: sentinels, skipped steps, resumptions.
        example: An utterance to draw, with its clusters.
        restoration: An utterance to draw, before and after reconstruction.
    """

    path: Path
    config: dict[str, Any]
    curves: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)
    events: tuple[dict[str, Any], ...] = ()
    example: Example | None = None
    restoration: Restoration | None = None

    @property
    def last_step(self) -> int:
        """The last step that any curve has."""
        return max((max(points) for points in self.curves.values() if points), default=0)

    def last(self, kind: str, metric: str) -> float | None:
        """The last value of a curve; None when there is no such curve."""
        points = self.curves.get((kind, metric))
        return points[max(points)] if points else None

    def names(self, *words: str) -> list[tuple[str, str]]:
        """The curves whose metric contains one of ``words``, in order of appearance."""
        return [key for key in self.curves if any(word in key[1] for word in words)]


def is_run(path: Path) -> bool:
    """Whether a folder is one of a training run."""
    return (path / METRICS).is_file() or (path / CONFIG).is_file()


def is_card(path: Path) -> bool:
    """Whether a file is a result card."""
    if path.suffix != ".json" or not path.is_file():
        return False
    values = read_json(path)
    return isinstance(values, dict) and "task" in values and "rows" in values


def read_run(path: Path) -> Run:
    """Reads a run's folder.

    Raises:
        ValueError: A file in it is not what it should be.
    """
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path / CONFIG} holds {type(config).__name__}, expected an object")
    curves: dict[tuple[str, str], dict[int, float]] = {}
    events: list[dict[str, Any]] = []
    for row in read_metrics(path / METRICS):
        kind = str(row.get("kind", "train"))
        if kind not in ("train", "valid"):
            events.append(row)
            continue
        for metric, value in row.items():
            if metric not in ("step", "kind", "time") and isinstance(value, int | float) and not isinstance(value, bool):
                curves.setdefault((kind, metric), {})[row["step"]] = float(value)
    rising = {key: dict(sorted(points.items())) for key, points in curves.items()}
    shown = {"example": load_example(path), "restoration": load_restoration(path)}
    return Run(path=path, config=config, curves=rising, events=tuple(events), **shown)  # type: ignore[arg-type]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads JSON lines; a last line that was cut off when the run was killed is left out.

    A step that a resumed run wrote again replaces the first writing, because curves are kept by step.

    Raises:
        ValueError: A line that is not the last is not a JSON object with a step.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}, line {number}: expected an object with a whole-number step")
        rows.append(row)
    return rows


def flatten(values: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Returns nested JSON values as (dotted name, value); lists of plain values stay one value."""
    if isinstance(values, dict):
        return [pair for key, value in values.items() for pair in flatten(value, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(values, list) and any(isinstance(value, dict) for value in values):
        if len(values) > 1 and all(value == values[0] for value in values):
            return flatten(values[0], f"{prefix}[0..{len(values) - 1}]")
        return [pair for index, value in enumerate(values) for pair in flatten(value, f"{prefix}[{index}]")]
    if isinstance(values, list):
        return [(prefix, ", ".join(map(str, values)))]
    return [(prefix, values)]


def is_finite(value: Any) -> bool:
    """Whether a JSON value is a usable number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
