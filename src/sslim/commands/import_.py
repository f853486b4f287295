"""``sslim import``: a foreign checkpoint becomes a native model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    """Read a foreign checkpoint and write a native model folder. Nothing in the file is executed.

    Known: MelHuBERT of any generation, HuBERT (fairseq, S3PRL, Hugging Face), DistilHuBERT, DistilALHuBERT, LightHuBERT,
    DPHuBERT and DPWavLM, Mockingjay, TERA and AALBERT (S3PRL), pruned and distilled ones too.

    Attributes:
        foreign: The checkpoint file, or a Hugging Face folder.
        folder: The model folder to write.
        statistics: Mean and standard deviation of the features, which such files do not hold: libri-100, libri-360, libri-960,
            or a .npy (2, F) or .safetensors file. Without it the model takes features but no waveforms.
        subnet: Of a supernet (LightHuBERT): default, max, min, a JSON object, a .json file; whole keeps the supernet.
    """

    foreign: tyro.conf.Positional[Path]
    folder: tyro.conf.Positional[Path]
    statistics: str | None = None
    subnet: str | None = None


def main(options: Options) -> None:
    """Imports and reports in a few lines what was read.

    Raises:
        ValueError: The file cannot be read, or the statistics are unknown.
    """
    from sslim.checkpoints import load_model, save_model
    from sslim.commands.subnet_choice import subnet_choice

    model = load_model(options.foreign, statistics=options.statistics, subnet=subnet_choice(options.subnet))
    save_model(model, options.folder)
    notes = model.provenance[0]
    size = f"{model.num_layers} layers of width {model.config.encoder.dim}, {model.num_parameters():,} parameters"
    print(f"{options.folder}: {notes.get('format', model.config.family)}, {size}")
    for key in ("frontend", "masked_weights", "kept_heads", "pruned_heads", "stated_feedforward_dim", "shared_layers"):
        if key in notes:
            print(f"  {key.replace('_', ' ')}: {notes[key]}")
    normalization = getattr(model.config.frontend, "normalization", None)
    if normalization is not None and normalization.kind == "global" and normalization.statistics is None:
        likely = notes.get("likely_statistics")
        hint = f"its training list names {likely}" if likely else "libri-100, libri-360, libri-960 or a file"
        print(f"  no statistics: it takes features but no waveforms; import it again with --statistics ({hint})")
