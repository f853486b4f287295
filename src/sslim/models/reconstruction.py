"""Mockingjay, TERA and AALBERT: one BERT encoder over frames of features, trained to restore what was altered of them.

Liu et al., "Mockingjay" (arXiv 1910.12638), Liu, Li and Lee, "TERA" (arXiv 2007.06028), Chi et al., "Audio ALBERT" (arXiv
2005.08575), all as in S3PRL: sinusoids and a layer norm of epsilon 1e-12 after the input projection, post-norm blocks. They
differ in what training alters, which is no part of a model, in their features, in how many frames are stacked into one, and in
AALBERT's layers all being the same one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from sslim.frontends import (
    FilterbankConfig,
    NormalizationConfig,
    SpectralFrontendConfig,
    StftConfig,
    build_frontend,
)
from sslim.models.speech import ModelConfig, ProjectionConfig
from sslim.nn.encoder import BlockConfig, EncoderConfig
from sslim.nn.heads import SpectrogramHeadConfig
from sslim.nn.positions import SinusoidPositionsConfig

HEAD = "reconstruction"
LAYER_NORM_EPS = 1e-12
UTTERANCE = NormalizationConfig(kind="utterance", unbiased=True, eps=1e-10)  # S3PRL's "cmvn"
LEVEL_DB = -25.0  # S3PRL's target_level


def log_mel_frontend(num_mel_bins: int = 80, *, stack: int = 1) -> SpectralFrontendConfig:
    """S3PRL's ``OnlinePreprocessor``: log-Mel channels of a centred transform at -25 dB, normalised for each utterance."""
    features = StftConfig(num_mel_bins=num_mel_bins, level_db=LEVEL_DB)
    return SpectralFrontendConfig(features=features, normalization=UTTERANCE, stack=stack, stack_tail="drop")


def filterbank_frontend(num_mel_bins: int = 80, *, deltas: int = 1, stack: int = 1) -> SpectralFrontendConfig:
    """Kaldi's log-Mel filterbank with deltas, normalised for each utterance: fbank160 with one order, fbank240 with two."""
    features = FilterbankConfig(num_mel_bins=num_mel_bins)
    return SpectralFrontendConfig(features=features, deltas=deltas, normalization=UTTERANCE, stack=stack, stack_tail="drop")


def _width(frontend: SpectralFrontendConfig | None, feature_dim: int | None) -> int:
    """Features of a frame, before stacking."""
    if frontend is None:
        if feature_dim is None:
            raise ValueError("feature_dim is None; without a front-end it must be the width of the features from outside")
        return feature_dim
    if frontend.stack != 1:
        raise ValueError(
            f"the front-end stacks {frontend.stack} frames; expected one that stacks none, and stack={frontend.stack}"
        )
    found = build_frontend(frontend).feature_dim
    if feature_dim not in (None, found):
        raise ValueError(f"feature_dim is {feature_dim}; the front-end gives {found}")
    return found


