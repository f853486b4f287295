"""Pre-training: the place where corpus, targets, model, objective and trainer meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sslim import __version__
from sslim.checkpoints import load_model, save_model
from sslim.checkpoints.model_files import model_path
from sslim.config import from_plain, nearest, read_json, to_plain
from sslim.data.batching import CorpusBatches
from sslim.data.corpus import Corpus
from sslim.data.doctor import examine
from sslim.data.labels import LabelStore
from sslim.frontends import SpectralFrontendConfig
from sslim.models import ModelConfig, SpeechModel, build_model, with_head
from sslim.models.causality import future_seen
from sslim.models.encoding import give_features
from sslim.nn.heads import HeadConfig
from sslim.recipes.corpus_batches import DataConfig, frame_facts, make_batches, split_utterances
from sslim.recipes.pretrain_tasks import TASKS, HeadRequest, PretrainObjective, PretrainTask
from sslim.training import Trainer, TrainerConfig, TrainingResult, join_processes

HEAD = "masked_prediction"
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
        model: Architecture; the objective's head follows the labels or the features that it is for.
        objective: What is learnt, see ``sslim.recipes.pretrain_tasks``.
        training: Optimiser, schedule, length.
        data: Batches.
        targets: What to cluster before each iteration, where several are asked for.
    """

    name: str
    about: str
    model: ModelConfig
    objective: PretrainObjective
    training: TrainerConfig
    data: DataConfig = DataConfig()
    targets: tuple[TargetsConfig, ...] = ()

    @property
    def task(self) -> PretrainTask:
        """What pre-training must know of the objective."""
        return TASKS[self.objective.kind]


def check_data(corpus: Corpus, labels: LabelStore | None, model: SpeechModel, *, waveforms: bool = False) -> list[str]:
    """Looks at a sample for half a second; returns notes, raises ValueError on what would waste the run."""
    facts = frame_facts(corpus, model, waveforms=waveforms)
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
    if facts.is_waveform and isinstance(model.config.frontend, SpectralFrontendConfig) and not waveforms:
        notes.append(f"the features of corpus {corpus.name} are not the model's: they are computed from its waveforms")
    if model.config.encoder.causal and (reason := future_seen(model.config)) is not None:
        notes.append(f"the model cannot be streamed, though its encoder is causal: {reason}")
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
    labels: LabelStore | None,
    *,
    init_from: Path | None,
    start: SpeechModel | None = None,
    keep_head: bool,
) -> SpeechModel:
    """Builds the recipe's model, or loads one to go on from, unless one is given to start with.

    A loaded model's head goes on where it is of the right description and the objective's heads mean the same everywhere. A
    head over clusters is drawn anew, as large as the new labels need, unless ``keep_head``: cluster ids of another codebook
    mean nothing to the old one. Statistics come from the loaded model, else from the corpus.

    Raises:
        ValueError: The head to keep is for something else; features do not fit; statistics are missing.
    """
    generator, task = torch.Generator().manual_seed(recipe.training.seed), recipe.task

    def head_for(config: ModelConfig) -> HeadConfig:
        return task.describe_head(
            HeadRequest(
                model=config,
                recipe_head=recipe.model.heads.get(task.head),
                objective=recipe.objective,
                labels=labels,
                owner=f"recipe {recipe.name}",
            )
        )

    if init_from is None and start is None:
        config = replace(recipe.model, heads={**recipe.model.heads, task.head: head_for(recipe.model)})
        model = build_model(without_statistics(config), generator)
    else:
        loaded = start if init_from is None else load_model(init_from)
        assert loaded is not None
        model, head = loaded, head_for(loaded.config)
        if keep_head:
            _check_kept_head(model.config.heads.get(task.head), head, str(init_from or "the model"))
        else:
            model = with_head(model, task.head, head, generator, replace_existing=not task.keeps_head)
        for name in task.more_heads:
            if name in recipe.model.heads and name not in model.config.heads:
                model = with_head(model, name, recipe.model.heads[name], generator)
    give_statistics(model, corpus)
    return model


def _check_kept_head(old: HeadConfig | None, needed: HeadConfig, owner: str) -> None:
    """Raises ValueError unless a head is for as many clusters, or features, as are needed."""
    size, what = next((n, w) for n, w in (("num_clusters", "clusters"), ("output_dim", "features")) if hasattr(needed, n))
    found, wanted = getattr(old, size, None), getattr(needed, size)
    if found == wanted:
        return
    has = "no head" if old is None else f"a head for {'no' if found is None else found} {what}"
    source = "labels" if what == "clusters" else "targets"
    raise ValueError(f"{owner} has {has}, the {source} have {wanted}: leave out --keep-head")


def give_statistics(model: SpeechModel, corpus: Corpus) -> None:
    """Gives a front-end that has none the mean and standard deviation of the corpus, where these are of its own features.

    A model without a front-end gets the corpus's first.
    """
    give_features(model, corpus)
    frontend = model.frontend
    assert frontend is not None
    if frontend.statistics_source is not None:
        return
    normalization = getattr(frontend.config, "normalization", None)
    if normalization is None or normalization.kind != "global":
        return
    facts = frame_facts(corpus, model)
    if corpus.statistics is None or facts.is_waveform:
        reason = "" if corpus.statistics is None else " of the model's features"
        raise ValueError(
            f"corpus {corpus.name} has no mean and standard deviation{reason}; prepare it again with these features"
        )
    mean, std, source = corpus.statistics
    model.set_statistics(torch.as_tensor(mean), torch.as_tensor(std), source=source)


