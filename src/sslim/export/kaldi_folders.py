"""Kaldi data directories of features: ``feats.ark``, ``feats.scp`` and the tables that Kaldi's scripts look for beside them.

``utt2spk`` and ``spk2utt`` (a speaker nobody named is the utterance itself, as Kaldi's scripts have it), ``utt2num_frames``,
``utt2dur`` (seconds), ``frame_shift`` (seconds), ``text`` where every utterance has one. All tables are in the byte order of
their keys (``LC_ALL=C sort``), and ``feats.scp`` appears last: where it is, the folder is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from sslim.data.ark import write_ark_scp
from sslim.storage import write_text_atomically

SCP = "feats.scp"


@dataclass(frozen=True, kw_only=True)
class FeatureUtterance:
    """One utterance of a data directory.

    Attributes:
        id: Key, free of white space.
        num_frames: Rows of its matrix.
        duration_s: Seconds of its sound.
        speaker: Name; None where nobody knows.
        text: Transcript; None where there is none.
    """

    id: str
    num_frames: int
    duration_s: float
    speaker: str | None = None
    text: str | None = None

    @property
    def speaker_key(self) -> str:
        """Its speaker as a Kaldi key; the utterance itself where nobody knows."""
        return "_".join((self.speaker or "").split()) or self.id


def write_feature_folder(
    folder: Path, utterances: Sequence[FeatureUtterance], frame_shift_s: float, read: Callable[[str], np.ndarray]
) -> None:
    """Writes a data directory, or leaves one that is whole as it is.

    Args:
        folder: Where to.
        utterances: In any order.
        frame_shift_s: Seconds from one frame to the next.
        read: Key to the matrix (T, D).

    Raises:
        ValueError: A key that Kaldi could not read, or one that comes twice.
    """
    if (folder / SCP).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(utterances, key=lambda utterance: utterance.id.encode())
    for name, lines in _tables(ordered, frame_shift_s).items():
        write_text_atomically(folder / name, "".join(f"{line}\n" for line in lines))
    write_ark_scp(folder, ((utterance.id, read(utterance.id)) for utterance in ordered))


def _tables(ordered: Sequence[FeatureUtterance], frame_shift_s: float) -> dict[str, list[str]]:
    speakers: dict[str, list[str]] = {}
    for utterance in ordered:
        speakers.setdefault(utterance.speaker_key, []).append(utterance.id)
    tables = {
        "utt2spk": [f"{utterance.id} {utterance.speaker_key}" for utterance in ordered],
        "spk2utt": [" ".join([name, *speakers[name]]) for name in sorted(speakers, key=str.encode)],
        "utt2num_frames": [f"{utterance.id} {utterance.num_frames}" for utterance in ordered],
        "utt2dur": [f"{utterance.id} {utterance.duration_s:.6g}" for utterance in ordered],
        "frame_shift": [f"{frame_shift_s:g}"],
    }
    if all(utterance.text is not None for utterance in ordered):
        tables["text"] = [" ".join([utterance.id, *str(utterance.text).split()]) for utterance in ordered]
    return tables


def speakers_are_in_order(utterances: Sequence[FeatureUtterance]) -> bool:
    """Whether sorting by speaker sorts utterances too, as ``utils/validate_data_dir.sh`` demands: ids begin with speakers."""
    ordered = sorted(utterances, key=lambda utterance: utterance.id.encode())
    names = [utterance.speaker_key.encode() for utterance in ordered]
    return all(before <= after for before, after in pairwise(names))
