"""Pre-training: the place where corpus, targets, model, objective and trainer meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sslim import __version__
from sslim.checkpoints import load_model, save_model
from sslim.config import from_plain, nearest, read_json, to_plain
from sslim.data.batching import CorpusBatches
from sslim.data.corpus import Corpus
from sslim.data.doctor import examine
from sslim.data.labels import LabelStore
from sslim.frontends import SpectralFrontendConfig
from sslim.models import ModelConfig, SpeechModel, build_model, with_head
from sslim.nn.heads import ClusterHeadConfig, CodewordHeadConfig
from sslim.objectives import MaskedPrediction, MaskedPredictionConfig
from sslim.recipes.corpus_batches import DataConfig, frame_facts, make_batches, split_utterances
from sslim.training import SENTINELS, Trainer, TrainerConfig, TrainingResult, join_processes

HEAD = "masked_prediction"
MASK = "mask"
CHECK_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class TargetsConfig:
    """What is clustered before an iteration of pre-training.

    Attributes:
        num_clusters: K.
        layer: Layer of the model of the iteration before, from 1; None for MFCC made from the corpus's log filterbank features.
        steps: Updates of the iteration that is trained on them; None for the recipe's own length.
    """

    num_clusters: int = 100
    layer: int | None = None
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe:
    """Everything that decides a pre-training run, apart from its data.

    Attributes:
        name: Short name.
        about: Paper, hardware, time and expected number.
        model: Architecture; the number of clusters follows the labels.
        objective: What is learnt.
        training: Optimiser, schedule, length.
        data: Batches.
        targets: What to cluster before each iteration, where several are asked for.
    """

    name: str
    about: str
    model: ModelConfig
    objective: MaskedPredictionConfig
    training: TrainerConfig
    data: DataConfig = DataConfig()
    targets: tuple[TargetsConfig, ...] = ()


def check_labels(corpus: Corpus, labels: LabelStore, model: SpeechModel) -> list[str]:
    """Looks at a sample for half a second; returns notes, raises ValueError on what would waste the run."""
    assert model.frontend is not None
    facts = frame_facts(corpus, model)
    problems = examine(
        corpus,
        labels,
        frame_period_s=facts.frame_period_s,
        stack=facts.hop,
        waveform_frames=facts.num_frames if facts.is_waveform else None,
        max_seconds=CHECK_SECONDS,
    )
    fatal = [problem.sentence for problem in problems if problem.fatal]
    if fatal:
        raise ValueError(f"{fatal[0]} (`sslim doctor` lists all {len(fatal)} problems found)" if len(fatal) > 1 else fatal[0])
    notes = [problem.sentence for problem in problems]
    if facts.is_waveform and isinstance(model.config.frontend, SpectralFrontendConfig):
        notes.append(f"the features of corpus {corpus.name} are not the model's: they are computed from its waveforms")
    return notes


def without_statistics(config: ModelConfig) -> ModelConfig:
    """A recipe read from a run names the statistics of that run's corpus, but does not hold them."""
    frontend = config.frontend
    if not isinstance(frontend, SpectralFrontendConfig):
        return config
    return replace(config, frontend=replace(frontend, normalization=replace(frontend.normalization, statistics=None)))


