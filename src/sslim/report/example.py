"""One utterance as the model sees it, kept beside a run so that its report can draw it.

``report_example.safetensors`` holds the arrays, ``report_example.json`` the names; whoever trains or demonstrates writes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sslim.config import read_json
from sslim.storage import load_tensors, save_tensors, write_json

if TYPE_CHECKING:
    import numpy as np

TENSORS, NAMES = "report_example.safetensors", "report_example.json"
NO_PHONE = -1


@dataclass(frozen=True, kw_only=True)
class Example:
    """Arrays over the T frames of one utterance.

    Attributes:
        id: The utterance.
        frame_shift_s: Seconds from one frame to the next.
        features_TF: (T, F) features, low frequencies first.
        labels_T: (T,) int targets, negative where there is none.
        mask_T: (T,) bool, True where the model saw nothing; None when nothing was masked.
        predictions_T: (T,) int cluster that the model finds likeliest; None without a model.
        phones_T: (T,) int index into ``phone_names``, ``NO_PHONE`` where there is none; None without an alignment.
        phone_names: Symbols.
    """

    id: str
    frame_shift_s: float
    features_TF: np.ndarray
    labels_T: np.ndarray
    mask_T: np.ndarray | None = None
    predictions_T: np.ndarray | None = None
    phones_T: np.ndarray | None = None
    phone_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        num_frames = len(self.features_TF)
        if self.features_TF.ndim != 2 or not num_frames:
            raise ValueError(f"the example's features have shape {self.features_TF.shape}; expected (frames, features)")
        for name in ("labels_T", "mask_T", "predictions_T", "phones_T"):
            array = getattr(self, name)
            if array is not None and array.shape != (num_frames,):
                raise ValueError(f"the example's {name} has shape {array.shape}, its features have {num_frames} frames")
        if self.phones_T is not None and int(self.phones_T.max()) >= len(self.phone_names):
            raise ValueError(f"the example has phone {int(self.phones_T.max())}, but {len(self.phone_names)} phone names")


ARRAYS = {
    "features": ("features_TF", "float32"),
    "labels": ("labels_T", "int64"),
    "mask": ("mask_T", "bool"),
    "predictions": ("predictions_T", "int64"),
    "phones": ("phones_T", "int64"),
}  # name in the file -> attribute, type


def save_example(run: Path, example: Example) -> None:
    """Writes the example into a run's folder."""
    import torch

    arrays = {name: getattr(example, attribute) for name, (attribute, _) in ARRAYS.items()}
    tensors = {k: torch.from_numpy(v.astype(ARRAYS[k][1])) for k, v in arrays.items() if v is not None}
    save_tensors(run / TENSORS, tensors)
    names = {"id": example.id, "frame_shift_s": example.frame_shift_s, "phone_names": list(example.phone_names)}
    write_json(run / NAMES, names)


def load_example(run: Path) -> Example | None:
    """Reads the example of a run; None when it has none.

    Raises:
        ValueError: It cannot be read, or its parts do not fit each other.
    """
    if not (run / TENSORS).is_file() or not (run / NAMES).is_file():
        return None
    tensors = load_tensors(run / TENSORS)
    names = read_json(run / NAMES)
    missing = [key for key in ("features", "labels") if key not in tensors]
    missing += [key for key in ("id", "frame_shift_s", "phone_names") if not isinstance(names, dict) or key not in names]
    if missing:
        raise ValueError(f"{run / TENSORS} and {NAMES} lack {missing[0]!r}")
    arrays = {ARRAYS[name][0]: tensor.numpy() for name, tensor in tensors.items() if name in ARRAYS}
    return Example(
        id=str(names["id"]),
        frame_shift_s=float(names["frame_shift_s"]),
        phone_names=tuple(map(str, names["phone_names"])),
        **arrays,
    )
