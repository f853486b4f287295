"""Compression as a pipeline: steps that cut a model, each followed by training if asked for, resumable at any of them.

A single method is a pipeline of one step, an iterative one a step with several rounds. The output folder holds for every
round the model as it was cut and the run that trained it again, at the end ``model/`` and ``compression.json``, the table of
what each round bought. Running the same command again goes on where it stopped.

Under ``torchrun`` the first process cuts, measures and writes, and all of them train.
"""

from __future__ import annotations

import copy
import shutil
import tomllib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from sslim.checkpoints import load_model, save_model
from sslim.compress.budgets import parse_budget
from sslim.compress.calibration import Calibration
from sslim.compress.methods import METHODS, Method
from sslim.compress.strength import Found, reached_in_words, size_of, stopwatch, within_latency, within_size
from sslim.config import ConfigError, from_plain, nearest, read_json, to_plain
from sslim.data.corpus import Corpus
from sslim.models import SpeechModel
from sslim.models.encoding import give_features
from sslim.models.speech import restore_statistics
from sslim.models.storage import require_float
from sslim.profiling import Conditions
from sslim.profiling.latency import measure_whole
from sslim.recipes.calibration import CalibrationConfig, calibrate, no_head_for
from sslim.recipes.compression_folder import PLAN, claim
from sslim.recipes.compression_table import outcome, row_of, write_table
from sslim.recipes.distil import NamedTeacher, load_teacher
from sslim.recipes.model_card import write_model_card
from sslim.recipes.pretrain import HEAD as PREDICTION_HEAD
from sslim.recipes.recovery import RECONSTRUCTION, RecoveryConfig, recover
from sslim.recipes.trained_methods import TRAINED_METHODS
from sslim.storage import write_json
from sslim.training import Processes, TrainingResult
from sslim.training.distributed import on_main, pick_device
from sslim.training.run_folder import RunFolder

