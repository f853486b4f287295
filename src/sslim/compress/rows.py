"""Row pruning: feed-forward units of little worth are taken out, rows of the first map and columns of the second.

The MelHuBERT compression study (Lin et al., arXiv 2211.09949; ``rp_utils.py``) does it by L1 norm and to one width for all
layers; its README calls it low-rank approximation. Here scores may also come from data (see ``importance``), widths may differ
between layers, chosen over the whole model, and can be held to multiples that suit the hardware. One call is one round from
whatever model it is given; widths are those of the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from sslim.compress.calibration import Calibration
from sslim.compress.importance import (
    Chosen,
    Scores,
    best_of_all,
    best_of_each,
    check_amount,
    least_of,
    normalized,
    share_of,
    unit_sensitivities,
    unit_weights,
)
from sslim.compress.origins import cut
from sslim.config import to_plain
from sslim.models import ModelConfig, SpeechModel
from sslim.models.elastic import slice_model_config
from sslim.nn.slicing import Units


@dataclass(frozen=True, kw_only=True)
class RowPruning:
    """Settings of row pruning; give one of ``keep`` and ``num_kept``.

    Attributes:
        keep: Share of the units that is kept, above 0 up to 1; of each layer or of the whole model, by ``scope``.
        num_kept: Units that are kept, in each layer or in the whole model; a layer with fewer keeps all of them.
        scope: ``uniform``: the same share (or number) in every layer, as in the reference; ``model``: the best units of the
            whole model, so that every layer gets a width of its own. Layers that share a block count as one.
        score: ``l1``: row of the first map, its bias, column of the second map; ``data``: the loss on calibration speech.
        multiple: Widths are rounded down to multiples of this, except where nothing is removed; 8 suits most hardware.
        minimum: With scope ``model``, units that every layer keeps.
        normalize: With scope ``model``, the p of the p-norm of a layer's scores that they are divided by; None compares them as
            they are, though layers differ in scale.
    """

    keep: float | None = None
    num_kept: int | None = None
    scope: Literal["uniform", "model"] = "uniform"
    score: Literal["l1", "data"] = "l1"
    multiple: int = 1
    minimum: int = 1
    normalize: float | None = 2.0

    def __post_init__(self) -> None:
        check_amount(self.keep, self.num_kept)
        for name in ("multiple", "minimum"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.normalize is not None and not self.normalize >= 1:
            raise ValueError(f"normalize is {self.normalize}; expected the p of a norm, at least 1, or None")


def prune_rows(model: SpeechModel, settings: RowPruning, calibration: Calibration | None = None) -> SpeechModel:
    """Returns a model with fewer feed-forward units: one round of pruning.

    Blocks without a feed-forward part stay as they are. The note in the provenance names what is left by original numbers, from
    0 (see ``origins``).

    Args:
        model: Any model; it stays as it is.
        settings: How many units, and which.
        calibration: Speech with a loss, for the score ``data``.

    Returns:
        A physically smaller model in eval mode. It computes what the given model computes with the removed units at zero.

    Raises:
        ValueError: A number of units that the model cannot keep, data scores without a loss, or scores that are not finite.
    """
    _check_number(settings, [block.feedforward_dim for block in model.config.transformer.blocks])
    units = replace(Units.full(model.config.transformer), feedforward=_choose(_scores(model, settings, calibration), settings))
    return cut(model, units, {"step": "rows", **to_plain(settings)})


def rows_kept(model: SpeechModel, settings: RowPruning, calibration: Calibration | None = None) -> Callable[[float], Chosen]:
    """Returns which units of each block :func:`prune_rows` keeps for any share; the model is looked at once.

    Args:
        model: Any model.
        settings: Scope, scores and multiples; their ``keep`` and ``num_kept`` do not count.
        calibration: Speech with a loss, for the score ``data``.

    Raises:
        ValueError: Data scores without a loss, or scores that are not finite.
    """
    scores = _scores(model, settings, calibration)
    return lambda keep: _choose(scores, replace(settings, keep=keep, num_kept=None))


def rows_config(config: ModelConfig, settings: RowPruning) -> ModelConfig:
    """Returns a description with the sizes that :func:`prune_rows` leaves, found without a model or data.

    With scope ``uniform`` it is the description itself. With scope ``model`` scores decide how many units each layer keeps; the
    description spreads them evenly and has the right number of parameters.

    Raises:
        ValueError: As :func:`prune_rows`; and with scope ``model`` where the number of parameters depends on scores: units of
            one layer have more parameters than those of another, or a width is no multiple of ``multiple``.
    """
    blocks = config.transformer.blocks
    counts = [block.feedforward_dim for block in blocks]
    _check_number(settings, counts)
    if settings.scope == "model":
        if len({(block.ranks.up, block.ranks.down) for block in blocks if block.feedforward_dim}) > 1:
            raise ValueError(
                "feed-forward maps differ in rank between layers: with scope 'model' the size left depends on scores"
            )
        if odd := [count for count in counts if count % settings.multiple]:
            raise ValueError(
                f"a layer has {odd[0]} feed-forward units, no multiple of {settings.multiple}: with scope 'model' the size "
                "left depends on scores"
            )
    even = tuple(-torch.arange(count, dtype=torch.float64) for count in counts)
    kept = _choose(even, replace(settings, normalize=None))
    return slice_model_config(config, replace(Units.full(config.transformer), feedforward=kept))


def _scores(model: SpeechModel, settings: RowPruning, calibration: Calibration | None) -> Scores:
    return unit_sensitivities(model, calibration) if settings.score == "data" else unit_weights(model)


def _choose(scores: Scores, settings: RowPruning) -> Chosen:
    counts = [len(part) for part in scores]
    if settings.scope == "uniform":
        return best_of_each(scores, [_width(settings, count) for count in counts])
    total = share_of(settings.keep, sum(counts)) if settings.keep is not None else settings.num_kept or 0
    options = {"minimum": settings.minimum, "multiple": settings.multiple}
    return best_of_all(normalized(scores, settings.normalize), total, **options)


def _width(settings: RowPruning, count: int) -> int:
    """Units left of a layer's ``count`` with scope ``uniform``."""
    wanted = share_of(settings.keep, count) if settings.keep is not None else min(settings.num_kept or 0, count)
    if wanted == count:
        return count
    return max(wanted // settings.multiple * settings.multiple, min(settings.multiple, count))


def _check_number(settings: RowPruning, counts: Sequence[int]) -> None:
    """Refuses a number of units that the layers do not have or cannot go down to."""
    if settings.num_kept is None:
        return
    if settings.scope == "uniform":
        low, high, where = 1, max(counts, default=0), "the widest layer has"
    else:
        low = sum(least_of(count, settings.minimum, settings.multiple) for count in counts)
        high, where = sum(counts), "the model has"
    if not low <= settings.num_kept <= high:
        raise ValueError(f"num_kept is {settings.num_kept}, but {where} {high} feed-forward units; expected {low} to {high}")
