"""``sslim probe``: evaluation of a model's layers, frozen or fine-tuned, beside log-Mel and random weights."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from sslim.storage import check_file_target

if TYPE_CHECKING:
    from sslim.data.corpus import Corpus
    from sslim.probes import FineTuned, NamedModel, ProbeConfig, SplitConfig

S3PRL = "s3prl-v0.1"
CONCAT_CONTEXT = 4  # frames on either side
HIDDEN_DIM, S3PRL_HIDDEN_DIM = 256, 768
S3PRL_STEPS, S3PRL_SEED = 500_000, 1337
MAX_FRAMES = 100_000
FRAME_TASKS = ("phones", "speaker-frames")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Classify utterances or frames from a model's layers, with every choice made on dev, and write a result card.

    Models stay frozen, unless --fine-tune trains a copy of them. Examples:
    `sslim probe label runs/small/model --corpus corpora/digits --folds speaker --output card.json`,
    `sslim probe phones runs/small/model --corpus corpora/libri --classifier concat`,
    `sslim probe label runs/small/model --corpus corpora/words --fine-tune --save-model runs/words`.
    """

    task: tyro.conf.Positional[Literal["label", "speaker", "speaker-frames", "phones"]]
    """What to classify: utterances by a column of the manifest, frames by their speaker, or frames by their phone."""
    models: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Model folders, run folders or checkpoints; without any, only baselines are probed."""
    corpus: Path
    """Folder that `sslim prepare` wrote."""
    output: Path | None = None
    """Where to write the result card (JSON)."""
    column: str | None = None
    """Another column of the manifest as the classes of utterances: speaker, label, text or split."""
    layer: str | None = None
    """mix: learned weights over all layers; all: a row for each; last; mean: of what the blocks give; or a number, 0 being
    what enters the first block. Mix when not given; last with --protocol s3prl-v0.1."""
    weighted_sum: bool = False
    """Take all layers: the learned mix, or with --protocol s3prl-v0.1 their mean, since its weights were never trained."""
    pooling: Literal["mean", "mean-std"] | None = None
    """How an utterance's frames become one vector; mean-std when not given, mean with --protocol s3prl-v0.1."""
    classifier: Literal["linear", "mlp", "concat"] = "linear"
    """mlp has one hidden layer; concat is linear over nine frames, four on either side, for frame tasks."""
    hidden_dim: int | None = None
    """Width of the mlp's hidden layer; 256 when not given, 768 with --protocol s3prl-v0.1."""
    split: Literal["auto", "manifest", "random", "cpc"] | None = None
    """Where train, dev and test come from; auto takes the manifest's where they fit the task; cpc is that of CPC's lists, or of
    a rule like it without --split-lists. Auto when not given, cpc with --protocol s3prl-v0.1."""
    split_lists: Path | None = None
    """Folder with CPC's train_split.txt and test_split.txt."""
    split_seed: int | None = None
    """Of the parts that are drawn; 0 when not given, 1337 for the cpc split."""
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
    baseline_features: tuple[str, ...] = ()
    """More features as rows, by the names of `sslim prepare --features`: fbank80 mfcc39."""
    shuffle_labels: bool = False
    """A control: shuffle the classes, so that anything above chance is a mistake."""
    max_frames: int | None = None
    """For frame tasks: frames to keep (whole utterances drawn by the split's seed); 0 keeps all. 100000 when not given, all of
    them with --protocol s3prl-v0.1."""
    protocol: Literal["sslim", "s3prl-v0.1"] = "sslim"
    """s3prl-v0.1 trains as S3PRL's published probes did; the card says what of it is reproduced and which faults are not."""
    steps: int | None = None
    """With --protocol s3prl-v0.1: steps of training; 500000 when not given."""
    phone_labels: Literal["cpc", "montreal"] = "cpc"
    """With --protocol s3prl-v0.1: whose labels the alignments are, which decides when each of them is."""
    fine_tune: bool = False
    """Train a copy of each model together with the classifier."""
    model_learning_rates: tuple[float, ...] = (1e-4,)
    """With --fine-tune: learning rates of the model to try; dev chooses."""
    head_learning_rate: float = 2e-3
    """With --fine-tune: learning rate of the classifier."""
    warmup_share: float = 0.1
    """With --fine-tune: share of the steps in which the rates rise."""
    epochs: int = 10
    """With --fine-tune: at most so many; dev chooses among them."""
    patience: int = 3
    """With --fine-tune: epochs without a better dev accuracy before it stops."""
    train_batch_seconds: float = 20.0
    """With --fine-tune: seconds of padded speech in a step."""
    train_frontend: bool = False
    """With --fine-tune: train a learnt front-end (convolutions over the waveform) as well."""
    save_model: Path | None = None
    """With --fine-tune and one model: folder for what came of it, as FOLDER/model and FOLDER/classifier."""
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
    check_options(options)
    from rich.console import Console

    from sslim.data.corpus import Corpus
    from sslim.probes import card_table, probe, write_card

    console = Console(stderr=True, highlight=False)
    config = probe_config(options)
    corpus = Corpus.open(options.corpus)
    if corpus.num_quarantined:
        console.print(f"{corpus.num_quarantined} unreadable files were left out when {corpus.name} was prepared")
    models = [_named(path, options) for path in options.models]
    tuned: list[FineTuned] = []
    card = probe(corpus, models, config, tell=console.print, keep=lambda model, made: tuned.append(made))
    Console().print(card_table(card))
    if options.output is not None:
        write_card(card, options.output)
        console.print(f"result card: {options.output}")
    if options.save_model is not None:
        _save(tuned[0], card, config, corpus, options.save_model)
        console.print(f"fine-tuned model: {options.save_model / 'model'}", soft_wrap=True)


