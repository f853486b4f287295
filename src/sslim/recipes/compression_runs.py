"""Runs what the compression suite's two YAML files ask for (``read_compression_yaml``), resumable at any point.

Counterpart: Lin et al., arXiv 2211.09949 (``runner.py`` of Speech-SSL-Compression). The model goes on with masked prediction
while it is pruned: weights inside one training, heads and feed-forward units between trainings, each with a new optimiser, as
there. Every training draws an order and masks of its own, and all of them hold out the same utterances.

=========================  =========================================================================================
``training/``              the run of weight pruning or distillation
``00-training/``           with heads or rows: the run before the first pruning
``01-heads/`` and so on    the model as it was cut (``cut/``), the run that follows (``training/``), what that gave (``model/``)
``compression.json``       what each of them bought
``model/``                 the result
=========================  =========================================================================================

Under ``torchrun`` the first process cuts and writes, and all of them train.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from sslim.checkpoints import load_model, save_model
from sslim.compress.heads import prune_heads
from sslim.compress.rows import prune_rows
from sslim.config import to_plain
from sslim.data.corpus import Corpus
from sslim.models import SpeechModel
from sslim.models.encoding import give_features
from sslim.models.speech import with_settings
from sslim.objectives import LogitDistillationConfig
from sslim.profiling import Conditions
from sslim.recipes.calibration import CalibrationConfig, calibrate
from sslim.recipes.compression_folder import claim
from sslim.recipes.compression_table import outcome, row_of, write_table
from sslim.recipes.compression_yaml import CompressionRecipe, HeadRounds, LogitDistillation, RowRounds, WeightRounds
from sslim.recipes.corpus_batches import split_utterances
from sslim.recipes.distil import NamedTeacher, distil, load_teacher
from sslim.recipes.distil_recipes import DistilRecipe
from sslim.recipes.iterative_weights import described, train_and_prune, what_is_left
from sslim.recipes.pretrain import HEAD, PretrainRecipe, label_set, pretrain
from sslim.recipes.recovery import Wrap, Write, keeping_zeros
from sslim.training import Processes, TrainingResult
from sslim.training.distributed import on_main, pick_device
from sslim.training.seeds import derive_seed

MOST_UTTERANCES = 2_000  # that data scores look at: their features are held in memory, 8 h of them in 0.2 GB
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "layer_drop")


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What all parts of a run share; ``rows`` are those of the table so far, ``is_main`` tells the process that writes."""

    recipe: CompressionRecipe
    whole: NamedTeacher
    corpus: Path
    labels: str | None
    output: Path
    say: Callable[[str], None]
    is_main: bool
    rows: list[dict[str, Any]] = field(default_factory=list)

    def note(self, name: str, model: SpeechModel) -> None:
        """Adds a row to the table."""
        self.rows.append(row_of(name, model, Conditions()))
        if self.is_main:
            write_table(self.output, self.rows)

    def start(self) -> SpeechModel:
        """A copy of the model to compress: its own architecture, the files' dropout."""
        model, encoder = self.whole.model, self.recipe.model.transformer
        dropouts = {name: getattr(encoder, name) for name in DROPOUTS}
        return with_settings(model, replace(model.config, encoder=replace(model.config.transformer, **dropouts)))


