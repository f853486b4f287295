"""The probe itself: representations, a task and a protocol in; rows of a table out.

Features are computed once for each representation (random weights: once for each seed). All rows and seeds see the same
utterances in the same parts. Test examples are scored once, after everything was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sslim.config import OMIT_DEFAULT
from sslim.data.corpus import Corpus
from sslim.models.encoding import DEFAULT_BATCH_S
from sslim.models.speech import SpeechModel
from sslim.probes.adapter import ForwardAdapter
from sslim.probes.baselines import log_mel_representation, named_representation
from sslim.probes.classifiers import ClassifierConfig, Examples, score
from sslim.probes.features import (
    POOLINGS,
    Representation,
    choose_utterances,
    frame_features,
    model_representation,
    pooled_features,
    randomised,
)
from sslim.probes.fine_tuning import FineTuned, FineTuningConfig, fine_tune, model_targets
from sslim.probes.layers import ALL, MIX, check_layer, row_layers, with_layers
from sslim.probes.protocol import Groups, Parts, SplitConfig, divide
from sslim.probes.published import PublishedConfig, fit_published, published_task
from sslim.probes.result_card import build_card, build_row
from sslim.probes.selection import Fitted, check_parts, fit, fit_leaving_out
from sslim.probes.tasks import Task, load_task

# Frames are many and one pass over them is long: larger batches, higher rates (the average of an epoch takes out their noise).
FRAME_CLASSIFIER = ClassifierConfig(batch_size=512, learning_rates=(2e-2, 5e-3), max_epochs=30, patience=3)
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What is asked and how; it is stored in the result card.

    Attributes:
        task: A name in ``sslim.probes.tasks.TASKS``.
        column: Manifest column instead of the task's own.
        pooling: For utterance tasks: ``mean`` or ``mean-std`` over valid frames.
        layer: ``mix`` for a learned mix of all layers, ``all`` for a row of each layer, ``last``, ``mean`` for the plain mean
            of what the blocks give, or one layer's number.
        hidden_dim: Width of a hidden layer; None for a linear classifier.
        context: For frame tasks: frames on either side of each that the classifier sees too; 4 in ``phone_concat`` of S3PRL.
        split: How utterances are divided.
        num_seeds: Seeds 0, 1, ... of initial weights, batches and of random-weights models.
        max_frames: For frame tasks: at most so many frames, whole utterances drawn by the split's seed; None for all.
        shuffle_labels: A control: classes are shuffled over all examples, so that only chance is left.
        baselines: Whether log-Mel features and random weights are rows too.
        baseline_features: Names of features that are rows too, as ``sslim prepare --features`` takes them.
        fine_tuning: How models are trained with the classifier; None leaves them as they are.
        published: S3PRL v0.1's protocol in place of ours (``sslim.probes.published``); None for ours.
        published_labels: Whose clock that protocol's phone labels have.
        batch_s: Seconds of padded audio in a batch of the model.
        bf16: Whether the model runs under bf16 autocast.
    """

    task: str
    column: str | None = None
    pooling: Literal["mean", "mean-std"] = "mean-std"
    layer: str = MIX
    hidden_dim: int | None = None
    context: int = field(default=0, metadata={OMIT_DEFAULT: True})
    split: SplitConfig = field(default_factory=SplitConfig)
    num_seeds: int = 3
    max_frames: int | None = 100_000
    shuffle_labels: bool = False
    baselines: bool = True
    baseline_features: tuple[str, ...] = field(default=(), metadata={OMIT_DEFAULT: True})
    fine_tuning: FineTuningConfig | None = field(default=None, metadata={OMIT_DEFAULT: True})
    published: PublishedConfig | None = field(default=None, metadata={OMIT_DEFAULT: True})
    published_labels: Literal["cpc", "montreal"] = field(default="cpc", metadata={OMIT_DEFAULT: True})
    batch_s: float = DEFAULT_BATCH_S
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise ValueError(f"{self.num_seeds} seeds were asked for; at least 1 is needed")
        if self.pooling not in POOLINGS:
            raise ValueError(f"there is no pooling {self.pooling!r}; accepted are {', '.join(POOLINGS)}")
        check_layer(self.layer)
        if not 0 < self.batch_s < float("inf"):
            raise ValueError(f"a batch of {self.batch_s:g} seconds cannot be made; expected above 0 and finite")
        if self.max_frames is not None and self.max_frames < 1:
            raise ValueError(f"max_frames is {self.max_frames}; expected at least 1, or None for all")
        if self.context < 0 or (self.context and self.hidden_dim is not None):
            raise ValueError(f"context {self.context} must be at least 0, and is for a linear classifier")
        if self.published is not None and self.fine_tuning is not None:
            raise ValueError(
                "S3PRL v0.1 fine-tuned models at the classifier's learning rate of 4e-3, which is not reproduced: "
                "fine-tune without its protocol"
            )
        if self.published is not None and self.layer == MIX:
            raise ValueError("S3PRL v0.1 never trained its weighted sum: layer 'mean' is what it came to")
        if self.fine_tuning is not None and self.layer == ALL:
            raise ValueError("layer 'all' needs frozen features; fine-tune with 'mix', 'last', 'mean' or one layer's number")
        if (self.published or self.fine_tuning) and self.split.folds is not None:
            what = "S3PRL v0.1's protocol" if self.published else "fine-tuning"
            raise ValueError(f"{what} needs a train, a dev and a test part, and folds by {self.split.folds} were asked for")


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model to probe.

    Attributes:
        name: For the table.
        model: In eval mode.
        path: Where it was read.
        digest: SHA-256 of its file, to tell it from another.
    """

    name: str
    model: SpeechModel
    path: str = ""
    digest: str = ""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row (or, layer by layer, several rows) to be: how to get its representation for each seed.

    Attributes:
        name: For the table.
        source: The model, its path and digest; None for baselines and adapters.
        represent: Seed to representation.
        by_seed: Whether seeds differ.
        model: Seed to the model, which can be fine-tuned; None where there is none.
    """

    name: str
    source: NamedModel | None
    represent: Callable[[int], Representation]
    by_seed: bool = False
    model: Callable[[int], SpeechModel] | None = None


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Features and classes of all chosen utterances.

    Attributes:
        x_LNP: (L, N, P).
        y_N: (N,) int64.
        offsets: First example of each utterance, and N at the end.
        known_N: (N,) bool, False for frames without a class.
        context: Frames on either side of each that belong to its example.
        num_frames_U: (U,) of each utterance.
    """

    x_LNP: Tensor
    y_N: Tensor
    offsets: np.ndarray
    known_N: np.ndarray
    num_frames_U: np.ndarray
    context: int = 0

    def examples(self, positions: np.ndarray, layers: slice) -> Examples:
        """The examples of the utterances at ``positions``."""
        spans = [np.arange(self.offsets[p], self.offsets[p + 1]) for p in positions]
        rows = np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)
        return Examples(
            x_LNP=self.x_LNP[layers],
            y_N=self.y_N,
            rows=torch.from_numpy(rows[self.known_N[rows]]),
            offsets=torch.from_numpy(self.offsets),
            context=self.context,
            num_frames_U=torch.from_numpy(self.num_frames_U),
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One seed of one row: a test accuracy for each fold and what was chosen for it."""

    seed: int
    test: list[float]
    fitted: list[Fitted]