ALL = (*METHODS, *TRAINED_METHODS)
NO_VALUE = "none"  # in a TOML file, which has no sign for it
STRENGTH, REACHED = "strength.json", "budget.json"  # in a round's folder: what a budget's search found, what the cut came to
FINAL_ROUNDS, FINAL_S = 21, 2.0  # of the measurement that a user is told


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """One step of a pipeline.

    Attributes:
        method: One of ``METHODS`` or ``TRAINED_METHODS``.
        settings: What the method is told, by the names of its settings; checked when the pipeline is read.
        rounds: Cuts that lead to the strength asked for, by equal factors, each followed by training.
        budget: Finds the strength in place of the settings' own: ``params=25M``, ``macs=2G`` or ``latency_ms=12``, of which the
            most that the method can keep is taken.
        recover: Training after every cut; None for none.
    """

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    rounds: int = 1
    budget: str | None = None
    recover: RecoveryConfig | None = None

    def __post_init__(self) -> None:
        if self.method not in ALL:
            raise ValueError(f"there is no method {self.method!r}{nearest(self.method, ALL)}; there are {', '.join(ALL)}")
        if self.rounds < 1:
            raise ValueError(f"rounds of {self.method} is {self.rounds}; expected at least 1")
        method = METHODS.get(self.method)
        if method is None:
            self._check_trained()
            return
        if self.budget is not None:
            self._check_budget(method)
        settings = self.read()
        if self.budget is None and not method.is_given(self.settings):
            wanted = [str(method.strength), *method.instead, *(["a budget"] if method.plan else [])]
            raise ValueError(f"nothing says how much {self.method} removes: give one of {', '.join(wanted)}")
        if self.rounds > 1 and (method.strength is None or getattr(settings, method.strength) is None):
            raise ValueError(
                f"{self.method} has {self.rounds} rounds, which need {method.strength or 'a share'} to be divided up"
            )
        if method.final and self.recover is not None:
            raise ValueError(f"a model cannot be trained after {self.method}: set recover to false")

    def _check_budget(self, method: Method) -> None:
        assert self.budget is not None
        parse_budget(self.budget)
        if method.plan is None:
            raise ValueError(
                f"{self.method} cannot meet a budget: none of its settings lowers parameters, MACs or latency bit by bit"
            )
        for name in (str(method.strength), *method.instead):
            if self.settings.get(name) is not None:
                raise ValueError(f"{self.method} has both a budget and {name}: give one")

    def _check_trained(self) -> None:
        if self.rounds > 1 or self.budget is not None:
            raise ValueError(
                f"{self.method} trains to its size in one go: leave out rounds and budget, it has its own settings"
            )
        self.read()

    @property
    def needs_speech(self) -> bool:
        """Whether the step looks at speech or trains."""
        trained = self.method in TRAINED_METHODS or self.recover is not None
        return trained or METHODS[self.method].looks_at_speech(self.read())

    def read(self) -> Any:
        """Returns the method's settings; their strength says "nothing removed" where a budget decides."""
        if self.method in TRAINED_METHODS:
            return from_plain(TRAINED_METHODS[self.method].settings, self.settings, self.method)
        method, values = METHODS[self.method], dict(self.settings)
        if method.strength is not None and (self.budget is not None or not method.is_given(values)):
            values[method.strength] = method.nothing
        return from_plain(method.settings, values, self.method)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Steps in order, and what they share.

    Attributes:
        steps: The steps.
        calibration: Speech that data-driven methods look at.
        conditions: Length of audio, batch and threads that MACs, latency and their budgets hold for.
    """

    steps: tuple[StepConfig, ...]
    calibration: CalibrationConfig = CalibrationConfig()
    conditions: Conditions = Conditions()

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("the pipeline has no steps: it needs at least one")
        for step in self.steps[:-1]:
            if step.method in METHODS and METHODS[step.method].final:
                raise ValueError(f"{step.method} is not the last step: what it gives can be neither cut nor trained")


def read_pipeline(path: Path) -> Pipeline:
    """Reads a TOML file: tables ``[calibration]``, ``[conditions]``, ``[recover]`` (for all steps) and ``[[step]]``.

    In a step, ``recover`` is a table of what differs from the common one, or ``false`` for none; every key beside ``method``,
    ``rounds``, ``budget`` and ``recover`` is one of the method's settings. The word ``"none"`` stands for a setting's None.

    Raises:
        ConfigError: Not TOML, or an unknown key or value.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file ({error})") from error
    tables = ("calibration", "conditions", "recover", "step")
    if unknown := [key for key in values if key not in tables]:
        raise ConfigError(f"{path} has no key {unknown[0]!r}{nearest(unknown[0], tables)}")
    common, steps = values.pop("recover", None), values.pop("step", [])
    if common is not None and not isinstance(common, dict):
        raise ConfigError(f"{path}: recover is {common!r}; write the training that all steps share as a table [recover]")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ConfigError(f"{path}: steps are tables; write each as [[step]]")
    read = [_read_step(step, common, f"{path.name}: step {number}") for number, step in enumerate(steps, 1)]
    plain: list[Any] = [to_plain(step) for step in read]
    return from_plain(Pipeline, {**values, "steps": plain}, path.name)


def _read_step(step: dict[str, Any], common: dict[str, Any] | None, where: str) -> StepConfig:
    known: dict[str, Any] = {key: step[key] for key in ("method", "rounds", "budget") if key in step}
    if "method" not in known:
        raise ConfigError(f"{where} lacks the key 'method'; there are {', '.join(ALL)}")
    own = step.get("recover")
    if not isinstance(own, bool | dict | None):
        raise ConfigError(f"{where}: recover is {own!r}; expected a table, true or false")
    recover = None
    if own is not False and (own is not None or common is not None):
        recover = {**(common or {}), **(own if isinstance(own, dict) else {})}
    if own is None and known["method"] in METHODS and METHODS[known["method"]].final:
        recover = None
    settings = {key: value for key, value in step.items() if key not in ("method", "rounds", "budget", "recover")}
    settings = {key: None if value == NO_VALUE else value for key, value in settings.items()}
    return from_plain(StepConfig, {**known, "settings": settings, "recover": recover}, where)


