"""``sslim compress sharing``: folds a deep model into one whose few blocks run again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sslim.commands.compression_options import CompressionOptions, run


@dataclass(frozen=True, kw_only=True)
class Options(CompressionOptions):
    """Fold MODEL into one of equal depth whose layers share a few blocks; it has to be trained afterwards.

    Example: `sslim compress sharing models/hubert --num-blocks 2 --corpus corpora/speech --recover-minutes 30
    --output runs/2x6`.
    """

    num_blocks: int
    """Distinct blocks that are left."""
    order: Literal["cycle", "sequence"] = "cycle"
    """cycle: 1 2 1 2; sequence: 1 1 2 2."""
    start: Literal["first", "average", "layers"] = "first"
    """A block starts as the first layer that it replaces, as their mean, or as the layers that --layers names."""
    layers: tuple[int, ...] | None = None
    """With --start layers: the layer, from 1, that each block starts as."""


def main(options: Options) -> None:
    """Folds, trains if asked to, and prints what was bought."""
    settings = {"num_blocks": options.num_blocks, "order": options.order, "start": options.start}
    run(options, options.pipeline("sharing", {**settings, "layers": options.layers and list(options.layers)}))