def _resolved(
    recipe: PretrainRecipe, corpus: Corpus, labels: LabelStore | None, model: SpeechModel, init_from: Path | None
) -> dict[str, Any]:
    told = labels and {
        "name": labels.name,
        "num_clusters": labels.num_clusters,
        "origin": labels.origin,
        "quality": labels.quality,
    }
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
        **({"labels": told} if told else {}),
        "init_from": None if init_from is None else str(init_from),
        "num_parameters": model.num_parameters(),
    }


# What may differ between a run and its resumption without making it another run, beside the trainer's own list.
PRUNING = "pruning"  # runs of weight pruning that began before it was noted have none
MAY_CHANGE = ("sslim", "corpus.folder", "init_from", "recipe.about", PRUNING)


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
    pruning: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> TrainingResult:
    """Trains, or goes on with what ``output`` holds; the trained model is then in ``output/model``.

    Args:
        recipe: What to train.
        corpus_folder: A prepared corpus.
        labels_name: Label set of the corpus, for objectives that need one; None when it has just one.
        output: Run folder: ``run.json``, ``metrics.jsonl``, ``checkpoints/``, and at the end ``model/``.
        init_from: Model to start from: any that ``load_model`` reads, or a run folder.
        init_optimizer: Take over the optimiser state too (``init_from`` must then be a run folder of sslim); its learning
            rate and betas stay those of the recipe.
        keep_head: Keep the head of ``init_from``.
        start: Model to start from in place of ``init_from``; it is trained in place.
        wrap: Makes another objective of the recipe's, for example one that keeps pruned weights at zero.
        write: Writes the model to the folder ``model`` of every checkpoint, and at the end of the run.
        pruning: What ``wrap`` prunes, and when, as plain JSON values for ``run.json``; None where it prunes nothing.
        say: Where notes for the user go.

    Raises:
        ValueError: Anything about data, labels, model or settings that cannot work.
    """
    with join_processes(recipe.training.device) as processes:
        say = say if processes.is_main else (lambda _: None)
        corpus = Corpus.open(corpus_folder)
        labels = _labels(recipe, corpus, labels_name)
        initial = None if init_from is None else model_path(init_from)
        model = initial_model(recipe, corpus, labels, init_from=initial, start=start, keep_head=keep_head)
        objective = recipe.task.build(model.train(), recipe.objective)
        batches, validation = _plan(recipe, corpus, labels, model, say)
        description = _resolved(recipe, corpus, labels, model, init_from)
        description |= {} if pruning is None else {PRUNING: dict(pruning)}
        model.provenance.append(_origin(recipe, corpus, labels))
        return Trainer(
            wrap(objective),
            batches,
            recipe.training,
            output,
            save_model=lambda folder: write(model, folder),
            validation=validation,
            description=description,
            may_change=MAY_CHANGE,
            sentinels=recipe.task.sentinels(model.config.heads[recipe.task.head]),
            init_optimizer_from=init_from if init_optimizer else None,
            processes=processes,
        ).run()


def _labels(recipe: PretrainRecipe, corpus: Corpus, name: str | None) -> LabelStore | None:
    """The targets; None for an objective without.

    Raises:
        ValueError: A label set is named for nothing, or the one that is needed is not there.
    """
    if recipe.task.needs_labels:
        return corpus.labels(label_set(corpus, name))
    if name is not None:
        raise ValueError(f"labels {name!r} are named, but recipe {recipe.name} learns without labels: leave out --labels")
    return None


def _origin(recipe: PretrainRecipe, corpus: Corpus, labels: LabelStore | None) -> dict[str, Any]:
    """What the model's provenance tells of this run."""
    told = {} if labels is None else {"labels": labels.origin}
    return {"step": "pretrain", "recipe": recipe.name, "corpus": corpus.name, **told, "seed": recipe.training.seed}


def _plan(
    recipe: PretrainRecipe, corpus: Corpus, labels: LabelStore | None, model: SpeechModel, say: Callable[[str], None]
) -> tuple[CorpusBatches, CorpusBatches | None]:
    """Checks the data; returns micro-batches to train on, and to validate on where there are utterances for that."""
    waveforms = recipe.task.needs_waveforms(model.config, recipe.objective) or recipe.data.noise is not None
    seed = recipe.training.seed
    if recipe.model.frontend is None and model.frontend is not None:
        say(f"note: recipe {recipe.name} names no features: the model takes those of corpus {corpus.name}")
    for note in check_data(corpus, labels, model, waveforms=waveforms):
        say(f"note: {note}")
    train, valid = split_utterances(corpus, recipe.data, seed)
    settings: dict[str, Any] = {"facts": frame_facts(corpus, model, waveforms=waveforms)}
    batches = make_batches(corpus, labels, train, model, recipe.data, seed, shuffle=True, **settings)
    validation = None
    if len(valid):
        validation = make_batches(corpus, labels, valid, model, recipe.data, seed, shuffle=False, **settings)
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


def read_recipe(path: Path) -> PretrainRecipe:
    """Reads a recipe from a JSON file: one of its own, or the ``run.json`` of a run.

    Raises:
        ConfigError: Not JSON, or not a recipe.
    """
    values = read_json(path)
    values = values.get("recipe", values) if isinstance(values, dict) else values
    return from_plain(PretrainRecipe, values, path.name)
