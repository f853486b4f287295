"""The probe itself: representations, a task and a protocol in; rows of a table out.

Features are computed once for each representation (random weights: once for each seed). All rows and seeds see the same
utterances in the same parts. Test examples are scored once, after everything was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sslim.data.corpus import Corpus
from sslim.models.encoding import DEFAULT_BATCH_S
from sslim.models.speech import SpeechModel
from sslim.probes.classifiers import ClassifierConfig, Examples, score
from sslim.probes.features import (
    POOLINGS,
    Representation,
    choose_utterances,
    frame_features,
    log_mel_representation,
    model_representation,
    pooled_features,
    randomised,
)
from sslim.probes.protocol import Groups, Parts, SplitConfig, divide
from sslim.probes.result_card import build_card, build_row
from sslim.probes.selection import Fitted, fit, fit_leaving_out
from sslim.probes.tasks import Task, load_task

MIX, ALL = "mix", "all"
# Frames are many and one pass over them is long: larger batches, higher rates (the average of an epoch takes out their noise).
FRAME_CLASSIFIER = ClassifierConfig(batch_size=512, learning_rates=(2e-2, 5e-3), max_epochs=30, patience=3)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What is asked and how; it is stored in the result card.

    Attributes:
        task: A name in ``sslim.probes.tasks.TASKS``.
        column: Manifest column instead of the task's own.
        pooling: For utterance tasks: ``mean`` or ``mean-std`` over valid frames.
        layer: ``mix`` for a learned mix of all layers, ``all`` for a row of each layer, or one layer's number.
        hidden_dim: Width of a hidden layer; None for a linear classifier.
        split: How utterances are divided.
        num_seeds: Seeds 0, 1, ... of initial weights, batches and of random-weights models.
        max_frames: For frame tasks: at most so many frames, whole utterances drawn by the split's seed; None for all.
        shuffle_labels: A control: classes are shuffled over all examples, so that only chance is left.
        baselines: Whether log-Mel features and random weights are rows too.
        batch_s: Seconds of padded audio in a batch of the model.
        bf16: Whether the model runs under bf16 autocast.
    """

    task: str
    column: str | None = None
    pooling: Literal["mean", "mean-std"] = "mean-std"
    layer: str = MIX
    hidden_dim: int | None = None
    split: SplitConfig = field(default_factory=SplitConfig)
    num_seeds: int = 3
    max_frames: int | None = 100_000
    shuffle_labels: bool = False
    baselines: bool = True
    batch_s: float = DEFAULT_BATCH_S
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise ValueError(f"{self.num_seeds} seeds were asked for; at least 1 is needed")
        if self.pooling not in POOLINGS:
            raise ValueError(f"there is no pooling {self.pooling!r}; accepted are {', '.join(POOLINGS)}")
        if self.layer not in (MIX, ALL) and not self.layer.isdecimal():
            raise ValueError(
                f"layer {self.layer!r} is not known; accepted are {MIX!r}, {ALL!r} or a number (0 enters the first block)"
            )


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
    """A row (or, layer by layer, several rows) to be: how to get its representation for each seed."""

    name: str
    source: NamedModel | None
    represent: Callable[[int], Representation]
    by_seed: bool = False


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Features and classes of all chosen utterances.

    Attributes:
        x_LNP: (L, N, P).
        y_N: (N,) int64.
        offsets: First example of each utterance, and N at the end.
        known_N: (N,) bool, False for frames without a class.
    """

    x_LNP: Tensor
    y_N: Tensor
    offsets: np.ndarray
    known_N: np.ndarray

    def examples(self, positions: np.ndarray, layers: slice) -> Examples:
        """The examples of the utterances at ``positions``."""
        spans = [np.arange(self.offsets[p], self.offsets[p + 1]) for p in positions]
        rows = np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)
        return Examples(x_LNP=self.x_LNP[layers], y_N=self.y_N, rows=torch.from_numpy(rows[self.known_N[rows]]))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One seed of one row: a test accuracy for each fold and what was chosen for it."""

    seed: int
    test: list[float]
    fitted: list[Fitted]


def _always(representation: Representation) -> Callable[[int], Representation]:
    return lambda seed: representation


def entries_of(corpus: Corpus, models: Sequence[NamedModel], config: ProbeConfig, unit: str) -> list[Entry]:
    """Baselines first: log-Mel, then random weights of every distinct description, then the models."""
    options: dict[str, Any] = {"batch_s": config.batch_s, "bf16": config.bf16}
    entries = []
    if config.baselines:
        period_s = model_representation(models[0].model, corpus, "").frame_shift_s if models else corpus.base_frame_shift_s
        stack = round(period_s / corpus.base_frame_shift_s) if corpus.base_frame_shift_s else 1
        log_mel = log_mel_representation(corpus, pooled=unit == "utterance", stack=max(stack, 1))
        entries.append(Entry(name=log_mel.name, source=None, represent=_always(log_mel)))
        descriptions = [replace(named.model.config, heads={}) for named in models]
        distinct = [named for i, named in enumerate(models) if descriptions[i] not in descriptions[:i]]
        for named in distinct:
            name = "random weights" if len(distinct) == 1 else f"random weights ({named.name})"

            def represent(seed: int, named: NamedModel = named, name: str = name) -> Representation:
                return model_representation(randomised(named.model, seed), corpus, name, kind="random", **options)

            entries.append(Entry(name=name, source=None, represent=represent, by_seed=True))
    for named in models:
        representation = model_representation(named.model, corpus, named.name, **options)
        entries.append(Entry(name=named.name, source=named, represent=_always(representation)))
    return entries