@dataclass(frozen=True, kw_only=True)
class _Context:
    """What all rounds of a pipeline share; ``is_main`` tells the process that writes and speaks."""

    pipeline: Pipeline
    whole: NamedTeacher
    corpus: Path | None
    output: Path
    say: Callable[[str], None]
    is_main: bool


@dataclass(frozen=True, kw_only=True)
class _Round:
    """A cut and the training that follows; ``folder/model`` is what they give.

    Attributes:
        step: Of the pipeline.
        number: Of the round within the step, from 1.
        start: The model before the step's first round.
        model: The model at hand, and what it is called.
        folder: Of the round.
        first: Folder of the step's first round.
    """

    step: StepConfig
    number: int
    start: SpeechModel
    model: NamedTeacher
    folder: Path
    first: Path

    @property
    def is_last(self) -> bool:
        """Whether no other round of the step follows."""
        return self.number == self.step.rounds


def compress(
    pipeline: Pipeline,
    model_path: Path,
    corpus_folder: Path | None,
    output: Path,
    *,
    say: Callable[[str], None] = print,
) -> TrainingResult | None:
    """Runs a pipeline, or goes on with what ``output`` holds; the result is then in ``output/model``.

    Steps that have not begun may be changed, left out or added before it goes on.

    Args:
        pipeline: The steps.
        model_path: Any model that ``load_model`` reads, or the folder of a run or compression.
        corpus_folder: A prepared corpus, for steps that look at speech or train.
        output: Folder of the pipeline.
        say: Where notes for the user go.

    Returns:
        None when all is done; the result of the training that a signal or the like ended early.

    Raises:
        ValueError: A step needs a corpus and there is none; the model is a supernet or quantised; the folder holds another
            pipeline, or another process works in it; a method cannot do what it is asked for.
    """
    for step in pipeline.steps:
        if corpus_folder is None and step.needs_speech:
            raise ValueError(f"{step.method} trains or looks at speech: name a corpus with --corpus")
    whole = load_teacher(model_path)
    if whole.model.config.search_space is not None:
        raise ValueError(f"{model_path} is a supernet: cut one of its subnets out first, with `sslim compress extract`")
    require_float(whole.model)
    if corpus_folder is not None and whole.model.frontend is None:
        give_features(whole.model, Corpus.open(corpus_folder))
    plan, is_main = to_plain(pipeline), Processes.of_environment().is_main
    changed = on_main(lambda: claim(output, "pipeline", plan, whole, corpus_folder, compared=partial(_begun, output)))
    with RunFolder(output).lock() if is_main else nullcontext():
        if changed and is_main:
            shutil.rmtree(output / "model", ignore_errors=True)  # of the plan before
        say = say if is_main else (lambda _: None)
        return _run_all(_Context(pipeline=pipeline, whole=whole, corpus=corpus_folder, output=output, say=say, is_main=is_main))


def _begun(output: Path, old: Any, new: Any) -> tuple[Any, Any]:
    """Two plans without the steps of which the folder holds nothing yet."""
    number, count = 1, 0
    for place, step in enumerate(old["steps"], 1):
        if (output / _folder_name(number, step["method"])).exists():
            count = place
        number += step["rounds"]
    return {**old, "steps": old["steps"][:count]}, {**new, "steps": new["steps"][:count]}


def _folder_name(number: int, method: str) -> str:
    return f"{number:02d}-{method}"


def _run_all(context: _Context) -> TrainingResult | None:
    pipeline, whole, number = context.pipeline, context.whole, 0
    at_hand = replace(whole, model=copy.deepcopy(whole.model))  # the whole one is frozen while it teaches
    rows = [row_of("whole", whole.model, pipeline.conditions)]
    for step in pipeline.steps:
        start, first = at_hand.model, context.output / _folder_name(number + 1, step.method)
        for of_step in range(1, step.rounds + 1):
            number += 1
            folder = context.output / _folder_name(number, step.method)
            now = _Round(step=step, number=of_step, start=start, model=at_hand, folder=folder, first=first)
            interrupted = _run(context, now)
            if interrupted is not None:
                return interrupted
            at_hand = NamedTeacher(model=load_model(folder / "model"), name=folder.name)
            rows.append(row_of(folder.name, _without_new_heads(at_hand.model, whole.model), pipeline.conditions))
            _add_budget(rows, folder)
            if context.is_main:
                write_table(context.output, rows)
    if context.is_main:
        result = _without_new_heads(at_hand.model, whole.model)
        save_model(result, context.output / "model")
        write_model_card(context.output, result, rows, read_json(context.output / PLAN)["model"], context.corpus)
    return None


