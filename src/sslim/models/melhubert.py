"""MelHuBERT presets (Lin, Lee and Tang, "MelHuBERT: a simplified HuBERT on Mel spectrograms", arXiv 2211.09944).

A HuBERT encoder on 40 log-Mel features: 10 ms frames as they are, or 20 ms frames that stack two of them. Post-norm, 12 layers,
convolutional positions, a linear head over 512 clusters.
"""

from __future__ import annotations

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
) -> ModelConfig:
    """Returns a MelHuBERT of any size; the defaults are the published 20 ms model (90,231,424 parameters with head)."""
    return ModelConfig(
        family="melhubert",
        frontend=melhubert_frontend(frame_period_ms),
        projection=ProjectionConfig(feature_dim=40 * frame_period_ms // 10),
        encoder=EncoderConfig(
            dim=dim,
            **plain_blocks(num_layers, num_heads, dim // num_heads, feedforward_dim),
            positions=ConvPositionsConfig(kernel_size=conv_kernel_size, groups=conv_groups),
            dropout=dropout,
            attention_dropout=dropout,
            activation_dropout=dropout,
        ),
        heads={HEAD: ClusterHeadConfig(num_clusters=num_clusters)},
    )


PRESETS = {
    "melhubert-20ms": lambda: melhubert(),
    "melhubert-10ms": lambda: melhubert(frame_period_ms=10),
    "melhubert-small": lambda: melhubert(
        num_layers=6, dim=256, num_heads=4, feedforward_dim=1024, conv_kernel_size=64, num_clusters=256
    ),
    "melhubert-mini": lambda: melhubert(
        num_layers=4, dim=192, num_heads=3, feedforward_dim=768, conv_kernel_size=32, conv_groups=8, num_clusters=100
    ),
    "melhubert-tiny": lambda: melhubert(
        num_layers=2, dim=32, num_heads=4, feedforward_dim=64, conv_kernel_size=16, conv_groups=4, num_clusters=20
    ),
}
