"""Compression under ``torchrun``: two processes give what one gives that accumulates twice as much; only the first writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_compress_command import corpus, model  # noqa: F401
from test_compression_yaml_runs import CHECKPOINT, HEADS, MODEL, RUNNER
from test_pretrain import write_reference_layout

import sslim
from sslim.cli import main
from sslim.data.corpus import Corpus

PLAN = """
[calibration]
num_utterances = 8
[recover]
steps = 8
batch_s = 4.0
accumulate = {accumulate}
learning_rate = 1e-3
[[step]]
method = "heads"
keep = 0.5
rounds = 2
score = "data"
[[step]]
method = "width"
budget = "macs={macs}"
recover = false
[[step]]
method = "iterative-weights"
schedule = {{sparsities = [0.3, 0.5], warm_up = 3, period = 3}}
training = {{steps = 4, batch_s = 4.0, accumulate = {accumulate}, learning_rate = 1e-3}}
recover = false
"""
# Runs sslim and notes every file that a process other than the first opens to write, or renames, in the folder of the result.
WATCHED = """
import os, sys
from pathlib import Path
output, noted = sys.argv[sys.argv.index("--output") + 1], open(sys.argv.pop(1) + "-" + os.environ["RANK"], "w")
def hook(event, arguments):
    writes = event == "os.rename" or (event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
    if writes and str(arguments[0]).startswith(output):
        print(event, arguments[0], file=noted, flush=True)
sys.addaudithook(hook)
from sslim.cli import main
sys.exit(main(sys.argv[1:]))
"""


def torchrun(folder: Path, *arguments: object) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Runs ``sslim compress`` in two processes; also returns what each of them wrote."""
    script, noted = folder / "watched.py", folder / "noted"
    script.write_text(WATCHED)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        script,
        noted,
        "compress",
    ]
    result = subprocess.run(
        [str(word) for word in (*launcher, *arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,  # on a busy machine
        check=False,
    )
    return result, [Path(f"{noted}-{rank}").read_text().splitlines() for rank in range(2)]


def assert_same_result(ours: Path, theirs: Path) -> None:
    """Same files, same table, same notes, tensors to rounding."""
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) for folder in (ours, theirs)]
    assert files[0] == files[1]
    tables = [json.loads((folder / "compression.json").read_text()) for folder in (ours, theirs)]
    assert tables[0] == tables[1]
    small, whole = (sslim.load_model(folder / "model") for folder in (ours, theirs))
    assert small.provenance == whole.provenance
    for name, tensor in whole.state_dict().items():
        assert (tensor - small.state_dict()[name]).abs().max() < 1e-4, name


@pytest.fixture(scope="module")
def plan_of(model: Path, tmp_path_factory: pytest.TempPathFactory):  # noqa: F811
    folder = tmp_path_factory.mktemp("plans")
    macs = 0.7 * sslim.profiling.count_macs(sslim.load_model(model).config, seconds=10.0).per_second

    def write(accumulate: int) -> Path:
        path = folder / f"{accumulate}.toml"
        path.write_text(PLAN.format(accumulate=accumulate, macs=macs))
        return path

    return write


def test_two_processes_compress_like_one(corpus: Corpus, model: Path, plan_of, tmp_path: Path) -> None:  # noqa: F811
    common, output = (model, "--corpus", corpus.path, "--output"), tmp_path / "two"
    result, written = torchrun(tmp_path, "pipeline", plan_of(1), *common, output)
    assert result.returncode == 0, result.stderr
    assert written[0]
    assert not written[1]
    told = [line for line in result.stderr.splitlines() if "parameters before" in line]
    assert len(told) == 4  # each cut once, by one process
    assert result.stdout.count("GMAC / s") == 1
    for name, accumulate in (("one", 2), ("less", 1)):
        assert main(["compress", "pipeline", *map(str, (plan_of(accumulate), *common, tmp_path / name))]) == 0
    assert_same_result(output, tmp_path / "one")
    with pytest.raises(AssertionError):  # the control: half the micro-batches
        assert_same_result(output, tmp_path / "less")
    again, written = torchrun(tmp_path, "pipeline", plan_of(1), *common, output)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done before") == 4
    assert not written[1]


def test_two_processes_run_the_reference_files_like_one(tmp_path: Path) -> None:
    csv = write_reference_layout(tmp_path / "reference")
    files = tmp_path / "model.yaml", tmp_path / "runner.yaml"
    files[0].write_text(MODEL)
    runs = {}
    for name, accumulate in (("two", 1), ("one", 2)):
        text = RUNNER.replace("{steps}", "10").replace("{csv}", str(csv)) + HEADS
        text = text.replace("train_batch_size: 4", "train_batch_size: 3")
        files[1].write_text(text.replace("gradient_accumulate_steps: 1", f"gradient_accumulate_steps: {accumulate}"))
        runs[name] = ["yaml", *files, CHECKPOINT, "--output", tmp_path / name]
        if name == "two":
            result, written = torchrun(tmp_path, *runs[name])
            assert result.returncode == 0, result.stderr
            assert not written[1]
            assert result.stdout.count("GMAC / s") == 1
    assert main(["compress", *map(str, runs["one"])]) == 0
    assert_same_result(tmp_path / "two", tmp_path / "one")


def test_a_mistake_ends_all_processes(model: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    result, _ = torchrun(tmp_path, "rows", model, "--keep", "0.5", "--output", tmp_path / "out")
    assert result.returncode != 0
    assert result.stderr.count("is not empty and holds no compression") == 1