def initial_model(
    recipe: PretrainRecipe,
    corpus: Corpus,
    labels: LabelStore,
    *,
    init_from: Path | None,
    start: SpeechModel | None = None,
    keep_head: bool,
) -> SpeechModel:
    """Builds the recipe's model, or loads one to go on from, unless one is given to start with.

    A loaded model's head is drawn anew, as large as the new labels need, unless ``keep_head``: cluster ids of
    another codebook mean nothing to the old one. Statistics come from the loaded model, else from the corpus.

    Raises:
        ValueError: The kept head is for another number of clusters; features do not fit; statistics are missing.
    """
    generator = torch.Generator().manual_seed(recipe.training.seed)
    head = replace(_prediction_head(recipe.model, f"recipe {recipe.name}"), num_clusters=labels.num_clusters)
    if init_from is None and start is None:
        model = build_model(without_statistics(replace(recipe.model, heads={**recipe.model.heads, HEAD: head})), generator)
    else:
        loaded = start if init_from is None else load_model(init_from)
        assert loaded is not None
        model = loaded
        old = model.config.heads.get(HEAD)
        if keep_head:
            found = "no head" if old is None else f"a head for {getattr(old, 'num_clusters', 'no')} clusters"
            if getattr(old, "num_clusters", None) != labels.num_clusters:
                owner = init_from or "the model"
                raise ValueError(f"{owner} has {found}, the labels have {labels.num_clusters}: leave out --keep-head")
        else:
            model = with_head(model, HEAD, head, generator, replace_existing=True)
        if MASK in recipe.model.heads and MASK not in model.config.heads:
            model = with_head(model, MASK, recipe.model.heads[MASK], generator)
    give_statistics(model, corpus)
    return model


def _prediction_head(config: ModelConfig, owner: str) -> ClusterHeadConfig | CodewordHeadConfig:
    head = config.heads.get(HEAD)
    if not isinstance(head, ClusterHeadConfig | CodewordHeadConfig):
        raise ValueError(f"{owner} has no head {HEAD!r} of kind 'clusters' or 'codewords'")
    return head


def give_statistics(model: SpeechModel, corpus: Corpus) -> None:
    """Gives a front-end that has none the mean and standard deviation of the corpus, where these are of its own features."""
    facts, frontend = frame_facts(corpus, model), model.frontend
    assert frontend is not None
    normalization = getattr(frontend.config, "normalization", None)
    if normalization is None or normalization.kind != "global" or frontend.statistics_source is not None:
        return
    if corpus.statistics is None or facts.is_waveform:
        reason = "" if corpus.statistics is None else " of the model's features"
        raise ValueError(
            f"corpus {corpus.name} has no mean and standard deviation{reason}; prepare it again with these features"
        )
    mean, std, source = corpus.statistics
    model.set_statistics(torch.as_tensor(mean), torch.as_tensor(std), source=source)


def _resolved(
    recipe: PretrainRecipe, corpus: Corpus, labels: LabelStore, model: SpeechModel, init_from: Path | None
) -> dict[str, Any]:
    return {
        "format_version": 1,
        "kind": "pretrain",
        "sslim": __version__,
        "recipe": to_plain(replace(recipe, model=model.config)),
        "corpus": {
            "name": corpus.name,
            "folder": str(corpus.path),
            "digest": corpus.digest,
            "num_utterances": len(corpus),
            "hours": round(corpus.duration_s() / 3600, 4),
            "num_quarantined": corpus.num_quarantined,
        },
        "labels": {
            "name": labels.name,
            "num_clusters": labels.num_clusters,
            "origin": labels.origin,
            "quality": labels.quality,
        },
        "init_from": None if init_from is None else str(init_from),
        "num_parameters": model.num_parameters(),
    }


# What may differ between a run and its resumption without making it another run, beside the trainer's own list.
MAY_CHANGE = ("sslim", "corpus.folder", "init_from", "recipe.about")