def entries_of(corpus: Corpus, models: Sequence[NamedModel | ForwardAdapter], config: ProbeConfig, unit: str) -> list[Entry]:
    """Baselines first: log-Mel, named features, then random weights of every distinct description, then the models."""
    options: dict[str, Any] = {"batch_s": config.batch_s, "bf16": config.bf16}
    probed = [_model_entry(corpus, model, config, options) for model in models]
    pooled = unit == "utterance"
    period_s = probed[0].represent(0).frame_shift_s if probed else corpus.base_frame_shift_s
    entries = []
    if config.baselines:
        stack = round(period_s / corpus.base_frame_shift_s) if corpus.base_frame_shift_s else 1
        log_mel = log_mel_representation(corpus, pooled=pooled, stack=max(stack, 1))
        entries.append(Entry(name=log_mel.name, source=None, represent=lambda seed: log_mel))
    for name in config.baseline_features:
        features = named_representation(corpus, name, pooled=pooled, frame_shift_s=period_s)
        entries.append(Entry(name=name, source=None, represent=lambda seed, features=features: features))  # type: ignore[misc]
    if config.baselines:
        entries += _random_entries(corpus, [model for model in models if isinstance(model, NamedModel)], config, options)
    return entries + probed


def _model_entry(corpus: Corpus, model: NamedModel | ForwardAdapter, config: ProbeConfig, options: dict[str, Any]) -> Entry:
    if isinstance(model, ForwardAdapter):
        if config.fine_tuning is not None:
            raise ValueError(
                f"{model.name} cannot be fine-tuned here: sslim trains its own models, and this is a foreign function"
            )
        adapted = model.representation(corpus, config.batch_s)
        return Entry(name=model.name, source=None, represent=lambda seed: adapted)
    representation = model_representation(model.model, corpus, model.name, **options)
    return Entry(name=model.name, source=model, represent=lambda seed: representation, model=lambda seed: model.model)


