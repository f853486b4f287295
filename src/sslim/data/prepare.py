"""``prepare``: a source becomes a corpus folder, whatever happens in between.

Threads read audio and compute features (both release the interpreter's lock); this module takes their results in the order of
the source and writes them, so the corpus has the same bytes for any number of threads, interrupted or not.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from sslim.audio import read_audio
from sslim.batch import Padded
from sslim.config import read_json, to_plain
from sslim.data import corpus as layout
from sslim.data.corpus import Corpus
from sslim.data.corpus_writer import PARTIAL_INDEX, CorpusWriter, Progress, begun, chain_id, only_writer
from sslim.data.feature_presets import MELHUBERT
from sslim.data.source_kinds import SOURCES, detect_source, load_source, merge_sources
from sslim.data.sources import Source, SourceLabels, SourceUtterance
from sslim.data.speaker_means import SpeakerMeans, check_speakers, measure_speaker_means
from sslim.data.store import SHARD_BYTES, OverflowingFeaturesError, to_float16
from sslim.frontends import RunningStatistics, SpectralFrontend, build_frontend
from sslim.frontends.config import SpectralFrontendConfig, StoredFeaturesConfig
from sslim.storage import atomic_file, save_tensors

__all__ = ["SOURCES", "Outcome", "TooManyBadError", "detect_source", "finished", "load_source", "merge_sources", "prepare"]

R = TypeVar("R")

COMMIT_PERIOD_S = 5.0  # at most this much work is lost to an interruption
IN_FLIGHT_PER_JOB = 16  # utterances waiting for their turn; hides a long one among short ones
STATISTICS_FRAMES = 65536  # measured at a time: float64 copies of hours of features would take gigabytes
NUM_REASONS_SHOWN = 3
MEASURED = "measured on this corpus"


class TooManyBadError(ValueError):
    """More unreadable utterances than ``max_bad`` allows; the corpus is unfinished and can be continued."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a preparation did.

    Attributes:
        corpus: The finished corpus.
        already_finished: It was there before; nothing was done.
        num_continued: Utterances done by earlier, interrupted runs.
        seconds: Wall-clock time of this run.
        missing_labels: Utterances without labels, by label set.
    """

    corpus: Corpus
    already_finished: bool = False
    num_continued: int = 0
    seconds: float = 0.0
    missing_labels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Read:
    """An utterance that was read: float16 features (None without), its frames and samples, and its share of the statistics."""

    features_TF: np.ndarray | None
    num_frames: int
    num_samples: int
    statistics: RunningStatistics


# ---- the folder ------------------------------------------------------------------------------------------------------


def finished(folder: Path, origin: Mapping[str, Any]) -> bool:
    """Tells whether a folder is already the corpus that ``origin`` describes; an unfinished or new one is not.

    Raises:
        ValueError: The folder was made from something else (the sentence names the difference), or holds other files.
    """
    description, journal = folder / layout.DESCRIPTION, folder / layout.PREPARATION
    if journal.is_file():
        recorded = read_json(journal)["signature"]
    elif description.is_file():
        recorded = read_json(description).get("origin")
    else:
        foreign = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
        if foreign:
            raise ValueError(f"{folder} is no corpus and holds other files ({foreign[0]}): choose a new or empty folder")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: choose a new or empty folder")
        return False
    difference = _difference(recorded, dict(origin))
    if difference is not None:
        raise ValueError(f"{folder} was prepared with {difference}: choose another folder, or delete this one to start again")
    return not journal.is_file()


def _difference(old: Any, new: Any, name: str = "") -> str | None:
    """The first value that differs, as ``NAME OLD, now it is NEW``; None when all are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            found = _difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
            if found is not None:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        found_at = (_difference(a, b, f"{name} {i}") for i, (a, b) in enumerate(zip(old, new, strict=True), start=1))
        return next((found for found in found_at if found is not None), None)
    return None if old == new else f"{name} {_shown(old)}, now it is {_shown(new)}"


