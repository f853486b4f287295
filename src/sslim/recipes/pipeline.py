"""Compression as a pipeline: steps that cut a model, each followed by training if asked for, resumable at any of them.

A single method is a pipeline of one step, an iterative one a step with several rounds. The output folder holds for every
round the model as it was cut and the run that trained it again, at the end ``model/`` and ``compression.json``, the table of
what each round bought. Running the same command again goes on where it stopped.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sslim.checkpoints import load_model, save_model
from sslim.compress.budgets import parse_budget
from sslim.compress.methods import METHODS
from sslim.compress.strength import keep_for_budget, model_cost
from sslim.config import ConfigError, from_plain, nearest, read_json, to_plain
from sslim.models import SpeechModel
from sslim.models.speech import restore_statistics
from sslim.profiling import Conditions
from sslim.recipes.calibration import CalibrationConfig, calibrate
from sslim.recipes.compression_folder import claim
from sslim.recipes.compression_table import outcome, row_of, write_table
from sslim.recipes.distil import NamedTeacher, load_teacher
from sslim.recipes.pretrain import HEAD as PREDICTION_HEAD
from sslim.recipes.recovery import RecoveryConfig, recover
from sslim.recipes.trained_methods import TRAINED_METHODS
from sslim.storage import write_json
from sslim.training import TrainingResult

ALL = (*METHODS, *TRAINED_METHODS)


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """One step of a pipeline.

    Attributes:
        method: One of ``METHODS`` or ``TRAINED_METHODS``.
        settings: What the method is told, by the names of its settings; checked when the pipeline is read.
        rounds: Cuts that lead to the strength asked for, by equal factors, each followed by training.
        budget: Finds the strength in place of the settings' own: ``params=25M``, ``macs=2G`` or ``latency_ms=12``.
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
            if method.least is None:
                raise ValueError(f"{self.method} changes no parameters, MACs or latency bit by bit: it cannot meet a budget")
            parse_budget(self.budget)
        settings = self.read()
        if self.rounds > 1 and (method.strength is None or getattr(settings, method.strength) is None):
            raise ValueError(
                f"{self.method} has {self.rounds} rounds, which need {method.strength or 'a share'} to be divided up"
            )
        if method.final and self.recover is not None:
            raise ValueError(f"a model cannot be trained after {self.method}: set recover to false")

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
        """Returns the method's settings; with a budget its strength stands at "nothing removed"."""
        if self.method in TRAINED_METHODS:
            return from_plain(TRAINED_METHODS[self.method].settings, self.settings, self.method)
        method, values = METHODS[self.method], dict(self.settings)
        if self.budget is not None and method.strength is not None:
            if method.strength in values:
                raise ValueError(f"{self.method} has both a budget and {method.strength}: give one")
            values[method.strength] = 1.0
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
    ``rounds``, ``budget`` and ``recover`` is one of the method's settings.

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
    common = values.pop("recover", None)
    steps = values.pop("step", [])
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ConfigError(f"{path}: steps are tables; write each as [[step]]")
    plain: list[Any] = [_plain_step(step, common, f"{path.name}: step {number}") for number, step in enumerate(steps, 1)]
    return from_plain(Pipeline, {**values, "steps": plain}, path.name)


def _plain_step(step: dict[str, Any], common: dict[str, Any] | None, where: str) -> dict[str, Any]:
    known: dict[str, Any] = {key: step[key] for key in ("method", "rounds", "budget") if key in step}
    if "method" not in known:
        raise ConfigError(f"{where} lacks the key 'method'; there are {', '.join(ALL)}")
    own = step.get("recover", {})
    if own is True:
        own = {}
    recover = None if own is False or (common is None and "recover" not in step) else {**(common or {}), **own}
    if "recover" not in step and known["method"] in METHODS and METHODS[known["method"]].final:
        recover = None
    settings = {key: value for key, value in step.items() if key not in ("method", "rounds", "budget", "recover")}
    return {**known, "settings": settings, "recover": recover}


@dataclass(frozen=True, kw_only=True)
class _Context:
    """What all rounds of a pipeline share."""

    pipeline: Pipeline
    whole: NamedTeacher
    corpus: Path | None
    output: Path
    say: Callable[[str], None]


