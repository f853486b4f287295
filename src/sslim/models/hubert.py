"""HuBERT presets (Hsu et al., "HuBERT: self-supervised speech representation learning", arXiv 2106.07447).

Convolutions over the waveform, a linear projection, convolutional positions, a Transformer, and codewords for the clusters of
the masked frames. Base is post-norm with one group norm in the front-end; Large is pre-norm with layer norms everywhere and
takes waveforms of zero mean and unit variance. Published models have 504 codewords: 500 clusters and fairseq's four special
symbols before them.
"""

from __future__ import annotations

from typing import Any, Literal

from sslim.frontends import HUBERT_CONV_LAYERS, ConvFrontendConfig, ConvLayerConfig
from sslim.models.speech import ModelConfig, ProjectionConfig
from sslim.nn.encoder import EncoderConfig, plain_blocks
from sslim.nn.heads import CodewordHeadConfig, HeadConfig, MaskEmbeddingConfig
from sslim.nn.positions import ConvPositionsConfig

HEAD = "masked_prediction"
MASK = "mask"
NUM_CODEWORDS = 504


def narrow_conv_layers(channels: int) -> tuple[ConvLayerConfig, ...]:
    """HuBERT's seven convolutions (400 samples every 320) with other widths."""
    return tuple(ConvLayerConfig(channels=channels, kernel=c.kernel, stride=c.stride) for c in HUBERT_CONV_LAYERS)


def _head_dim(dim: int, num_heads: int) -> int:
    if dim % num_heads:
        raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
    return dim // num_heads


def _heads(num_clusters: int, codeword_dim: int, dim: int) -> dict[str, HeadConfig]:
    codewords = CodewordHeadConfig(num_clusters=num_clusters, codeword_dim=codeword_dim)
    return {HEAD: codewords, MASK: MaskEmbeddingConfig(dim=dim)}


def _encoder(placement: Literal["post", "pre"], **settings: Any) -> EncoderConfig:
    return EncoderConfig(norm_placement=placement, input_norm=placement == "post", final_norm=placement == "pre", **settings)


def _frontend(
    layers: tuple[ConvLayerConfig, ...], norm: Literal["group", "layer"], bias: bool, normalize: bool, gradient_scale: float
) -> ConvFrontendConfig:
    return ConvFrontendConfig(
        layers=layers,
        norm=norm,
        bias=bias,
        normalize_waveform=normalize,
        gradient_scale=gradient_scale,
        reference_mask="coarse",
    )


def hubert(
    *,
    num_layers: int = 12,
    dim: int = 768,
    num_heads: int = 12,
    feedforward_dim: int = 3072,
    conv_layers: tuple[ConvLayerConfig, ...] = HUBERT_CONV_LAYERS,
    conv_norm: Literal["group", "layer"] = "group",
    conv_bias: bool = False,
    normalize_waveform: bool = False,
    gradient_scale: float = 0.1,
    norm_placement: Literal["post", "pre"] = "post",
    conv_kernel_size: int = 128,
    conv_groups: int = 16,
    num_clusters: int | None = NUM_CODEWORDS,
    codeword_dim: int = 256,
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
    activation_dropout: float = 0.0,
    layer_drop: float = 0.05,
) -> ModelConfig:
    """Returns a HuBERT of any size; the defaults are Base (94,697,600 parameters with heads).

    Args:
        num_layers: Transformer layers.
        dim: Model width.
        num_heads: Attention heads of each layer.
        feedforward_dim: Feed-forward units of each layer.
        conv_layers: The front-end's convolutions (``conv_feature_layers`` in fairseq).
        conv_norm: The front-end's norm (``extractor_mode``: ``default`` is group, ``layer_norm`` is layer).
        conv_bias: Whether its convolutions have a bias.
        normalize_waveform: Whether utterances get zero mean and unit variance (``task.normalize``).
        gradient_scale: Factor on gradients into the front-end (``feature_grad_mult``).
        norm_placement: ``pre`` has a final norm and no input norm, ``post`` the reverse (``layer_norm_first``).
        conv_kernel_size: Taps of the positions (``conv_pos``).
        conv_groups: Groups of the positions (``conv_pos_groups``).
        num_clusters: Codewords; None leaves the heads out.
        codeword_dim: Width of the codewords (``final_dim``).
        dropout: After positions, attention and feed-forward.
        attention_dropout: On attention weights.
        activation_dropout: After the activation.
        layer_drop: Probability of skipping a layer (``encoder_layerdrop``).

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """
    encoder = _encoder(
        norm_placement,
        dim=dim,
        **plain_blocks(num_layers, num_heads, _head_dim(dim, num_heads), feedforward_dim),
        positions=ConvPositionsConfig(kernel_size=conv_kernel_size, groups=conv_groups),
        dropout=dropout,
        attention_dropout=attention_dropout,
        activation_dropout=activation_dropout,
        layer_drop=layer_drop,
    )
    frontend = _frontend(conv_layers, conv_norm, conv_bias, normalize_waveform, gradient_scale)
    heads = {} if num_clusters is None else _heads(num_clusters, codeword_dim, dim)
    projection = ProjectionConfig(feature_dim=conv_layers[-1].channels, norm=True)
    return ModelConfig(family="hubert", frontend=frontend, projection=projection, encoder=encoder, heads=heads)


def hubert_large() -> ModelConfig:
    """HuBERT Large: 24 pre-norm layers of width 1024, 316,609,408 parameters with heads."""
    return hubert(
        num_layers=24,
        dim=1024,
        num_heads=16,
        feedforward_dim=4096,
        conv_norm="layer",
        normalize_waveform=True,
        gradient_scale=1.0,
        norm_placement="pre",
        codeword_dim=768,
        dropout=0.0,
        attention_dropout=0.0,
        layer_drop=0.0,
    )


PRESETS = {
    "hubert-base": lambda: hubert(),
    "hubert-large": hubert_large,
    "hubert-mini": lambda: hubert(
        num_layers=4,
        dim=192,
        num_heads=3,
        feedforward_dim=768,
        conv_layers=narrow_conv_layers(128),
        conv_kernel_size=32,
        conv_groups=8,
        num_clusters=100,
        codeword_dim=64,
        gradient_scale=1.0,
        layer_drop=0.0,
    ),
    "hubert-tiny": lambda: hubert(
        num_layers=2,
        dim=32,
        num_heads=4,
        feedforward_dim=64,
        conv_layers=narrow_conv_layers(16),
        conv_kernel_size=16,
        conv_groups=4,
        num_clusters=20,
        codeword_dim=16,
        gradient_scale=1.0,
        layer_drop=0.0,
    ),
}
