"""``sslim compress yaml``: runs the MelHuBERT compression suite's two YAML files as they are."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compress MODEL as MODEL_CONFIG and RUNNER_CONFIG of Speech-SSL-Compression say. The same command continues.

    Weight, head and row pruning and distillation are told apart by their keys. With distillation MODEL is the teacher. Example:
    `sslim compress yaml config_model.yaml config_runner.yaml melhubert.ckpt corpora/speech --labels km512 --output runs/small`.
    """

    model_config: tyro.conf.Positional[Path]
    """The suite's model YAML."""
    runner_config: tyro.conf.Positional[Path]
    """The suite's runner YAML."""
    model: tyro.conf.Positional[Path]
    """Model to compress, or the teacher: a model folder, run folder or foreign checkpoint."""
    corpus: tyro.conf.Positional[Path | None] = None
    """Folder made by `sslim prepare`; when left out, the runner's CSV files are prepared beside --output."""
    output: Path
    """Folder for runs, cut models, the table of what was bought, and at the end model/."""
    labels: str | None = None
    """Label set that the model was trained on; needed when the corpus has several."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 autocast while training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    threads: int = 0
    """CPU threads for torch; 0 leaves torch's own choice."""
    seed: int = 0
    """Decides everything random."""


def main(options: Options) -> None:
    """Runs the files and prints what was bought."""
    from dataclasses import replace

    import torch
    from rich.console import Console

    from sslim.recipes.compression_runs import run_compression
    from sslim.recipes.compression_table import printed_table
    from sslim.recipes.compression_yaml import read_compression_yaml
    from sslim.recipes.melhubert_yaml import corpus_of_sets
    from sslim.training import Processes
    from sslim.training.distributed import on_main

    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(stderr=True, highlight=False)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    recipe = read_compression_yaml(options.model_config, options.runner_config)
    training = replace(recipe.training, precision=options.precision, device=options.device, seed=options.seed)
    corpus = options.corpus or Path(on_main(lambda: str(corpus_of_sets(recipe.sets, options.output, say))))
    interrupted = run_compression(
        replace(recipe, training=training), options.model, corpus, options.output, labels_name=options.labels, say=say
    )
    if interrupted is not None:
        print(f"stopped at step {interrupted.step}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(interrupted.exit_code)
    if not Processes.of_environment().is_main:
        return
    Console(width=110, highlight=False).print(printed_table(options.output))
    say(f"model: {options.output / 'model'}   next: sslim profile {options.output / 'model'} --baseline {options.model}")
