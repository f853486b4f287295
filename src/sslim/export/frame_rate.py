"""States brought to a shorter frame period, because labels that belong to them have it: Kaldi's alignments every 10 ms.

A state is repeated, and there are as many as the model had feature frames before it stacked them, or as Kaldi's features of the
same audio have (25 ms windows, ``snip-edges``) where the model has no such frames. S3PRL repeats too (``upsample``), but puts
half of what is left over before the first state, which makes all states late by as many frames; here frame t has the state that
was made from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sslim.audio import kaldi_num_frames
from sslim.models.encoding import Inputs
from sslim.models.speech import SpeechModel

WINDOW_S = 0.025  # of Kaldi's features


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """How states are repeated.

    Attributes:
        factor: How often each.
        num_frames: (n,) frames that there should be of each utterance.
    """

    factor: int
    num_frames: np.ndarray

    def __call__(self, position: int, states_TD: Tensor) -> Tensor:
        """Returns the states of an utterance (T', D), by its position; T' differs from ``factor * T`` by less than a factor."""
        count = len(states_TD)
        wanted = min(max(int(self.num_frames[position]), self.factor * (count - 1) + 1), self.factor * (count + 1) - 1)
        return states_TD[(torch.arange(wanted) // self.factor).clamp(max=count - 1)]


def repeat_factor(frame_period_ms: float, model_period_s: float) -> int:
    """Returns how often each frame of a model is repeated.

    Args:
        frame_period_ms: Wanted.
        model_period_s: Seconds from one of the model's frames to the next.

    Raises:
        ValueError: The model's period is no multiple of the one that is wanted.
    """
    period_s = frame_period_ms / 1000.0
    factor = round(model_period_s / period_s) if period_s > 0 else 0
    if factor < 1 or abs(factor * period_s - model_period_s) > 1e-9:
        raise ValueError(
            f"--frame-period-ms is {frame_period_ms:g}: frames can only be repeated, and the model has one every "
            f"{model_period_s * 1000:g} ms; give that, divided by a whole number"
        )
    return factor


def repetition_to(frame_period_ms: float, model: SpeechModel, inputs: Inputs, model_period_s: float) -> Repetition:
    """Returns how to repeat a model's states of ``inputs``.

    Args:
        frame_period_ms: Wanted.
        model: Whose states.
        inputs: What it is run on.
        model_period_s: Seconds from one of its frames to the next.

    Raises:
        ValueError: The model's period is no multiple of the one that is wanted.
    """
    factor, period_s, frontend = repeat_factor(frame_period_ms, model_period_s), frame_period_ms / 1000.0, model.frontend
    if not inputs.is_waveform:
        counts = np.round(inputs.lengths * (inputs.unit_s / period_s))
    elif frontend is not None and frontend.base_dim and abs(frontend.base_frame_shift_s - period_s) < 1e-9:
        counts = np.array([frontend.num_base_frames(int(length)) for length in inputs.lengths])
    else:
        window, shift = round(WINDOW_S / inputs.unit_s), round(period_s / inputs.unit_s)
        counts = np.array([kaldi_num_frames(int(length), window, shift) for length in inputs.lengths])
    return Repetition(factor=factor, num_frames=counts.astype(np.int64))
