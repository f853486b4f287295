"""A run that is killed again and again, by the same command each time, equals the run that nobody disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import sslim.training.state as state_module
from sslim.storage import load_tensors
from sslim.training import WALL_CLOCK_FIELDS
from toy_training import ToyBatches, toy_config, toy_trainer

TOY = Path(__file__).resolve().parents[1] / "toy_training.py"


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(TOY), str(folder), *options], env=environment, stderr=subprocess.PIPE, text=True
    )


def session(folder: Path, *options: str) -> tuple[int, str]:
    process = start(folder, *options)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def log(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in WALL_CLOCK_FIELDS} for line in lines]


def checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    toy_trainer(folder, toy_config()).run()
    return folder


def assert_equal_runs(folder: Path, expected: Path) -> None:
    last = Path("checkpoints/step-00000024")
    for name in (last / "objective.safetensors", last / "optimizer.safetensors", Path("model/model.safetensors")):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    assert log(folder) == log(expected)
    state, other = (json.loads((place / last / "trainer.json").read_text()) for place in (folder, expected))
    for volatile in ("elapsed_s", "log_bytes"):
        state.pop(volatile), other.pop(volatile)
    assert state == other


def test_kill_9_at_any_moment(tmp_path: Path, undisturbed: Path):
    folder = tmp_path / "run"
    assert session(folder, "--kill-at-key", "2,3")[0] == -signal.SIGKILL  # fetched ahead, at about step 7
    assert checkpoints(folder) == ["step-00000005"]

    assert session(folder, "--kill-in-save", "10")[0] == -signal.SIGKILL
    assert checkpoints(folder) == ["step-00000005"]
    assert list((folder / "checkpoints").glob(".step-00000010.*.tmp"))

    # From outside, at a moment nobody chose; the log has lines that no checkpoint covers, the last one cut short.
    process = start(folder, "--slow-s", "0.02")
    deadline = time.monotonic() + 60
    while not (folder / "checkpoints" / "step-00000015").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.1)
    process.kill()
    process.communicate()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "kind": "tra')

    # A torn newest checkpoint, as after a power cut.
    newest = folder / "checkpoints" / checkpoints(folder)[-1]
    tensors = newest / "objective.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-7])

    code, errors = session(folder)
    assert code == 0, errors
    assert f"checkpoint {newest.name} is torn and is not used" in errors
    assert not list((folder / "checkpoints").glob(".*"))
    assert_equal_runs(folder, undisturbed)
    assert len((folder / "sessions.jsonl").read_text().splitlines()) == 4


def test_sigterm_saves_within_a_step_and_the_same_command_goes_on(tmp_path: Path, undisturbed: Path):
    folder = tmp_path / "run"
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        before = max((int(name[5:]) for name in checkpoints(folder)), default=0)
        process = start(folder, "--slow-s", "0.15")
        sessions = folder / "sessions.jsonl"
        deadline = time.monotonic() + 60
        expected_lines = 1 if number == signal.SIGTERM else 2
        while not sessions.exists() or len(sessions.read_text().splitlines()) < expected_lines:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5)
        process.send_signal(number)
        sent = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert time.monotonic() - sent < 10
        assert int(checkpoints(folder)[-1][5:]) > before
        assert int(checkpoints(folder)[-1][5:]) < 24
        assert not (folder / "model").exists()
    assert session(folder)[0] == 0
    assert_equal_runs(folder, undisturbed)


def test_control_a_resumed_run_that_loses_its_optimiser_state_differs(tmp_path: Path, undisturbed: Path):
    """What the comparison above would catch."""
    folder = tmp_path / "run"

    def stop(key: tuple[int, int]) -> None:
        if key == (3, 3):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        toy_trainer(folder, toy_config(), ToyBatches(hook=stop)).run()
    assert checkpoints(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_module, "load_optimizer_state", lambda *a, **k: [])
        toy_trainer(folder, toy_config()).run()
    name = "checkpoints/step-00000024/objective.safetensors"
    ours, theirs = load_tensors(folder / name), load_tensors(undisturbed / name)
    assert any(not ours[key].equal(theirs[key]) for key in ours)
