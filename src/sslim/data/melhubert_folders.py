"""Data folders of MelHuBERT and of S3PRL as sources: Kaldi features with ``.bas`` labels, and CSV lists of ``.npy`` files.

Two traps of these layouts are handled here. The length in a CSV counts frames of the label file, which are 10 ms or 20 ms long; it
is never used as a number of feature frames. Paths in lists are absolute ones of the machine that wrote them; they are found again
by their last two components.

Shape suffixes: ``T`` frames, ``F`` features.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from sslim.data.ark import KaldiError
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
from sslim.data.sources import Source, SourceLabels, SourceUtterance
from sslim.frontends.config import FilterbankConfig, SpectralFrontendConfig

NUM_CLUSTERS = 512
FRAME_SHIFT_S = 0.01
LABEL_PERIODS_S = {0.01: 1, 0.02: 2}  # seconds of a label: feature frames it covers
MIN_FRAMES_TO_TELL = 8  # shorter utterances fit both periods within the tolerance of one frame
NUM_VERIFIED = 50
S3PRL_SLOW_FEATURES = ("mel", "linear")  # 50 ms windows every 12.5 ms; its fbank and mfcc have 25 ms every 10 ms


class LayoutError(ValueError):
    """A data folder or list that cannot be read; the message says where and what was found."""


def read_mean_var(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads a ``.mean-var`` text file: line 1 sums, line 2 sums of squares, both as ``[a, b, ...]``, line 3 the number of frames.

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
    return _check_labels(labels, num_clusters, where)


def _check_labels(labels: np.ndarray, num_clusters: int, where: str) -> np.ndarray:
    if labels.ndim != 1 or len(labels) == 0 or labels.dtype.kind not in "iu":
        raise LayoutError(f"{where}: expected a vector of whole numbers, found {labels.dtype} of shape {labels.shape}")
    if labels.min() < 0 or labels.max() >= num_clusters:
        bad = labels[(labels < 0) | (labels >= num_clusters)][0]
        raise LayoutError(f"{where}: the label {bad} is not within 0 to {num_clusters - 1}")
    return labels.astype(np.int64)


def label_period_s(lengths: Sequence[tuple[str, int, int]], *, declared_s: float | None, name: str) -> float:
    """Tells a label set's frame period and verifies it on utterances.

    Args:
        lengths: (utterance, feature frames of 10 ms, labels).
        declared_s: What the user or a folder's name says; None to find out.
        name: Of the label set, for errors.

    Returns:
        0.01 or 0.02.

    Raises:
        LayoutError: An utterance fits neither period, not the declared one, or another than the ones before.
    """
    if declared_s is not None and declared_s not in LABEL_PERIODS_S:
        raise LayoutError(f"labels {name}: a label covers 0.01 or 0.02 s, not {declared_s}")
    period, witness = declared_s, "declared" if declared_s is not None else ""
    for utterance, num_frames, num_labels in lengths:
        if num_frames < MIN_FRAMES_TO_TELL:
            continue
        fits = [s for s, ratio in LABEL_PERIODS_S.items() if abs(num_labels - -(-num_frames // ratio)) <= 1]
        if not fits:
            raise LayoutError(
                f"labels {name}: {utterance} has {num_labels} labels for {num_frames} frames of 10 ms, which is neither one for"
                " every frame nor one for every two"
            )
        if period is None:
            period, witness = fits[0], f"as in {utterance}"
        elif period not in fits:
            raise LayoutError(
                f"labels {name}: {utterance} has {num_labels} labels for {num_frames} frames of 10 ms, so one covers {fits[0]} s, not"
                f" {period} s ({witness})"
            )
    if period is None:
        raise LayoutError(f"labels {name}: no utterance is long enough to tell whether a label covers 10 or 20 ms, declare it")
    return period


def _period_in_name(name: str) -> float | None:
    found = [s for s in LABEL_PERIODS_S if f"{round(s * 1000)}ms" in name.lower()]
    return found[0] if len(found) == 1 else None


def _one_file(folders: Sequence[Path], suffix: str, *, but: str = "\0") -> Path | None:
    """Returns the only file with a suffix in the first of the folders that has one."""
    for folder in folders:
        found = sorted(p for p in folder.glob(f"*{suffix}") if not p.name.endswith(but))
        if len(found) > 1:
            raise LayoutError(f"{folder} has {len(found)} files *{suffix}, one is expected: {', '.join(p.name for p in found[:5])}")
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
    period_s = label_period_s(verified, declared_s=declared_s or _period_in_name(name), name=name)
    return SourceLabels(frame_period_s=period_s, num_clusters=num_clusters, read=read, origin={"labels": list_path.name})


def melhubert_source(
    path: str | Path, *, label_period_s: float | None = None, num_clusters: int = NUM_CLUSTERS
) -> Source:
    """Reads a MelHuBERT data folder: a feature list (``*.scp``), label lists (``*.bas.scp``), and sums (``*.mean-var``).

    Files lie in the folder itself (libri-360) or in ``fbank/`` beside label folders such as ``kmeans/`` and ``stage2-cluster/``
    (libri-960). Features are raw log-Mel, so the corpus holds them as they are and the statistics beside them.

    Args:
        path: The folder.
        label_period_s: Seconds a label covers, 0.01 or 0.02; by default what the folder's name says (``10ms``, ``20ms``), else what
            the lengths of the first utterances show. It is verified in any case.
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