def pretrain(
    recipe: PretrainRecipe,
    corpus_folder: Path,
    labels_name: str | None,
    output: Path,
    *,
    init_from: Path | None = None,
    init_optimizer: bool = False,
    keep_head: bool = False,
    start: SpeechModel | None = None,
    wrap: Callable[[nn.Module], nn.Module] = lambda objective: objective,
    write: Callable[[SpeechModel, Path], None] = save_model,
    say: Callable[[str], None] = print,
) -> TrainingResult:
    """Trains, or goes on with what ``output`` holds; the trained model is then in ``output/model``.

    Args:
        recipe: What to train.
        corpus_folder: A prepared corpus.
        labels_name: Label set of the corpus; None when it has just one.
        output: Run folder: ``run.json``, ``metrics.jsonl``, ``checkpoints/``, and at the end ``model/``.
        init_from: Model to start from: any that ``load_model`` reads, or a run folder.
        init_optimizer: Take over the optimiser state too (``init_from`` must then be a run folder of sslim); its learning
            rate and betas stay those of the recipe.
        keep_head: Keep the head of ``init_from``.
        start: Model to start from in place of ``init_from``; it is trained in place.
        wrap: Makes another objective of masked prediction, for example one that keeps pruned weights at zero.
        write: Writes the model to the folder ``model`` of every checkpoint, and at the end of the run.
        say: Where notes for the user go.

    Raises:
        ValueError: Anything about data, labels, model or settings that cannot work.
    """
    with join_processes(recipe.training.device) as processes:
        say = say if processes.is_main else (lambda _: None)
        corpus = Corpus.open(corpus_folder)
        labels = corpus.labels(label_set(corpus, labels_name))
        model = initial_model(recipe, corpus, labels, init_from=model_folder(init_from), start=start, keep_head=keep_head)
        for note in check_labels(corpus, labels, model):
            say(f"note: {note}")
        batches, validation = _plan(recipe, corpus, labels, model, say)
        description = _resolved(recipe, corpus, labels, model, init_from)
        model.provenance.append(_origin(recipe, corpus, labels))
        return Trainer(
            wrap(MaskedPrediction(model.train(), recipe.objective)),
            batches,
            recipe.training,
            output,
            save_model=lambda folder: write(model, folder),
            validation=validation,
            description=description,
            may_change=MAY_CHANGE,
            sentinels=SENTINELS["masked_prediction"](labels.num_clusters),
            init_optimizer_from=init_from if init_optimizer else None,
            processes=processes,
        ).run()


def _origin(recipe: PretrainRecipe, corpus: Corpus, labels: LabelStore) -> dict[str, Any]:
    """What the model's provenance tells of this run."""
    seed = recipe.training.seed
    return {"step": "pretrain", "recipe": recipe.name, "corpus": corpus.name, "labels": labels.origin, "seed": seed}


def _plan(
    recipe: PretrainRecipe, corpus: Corpus, labels: LabelStore, model: SpeechModel, say: Callable[[str], None]
) -> tuple[CorpusBatches, CorpusBatches | None]:
    """Micro-batches to train on, and to validate on where there are utterances for that; says how many for which model."""
    seed = recipe.training.seed
    train, valid = split_utterances(corpus, recipe.data, seed)
    batches = make_batches(corpus, labels, train, model, recipe.data, seed, shuffle=True)
    validation = make_batches(corpus, labels, valid, model, recipe.data, seed, shuffle=False) if len(valid) else None
    say(
        f"{recipe.name}: {model.num_parameters():,} parameters, {len(train):,} utterances to train on, {len(valid):,} to "
        f"validate on, {corpus.num_quarantined} quarantined"
    )
    return batches, validation


def label_set(corpus: Corpus, name: str | None) -> str:
    """Returns the label set to use: the one named, or the only one.

    Raises:
        ValueError: No such set, or several and none is named.
    """
    names = corpus.label_names()
    if name is None and len(names) == 1:
        return names[0]
    if name is None:
        found = (
            f"has the label sets {names}: choose one with --labels"
            if names
            else "has no labels: make some with `sslim cluster`"
        )
        raise ValueError(f"corpus {corpus.name} {found}")
    if name not in names:
        raise ValueError(f"corpus {corpus.name} has no label set {name!r}{nearest(name, names)} (it has {names or 'none'})")
    return name


def model_folder(path: Path | None) -> Path | None:
    """A run folder stands for the model it holds."""
    if path is not None and (path / "run.json").exists():
        if not (path / "model").exists():
            raise ValueError(f"the run in {path} is not finished: it has no model/ folder yet")
        return path / "model"
    return path


def read_recipe(path: Path) -> PretrainRecipe:
    """Reads a recipe from a JSON file: one of its own, or the ``run.json`` of a run.

    Raises:
        ConfigError: Not JSON, or not a recipe.
    """
    values = read_json(path)
    values = values.get("recipe", values) if isinstance(values, dict) else values
    return from_plain(PretrainRecipe, values, path.name)
