"""The table of cutting methods: name to settings, function, how its strength is varied, and what any strength leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sslim.compress.calibration import Calibration
from sslim.compress.depth import DepthPruning, depth_left, prune_depth
from sslim.compress.heads import HeadPruning, heads_kept, prune_heads
from sslim.compress.low_rank import LowRank, factorize, least_share, low_rank_left
from sslim.compress.quantize import Quantization, quantize
from sslim.compress.rows import RowPruning, prune_rows, rows_kept
from sslim.compress.sharing import Sharing, share_layers
from sslim.compress.weights import WeightPruning, prune_weights, sparsity_of
from sslim.compress.width import WidthPruning, prune_width, width_kept
from sslim.models import ModelConfig, SpeechModel
from sslim.models.elastic import count_parameters, slice_model_config
from sslim.nn.encoder import BlockConfig
from sslim.nn.slicing import Units

Apply = Callable[[SpeechModel, Any, Calibration | None], SpeechModel]
Plan = Callable[[SpeechModel, Any, Calibration | None], Callable[..., ModelConfig]]
Round = Callable[[Any, SpeechModel, SpeechModel, float], Any]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A cutting method.

    Attributes:
        settings: The class of its settings.
        apply: Model, settings and calibration speech to a smaller model.
        strength: The setting that says how much is kept (or removed); None where there is no such number.
        nothing: The strength with which nothing is removed.
        instead: Settings that may be given in place of the strength.
        plan: Model, settings and calibration speech to a function from any strength to the description of what that leaves,
            for budgets; None where the strength changes no cost that a budget knows.
        coarse: A setting that what ``plan`` gives takes beside the strength: the share kept of parts so large that a budget
            fixes their number first and fills up with the others; None where all parts are alike.
        least: Smallest strength that a model allows, for budgets.
        in_round: Settings for the whole step, the model before its first round, the model at hand, and the share of the rounds
            that the next one completes, to the settings of that round; strengths fall by equal factors.
        looks_at_speech: Whether settings need calibration speech.
        looks_at_loss: Whether they need a loss on it.
        final: Whether nothing can be cut or trained afterwards.
    """

    settings: type
    apply: Apply
    strength: str | None = None
    nothing: float = 1.0
    instead: tuple[str, ...] = ()
    plan: Plan | None = None
    coarse: str | None = None
    least: Callable[[ModelConfig, Any], float] = lambda config, settings: 0.0
    in_round: Round = lambda settings, start, now, progress: settings
    looks_at_speech: Callable[[Any], bool] = lambda settings: False
    looks_at_loss: Callable[[Any], bool] = lambda settings: False
    final: bool = False

    def is_given(self, settings: dict[str, Any]) -> bool:
        """Whether plain settings say how much is kept."""
        return self.strength is None or any(settings.get(name) is not None for name in (self.strength, *self.instead))


def _scored_on_data(settings: Any) -> bool:
    return settings.score == "data"


def _heads_plan(model: SpeechModel, settings: HeadPruning, calibration: Calibration | None) -> Callable[[float], ModelConfig]:
    kept, whole = heads_kept(model, settings, calibration), Units.full(model.config.transformer)
    return lambda keep: slice_model_config(model.config, replace(whole, heads=kept(keep)))


def _rows_plan(model: SpeechModel, settings: RowPruning, calibration: Calibration | None) -> Callable[[float], ModelConfig]:
    kept, whole = rows_kept(model, settings, calibration), Units.full(model.config.transformer)
    return lambda keep: slice_model_config(model.config, replace(whole, feedforward=kept(keep)))


def _width_plan(model: SpeechModel, settings: WidthPruning, calibration: Calibration | None) -> Callable[..., ModelConfig]:
    kept = width_kept(model, settings, calibration)
    return lambda keep, keep_heads=None: slice_model_config(model.config, kept(keep, keep_heads))


def _one_of_all(config: ModelConfig, settings: Any) -> float:
    """A share so small that one head and one unit of a layer are left."""
    widest = max((max(block.num_heads, block.feedforward_dim) for block in config.transformer.blocks), default=1)
    return 1.0 / max(widest, 1)


def _one_layer(config: ModelConfig, settings: Any) -> float:
    return 1.0 / max(config.transformer.num_layers, 1)


def _num_heads(block: BlockConfig) -> int:
    return block.num_heads


def _num_units(block: BlockConfig) -> int:
    return block.feedforward_dim


