"""Global mean and standard deviation of features: the published ones, reading them from files, and measuring new ones."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslim.config import nearest
from sslim.storage import load_tensors

# The 40-bin log-Mel statistics (mean, population standard deviation) of the 100, 360 and 960 hours of LibriSpeech that the
# MelHuBERT models were trained with, in float64 as published with them (arXiv 2211.09944); their checkpoints do not hold them.
PUBLISHED_STATISTICS = ("libri-100", "libri-360", "libri-960")

STD_FLOOR = 1e-5  # a channel that never moves (for example an upsampled recording's top band) must not divide by zero


@cache
def _published() -> dict[str, dict[str, list[float]]]:
    return json.loads((Path(__file__).parent / "statistics.json").read_text(encoding="utf-8"))


def check_statistics(mean_F: Tensor, std_F: Tensor, source: str) -> None:
    """Checks a mean and a standard deviation.

    Raises:
        ValueError: They differ in shape, are no vectors, hold non-finite values, or the standard deviation is not positive.
    """
    if mean_F.dim() != 1 or mean_F.shape != std_F.shape or len(mean_F) == 0:
        raise ValueError(
            f"statistics {source} have shapes {tuple(mean_F.shape)} and {tuple(std_F.shape)}; expected two equally long vectors"
        )
    if not bool(torch.isfinite(mean_F).all() & torch.isfinite(std_F).all()):
        raise ValueError(f"statistics {source} hold a non-finite value")
    if not bool((std_F > 0).all()):
        raise ValueError(f"statistics {source} hold the standard deviation {float(std_F.min()):g}; it must be above zero")


def _read_npy(path: Path) -> tuple[Any, Any]:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a readable .npy file of numbers ({error})") from error
    if array.ndim != 2 or array.shape[0] != 2 or array.dtype.kind not in "fiu":
        raise ValueError(f"{path} holds {array.dtype} of shape {array.shape}; expected (2, features): mean, standard deviation")
    return array[0], array[1]


def _read_safetensors(path: Path) -> tuple[Any, Any]:
    tensors = load_tensors(path)
    missing = {"mean", "std"} - set(tensors)
    if missing:
        raise ValueError(f"{path} lacks the tensor {min(missing)!r}; statistics need 'mean' and 'std'")
    return tensors["mean"], tensors["std"]


READERS = {".npy": _read_npy, ".safetensors": _read_safetensors}


def load_statistics(name_or_path: str | Path) -> tuple[Tensor, Tensor, str]:
    """Reads a global mean and standard deviation.

    Args:
        name_or_path: A published name (``libri-100``, ``libri-360``, ``libri-960``), a ``.npy`` file of shape (2, F) with the
            mean in row 0, a ``.safetensors`` file with ``mean`` and ``std``, or a corpus folder (``statistics.safetensors``).

    Returns:
        mean (F,) and std (F,), float32, and the name to record: the published name or the file's own name.

    Raises:
        ValueError: No such name or file, or its content is not a mean and a positive standard deviation.
    """
    name = str(name_or_path)
    if name in PUBLISHED_STATISTICS:
        mean, std = (_published()[name][key] for key in ("mean", "std"))
        return torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32), name
    path = Path(name_or_path)
    if path.is_dir():
        name = f"{path.resolve().name}/statistics.safetensors"
        path = path / "statistics.safetensors"
    else:
        name = path.name
    if not path.is_file():
        raise ValueError(
            f"{name_or_path} is no statistics; accepted are {', '.join(PUBLISHED_STATISTICS)} "
            f"or a .npy or .safetensors file{nearest(str(name_or_path), PUBLISHED_STATISTICS)}"
        )
    if path.suffix not in READERS:
        raise ValueError(f"statistics file {path} has the ending {path.suffix!r}; accepted are {', '.join(READERS)}")
    read_mean, read_std = READERS[path.suffix](path)
    mean_F, std_F = (torch.as_tensor(values).to(torch.float32) for values in (read_mean, read_std))
    check_statistics(mean_F, std_F, str(path))
    return mean_F, std_F, name


@dataclass(kw_only=True)
class RunningStatistics:
    """Mean and standard deviation over frames that arrive in pieces; float64, exact to merge in any grouping up to rounding.

    Pieces are combined by the update of Chan, Golub and LeVeque (1979), so a large mean costs no accuracy in the variance.

    Attributes:
        count: Frames so far.
        mean: (F,) float64 mean so far.
        squares: (F,) float64 sum of squared deviations from that mean.
    """

    count: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def add(self, features_TF: np.ndarray | Tensor) -> None:
        """Counts the frames of one utterance, any float type.

        Raises:
            ValueError: The width differs from that of earlier frames, or a value is not finite.
        """
        values = np.asarray(features_TF, dtype=np.float64)
        if values.ndim != 2:
            raise ValueError(f"features have shape {values.shape}; expected (frames, features)")
        if len(values) == 0:
            return
        mean = values.mean(axis=0)
        if not np.isfinite(mean).all():
            raise ValueError("features hold a non-finite value; statistics take finite ones only")
        self.merge(RunningStatistics(count=len(values), mean=mean, squares=np.square(values - mean).sum(axis=0)))

    def merge(self, other: RunningStatistics) -> None:
        """Counts the frames that ``other`` has counted.

        Raises:
            ValueError: The widths differ.
        """
        if other.count == 0:
            return
        if self.count == 0:
            self.count, self.mean, self.squares = other.count, other.mean.copy(), other.squares.copy()
            return
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features have width {len(other.mean)}, earlier ones {len(self.mean)}")
        total = self.count + other.count
        difference = other.mean - self.mean
        self.mean = self.mean + difference * (other.count / total)
        self.squares = self.squares + other.squares + np.square(difference) * (self.count * (other.count / total))
        self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Returns mean (F,) and population standard deviation (F,), float32, the latter at least ``STD_FLOOR``.

        Raises:
            ValueError: No frames were counted.
        """
        if self.count == 0:
            raise ValueError("statistics need at least one frame, none was counted")
        std = np.maximum(np.sqrt(self.squares / self.count), STD_FLOOR)
        return torch.from_numpy(self.mean.astype(np.float32)), torch.from_numpy(std.astype(np.float32))

    def to_plain(self) -> dict[str, Any]:
        """Returns plain JSON values, exact to the bit, so that interrupted counting can go on."""
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> RunningStatistics:
        """Reads what ``to_plain`` gave."""
        return cls(
            count=int(values["count"]),
            mean=np.array(values["mean"], dtype=np.float64),
            squares=np.array(values["squares"], dtype=np.float64),
        )
