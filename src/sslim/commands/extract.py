"""``sslim extract``: hidden states of audio or a corpus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    from sslim.models import SpeechModel


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the hidden states of audio files, folders of audio, or one corpus folder; an interrupted run continues.

    Example: sslim extract runs/small/model recordings --layers 0,4,final --output features
    """

    model: tyro.conf.Positional[Path]
    """Model folder, run folder or checkpoint."""
    audio: tyro.conf.Positional[tuple[Path, ...]]
    """Audio files and folders of them, or one corpus folder (or its manifest.jsonl)."""
    output: Path
    """Folder to write: index.json, quarantine.jsonl and the features."""
    layers: str = "all"
    """all, final, or numbers with commas; 0 is what enters the first block, final comes after the last norm."""
    format: Literal["safetensors", "npz", "ark"] = "safetensors"
    """One safetensors or npz file for each utterance; or ark: one Kaldi data directory for each layer (layer_06/feats.scp)."""
    frame_period_ms: float | None = None
    """Repeat frames so that one comes every so many milliseconds, for example 10 for Kaldi's alignments."""
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
    stream_chunk_ms: float | None = None
    """Feed a causal model chunks of so many milliseconds, as from a microphone; writes the same files and tells the latency."""


def main(options: Options) -> None:
    """Extracts and says what was written."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sslim.checkpoints import load_model
    from sslim.checkpoints.model_files import model_path, tensors_digest
    from sslim.export import ExtractConfig, extract
    from sslim.profiling.latency import check_device

    check_device(options.device)
    if not options.audio:
        raise ValueError("name at least one audio file, folder or corpus to extract from")
    console = Console(stderr=True, highlight=False)
    config = ExtractConfig(
        layers=options.layers,
        format=options.format,
        batch_s=options.batch_seconds,
        bf16=options.bf16,
        max_bad=options.max_bad,
        frame_period_ms=options.frame_period_ms,
        stream_chunk_ms=options.stream_chunk_ms,
    )
    place = model_path(options.model)
    model = load_model(place, statistics=options.statistics).to(options.device)
    origin = {"path": str(place), "sha256": tensors_digest(place)}
    chunk_times_s: list[float] = []
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
            note=chunk_times_s.append,
        )
    layers = ", ".join(index["layers"])
    bad = f"; {index['num_quarantined']} could not be read (quarantine.jsonl)" if index["num_quarantined"] else ""
    console.print(f"{options.output}: {index['num_utterances']} utterances, {layers}{bad}")
    if not index.get("speakers_in_order", True):
        console.print("utterance ids do not begin with their speakers, which utils/validate_data_dir.sh will complain about")
    if options.stream_chunk_ms is not None:
        console.print(_latency(model, options.stream_chunk_ms, chunk_times_s))


def _latency(model: SpeechModel, chunk_ms: float, times_s: list[float]) -> str:
    """How late frames of a streamed model come."""
    import numpy as np

    from sslim.models.streaming import StreamingEncoder

    latency_ms = 1000 * StreamingEncoder(model).latency_s(chunk_ms / 1000)
    text = f"streamed in chunks of {chunk_ms:g} ms: a frame comes at most {latency_ms:.4g} ms after its first sample"
    if not times_s:
        return text
    median_ms, late_ms = 1000 * np.quantile(times_s, [0.5, 0.95])
    factor = 1000 * np.mean(times_s) / chunk_ms
    took = f"a chunk took {median_ms:.3g} ms (p95 {late_ms:.3g} ms), real-time factor {factor:.3g}"
    return f"{text}, and the time to compute: {took}"