def _random_entries(corpus: Corpus, models: Sequence[NamedModel], config: ProbeConfig, options: dict[str, Any]) -> list[Entry]:
    descriptions = [replace(named.model.config, heads={}) for named in models]
    distinct = [named for i, named in enumerate(models) if descriptions[i] not in descriptions[:i]]
    entries = []
    for named in distinct:
        name = "random weights" if len(distinct) == 1 else f"random weights ({named.name})"
        redraw = partial(randomised, named.model)

        def represent(seed: int, redraw: Callable[[int], SpeechModel] = redraw, name: str = name) -> Representation:
            return model_representation(redraw(seed), corpus, name, kind="random", **options)

        entries.append(Entry(name=name, source=None, represent=represent, by_seed=True, model=redraw))
    return entries


def store(representation: Representation, corpus: Corpus, task: Task, config: ProbeConfig) -> Stored:
    """Computes the features of the task's utterances and lays their classes beside them."""
    if task.unit == "utterance":
        assert task.classes_N is not None
        x_LNP = pooled_features(representation, corpus, task.indices, config.pooling)
        y_N, offsets = task.classes_N, np.arange(len(task.indices) + 1)
    else:
        assert task.frame_classes is not None
        x_LNP, offsets = frame_features(representation, corpus, task.indices)
        shift_s, length_s = representation.frame_shift_s, representation.frame_length_s
        pairs = zip(task.indices.tolist(), np.diff(offsets).tolist(), strict=True)
        y_N = np.concatenate([task.frame_classes(index, count, shift_s, length_s) for index, count in pairs])
    known_N = y_N >= 0
    if config.shuffle_labels:
        y_N = y_N.copy()
        y_N[known_N] = np.random.default_rng(config.split.seed).permutation(y_N[known_N])
    return Stored(
        x_LNP=x_LNP,
        y_N=torch.from_numpy(y_N),
        offsets=offsets,
        known_N=known_N,
        num_frames_U=np.asarray(representation.num_frames(task.indices), dtype=np.int64),
        context=config.context if task.unit == "frame" else 0,
    )


def run_protocol(
    stored: Stored,
    division: Parts | Groups,
    *,
    layers: slice,
    num_classes: int,
    config: ClassifierConfig,
    seed: int,
    published: PublishedConfig | None = None,
    are_features: bool = False,
    tell: Tell = lambda line: None,
) -> Outcome:
    """Chooses and fits on train and dev, then scores each test part once."""
    options: dict[str, Any] = {"num_classes": num_classes, "seed": seed}
    if isinstance(division, Groups):
        tests = [stored.examples(members, layers) for members in division.members]
        fitted = fit_leaving_out(tests, config=config, **options)
    else:
        train, dev, test = (stored.examples(part, layers) for part in (division.train, division.dev, division.test))
        tests = [test]
        if published is not None:
            options |= {"hidden_dim": config.hidden_dim, "standardise": are_features, "tell": tell}
            fitted = [fit_published(train, dev, config=published, **options)]
        else:
            fitted = [fit(train, dev, config=config, **options)]
    if not all(len(part) for part in tests):
        raise ValueError("there are no test examples: the split leaves that part empty")
    accuracies = [score(one.classifier, part)[0] for one, part in zip(fitted, tests, strict=True)]
    return Outcome(seed=seed, test=accuracies, fitted=fitted)


