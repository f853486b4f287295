"""``sslim cluster``: k-means targets from features or from a layer of a model, with their quality."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table

    from sslim.data.labels import LabelStore
    from sslim.models import SpeechModel

DEFAULT_CLUSTERS = 100


@dataclass(frozen=True, kw_only=True)
class Options:
    """Give every frame of a corpus a cluster: k-means on its features, or on a layer of a model.

    Repeating the command continues a run that was interrupted. Examples:
    `sslim cluster corpora/words --clusters 100`,
    `sslim cluster corpora/words --model runs/first/model --layer 8 --clusters 500`,
    `sslim cluster corpora/dev --codebook corpora/words/labels/kmeans100`.
    """

    corpus: tyro.conf.Positional[Path]
    """Folder that `sslim prepare` wrote."""
    model: Path | None = None
    """Model folder, run folder or checkpoint whose layer is clustered; without it the corpus's features are."""
    layer: int | None = None
    """Layer of the model, from 1; 0 is what enters the first block. Stage 2 of MelHuBERT takes layer 8 of 12."""
    mfcc: bool = False
    """Cluster MFCC made from the corpus's filterbank features, as HuBERT's first iteration does, not the features."""
    num_clusters: Annotated[int | None, tyro.conf.arg(aliases=["--clusters"])] = None
    """How many; 100 when not given."""
    name: str | None = None
    """Of the labels; like kmeans100 or layer8-kmeans100 when not given."""
    frame_period_ms: float | None = None
    """Milliseconds from one label to the next; the features' or the model's own when not given."""
    codebook: Path | None = None
    """Label folder whose codebook is applied instead of making one, for example to a development set."""
    seed: int = 0
    """Decides the sample and the start."""
    max_sample_frames: int = 500_000
    """Frames that k-means sees, drawn at random; every frame gets a label."""
    epochs: int = 10
    """Passes of k-means over those frames at most; it stops when they no longer help."""
    statistics: str | None = None
    """Mean and standard deviation for models without: libri-100, libri-360, libri-960, a .npy or a .safetensors file."""
    overwrite: bool = False
    """Replace labels of that name."""
    device: str = "cpu"
    """Where the model and the distances are computed: cpu, cuda, cuda:1."""


def main(options: Options) -> None:
    """Clusters, and prints how good the labels are."""
    from rich.console import Console

    from sslim.data.corpus import Corpus
    from sslim.data.labels import LabelStore
    from sslim.targets import KMeansConfig, apply_codebook, cluster_corpus, make_vectors
    from sslim.targets.clustering import label_folder

    console = Console(stderr=True, highlight=False)
    corpus = Corpus.open(options.corpus)
    if corpus.num_quarantined:
        console.print(f"{corpus.num_quarantined} unreadable files were left out when {corpus.name} was prepared")
    source = None if options.codebook is None else LabelStore.open(options.codebook)
    num_clusters = _num_clusters(options, source)
    kmeans = KMeansConfig(num_clusters=num_clusters, seed=options.seed, max_epochs=options.epochs)
    name = options.name or default_name(options, num_clusters)
    label_folder(corpus, name, overwrite=options.overwrite)  # found out before a model is loaded
    period_s = None if options.frame_period_ms is None else options.frame_period_ms / 1000
    vectors = make_vectors(corpus, _model(options), options.layer, mfcc=options.mfcc, frame_period_s=period_s, codebook=source)
    common: dict[str, Any] = {"notes": _notes(options), "overwrite": options.overwrite, "device": options.device}
    with _Progress(console) as progress:
        common["on_progress"] = progress.update
        if source is None:
            labels = cluster_corpus(corpus, name, vectors, kmeans, max_sample_frames=options.max_sample_frames, **common)
        else:
            labels = apply_codebook(corpus, name, vectors, source, **common)
    console = Console(highlight=False)
    console.print(_quality_table(labels))
    console.print(
        f"labels: {labels.folder}   next: sslim doctor {options.corpus} --labels {name}, "
        f"then sslim pretrain RECIPE {options.corpus} --labels {name} --output RUN",
        soft_wrap=True,
    )


def default_name(options: Options, num_clusters: int) -> str:
    """Returns the name of labels that got none: ``kmeans100``, ``mfcc-kmeans100``, ``layer8-kmeans100``."""
    what = "mfcc-" if options.mfcc else "" if options.layer is None else f"layer{options.layer}-"
    return f"{what}kmeans{num_clusters}"


def _num_clusters(options: Options, source: LabelStore | None) -> int:
    if source is None:
        return DEFAULT_CLUSTERS if options.num_clusters is None else options.num_clusters
    if options.num_clusters not in (None, source.num_clusters):
        raise ValueError(f"--num-clusters is {options.num_clusters}, the codebook {options.codebook} has {source.num_clusters}")
    return source.num_clusters


def _model(options: Options) -> SpeechModel | None:
    if options.model is None:
        return None
    if options.mfcc:
        raise ValueError("--mfcc clusters features and --model a layer: choose one")
    if options.layer is None:
        raise ValueError("--model needs --layer: which of its layers to cluster (MelHuBERT's stage 2 takes layer 8 of 12)")
    from sslim.checkpoints import load_model
    from sslim.checkpoints.model_files import model_path
    from sslim.profiling.latency import check_device

    check_device(options.device)
    return load_model(model_path(options.model), statistics=options.statistics).to(options.device)


def _notes(options: Options) -> dict[str, str]:
    if options.model is None:
        return {}
    path = options.model
    return {"model": path.name if path.name != "model" else path.resolve().parent.name}  # a run's final model is in RUN/model


class _Progress:
    """A bar for each stage on a terminal, a line for each elsewhere."""

    ABOUT: ClassVar = {"sample": "reading a sample of frames", "fit": "k-means", "label": "labelling every frame"}

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Told how far a stage is."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(self.ABOUT[stage], total=total)
            if not self._console.is_terminal:
                continued = f", continuing after {done} of {total} batches" if done else ""
                self._console.print(f"{self.ABOUT[stage]}{continued}")
        self._bar.update(self._tasks[stage], completed=done, total=total)


def _quality_table(labels: LabelStore) -> Table:
    from rich.table import Table

    quality = labels.quality
    rows = [
        ("labels", f"{labels.num_labels:,} of {1000 * labels.frame_period_s:g} ms"),
        ("occupied clusters", f"{quality['occupied_clusters']} of {labels.num_clusters}"),
        ("perplexity of their usage", f"{quality['perplexity']:.1f}"),
        ("mean run", f"{1000 * quality['mean_run_s']:.0f} ms"),
    ]
    if "inertia_per_frame" in quality:
        rows.append(("inertia per frame", f"{quality['inertia_per_frame']:.5g}"))
    if "pnmi" in quality:
        rows += [
            (f"phone purity ({quality['num_phones']} phones)", f"{quality['phone_purity']:.3f}"),
            ("cluster purity", f"{quality['cluster_purity']:.3f}"),
            ("PNMI", f"{quality['pnmi']:.3f}"),
        ]
    table = Table(show_header=False, box=None, title=f"labels {labels.name}", title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table
