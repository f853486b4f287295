"""Once-for-all training: one subnet for a step on all processes, exact resumption, and what the sandwich rule adds up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sslim.batch import StepOutput
from sslim.models.search_space import Subnet
from sslim.objectives import MaskedPrediction, MaskedPredictionConfig
from sslim.objectives.once_for_all import OnceForAll, OnceForAllConfig
from sslim.storage import load_tensors
from supernet_training import SPACE, STEPS, supernet_objective, supernet_trainer
from toy_training import ToyBatches

SCRIPT = Path(__file__).resolve().parents[1] / "supernet_training.py"
LAST = f"checkpoints/step-{STEPS:08d}/objective.safetensors"


class Recorded(OnceForAll):
    """Writes down the subnets of every step."""

    chosen: list[tuple[Subnet, ...]]

    def begin_step(self, step: int, generator: torch.Generator) -> None:
        super().begin_step(step, generator)
        self.chosen.append(self.subnets)


def recorded() -> Recorded:
    inner = supernet_objective().objective
    objective = Recorded(inner, OnceForAllConfig())
    objective.chosen = []
    return objective


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[Subnet, ...]]]:
    folder, objective = tmp_path_factory.mktemp("supernet") / "run", recorded()
    supernet_trainer(folder, objective).run()
    return folder, objective.chosen


def largest_difference(folder: Path, other: Path) -> float:
    a, b = load_tensors(folder / LAST), load_tensors(other / LAST)
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def test_steps_have_different_subnets_of_all_depths(alone: tuple[Path, list[tuple[Subnet, ...]]]) -> None:
    _, chosen = alone
    assert len(chosen) == STEPS
    assert all(len(subnets) == 1 and SPACE.contains(subnets[0]) for subnets in chosen)
    assert {subnets[0].num_layers for subnets in chosen} == {1, 2, 3}


def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path: Path, alone: tuple[Path, list[tuple[Subnet, ...]]]) -> None:
    def crash(key: tuple[int, int]) -> None:
        if key == (1, 6):  # step 6, after the checkpoint of step 4
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        supernet_trainer(tmp_path / "run", recorded(), hook=crash).run()
    objective = recorded()
    supernet_trainer(tmp_path / "run", objective).run()
    folder, chosen = alone
    assert 0 < len(objective.chosen) < STEPS
    assert objective.chosen == chosen[-len(objective.chosen) :]
    assert largest_difference(tmp_path / "run", folder) == 0.0


def test_two_processes_train_the_same_subnets_as_one(tmp_path: Path, alone: tuple[Path, list[tuple[Subnet, ...]]]) -> None:
    """Dropped layers have no gradient on either process, cut ones zeros; two processes equal one that accumulates twice."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(SCRIPT),
            str(tmp_path / "r"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert largest_difference(tmp_path / "r", alone[0]) < 1e-5
    other = recorded()
    other.begin_step = lambda step, _: OnceForAll.begin_step(other, step, torch.Generator().manual_seed(99 + step))  # type: ignore[method-assign]
    supernet_trainer(tmp_path / "control", other).run()
    assert largest_difference(tmp_path / "control", alone[0]) > 1e-3  # the control: other subnets


def step(objective: OnceForAll, subnets: tuple[Subnet, ...]) -> tuple[StepOutput, dict[str, torch.Tensor]]:
    objective.train().supernet.eval()  # no dropout: then runs can be compared
    objective.subnets = subnets
    prepared = objective.prepare(ToyBatches()[0, 0], torch.Generator().manual_seed(1))
    objective.zero_grad()
    output = objective(prepared, prepared.weights)
    output.loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in objective.named_parameters()}
    return output, gradients


def test_the_sandwich_rule_averages_gradients_of_largest_smallest_and_random() -> None:
    objective = supernet_objective(sandwich=2)
    objective.begin_step(0, torch.Generator().manual_seed(0))
    subnets = objective.subnets
    assert subnets[:2] == (SPACE.largest(), SPACE.smallest())
    assert len(subnets) == 4
    together, gradients = step(objective, subnets)
    single = [step(objective, (subnet,)) for subnet in subnets]
    torch.testing.assert_close(together.loss, torch.stack([output.loss for output, _ in single]).mean())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, torch.stack([g[name] for _, g in single]).mean(0), atol=1e-6, rtol=1e-4)
    total, count = together.metrics["masked_loss"]
    assert count == 4 * single[0][0].metrics["masked_loss"][1]
    assert total == pytest.approx(float(sum(output.metrics["masked_loss"][0] for output, _ in single)))


def test_the_largest_subnet_is_the_plain_objective() -> None:
    objective = supernet_objective()
    output, gradients = step(objective, (SPACE.largest(),))
    prepared = objective.prepare(ToyBatches()[0, 0], torch.Generator().manual_seed(1))
    objective.zero_grad()
    plain = objective.objective(prepared, prepared.weights)
    plain.loss.backward()
    torch.testing.assert_close(output.loss, plain.loss)
    for name, parameter in objective.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)
    smallest, _ = step(objective, (SPACE.smallest(),))
    assert (smallest.loss - plain.loss).abs() > 1e-3  # the control


def test_validation_tells_the_largest_and_the_smallest_apart() -> None:
    objective = supernet_objective().eval()
    prepared = objective.prepare(ToyBatches()[0, 0], torch.Generator().manual_seed(1))
    metrics = objective(prepared, prepared.weights).metrics
    assert metrics["max_masked_loss"] == metrics["masked_loss"]
    assert metrics["min_masked_loss"][0] != metrics["max_masked_loss"][0]


def test_what_cannot_be_trained_is_refused() -> None:
    inner = supernet_objective().objective
    assert isinstance(inner, MaskedPrediction)
    with pytest.raises(RuntimeError, match="begin_step"):
        supernet_objective().train()(None, {})
    inner.model.config = type(inner.model.config)(**{**vars(inner.model.config), "search_space": None})
    with pytest.raises(ValueError, match="this toy model is no supernet: it has no search space"):
        OnceForAll(MaskedPrediction(inner.model, MaskedPredictionConfig(mask_at="projection")), OnceForAllConfig())
    with pytest.raises(ValueError, match="sandwich is -1"):
        OnceForAllConfig(sandwich=-1)