def chance(stored: Stored, division: Parts | Groups) -> float:
    """Accuracy of always answering the most frequent class of the training part; the mean over folds."""
    if isinstance(division, Parts):
        pairs = [(division.train, division.test)]
    else:
        whole = set(np.concatenate(division.members).tolist())
        pairs = [(np.array(sorted(whole - set(members.tolist()))), members) for members in division.members]
    accuracies = []
    for train, test in pairs:
        y_train, y_test = (stored.y_N[stored.examples(part, slice(None)).rows] for part in (train, test))
        accuracies.append(float((y_test == torch.bincount(y_train).argmax()).float().mean()))
    return float(np.mean(accuracies))


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What all rows of a table share."""

    corpus: Corpus
    task: Task
    division: Parts | Groups
    config: ProbeConfig
    classifier: ClassifierConfig
    adapt: Callable[[Representation], Representation]
    tell: Tell


Keep = Callable[[NamedModel, FineTuned], None]


def probe(
    corpus: Corpus,
    models: Sequence[NamedModel | ForwardAdapter],
    config: ProbeConfig,
    tell: Tell = lambda line: None,
    *,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Probes models and baselines on one task.

    Args:
        corpus: Where utterances and classes come from.
        models: What to probe, in eval mode; may be empty for the baselines alone.
        config: What is asked and how.
        tell: Called with a line for each result as it comes.
        keep: Called for every model that was fine-tuned, with what came of it under the seed that is best on dev.

    Returns:
        The result card, plain JSON values (see ``sslim.probes.result_card``).

    Raises:
        ValueError: The corpus lacks what the task or the split needs, or a model lacks the layer.
    """
    task = load_task(config.task, corpus, config.column)
    if config.context and task.unit != "frame":
        raise ValueError(f"the task {task.name!r} classifies whole utterances, and a context of {config.context} is for frames")
    task, adapt = (task, _as_it_is) if config.published is None else published_task(task, config.published_labels)
    entries = entries_of(corpus, models, config, task.unit)
    if not entries:
        raise ValueError("there is nothing to probe: name a model, or leave the baselines on")
    task, num_short = _usable(task, [adapt(entry.represent(0)) for entry in entries], config)
    chosen = task.indices.tolist()
    splits, speakers = ([corpus.column(name)[i] for i in chosen] for name in ("split", "speaker"))
    ids = corpus.ids() if config.split.source == "cpc" else []
    division = divide(task.classes_N, splits, speakers, config.split, [ids[i] for i in chosen] if ids else [])
    if isinstance(division, Parts):  # said before anything is trained
        check_parts(training=division.train, dev=division.dev, test=division.test)
    classifier = replace(ClassifierConfig() if task.unit == "utterance" else FRAME_CLASSIFIER, hidden_dim=config.hidden_dim)
    plan = _Plan(corpus=corpus, task=task, division=division, config=config, classifier=classifier, adapt=adapt, tell=tell)
    _try(entries, plan)
    rows, by_chance = [], 0.0
    for entry in entries:
        if config.fine_tuning is not None and entry.model is not None:
            made, by_chance = _tuned_rows(entry, plan, keep)
        else:
            made, by_chance = _frozen_rows(entry, plan)
        rows += made
        for row in made:
            tell(f"{row['name']}, layer {row['layer']}: {100 * row['mean']:.1f} ± {100 * row['sd']:.1f} %")
    left_out = {"without_class": task.num_without, "shorter_than_a_frame": num_short, "quarantined": corpus.num_quarantined}
    return build_card(corpus, task, division, config, rows, chance=by_chance, left_out=left_out)


def _try(entries: Sequence[Entry], plan: _Plan) -> None:
    """Computes the first utterance of every entry, so that what one lacks is said before anything is trained.

    Raises:
        ValueError: A model lacks the layer, its statistics or what it reads, or the features are not those it takes.
    """
    for entry in sorted(entries, key=lambda entry: entry.source is None):  # the models first: their sentences name them
        try:
            representation = with_layers(plan.adapt(entry.represent(0)), plan.config.layer)
            for _ in representation.layers_of(plan.task.indices[:1]):
                pass
        except ValueError as error:
            raise ValueError(f"{entry.name} cannot be probed: {error}") from error


