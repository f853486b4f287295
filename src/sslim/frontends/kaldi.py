"""Kaldi-compatible log-Mel filterbank, MFCC and spectrogram in plain tensor operations.

The definitions are Kaldi's (Povey et al., "The Kaldi speech recognition toolkit", 2011; ``feature-window.cc`` and
``mel-computations.cc``), without dither, so that a waveform always gives the same features. For each frame: subtract its mean,
pre-emphasise, window, pad to a power of two, Fourier transform, power, Mel-weighted sums, logarithm.

Everything up to the transform is float64. In a fricative the lowest channels hold 1e-9 of the frame's power, and float32
rounding in the transform moves their logarithm by up to 3e-3 (measured on real speech, Kaldi's own code included); float64
costs a third of the speed and leaves 1e-5.

Shapes: ``S`` samples, ``T`` frames, ``W`` samples of a window, ``P`` window padded to the transform's size, ``C`` spectral
bins, ``F`` features.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sslim.audio import Count, kaldi_num_frames, samples_of_ms
from sslim.batch import Padded
from sslim.frontends.batches import FixedTables, features_of_batch
from sslim.frontends.config import FilterbankConfig, MfccConfig, SpectrogramConfig

KaldiConfig = FilterbankConfig | MfccConfig | SpectrogramConfig

EPSILON = float(np.finfo(np.float32).eps)  # Kaldi's floor under every logarithm
TINY = 1e-30  # floor under a square root, for a finite gradient in silence; 1e-15 in magnitude is far below EPSILON
# Frames worked on at a time. On a CPU it keeps the intermediate values (about 10 kB a frame) close to the second-level cache;
# on a GPU it only bounds memory.
CPU_CHUNK_FRAMES = 160
GPU_CHUNK_FRAMES = 32768

WINDOWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # of the phase 2 pi n / (W - 1)
    "hamming": lambda phase: 0.54 - 0.46 * np.cos(phase),
    "hann": lambda phase: 0.5 - 0.5 * np.cos(phase),
    "povey": lambda phase: (0.5 - 0.5 * np.cos(phase)) ** 0.85,
    "rectangular": np.ones_like,
    "blackman": lambda phase: 0.42 - 0.5 * np.cos(phase) + 0.08 * np.cos(2 * phase),
}


def window_function(name: str, size: int) -> np.ndarray:
    """Returns the (W,) float64 window; both ends are included (symmetric), as in Kaldi.

    Raises:
        ValueError: Unknown window.
    """
    if name not in WINDOWS:
        raise ValueError(f"window is {name!r}; accepted are {', '.join(WINDOWS)}")
    return WINDOWS[name](2 * np.pi * np.arange(size) / max(size - 1, 1))


def mel_of_hz(frequency_hz: np.ndarray) -> np.ndarray:
    """Returns the Mel value (HTK formula) in float32, step by step as Kaldi rounds it."""
    return np.float32(1127.0) * np.log(np.float32(1.0) + np.asarray(frequency_hz, np.float32) / np.float32(700.0))


def mel_weights(config: FilterbankConfig, transform_size: int) -> np.ndarray:
    """Returns the (C, F) triangular Mel weights, C = transform_size / 2 + 1; the Nyquist bin has none.

    They are computed in float32: on a weight close to zero Kaldi's own rounding is visible, and the references share it.

    Raises:
        ValueError: The band edges are not in order within the spectrum, or a channel is so narrow that no bin lies in it.
    """
    nyquist_hz = config.sample_rate / 2
    high_hz = config.high_freq_hz if config.high_freq_hz > 0 else nyquist_hz + config.high_freq_hz
    if not 0 <= config.low_freq_hz < high_hz <= nyquist_hz:
        raise ValueError(
            f"the filterbank reaches from {config.low_freq_hz:g} to {high_hz:g} Hz; "
            f"expected 0 <= low < high <= {nyquist_hz:g}, half the sample rate"
        )
    low, high = mel_of_hz(np.array([config.low_freq_hz, high_hz]))
    step = (high - low) / np.float32(config.num_mel_bins + 1)
    bins = np.arange(config.num_mel_bins, dtype=np.float32)
    left, centre, right = (low + (bins + np.float32(k)) * step for k in range(3))
    bin_hz = np.float32(config.sample_rate / transform_size) * np.arange(transform_size // 2, dtype=np.float32)
    mel_C1 = mel_of_hz(bin_hz)[:, None]
    weights_CF = np.minimum((mel_C1 - left) / (centre - left), (right - mel_C1) / (right - centre)).clip(min=0)
    if not weights_CF.any(axis=0).all():
        empty = int(np.flatnonzero(~weights_CF.any(axis=0))[0])
        raise ValueError(
            f"num_mel_bins is {config.num_mel_bins}: channel {empty} is narrower than a spectral bin of "
            f"{config.sample_rate / transform_size:g} Hz; use fewer channels or a longer frame"
        )
    return np.concatenate([weights_CF, np.zeros((1, config.num_mel_bins), np.float32)])


def cepstral_weights(config: MfccConfig) -> np.ndarray:
    """Returns the (F, num_coefficients) orthonormal DCT-II with the lifter multiplied in, float64.

    Raises:
        ValueError: More coefficients than Mel channels.
    """
    num_bins = config.filterbank.num_mel_bins
    if not 1 <= config.num_coefficients <= num_bins:
        raise ValueError(
            f"num_coefficients is {config.num_coefficients}; with {num_bins} Mel channels it must be 1 to {num_bins}"
        )
    order = np.arange(config.num_coefficients)
    weights = np.sqrt(2 / num_bins) * np.cos(np.pi / num_bins * (np.arange(num_bins)[:, None] + 0.5) * order)
    weights[:, 0] = math.sqrt(1 / num_bins)
    lifter = config.cepstral_lifter
    return weights * (1 + 0.5 * lifter * np.sin(np.pi * order / lifter)) if lifter else weights


def _check(config: KaldiConfig, filterbank: FilterbankConfig) -> None:
    if filterbank.num_mel_bins < 1:
        raise ValueError(f"num_mel_bins is {filterbank.num_mel_bins}; it must be at least 1")
    if not 0 <= filterbank.preemphasis <= 1:
        raise ValueError(f"preemphasis is {filterbank.preemphasis:g}; it must lie between 0 and 1")
    if not (math.isfinite(filterbank.energy_floor) and filterbank.energy_floor >= 0):
        raise ValueError(f"energy_floor is {filterbank.energy_floor:g}; it must not be negative")
    if not (math.isfinite(filterbank.waveform_scale) and filterbank.waveform_scale > 0):
        raise ValueError(f"waveform_scale is {filterbank.waveform_scale:g}; it must be above zero")
    if config.kind != "filterbank" and not (filterbank.log and filterbank.power):
        raise ValueError(f"a {config.kind} is made from log power: its filterbank cannot have log or power switched off")


class _Workspace:
    """Two large intermediate tensors, kept from one chunk to the next of the same call.

    Memory of this size goes back to the system when it is freed, and getting it again costs time. Not for use under autograd,
    whose backward pass needs the values.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def get(self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns memory to write to."""
        size = shape.numel()
        if name not in self.kept or self.kept[name].numel() < size:
            self.kept[name] = torch.empty(size, dtype=dtype, device=device)
        return self.kept[name][:size].view(shape)


class KaldiFeatures(FixedTables):
    """Per-frame spectral features of a padded batch of waveforms.

    On a CPU one utterance is worked on at a time (faster than a padded batch, and independent of the batch bit for bit); on
    other devices the whole batch. Both go by chunks of frames, so that hours of audio take bounded memory beside the result.
    The tables are no part of the state; they follow the module's device and keep their type when a model is cast.

    Attributes:
        sample_rate: Hz.
        frame_length: Samples of a frame.
        shift: Samples from one frame to the next.
        first_span: Samples from the first one on whose middle is the first frame's; 0 for a frame centred on the first sample.
        dim: Width F of the result.
        window: (P,) float64 window function with the waveform scale, zeros beyond the frame.
        spectral_table: (2C, F) Mel weights of squared real and imaginary parts, (C, F) of magnitudes; None for a spectrogram.
        cepstral_table: (F', F) cosines and lifter of an MFCC, else None.
    """

    window: Tensor
    spectral_table: Tensor | None
    cepstral_table: Tensor | None

    def __init__(self, config: KaldiConfig) -> None:
        super().__init__()
        filterbank = config if isinstance(config, FilterbankConfig) else config.filterbank
        _check(config, filterbank)
        self.config = config
        self.filterbank = filterbank
        self.sample_rate = filterbank.sample_rate
        self.frame_length = samples_of_ms(filterbank.frame_length_ms, self.sample_rate)
        self.shift = samples_of_ms(filterbank.frame_shift_ms, self.sample_rate)
        if self.frame_length < 2 or self.shift < 1:
            raise ValueError(
                f"frames of {filterbank.frame_length_ms:g} ms every {filterbank.frame_shift_ms:g} ms are {self.frame_length} "
                f"samples every {self.shift}; expected at least 2 every 1"
            )
        self.first_span = self.frame_length if filterbank.snip_edges else self.shift
        self.transform_size = 1 << (self.frame_length - 1).bit_length()
        window = window_function(filterbank.window, self.frame_length) * filterbank.waveform_scale
        self.first_weight = float(window[0])
        tables = {"window": np.pad(window, (0, self.transform_size - self.frame_length))}
        self.dim = self.transform_size // 2 + 1
        if config.kind != "spectrogram":
            self.dim = filterbank.num_mel_bins + int(filterbank.use_energy)
            weights_CF = mel_weights(filterbank, self.transform_size)
            # every row twice: squares of real and imaginary parts then need one product and no slow sum over pairs
            tables["spectral_table"] = np.repeat(weights_CF, 2, axis=0) if filterbank.power else weights_CF
        if isinstance(config, MfccConfig):
            self.dim = config.num_coefficients
            tables["cepstral_table"] = cepstral_weights(config).astype(np.float32)
        self.set_tables({"spectral_table": None, "cepstral_table": None, **tables})

    def num_frames(self, num_samples: Count) -> Count:
        """Returns the frames of ``num_samples`` samples: a number, or an array or tensor of numbers."""
        return kaldi_num_frames(num_samples, self.frame_length, self.shift, snip_edges=self.filterbank.snip_edges)

    def forward(self, waveform_BS: Tensor, lengths_B: Tensor) -> Padded:
        """Computes features; see :func:`sslim.frontends.batches.features_of_batch`."""
        return features_of_batch(waveform_BS, lengths_B, dim=self.dim, num_frames=self.num_frames, compute=self._batch)

    def _batch(self, waveform_BS: Tensor, lengths_B: Tensor, num_frames: int, dtype: torch.dtype) -> Tensor:
        """(B, S) samples to (B, num_frames, F), by chunks of frames; what lies beyond a row's own frames is arbitrary."""
        if num_frames == 0:
            return waveform_BS.new_zeros(len(waveform_BS), 0, self.dim, dtype=dtype)
        if not self.filterbank.snip_edges:
            waveform_BS = self._reflect(waveform_BS, lengths_B, num_frames)
        num_samples = waveform_BS.shape[1]
        limit = CPU_CHUNK_FRAMES if waveform_BS.device.type == "cpu" else max(1, GPU_CHUNK_FRAMES // len(waveform_BS))
        reuse = num_frames > limit and not (torch.is_grad_enabled() and waveform_BS.requires_grad)
        workspace = _Workspace() if reuse else None
        chunks = []
        for first in range(0, num_frames, limit):
            # One sample more at the start, for pre-emphasis. The window's zeros reach up to the transform's size, so frames are
            # cut that long. Zeros stand for what is outside the waveform; the window keeps them out.
            start = first * self.shift - 1
            stop = start + 1 + (min(limit, num_frames - first) - 1) * self.shift + self.transform_size
            samples = waveform_BS[:, max(start, 0) : stop].to(self.window.dtype)
            if start < 0 or stop > num_samples:
                samples = functional.pad(samples, (max(-start, 0), max(stop - num_samples, 0)))
            chunks.append(self._chunk(samples, dtype, workspace))
        return torch.cat(chunks, dim=1) if len(chunks) > 1 else chunks[0]

    def _reflect(self, waveform_BS: Tensor, lengths_B: Tensor, num_frames: int) -> Tensor:
        """Extends each row so that frame t starts at sample ``t * shift``: centred, mirrored at the ends, edge sample twice."""
        before = self.frame_length // 2 - self.shift // 2
        size = (num_frames - 1) * self.shift + self.frame_length
        position_1S = torch.arange(size, device=waveform_BS.device)[None] - before
        length_B1 = lengths_B.clamp(min=1)[:, None]
        phase_BS = position_1S.remainder(2 * length_B1)
        return waveform_BS.gather(1, torch.minimum(phase_BS, 2 * length_B1 - 1 - phase_BS))

    def _chunk(self, samples_BS: Tensor, dtype: torch.dtype, workspace: _Workspace | None) -> Tensor:
        """(B, 1 + (T - 1) * shift + P) samples, one before the first frame, to (B, T, F) features of type ``dtype``."""
        filterbank, size = self.filterbank, self.transform_size
        current_BS = samples_BS[:, 1:]
        raw_BTW = current_BS.unfold(-1, size, self.shift)[..., : self.frame_length]
        mean_BT1 = raw_BTW.mean(-1, keepdim=True) if filterbank.remove_dc else torch.zeros_like(raw_BTW[..., :1])
        # Pre-emphasis of the samples once instead of every frame (2.5 times fewer): both steps are linear, so what the frame's
        # mean contributes is subtracted after; only the first sample of a frame, which has no predecessor, differs.
        kept = 1.0 - filterbank.preemphasis
        emphasized_BS = torch.sub(current_BS, samples_BS[:, :-1], alpha=filterbank.preemphasis)
        emphasized_BTP = emphasized_BS.unfold(-1, size, self.shift)
        memory = (
            None if workspace is None else workspace.get("windowed", emphasized_BTP.shape, samples_BS.dtype, samples_BS.device)
        )
        windowed_BTP = torch.sub(emphasized_BTP, mean_BT1, alpha=kept, out=memory).mul_(self.window)
        windowed_BTP[..., :1] = (raw_BTW[..., :1] - mean_BT1).mul_(kept * self.first_weight)
        parts_BTC2 = torch.view_as_real(torch.fft.rfft(windowed_BTP))
        if workspace is None:
            squares_BTC2 = parts_BTC2.to(dtype).square()
        else:
            squares_BTC2 = workspace.get("squares", parts_BTC2.shape, dtype, parts_BTC2.device).copy_(parts_BTC2).square_()
        if self.spectral_table is None:
            values = _log(_power(squares_BTC2))
        else:
            table = self.spectral_table.to(dtype)
            values = squares_BTC2.flatten(-2) @ table if filterbank.power else _magnitude(squares_BTC2) @ table
            values = _log(values) if filterbank.log else values
        if self.cepstral_table is not None:
            values = values @ self.cepstral_table.to(dtype)
        if self.config.kind != "spectrogram" and not filterbank.use_energy:
            return values
        if filterbank.raw_energy:
            energy_BT1 = ((raw_BTW - mean_BT1) * filterbank.waveform_scale).square().sum(-1, keepdim=True)
        else:
            energy_BT1 = windowed_BTP.square().sum(-1, keepdim=True)
        replaced = 0 if self.config.kind == "filterbank" else 1  # C0 of an MFCC, bin 0 of a spectrogram
        energy_BT1 = energy_BT1.clamp(min=filterbank.energy_floor)
        return torch.cat([_log(energy_BT1).to(dtype), values[..., replaced:]], dim=-1)


def _power(squares_BTC2: Tensor) -> Tensor:
    """Sums squared real and imaginary parts; the product with ones is five times faster than a sum over two."""
    return squares_BTC2 @ squares_BTC2.new_ones(2)


def _magnitude(squares_BTC2: Tensor) -> Tensor:
    return _power(squares_BTC2).clamp(min=TINY).sqrt()


def _log(values: Tensor) -> Tensor:
    return values.clamp(min=EPSILON).log_()