def store(representation: Representation, corpus: Corpus, task: Task, config: ProbeConfig) -> Stored:
    """Computes the features of the task's utterances and lays their classes beside them."""
    if task.classes_N is not None:
        x_LNP = pooled_features(representation, corpus, task.indices, config.pooling)
        y_N, offsets = task.classes_N, np.arange(len(task.indices) + 1)
    else:
        assert task.frame_classes is not None
        x_LNP, offsets = frame_features(representation, corpus, task.indices)
        lengths = np.diff(offsets).tolist()
        period_s = representation.frame_shift_s
        y_N = np.concatenate([task.frame_classes(p, length, period_s) for p, length in enumerate(lengths)])
    known_N = y_N >= 0
    if config.shuffle_labels:
        y_N = y_N.copy()
        y_N[known_N] = np.random.default_rng(config.split.seed).permutation(y_N[known_N])
    return Stored(x_LNP=x_LNP, y_N=torch.from_numpy(y_N), offsets=offsets, known_N=known_N)


def run_protocol(
    stored: Stored, division: Parts | Groups, *, layers: slice, num_classes: int, config: ClassifierConfig, seed: int
) -> Outcome:
    """Chooses and fits on train and dev, then scores each test part once."""
    if isinstance(division, Parts):
        train, dev, test = (stored.examples(part, layers) for part in (division.train, division.dev, division.test))
        fitted, tests = [fit(train, dev, num_classes=num_classes, config=config, seed=seed)], [test]
    else:
        tests = [stored.examples(members, layers) for members in division.members]
        fitted = fit_leaving_out(tests, num_classes=num_classes, config=config, seed=seed)
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


def layer_slices(num_layers: int, layer: str) -> dict[str, slice]:
    """Returns the rows' layers by name: everything for a mix, or single layers.

    Raises:
        ValueError: The model has no such layer.
    """
    if num_layers == 1:
        return {"-": slice(0, 1)}
    if layer == MIX:
        return {MIX: slice(None)}
    if layer == ALL:
        return {str(k): slice(k, k + 1) for k in range(num_layers)}
    if int(layer) >= num_layers:
        raise ValueError(f"there is no layer {layer}; this model has 0 (what enters the first block) to {num_layers - 1}")
    return {layer: slice(int(layer), int(layer) + 1)}


def probe(
    corpus: Corpus, models: Sequence[NamedModel], config: ProbeConfig, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Probes models and baselines on one task.

    Args:
        corpus: Where utterances and classes come from.
        models: What to probe, in eval mode; may be empty for the log-Mel baseline alone.
        config: What is asked and how.
        tell: Called with a line for each result as it comes.

    Returns:
        The result card, plain JSON values (see ``sslim.probes.result_card``).

    Raises:
        ValueError: The corpus lacks what the task or the split needs, or a model lacks the layer.
    """
    task = load_task(config.task, corpus, config.column)
    entries = entries_of(corpus, models, config, task.unit)
    if not entries:
        raise ValueError("there is nothing to probe: name a model, or leave the baselines on")
    task, num_short = _usable(task, [entry.represent(0) for entry in entries], config)
    speakers, splits = corpus.column("speaker"), corpus.column("split")
    chosen = task.indices.tolist()
    division = divide(task.classes_N, [splits[i] for i in chosen], [speakers[i] for i in chosen], config.split)
    classifier = replace(ClassifierConfig() if task.unit == "utterance" else FRAME_CLASSIFIER, hidden_dim=config.hidden_dim)
    rows, by_chance = [], 0.0
    for entry in entries:
        outcomes: dict[str, list[Outcome]] = {}
        stored: Stored | None = None
        for seed in range(config.num_seeds):
            if stored is None or entry.by_seed:
                representation = entry.represent(seed)
                stored = store(representation, corpus, task, config)
                by_chance = chance(stored, division)
            for name, layers in layer_slices(representation.num_layers, config.layer).items():
                outcome = run_protocol(
                    stored, division, layers=layers, num_classes=len(task.classes), config=classifier, seed=seed
                )
                outcomes.setdefault(name, []).append(outcome)
        for name, runs in outcomes.items():
            rows.append(build_row(entry.source, representation, name, runs))
            tell(f"{entry.name}, layer {name}: {100 * rows[-1]['mean']:.1f} ± {100 * rows[-1]['sd']:.1f} %")
    left_out = {"without_class": task.num_without, "shorter_than_a_frame": num_short, "quarantined": corpus.num_quarantined}
    return build_card(corpus, task, division, config, rows, chance=by_chance, left_out=left_out)


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
    frame_classes = task.frame_classes
    if frame_classes is not None:
        inner = frame_classes

        def frame_classes(position: int, num_frames: int, frame_period_s: float) -> np.ndarray:
            return inner(int(kept[position]), num_frames, frame_period_s)

    return replace(task, indices=task.indices[kept], classes_N=classes_N, frame_classes=frame_classes), num_short
