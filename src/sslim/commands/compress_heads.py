"""``sslim compress heads``: takes attention heads out of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sslim.commands.compression_options import CompressionOptions, run


@dataclass(frozen=True, kw_only=True)
class Options(CompressionOptions):
    """Take the least important attention heads out of MODEL; what is left is an ordinary, smaller model.

    Examples: `sslim compress heads models/melhubert --keep 0.5 --output runs/half`,
    `sslim compress heads runs/teacher --keep 0.25 --rounds 3 --score data --scope model --corpus corpora/speech
    --recover-minutes 5 --output runs/quarter`.
    """

    keep: float | None = None
    """Share of the heads that is kept."""
    num_kept: int | None = None
    """Heads that are kept, of each layer or of the whole model, in place of a share."""
    budget: str | None = None
    """Keep as many as fit: params=25M, macs=2G (for each second of audio) or latency_ms=12 (as measured here)."""
    scope: Literal["layer", "model"] = "layer"
    """layer: the same share in every layer; model: the best of the whole model, at least one in each layer."""
    score: Literal["l1", "l1-output", "data"] = "l1"
    """l1: size of query, key and value; l1-output: and of the output map; data: what the loss on speech says (--corpus)."""
    normalize: float | None = 2.0
    """With scope model, the p-norm of a layer's scores that they are divided by."""


def main(options: Options) -> None:
    """Cuts, trains if asked to, and prints what was bought."""
    settings = {"keep": options.keep, "num_kept": options.num_kept, "scope": options.scope, "score": options.score}
    run(options, options.pipeline("heads", {**settings, "normalize": options.normalize}, options.budget))
