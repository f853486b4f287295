"""``sslim compress width``: takes attention heads and feed-forward units out of a model, the same share of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sslim.commands.compression_options import CompressionOptions, run


@dataclass(frozen=True, kw_only=True)
class Options(CompressionOptions):
    """Take the same share of attention heads and feed-forward units out of MODEL.

    Examples: `sslim compress width models/melhubert --keep 0.5 --output runs/half`,
    `sslim compress width models/melhubert --budget latency_ms=12 --output runs/fast`.
    """

    keep: float | None = None
    """Share of heads and units that is kept."""
    budget: str | None = None
    """Keep as much as fits: params=25M, macs=2G (for each second of audio) or latency_ms=12 (as measured here)."""
    scope: Literal["layer", "model"] = "layer"
    """layer: the same share in every layer; model: chosen over the whole model."""
    score: Literal["l1", "data"] = "l1"
    """l1: sizes of weights; data: what the loss on speech says (--corpus)."""


def main(options: Options) -> None:
    """Cuts, trains if asked to, and prints what was bought."""
    settings = {"keep": options.keep, "scope": options.scope, "score": options.score}
    run(options, options.pipeline("width", settings, options.budget))
