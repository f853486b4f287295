"""``sslim analyze lnsr``: how much of a perturbation of the input arrives in each layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from sslim.commands.analysis_options import AnalysisOptions, progress, say, show


@dataclass(frozen=True, kw_only=True)
class Options(AnalysisOptions):
    """Perturb the input of MODEL by PGD and by equally loud Gaussian noise; measure the noise-to-signal ratio of each layer.

    Example: `sslim analyze lnsr runs/small/model --corpus corpora/digits --output analysis/lnsr`.
    """

    model: tyro.conf.Positional[Path]
    """Model folder, run folder or foreign checkpoint."""
    perturb: Literal["features", "waveform"] = "features"
    """What is perturbed: the front-end's features, or samples."""
    epsilons: tuple[float, ...] = (0.03, 0.1, 0.3)
    """Largest change of a value, as shares of the input's root mean square: 0.1 is 20 dB below the signal."""
    steps: int = 10
    """Steps of PGD; 1 is FGSM from a random start."""
    attacked_layer: int | None = None
    """Layer whose relative change PGD raises; the last one when not given."""
    norm: Literal["frobenius", "spectral"] = "frobenius"
    """Norm of a layer's frames: frobenius is the paper's, spectral what S3PRL's script computes."""


def main(options: Options) -> None:
    """Measures and prints the table; writes results and picture."""
    from sslim.analysis.lnsr import LnsrConfig
    from sslim.recipes.analyses import analyze_lnsr

    config = LnsrConfig(
        perturb=options.perturb,
        epsilons=options.epsilons,
        steps=options.steps,
        attacked_layer=options.attacked_layer,
        norm=options.norm,
        seed=options.seed,
    )
    speech = options.speech(options.model)
    with progress("utterances") as tell:
        table = analyze_lnsr(speech, config, options.output, say=say, tell=tell)
    show(table)
