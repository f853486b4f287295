"""Front-ends: waveform to features. One file for each kind; ``FRONTENDS`` is the table of them."""

from __future__ import annotations

from sslim.frontends.base import Frontend
from sslim.frontends.config import (
    FeaturesConfig,
    FilterbankConfig,
    FrontendConfig,
    MfccConfig,
    NormalizationConfig,
    SpectralFrontendConfig,
    SpectrogramConfig,
    Window,
)
from sslim.frontends.spectral import SpectralFrontend
from sslim.frontends.statistics import PUBLISHED_STATISTICS, RunningStatistics, load_statistics

FRONTENDS = {"spectral": SpectralFrontend}


def build_frontend(config: FrontendConfig) -> SpectralFrontend:
    """Returns the front-end that ``config`` describes, without statistics.

    Raises:
        ValueError: The description contradicts itself, for example frames that are no whole number of samples.
    """
    return FRONTENDS[config.kind](config)


__all__ = [
    "FRONTENDS",
    "PUBLISHED_STATISTICS",
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
    "Window",
    "build_frontend",
    "load_statistics",
]
