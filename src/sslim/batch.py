"""The values that travel between the parts: padded tensors with their lengths, and what a model returns.

Legend of shape suffixes, used throughout the package: ``B`` batch, ``S`` samples, ``T`` frames, ``F`` features, ``D`` width,
``N`` heads, ``H`` head width, ``L`` layers, ``K`` clusters, ``V`` symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORED_LABEL = -100  # what pads labels; torch's cross-entropy skips it


def valid_mask(lengths_B: Tensor, num_frames: int) -> Tensor:
    """Returns (B, T) bool, True on the first ``lengths_B[b]`` frames of each row."""
    return torch.arange(num_frames, device=lengths_B.device)[None, :] < lengths_B[:, None]


def zero_padding(x_BTD: Tensor, lengths_B: Tensor) -> Tensor:
    """Returns a copy of ``x_BTD`` whose frames beyond each row's length are zero (NaN there included)."""
    return x_BTD.masked_fill(~valid_mask(lengths_B, x_BTD.shape[1])[..., None], 0.0)


@dataclass(frozen=True, kw_only=True)
class Padded:
    """A padded batch of sequences.

    Attributes:
        values: (B, T, F) features or (B, S) samples; zero beyond each length.
        lengths: (B,) int64 number of valid frames (or samples).
    """

    values: Tensor
    lengths: Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch for training or evaluation.

    Attributes:
        inputs: (B, T, F) base features before normalisation (what the feature store holds), or (B, S) waveform.
        lengths: (B,) int64 valid frames or samples of ``inputs``.
        ids: Utterance ids, for error messages.
        labels: (B, T') int64 at the model's own frame period, padded with ``IGNORED_LABEL``; None without targets.
        duration_s: Seconds of real audio in the batch.
        clean: (B, S) waveform without the noise that ``inputs`` have; None where none is added.
        teacher: (B, T'', D') stored frames of a teacher, at its own frame period; None without.
    """

    inputs: Tensor
    lengths: Tensor
    ids: tuple[str, ...]
    labels: Tensor | None = None
    duration_s: float = 0.0
    clean: Tensor | None = None
    teacher: Padded | None = None

    @property
    def is_waveform(self) -> bool:
        return self.inputs.dim() == 2

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        teacher = self.teacher
        return replace(
            self,
            inputs=function(self.inputs),
            lengths=function(self.lengths),
            labels=None if self.labels is None else function(self.labels),
            clean=None if self.clean is None else function(self.clean),
            teacher=None if teacher is None else Padded(values=function(teacher.values), lengths=function(teacher.lengths)),
        )


@dataclass(frozen=True, kw_only=True)
class EncoderOutput:
    """What an encoder or a speech model returns. Frames beyond ``lengths`` are zero in every tensor.

    Attributes:
        embed: (B, T, D) output of the input projection, before positions (None from a bare encoder).
        layers: N + 1 tensors (B, T, D): ``[0]`` enters the first block, ``[k]`` is what block application k gives.
            Empty when layers were not asked for.
        final: (B, T, D) after the final norm; equals ``layers[-1]`` for post-norm models.
        lengths: (B,) int64 valid frames.
        attentions: One (B, N, T, T) tensor for each block application, only when weights were asked for.
    """

    final: Tensor
    lengths: Tensor
    layers: tuple[Tensor, ...] = ()
    embed: Tensor | None = None
    attentions: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What an objective returns for one micro-batch.

    Attributes:
        loss: Scalar with gradient.
        metrics: Name to (sum, count), both 0-d without gradient; they add up over micro-batches and processes.
    """

    loss: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]