def check_options(options: Options) -> None:
    """Says what can be told before anything is loaded.

    Raises:
        ValueError: Options contradict each other, have no effect beside the others, or name what cannot be written.
    """
    check_conditions(options)
    if options.weighted_sum and options.layer not in (None, "mix", "mean"):
        raise ValueError(f"--weighted-sum takes all layers, and --layer {options.layer} asks for others: give one of the two")
    if options.hidden_dim is not None and options.hidden_dim < 1:
        raise ValueError(f"--hidden-dim is {options.hidden_dim}; expected 1 or more")
    if options.max_frames is not None and options.max_frames < 0:
        raise ValueError(f"--max-frames is {options.max_frames}; expected 0 (all of them) or more")
    if options.classifier == "concat" and options.task not in FRAME_TASKS:
        raise ValueError(f"--classifier concat lays nine frames end to end, and the task {options.task} has no frames")
    if options.output is not None:
        check_file_target(options.output)
    if options.save_model is not None:
        _check_save_model(options.save_model, options.models)


def check_conditions(options: Options) -> None:
    """Looks for options that were given and have no effect beside the others.

    Raises:
        ValueError: There is one; the sentence says what it is for.
    """
    defaults = {field.name: field.default for field in fields(options)}
    for names, meant_for, holds in _conditions(options):
        for name in names:
            value = getattr(options, name)
            if not holds and value != defaults[name]:
                words = "" if isinstance(value, bool) else " ".join(map(str, value if isinstance(value, tuple) else (value,)))
                raise ValueError(f"{f'--{name} {words}'.replace('_', '-').rstrip()} is for {meant_for}")


def _conditions(options: Options) -> list[tuple[tuple[str, ...], str, bool]]:
    """Options that have an effect only beside others, what that is in words, and whether it is so here."""
    tuned = ("model_learning_rates", "head_learning_rate", "warmup_share", "epochs", "patience", "train_batch_seconds")
    of_frames = options.task in FRAME_TASKS
    like_s3prl = options.protocol == S3PRL
    drawn = options.folds is None and _split_source(options) in ("auto", "random")
    models = len(options.models)
    return [
        ((*tuned, "train_frontend"), "--fine-tune", options.fine_tune),
        (("save_model",), f"--fine-tune with one model, not {models}", options.fine_tune and models == 1),
        (("fine_tune", "statistics", "device", "bf16", "layer", "weighted_sum"), "a model, and none is named", models > 0),
        (("steps", "phone_labels"), f"--protocol {S3PRL}", like_s3prl),
        (("phone_labels",), f"the task phones, not {options.task}", options.task == "phones"),
        (("hidden_dim",), f"--classifier mlp, not {options.classifier}", options.classifier == "mlp"),
        (("num_folds",), "--folds", options.folds is not None),
        (("split",), "one train, dev and test part; --folds makes its own", options.folds is None),
        (("speaker_disjoint",), "parts that are drawn at random: without --folds, with --split auto or random", drawn),
        (("max_frames",), f"frames, and the task {options.task} has none", of_frames),
        (("pooling",), f"utterances, and the task {options.task} classifies frames", not of_frames),
    ]


