"""Learned layer weights: which layers a probe took its features from, read from result cards of ``sslim probe``.

The weights in a card are those that were used: after the softmax, and the mean over seeds and folds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIX = "mix"


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """The weights of one row of a card.

    Attributes:
        task: What was probed.
        corpus: On what.
        name: Of the features.
        score: Mean test score.
        sd: Its standard deviation over seeds.
        weights: Of layers 0 (enters the first block) to N; they sum to 1.
        centre: Mean layer, weighted.
    """

    task: str
    corpus: str
    name: str
    score: float
    sd: float
    weights: list[float]
    centre: float


def read_layer_weights(cards: Sequence[Mapping[str, Any]]) -> list[LayerWeights]:
    """Collects the rows whose layers were mixed.

    Args:
        cards: What ``sslim probe`` wrote.

    Raises:
        ValueError: No row has a learned mix of several layers.
    """
    found = []
    for card in cards:
        for row in card["rows"]:
            if row["layer"] != MIX or len(row["layer_weights"]) < 2:
                continue
            weights = [float(weight) for weight in row["layer_weights"]]
            total = sum(weights)
            found.append(
                LayerWeights(
                    task=card["task"],
                    corpus=card["corpus"]["name"],
                    name=row["name"],
                    score=row["mean"],
                    sd=row["sd"],
                    weights=weights,
                    centre=sum(layer * weight for layer, weight in enumerate(weights)) / total,
                )
            )
    if not found:
        raise ValueError("no row of these result cards has learned layer weights: probe with --layer mix, the default")
    return found