def compress(
    pipeline: Pipeline,
    model_path: Path,
    corpus_folder: Path | None,
    output: Path,
    *,
    say: Callable[[str], None] = print,
) -> TrainingResult | None:
    """Runs a pipeline, or goes on with what ``output`` holds; the result is then in ``output/model``.

    Args:
        pipeline: The steps.
        model_path: Any model that ``load_model`` reads, or a run folder.
        corpus_folder: A prepared corpus, for steps that look at speech or train.
        output: Folder of the pipeline.
        say: Where notes for the user go.

    Returns:
        None when all is done; the result of the training that a signal or the like ended early.

    Raises:
        ValueError: A step needs a corpus and there is none; the folder holds another pipeline; a method cannot do what it is
            asked for.
    """
    for step in pipeline.steps:
        if corpus_folder is None and step.needs_speech:
            raise ValueError(f"{step.method} trains or looks at speech: name a corpus with --corpus")
    whole = load_teacher(model_path)
    claim(output, "pipeline", to_plain(pipeline), whole, corpus_folder)
    context = _Context(pipeline=pipeline, whole=whole, corpus=corpus_folder, output=output, say=say)
    model, rows = whole.model, [row_of("whole", whole.model, pipeline.conditions)]
    number = 0
    for step in pipeline.steps:
        targets = _strengths(context, step, model)
        for strength in targets:
            number += 1
            folder = output / f"{number:02d}-{step.method}"
            interrupted = _round(context, step, strength, model, folder)
            if interrupted is not None:
                return interrupted
            model = load_model(folder / "model")
            rows.append(row_of(folder.name, model, pipeline.conditions))
            write_table(output, rows)
    save_model(_without_new_heads(model, whole.model), output / "model")
    return None


def _strengths(context: _Context, step: StepConfig, model: SpeechModel) -> list[float | None]:
    """The share that every round keeps of the model it is given; None where the settings alone decide."""
    settings = step.read()
    if step.method in TRAINED_METHODS or METHODS[step.method].strength is None:
        return [None]
    method = METHODS[step.method]
    assert method.strength is not None
    keep = getattr(settings, method.strength)
    noted = context.output / f"{context.pipeline.steps.index(step) + 1}-{step.method}-strength.json"
    if step.budget is not None:
        if not noted.is_file():
            write_json(noted, {"keep": _within(context, step, model)})
        keep = read_json(noted)["keep"]
    if keep is None:
        return [None]
    return [method.after_rounds(keep, done, step.rounds) for done in range(1, step.rounds + 1)]


def _within(context: _Context, step: StepConfig, model: SpeechModel) -> float:
    """The share that a budget leaves."""
    method, settings, conditions = METHODS[step.method], step.read(), context.pipeline.conditions
    assert step.budget is not None
    assert method.strength is not None
    assert method.least is not None
    name, budget = method.strength, parse_budget(step.budget)
    calibration = _calibration(context, step, model)
    found = keep_for_budget(
        lambda keep: method.apply(model, replace(settings, **{name: keep}), calibration),
        budget,
        lambda candidate: model_cost(candidate, budget.name, conditions),
        least=method.least(model.config),
        say=context.say,
    )
    context.say(f"{step.method}: {name} {found.keep:.3f} meets {step.budget}")
    return found.keep


def _calibration(context: _Context, step: StepConfig, model: SpeechModel) -> Any:
    if not METHODS[step.method].looks_at_speech(step.read()):
        return None
    assert context.corpus is not None
    labels = None if step.recover is None else step.recover.labels
    return calibrate(model, context.corpus, context.pipeline.calibration, labels_name=labels)


def _round(
    context: _Context, step: StepConfig, strength: float | None, model: SpeechModel, folder: Path
) -> TrainingResult | None:
    """Cuts and trains, unless that is done; ``folder/model`` is the result."""
    if (folder / "model").is_dir():
        return None
    cut = folder / "cut"
    if step.method in TRAINED_METHODS:
        assert context.corpus is not None
        train, given = TRAINED_METHODS[step.method].train, NamedTeacher(model=model, name=folder.name)
        trained = train(step.read(), given, context.whole, context.corpus, folder / "training", say=context.say)
        if not trained.finished:
            return trained
        cut = folder / "training" / "model"
    elif not cut.is_dir():
        save_model(_cut(context, step, strength, model), cut)
    small = load_model(cut)
    context.say(f"{folder.name}: {outcome(model, small)}")
    if step.recover is None:
        save_model(small, folder / "model")
        return None
    assert context.corpus is not None
    result = recover(small, context.whole, context.corpus, folder / "recovery", step.recover, say=context.say)
    if not result.finished:
        return result
    save_model(load_model(folder / "recovery" / "model"), folder / "model")
    return None


def _cut(context: _Context, step: StepConfig, strength: float | None, model: SpeechModel) -> SpeechModel:
    method, settings = METHODS[step.method], step.read()
    if strength is not None and method.strength is not None:
        settings = replace(settings, **{method.strength: strength})
    return method.apply(model, settings, _calibration(context, step, model))


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
