"""Narrower layers: attention heads and feed-forward units together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from sslim.compress.calibration import Calibration
from sslim.compress.heads import HeadPruning, heads_kept, removed_heads
from sslim.compress.importance import check_amount
from sslim.compress.origins import cut
from sslim.compress.rows import RowPruning, rows_kept
from sslim.config import OMIT_DEFAULT, to_plain
from sslim.models import SpeechModel
from sslim.nn.slicing import Units


@dataclass(frozen=True, kw_only=True)
class WidthPruning:
    """Settings of pruning heads and feed-forward units together.

    Attributes:
        keep: Share of both that is kept.
        keep_heads: Share of the heads, where it is another than that of the units.
        scope: ``layer``: the same share in every layer; ``model``: chosen over the whole model.
        score: ``l1`` (sizes of weights) or ``data`` (first-order change of the loss on calibration speech).
    """

    keep: float
    keep_heads: float | None = field(default=None, metadata={OMIT_DEFAULT: True})
    scope: Literal["layer", "model"] = "layer"
    score: Literal["l1", "data"] = "l1"

    def __post_init__(self) -> None:
        for share in (self.keep, self.keep_heads):
            if share is not None:
                check_amount(share, None)


def prune_width(model: SpeechModel, settings: WidthPruning, calibration: Calibration | None = None) -> SpeechModel:
    """Returns a model with a share of its heads and feed-forward units: one round of pruning.

    Both are scored on the model as it comes: the scores of neither see the others go. The note in the provenance names heads
    and units by their original numbers, from 0 (see ``origins``).

    Args:
        model: Any model; it stays as it is.
        settings: How much, and which.
        calibration: Speech with a loss, for the score ``data``.

    Returns:
        A physically smaller model in eval mode.

    Raises:
        ValueError: As ``prune_heads`` and ``prune_rows``.
    """
    units = width_kept(model, settings, calibration)(settings.keep)
    note = {"step": "width", **to_plain(settings), "removed_heads": removed_heads(model, units.heads)}
    return cut(model, units, note)


class WidthKept(Protocol):
    """What is kept for any share ``keep``, and any share of the heads; None for that of the settings, or ``keep``."""

    def __call__(self, keep: float, keep_heads: float | None = None) -> Units: ...


def width_kept(model: SpeechModel, settings: WidthPruning, calibration: Calibration | None = None) -> WidthKept:
    """Returns what :func:`prune_width` keeps for any share ``keep``; the model is looked at once.

    Args:
        model: Any model.
        settings: Scope, scores and ``keep_heads``; their ``keep`` does not count.
        calibration: Speech with a loss, for the score ``data``.

    Raises:
        ValueError: As ``prune_heads`` and ``prune_rows``; the function that is returned, too.
    """
    heads = heads_kept(model, HeadPruning(keep=1.0, scope=settings.scope, score=settings.score), calibration)
    rows = rows_kept(model, RowPruning(keep=1.0, scope=ROW_SCOPES[settings.scope], score=settings.score), calibration)
    whole = Units.full(model.config.transformer)

    def kept(keep: float, keep_heads: float | None = None) -> Units:
        return replace(whole, heads=heads(keep_heads or settings.keep_heads or keep), feedforward=rows(keep))

    return kept


ROW_SCOPES: dict[str, Literal["uniform", "model"]] = {"layer": "uniform", "model": "model"}
