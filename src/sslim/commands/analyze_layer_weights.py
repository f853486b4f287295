"""``sslim analyze layer-weights``: the layers that probes took their features from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from sslim.commands.analysis_options import say, show


@dataclass(frozen=True, kw_only=True)
class Options:
    """Read the learned layer weights in result CARDS of `sslim probe`, and draw them beside each other.

    Example: `sslim analyze layer-weights card.json --output analysis/weights`.
    """

    cards: tyro.conf.Positional[tuple[Path, ...]]
    """Result cards (JSON)."""
    output: Path
    """Folder for results (JSON) and picture (PNG)."""


def main(options: Options) -> None:
    """Reads and prints the table; writes results and picture."""
    from sslim.recipes.analyses import analyze_layer_weights

    show(analyze_layer_weights(options.cards, options.output, say=say))
