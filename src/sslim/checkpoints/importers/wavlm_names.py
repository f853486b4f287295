"""Names of WavLM's gated relative positions, which Hugging Face folders and DPWavLM files share.

transformers and torchaudio name the layers alike but for a prefix. The table over distances is stored with the first layer and
serves all of them; the constant of a layer's gates is stored as (1, N, 1, 1).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sslim.checkpoints.importers.fairseq_names import with_parts
from sslim.checkpoints.importers.settings import Settings
from sslim.checkpoints.restricted_pickle import CheckpointError
from sslim.nn.relative_positions import RelativePositionsConfig

TABLE = "encoder.layers.0.attention.rel_attn_embed.weight"
_CONSTANT = ".attention.gate.scale"
NAMES = with_parts({"encoder.layers.{i}.attention.gru_rel_pos_linear": "encoder.blocks.{i}.attention.gate.linear"}) | {
    "encoder.layers.{i}.attention.gru_rel_pos_const": f"encoder.blocks.{{i}}{_CONSTANT}",
    TABLE: "encoder.relative_positions.table",
}


def relative_positions(
    settings: Settings, num_heads: int, *, buckets_name: str = "num_buckets", distance_name: str = "max_bucket_distance"
) -> RelativePositionsConfig:
    """Returns the description that a file's settings give; WavLM's 320 buckets up to 800 frames where they are absent.

    Args:
        settings: The file's.
        num_heads: Heads of the unpruned model.
        buckets_name: What the number of buckets is called.
        distance_name: What the largest distance is called.

    Raises:
        CheckpointError: Numbers that cannot be.
    """
    buckets, distance = settings.count(buckets_name, 320), settings.count(distance_name, 800)
    try:
        return RelativePositionsConfig(num_buckets=buckets, max_distance=distance, num_heads=num_heads)
    except ValueError as error:
        raise CheckpointError(f"{settings.source}: {error}") from error


def flat_constants(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns native tensors with the constants of the gates as vectors (N,)."""
    return {name: tensor.flatten() if name.endswith(_CONSTANT) else tensor for name, tensor in state.items()}
