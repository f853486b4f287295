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
        output: What to write: a file (melhubert) or a folder (huggingface).
        format: melhubert is the reference implementation's .ckpt, which holds no mean and standard deviation of features;
            huggingface is a folder for transformers' HubertModel, in which shared layers are unrolled.
    """

    model: tyro.conf.Positional[Path]
    output: Path
    format: Literal["melhubert", "huggingface"] = "melhubert"


def main(options: Options) -> None:
    """Exports.

    Raises:
        ValueError: The model cannot be read, or the layout cannot express it.
    """
    from sslim.checkpoints import load_model
    from sslim.checkpoints.exporters import EXPORTERS

    model = load_model(options.model)
    EXPORTERS[options.format](model, options.output)
    print(f"{options.output}: {options.format}, {model.num_parameters():,} parameters")
    if model.frontend is not None and model.frontend.statistics_source is not None:
        print(f"  not in it: the features' statistics ({model.frontend.statistics_source})")
    left_out = sorted(set(model.config.heads) - {"mask"}) if options.format == "huggingface" else []
    if left_out:
        print(f"  not in it: the heads {', '.join(left_out)}")
