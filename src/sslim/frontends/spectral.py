"""SpectralFrontend: spectral features, deltas, normalisation, stacking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sslim.audio import num_stacked_frames
from sslim.batch import Padded, zero_padding
from sslim.frontends.config import (
    FeaturesConfig,
    FilterbankConfig,
    MfccConfig,
    SpectralFrontendConfig,
    SpectrogramConfig,
    StftConfig,
    StftMfccConfig,
    StoredFeaturesConfig,
)
from sslim.frontends.context import append_deltas, stack_frames
from sslim.frontends.kaldi import KaldiFeatures
from sslim.frontends.normalization import normalize_globally, normalize_per_utterance, without_mean
from sslim.frontends.statistics import PUBLISHED_STATISTICS, check_statistics
from sslim.frontends.stft import StftFeatures
from sslim.frontends.stft_mfcc import StftMfccFeatures
from sslim.frontends.stored import StoredFeatures

Features = KaldiFeatures | StftFeatures | StoredFeatures
FEATURES: dict[type, Callable[[Any], Features]] = {
    FilterbankConfig: KaldiFeatures,
    MfccConfig: KaldiFeatures,
    SpectrogramConfig: KaldiFeatures,
    StftConfig: StftFeatures,
    StftMfccConfig: StftMfccFeatures,
    StoredFeaturesConfig: StoredFeatures,
}


def build_features(config: FeaturesConfig) -> Features:
    """Returns the per-frame transformation that ``config`` describes.

    Raises:
        ValueError: The description contradicts itself.
    """
    return FEATURES[type(config)](config)


def _check(config: SpectralFrontendConfig) -> None:
    if config.cepstra < 0:
        raise ValueError(f"cepstra is {config.cepstra}; it must not be negative")
    if not 0 <= config.deltas <= 2:
        raise ValueError(f"deltas is {config.deltas}; accepted are 0, 1 and 2")
    if config.delta_window < 1:
        raise ValueError(f"delta_window is {config.delta_window}; it must be at least 1")
    if config.stack < 1:
        raise ValueError(f"stack is {config.stack}; it must be at least 1")
    if config.normalization.eps < 0:
        raise ValueError(f"normalization.eps is {config.normalization.eps}; it must not be negative")


def _dct(dim: int, num_kept: int) -> Tensor:
    """Returns (F, C): the lowest C columns of the orthonormal DCT-II."""
    band = torch.arange(dim, dtype=torch.float64)[:, None]
    order = torch.arange(num_kept, dtype=torch.float64)[None, :]
    matrix = torch.cos(torch.pi * order * (band + 0.5) / dim) * (2.0 / dim) ** 0.5
    matrix[:, 0] *= 0.5**0.5
    return matrix.float()


class SpectralFrontend(nn.Module):
    """Spectral features of waveforms; implements :class:`sslim.frontends.base.Frontend`.

    The state holds nothing but ``mean`` and ``std`` (F * (1 + deltas),), and these only once they are set.
    Everything is computed in float32 (float64 for float64 waveforms), inside autocast regions too.

    Attributes:
        features: The per-frame transformation.
        mean: Stored global mean; None while missing or not needed.
        std: Stored global standard deviation; likewise.
    """

    mean: Tensor | None
    std: Tensor | None
    dct: Tensor | None

    def __init__(self, config: SpectralFrontendConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.features = build_features(config.features)
        self.sample_rate = self.features.sample_rate
        self.base_dim = self.features.dim
        self.base_frame_shift_s = self.features.shift / self.sample_rate
        self.stack = config.stack
        self.frame_shift_s = self.features.shift * config.stack / self.sample_rate
        if config.cepstra > self.base_dim:
            raise ValueError(f"cepstra is {config.cepstra}, more than the {self.base_dim} features it is made from")
        self.register_buffer("dct", _dct(self.base_dim, config.cepstra) if config.cepstra else None, persistent=False)
        self.normalized_dim = (config.cepstra or self.base_dim) * (1 + config.deltas)
        self.feature_dim = self.normalized_dim * config.stack
        self.register_buffer("mean", None)
        self.register_buffer("std", None)

    @property
    def statistics_source(self) -> str | None:
        return self.config.normalization.statistics

    def num_base_frames(self, num_samples: int) -> int:
        return self.features.num_frames(num_samples)

    def num_stacked_frames(self, num_base_frames: int) -> int:
        return num_stacked_frames(num_base_frames, self.stack, self.config.stack_tail)

    def num_frames(self, num_samples: int) -> int:
        return self.num_stacked_frames(self.num_base_frames(num_samples))

    def set_statistics(self, mean_F: Tensor, std_F: Tensor, *, source: str) -> None:
        """Stores the global mean and standard deviation and notes where they come from (``config`` is updated too).

        Args:
            mean_F: (F * (1 + deltas),) mean of the features before stacking.
            std_F: Standard deviation, likewise.
            source: For example ``libri-960``.

        Raises:
            ValueError: This front-end takes no global statistics, or these do not fit it.
        """
        if self.config.normalization.kind != "global":
            raise ValueError(f"a front-end with normalization {self.config.normalization.kind!r} takes no global statistics")
        check_statistics(mean_F, std_F, source)
        dim = self.normalized_dim
        if len(mean_F) != dim:
            raise ValueError(f"statistics {source} are for {len(mean_F)} features; this front-end has {dim}")
        device = self.features.window.device
        self.mean = mean_F.detach().to(device=device, dtype=torch.float32, copy=True)
        self.std = std_F.detach().to(device=device, dtype=torch.float32, copy=True)
        self.config = replace(self.config, normalization=replace(self.config.normalization, statistics=source))

    def base_features(self, waveform_BS: Tensor, lengths_B: Tensor) -> Padded:
        """Features before deltas, normalisation and stacking; each utterance is taken for all that its speaker has said.

        Args:
            waveform_BS: (B, S) float samples in [-1, 1] at ``sample_rate``.
            lengths_B: (B,) valid samples.

        Returns:
            (B, T, base_dim), zero beyond each length; T is that of the longest row.

        Raises:
            ValueError: The shapes do not fit.
        """
        with torch.autocast(waveform_BS.device.type, enabled=False):
            features = self.features(waveform_BS, lengths_B)
            return without_mean(features) if self.config.normalization.kind == "speaker" else features

    def finish(self, base: Padded) -> Padded:
        """Cepstra, deltas, normalisation, stacking of base features (B, T, base_dim), any float type, to (B, T', feature_dim).

        Raises:
            ValueError: Global statistics are needed and missing.
        """
        return stack_frames(self._normalize(self.unnormalized(base)), self.stack, self.config.stack_tail)

    def unnormalized(self, base: Padded) -> Padded:
        """Cepstra and deltas of base features (B, T, base_dim), any float type: (B, T, normalized_dim)."""
        values = base.values if base.values.dtype == torch.float64 else base.values.float()
        if self.dct is not None:
            with torch.autocast(values.device.type, enabled=False):
                values = zero_padding(values @ self.dct.to(values.dtype), base.lengths)
        config = self.config
        padded = Padded(values=values, lengths=base.lengths)
        return append_deltas(padded, config.deltas, config.delta_window, config.delta_kind)

    def _normalize(self, features: Padded) -> Padded:
        normalization = self.config.normalization
        if normalization.kind == "utterance":
            return normalize_per_utterance(features, unbiased=normalization.unbiased, eps=normalization.eps)
        if normalization.kind in ("none", "speaker"):  # a speaker's mean is no longer in the base features
            return features
        if self.mean is None or self.std is None:
            raise ValueError(
                "this model's front-end needs a global mean and standard deviation, which its checkpoint does not hold: pass "
                f'statistics="libri-960" (or {", ".join(repr(name) for name in PUBLISHED_STATISTICS[:-1])}, or a .npy or '
                ".safetensors file) to load_model, or --statistics on the command line"
            )
        return normalize_globally(features, self.mean, self.std, normalization.eps)

    def forward(self, waveform_BS: Tensor, lengths_B: Tensor) -> Padded:
        """Waveforms (B, S) to the output (B, T', feature_dim), zero beyond each length."""
        return self.finish(self.base_features(waveform_BS, lengths_B))
