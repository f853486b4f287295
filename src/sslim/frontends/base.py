"""What every front-end offers to models, data preparation and training."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from sslim.batch import Padded


@runtime_checkable
class Frontend(Protocol):
    """Waveform to features.

    A front-end has two halves. ``base_features`` is what a feature store holds: the costly part, before normalisation.
    ``finish`` does the rest (deltas, normalisation, stacking) on the fly, on any device. ``forward`` is both.

    Attributes:
        config: Its description.
        sample_rate: Hz of the waveforms it takes.
        frame_shift_s: Seconds from one output frame to the next.
        feature_dim: Width of the output.
        base_dim: Width of the base features; 0 when nothing can be stored (a learnt front-end).
        base_frame_shift_s: Seconds from one base frame to the next.
        stack: Base frames in an output frame.
        statistics_source: Where the global mean and standard deviation come from; None when they are missing or not needed.
    """

    config: Any
    sample_rate: int
    frame_shift_s: float
    feature_dim: int
    base_dim: int
    base_frame_shift_s: float
    stack: int

    @property
    def statistics_source(self) -> str | None:
        """Where the global statistics come from."""
        ...

    def num_frames(self, num_samples: int) -> int:
        """Output frames of ``num_samples`` samples."""
        ...

    def num_base_frames(self, num_samples: int) -> int:
        """Base frames of ``num_samples`` samples."""
        ...

    def num_stacked_frames(self, num_base_frames: int) -> int:
        """Output frames of ``num_base_frames`` base frames."""
        ...

    def base_features(self, waveform_BS: Tensor, lengths_B: Tensor) -> Padded:
        """Costly half: (B, S) samples to (B, T, base_dim), zero beyond each length."""
        ...

    def finish(self, base: Padded) -> Padded:
        """Cheap half: base features to the output (B, T', feature_dim), zero beyond each length.

        Raises:
            ValueError: Global statistics are needed and missing; the message says what to pass.
        """
        ...

    def forward(self, waveform_BS: Tensor, lengths_B: Tensor) -> Padded:
        """Both halves."""
        ...

    def set_statistics(self, mean_F: Tensor, std_F: Tensor, *, source: str) -> None:
        """Stores the global mean and standard deviation and notes where they come from (``config`` is updated too)."""
        ...
