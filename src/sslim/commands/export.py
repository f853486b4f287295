"""``sslim export``: a model in a foreign layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a model in the layout of another toolkit.

    Attributes:
        model: A model folder, or a foreign checkpoint.
        file: The file to write.
        format: melhubert is the reference implementation's .ckpt, which holds no mean and standard deviation of features.
    """

    model: tyro.conf.Positional[Path]
    file: tyro.conf.Positional[Path]
    format: Literal["melhubert"] = "melhubert"


def main(options: Options) -> None:
    """Exports.

    Raises:
        ValueError: The model cannot be read, or the layout cannot express it.
    """
    from sslim.checkpoints import load_model
    from sslim.checkpoints.exporters import EXPORTERS

    model = load_model(options.model)
    EXPORTERS[options.format](model, options.file)
    print(f"{options.file}: {options.format}, {model.num_parameters():,} parameters")
    if model.frontend is not None and model.frontend.statistics_source is not None:
        print(f"  not in it: the features' statistics ({model.frontend.statistics_source})")
