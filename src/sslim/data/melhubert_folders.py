"""Data folders of MelHuBERT as a source: Kaldi features with ``.bas`` labels and the sums for their mean and deviation.

Layouts: ``train-clean-360.scp`` beside ``*.bas``, ``*.bas.scp`` and ``*.mean-var``; or ``fbank/`` with the features beside
folders with labels (``kmeans/``, ``stage2-cluster-20ms/``). Archives may have been moved, they are then found by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from sslim.data.kaldi import (
    Locator,
    ScpEntry,
    first_dim,
    moved_note,
    precomputed_frontend,
    read_entry_shape,
    read_matrix,
    read_scp,
)
from sslim.data.label_layout import NUM_CLUSTERS, NUM_VERIFIED, LayoutError, check_labels, period_in_name
from sslim.data.label_layout import label_period_s as find_label_period_s
from sslim.data.sources import Source, SourceLabels, SourceUtterance


def read_mean_var(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads a ``.mean-var`` text file: ``[sums]``, ``[sums of squares]`` and the number of frames, each on a line.

    Returns:
        Mean and population standard deviation (F,) float64.

    Raises:
        LayoutError: It is anything else, or gives a standard deviation that is not positive.
    """
    lines = [line for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    try:
        # The brackets are JSON: parsed as numbers, never evaluated.
        sums, squares, count = (np.asarray(json.loads(line), dtype=np.float64) for line in lines)
    except ValueError as error:
        raise LayoutError(f"{path} is not three lines: [sums], [sums of squares], number of frames ({error})") from None
    if sums.ndim != 1 or sums.shape != squares.shape or count.ndim != 0 or count < 1:
        raise LayoutError(f"{path}: {sums.shape} sums, {squares.shape} sums of squares and {count} frames do not fit together")
    mean = sums / count
    variance = squares / count - mean**2
    if not (np.isfinite(mean).all() and (variance > 0).all()):
        raise LayoutError(f"{path}: the variance of feature {int(np.argmin(variance))} is {variance.min():.3g}, not positive")
    return mean, np.sqrt(variance)


def read_label_line(entry: ScpEntry, num_clusters: int = NUM_CLUSTERS) -> np.ndarray:
    """Reads the whole numbers on the line at an offset of a ``.bas`` file.

    Returns:
        int64 (T,).

    Raises:
        ValueError: The file or line is missing, is not whole numbers, or a number is not a cluster.
    """
    if entry.problem:
        raise LayoutError(entry.problem)
    try:
        with entry.path.open("rb") as file:
            file.seek(entry.offset or 0)
            line = file.readline()
    except OSError as error:
        raise LayoutError(f"{entry.key}: the labels in {entry.path} cannot be opened ({error.strerror})") from error
    where = f"{entry.key} in {entry.path} at byte {entry.offset or 0}"
    try:
        labels = np.array([int(word) for word in line.split()], dtype=np.int64)
    except (ValueError, OverflowError):
        raise LayoutError(f"{where}: expected a line of whole numbers, found {line[:30]!r}") from None
    return check_labels(labels, num_clusters, where)


def _one_file(folders: Sequence[Path], suffix: str, *, but: str = "\0") -> Path | None:
    """Returns the only file with a suffix in the first of the folders that has one."""
    for folder in folders:
        found = sorted(p for p in folder.glob(f"*{suffix}") if not p.name.endswith(but))
        if len(found) > 1:
            raise LayoutError(
                f"{folder} has {len(found)} files *{suffix}, one is expected: {', '.join(p.name for p in found[:5])}"
            )
        if found:
            return found[0]
    return None


def _find_label_lists(path: Path) -> dict[str, Path]:
    """Returns the ``.bas.scp`` files by label-set name: the folder's name for sub-folders, else the file's stem."""
    found: dict[str, Path] = {}
    for list_path in sorted(path.rglob("*.bas.scp")):
        parts = list_path.relative_to(path).parts[:-1]
        name = parts[0] if parts and parts[0] != "fbank" else list_path.name.removesuffix(".bas.scp")
        if name in found:
            raise LayoutError(f"{path}: {found[name]} and {list_path} would both be the label set {name!r}")
        found[name] = list_path
    return found


@dataclass(frozen=True)
class _LabelLines:
    """Reads labels of an utterance from a ``.bas`` file."""

    entries: Mapping[str, ScpEntry]
    num_clusters: int

    def __call__(self, utterance: str) -> np.ndarray:
        return read_label_line(self.entries[utterance], self.num_clusters)


def _bas_labels(
    name: str, list_path: Path, features: Mapping[str, ScpEntry], declared_s: float | None, num_clusters: int
) -> SourceLabels:
    entries = read_scp(list_path)
    read = _LabelLines(entries, num_clusters)

    def lengths() -> Iterator[tuple[str, int, int]]:
        for key, entry in features.items():
            if key in entries:
                try:
                    yield key, read_entry_shape(entry)[0], len(read(key))
                except ValueError:
                    continue  # goes to quarantine, or is reported, when the utterance itself is read

    verified = list(islice(lengths(), NUM_VERIFIED))
    if not verified:
        raise LayoutError(f"labels {name}: no utterance of {list_path} has both features and labels that can be read")
    period_s = find_label_period_s(verified, declared_s=declared_s or period_in_name(name), name=name)
    return SourceLabels(frame_period_s=period_s, num_clusters=num_clusters, read=read, origin={"labels": list_path.name})


def melhubert_source(path: str | Path, *, label_period_s: float | None = None, num_clusters: int = NUM_CLUSTERS) -> Source:
    """Reads a MelHuBERT data folder: a feature list (``*.scp``), label lists (``*.bas.scp``), and sums (``*.mean-var``).

    Files lie in the folder itself (libri-360) or in ``fbank/`` beside label folders such as ``kmeans/`` and ``stage2-cluster/``
    (libri-960). Features are raw log-Mel, so the corpus holds them as they are and the statistics beside them.

    Args:
        path: The folder.
        label_period_s: Seconds a label covers, 0.01 or 0.02; by default what the folder's name says (``10ms``, ``20ms``), else
            what the lengths of the first utterances show. It is verified in any case.
        num_clusters: Labels are below this.

    Raises:
        ValueError: A list is missing or ambiguous, or labels do not fit the features.
    """
    path = Path(path)
    places = [path, path / "fbank"]
    feature_list = _one_file(places, ".scp", but=".bas.scp")
    if feature_list is None:
        raise LayoutError(f"{path} is no MelHuBERT data folder: neither it nor {path / 'fbank'} has a feature list *.scp")
    locate = Locator(feature_list.parent)
    entries = read_scp(feature_list, locate)
    dim = first_dim(entries, feature_list)
    frontend, sentence = precomputed_frontend(dim)
    labels = {
        name: _bas_labels(name, list_path, entries, label_period_s, num_clusters)
        for name, list_path in _find_label_lists(path).items()
    }
    sums = _one_file([feature_list.parent, *places], ".mean-var")
    statistics = None
    if sums is not None:
        mean, std = read_mean_var(sums)
        if len(mean) != dim:
            raise LayoutError(f"{sums} has sums of {len(mean)} features, the matrices of {feature_list} have {dim}")
        statistics = (mean.astype(np.float32), std.astype(np.float32), sums.name)
    notes = [sentence, *(f"labels {name}: one for every {s.frame_period_s * 1000:.0f} ms" for name, s in labels.items())]
    return Source(
        name=feature_list.name.removesuffix(".scp"),
        utterances=[SourceUtterance(id=key, read_features=partial(read_matrix, entry, dim)) for key, entry in entries.items()],
        num_utterances=len(entries),
        frontend=frontend,
        labels=labels,
        statistics=statistics,
        note="; ".join([*notes, *moved_note([locate])]),
    )
