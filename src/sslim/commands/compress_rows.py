"""``sslim compress rows``: takes feed-forward units out of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sslim.commands.compression_options import CompressionOptions, run


@dataclass(frozen=True, kw_only=True)
class Options(CompressionOptions):
    """Take the least important feed-forward units out of MODEL; what is left is an ordinary, smaller model.

    Examples: `sslim compress rows models/melhubert --keep 0.5 --multiple 8 --output runs/half`,
    `sslim compress rows runs/teacher --budget latency_ms=10 --scope model --score data --corpus corpora/speech
    --output runs/fast`.
    """

    keep: float | None = None
    """Share of the units that is kept."""
    num_kept: int | None = None
    """Units that are kept, of each layer or of the whole model, in place of a share."""
    budget: str | None = None
    """Keep as many as fit: params=25M, macs=2G (for each second of audio) or latency_ms=12 (as measured here)."""
    scope: Literal["uniform", "model"] = "uniform"
    """uniform: the same share in every layer; model: the best of the whole model, so that layers differ in width."""
    score: Literal["l1", "data"] = "l1"
    """l1: size of a unit's weights; data: what the loss on speech says (--corpus)."""
    multiple: int = 1
    """Round widths down to multiples of this; 8 suits most hardware."""


def main(options: Options) -> None:
    """Cuts, trains if asked to, and prints what was bought."""
    settings = {"keep": options.keep, "num_kept": options.num_kept, "scope": options.scope, "score": options.score}
    run(options, options.pipeline("rows", {**settings, "multiple": options.multiple}, options.budget))
