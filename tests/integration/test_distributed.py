"""Two gloo processes under torchrun compute what one process does that accumulates twice as many micro-batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sslim.storage import load_tensors
from toy_training import toy_config, toy_trainer

TOY = Path(__file__).resolve().parents[1] / "toy_training.py"


def torchrun(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, str(TOY), str(folder), "--accumulate", "1", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def figures(folder: Path) -> list[tuple[str, float, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["kind"], r["loss"], r["masked_accuracy"]) for r in records]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    toy_trainer(folder, toy_config(accumulate=2)).run()
    return folder


def assert_close(folder: Path, alone: Path) -> None:
    ours, theirs = figures(folder), figures(alone)
    assert [kind for kind, _, _ in ours] == [kind for kind, _, _ in theirs]
    for (_, loss, accuracy), (_, other_loss, other_accuracy) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-6)
        assert accuracy == pytest.approx(other_accuracy, rel=1e-6)
    name = "checkpoints/step-00000024/objective.safetensors"
    a, b = load_tensors(folder / name), load_tensors(alone / name)
    for key in a:
        assert (a[key] - b[key]).abs().max() < 1e-5, key


def test_two_processes_equal_one_that_accumulates_twice_as_many(tmp_path: Path, alone: Path):
    """Killed on the way: one process's death takes the other along, and the same command resumes both."""
    folder = tmp_path / "run"
    killed = torchrun(folder, "--kill-at-key", "4,3")
    assert killed.returncode != 0
    assert (folder / "checkpoints" / "step-00000010").exists()
    resumed = torchrun(folder)
    assert resumed.returncode == 0, resumed.stderr
    assert_close(folder, alone)


def test_control_one_process_with_half_the_micro_batches_differs(tmp_path: Path, alone: Path):
    toy_trainer(tmp_path / "run", toy_config(accumulate=1)).run()
    with pytest.raises(AssertionError):
        assert_close(tmp_path / "run", alone)
