"""A training with prunings inside: grows by what is put off, heeds a time limit and a signal, and tells what was pruned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sslim.checkpoints import load_model
from sslim.compress.weight_schedule import PruningSchedule
from sslim.compress.weights import WeightPruning, held_zeros, prune_weights
from sslim.config import from_plain, to_plain
from sslim.recipes.iterative_weights import IterativeWeights, train_and_prune, what_is_left
from sslim.recipes.pipeline import StepConfig
from sslim.recipes.recovery import RecoveryConfig
from sslim.training import TrainingResult
from toy_training import toy_config, toy_trainer
from weight_pruning_training import BIASED, SCHEDULE, toy_model, toy_prediction

NEVER_AT_REST = replace(SCHEDULE, tolerance=0.0, recovery_steps=3)  # prunings after 3, 13 and 23 updates, not 3, 8 and 13


class Toy:
    """Trains the toy model in a folder; ``asked`` are the lengths that were asked for."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self.settings, self.asked = folder, settings, []  # type: ignore[var-annotated]

    def __call__(self, total_steps: int, *, wrap: Any, write: Any) -> TrainingResult:
        self.asked.append(total_steps)
        model = toy_model()
        config = toy_config(total_steps=total_steps, save_every=100, validate_every=None, log_every=1, **self.settings)
        options = {"save_model": lambda place: write(model, place), "may_change": ("trainer.total_steps",)}
        return toy_trainer(self.folder, config, objective=wrap(toy_prediction(model)), **options).run()


def test_a_run_is_as_long_as_what_is_put_off_makes_it(tmp_path: Path) -> None:
    toy, said = Toy(tmp_path / "run"), []  # type: ignore[var-annotated]
    result = train_and_prune(toy, NEVER_AT_REST, BIASED, say=said.append)
    assert (result.step, result.finished) == (26, True)
    assert toy.asked == [16, 21, 26]
    model = load_model(tmp_path / "run" / "model")
    record = model.provenance[-1]
    assert [(each["update"], each["extensions"]) for each in record["prunings"]] == [(3, 0), (13, 1), (23, 1)]
    assert len([entry for entry in model.provenance if entry["step"] == "weights"]) == 1
    assert any(name.endswith(".bias") for name in held_zeros(model))
    assert said[-1] == "sparsity 0.8 after 26 updates"
    again = Toy(tmp_path / "run")  # when all is done
    assert train_and_prune(again, NEVER_AT_REST, BIASED, say=said.append).step == 26
    assert load_model(tmp_path / "run" / "model").provenance == model.provenance


def test_a_run_that_needs_no_more_is_as_long_as_planned(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "run")
    result = train_and_prune(toy, replace(NEVER_AT_REST, condition="normal"), BIASED, say=lambda _: None)
    assert (result.step, toy.asked) == (16, [16])


def test_a_time_limit_ends_it_and_what_is_missing_is_said(tmp_path: Path) -> None:
    toy, said = Toy(tmp_path / "run", max_minutes=1e-9), []  # type: ignore[var-annotated]
    result = train_and_prune(toy, NEVER_AT_REST, BIASED, say=said.append)
    assert (result.step, result.finished, toy.asked) == (1, True, [16])
    assert "3 of 3 prunings were not made" in said[-1]


def test_a_signal_ends_it_at_once() -> None:
    asked = []

    def interrupted(total_steps: int, *, wrap: Any, write: Any) -> TrainingResult:
        asked.append(total_steps)
        wrap(toy_prediction(toy_model()))
        return TrainingResult(step=5, finished=False, exit_code=143, skipped_steps=0, validation={})

    assert train_and_prune(interrupted, NEVER_AT_REST, BIASED, say=pytest.fail).exit_code == 143
    assert asked == [16]


def test_checkpoints_tell_what_was_pruned_so_far(tmp_path: Path) -> None:
    def train(total_steps: int, *, wrap: Any, write: Any) -> TrainingResult:
        model = toy_model()
        pruning = wrap(toy_prediction(model))
        write(model, tmp_path / "before")
        optimizer = torch.optim.Adam(nn.ParameterList(pruning.parameters()))
        for step in range(3):
            pruning.end_step(step, 1.0, optimizer)
        write(model, tmp_path / "after")
        assert not model.provenance  # its own list is not touched
        return TrainingResult(step=3, finished=False, exit_code=143, skipped_steps=0, validation={})

    train_and_prune(train, NEVER_AT_REST, BIASED)
    told = [load_model(tmp_path / name).provenance[-1]["prunings"] for name in ("before", "after")]
    assert [len(prunings) for prunings in told] == [0, 1]


def test_a_pruned_model_has_the_first_steps_behind_it() -> None:
    said: list[str] = []
    model = prune_weights(toy_model(), WeightPruning(sparsity=0.6, biases=True))
    assert what_is_left(SCHEDULE, BIASED, model, said.append).sparsities == (0.8,)
    assert "2 of 3 prunings are left out" in said[0]
    assert what_is_left(SCHEDULE, BIASED, toy_model(), pytest.fail) == SCHEDULE  # biases that begin at zero are no reason


def test_settings_survive_as_plain_values_and_have_one_place_for_the_end() -> None:
    schedule = PruningSchedule(sparsities=(0.5, 0.7), warm_up=10, period=10)
    settings = IterativeWeights(schedule=schedule, choice=BIASED, training=RecoveryConfig(steps=7, loss="logits"))
    assert from_plain(IterativeWeights, to_plain(settings)) == settings
    assert StepConfig(method="iterative-weights", settings=to_plain(settings)).read() == settings
    with pytest.raises(ValueError, match="recovery_steps of the schedule is 5"):
        IterativeWeights(schedule=replace(schedule, recovery_steps=5))
    with pytest.raises(ValueError, match="trains to its size in one go"):
        StepConfig(method="iterative-weights", settings=to_plain(settings), rounds=2)