def find_array(stated: str, root: Path) -> Path:
    """Returns where an ``.npy`` file of a list is: as stated, below the list's folder, or there by its last two components or one.

    Raises:
        LayoutError: Nowhere.
    """
    path = Path(stated)
    candidates = [path] if path.is_absolute() else [root / path, path]
    candidates += [root.joinpath(*path.parts[-2:]), root / path.name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise LayoutError(f"{stated} does not exist, nor does {Path(*path.parts[-2:])} below {root}")


def read_array(stated: str, root: Path, *, header_only: bool = False) -> np.ndarray:
    """Reads an ``.npy`` file of plain numbers; pickled objects are refused.

    Args:
        stated: Its path in the list.
        root: The list's folder.
        header_only: Map it instead of reading it, for its shape.

    Raises:
        LayoutError: It is missing, torn, or holds something else.
    """
    path = find_array(stated, root)
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r" if header_only else None)
    except (ValueError, OSError, EOFError) as error:
        raise LayoutError(f"{path} is not a readable .npy file of numbers ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise LayoutError(f"{path} is not an .npy file of numbers, it holds {getattr(array, 'dtype', type(array).__name__)}")
    return array


def read_stored_features(
    stated: str, root: Path, dim: int, statistics: tuple[np.ndarray, np.ndarray] | None
) -> np.ndarray:
    """Reads features (T, F) float32 from an ``.npy`` file and undoes their normalisation.

    Args:
        stated: Path in the list.
        root: The list's folder.
        dim: F they must have.
        statistics: Mean and standard deviation that were used; None when the features are not normalised.

    Raises:
        LayoutError: As for :func:`read_array`, or the shape is another.
    """
    array = read_array(stated, root)
    if array.ndim != 2 or array.shape[1] != dim:
        raise LayoutError(f"{stated}: expected features of shape (frames, {dim}), found {array.shape}")
    if statistics is not None:
        mean, std = statistics
        array = array.astype(np.float64) * std + mean
    return array.astype(np.float32)


@dataclass(frozen=True)
class _Row:
    """A line of a list: feature file, label file (None for S3PRL) and class of the utterance."""

    features: str
    labels: str | None
    utterance_class: str | None


def _split_pair(cells: Sequence[str], where: str) -> tuple[str, str]:
    """Divides cells into two paths; the reference writes lists without quotes, so a comma in a path makes more cells."""
    for i in range(1, len(cells)):
        first, second = ",".join(cells[:i]), ",".join(cells[i:])
        if len(cells) == 2 or (first.endswith(".npy") and second.endswith(".npy")):
            return first, second
    raise LayoutError(f"{where}: expected file_path,label_path,length, found {','.join(cells)[:80]!r}")


def read_list(path: str | Path) -> list[_Row]:
    """Reads a CSV list: MelHuBERT's ``file_path,label_path,length`` or S3PRL's ``file_path,length,label``.

    An unnamed index column is skipped. Lengths are not used: their unit differs between lists.

    Raises:
        LayoutError: Another header, or a line that does not fit it.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    header = [cell.strip() for cell in lines[0]] if lines else []
    skip = 1 if header and header[0] in ("", "Unnamed: 0", "index") else 0
    columns = header[skip:]
    rows = []
    for number, line in enumerate(lines[1:], 2):
        cells = line[skip:]
        if not cells:
            continue
        where = f"{path} line {number}"
        if columns == ["file_path", "label_path", "length"]:
            features, labels = _split_pair(cells[:-1], where)
            rows.append(_Row(features, labels, None))
        elif sorted(columns) == ["file_path", "label", "length"] and columns[0] == "file_path":
            if len(cells) != 3:
                raise LayoutError(f"{where}: expected 3 columns, found {len(cells)}")
            label = cells[columns.index("label")].strip()
            rows.append(_Row(cells[0], None, None if label in ("", "None", "nan") else label))
        else:
            break
    if not rows:
        raise LayoutError(
            f"{path}: expected the columns file_path,label_path,length (MelHuBERT) or file_path,length,label (S3PRL) and at least one"
            f" line, found {','.join(header)[:80]!r} and {len(lines) - 1 if lines else 0} lines"
        )
    return rows


def _find_lists(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    lists = sorted(path.glob("*.csv")) if path.is_dir() else []
    if not lists:
        raise LayoutError(f"{path} is neither a .csv list nor a folder that has one")
    return lists


def _first_readable(rows: Mapping[str, _Row], root: Path, count: int) -> list[np.ndarray]:
    """Returns the first ``count`` feature arrays that can be read, out of the first 200."""
    arrays: list[np.ndarray] = []
    reason: LayoutError | None = None
    for row in islice(rows.values(), 200):
        try:
            array = read_array(row.features, root, header_only=True)
            if array.ndim != 2 or array.size == 0:
                raise LayoutError(f"{row.features}: expected features of shape (frames, dimension), found {array.shape}")
        except LayoutError as error:
            reason = reason or error
            continue
        arrays.append(array)
        if len(arrays) == count:
            break
    if not arrays:
        raise LayoutError(f"no features of the list can be read, the first: {reason}")
    return arrays
