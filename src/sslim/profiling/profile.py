"""The result of ``sslim profile``: what models cost and how much faster than a dense one they are, as one JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np

from sslim.config import from_plain, read_json, to_plain
from sslim.profiling.latency import Conditions
from sslim.storage import write_json

FORMAT_VERSION = 1
KIND: Literal["profile"] = "profile"
SPARSE = 0.05  # share of zeros in the matrices from which they are no chance; int8 rounds about 2 % of a dense matrix to 0
ZEROS_NOTE = "zeros are multiplied like any number: time does not change without a sparse kernel"


@dataclass(frozen=True, kw_only=True)
class ProfiledModel:
    """What a model is, whatever it is run on.

    Attributes:
        name: In tables and pictures; distinct in a profile.
        path: Where it was read.
        digest: SHA-256 of its tensors' file, as in result cards.
        family: Of its description.
        num_parameters: Without heads.
        nonzero_parameters: Those that are not exactly zero.
        zero_share: Share of exact zeros among the entries of matrices and kernels (biases start at zero and do not count).
        file_bytes: Size of its tensors' file.
        num_layers: Block applications.
    """

    name: str
    path: str
    digest: str
    family: str
    num_parameters: int
    nonzero_parameters: int
    zero_share: float
    file_bytes: int
    num_layers: int

    @property
    def is_sparse(self) -> bool:
        """Whether single weights were pruned."""
        return self.zero_share >= SPARSE


@dataclass(frozen=True, kw_only=True)
class ProfileRow:
    """One model under one set of conditions.

    Attributes:
        model: Its name.
        conditions: Seconds, batch, threads, device.
        macs: Multiply-accumulates of the whole batch.
        macs_by_group: The same by kind of part.
        macs_per_second: MACs for each second of speech.
        times_ms: Latency in every round; equal places of all rows under equal conditions are of one round.
        p50_ms: Median over rounds.
        p95_ms: 95th percentile over rounds, interpolated.
        real_time_factor: Median latency by seconds of audio, all utterances of the batch together.
        peak_memory_bytes: See ``Profile.memory_includes``; None where not measured.
        predicted_speedup: The baseline's MACs by this model's.
        measured_speedup: The baseline's latency by this model's of the same round, median over rounds.
        speedup_quartiles: First and third quartile of the same.
    """

    model: str
    conditions: Conditions
    macs: int
    macs_by_group: dict[str, int]
    macs_per_second: float
    times_ms: tuple[float, ...]
    p50_ms: float
    p95_ms: float
    real_time_factor: float
    peak_memory_bytes: int | None = None
    predicted_speedup: float
    measured_speedup: float
    speedup_quartiles: tuple[float, float]

    def __post_init__(self) -> None:
        numbers = (self.macs, self.p50_ms, self.p95_ms, self.real_time_factor, self.predicted_speedup, self.measured_speedup)
        if not self.times_ms or not all(math.isfinite(number) and number > 0 for number in (*self.times_ms, *numbers)):
            raise ValueError(f"the row of {self.model!r} has no times, or figures that are not above 0")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Several models measured in turns in one process.

    Attributes:
        kind: Tells the file from others.
        format_version: Of the file.
        sslim: Version that wrote it.
        date: When, ISO 8601 in UTC.
        machine: Processor (and GPU), system, torch, cores.
        baseline: Name of the model that speed-ups refer to.
        memory_includes: What peak memory is.
        models: The baseline first.
        rows: For all conditions, all models.
    """

    kind: Literal["profile"] = KIND
    format_version: int = FORMAT_VERSION
    sslim: str = ""
    date: str = ""
    machine: dict[str, str] = field(default_factory=dict)
    baseline: str
    memory_includes: str = ""
    models: tuple[ProfiledModel, ...]
    rows: tuple[ProfileRow, ...]

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"the models of a profile need distinct names, these are {', '.join(names)}")
        for name in (self.baseline, *(row.model for row in self.rows)):
            if name not in names:
                raise ValueError(f"a profile of {', '.join(names) or 'no models'} has no model {name!r}")
        if not self.rows:
            raise ValueError("a profile without rows says nothing")

    @property
    def conditions(self) -> list[Conditions]:
        """The distinct conditions, in order."""
        return list(dict.fromkeys(row.conditions for row in self.rows))

    def rows_at(self, conditions: Conditions) -> list[ProfileRow]:
        """The rows of one set of conditions."""
        return [row for row in self.rows if row.conditions == conditions]

    def model(self, name: str) -> ProfiledModel:
        """The model of a row."""
        return next(model for model in self.models if model.name == name)

    @property
    def sparse_models(self) -> list[ProfiledModel]:
        """Those with single weights pruned."""
        return [model for model in self.models if model.is_sparse]

    def save(self, path: Path) -> None:
        """Writes the profile as JSON, whole or not at all; parent folders are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, to_plain(self))

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Reads a profile strictly.

        Raises:
            ValueError: The file is no profile of this version, or one with unknown, missing or senseless values.
        """
        values = read_json(path)
        if not isinstance(values, Mapping) or values.get("kind") != KIND:
            raise ValueError(f"{path} is not a result of `sslim profile`")
        if values.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} is a profile of version {values.get('format_version')!r}; this sslim reads {FORMAT_VERSION}"
            )
        return from_plain(cls, values, path.name)


def profile_row(
    model: str,
    conditions: Conditions,
    *,
    macs: int,
    macs_by_group: dict[str, int],
    times_ms: Sequence[float],
    baseline_macs: int,
    baseline_times_ms: Sequence[float],
) -> ProfileRow:
    """Returns a row whose figures follow from counts and times.

    Args:
        model: Its name.
        conditions: Of the measurement.
        macs: Of the whole batch.
        macs_by_group: The same by kind of part.
        times_ms: Of every round.
        baseline_macs: Of the baseline's whole batch.
        baseline_times_ms: Of the same rounds.
    """
    audio_s = conditions.batch * conditions.seconds
    p50_ms = median(times_ms)
    ratios = [whole / own for whole, own in zip(baseline_times_ms, times_ms, strict=True)]
    first, middle, third = np.percentile(ratios, [25, 50, 75]).tolist()
    return ProfileRow(
        model=model,
        conditions=conditions,
        macs=macs,
        macs_by_group=macs_by_group,
        macs_per_second=macs / audio_s,
        times_ms=tuple(round(time, 4) for time in times_ms),
        p50_ms=round(p50_ms, 4),
        p95_ms=round(float(np.percentile(times_ms, 95)), 4),
        real_time_factor=p50_ms / 1000 / audio_s,
        predicted_speedup=baseline_macs / macs,
        measured_speedup=middle,
        speedup_quartiles=(first, third),
    )


def describe_conditions(conditions: Conditions) -> str:
    """Returns conditions in words: ``10 s, 2 threads``, and batch and device where they are not 1 and ``cpu``."""
    words = [f"{conditions.seconds:g} s"]
    words += [f"batch {conditions.batch}"] if conditions.batch > 1 else []
    words.append(f"{conditions.threads} thread{'s' * (conditions.threads > 1)}")
    words += [conditions.device] if conditions.device != "cpu" else []
    return ", ".join(words)
