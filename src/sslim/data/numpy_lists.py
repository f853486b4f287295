"""CSV lists of ``.npy`` files as sources: MelHuBERT's prepared layout and S3PRL's stored features.

Two traps of these lists are handled here. The length in a list counts frames of the label file, which are 10 ms or 20 ms long;
it is never used as a number of feature frames. Paths are absolute ones of the machine that wrote them; files are found again by
their last two components.

Shape suffixes: ``T`` frames, ``F`` features.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from sslim.data.audio_sources import LIBRISPEECH_NAME
from sslim.data.kaldi import precomputed_frontend
from sslim.data.label_layout import NUM_CLUSTERS, NUM_VERIFIED, LayoutError, check_labels, period_in_name
from sslim.data.label_layout import label_period_s as find_label_period_s
from sslim.data.sources import Source, SourceLabels, SourceUtterance
from sslim.data.stored_features import StoredAs, stored_as
from sslim.data.text_files import open_table

MEAN_STD = "mean-std.npy"
NUM_LOOKED_AT = 20  # utterances whose mean tells whether features are normalised


def find_array(stated: str, root: Path) -> Path:
    """Returns where a file of a list is: as stated, below the list's folder, or there by its last two components or one.

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


def read_stored_features(stated: str, root: Path, dim: int, statistics: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
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
    """A line of a list: feature file, label file (None for S3PRL), class of the utterance and, for S3PRL, the list's name."""

    features: str
    labels: str | None
    utterance_class: str | None = None
    split: str | None = None


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
        ValueError: It is no CSV file.
    """
    with open_table(Path(path)) as file:
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
            rows.append(_Row(features, labels))
        elif sorted(columns) == ["file_path", "label", "length"] and columns[0] == "file_path":
            if len(cells) != 3:
                raise LayoutError(f"{where}: expected 3 columns, found {len(cells)}")
            label = cells[columns.index("label")].strip()
            rows.append(_Row(cells[0], None, None if label in ("", "None", "nan") else label, Path(path).stem))
        else:
            break
    if not rows:
        raise LayoutError(
            f"{path}: expected the columns file_path,label_path,length (MelHuBERT) or file_path,length,label (S3PRL) and at"
            f" least one line, found {','.join(header)[:80]!r} and {len(lines) - 1 if lines else 0} lines"
        )
    return rows


def find_lists(path: Path) -> list[Path]:
    """Returns a list, or the ``.csv`` lists in a folder.

    Raises:
        LayoutError: There are none.
    """
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


def _find_mean_std(root: Path, dim: int) -> tuple[np.ndarray, np.ndarray, str] | None:
    """Reads the mean (row 0) and standard deviation (row 1) that lie beside a list."""
    found = [root / MEAN_STD] if (root / MEAN_STD).is_file() else sorted(root.glob(f"*{MEAN_STD}"))
    if len(found) > 1:
        raise LayoutError(f"{root} has {len(found)} files *{MEAN_STD}, one is expected: {', '.join(p.name for p in found[:5])}")
    if not found:
        return None
    values = read_array(found[0].name, root).astype(np.float64)
    if values.shape != (2, dim) or not np.isfinite(values).all() or not (values[1] > 0).all():
        raise LayoutError(f"{found[0]}: expected means and positive deviations of shape (2, {dim}), found shape {values.shape}")
    return values[0], values[1], found[0].name


def _normalisation_to_undo(
    arrays: Sequence[np.ndarray], stored: tuple[np.ndarray, np.ndarray, str] | None
) -> tuple[tuple[np.ndarray, np.ndarray] | None, str]:
    """Tells whether features are normalised: whether their mean, over all of them, is nearer to 0 than to the stored mean.

    Returns:
        The mean and standard deviation to undo, None when there is nothing to undo, and a sentence for the user.
    """
    if stored is None:
        return None, f"there is no {MEAN_STD} beside the list, so features are taken as they are"
    mean, std, name = stored
    found = np.sum([array.sum(axis=0, dtype=np.float64) for array in arrays], axis=0) / sum(len(array) for array in arrays)
    if np.abs(found).mean() < np.abs((found - mean) / std).mean():
        return (mean, std), f"the normalisation of the features by {name} is undone"
    return None, f"features are not normalised although there is {name}, so they are taken as they are"


@dataclass(frozen=True)
class _LabelArrays:
    """Reads labels of an utterance from the ``.npy`` file that a list names."""

    paths: Mapping[str, str]
    root: Path
    num_clusters: int

    def __call__(self, utterance: str) -> np.ndarray:
        stated = self.paths[utterance]
        return check_labels(read_array(stated, self.root), self.num_clusters, stated)


def _array_labels(
    name: str, rows: Mapping[str, _Row], root: Path, declared_s: float | None, num_clusters: int, list_name: str
) -> SourceLabels:
    read = _LabelArrays({key: row.labels for key, row in rows.items() if row.labels is not None}, root, num_clusters)

    def lengths() -> Iterator[tuple[str, int, int]]:
        for key, row in rows.items():
            try:
                features_TF = read_array(row.features, root, header_only=True)
                if features_TF.ndim == 2:
                    yield key, len(features_TF), len(read(key))
            except LayoutError:
                continue  # goes to quarantine, or is reported, when the utterance itself is read

    verified = list(islice(lengths(), NUM_VERIFIED))
    if not verified:
        raise LayoutError(f"labels {name}: no utterance of {list_name} has both features and labels that can be read")
    period_s = find_label_period_s(verified, declared_s=declared_s or period_in_name(name), name=name)
    return SourceLabels(frame_period_s=period_s, num_clusters=num_clusters, read=read, origin={"labels": list_name})


def _id(row: _Row) -> str:
    """An utterance's name: the file's for MelHuBERT, where all are in one folder; with its folder for S3PRL."""
    path = Path(row.features)
    return path.stem if row.labels is not None else path.with_suffix("").as_posix().lstrip("/")


def _read_lists(lists: Sequence[Path]) -> dict[Path, dict[str, _Row]]:
    """Reads lists by utterance; an utterance may be in several lists (with other labels) but only once in each."""
    result: dict[Path, dict[str, _Row]] = {}
    for path in lists:
        rows: dict[str, _Row] = {}
        for row in read_list(path):
            key = _id(row)
            if key in rows:
                raise LayoutError(f"{path}: the utterance {key!r} comes a second time")
            rows[key] = row
        result[path] = rows
    return result


def _labels_of_lists(
    lists: Mapping[Path, Mapping[str, _Row]], root: Path, declared_s: float | None, num_clusters: int
) -> dict[str, SourceLabels]:
    """Returns a label set for every list that has labels, named after the folder of its label files (or after the list)."""
    labels: dict[str, SourceLabels] = {}
    for path, rows in lists.items():
        first = next(iter(rows.values()))
        if first.labels is None:
            continue
        name = Path(first.labels).parent.name or path.stem
        name = path.stem if name in labels else name
        labels[name] = _array_labels(name, rows, root, declared_s, num_clusters, path.name)
    return labels


def _utterances(
    rows: Mapping[str, _Row], root: Path, dim: int, undo: tuple[np.ndarray, np.ndarray] | None, kept: StoredAs | None
) -> list[SourceUtterance]:
    utterances = []
    for key, row in rows.items():
        read = partial(read_stored_features, row.features, root, dim, undo)
        utterances.append(
            SourceUtterance(
                id=key,
                read_features=read if kept is None else kept.reading(read),
                speaker=_speaker(row),
                label=row.utterance_class,
                split=row.split,
            )
        )
    return utterances


def _speaker(row: _Row) -> str | None:
    """S3PRL's lists name no speakers; LibriSpeech's are in its file names."""
    match = None if row.labels is not None else LIBRISPEECH_NAME.fullmatch(Path(row.features).stem)
    return None if match is None else match["speaker"]


def numpy_source(
    path: str | Path,
    *,
    label_period_s: float | None = None,
    num_clusters: int = NUM_CLUSTERS,
    named: str | None = None,
    frame_shift_ms: float | None = None,
) -> Source:
    """Reads CSV lists of ``.npy`` features: MelHuBERT's (with labels, normalised) or S3PRL's (features only).

    Args:
        path: A list, or a folder with one or more. MelHuBERT's ``mean-std.npy`` lies beside the list; features are
            un-normalised with it, so that a corpus holds raw log-Mel, as when it is prepared from audio.
        label_period_s: Seconds a label covers, 0.01 or 0.02; by default what the label folder's name says (``cluster_20ms``),
            else what lengths of features and labels show. It is verified in any case.
        num_clusters: Labels are below this.
        named: What the user says S3PRL's features are, see :func:`sslim.data.stored_features.stored_as`.
        frame_shift_ms: What the user says of their frame period.

    Raises:
        ValueError: A malformed list, an utterance twice in a list, labels that do not fit the features, or features of which
            nothing says what they are.
    """
    path = Path(path)
    lists = _read_lists(find_lists(path))
    root = next(iter(lists)).parent
    rows: dict[str, _Row] = {}
    for found in lists.values():
        for key, row in found.items():
            if key in rows and rows[key].features != row.features:
                raise LayoutError(f"{path}: {key!r} is {rows[key].features} in one list and {row.features} in another")
            rows.setdefault(key, row)
    labels = _labels_of_lists(lists, root, label_period_s, num_clusters)
    arrays = _first_readable(rows, root, NUM_LOOKED_AT)
    dim = Counter(array.shape[1] for array in arrays).most_common(1)[0][0]
    arrays = [array for array in arrays if array.shape[1] == dim]
    stored = undo = kept = None
    if labels:
        if frame_shift_ms is not None:
            raise LayoutError(f"--frame-shift-ms {frame_shift_ms:g} is for S3PRL's lists; {path} is MelHuBERT's, of 10 ms")
        frontend, sentence = precomputed_frontend(dim)
        stored = _find_mean_std(root, dim)
        undo, note = _normalisation_to_undo(arrays, stored)
        notes = [sentence, note]
    else:
        where = f"{root.resolve().name}/{next(iter(lists)).name}"
        kept = stored_as(dim, where, features=named, frame_shift_ms=frame_shift_ms)
        frontend, notes = kept.frontend, [kept.sentence]
    notes += [f"labels {name}: one for every {s.frame_period_s * 1000:.0f} ms" for name, s in labels.items()]
    return Source(
        name=path.stem if path.is_file() else path.resolve().name,
        utterances=_utterances(rows, root, dim, undo, kept),
        num_utterances=len(rows),
        frontend=frontend,
        labels=labels,
        statistics=None if stored is None else (stored[0].astype(np.float32), stored[1].astype(np.float32), stored[2]),
        note="; ".join(notes),
    )