def reconstruction_model(
    family: str,
    frontend: SpectralFrontendConfig | None,
    *,
    feature_dim: int | None = None,
    stack: int = 1,
    num_layers: int = 3,
    shared: bool = False,
    dim: int = 768,
    num_heads: int = 12,
    feedforward_dim: int = 3072,
    target_dim: int | None = None,
    norm_placement: Literal["post", "pre"] = "post",
    dropout: float = 0.1,
    init_deviation: float | None = 0.02,
) -> ModelConfig:
    """Returns a model of this family; :func:`mockingjay`, :func:`tera` and :func:`aalbert` give it their defaults.

    Args:
        family: Its name, for people.
        frontend: Its features, not yet stacked; None for features from outside.
        feature_dim: Width of features from outside; with a front-end that of the front-end.
        stack: Frames concatenated into one (``downsample_rate``).
        num_layers: Block applications N.
        shared: Whether one block runs at every depth.
        dim: Model width D.
        num_heads: Attention heads.
        feedforward_dim: Hidden units of the feed-forward parts.
        target_dim: Width of what the head restores, for each frame before stacking; None for the features themselves.
        norm_placement: ``pre`` for S3PRL's ``pre_layer_norm``.
        dropout: On hidden states and attention weights; the reference has none after the activation.
        init_deviation: Of a new projection's weights; the reference draws all from N(0, 0.02), small beside the sinusoids.

    Raises:
        ValueError: Widths that do not fit, or no width at all.
    """
    if dim % num_heads:
        raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
    found = _width(frontend, feature_dim)
    inside = 1 if frontend is not None else stack  # a front-end stacks for itself
    block = BlockConfig(num_heads=num_heads, head_dim=dim // num_heads, feedforward_dim=feedforward_dim)
    return ModelConfig(
        family=family,
        frontend=None if frontend is None else replace(frontend, stack=stack, stack_tail="drop"),
        projection=ProjectionConfig(feature_dim=found * stack // inside, stack=inside, init_deviation=init_deviation),
        encoder=EncoderConfig(
            dim=dim,
            blocks=(block,) * (1 if shared else num_layers),
            depth_map=(0,) * num_layers if shared else tuple(range(num_layers)),
            positions=SinusoidPositionsConfig(),
            norm_placement=norm_placement,
            input_norm=True,
            final_norm=norm_placement == "pre",
            layer_norm_eps=LAYER_NORM_EPS,
            dropout=dropout,
            attention_dropout=dropout,
            activation_dropout=0.0,
        ),
        heads={HEAD: SpectrogramHeadConfig(hidden_dim=dim, output_dim=(target_dim or found) * stack)},
    )


def mockingjay(*, frontend: SpectralFrontendConfig | None = None, **sizes: Any) -> ModelConfig:
    """Mockingjay of any size on 80 filterbank channels with deltas, see :func:`reconstruction_model`.

    The default is the base model, 21,388,800 parameters and 715,168 of its head; 12 layers over 3 stacked frames are the large
    one, 85,425,408 and 961,248.

    S3PRL v0.1 trained on librosa's features (``feature_preset("fbank160-librosa")``, 10 ms), and probably its oldest models
    on ``mel160-librosa`` (12.5 ms): both 160 wide, so a model of either is made with ``frontend``.
    """
    return reconstruction_model("mockingjay", frontend or filterbank_frontend(deltas=1), **sizes)


def tera(*, frontend: SpectralFrontendConfig | None = None, feature_dim: int | None = None, **sizes: Any) -> ModelConfig:
    """TERA of any size on 80 log-Mel channels, see :func:`reconstruction_model`.

    The default is the base model, 21,327,360 parameters and 653,648 of its head. With ``feature_dim`` alone it takes features
    from outside: 40 of fMLLR, as the first models did.
    """
    if frontend is None and feature_dim is None:
        frontend = log_mel_frontend()
    return reconstruction_model("tera", frontend, feature_dim=feature_dim, **sizes)


def aalbert(*, frontend: SpectralFrontendConfig | None = None, **sizes: Any) -> ModelConfig:
    """Audio ALBERT of any size on 80 log-Mel channels, 3 frames stacked, see :func:`reconstruction_model`.

    7,274,496 parameters and 776,688 of its head, whatever the number of layers.
    """
    settings: dict[str, Any] = {"stack": 3, "shared": True, **sizes}
    return reconstruction_model("aalbert", frontend or log_mel_frontend(), **settings)


PRESETS = {
    "mockingjay-base": lambda: mockingjay(),
    "mockingjay-large": lambda: mockingjay(num_layers=12, stack=3),
    "tera-base": lambda: tera(),
    "tera-fmllr-base": lambda: tera(feature_dim=40),
    "tera-fmllr-medium": lambda: tera(feature_dim=40, num_layers=6),
    "tera-fmllr-large": lambda: tera(feature_dim=40, num_layers=12),
    "aalbert-3l": lambda: aalbert(),
    "aalbert-6l": lambda: aalbert(num_layers=6),
}
