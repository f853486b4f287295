"""``sslim export``: a model in a foreign layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a model in the layout of another toolkit.

    Example: sslim export runs/hubert/model --output hubert_hf --format huggingface

    Attributes:
        model: A model folder, a run folder, or a foreign checkpoint.
        output: What to write: a file (melhubert, s3prl) or a folder (huggingface).
        format: melhubert is the reference implementation's .ckpt, which holds no mean and standard deviation of features;
            huggingface is a folder for transformers' HubertModel, in which shared layers are unrolled; s3prl is a .ckpt of
            Mockingjay, TERA, AALBERT, APC, VQ-APC or NPC in S3PRL's later container.
        subnet: Of a supernet: default, max, min, a JSON object, a .json file.
    """

    model: tyro.conf.Positional[Path]
    output: Path
    format: Literal["melhubert", "huggingface", "s3prl"] = "melhubert"
    subnet: str | None = None


def main(options: Options) -> None:
    """Exports.

    Raises:
        ValueError: The model cannot be read, or the layout cannot express it.
    """
    from sslim.checkpoints import load_model
    from sslim.checkpoints.exporters import EXPORTERS
    from sslim.checkpoints.exporters.huggingface import num_exported_parameters
    from sslim.checkpoints.model_files import model_path
    from sslim.commands.subnet_choice import subnet_choice

    model = load_model(model_path(options.model), subnet=subnet_choice(options.subnet))
    EXPORTERS[options.format](model, options.output)
    to_huggingface = options.format == "huggingface"
    size = num_exported_parameters(model.config) if to_huggingface else model.num_parameters()
    print(f"{options.output}: {options.format}, {size:,} parameters")
    if to_huggingface and (shared := len(set(model.config.transformer.depth_map))) < model.num_layers:
        print(f"  {shared} shared blocks unrolled to {model.num_layers} layers, of {model.num_parameters():,} parameters")
    if model.frontend is not None and model.frontend.statistics_source is not None:
        print(f"  not in it: the features' statistics ({model.frontend.statistics_source})")
    left_out = sorted(set(model.config.heads) - {"mask"}) if to_huggingface else []
    if left_out:
        print(f"  not in it: the heads {', '.join(left_out)}")
