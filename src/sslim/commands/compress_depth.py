"""``sslim compress depth``: leaves out the layers that change speech least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sslim.commands.compression_options import CompressionOptions, run


@dataclass(frozen=True, kw_only=True)
class Options(CompressionOptions):
    """Leave out the layers of MODEL that turn the frames of CORPUS least.

    Example: `sslim compress depth models/melhubert --num-layers 6 --corpus corpora/speech --recover-minutes 5
    --output runs/six`.
    """

    keep: float | None = None
    """Share of the layers that is kept."""
    num_layers: int | None = None
    """Layers that are kept, in place of a share."""
    budget: str | None = None
    """Keep as many as fit: params=25M, macs=2G (for each second of audio) or latency_ms=12 (as measured here)."""
    choose: Literal["greedy", "run"] = "greedy"
    """greedy: one after the other, measuring the rest anew; run: layers that follow one another."""


def main(options: Options) -> None:
    """Cuts, trains if asked to, and prints what was bought."""
    settings = {"keep": options.keep, "num_layers": options.num_layers, "choose": options.choose}
    run(options, options.pipeline("depth", settings, options.budget))
