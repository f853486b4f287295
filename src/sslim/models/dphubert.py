"""DPHuBERT and DPWavLM: HuBERT or WavLM after joint distillation and structured pruning (Peng et al., arXiv 2305.17651).

Width, depth and positions are the teacher's; every convolution, every layer's heads and every layer's feed-forward units have a
number of their own, and whole parts of a layer can be gone. Post-norm layers keep the norms of parts that are gone. A factor on
each channel of the convolutions' output (``channel_scale``) holds what pruning left of the last convolution's gates. Pruned
sizes are learnt, so there are no presets: a file describes itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from sslim.frontends import ConvFrontendConfig
from sslim.models.speech import ModelConfig, ProjectionConfig
from sslim.nn.encoder import BlockConfig, EncoderConfig
from sslim.nn.positions import ConvPositionsConfig
from sslim.nn.relative_positions import RelativePositionsConfig

FRONTEND = ConvFrontendConfig(channel_scale=True)  # HuBERT Base's, with the factors (``dummy_weight``) on its output
POSITIONS = ConvPositionsConfig()


def dphubert(
    *,
    num_heads: Sequence[int] = (12,) * 12,
    feedforward_dims: Sequence[int] = (3072,) * 12,
    dim: int = 768,
    head_dim: int = 64,
    frontend: ConvFrontendConfig = FRONTEND,
    positions: ConvPositionsConfig = POSITIONS,
    norm_placement: Literal["post", "pre"] = "post",
    relative_positions: RelativePositionsConfig | None = None,
    head_ids: Sequence[tuple[int, ...] | None] | None = None,
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
    activation_dropout: float = 0.0,
    layer_drop: float = 0.05,
) -> ModelConfig:
    """Returns a DPHuBERT of any sizes; the defaults are the unpruned student of HuBERT Base (94,371,456 parameters).

    Args:
        num_heads: Heads of each layer (``encoder_num_heads``); 0 for a layer without attention.
        feedforward_dims: Feed-forward units of each layer (``encoder_ff_interm_features``); 0 for a layer without.
        dim: Model width.
        head_dim: Width of a head.
        frontend: The convolutions with what is left of their channels.
        positions: The convolutional positions.
        norm_placement: ``pre`` has a final norm and no input norm, ``post`` the reverse.
        relative_positions: Those of WavLM; None for HuBERT.
        head_ids: With them, which heads are left in each layer (``encoder_remaining_heads``), None for the first ones.
        dropout: After positions, attention and feed-forward.
        attention_dropout: On attention weights.
        activation_dropout: After the activation.
        layer_drop: Probability of skipping a layer.

    Raises:
        ValueError: Lists of unequal length, or sizes that do not fit together.
    """
    blocks = _blocks(num_heads, feedforward_dims, head_ids, BlockConfig(num_heads=0, head_dim=head_dim, feedforward_dim=0))
    pre_norm = norm_placement == "pre"
    encoder = EncoderConfig(
        dim=dim,
        blocks=blocks if pre_norm else tuple(replace(block, keep_norms=True) for block in blocks),
        depth_map=tuple(range(len(blocks))),
        positions=positions,
        norm_placement=norm_placement,
        input_norm=not pre_norm,
        final_norm=pre_norm,
        dropout=dropout,
        attention_dropout=attention_dropout,
        activation_dropout=activation_dropout,
        layer_drop=layer_drop,
        relative_positions=relative_positions,
    )
    family = "dphubert" if relative_positions is None else "dpwavlm"
    projection = ProjectionConfig(feature_dim=frontend.layers[-1].channels, norm=True)
    return ModelConfig(family=family, frontend=frontend, projection=projection, encoder=encoder)


def _blocks(
    num_heads: Sequence[int],
    feedforward_dims: Sequence[int],
    head_ids: Sequence[tuple[int, ...] | None] | None,
    block: BlockConfig,
) -> tuple[BlockConfig, ...]:
    ids = (None,) * len(num_heads) if head_ids is None else head_ids
    if not len(num_heads) == len(feedforward_dims) == len(ids):
        raise ValueError(f"{len(num_heads)} layers have heads, {len(feedforward_dims)} feed-forward units, {len(ids)} head_ids")
    return tuple(
        replace(block, num_heads=heads, feedforward_dim=units, head_ids=kept)
        for heads, units, kept in zip(num_heads, feedforward_dims, ids, strict=True)
    )
