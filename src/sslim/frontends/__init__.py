"""Front-ends: waveform to features. One file for each kind; ``FRONTENDS`` is the table of them."""

from __future__ import annotations

from typing import Any, overload

from sslim.frontends.base import Frontend
from sslim.frontends.config import (
    HUBERT_CONV_LAYERS,
    ConvFrontendConfig,
    ConvLayerConfig,
    DecibelConfig,
    FeaturesConfig,
    FilterbankConfig,
    FrontendConfig,
    MfccConfig,
    NormalizationConfig,
    SpectralFrontendConfig,
    SpectrogramConfig,
    StftConfig,
    StftMfccConfig,
    StoredFeaturesConfig,
    Window,
)
from sslim.frontends.convolution import ConvFrontend
from sslim.frontends.spectral import SpectralFrontend
from sslim.frontends.statistics import PUBLISHED_STATISTICS, RunningStatistics, load_statistics

FRONTENDS: dict[str, Any] = {"spectral": SpectralFrontend, "convolution": ConvFrontend}


@overload
def build_frontend(config: SpectralFrontendConfig) -> SpectralFrontend: ...
@overload
def build_frontend(config: ConvFrontendConfig) -> ConvFrontend: ...
def build_frontend(config: FrontendConfig) -> SpectralFrontend | ConvFrontend:
    """Returns the front-end that ``config`` describes, without statistics.

    Raises:
        ValueError: The description contradicts itself, for example frames that are no whole number of samples.
    """
    return FRONTENDS[config.kind](config)


__all__ = [
    "FRONTENDS",
    "HUBERT_CONV_LAYERS",
    "PUBLISHED_STATISTICS",
    "ConvFrontend",
    "ConvFrontendConfig",
    "ConvLayerConfig",
    "DecibelConfig",
    "FeaturesConfig",
    "FilterbankConfig",
    "Frontend",
    "FrontendConfig",
    "MfccConfig",
    "NormalizationConfig",
    "RunningStatistics",
    "SpectralFrontend",
    "SpectralFrontendConfig",
    "SpectrogramConfig",
    "StftConfig",
    "StftMfccConfig",
    "StoredFeaturesConfig",
    "Window",
    "build_frontend",
    "load_statistics",
]
