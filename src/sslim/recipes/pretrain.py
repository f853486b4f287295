"""Pre-training: the place where corpus, targets, model, objective and trainer meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sslim import __version__
from sslim.checkpoints import load_model, save_model
from sslim.config import from_plain, nearest, read_json, to_plain
from sslim.data.batching import BatchingConfig, BatchPlan, CorpusBatches, FrameFacts
from sslim.data.corpus import Corpus
from sslim.data.doctor import examine
from sslim.data.labels import LabelStore
from sslim.models import ModelConfig, SpeechModel, build_model, with_head
from sslim.objectives import MaskedPrediction, MaskedPredictionConfig
from sslim.training import SENTINELS, Trainer, TrainerConfig, TrainingResult, join_processes

HEAD = "masked_prediction"
HELD_OUT_SPLITS = ("dev", "test", "valid", "validation")
CHECK_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which utterances are trained on and how they are put together.

    Attributes:
        batch_s: Seconds of audio in a micro-batch, padding included; None leaves it to ``max_utterances`` whole crops.
        max_utterances: Utterances in a micro-batch at most.
        crop_s: Longer utterances are cut to this, at a random place in every epoch; None keeps them whole.
        min_s: Shorter utterances are left out.
        max_s: Longer utterances are left out.
        train_splits: Splits to train on; None is all but dev, test and validation.
        valid_split: Split to validate on; None is dev or valid(ation) where there is one.
        valid_share: Share of the training utterances held out for validation when no such split exists.
    """

    batch_s: float | None = 60.0
    max_utterances: int | None = None
    crop_s: float | None = 15.0
    min_s: float = 0.0
    max_s: float | None = None
    train_splits: tuple[str, ...] | None = None
    valid_split: str | None = None
    valid_share: float = 0.02


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
    """

    name: str
    about: str
    model: ModelConfig
    objective: MaskedPredictionConfig
    training: TrainerConfig
    data: DataConfig = DataConfig()


def _chosen(corpus: Corpus, wanted: Callable[[str | None], bool]) -> np.ndarray:
    splits = corpus.column("split")
    return np.array([i for i, split in enumerate(splits) if wanted(split)], dtype=np.int64)


def split_utterances(corpus: Corpus, data: DataConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the corpus indices to train and to validate on; validation may be empty.

    Raises:
        ValueError: A named split does not exist, or nothing is left to train on.
    """
    names = sorted({split for split in corpus.column("split") if split})
    for split in (*(data.train_splits or ()), *([data.valid_split] if data.valid_split else [])):
        if split not in names:
            raise ValueError(f"corpus {corpus.name} has no split {split!r}; it has {names or 'none'}")
    valid_split = data.valid_split or next((name for name in ("dev", "valid", "validation") if name in names), None)
    if data.train_splits is not None:
        train = _chosen(corpus, lambda split: split in data.train_splits)  # type: ignore[operator]
    else:
        held_out_splits = {*HELD_OUT_SPLITS, valid_split} - {None}
        train = _chosen(corpus, lambda split: split not in held_out_splits)
    if valid_split is not None:
        valid = _chosen(corpus, lambda split: split == valid_split)
    else:
        order = np.random.default_rng([seed, 1]).permutation(len(train))
        least = 1 if data.valid_share and len(train) >= 10 else 0
        held_out = np.sort(order[: max(least, int(data.valid_share * len(train)))])
        valid, train = train[held_out], np.delete(train, held_out)
    duration_s = corpus.num_frames * corpus.base_frame_shift_s
    keep = duration_s[train] > data.min_s
    if data.max_s is not None:
        keep &= duration_s[train] < data.max_s
    train = train[keep]
    if len(train) == 0:
        raise ValueError(
            f"no utterance of corpus {corpus.name} is left to train on: check splits, min_s {data.min_s} and max_s"
        )
    return train, valid


def _frames(seconds: float, facts: FrameFacts) -> int:
    """Stored units in ``seconds``, a whole number of the model's frames."""
    return max(1, round(seconds / facts.unit_s / facts.hop)) * facts.hop


def make_batches(
    corpus: Corpus,
    labels: LabelStore,
    utterances: np.ndarray,
    model: SpeechModel,
    data: DataConfig,
    seed: int,
    *,
    shuffle: bool,
) -> CorpusBatches:
    """Plans micro-batches over the chosen utterances."""
    assert model.frontend is not None
    facts = FrameFacts.of_features(model.frontend)
    lengths = corpus.num_frames[utterances]
    crop = None if data.crop_s is None else _frames(data.crop_s, facts)
    longest = int(lengths.max()) if crop is None else min(crop, int(lengths.max()))
    budget = longest * (data.max_utterances or 1) if data.batch_s is None else max(_frames(data.batch_s, facts), longest)
    config = BatchingConfig(
        max_frames_per_batch=budget,
        max_utterances=data.max_utterances,
        max_length=crop,
        crop_multiple=facts.hop,
        shuffle=shuffle,
    )
    return CorpusBatches(corpus, BatchPlan(lengths, config, seed=seed), facts, labels=labels, utterances=utterances)