def _check_save_model(folder: Path, models: tuple[Path, ...]) -> None:
    from sslim.checkpoints.model_files import RUN, model_path

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--save-model {folder} is a file; give a folder")
    target = (folder / "model").resolve()
    if (folder / RUN).exists() or any(model_path(model).resolve() == target for model in models):
        raise ValueError(f"--save-model {folder} has the model of a run or of this probe; give another folder")


def probe_config(options: Options) -> ProbeConfig:
    """Returns what the options ask for; what was not given depends on the protocol."""
    from sslim.probes import FineTuningConfig, ProbeConfig, PublishedConfig

    like_s3prl = options.protocol == S3PRL
    pooling, max_frames = ("mean", 0) if like_s3prl else ("mean-std", MAX_FRAMES)
    layer = ("mean" if options.weighted_sum else "last") if like_s3prl else "mix"
    hidden_dim = options.hidden_dim or (S3PRL_HIDDEN_DIM if like_s3prl else HIDDEN_DIM)  # 0 was refused
    special: dict[str, Any] = {}
    if like_s3prl:
        num_steps = S3PRL_STEPS if options.steps is None else options.steps
        special = {"published": PublishedConfig(num_steps=num_steps), "published_labels": options.phone_labels}
    if options.fine_tune:
        special["fine_tuning"] = FineTuningConfig(
            learning_rates=options.model_learning_rates,
            head_learning_rate=options.head_learning_rate,
            warmup_share=options.warmup_share,
            max_epochs=options.epochs,
            patience=options.patience,
            batch_s=options.train_batch_seconds,
            train_frontend=options.train_frontend,
        )
    return ProbeConfig(
        task=options.task,
        column=options.column,
        pooling=options.pooling or pooling,  # type: ignore[arg-type]
        layer=options.layer or layer,
        hidden_dim=hidden_dim if options.classifier == "mlp" else None,
        context=CONCAT_CONTEXT if options.classifier == "concat" else 0,
        split=_split(options),
        num_seeds=options.seeds,
        max_frames=(max_frames if options.max_frames is None else options.max_frames) or None,
        shuffle_labels=options.shuffle_labels,
        baselines=options.baselines,
        baseline_features=options.baseline_features,
        batch_s=options.batch_seconds,
        bf16=options.bf16,
        **special,
    )


def _split_source(options: Options) -> str:
    like_cpc = options.split_lists is not None or (options.protocol == S3PRL and options.folds is None)
    return options.split or ("cpc" if like_cpc else "auto")


def _split(options: Options) -> SplitConfig:
    from sslim.probes import SplitConfig

    source = _split_source(options)
    return SplitConfig(
        source=source,  # type: ignore[arg-type]
        folds=options.folds,
        num_folds=options.num_folds,
        speaker_disjoint=options.speaker_disjoint,
        seed=options.split_seed if options.split_seed is not None else S3PRL_SEED if source == "cpc" else 0,
        lists=None if options.split_lists is None else str(options.split_lists),
    )


def _named(path: Path, options: Options) -> NamedModel:
    from sslim.checkpoints import load_model
    from sslim.checkpoints.model_files import model_name, model_path, tensors_digest
    from sslim.probes import NamedModel
    from sslim.profiling.latency import check_device

    check_device(options.device)
    place = model_path(path)
    model = load_model(place, statistics=options.statistics).to(options.device)
    if options.train_frontend and not list(model.frontend.parameters() if model.frontend else ()):
        raise ValueError(f"--train-frontend is for a learnt front-end, and {path} has none: its features have no parameters")
    return NamedModel(name=model_name(place), model=model, path=str(place), digest=tensors_digest(place))


def _save(tuned: FineTuned, card: dict[str, Any], config: ProbeConfig, corpus: Corpus, folder: Path) -> None:
    from sslim.probes import write_tuned
    from sslim.probes.tuned_files import ClassifierDescription

    description = ClassifierDescription(
        task=card["task"],
        classes=tuple(card["classes"]),
        unit=card["unit"],
        layer=config.layer,
        pooling=config.pooling if card["unit"] == "utterance" else None,
        context=config.context,
        hidden_dim=config.hidden_dim,
    )
    write_tuned(tuned, description, corpus, folder)