def _shown(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, (dict, list)) else "not set" if value is None else repr(value)


# ---- reading, in threads ---------------------------------------------------------------------------------------------


def _read(utterance: SourceUtterance, frontend: SpectralFrontend | None, means: SpeakerMeans | None = None) -> _Read | str:
    """Reads one utterance; returns the reason when it is unusable.

    Raises:
        OverflowingFeaturesError: The features do not fit the store.
    """
    base = _read_base(utterance, frontend)
    if isinstance(base, str):
        return base
    values_TF, num_samples = base
    if frontend is None or values_TF is None:
        return _Read(features_TF=None, num_frames=0, num_samples=num_samples, statistics=RunningStatistics())
    if means is not None:
        values_TF = means.without(values_TF, utterance)
    try:
        return _measured(values_TF, num_samples, frontend)
    except OverflowingFeaturesError as error:
        raise OverflowingFeaturesError(f"utterance {utterance.id}: {error}") from error
    except ValueError as error:
        return str(error)


def _read_base(utterance: SourceUtterance, frontend: SpectralFrontend | None) -> tuple[np.ndarray | None, int] | str:
    """Returns base features (T, F) float32, a speaker's mean included, and samples; or the reason why there are none."""
    try:
        if utterance.read_features is not None and frontend is not None:
            values_TF = _stored_features(utterance, frontend)
            return values_TF, len(values_TF) * frontend.features.shift
        if utterance.audio is None:
            return "it has features only, no audio"
        waveform_S = read_audio(
            utterance.audio, sample_rate=_sample_rate(frontend), start_s=utterance.start_s, duration_s=utterance.duration_s
        )
        if len(waveform_S) == 0:
            return "it has no samples"
        if frontend is None:
            return None, len(waveform_S)
        if frontend.num_base_frames(len(waveform_S)) == 0:
            return f"{len(waveform_S)} samples are too short for a frame of {frontend.features.frame_length}"
        with torch.inference_mode():
            base = frontend.features(torch.from_numpy(waveform_S)[None], torch.tensor([len(waveform_S)]))
        return base.values[0].numpy(), len(waveform_S)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return reason.removeprefix(f"{utterance.audio}: ")  # the list has a column for the path


def _speaker_means(source: Source, frontend: SpectralFrontend | None, jobs: int) -> SpeakerMeans | None:
    """Reads everything once, where the features are to lack their speaker's mean."""
    if frontend is None or frontend.config.normalization.kind != "speaker":
        return None
    check_speakers(source.utterances, source.name)

    def read(utterance: SourceUtterance) -> np.ndarray | str:
        base = _read_base(utterance, frontend)
        return base if isinstance(base, str) else np.asarray(base[0])

    return measure_speaker_means(_in_order(read, source.utterances, jobs))


def _stored_features(utterance: SourceUtterance, frontend: SpectralFrontend) -> np.ndarray:
    assert utterance.read_features is not None
    values_TF = np.asarray(utterance.read_features(), dtype=np.float32)
    if values_TF.ndim != 2 or values_TF.shape[1] != frontend.base_dim:
        raise ValueError(f"its features have shape {values_TF.shape}, expected (frames, {frontend.base_dim})")
    if len(values_TF) == 0:
        raise ValueError("it has no frames")
    return values_TF


def _measured(values_TF: np.ndarray, num_samples: int, frontend: SpectralFrontend) -> _Read:
    """Rounds to float16 and measures what was rounded, deltas included."""
    rounded_TF = to_float16(values_TF)
    statistics = RunningStatistics()
    values = torch.from_numpy(rounded_TF.astype(np.float32))[None]
    unnormalized = frontend.unnormalized(Padded(values=values, lengths=torch.tensor([len(rounded_TF)]))).values
    for part_TF in unnormalized[0].split(STATISTICS_FRAMES):
        statistics.add(part_TF)
    return _Read(features_TF=rounded_TF, num_frames=len(rounded_TF), num_samples=num_samples, statistics=statistics)


