"""LightHuBERT presets: HuBERT supernets whose subnets share one set of tensors (Wang et al., arXiv 2203.15610).

Base, small and stage 1 are the same network of 12 layers and width 768; they differ in the search space. The released small
supernet was trained up to width 512 only, so the whole network is meant for training further, not for use.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from sslim.frontends import HUBERT_CONV_LAYERS, ConvFrontendConfig, ConvLayerConfig
from sslim.models.elastic import Choice, count_parameters, subnet_config
from sslim.models.search_space import LIGHTHUBERT_BASE, LIGHTHUBERT_SMALL, SearchSpace
from sslim.models.speech import ModelConfig, ProjectionConfig
from sslim.nn.encoder import EncoderConfig, plain_blocks
from sslim.nn.heads import MaskEmbeddingConfig, RegressionHeadConfig
from sslim.nn.positions import ConvPositionsConfig

HEAD = "distillation"
MASK = "mask"
LIGHTHUBERT_STAGE1 = replace(LIGHTHUBERT_BASE, default=LIGHTHUBERT_BASE.largest())


def lighthubert(
    space: SearchSpace | None = LIGHTHUBERT_BASE,
    *,
    num_layers: int = 12,
    dim: int = 768,
    num_heads: int = 12,
    feedforward_dim: int = 3072,
    teacher_dim: int = 768,
    conv_layers: tuple[ConvLayerConfig, ...] = HUBERT_CONV_LAYERS,
    conv_norm: Literal["group", "layer"] = "layer",
    conv_kernel_size: int = 128,
    conv_groups: int = 16,
    dropout: float = 0.1,
) -> ModelConfig:
    """Returns a supernet of any size; the defaults are the released one (94,967,680 parameters with heads).

    Args:
        space: Its search space; None leaves it out.
        num_layers: Transformer layers.
        dim: Model width.
        num_heads: Attention heads of each layer.
        feedforward_dim: Feed-forward units of each layer.
        teacher_dim: Width of the teacher's layers (``teacher_embed_dim``).
        conv_layers: The front-end's convolutions.
        conv_norm: The front-end's norm.
        conv_kernel_size: Taps of the positions.
        conv_groups: Groups of the positions.
        dropout: After positions, attention and feed-forward, and on attention weights.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or the supernet cannot hold the space.
    """
    if dim % num_heads:
        raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
    encoder = EncoderConfig(
        dim=dim,
        **plain_blocks(num_layers, num_heads, dim // num_heads, feedforward_dim),
        positions=ConvPositionsConfig(kernel_size=conv_kernel_size, groups=conv_groups),
        dropout=dropout,
        attention_dropout=dropout,
        activation_dropout=0.0,
    )
    if space is not None:
        space.check(encoder)
    return ModelConfig(
        family="lighthubert",
        frontend=ConvFrontendConfig(layers=conv_layers, norm=conv_norm, normalize_waveform=True, reference_mask="coarse"),
        projection=ProjectionConfig(feature_dim=conv_layers[-1].channels, norm=True),
        encoder=encoder,
        heads={HEAD: RegressionHeadConfig(output_dim=teacher_dim, bias=False), MASK: MaskEmbeddingConfig(dim=dim)},
        search_space=space,
    )


def reference_parameter_count(config: ModelConfig, subnet: Choice) -> int:
    """Counts a subnet's parameters as LightHuBERT does (``calc_sampled_param_num``); no tensor is made.

    The mask embedding counts in full width, the gain of the positions and the prediction head do not count.

    Args:
        config: The supernet.
        subnet: A ``Subnet``, or what ``SearchSpace.subnet`` takes.

    Raises:
        ValueError: The supernet cannot hold the subnet.
    """
    small = subnet_config(config, subnet)
    total = count_parameters(small, with_heads=False)
    positions = small.transformer.positions
    if isinstance(positions, ConvPositionsConfig) and positions.weight_norm:
        total -= positions.kernel_size
    mask = config.heads.get(MASK)
    return total + (mask.dim if isinstance(mask, MaskEmbeddingConfig) else 0)


PRESETS = {
    "lighthubert-base": lambda: lighthubert(LIGHTHUBERT_BASE),
    "lighthubert-small": lambda: lighthubert(LIGHTHUBERT_SMALL),
}