def _run(context: _Context, now: _Round) -> TrainingResult | None:
    """Cuts and trains, unless that is done; what is no training is left to the main process."""
    folder, step = now.folder, now.step
    if on_main((folder / "model").is_dir):
        context.say(f"{folder.name}: done before")
        return None
    cut = folder / "cut"
    if step.method in TRAINED_METHODS:
        assert context.corpus is not None
        train = TRAINED_METHODS[step.method].train
        trained = train(step.read(), now.model, context.whole, context.corpus, folder / "training", say=context.say)
        if not trained.finished:
            return trained
        cut = folder / "training" / "model"
    on_main(partial(_take_cut, context, now, cut))
    if step.recover is None:
        return None
    assert context.corpus is not None
    result = recover(load_model(cut), context.whole, context.corpus, folder / "recovery", step.recover, say=context.say)
    if not result.finished:
        return result
    on_main(lambda: save_model(load_model(folder / "recovery" / "model"), folder / "model"))
    return None


def _take_cut(context: _Context, now: _Round, cut: Path) -> None:
    """Cuts where nothing has done so yet, tells what that bought, and takes it as it is where no training follows."""
    if not cut.is_dir():
        save_model(_cut(context, now), cut)
    small = load_model(cut)
    context.say(f"{now.folder.name}: {outcome(now.model.model, small)}")
    if now.step.budget is not None and now.is_last:
        _note_reached(context, now, small)
    if now.step.recover is None:
        save_model(small, now.folder / "model")


def _cut(context: _Context, now: _Round) -> SpeechModel:
    step, method = now.step, METHODS[now.step.method]
    settings, calibration = step.read(), None
    told: dict[str, Any] = {}
    if method.looks_at_speech(settings):
        device = pick_device(context.pipeline.calibration.device, Processes.of_environment())
        now = replace(now, model=replace(now.model, model=copy.deepcopy(now.model.model).to(device)))
        calibration, told = _calibration(context, now, str(device))
    if step.budget is not None and now.is_last:
        # searched anew for the model at hand: what earlier rounds rounded up or down is made good
        settings = replace(settings, **_strength(context, now, now.folder, calibration))
    elif step.rounds > 1:
        if step.budget is not None:
            settings = replace(settings, **_strength(context, now, now.first, calibration))
        settings = method.in_round(settings, now.start, now.model.model, now.number / step.rounds)
    small = method.apply(now.model.model, settings, calibration).cpu()
    small.provenance[-1] |= told | ({} if step.budget is None else {"budget": step.budget})
    return small


def _strength(context: _Context, now: _Round, folder: Path, calibration: Calibration | None) -> dict[str, float]:
    """The settings that meet the budget, as noted in a round's folder; found for the model at hand where they are not."""
    method, noted = METHODS[now.step.method], folder / STRENGTH
    if not noted.is_file():
        found = _within(context, now, calibration)
        folder.mkdir(parents=True, exist_ok=True)
        fixed = {} if found.keep_coarse is None else {"keep_coarse": found.keep_coarse}
        write_json(noted, {"budget": now.step.budget, "keep": found.keep, **fixed, "cost": found.cost})
    values = read_json(noted)
    names = {"keep": method.strength, "keep_coarse": method.coarse}
    return {str(name): float(values[key]) for key, name in names.items() if key in values}


