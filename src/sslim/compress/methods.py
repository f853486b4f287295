"""The table of cutting methods: name to settings, function, and how its strength is varied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sslim.compress.calibration import Calibration
from sslim.compress.depth import DepthPruning, prune_depth
from sslim.compress.heads import HeadPruning, prune_heads
from sslim.compress.low_rank import LowRank, factorize
from sslim.compress.quantize import Quantization, quantize
from sslim.compress.rows import RowPruning, prune_rows
from sslim.compress.sharing import Sharing, share_layers
from sslim.compress.weights import WeightPruning, prune_weights
from sslim.compress.width import WidthPruning, prune_width
from sslim.models import ModelConfig, SpeechModel
from sslim.models.elastic import count_parameters
from sslim.nn.encoder import LinearRanks

Apply = Callable[[SpeechModel, Any, Calibration | None], SpeechModel]


def _relative(keep: float, done: int, rounds: int) -> float:
    """Every round keeps the same share of what the round before left."""
    return keep ** (1.0 / rounds)


def _absolute_sparsity(sparsity: float, done: int, rounds: int) -> float:
    """Of what is not zero every round keeps the same share; sparsity counts from the whole model."""
    return 1.0 - (1.0 - sparsity) ** (done / rounds)


def _one_of_all(config: ModelConfig) -> float:
    """A share so small that one head and one unit of a layer are left."""
    widest = max((max(block.num_heads, block.feedforward_dim) for block in config.encoder.blocks), default=1)
    return 1.0 / max(widest, 1)


def _rank_one(config: ModelConfig) -> float:
    """Share of the parameters when every map has rank 1."""
    ranks = LinearRanks(query=1, key=1, value=1, output=1, up=1, down=1)
    blocks = tuple(replace(block, ranks=ranks) for block in config.encoder.blocks)
    thinnest = replace(config, encoder=replace(config.encoder, blocks=blocks))
    return count_parameters(thinnest, with_heads=False) / count_parameters(config, with_heads=False)


def _one_layer(config: ModelConfig) -> float:
    return 1.0 / max(config.encoder.num_layers, 1)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A cutting method.

    Attributes:
        settings: The class of its settings.
        apply: Model, settings and calibration speech to a smaller model.
        strength: The setting that says how much is kept (or removed); None where there is no such number.
        least: Smallest share that can be kept, for budgets; None where the method changes no cost that a budget knows.
        after_rounds: Strength in all, rounds done and rounds in all, to the strength of the round.
        looks_at_speech: Whether settings need calibration speech.
        final: Whether nothing can be cut or trained afterwards.
    """

    settings: type
    apply: Apply
    strength: str | None = None
    least: Callable[[ModelConfig], float] | None = None
    after_rounds: Callable[[float, int, int], float] = _relative
    looks_at_speech: Callable[[Any], bool] = lambda settings: False
    final: bool = False


METHODS: dict[str, Method] = {
    "weights": Method(settings=WeightPruning, apply=prune_weights, strength="sparsity", after_rounds=_absolute_sparsity),
    "heads": Method(
        settings=HeadPruning,
        apply=prune_heads,
        strength="keep",
        least=_one_of_all,
        looks_at_speech=lambda settings: settings.score == "data",
    ),
    "rows": Method(
        settings=RowPruning,
        apply=prune_rows,
        strength="keep",
        least=_one_of_all,
        looks_at_speech=lambda settings: settings.score == "data",
    ),
    "width": Method(
        settings=WidthPruning,
        apply=prune_width,
        strength="keep",
        least=_one_of_all,
        looks_at_speech=lambda settings: settings.score == "data",
    ),
    "depth": Method(
        settings=DepthPruning, apply=prune_depth, strength="keep", least=_one_layer, looks_at_speech=lambda settings: True
    ),
    "sharing": Method(settings=Sharing, apply=share_layers),
    "low-rank": Method(
        settings=LowRank,
        apply=factorize,
        strength="params",
        least=_rank_one,
        looks_at_speech=lambda settings: settings.whiten,
    ),
    "quantize": Method(settings=Quantization, apply=quantize, final=True),
}
