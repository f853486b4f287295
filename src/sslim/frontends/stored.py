"""Features that come from elsewhere: their width and their times are known, but no waveform can be turned into them."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from sslim.audio import Count, centred_num_frames, kaldi_num_frames, samples_of_ms
from sslim.batch import Padded
from sslim.frontends.batches import FixedTables
from sslim.frontends.config import StoredFeaturesConfig


class StoredFeatures(FixedTables):
    """What a front-end needs to know of stored features; attributes as those of the features that are computed."""

    window: Tensor

    def __init__(self, config: StoredFeaturesConfig) -> None:
        super().__init__()
        if config.dim < 1:
            raise ValueError(f"{config.name} features are {config.dim} wide; they must be 1 or more")
        self.config = config
        self.sample_rate = config.sample_rate
        times_ms = (config.frame_length_ms, config.frame_shift_ms)
        self.frame_length, self.shift = (
            samples_of_ms(time_ms, self.sample_rate) if math.isfinite(time_ms) else 0 for time_ms in times_ms
        )
        if self.shift < 1 or self.frame_length < 1:
            raise ValueError(
                f"{config.name} features have windows of {times_ms[0]:g} ms every {times_ms[1]:g} ms; "
                "both must be above zero and finite"
            )
        self.first_span = 0 if config.centred else self.frame_length
        self.dim = config.dim
        self.set_tables({"window": np.zeros(1)})  # tells on which device the others are

    def num_frames(self, num_samples: Count) -> Count:
        """Returns the frames that ``num_samples`` samples would have."""
        if self.config.centred:
            return centred_num_frames(num_samples, self.frame_length, self.shift)
        return kaldi_num_frames(num_samples, self.frame_length, self.shift)

    def forward(self, waveform_BS: Tensor, lengths_B: Tensor) -> Padded:
        """Refuses.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{self.config.name} features cannot be computed from a waveform, they were made elsewhere: give the model stored "
            "features (a corpus of them, or encode_features)"
        )
