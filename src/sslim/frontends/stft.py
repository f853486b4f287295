"""Centred short-time Fourier transform, its powers or Mel channels of them, as S3PRL's preprocessors have them.

The conventions are those of torch's, torchaudio's and librosa's transforms: a periodic Hann window in the middle of the
transform, frames centred on multiples of the shift, the waveform mirrored at its ends (the edge sample once; librosa does so
before 0.10, since then only with ``pad_mode="reflect"``), triangular Mel channels between points evenly spaced on a Mel scale,
linear in Hz. An utterance that is no longer than half a transform gives no frame; the references cannot take it.

Transform and powers are float64, for the reason given in ``sslim.frontends.kaldi``.

Shapes: ``S`` samples, ``T`` frames, ``P`` samples of the transform, ``C`` spectral bins, ``F`` features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sslim.audio import Count, centred_num_frames, samples_of_ms
from sslim.batch import Padded
from sslim.frontends.batches import FixedTables, features_of_batch
from sslim.frontends.config import StftConfig

LEVEL_EPSILON = 1e-10  # added to the root mean square that a level is divided by
CHUNK_FRAMES = 512  # worked on at a time on a CPU: 4 MB of spectra
GPU_CHUNK_FRAMES = 32768


SLANEY_LINEAR_HZ = 1000.0  # up to here Slaney's scale is linear, 3 Mel every 200 Hz; above, 27 Mel are a factor of 6.4


def _hz_of_htk_mel(mel: np.ndarray) -> np.ndarray:
    return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)


def _hz_of_slaney_mel(mel: np.ndarray) -> np.ndarray:
    corner = 3.0 * SLANEY_LINEAR_HZ / 200.0
    return np.where(mel < corner, mel * 200.0 / 3.0, SLANEY_LINEAR_HZ * 6.4 ** ((np.maximum(mel, corner) - corner) / 27.0))


def _slaney_mel(hz: float) -> float:
    if hz < SLANEY_LINEAR_HZ:
        return 3.0 * hz / 200.0
    return 3.0 * SLANEY_LINEAR_HZ / 200.0 + 27.0 * math.log(hz / SLANEY_LINEAR_HZ, 6.4)


def mel_triangles(num_mel_bins: int, num_bins: int, sample_rate: int, scale: str = "htk") -> np.ndarray:
    """Returns the (C, F) triangular Mel weights, float32; a channel narrower than the bins' distance may have none.

    Args:
        num_mel_bins: F, between 0 Hz and half the sample rate.
        num_bins: C.
        sample_rate: Hz.
        scale: ``htk``, all channels 1 high, or ``slaney`` (Slaney, "Auditory Toolbox", 1998), all channels of area 1.
    """
    bin_hz = np.linspace(0.0, sample_rate // 2, num_bins)[:, None]
    if scale == "htk":
        highest = 2595.0 * math.log10(1.0 + (sample_rate // 2) / 700.0)
        points_hz = _hz_of_htk_mel(np.linspace(0.0, highest, num_mel_bins + 2))
    else:
        points_hz = _hz_of_slaney_mel(np.linspace(0.0, _slaney_mel(sample_rate // 2), num_mel_bins + 2))
    left, centre, right = points_hz[:-2], points_hz[1:-1], points_hz[2:]
    weights_CF = np.minimum((bin_hz - left) / (centre - left), (right - bin_hz) / (right - centre)).clip(min=0.0)
    if scale == "slaney":
        weights_CF = weights_CF * (2.0 / (right - left))
    return weights_CF.astype(np.float32)


class StftFeatures(FixedTables):
    """Spectral features of a padded batch of waveforms; the counterpart of ``KaldiFeatures``.

    Attributes:
        sample_rate: Hz.
        frame_length: Samples of a window.
        shift: Samples from one frame to the next.
        first_span: Samples from the first one on whose middle is the first frame's; 0, it is centred on the first sample.
        dim: Width F of the result.
        window: (P,) float64 window function in the middle of zeros.
        before_window: Zeros of the transform before the window.
        mel_table: (C, F) Mel weights; None for the bins themselves.
    """

    window: Tensor
    mel_table: Tensor | None

    def __init__(self, config: StftConfig, tables: Mapping[str, np.ndarray] | None = None) -> None:
        super().__init__()
        self.config = config
        self.sample_rate = config.sample_rate
        self.frame_length = samples_of_ms(config.frame_length_ms, self.sample_rate)
        self.shift = samples_of_ms(config.frame_shift_ms, self.sample_rate)
        self.first_span = 0
        self.transform_size = 2 * (config.num_bins - 1)
        _check(config, self.frame_length, self.shift)
        before = self.before_window = (self.transform_size - self.frame_length) // 2
        phase = 2 * np.pi * np.arange(self.frame_length) / self.frame_length
        window = np.zeros(self.transform_size)
        window[before : before + self.frame_length] = 0.5 - 0.5 * np.cos(phase)
        channels = (config.num_mel_bins, config.num_bins, self.sample_rate, config.mel_scale)
        mel_table = mel_triangles(*channels) if config.num_mel_bins else None
        self.set_tables({"window": window, "mel_table": mel_table, **(tables or {})})
        self.dim = config.num_mel_bins or config.num_bins

    def num_frames(self, num_samples: Count) -> Count:
        """Returns the frames of ``num_samples`` samples: a number, or an array or tensor of numbers."""
        return centred_num_frames(num_samples, self.transform_size, self.shift)

    def forward(self, waveform_BS: Tensor, lengths_B: Tensor) -> Padded:
        """Computes features; see :func:`sslim.frontends.batches.features_of_batch`."""
        return features_of_batch(waveform_BS, lengths_B, dim=self.dim, num_frames=self.num_frames, compute=self._batch)

    def _batch(self, waveform_BS: Tensor, lengths_B: Tensor, num_frames: int, dtype: torch.dtype) -> Tensor:
        """(B, S) samples, zero beyond each length, to (B, num_frames, F)."""
        if num_frames == 0:
            return waveform_BS.new_zeros(len(waveform_BS), 0, self.dim, dtype=dtype)
        waveform_BS = self._at_level(waveform_BS.to(self.window.dtype), lengths_B)
        if self.config.preemphasis:  # what this leaves in the first sample beyond a row's end is never looked at
            later_BS = waveform_BS[:, 1:] - self.config.preemphasis * waveform_BS[:, :-1]
            waveform_BS = torch.cat([waveform_BS[:, :1], later_BS], dim=1)
        limit = CHUNK_FRAMES if waveform_BS.device.type == "cpu" else max(1, GPU_CHUNK_FRAMES // len(waveform_BS))
        chunks = []
        for first in range(0, num_frames, limit):
            count = min(limit, num_frames - first)
            size = (count - 1) * self.shift + self.transform_size
            start = first * self.shift - self.transform_size // 2
            frames_BTP = _mirrored(waveform_BS, lengths_B, start, size).unfold(-1, self.transform_size, self.shift)
            chunks.append(self._frames(frames_BTP, dtype))
        return self._utterances(torch.cat(chunks, dim=1) if len(chunks) > 1 else chunks[0], lengths_B)

    def _frames(self, frames_BTP: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, P) samples to (B, T, F') of a type; what a frame tells alone."""
        spectrum_BTC = torch.fft.rfft(frames_BTP * self.window)
        power_BTC = torch.view_as_real(spectrum_BTC).square().sum(-1).to(dtype)
        scale = self.config.decibels
        if scale is not None:
            level_db = 10.0 * power_BTC.clamp(min=scale.floor**2).log10() - scale.reference_db
            return ((level_db + scale.range_db) / scale.range_db).clamp(0.0, 1.0)
        values = power_BTC if self.mel_table is None else power_BTC @ self.mel_table.to(power_BTC.dtype)
        return (values + self.config.log_offset).log() if self.config.log else values

    def _utterances(self, values_BTF: Tensor, lengths_B: Tensor) -> Tensor:
        """What can only be done with all frames of an utterance: nothing here."""
        return values_BTF

    def _at_level(self, waveform_BS: Tensor, lengths_B: Tensor) -> Tensor:
        if self.config.level_db is None:
            return waveform_BS
        mean_B1 = waveform_BS.square().sum(-1, keepdim=True) / lengths_B.clamp(min=1)[:, None]
        # the square root of nothing has no finite gradient; below 1e-30 the constant in the divisor decides anyway
        return waveform_BS * (10 ** (self.config.level_db / 20) / (mean_B1.clamp(min=1e-30).sqrt() + LEVEL_EPSILON))


