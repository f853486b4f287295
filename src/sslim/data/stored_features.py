"""What stored features are: a file tells how wide they are, but neither how they were made nor how long a frame is.

A user can name them (``--features``), or give their frame period alone (``--frame-shift-ms``). Otherwise the folder's name
tells, as S3PRL's scripts chose it (``libri_fbank160``, ``libri_fmllr_cmvn``); where it does not, that is an error. Only Kaldi
directories are then taken for a log-Mel filterbank (``sslim.data.kaldi``), with a sentence that says so.

Stored features of S3PRL have their deltas appended and are normalised. A corpus keeps the first, static part: deltas and a
normalisation of each utterance are made from it again, and give the same, since both treat every channel by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sslim.data.feature_presets import PRESETS, feature_preset
from sslim.frontends import build_frontend
from sslim.frontends.config import SpectralFrontendConfig, StoredFeaturesConfig

# Folder names of S3PRL v0.1, most telling first: pattern, features of that width. Kaldi's own come in archives, too.
KALDI_NAMES: tuple[tuple[str, dict[int, str]], ...] = (
    (r"fmllr", {40: "fmllr40"}),
    (r"fbank_cmvn", {80: "fbank80-speaker"}),
    (r"mfcc_cmvn", {39: "mfcc39-speaker"}),
    (r"voxceleb_mfcc", {24: "mfcc24-voxceleb"}),
)
NAMES = (
    *KALDI_NAMES,
    (r"(?<![a-z])mel", {80: "mel80-librosa", 160: "mel160-librosa", 240: "mel240-librosa"}),
    (r"fbank", {80: "fbank80-librosa", 160: "fbank160-librosa", 240: "fbank240-librosa"}),
    (r"mfcc", {13: "mfcc13-librosa", 39: "mfcc39-librosa"}),
    (r"linear", {1025: "linear1025"}),
)


@dataclass(frozen=True, kw_only=True)
class StoredAs:
    """What stored features are taken for.

    Attributes:
        frontend: Their description.
        num_kept: Columns that a corpus keeps, the first ones.
        sentence: For the user.
    """

    frontend: SpectralFrontendConfig
    num_kept: int
    sentence: str

    def reading(self, read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
        """Returns a function that reads the columns that are kept."""
        return _Kept(read, self.num_kept)


@dataclass(frozen=True)
class _Kept:
    read: Callable[[], np.ndarray]
    num_kept: int

    def __call__(self) -> np.ndarray:
        return self.read()[:, : self.num_kept]


def stored_as(
    dim: int, where: str, *, features: str | None = None, frame_shift_ms: float | None = None, kaldi: bool = False
) -> StoredAs:
    """Tells what stored features are.

    Args:
        dim: Their width.
        where: Name of their folder or list.
        features: What the user says they are, a name of ``PRESETS``.
        frame_shift_ms: What the user says of their frame period.
        kaldi: Whether they come from Kaldi, so that ``fbank`` in a name is not librosa's.

    Raises:
        ValueError: The width is another, both are said, or nothing is known.
    """
    if features is not None and frame_shift_ms is not None:
        raise ValueError(f"--features {features} says how long a frame is: leave out --frame-shift-ms {frame_shift_ms:g}")
    if features is not None:
        return _named(features, dim, f"stored features are {features}, as --features says")
    if frame_shift_ms is not None:
        config = StoredFeaturesConfig(name=where, dim=dim, frame_shift_ms=frame_shift_ms)
        sentence = f"stored features are {dim} wide, one frame every {frame_shift_ms:g} ms; no waveform can be turned into them"
        return StoredAs(frontend=SpectralFrontendConfig(features=config), num_kept=dim, sentence=sentence)
    name = recognised(dim, where, kaldi=kaldi)
    if name is None:
        raise ValueError(
            f"nothing says what the stored features of {where} are, which are {dim} wide: name them with --features "
            f"({', '.join(_of_width(dim)) or 'no known ones are that wide'}) or give their frame period with --frame-shift-ms"
        )
    return _named(name, dim, f"stored features are taken for {name}, told from the name {where} (--features says otherwise)")


def recognised(dim: int, where: str, *, kaldi: bool = False) -> str | None:
    """Returns the features that a folder's name and a width stand for, None where they do not tell."""
    for pattern, by_width in KALDI_NAMES if kaldi else NAMES:
        if re.search(pattern, where.lower()):
            return by_width.get(dim)
    return None


def _named(name: str, dim: int, sentence: str) -> StoredAs:
    frontend = feature_preset(name)
    if frontend is None:
        raise ValueError(f"features {name!r} are none: stored features, {dim} wide, cannot be called that")
    built = build_frontend(frontend)
    if dim == built.normalized_dim and not frontend.cepstra:
        return StoredAs(frontend=frontend, num_kept=built.base_dim, sentence=f"{sentence}{_remark(frontend)}")
    if frontend.cepstra or dim != built.base_dim:
        others = ", ".join(_of_width(dim)) or "none that are known"
        raise ValueError(
            f"features {name!r} are {built.normalized_dim} wide, the stored ones {dim}; those of this width: {others}"
        )
    return StoredAs(frontend=frontend, num_kept=dim, sentence=f"{sentence}{_remark(frontend)}")


def _remark(frontend: SpectralFrontendConfig) -> str:
    if frontend.normalization.kind == "speaker":
        return "; where the speakers are known, the mean of each is subtracted (again)"
    return "; deltas are made anew" if frontend.deltas else ""


def _of_width(dim: int) -> list[str]:
    built = {name: build_frontend(preset.frontend) for name, preset in PRESETS.items() if preset.frontend is not None}
    return [name for name, frontend in built.items() if frontend.normalized_dim == dim and not frontend.config.cepstra]