def _check_frontend(model: SpeechModel, corpus: Corpus) -> None:
    if model.frontend is None or corpus.frontend_config is None:
        raise ValueError(f"corpus {corpus.name} holds no features that this model could train on")
    stored, needed = to_plain(corpus.frontend_config.features), to_plain(model.frontend.config.features)
    for key in sorted(set(stored) | set(needed)):
        if stored.get(key) != needed.get(key):
            raise ValueError(
                f"corpus {corpus.name} was prepared with {key}={stored.get(key)!r}, the model takes {key}={needed.get(key)!r}"
            )


def _check_labels(corpus: Corpus, labels: LabelStore, model: SpeechModel) -> list[str]:
    """Looks at a sample for half a second; returns notes, raises on what would waste the run."""
    assert model.frontend is not None
    problems = examine(
        corpus, labels, frame_period_s=model.frontend.frame_shift_s, stack=model.frontend.stack, max_seconds=CHECK_SECONDS
    )
    fatal = [problem.sentence for problem in problems if problem.fatal]
    if fatal:
        raise ValueError(f"{fatal[0]} (`sslim doctor` lists all {len(fatal)} problems found)" if len(fatal) > 1 else fatal[0])
    return [problem.sentence for problem in problems]


def _without_statistics(config: ModelConfig) -> ModelConfig:
    """A recipe read from a run names the statistics of that run's corpus, but does not hold them."""
    frontend = config.frontend
    if frontend is None:
        return config
    return replace(config, frontend=replace(frontend, normalization=replace(frontend.normalization, statistics=None)))


def initial_model(
    recipe: PretrainRecipe, corpus: Corpus, labels: LabelStore, *, init_from: Path | None, keep_head: bool
) -> SpeechModel:
    """Builds the recipe's model, or loads one to go on from.

    A loaded model's head is drawn anew, as large as the new labels need, unless ``keep_head``: cluster ids of
    another codebook mean nothing to the old one. Statistics come from the loaded model, else from the corpus.

    Raises:
        ValueError: The kept head is for another number of clusters; features do not fit; statistics are missing.
    """
    generator = torch.Generator().manual_seed(recipe.training.seed)
    head = replace(recipe.model.heads[HEAD], num_clusters=labels.num_clusters)
    if init_from is None:
        model = build_model(_without_statistics(replace(recipe.model, heads={**recipe.model.heads, HEAD: head})), generator)
    else:
        model = load_model(init_from)
        old = model.config.heads.get(HEAD)
        if keep_head and (old is None or old.num_clusters != labels.num_clusters):
            found = "no head" if old is None else f"a head for {old.num_clusters} clusters"
            raise ValueError(f"{init_from} has {found}, the labels have {labels.num_clusters}: leave out --keep-head")
        if not keep_head:
            head = replace(head, mask_embedding_dim=old.mask_embedding_dim if old else head.mask_embedding_dim)
            model = with_head(model, HEAD, head, generator, replace_existing=True)
    _check_frontend(model, corpus)
    assert model.frontend is not None
    if model.frontend.config.normalization.kind == "global" and model.frontend.statistics_source is None:
        if corpus.statistics is None:
            raise ValueError(f"corpus {corpus.name} has no mean and standard deviation; prepare it again")
        mean, std, source = corpus.statistics
        model.set_statistics(torch.as_tensor(mean), torch.as_tensor(std), source=source)
    return model


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
        say: Where notes for the user go.

    Raises:
        ValueError: Anything about data, labels, model or settings that cannot work.
    """
    with join_processes(recipe.training.device) as processes:
        say = say if processes.is_main else (lambda _: None)
        corpus = Corpus.open(corpus_folder)
        labels = corpus.labels(_label_set(corpus, labels_name))
        model = initial_model(recipe, corpus, labels, init_from=_model_folder(init_from), keep_head=keep_head)
        for note in _check_labels(corpus, labels, model):
            say(f"note: {note}")
        seed = recipe.training.seed
        train, valid = split_utterances(corpus, recipe.data, seed)
        batches = make_batches(corpus, labels, train, model, recipe.data, seed, shuffle=True)
        validation = make_batches(corpus, labels, valid, model, recipe.data, seed, shuffle=False) if len(valid) else None
        say(
            f"{recipe.name}: {model.num_parameters():,} parameters, {len(train):,} utterances to train on, {len(valid):,} to "
            f"validate on, {corpus.num_quarantined} quarantined"
        )
        description = _resolved(recipe, corpus, labels, model, init_from)
        model.provenance.append(
            {"step": "pretrain", "recipe": recipe.name, "corpus": corpus.name, "labels": labels.origin, "seed": seed}
        )
        result = Trainer(
            MaskedPrediction(model.train(), recipe.objective),
            batches,
            recipe.training,
            output,
            save_model=lambda folder: save_model(model, folder),
            validation=validation,
            description=description,
            may_change=MAY_CHANGE,
            sentinels=SENTINELS["masked_prediction"](labels.num_clusters),
            init_optimizer_from=init_from if init_optimizer else None,
            processes=processes,
        ).run()
    return result


def _label_set(corpus: Corpus, name: str | None) -> str:
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


def _model_folder(path: Path | None) -> Path | None:
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
