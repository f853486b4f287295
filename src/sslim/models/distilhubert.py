"""DistilHuBERT and DistilALHuBERT presets: shallow students of HuBERT with its front-end.

DistilHuBERT (Chang, Yang and Lee, "DistilHuBERT", arXiv 2110.01900) runs two layers and estimates teacher layers with separate
prediction heads. DistilALHuBERT runs a stack of two, three or four layers over and over until twelve have run, so it is as slow
as its teacher and a quarter of its size; it is matched to the teacher's layers directly and has no heads. The published sizes
small, middle and large are stacks of two, three and four layers.
"""

from __future__ import annotations

from typing import Literal

from sslim.frontends import HUBERT_CONV_LAYERS, ConvFrontendConfig, ConvLayerConfig
from sslim.models.speech import ModelConfig, ProjectionConfig
from sslim.nn.encoder import EncoderConfig, plain_blocks
from sslim.nn.heads import HeadConfig, MaskEmbeddingConfig, SplitHeadConfig
from sslim.nn.positions import ConvPositionsConfig

HEAD = "distillation"
MASK = "mask"


def _student(
    *,
    family: str,
    num_layers: int,
    repeats: int,
    dim: int,
    num_heads: int,
    feedforward_dim: int,
    conv_layers: tuple[ConvLayerConfig, ...],
    conv_norm: Literal["group", "layer"],
    normalize_waveform: bool,
    norm_placement: Literal["post", "pre"],
    projection_norm: bool,
    conv_kernel_size: int,
    conv_groups: int,
    activation_dropout: float,
    heads: dict[str, HeadConfig],
) -> ModelConfig:
    if dim % num_heads:
        raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
    blocks = plain_blocks(num_layers, num_heads, dim // num_heads, feedforward_dim)
    feature_dim = conv_layers[-1].channels
    return ModelConfig(
        family=family,
        frontend=ConvFrontendConfig(
            layers=conv_layers,
            norm=conv_norm,
            normalize_waveform=normalize_waveform,
            gradient_scale=0.1,
        ),
        projection=ProjectionConfig(feature_dim=feature_dim, norm=projection_norm, linear=feature_dim != dim),
        encoder=EncoderConfig(
            dim=dim,
            blocks=blocks["blocks"],
            depth_map=blocks["depth_map"] * repeats,
            positions=ConvPositionsConfig(kernel_size=conv_kernel_size, groups=conv_groups),
            norm_placement=norm_placement,
            input_norm=norm_placement == "post",
            final_norm=norm_placement == "pre",
            activation_dropout=activation_dropout,
        ),
        heads=heads,
    )


def distilhubert(
    *,
    num_layers: int = 2,
    num_tasks: int = 3,
    dim: int = 768,
    num_heads: int = 12,
    feedforward_dim: int = 3072,
    teacher_dim: int = 768,
    conv_layers: tuple[ConvLayerConfig, ...] = HUBERT_CONV_LAYERS,
    conv_norm: Literal["group", "layer"] = "group",
    norm_placement: Literal["post", "pre"] = "post",
    conv_kernel_size: int = 128,
    conv_groups: int = 16,
) -> ModelConfig:
    """Returns a DistilHuBERT of any size; the defaults are the published one (23,491,200 parameters without heads).

    Args:
        num_layers: Transformer layers.
        num_tasks: Teacher layers to estimate, each with a head of its own (published: 4, 8 and 12); 0 leaves the heads out.
        dim: Model width.
        num_heads: Attention heads of each layer.
        feedforward_dim: Feed-forward units of each layer.
        teacher_dim: Width of the teacher's layers (``final_dim``).
        conv_layers: The front-end's convolutions.
        conv_norm: The front-end's norm.
        norm_placement: ``pre`` for a student of a HuBERT Large.
        conv_kernel_size: Taps of the positions.
        conv_groups: Groups of the positions.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """
    head = SplitHeadConfig(num_tasks=num_tasks, hidden_dim=dim, output_dim=teacher_dim)
    return _student(
        family="distilhubert",
        num_layers=num_layers,
        repeats=1,
        dim=dim,
        num_heads=num_heads,
        feedforward_dim=feedforward_dim,
        conv_layers=conv_layers,
        conv_norm=conv_norm,
        normalize_waveform=False,
        norm_placement=norm_placement,
        projection_norm=False,
        conv_kernel_size=conv_kernel_size,
        conv_groups=conv_groups,
        activation_dropout=0.1,
        heads={HEAD: head} if num_tasks else {},
    )


def distilalhubert(
    *,
    num_layers: int = 2,
    repeats: int = 6,
    dim: int = 768,
    num_heads: int = 12,
    feedforward_dim: int = 3072,
    conv_layers: tuple[ConvLayerConfig, ...] = HUBERT_CONV_LAYERS,
    conv_norm: Literal["group", "layer"] = "group",
    normalize_waveform: bool = False,
    norm_placement: Literal["post", "pre"] = "post",
    conv_kernel_size: int = 128,
    conv_groups: int = 16,
) -> ModelConfig:
    """Returns a DistilALHuBERT of any size; the defaults are the published small one (23,492,992 parameters).

    Args:
        num_layers: Distinct layers (``encoder_layers``).
        repeats: How often their stack runs (``repeat_time``).
        dim: Model width.
        num_heads: Attention heads of each layer.
        feedforward_dim: Feed-forward units of each layer.
        conv_layers: The front-end's convolutions.
        conv_norm: The front-end's norm; ``layer`` for a student of a HuBERT Large.
        normalize_waveform: Whether utterances get zero mean and unit variance; as the teacher has it.
        norm_placement: ``pre`` for a student of a HuBERT Large.
        conv_kernel_size: Taps of the positions.
        conv_groups: Groups of the positions.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """
    return _student(
        family="distilalhubert",
        num_layers=num_layers,
        repeats=repeats,
        dim=dim,
        num_heads=num_heads,
        feedforward_dim=feedforward_dim,
        conv_layers=conv_layers,
        conv_norm=conv_norm,
        normalize_waveform=normalize_waveform,
        norm_placement=norm_placement,
        projection_norm=True,
        conv_kernel_size=conv_kernel_size,
        conv_groups=conv_groups,
        activation_dropout=0.0,
        heads={MASK: MaskEmbeddingConfig(dim=dim)},
    )


PRESETS = {
    "distilhubert": lambda: distilhubert(),
    "distilalhubert-small": lambda: distilalhubert(num_layers=2, repeats=6),
    "distilalhubert-middle": lambda: distilalhubert(num_layers=3, repeats=4),
    "distilalhubert-large": lambda: distilalhubert(num_layers=4, repeats=3),
}