def _share_left(start: SpeechModel, now: SpeechModel, count: Callable[[BlockConfig], int], scope: str) -> float:
    """Share of the parts of all blocks in use that is left.

    With a share of each layer, layers of a single part, which always stays, do not count.
    """
    before, after = (_counts(model.config, count) for model in (start, now))
    pairs = [(whole, left) for whole, left in zip(before, after, strict=True) if whole > (0 if scope == "model" else 1)]
    return sum(left for _, left in pairs) / sum(whole for whole, _ in pairs) if pairs else 1.0


def _counts(config: ModelConfig, count: Callable[[BlockConfig], int]) -> Sequence[int]:
    return [count(config.transformer.blocks[number]) for number in sorted(set(config.transformer.depth_map))]


def _next_share(keep: float, left: float, progress: float) -> float:
    """What a round keeps of what is left, so that rounding in the rounds before it does not add up."""
    return min(1.0, keep**progress / left)


def _round_of(count: Callable[[BlockConfig], int]) -> Round:
    def settings_of_round(settings: Any, start: SpeechModel, now: SpeechModel, progress: float) -> Any:
        return replace(settings, keep=_next_share(settings.keep, _share_left(start, now, count, settings.scope), progress))

    return settings_of_round


def _width_round(settings: WidthPruning, start: SpeechModel, now: SpeechModel, progress: float) -> WidthPruning:
    heads, units = (_share_left(start, now, count, settings.scope) for count in (_num_heads, _num_units))
    keep_heads = _next_share(settings.keep_heads or settings.keep, heads, progress)
    keep = _next_share(settings.keep, units, progress)
    return replace(settings, keep=keep, keep_heads=None if keep_heads == keep else keep_heads)


def _depth_round(settings: DepthPruning, start: SpeechModel, now: SpeechModel, progress: float) -> DepthPruning:
    assert settings.keep is not None
    return replace(settings, keep=_next_share(settings.keep, now.num_layers / start.num_layers, progress))


def _low_rank_round(settings: LowRank, start: SpeechModel, now: SpeechModel, progress: float) -> LowRank:
    assert settings.params is not None
    counts = [count_parameters(model.config, with_heads=False) for model in (start, now)]
    return replace(settings, params=_next_share(settings.params, counts[1] / counts[0], progress))


def _weights_round(settings: WeightPruning, start: SpeechModel, now: SpeechModel, progress: float) -> WeightPruning:
    """Of what is not zero every round keeps the same share; sparsity counts from the model without zeros."""
    zero = sparsity_of(start, biases=settings.biases)
    if progress == 1.0 or settings.sparsity <= zero:
        return settings
    return replace(settings, sparsity=1.0 - (1.0 - zero) * ((1.0 - settings.sparsity) / (1.0 - zero)) ** progress)


METHODS: dict[str, Method] = {
    "weights": Method(settings=WeightPruning, apply=prune_weights, strength="sparsity", nothing=0.0, in_round=_weights_round),
    "heads": Method(
        settings=HeadPruning,
        apply=prune_heads,
        strength="keep",
        instead=("num_kept",),
        plan=_heads_plan,
        least=_one_of_all,
        in_round=_round_of(_num_heads),
        looks_at_speech=_scored_on_data,
        looks_at_loss=_scored_on_data,
    ),
    "rows": Method(
        settings=RowPruning,
        apply=prune_rows,
        strength="keep",
        instead=("num_kept",),
        plan=_rows_plan,
        least=_one_of_all,
        in_round=_round_of(_num_units),
        looks_at_speech=_scored_on_data,
        looks_at_loss=_scored_on_data,
    ),
    "width": Method(
        settings=WidthPruning,
        apply=prune_width,
        strength="keep",
        plan=_width_plan,
        coarse="keep_heads",
        least=_one_of_all,
        in_round=_width_round,
        looks_at_speech=_scored_on_data,
        looks_at_loss=_scored_on_data,
    ),
    "depth": Method(
        settings=DepthPruning,
        apply=prune_depth,
        strength="keep",
        instead=("num_layers",),
        plan=depth_left,
        least=_one_layer,
        in_round=_depth_round,
        looks_at_speech=lambda settings: True,
    ),
    "sharing": Method(settings=Sharing, apply=share_layers),
    "low-rank": Method(
        settings=LowRank,
        apply=factorize,
        strength="params",
        instead=("ratio", "energy"),
        plan=low_rank_left,
        least=least_share,
        in_round=_low_rank_round,
        looks_at_speech=lambda settings: settings.whiten,
    ),
    "quantize": Method(settings=Quantization, apply=quantize, final=True),
}