def run_compression(
    recipe: CompressionRecipe,
    model_path: Path,
    corpus_folder: Path,
    output: Path,
    *,
    labels_name: str | None = None,
    say: Callable[[str], None] = print,
) -> TrainingResult | None:
    """Runs a compression, or goes on with what ``output`` holds; the result is then in ``output/model``.

    Args:
        recipe: What the files ask for.
        model_path: The model to prune, or the teacher: any that ``load_model`` reads, or a run folder.
        corpus_folder: A prepared corpus.
        output: Folder of the compression, see the module's docstring.
        labels_name: Label set of the corpus; None when it has just one. The model's head must be over its clusters.
        say: Where notes for the user go.

    Returns:
        None when all is done; the result of the training that a signal ended early.

    Raises:
        ValueError: Model, labels or corpus do not fit the recipe or one another, or the folder holds something else.
    """
    is_main = Processes.of_environment().is_main
    say, whole = say if is_main else (lambda _: None), load_teacher(model_path)
    give_features(whole.model, Corpus.open(corpus_folder))
    labels = _checked_labels(recipe, whole, corpus_folder, labels_name, say)
    on_main(lambda: claim(output, "recipe", {**_decisive(recipe), "labels": labels}, whole, corpus_folder))
    run = _Run(recipe=recipe, whole=whole, corpus=corpus_folder, labels=labels, output=output, say=say, is_main=is_main)
    run.note("whole", whole.model)
    method = recipe.method
    if isinstance(method, WeightRounds):
        return _prune_weights(run, method)
    if isinstance(method, LogitDistillation):
        return _distil(run, method)
    cut = _head_cut(run, method) if isinstance(method, HeadRounds) else _row_cut(method)
    return _prune_between(run, "heads" if isinstance(method, HeadRounds) else "rows", cut)


def _decisive(recipe: CompressionRecipe) -> dict[str, Any]:
    """What of a recipe decides the result: neither the files' names, nor where they look for data, nor the device."""
    plan = {key: value for key, value in to_plain(recipe).items() if key not in ("about", "sets")}
    return {**plan, "training": {key: value for key, value in plan["training"].items() if key != "device"}}


def _checked_labels(
    recipe: CompressionRecipe, whole: NamedTeacher, corpus_folder: Path, name: str | None, say: Callable[[str], None]
) -> str | None:
    """The label set to use; None where labels have no weight."""
    config, corpus = whole.model.config, Corpus.open(corpus_folder)
    wanted = recipe.model.projection.feature_dim
    if config.projection.feature_dim != wanted:
        raise ValueError(
            f"the files are for {wanted} features (feat_emb_dim), and {whole.name} takes {config.projection.feature_dim}"
        )
    if isinstance(recipe.method, LogitDistillation) and recipe.method.alpha == 1.0:
        if name is not None:
            say(f"note: alpha is 1: nothing is learnt from the labels {name}")
        return None
    labels = corpus.labels(label_set(corpus, name))
    clusters = getattr(config.heads.get(HEAD), "num_clusters", None)
    if clusters != labels.num_clusters:
        found = "no head over clusters" if clusters is None else f"a head over {clusters} clusters"
        raise ValueError(
            f"{whole.name} has {found} and label set {labels.name} {labels.num_clusters}: compression goes on with the labels "
            "that the model was trained on"
        )
    return labels.name


def _train(
    run: _Run, model: SpeechModel, folder: Path, steps: int, number: int, wrap: Wrap, write: Write, **notes: Any
) -> TrainingResult:
    """Goes on with masked prediction, in place; ``number`` tells the trainings of a run from each other."""
    recipe, seed = run.recipe, run.recipe.training.seed
    training = replace(
        recipe.training, total_steps=steps, seed=seed if number == 0 else derive_seed(seed, "training", number) % 2**31
    )
    pretraining = PretrainRecipe(
        name=recipe.name,
        about=recipe.about,
        model=replace(model.config, heads={**recipe.model.heads, **model.config.heads}),
        objective=recipe.objective,
        training=training,
        data=replace(recipe.data, split_seed=seed),
    )
    return pretrain(
        pretraining, run.corpus, run.labels, folder, start=model, keep_head=True, wrap=wrap, write=write, say=run.say, **notes
    )


def _prune_weights(run: _Run, method: WeightRounds) -> TrainingResult | None:
    schedule = what_is_left(method.schedule, method.choice, run.whole.model, run.say)
    start = run.start()

    def train(total_steps: int, *, wrap: Wrap, write: Write) -> TrainingResult:
        told = described(schedule, method.choice)
        return _train(run, copy.deepcopy(start), run.output / "training", total_steps, 0, wrap, write, pruning=told)

    result = train_and_prune(train, schedule, method.choice, say=run.say)
    return _finished(run, "weights", result)


