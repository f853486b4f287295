"""``sslim extract``: hidden states of audio or a corpus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the hidden states of audio files, folders of audio, or one corpus folder; an interrupted run continues.

    Example: sslim extract runs/small/model recordings --layers 0,4,final --output features
    """

    model: tyro.conf.Positional[Path]
    """Model folder or checkpoint."""
    audio: tyro.conf.Positional[tuple[Path, ...]]
    """Audio files and folders of them, or one corpus folder (or its manifest.jsonl)."""
    output: Path
    """Folder to write: index.json, quarantine.jsonl and the features."""
    layers: str = "all"
    """all, final, or numbers with commas; 0 is what enters the first block, final comes after the last norm."""
    format: Literal["safetensors", "npz", "ark"] = "safetensors"
    """One safetensors or npz file for each utterance, or one Kaldi archive for each layer."""
    batch_seconds: float = 60.0
    """Seconds of padded audio in a batch; results do not depend on it."""
    max_bad: float = 0.01
    """Share of the utterances that may be unreadable; more ends with an error after everything else is written."""
    statistics: str | None = None
    """Mean and standard deviation for models without: libri-100, libri-360, libri-960, a .npy or a .safetensors file."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, cuda:1."""
    bf16: bool = False
    """Run the model under bf16 autocast."""


def main(options: Options) -> None:
    """Extracts and says what was written."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sslim.checkpoints import load_model
    from sslim.export import ExtractConfig, extract
    from sslim.storage import file_digest

    if not options.audio:
        raise ValueError("name at least one audio file, folder or corpus to extract from")
    console = Console(stderr=True, highlight=False)
    config = ExtractConfig(
        layers=options.layers,
        format=options.format,
        batch_s=options.batch_seconds,
        bf16=options.bf16,
        max_bad=options.max_bad,
    )
    model = load_model(options.model, statistics=options.statistics).to(options.device)
    file = options.model / "model.safetensors" if options.model.is_dir() else options.model
    origin = {"path": str(options.model), "sha256": file_digest(file)}
    columns = (TextColumn("utterances"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=None)
        index = extract(
            model,
            options.audio,
            options.output,
            config,
            origin=origin,
            tell=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    layers = ", ".join(index["layers"])
    bad = f"; {index['num_quarantined']} could not be read (quarantine.jsonl)" if index["num_quarantined"] else ""
    console.print(f"{options.output}: {index['num_utterances']} utterances, {layers}{bad}")
