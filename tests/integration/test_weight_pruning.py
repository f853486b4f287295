"""Iterative weight pruning under the trainer: exact resumption, the same masks on two processes, ordinary models saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sslim.checkpoints import load_model
from sslim.compress.weight_schedule import Progress
from sslim.compress.weights import IterativeWeightPruning, WeightPruning, held_zeros, prunable_weights, prune_weights
from sslim.storage import load_tensors
from sslim.training import WALL_CLOCK_FIELDS, read_metrics
from toy_training import ToyBatches, ToyObjective, toy_config, toy_trainer
from weight_pruning_training import MODEL, SCHEDULE, STEPS, pruning_objective, pruning_trainer, toy_model

SCRIPT = Path(__file__).resolve().parents[1] / "weight_pruning_training.py"
LAST = f"checkpoints/step-{STEPS:08d}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, IterativeWeightPruning]:
    folder, objective = tmp_path_factory.mktemp("weights") / "run", pruning_objective()
    pruning_trainer(folder, objective).run()
    return folder, objective


def log(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in WALL_CLOCK_FIELDS} for record in read_metrics(folder)]


def masks_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_tensors(path).items() if name.startswith("masks.")}


def test_the_list_is_done_and_the_folder_holds_an_ordinary_model(alone: tuple[Path, IterativeWeightPruning]) -> None:
    folder, objective = alone
    prunings = objective.record()["prunings"]
    assert [entry["sparsity"] for entry in prunings] == [0.3, 0.6, 0.8]
    assert [entry["update"] for entry in prunings] != [3, 8, 13]  # a check was put off: the rule was at work
    assert sum(entry["extensions"] for entry in prunings) * SCHEDULE.period + 13 == prunings[-1]["update"]
    assert objective.steps_needed == prunings[-1]["update"] <= STEPS
    model = load_model(folder / "model")
    assert model.config == MODEL
    assert model.state_dict().keys() == toy_model().state_dict().keys()
    weights = prunable_weights(model, biases=True)
    total = sum(tensor.numel() for tensor in weights.values())
    assert sum(int((tensor == 0).sum()) for tensor in weights.values()) == round(0.8 * total)
    stored = load_tensors(folder / "model" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in stored.items()} == {k: v.shape for k, v in toy_model().state_dict().items()}
    sparsities = {record["step"]: record["sparsity"] for record in read_metrics(folder, "train")}
    at = [entry["update"] for entry in prunings]
    assert [round(sparsities[update], 2) for update in at] == [0.0, 0.3, 0.6]  # what the step itself ran with
    assert sparsities[STEPS] == pytest.approx(0.8, abs=1 / total)


def interrupted(folder: Path, key: tuple[int, int]) -> None:
    def crash(asked: tuple[int, int]) -> None:
        if asked == key:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        pruning_trainer(folder, pruning_objective(), hook=crash).run()


@pytest.mark.parametrize("key", [(1, 4), (2, 1), (4, 2)])
def test_an_interrupted_run_ends_as_one_that_was_not(
    tmp_path: Path, alone: tuple[Path, IterativeWeightPruning], key: tuple[int, int]
) -> None:
    """Between prunings, while smoothed losses build up and a check is put off: bit for bit."""
    interrupted(tmp_path / "run", key)
    assert not (tmp_path / "run" / LAST).exists()
    objective = pruning_objective()
    pruning_trainer(tmp_path / "run", objective).run()
    for name in (f"{LAST}/objective.safetensors", f"{LAST}/optimizer.safetensors", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (alone[0] / name).read_bytes(), name
    assert log(tmp_path / "run") == log(alone[0])
    assert objective.record() == alone[1].record()


def test_control_a_run_that_forgets_its_progress_ends_otherwise(
    tmp_path: Path, alone: tuple[Path, IterativeWeightPruning], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "run", (2, 1))
    objective, forgotten = pruning_objective(), []

    def forget(numbers: list[float]) -> Progress:
        if not forgotten:
            forgotten.append(numbers)
            return SCHEDULE.start()
        return whole(numbers)

    whole = Progress.from_numbers
    monkeypatch.setattr(Progress, "from_numbers", forget)
    pruning_trainer(tmp_path / "run", objective).run()
    assert objective.record() != alone[1].record()


def test_two_processes_have_the_masks_of_one_that_accumulates_twice(
    tmp_path: Path, alone: tuple[Path, IterativeWeightPruning]
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (tmp_path / "run" / f"rank-{rank}.safetensors" for rank in (0, 1))
    assert first.read_bytes() == second.read_bytes()
    expected = masks_of(alone[0] / LAST / "objective.safetensors")
    ours = masks_of(tmp_path / "run" / LAST / "objective.safetensors")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert any(mask.any() for mask in ours.values())
    assert torch.equal(load_tensors(first)["history"], alone[1].history)
    pruning_trainer(tmp_path / "control", pruning_objective(), accumulate=1).run()  # the control: half the speech
    other = masks_of(tmp_path / "control" / LAST / "objective.safetensors")
    assert any(not torch.equal(other[name], expected[name]) for name in expected)


def test_a_longer_run_goes_on_where_the_list_was_not_done(tmp_path: Path) -> None:
    """What puts off a pruning makes the run longer: the same folder, more updates."""
    objective, steps, sessions = pruning_objective(), SCHEDULE.planned_steps, 0
    while objective.steps_needed > steps or not sessions:
        steps, sessions = objective.steps_needed, sessions + 1
        objective = pruning_objective()
        pruning_trainer(tmp_path / "run", objective, steps=steps, may_change=("trainer.total_steps",)).run()
        assert (objective.shortfall is None) is (objective.steps_needed <= steps)
    assert sessions > 1
    assert objective.shortfall is None
    assert objective.record()["prunings"][-1]["update"] == steps == objective.steps_needed


def test_recovery_keeps_the_zeros_of_a_pruned_model(tmp_path: Path) -> None:
    pruned = prune_weights(toy_model(), WeightPruning(sparsity=0.5))
    before, values = held_zeros(pruned), pruned.state_dict()
    values = {name: tensor.clone() for name, tensor in values.items()}
    pruning_trainer(tmp_path / "run", pruning_objective(None, pruned)).run()
    model = load_model(tmp_path / "run" / "model")
    after = held_zeros(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], mask) for name, mask in before.items())
    assert not torch.equal(
        model.state_dict()["encoder.blocks.0.attention.query.weight"], values["encoder.blocks.0.attention.query.weight"]
    )


class Listener(ToyObjective):
    """Writes down what the trainer says after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[int, float]] = []

    def end_step(self, step: int, loss: float, optimizer: torch.optim.Optimizer) -> None:
        assert isinstance(optimizer.state[next(self.parameters())]["exp_avg"], torch.Tensor)
        self.heard.append((step, loss))


def test_the_trainer_tells_the_loss_of_every_step_that_updated(tmp_path: Path) -> None:
    objective, batches = Listener(), ToyBatches()
    batches.poison[0, 4] = float("nan")  # in the third step
    toy_trainer(tmp_path / "run", toy_config(total_steps=8, log_every=1), batches, objective=objective).run()
    logged = {record["step"]: record.get("loss") for record in read_metrics(tmp_path / "run", "train")}
    assert [step for step, _ in objective.heard] == [0, 1, 3, 4, 5, 6, 7]
    assert logged[3] is None
    for step, loss in objective.heard:
        assert loss == pytest.approx(logged[step + 1], rel=1e-12)
    events = [record for record in read_metrics(tmp_path / "run", "event") if record["event"] == "non_finite"]
    assert [record["step"] for record in events] == [2]


def test_control_an_objective_without_the_method_is_trained_as_before(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "plain", toy_config(total_steps=8), objective=ToyObjective()).run()
    toy_trainer(tmp_path / "heard", toy_config(total_steps=8), objective=Listener()).run()
    plain, heard = (load_tensors(tmp_path / name / "model" / "model.safetensors") for name in ("plain", "heard"))
    assert all(torch.equal(plain[name], heard[name]) for name in plain)