def _check(config: StftConfig, frame_length: int, shift: int) -> None:
    if config.num_bins < 2 or not 2 <= frame_length <= 2 * (config.num_bins - 1) or shift < 1:
        raise ValueError(
            f"windows of {frame_length} samples every {shift} with num_bins {config.num_bins}: "
            f"expected 2 to {2 * (config.num_bins - 1)} samples, those of the transform, every 1 or more"
        )
    if config.num_mel_bins < 0:
        raise ValueError(f"num_mel_bins is {config.num_mel_bins}; it must be 0 (the bins themselves) or more")
    if not 0 <= config.preemphasis <= 1:
        raise ValueError(f"preemphasis is {config.preemphasis:g}; it must lie between 0 and 1")
    if config.decibels is not None:
        if config.num_mel_bins or config.log:
            raise ValueError("decibels are a scale of the bins themselves: expected num_mel_bins 0 and log false beside them")
        if not (config.decibels.floor > 0 and config.decibels.range_db > 0):
            raise ValueError(f"decibels are {config.decibels}; floor and range_db must be above zero")
    if not (math.isfinite(config.log_offset) and config.log_offset > 0):
        raise ValueError(f"log_offset is {config.log_offset:g}; it must be above zero")


def _mirrored(waveform_BS: Tensor, lengths_B: Tensor, start: int, size: int) -> Tensor:
    """(B, size) samples from position ``start`` on, each row mirrored at its own first and last sample."""
    position_1S = torch.arange(start, start + size, device=waveform_BS.device)[None]
    last_B1 = (lengths_B - 1).clamp(min=0)[:, None]
    phase_BS = position_1S.remainder((2 * last_B1).clamp(min=1))
    return waveform_BS.gather(1, torch.minimum(phase_BS, 2 * last_B1 - phase_BS).clamp(min=0))
