"""Kaldi archives without lists as a source: a folder of ``.ark`` files, or a folder for each set (S3PRL's ``ark2libri``).

``fmllr_cmvn/train_clean_100/fmllr_cmvn.ark`` becomes the split ``train-clean-100``; ``feats_fmllr_train.1.ark`` to ``.10.ark``
(TIMIT) become ``train``. Offsets come from the archives' headers, so nothing is read before its turn.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from sslim.data.ark import KaldiError, list_ark
from sslim.data.audio_sources import LIBRISPEECH_NAME
from sslim.data.kaldi import ScpEntry, check_unique, first_dim, read_matrix, read_table
from sslim.data.sources import SPLIT_ROLES, Source, SourceUtterance
from sslim.data.stored_features import stored_as


def find_archives(path: Path) -> dict[Path, str | None]:
    """Returns the archives in a folder, or in the folders in it, with the split that each is of.

    Empty where there are none.
    """
    if path.is_file():
        return {path: _split_in_name(path)} if path.suffix == ".ark" else {}
    found: dict[Path, str | None] = {archive: _split_in_name(archive) for archive in sorted(path.glob("*.ark"), key=_natural)}
    for folder in sorted(child for child in path.iterdir() if child.is_dir()):
        split = folder.name.replace("_", "-")
        found |= dict.fromkeys(sorted(folder.glob("*.ark"), key=_natural), SPLIT_ROLES.get(split.lower(), split))
    return found


def _natural(path: Path) -> list[str | int]:
    """Sorts ``x.10.ark`` after ``x.2.ark``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _split_in_name(archive: Path) -> str | None:
    words = re.split(r"[-_.]", archive.stem.lower())
    return next((SPLIT_ROLES[word] for word in words if word in SPLIT_ROLES), None)


def ark_source(path: str | Path, *, named: str | None = None, frame_shift_ms: float | None = None) -> Source:
    """Reads a folder of Kaldi archives that no list describes; ``utt2spk`` beside an archive gives speakers.

    Args:
        path: The folder, or one archive.
        named: What the user says the features are, see :func:`sslim.data.stored_features.stored_as`.
        frame_shift_ms: What the user says of their frame period.

    Raises:
        ValueError: There are no archives, one is malformed, an id comes twice, or nothing says what the features are.
    """
    path = Path(path)
    archives = find_archives(path)
    if not archives:
        raise KaldiError(f"{path} holds no archives *.ark, and neither does a folder in it")
    entries: dict[Path, dict[str, ScpEntry]] = {
        archive: {key: ScpEntry(key, archive, offset) for key, offset in list_ark(archive).items()} for archive in archives
    }
    first = next(iter(archives))
    dim = first_dim(entries[first], first)
    kept = stored_as(dim, _where(path, first), features=named, frame_shift_ms=frame_shift_ms, kaldi=True)
    utterances = []
    for archive, split in archives.items():
        table = archive.parent / "utt2spk"
        speakers = read_table(table) if table.is_file() else {}
        for key, entry in entries[archive].items():
            match = LIBRISPEECH_NAME.fullmatch(key)
            utterances.append(
                SourceUtterance(
                    id=key,
                    read_features=kept.reading(partial(read_matrix, entry, dim)),
                    speaker=speakers.get(key, match["speaker"] if match else None),
                    split=split,
                )
            )
    check_unique(utterances, path)
    return Source(
        name=path.stem if path.is_file() else path.resolve().name,
        utterances=utterances,
        num_utterances=len(utterances),
        frontend=kept.frontend,
        note=kept.sentence,
    )


def _where(path: Path, archive: Path) -> str:
    """Names that may tell what the features are."""
    return "/".join(dict.fromkeys([path.resolve().name, *archive.relative_to(path if path.is_dir() else path.parent).parts]))