def _as_it_is(representation: Representation) -> Representation:
    return representation


def _frozen_rows(entry: Entry, plan: _Plan) -> tuple[list[dict[str, Any]], float]:
    """Rows of one entry, a layer each, and chance."""
    config = plan.config
    outcomes: dict[str, list[Outcome]] = {}
    stored: Stored | None = None
    by_chance = 0.0
    for seed in range(config.num_seeds):
        if stored is None or entry.by_seed:
            representation = plan.adapt(entry.represent(seed))
            stored = store(with_layers(representation, config.layer), plan.corpus, plan.task, config)
            by_chance = chance(stored, plan.division)
        for name, layers in row_layers(representation.num_layers, config.layer).items():
            outcome = run_protocol(
                stored,
                plan.division,
                layers=layers,
                num_classes=len(plan.task.classes),
                config=plan.classifier,
                seed=seed,
                published=config.published,
                are_features=representation.kind == "features",
                tell=lambda line: plan.tell(f"{entry.name}: {line}"),
            )
            outcomes.setdefault(name, []).append(outcome)
    return [build_row(entry.source, representation, name, runs) for name, runs in outcomes.items()], by_chance


def _tuned_rows(entry: Entry, plan: _Plan, keep: Keep | None) -> tuple[list[dict[str, Any]], float]:
    """The row of one fine-tuned model, which is told apart by its name, and chance."""
    config = plan.config
    assert entry.model is not None
    assert config.fine_tuning is not None
    assert isinstance(plan.division, Parts)
    outcomes: list[Outcome] = []
    best: FineTuned | None = None
    stored: Stored | None = None
    for seed in range(config.num_seeds):
        model = entry.model(seed)
        if stored is None or entry.by_seed:
            representation = entry.represent(seed)
            stored = store(with_layers(representation, config.layer), plan.corpus, plan.task, config)
        train, dev = (stored.examples(part, slice(None)) for part in (plan.division.train, plan.division.dev))
        frozen = fit(train, dev, num_classes=len(plan.task.classes), config=plan.classifier, seed=seed)
        targets = model_targets(
            model,
            plan.corpus,
            plan.task,
            pooling=config.pooling,
            layer=config.layer,
            context=config.context,
            shuffle_seed=config.split.seed if config.shuffle_labels else None,
        )
        tuned = fine_tune(
            model,
            plan.division,
            targets,
            start=frozen.classifier,
            config=config.fine_tuning,
            seed=seed,
            bf16=config.bf16,
            tell=lambda line: plan.tell(f"{entry.name}: {line}"),
        )
        setting = ("learning_rate", tuned.learning_rate, tuned.epoch)
        fitted = Fitted(classifier=tuned.classifier, setting=setting, dev_accuracy=tuned.dev_accuracy)
        outcomes.append(Outcome(seed=seed, test=[tuned.test_accuracy], fitted=[fitted]))
        if best is None or tuned.dev_accuracy > best.dev_accuracy:
            best = tuned
    if keep is not None and entry.source is not None and best is not None:
        keep(entry.source, best)
    (layer,) = row_layers(representation.num_layers, config.layer)
    row = build_row(entry.source, replace(representation, name=f"{entry.name}, fine-tuned"), layer, outcomes)
    assert stored is not None
    return [row | {"fine_tuned": True}], chance(stored, plan.division)


def _usable(task: Task, representations: Sequence[Representation], config: ProbeConfig) -> tuple[Task, int]:
    """Drops utterances for which some representation has no frame, then those beyond the cap on frames."""
    frames = np.stack([representation.num_frames(task.indices) for representation in representations])
    kept = np.flatnonzero(frames.min(0) > 0)
    if not len(kept):
        raise ValueError(f"every utterance of the task {task.name!r} is shorter than one frame")
    num_short = len(task.indices) - len(kept)
    if task.unit == "frame":
        kept = kept[choose_utterances(frames.max(0)[kept], config.max_frames, config.split.seed)]
    classes_N = None if task.classes_N is None else task.classes_N[kept]
    return replace(task, indices=task.indices[kept], classes_N=classes_N), num_short
