"""MelHuBERT presets (Lin, Lee and Tang, "MelHuBERT: a simplified HuBERT on Mel spectrograms", arXiv 2211.09944).

A HuBERT encoder on 40 log-Mel features: 10 ms frames as they are, or 20 ms frames that stack two of them. Post-norm, 12 layers,
convolutional positions, a linear head over 512 clusters.

The causal presets see the past only, in attention and in positions, and keep global normalisation: they can be streamed
(``sslim.models.streaming``). The reference's ``attention_type: causal`` is another model, whose positions look ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sslim.frontends import FilterbankConfig, NormalizationConfig, SpectralFrontendConfig
from sslim.models.speech import ModelConfig, ProjectionConfig
from sslim.nn.encoder import EncoderConfig, plain_blocks
from sslim.nn.heads import ClusterHeadConfig
from sslim.nn.positions import ConvPositionsConfig

NUM_CLUSTERS = 512
HEAD = "masked_prediction"
MASK = "mask"


def melhubert_frontend(frame_period_ms: int, statistics: str | None = None) -> SpectralFrontendConfig:
    """40 log-Mel bins, Hamming window, 25 ms every 10 ms, 16-bit sample scale; two frames stacked for 20 ms."""
    if frame_period_ms not in (10, 20):
        raise ValueError(f"MelHuBERT has frames of 10 or 20 ms, not {frame_period_ms}")
    return SpectralFrontendConfig(
        features=FilterbankConfig(num_mel_bins=40, window="hamming", waveform_scale=32768.0),
        normalization=NormalizationConfig(kind="global", statistics=statistics),
        stack=frame_period_ms // 10,
    )


def melhubert(
    *,
    frame_period_ms: int = 20,
    num_layers: int = 12,
    dim: int = 768,
    num_heads: int = 12,
    feedforward_dim: int = 3072,
    conv_kernel_size: int = 128,
    conv_groups: int = 16,
    num_clusters: int = NUM_CLUSTERS,
    dropout: float = 0.1,
    causal: bool = False,
    attention_window: int | None = None,
) -> ModelConfig:
    """Returns a MelHuBERT of any size; the defaults are the published 20 ms model (90,231,424 parameters with head).

    Args:
        frame_period_ms: 10, or 20 for two frames stacked.
        num_layers: Transformer layers.
        dim: Model width.
        num_heads: Attention heads of each layer.
        feedforward_dim: Feed-forward units of each layer.
        conv_kernel_size: Taps of the positions.
        conv_groups: Groups of the positions.
        num_clusters: Clusters K of the head.
        dropout: Everywhere.
        causal: Whether attention and positions see the past only.
        attention_window: Frames that attention sees on each side, or with ``causal`` before its own; None for all.
    """
    blocks = plain_blocks(num_layers, num_heads, dim // num_heads, feedforward_dim)
    blocks["blocks"] = tuple(replace(block, attention_window=attention_window) for block in blocks["blocks"])
    return ModelConfig(
        family="melhubert",
        frontend=melhubert_frontend(frame_period_ms),
        projection=ProjectionConfig(feature_dim=40 * frame_period_ms // 10),
        encoder=EncoderConfig(
            dim=dim,
            **blocks,
            positions=ConvPositionsConfig(kernel_size=conv_kernel_size, groups=conv_groups, causal=causal),
            causal=causal,
            dropout=dropout,
            attention_dropout=dropout,
            activation_dropout=dropout,
        ),
        heads={HEAD: ClusterHeadConfig(num_clusters=num_clusters)},
    )


# The sizes beside the published one, of which the defaults are 20 ms frames and 512 clusters.
SIZES: dict[str, dict[str, int]] = {
    "20ms": {},
    "10ms": {"frame_period_ms": 10},
    "small": {
        "num_layers": 6,
        "dim": 256,
        "num_heads": 4,
        "feedforward_dim": 1024,
        "conv_kernel_size": 64,
        "num_clusters": 256,
    },
    "mini": {
        "num_layers": 4,
        "dim": 192,
        "num_heads": 3,
        "feedforward_dim": 768,
        "conv_kernel_size": 32,
        "conv_groups": 8,
        "num_clusters": 100,
    },
    "tiny": {
        "num_layers": 2,
        "dim": 32,
        "num_heads": 4,
        "feedforward_dim": 64,
        "conv_kernel_size": 16,
        "conv_groups": 4,
        "num_clusters": 20,
    },
}


def _preset(size: str, causal: bool) -> Callable[[], ModelConfig]:
    return lambda: melhubert(**SIZES[size], causal=causal)


PRESETS = {
    f"melhubert-{'causal-' if causal else ''}{size}": _preset(size, causal) for causal in (False, True) for size in SIZES
}