def _distil(run: _Run, method: LogitDistillation) -> TrainingResult | None:
    recipe = run.recipe
    objective = LogitDistillationConfig(
        temperature=method.temperature,
        alpha=method.alpha,
        masking=method.masking,
        mask_at=recipe.objective.mask_at,
        teacher_mask_at=method.mask_at,
    )
    distillation = DistilRecipe(
        name=recipe.name,
        about=recipe.about,
        loss="logits",
        model=recipe.model,
        objective=objective,
        init=method.init,
        training=recipe.training,
        data=recipe.data,
    )
    result = distil(distillation, run.whole, run.corpus, run.output / "training", labels_name=run.labels, say=run.say)
    return _finished(run, "distilled", result)


def _prune_between(run: _Run, name: str, cut: Callable[[SpeechModel, int], SpeechModel]) -> TrainingResult | None:
    """Trains, cuts, trains and so on; ``cut`` is given a model and the number of the pruning from 0."""
    model = run.start()
    for number, steps in enumerate(run.recipe.segments):
        folder = run.output / (f"{number:02d}-{name}" if number else "00-training")
        if not on_main((folder / "model").is_dir):
            result = _segment(run, folder, model, steps, number, cut)
            if result is not None:
                return result
        model = load_model(folder / "model")
        if number:
            run.note(folder.name, model)
    if run.is_main:
        save_model(model, run.output / "model")
    return None


def _segment(
    run: _Run, folder: Path, model: SpeechModel, steps: int, number: int, cut: Callable[[SpeechModel, int], SpeechModel]
) -> TrainingResult | None:
    """One pruning, but before the first, and the training after it; ``folder/model`` is what that gives."""
    if number:
        on_main(partial(_write_cut, folder / "cut", model, lambda model: cut(model, number - 1)))
        small = load_model(folder / "cut")
        run.say(f"{folder.name}: {outcome(model, small)}")
        model = small
    if steps:
        result = _train(run, model, folder / "training", steps, number, keeping_zeros(model), save_model)
        if not result.finished:
            return result
        model = load_model(folder / "training" / "model")
    on_main(partial(save_model, model, folder / "model"))
    return None


def _write_cut(folder: Path, model: SpeechModel, cut: Callable[[SpeechModel], SpeechModel]) -> None:
    if not folder.is_dir():
        save_model(cut(model), folder)


def _head_cut(run: _Run, method: HeadRounds) -> Callable[[SpeechModel, int], SpeechModel]:
    data, seed = run.recipe.data, run.recipe.training.seed
    train, _ = split_utterances(Corpus.open(run.corpus), data, seed)
    wanted = max(1, round(method.data_share * len(train)))
    if method.score == "data" and wanted > MOST_UTTERANCES:
        run.say(
            f"note: scores look at {MOST_UTTERANCES:,} utterances, not at {wanted:,} (data_ratio): more do not fit in memory"
        )
    config = CalibrationConfig(num_utterances=min(wanted, MOST_UTTERANCES), crop_s=data.crop_s or 15.0, seed=seed)

    def cut(model: SpeechModel, number: int) -> SpeechModel:
        settings = method.settings(model.config, number)
        if method.score != "data":
            return prune_heads(model, settings)
        device = pick_device(run.recipe.training.device, Processes.of_environment())
        model, seen = copy.deepcopy(model).to(device), run.recipe.objective
        calibration = calibrate(model, run.corpus, config, labels_name=run.labels, prediction=seen, device=str(device))
        return prune_heads(model, settings, calibration).cpu()

    return cut


def _row_cut(method: RowRounds) -> Callable[[SpeechModel, int], SpeechModel]:
    return lambda model, number: prune_rows(model, method.settings(model.config, number))


def _finished(run: _Run, name: str, result: TrainingResult) -> TrainingResult | None:
    """Takes over what the one training of a run gave, unless it was ended early."""
    if not result.finished:
        return result
    model = load_model(run.output / "training" / "model")
    run.note(name, model)
    if run.is_main:
        save_model(model, run.output / "model")
    return None