def _within(context: _Context, now: _Round, calibration: Calibration | None) -> Found:
    step, method, model, conditions = now.step, METHODS[now.step.method], now.model.model, context.pipeline.conditions
    assert step.budget is not None
    assert method.plan is not None
    budget, settings = parse_budget(step.budget), step.read()
    plan, least = method.plan(model, settings, calibration), method.least(model.config, settings)
    context.say(f"{now.folder.name}: how much can stay within {step.budget}")
    if budget.name == "latency_ms":
        return within_latency(plan, budget, stopwatch(model.config, conditions), least=least, say=context.say)
    cost = partial(size_of, name=budget.name, conditions=conditions)
    free = method.coarse is not None and getattr(settings, method.coarse) is None
    return within_size(plan, budget, cost, least=least, say=context.say, coarse=method.coarse if free else None)


def _calibration(context: _Context, now: _Round, device: str) -> tuple[Calibration, dict[str, Any]]:
    """Calibration speech on a device, and what the provenance tells of it."""
    assert context.corpus is not None
    config, method = context.pipeline.calibration, METHODS[now.step.method]
    corpus, labels = Corpus.open(context.corpus), None
    if method.looks_at_loss(now.step.read()):
        labels = config.labels or (None if now.step.recover is None else now.step.recover.labels)
        if labels is not None and config.labels is None and (missing := no_head_for(corpus.labels(labels), now.model.model)):
            context.say(f"note: scores compare the model with itself, not with labels {labels}: {missing}")
            labels = None
    reconstruct = False
    if method.looks_at_loss(now.step.read()):
        reconstruct = config.reconstruct or getattr(now.step.recover, "loss", None) == RECONSTRUCTION
    count = min(config.num_utterances, len(corpus))
    context.say(f"{now.folder.name}: looking at up to {count:,} utterances of {corpus.name}")
    common: dict[str, Any] = {"labels_name": labels, "reconstruct": reconstruct, "device": device}
    calibration = calibrate(now.model.model, context.corpus, config, **common)
    told = {"corpus": corpus.name, "num_utterances": count, "labels": labels}
    return calibration, {"calibration": told | ({"loss": RECONSTRUCTION} if reconstruct else {})}


def _note_reached(context: _Context, now: _Round, small: SpeechModel) -> None:
    """Notes beside the cut model what its budget has become, measured anew where it is one of latency."""
    noted, conditions = now.folder / REACHED, context.pipeline.conditions
    if noted.is_file():
        context.say(f"{now.folder.name}: {read_json(noted)['told']}")
        return
    assert now.step.budget is not None
    budget, facts = parse_budget(now.step.budget), {}
    if budget.name == "latency_ms":
        models = {"whole": context.whole.model.config, "cut": small.config}
        times = measure_whole(models, conditions, repeats=FINAL_ROUNDS, least_s=FINAL_S)
        reached, facts = times["cut"], {"latency_ms": times["cut"], "whole_latency_ms": times["whole"]}
    else:
        reached = size_of(small.config, budget.name, conditions)
    told = reached_in_words(reached, budget)
    write_json(noted, {"budget": now.step.budget, "reached": reached, "told": told, **facts})
    context.say(f"{now.folder.name}: {told}")


def _add_budget(rows: list[dict[str, Any]], folder: Path) -> None:
    """Adds to the last row what its budget has become, and to the first how long the whole model took beside it."""
    if not (folder / REACHED).is_file():
        return
    noted = read_json(folder / REACHED)
    rows[-1]["budget"] = {key: noted[key] for key in ("budget", "reached", "told")}
    if "latency_ms" in noted:
        rows[-1]["latency_ms"], rows[0]["latency_ms"] = noted["latency_ms"], noted["whole_latency_ms"]


def _without_new_heads(model: SpeechModel, whole: SpeechModel) -> SpeechModel:
    """Leaves out the heads that training added: maps to a teacher's layers are of no use afterwards."""
    kept = {name: head for name, head in model.config.heads.items() if name in whole.config.heads or name == PREDICTION_HEAD}
    if kept == model.config.heads:
        return model
    state = model.state_dict()
    bare = SpeechModel(replace(model.config, heads=kept), model.provenance)
    restore_statistics(bare, state)
    bare.load_state_dict({name: state[name] for name in bare.state_dict()}, strict=True)
    return bare.eval()
