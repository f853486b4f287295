"""One utterance before and after masked reconstruction, kept beside a run so that its report can draw it.

``report_restoration.safetensors`` holds the arrays, ``report_restoration.json`` the names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslim.config import read_json
from sslim.report.figures import SERIES, drawing, inline_svg, mark_stretches, plain_text
from sslim.report.markup import Markup, element
from sslim.storage import load_tensors, save_tensors, write_json

if TYPE_CHECKING:
    import numpy as np

TENSORS, NAMES = "report_restoration.safetensors", "report_restoration.json"
ARRAYS = ("original_TO", "altered_TF", "restored_TO", "covered_T", "channels_O")


@dataclass(frozen=True, kw_only=True)
class Restoration:
    """Arrays over the T frames of one utterance, frames that the model stacks taken apart.

    Attributes:
        id: The utterance.
        frame_shift_s: Seconds from one frame to the next.
        original_TO: (T, O) what was to be restored, low frequencies first.
        altered_TF: (T, F) what the model saw.
        restored_TO: (T, O) what it made of that.
        covered_T: (T,) bool, True on frames that were altered in time, or may have been.
        channels_O: (O,) bool, True on channels that were zero in all frames.
    """

    id: str
    frame_shift_s: float
    original_TO: np.ndarray
    altered_TF: np.ndarray
    restored_TO: np.ndarray
    covered_T: np.ndarray
    channels_O: np.ndarray

    def __post_init__(self) -> None:
        for name in ("original_TO", "altered_TF"):
            if getattr(self, name).ndim != 2 or not getattr(self, name).size:
                shape = getattr(self, name).shape
                raise ValueError(f"the restoration's {name} has shape {shape}; expected (frames, features)")
        num_frames = len(self.original_TO)
        expected = {
            "restored_TO": self.original_TO.shape,
            "altered_TF": (num_frames, *self.altered_TF.shape[1:2]),
            "covered_T": (num_frames,),
            "channels_O": self.original_TO.shape[1:],
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"the restoration's {name} has shape {getattr(self, name).shape}; expected {shape}")


def save_restoration(run: Path, shown: Restoration) -> None:
    """Writes a restoration into a run's folder."""
    import torch

    tensors = {name: torch.from_numpy(getattr(shown, name)).contiguous() for name in ARRAYS}
    save_tensors(run / TENSORS, tensors)
    write_json(run / NAMES, {"id": shown.id, "frame_shift_s": shown.frame_shift_s})


def load_restoration(run: Path) -> Restoration | None:
    """Reads the restoration of a run; None when it has none.

    Raises:
        ValueError: It cannot be read, or its parts do not fit each other.
    """
    import torch

    if not (run / TENSORS).is_file() or not (run / NAMES).is_file():
        return None
    tensors, names = load_tensors(run / TENSORS), read_json(run / NAMES)
    missing = [key for key in ARRAYS if key not in tensors]
    missing += [key for key in ("id", "frame_shift_s") if not isinstance(names, dict) or key not in names]
    if missing:
        raise ValueError(f"{run / TENSORS} and {NAMES} lack {missing[0]!r}")
    shift_s = names["frame_shift_s"]
    if not isinstance(shift_s, int | float) or not 0 < shift_s < float("inf"):
        raise ValueError(f"{run / NAMES} has the frame_shift_s {shift_s!r}; expected seconds above 0")
    kinds = {name: torch.bool if name in ("covered_T", "channels_O") else torch.float32 for name in ARRAYS}
    for name, kind in kinds.items():
        if tensors[name].dtype != kind:
            raise ValueError(f"{run / TENSORS} holds {name} as {tensors[name].dtype}; expected {kind}")
    arrays = {name: tensors[name].numpy() for name in ARRAYS}
    return Restoration(id=str(names["id"]), frame_shift_s=float(shift_s), **arrays)


def restoration_section(shown: Restoration, *, name: str) -> Markup:
    """The four pictures above each other, and in words what they show.

    Args:
        shown: What to draw.
        name: Unique on the page.
    """
    return element("figure", _pictures(shown, name=name), element("figcaption", " ".join(_sentences(shown))))


def _sentences(shown: Restoration) -> list[str]:
    import numpy as np

    sentences = []
    if shown.covered_T.any():
        sentences.append(
            "Orange bars above: stretches that were zeroed, replaced by others, or left for the model to find out."
        )
    if shown.channels_O.any():
        sentences.append("Orange bar on the left: channels that were zero throughout.")
    scored_TO = shown.covered_T[:, None] | shown.channels_O[None]
    if not scored_TO.any():
        scored_TO = np.ones_like(shown.original_TO, dtype=bool)
    error = float(np.abs(shown.restored_TO - shown.original_TO)[scored_TO].mean())
    guess = float(np.abs(shown.original_TO.mean(0) - shown.original_TO)[scored_TO].mean())
    sentences.append(
        f"What was altered is restored to {error:.2f} on average (absolute difference); "
        f"the mean of these frames would be {guess:.2f} away."
    )
    return sentences


def _pictures(shown: Restoration, *, name: str) -> Markup:
    import numpy as np

    low, high = np.percentile(shown.original_TO, (1, 99)).tolist()
    seen = (low, high)
    if shown.altered_TF.shape != shown.original_TO.shape:  # other features have a scale of their own
        seen = tuple(np.percentile(shown.altered_TF, (1, 99)).tolist())
    error_TO = np.abs(shown.restored_TO - shown.original_TO)
    rows: list[tuple[str, np.ndarray, float, float]] = [
        ("original", shown.original_TO, low, high),
        ("what the model saw", shown.altered_TF, *seen),
        ("restored", shown.restored_TO, low, high),
        ("difference", error_TO, 0.0, high - low),
    ]
    end_s = len(shown.original_TO) * shown.frame_shift_s
    with drawing(9.6, 7.6) as figure:
        panels: Any = figure.subplots(len(rows), 1, sharex=True, gridspec_kw={"hspace": 0.28})
        for axes, (label, values, lowest, highest) in zip(panels, rows, strict=True):
            top = values.shape[1]
            axes.imshow(
                values.T.astype("float32"),
                origin="lower",
                aspect="auto",
                cmap="magma",
                interpolation="nearest",
                extent=(0.0, end_s, 0.0, top),
                vmin=lowest,
                vmax=highest,
            )
            mark_stretches(axes, shown.covered_T, shown.frame_shift_s, height=top * 1.04)
            if top == len(shown.channels_O) and label != "original":
                _mark_channels(axes, shown.channels_O, x=-0.006 * end_s)
            axes.set_ylim(0, top)
            axes.set_ylabel("feature")
            axes.set_title(plain_text(f"{shown.id}: {label}" if label == "original" else label), fontsize=10)
            axes.grid(visible=False)
        panels[-1].set_xlabel("seconds")
        panels[0].set_xlim(0.0, end_s)
        return inline_svg(figure, name, f"{shown.id}: features before and after reconstruction")


def _mark_channels(axes: Any, channels_O: np.ndarray, *, x: float) -> None:
    import numpy as np

    where = np.flatnonzero(channels_O)
    for part in np.split(where, np.flatnonzero(np.diff(where) > 1) + 1) if len(where) else []:
        axes.plot([x, x], [part[0], part[-1] + 1], color=SERIES[1], linewidth=3, solid_capstyle="butt", clip_on=False)
