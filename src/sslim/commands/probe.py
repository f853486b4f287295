"""``sslim probe``: frozen evaluation of a model's layers beside log-Mel and random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    from sslim.probes import NamedModel


@dataclass(frozen=True, kw_only=True)
class Options:
    """Classify utterances or frames from a model's frozen layers, with every choice made on dev, and write a result card.

    Example: sslim probe label runs/small/model --corpus corpora/digits --folds speaker --output card.json
    """

    task: tyro.conf.Positional[Literal["label", "speaker", "phones"]]
    """What to classify: a column of the manifest, by utterance, or the phones of its alignments, by frame."""
    models: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Model folders, run folders or checkpoints; without any, only the log-Mel baseline is probed."""
    corpus: Path
    """Folder that `sslim prepare` wrote."""
    output: Path | None = None
    """Where to write the result card (JSON)."""
    column: str | None = None
    """Another column of the manifest as the classes of utterances: speaker, label, text or split."""
    layer: str = "mix"
    """mix: learned weights over all layers; all: a row for each layer; or a number, 0 being what enters the first block."""
    pooling: Literal["mean", "mean-std"] = "mean-std"
    """How an utterance's frames become one vector."""
    classifier: Literal["linear", "mlp"] = "linear"
    """mlp has one hidden layer."""
    hidden_dim: int = 256
    """Width of the mlp's hidden layer."""
    split: Literal["auto", "manifest", "random"] = "auto"
    """Where train, dev and test come from; auto takes the manifest's where they fit the task."""
    folds: Literal["speaker"] | None = None
    """speaker: leave each speaker out in turn, so that test speakers are unseen."""
    num_folds: int = 10
    """With --folds: at most so many; more speakers than that are left out in groups."""
    speaker_disjoint: bool = False
    """With a random split: keep each speaker in one part."""
    seeds: int = 3
    """How many seeds (0, 1, ...) of initial weights, batches and random-weights models."""
    baselines: bool = True
    """Whether to probe log-Mel features and random weights too."""
    shuffle_labels: bool = False
    """A control: shuffle the classes, so that anything above chance is a mistake."""
    max_frames: int = 100_000
    """For frame tasks: frames to keep (whole utterances drawn by the split's seed); 0 keeps all."""
    statistics: str | None = None
    """Mean and standard deviation for models without: libri-100, libri-360, libri-960, a .npy or a .safetensors file."""
    device: str = "cpu"
    """Where models run: cpu, cuda, cuda:1."""
    bf16: bool = False
    """Run models under bf16 autocast."""
    batch_seconds: float = 60.0
    """Seconds of padded audio in a batch of a model."""


def main(options: Options) -> None:
    """Probes and prints the table; writes the card where ``output`` says."""
    from rich.console import Console

    from sslim.data.corpus import Corpus
    from sslim.probes import ProbeConfig, SplitConfig, card_table, probe, write_card

    console = Console(stderr=True, highlight=False)
    config = ProbeConfig(
        task=options.task,
        column=options.column,
        pooling=options.pooling,
        layer=options.layer,
        hidden_dim=options.hidden_dim if options.classifier == "mlp" else None,
        split=SplitConfig(
            source=options.split, folds=options.folds, num_folds=options.num_folds, speaker_disjoint=options.speaker_disjoint
        ),
        num_seeds=options.seeds,
        max_frames=options.max_frames or None,
        shuffle_labels=options.shuffle_labels,
        baselines=options.baselines,
        batch_s=options.batch_seconds,
        bf16=options.bf16,
    )
    corpus = Corpus.open(options.corpus)
    if corpus.num_quarantined:
        console.print(f"{corpus.num_quarantined} unreadable files were left out when {corpus.name} was prepared")
    models = [_named(path, options) for path in options.models]
    card = probe(corpus, models, config, tell=console.print)
    Console().print(card_table(card))
    if options.output is not None:
        write_card(card, options.output)
        console.print(f"result card: {options.output}")


def _named(path: Path, options: Options) -> NamedModel:
    from sslim.checkpoints import load_model
    from sslim.checkpoints.model_files import model_name, model_path, tensors_digest
    from sslim.probes import NamedModel

    place = model_path(path)
    model = load_model(place, statistics=options.statistics).to(options.device)
    return NamedModel(name=model_name(place), model=model, path=str(place), digest=tensors_digest(place))
