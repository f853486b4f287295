"""MFCC of a centred transform in decibels, as librosa computes them, with S3PRL's replacement of C0 by the frame's level.

Decibels are of powers, relative to 1 and not below 1e-10; channels far below the loudest one of the utterance are raised to
``range_db`` below it. So a frame depends on the whole utterance, and is never computed from a piece of it.

Shapes: ``T`` frames, ``P`` samples of the transform, ``F`` Mel channels and, last, the root mean square.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sslim.batch import valid_mask
from sslim.frontends.config import StftMfccConfig
from sslim.frontends.stft import StftFeatures

POWER_FLOOR = 1e-10
TINY = 1e-30  # under a square root: silence has a finite gradient


class StftMfccFeatures(StftFeatures):
    """MFCC of a padded batch of waveforms; attributes as those of :class:`StftFeatures`.

    Attributes:
        cosines: (F, num_coefficients) orthonormal DCT-II, float64.
    """

    cosines: Tensor

    def __init__(self, config: StftMfccConfig) -> None:
        num_bins, count = config.spectrum.num_mel_bins, config.num_coefficients
        if not 1 <= count <= num_bins:
            raise ValueError(f"num_coefficients is {count}; with {num_bins} Mel channels it must be 1 to {num_bins}")
        if config.spectrum.log or not config.range_db > 0:
            raise ValueError("MFCC in decibels are made from powers: expected spectrum.log false and range_db above zero")
        cosines = np.sqrt(2 / num_bins) * np.cos(np.pi / num_bins * (np.arange(num_bins)[:, None] + 0.5) * np.arange(count))
        cosines[:, 0] = np.sqrt(1 / num_bins)
        super().__init__(config.spectrum, {"cosines": cosines})
        self.mfcc = config
        self.dim = count

    def _frames(self, frames_BTP: Tensor, dtype: torch.dtype) -> Tensor:
        heard_BTW = frames_BTP[..., self.before_window : self.before_window + self.frame_length]
        rms_BT1 = heard_BTW.square().mean(-1, keepdim=True).clamp(min=TINY).sqrt()
        return torch.cat([super()._frames(frames_BTP, dtype), rms_BT1.to(dtype)], dim=-1)

    def _utterances(self, values_BTF: Tensor, lengths_B: Tensor) -> Tensor:
        level_BTF = 10.0 * values_BTF[..., :-1].clamp(min=POWER_FLOOR).log10()
        mask_BT1 = valid_mask(self.num_frames(lengths_B).to(values_BTF.device), values_BTF.shape[1])[..., None]
        loudest_B11 = level_BTF.masked_fill(~mask_BT1, -float("inf")).amax(dim=(1, 2), keepdim=True)
        cepstra = torch.maximum(level_BTF, loudest_B11 - self.mfcc.range_db) @ self.cosines.to(level_BTF.dtype)
        return torch.cat([values_BTF[..., -1:], cepstra[..., 1:]], dim=-1) if self.mfcc.rms else cepstra
