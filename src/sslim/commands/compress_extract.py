"""``sslim compress extract``: one subnet of a supernet as a model of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a subnet of SUPERNET as an ordinary model folder; it gives what the subnet gives inside the supernet.

    Example: sslim compress extract runs/supernet/model --subnet min --output smallest
    """

    supernet: tyro.conf.Positional[Path]
    """Model folder with a search space, a run that made one, or a LightHuBERT checkpoint."""
    output: Path
    """Model folder to write."""
    subnet: str = "default"
    """default, max, min, a JSON object with sizes, or a .json file with one."""


def main(options: Options) -> None:
    """Extracts and says what was written."""
    from sslim.checkpoints import load_model, save_model
    from sslim.checkpoints.model_files import model_path
    from sslim.commands.subnet_choice import subnet_choice

    path = model_path(options.supernet)
    if options.subnet == "whole":
        raise ValueError("--subnet whole is the supernet itself; name a subnet: default, max, min, a JSON object or a file")
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(f"--output {options.output} is a file: name a new folder")
    if options.output.exists() and any(options.output.iterdir()):
        raise ValueError(f"--output {options.output} is not empty: name a new folder")
    model = load_model(path, subnet=subnet_choice(options.subnet))
    save_model(model, options.output)
    encoder = model.config.encoder
    print(f"{options.output}: {encoder.num_layers} layers of width {encoder.dim}, {model.num_parameters():,} parameters")