def _in_order(
    read: Callable[[SourceUtterance], R], utterances: Iterable[SourceUtterance], jobs: int
) -> Iterator[tuple[SourceUtterance, R]]:
    """Yields (utterance, result) in the order of ``utterances`` while ``jobs`` threads work ahead a bounded way."""
    pending: deque[tuple[SourceUtterance, Future[R]]] = deque()
    # One thread of arithmetic in each worker: several workers are faster than several threads of a small transform.
    executor = ThreadPoolExecutor(jobs, thread_name_prefix="prepare", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for utterance in utterances:
            pending.append((utterance, executor.submit(read, utterance)))
            if len(pending) >= IN_FLIGHT_PER_JOB * jobs:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def available_cores() -> int:
    """Returns the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- the whole -------------------------------------------------------------------------------------------------------


def prepare(
    source: Source | Callable[[], Source],
    folder: str | Path,
    frontend_config: SpectralFrontendConfig | None = MELHUBERT,
    *,
    max_bad: float = 0.01,
    jobs: int | None = None,
    origin: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    commit_period_s: float = COMMIT_PERIOD_S,
    on_progress: Callable[[Progress, int, int], None] | None = None,
) -> Outcome:
    """Makes a corpus folder, continues an unfinished one, or finds that it is finished.

    Args:
        source: What to read; a function is called only when there is something to do.
        folder: The corpus.
        frontend_config: Features to compute from audio; None stores no features. A source of stored features has its own.
        max_bad: Share of the utterances that may be unreadable; one may always be, unless it is 0.
        jobs: Threads that read; as many as there are cores by default. No influence on the result.
        origin: Everything that decides the result, plain JSON values; a folder with another origin is refused.
        shard_bytes: Size at which a feature file is closed.
        commit_period_s: Seconds between the points from which an interrupted run continues.
        on_progress: Called with the progress, the number of utterances and the sample rate: at the start and after each
            utterance.

    Raises:
        TooManyBadError: Too many utterances are unreadable; a run with a higher ``max_bad`` continues.
        ValueError: The folder holds something else, two utterances have the same id, or the source has changed.
    """
    started = time.monotonic()
    folder = Path(os.path.abspath(folder))
    _check_arguments(max_bad, jobs)
    if origin is None:
        origin = {"source": "" if callable(source) else source.name, "frontend": _plain(frontend_config)}
    if finished(folder, origin):
        (folder / PARTIAL_INDEX).unlink(missing_ok=True)  # where the last run was killed just before its end
        return Outcome(corpus=Corpus.open(folder), already_finished=True)
    folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder), begun(folder, origin):
        source, frontend = _opened(source, frontend_config)
        jobs = jobs or available_cores()
        means = _speaker_means(source, frontend, jobs)
        writer = CorpusWriter(folder, dim=0 if frontend is None else frontend.base_dim, shard_bytes=shard_bytes)
        num_continued = writer.progress.num_seen
        try:
            read = partial(_read, frontend=frontend, means=means)
            _write_utterances(writer, source, read, _sample_rate(frontend), max_bad, jobs, commit_period_s, on_progress)
            _write_description(writer, source, frontend)
            missing = {name: _write_labels(folder, name, labels) for name, labels in source.labels.items()}
            writer.finish()
        finally:
            writer.close()
    return Outcome(
        corpus=Corpus.open(folder),
        num_continued=num_continued,
        seconds=time.monotonic() - started,
        missing_labels=missing,
    )


def _opened(
    source: Source | Callable[[], Source], frontend_config: SpectralFrontendConfig | None
) -> tuple[Source, SpectralFrontend | None]:
    """The source, read where it is a function, and the front-end of its features."""
    source = source() if callable(source) else source
    config = source.frontend or frontend_config
    if source.frontend is None and config is not None and isinstance(config.features, StoredFeaturesConfig):
        raise ValueError(f"{config.features.name} features cannot be computed from audio, and {source.name} stores none")
    if config is not None and config.normalization.kind == "speaker":
        source = replace(source, utterances=list(source.utterances))  # read twice
    return source, None if config is None else build_frontend(config).eval()


def _check_arguments(max_bad: float, jobs: int | None) -> None:
    if not 0 <= max_bad <= 1:
        raise ValueError(f"max_bad is {max_bad:g}, it must be a share between 0 and 1")
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs is {jobs}, it must be at least 1")


def _sample_rate(frontend: SpectralFrontend | None) -> int:
    return layout.WAVEFORM_SAMPLE_RATE if frontend is None else frontend.sample_rate


def _plain(config: SpectralFrontendConfig | None) -> Any:
    return None if config is None else to_plain(config)


def _write_utterances(
    writer: CorpusWriter,
    source: Source,
    read: Callable[[SourceUtterance], _Read | str],
    sample_rate: int,
    max_bad: float,
    jobs: int,
    commit_period_s: float,
    on_progress: Callable[[Progress, int, int], None] | None,
) -> None:
    total = source.num_utterances
    limit = 0 if max_bad == 0 else max(1, int(max_bad * total + 1e-9))
    progress = writer.progress
    statistics = RunningStatistics() if progress.statistics is None else RunningStatistics.from_plain(progress.statistics)
    if on_progress is not None:
        on_progress(progress, total, sample_rate)
    _check_bad(writer, limit, total, max_bad)
    committed = time.monotonic()
    results = _in_order(read, _remaining(writer, source), jobs)
    try:
        for utterance, result in results:
            if isinstance(result, str):
                writer.quarantine(utterance, result)
            else:
                writer.add(utterance, result.features_TF, num_frames=result.num_frames, num_samples=result.num_samples)
                statistics.merge(result.statistics)
            if on_progress is not None:
                on_progress(progress, total, sample_rate)
            too_many = progress.num_quarantined > limit
            if too_many or time.monotonic() - committed >= commit_period_s:
                writer.commit(statistics.to_plain())
                committed = time.monotonic()
            if too_many:
                _check_bad(writer, limit, total, max_bad)
    finally:
        results.close()  # type: ignore[attr-defined]  # ends the threads now, not when the generator is collected
    if progress.num_kept == 0:
        raise ValueError(
            f"nothing of {source.name} can be read: see {writer.folder / layout.QUARANTINE}, or no utterances were found"
        )
    writer.commit(statistics.to_plain())


def _check_bad(writer: CorpusWriter, limit: int, total: int, max_bad: float) -> None:
    bad = writer.progress.num_quarantined
    if bad <= limit:
        return
    reasons = [f"{entry['path']}: {entry['reason']}" for entry in writer.first_quarantined(NUM_REASONS_SHOWN)]
    first = "; ".join([*reasons, "…"] if bad > len(reasons) else reasons)
    raise TooManyBadError(
        f"{bad} of {total:,} utterances cannot be read and --max-bad {max_bad:g} allows {limit} ({first}): "
        f"run again with a higher --max-bad to continue, the whole list is {writer.folder / layout.QUARANTINE}"
    )


def _remaining(writer: CorpusWriter, source: Source) -> Iterator[SourceUtterance]:
    """Yields the utterances not yet seen; checks all ids, those of the past against what was seen then.

    Raises:
        ValueError: An id comes twice, or the source is no longer what it was.
    """
    num_seen, expected = writer.progress.num_seen, writer.progress.ids_sha256
    digest = Progress().ids_sha256
    where: dict[str, str] = {}
    count = 0
    for count, utterance in enumerate(source.utterances, start=1):
        place = str(utterance.audio or f"utterance {count}")
        if utterance.id in where:
            raise ValueError(f"the id {utterance.id!r} comes twice in {source.name}: {where[utterance.id]} and {place}")
        where[utterance.id] = place
        if count > num_seen:
            yield utterance
            continue
        digest = chain_id(digest, utterance.id)
        if count == num_seen and digest != expected:
            raise ValueError(_changed(writer, source))
    if count < num_seen:
        raise ValueError(_changed(writer, source))


def _changed(writer: CorpusWriter, source: Source) -> str:
    return (
        f"{source.name} has changed since this preparation was interrupted (its first {writer.progress.num_seen:,} utterances "
        f"are others now): delete {writer.folder} and start again"
    )


def _write_description(writer: CorpusWriter, source: Source, frontend: SpectralFrontend | None) -> None:
    statistics_source = None
    if frontend is not None and writer.progress.statistics is not None:
        statistics_source = _write_statistics(writer, source, frontend)
    sample_rate = _sample_rate(frontend)
    counts = writer.write_index()
    writer.write_description(
        {
            "format_version": layout.FORMAT_VERSION,
            "name": source.name,
            **counts,
            "duration_s": counts["num_samples"] / sample_rate,
            "sample_rate": sample_rate,
            "base_dim": 0 if frontend is None else frontend.base_dim,
            "base_frame_shift_s": 0.0 if frontend is None else frontend.base_frame_shift_s,
            "frontend": None if frontend is None else to_plain(frontend.config),
            "statistics": statistics_source,
            "origin": writer.signature,
            "note": source.note,
        }
    )


def _write_statistics(writer: CorpusWriter, source: Source, frontend: SpectralFrontend) -> str:
    """Writes the published statistics where there are some, otherwise those measured; returns where they come from."""
    assert writer.progress.statistics is not None
    measured = RunningStatistics.from_plain(writer.progress.statistics)
    mean_F, std_F = measured.result()
    name = MEASURED
    if source.statistics is not None:
        published_mean, published_std, name = source.statistics
        dim = frontend.normalized_dim
        if np.shape(published_mean) != (dim,) or np.shape(published_std) != (dim,):
            raise ValueError(f"the statistics {name} are for {np.size(published_mean)} features, {source.name} has {dim}")
        mean_F, std_F = (torch.as_tensor(np.asarray(values, dtype=np.float32)) for values in (published_mean, published_std))
    path = writer.folder / layout.STATISTICS
    with atomic_file(path) as temporary:
        save_tensors(temporary, {"mean": mean_F, "std": std_F, "count": torch.tensor(measured.count)})
    return name


def _write_labels(folder: Path, name: str, labels: SourceLabels) -> int:
    """Writes a label set for the utterances of the described corpus and returns how many have none.

    Labels that are missing or unreadable leave their utterance without labels; ``sslim doctor`` and training name them.
    """
    import hashlib
    import json

    from sslim.data.labels import LabelStore

    kind = np.min_scalar_type(labels.num_clusters)
    by_utterance: list[np.ndarray | None] = []
    with (folder / layout.MANIFEST).open("rb") as manifest:
        for line in manifest:
            try:
                values = np.asarray(labels.read(json.loads(line)["id"]))
            except (KeyError, ValueError, OSError):
                by_utterance.append(None)
                continue
            usable = values.ndim == 1 and values.size > 0 and values.min() >= 0 and values.max() < labels.num_clusters
            by_utterance.append(values.astype(kind) if usable else None)
    num_missing = sum(values is None for values in by_utterance)
    LabelStore.write(
        folder / layout.LABELS / name,
        by_utterance,
        frame_period_s=labels.frame_period_s,
        num_clusters=labels.num_clusters,
        corpus_digest=hashlib.sha256((folder / layout.DESCRIPTION).read_bytes()).hexdigest(),
        origin=dict(labels.origin),
        quality={"num_missing": num_missing},
    )
    return num_missing
