"""Narrower layers: attention heads and feed-forward units together, the same share of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sslim.compress.calibration import Calibration
from sslim.compress.heads import HeadPruning, prune_heads
from sslim.compress.rows import RowPruning, prune_rows
from sslim.models import SpeechModel


@dataclass(frozen=True, kw_only=True)
class WidthPruning:
    """Settings of pruning heads and feed-forward units together.

    Attributes:
        keep: Share of both that is kept.
        scope: ``layer``: the same share in every layer; ``model``: chosen over the whole model.
        score: ``l1`` (sizes of weights) or ``data`` (first-order change of the loss on calibration speech).
    """

    keep: float
    scope: Literal["layer", "model"] = "layer"
    score: Literal["l1", "data"] = "l1"


def prune_width(model: SpeechModel, settings: WidthPruning, calibration: Calibration | None = None) -> SpeechModel:
    """Returns a model with a share of its heads and feed-forward units.

    Both are scored on the model as it comes: the scores of units do not see the heads go.

    Raises:
        ValueError: A share that leaves nothing, or data scores without calibration speech.
    """
    rows = prune_rows(
        model, RowPruning(keep=settings.keep, scope=ROW_SCOPES[settings.scope], score=settings.score), calibration
    )
    return prune_heads(rows, HeadPruning(keep=settings.keep, scope=settings.scope, score=settings.score), calibration)


ROW_SCOPES: dict[str, Literal["uniform", "model"]] = {"layer": "uniform", "model": "model"}
