"""Weights pruned inside a training, from the command line and as a step of a pipeline, on a made corpus with labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_distil_logits import random_model
from test_pretrain import CLUSTERS, write_corpus

import sslim
from sslim.cli import main
from sslim.compress.weights import WeightPruning, held_zeros, prunable_weights, prune_weights, sparsity_of
from sslim.data.corpus import Corpus
from sslim.models import SpeechModel
from sslim.training import read_metrics

# The loss never rests, so the second pruning is put off once: prunings after 10 and 30 updates, not 10 and 20.
SCHEDULE = ["--schedule", "0.3,0.6", "--period", "10", "--condition", "converge", "--tolerance", "0", "--max-extensions", "1"]
TRAIN = ["--recover-steps", "12", "--labels", "made", "--learning-rate", "1e-3", "--batch-s", "8"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("iterative") / "corpus", 24)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("iterative") / "model"
    sslim.save_model(random_model(2, CLUSTERS, 5), folder)
    return folder


def run(*arguments: object) -> int:
    return main(["compress", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(corpus: Corpus, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("iterative") / "run"
    assert run("weights", model, *SCHEDULE, *TRAIN, "--biases", "--corpus", corpus.path, "--output", output) == 0
    return output


def count_zeros(net: SpeechModel) -> int:
    return sum(int((tensor == 0).sum()) for tensor in prunable_weights(net, biases=True).values())


def test_prunings_inside_one_training_that_grows_by_what_is_put_off(finished: Path) -> None:
    pruned = sslim.load_model(finished / "model")
    total = sum(tensor.numel() for tensor in prunable_weights(pruned, biases=True).values())
    assert count_zeros(pruned) == round(0.6 * total)
    assert [entry["step"] for entry in pruned.provenance] == ["pretrain", "weights"]
    record = pruned.provenance[-1]
    assert record["biases"] is True
    assert (record["schedule"]["average_length"], record["schedule"]["smooth_factor"]) == (6, 0.5)
    assert [(each["sparsity"], each["update"], each["extensions"]) for each in record["prunings"]] == [
        (0.3, 10, 0),
        (0.6, 30, 1),
    ]
    records = read_metrics(finished / "01-iterative-weights" / "training" / "metrics.jsonl", kind="train")
    assert records[-1]["step"] == 30 + 12
    at = {each["step"]: each for each in records}
    assert [round(at[step]["sparsity"], 2) for step in (10, 11, 30, 31)] == [0.0, 0.3, 0.3, 0.6]
    assert {each["lr"] for each in records[2:]} == {1e-3}  # what is put off must not find a rate that has gone down
    assert set(held_zeros(pruned)) >= {"encoder.blocks.0.feedforward.up.weight", "encoder.blocks.0.feedforward.up.bias"}
    described = json.loads((finished / "01-iterative-weights" / "training" / "run.json").read_text())["pruning"]
    assert described["schedule"] == record["schedule"]
    assert (described["schedule"]["sparsities"], described["choice"]["biases"]) == ([0.3, 0.6], True)


def test_it_is_said_that_zeros_save_no_time(
    corpus: Corpus, model: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("weights", model, *SCHEDULE, *TRAIN, "--biases", "--corpus", corpus.path, "--output", finished) == 0  # done
    said = " ".join(capsys.readouterr().out.split())
    assert "time does not change without a sparse kernel" in said
    rows = json.loads((finished / "compression.json").read_text())["rows"]
    assert [row["pruned_weights"] for row in rows] == [False, True]
    assert rows[1]["num_parameters"] == rows[0]["num_parameters"]
    assert rows[1]["num_nonzero"] < 0.7 * rows[0]["num_nonzero"]


def test_a_run_stopped_while_it_goes_on_ends_as_one_that_was_not(
    corpus: Corpus, model: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    training = output / "01-iterative-weights" / "training"
    assert sorted(path.name for path in (training / "checkpoints").iterdir()) == ["step-00000032", "step-00000042"]
    for lost in (output / "model", output / "01-iterative-weights" / "model", training / "checkpoints" / "step-00000042"):
        shutil.rmtree(lost)
    assert run("weights", model, *SCHEDULE, *TRAIN, "--biases", "--corpus", corpus.path, "--output", output) == 0
    assert "the run goes on to update 42" in capsys.readouterr().err
    want, got = (sslim.load_model(folder / "model") for folder in (finished, output))
    assert all(torch.equal(tensor, got.state_dict()[name]) for name, tensor in want.state_dict().items())
    assert got.provenance == want.provenance
    other = [*SCHEDULE[:1], "0.3,0.7", *SCHEDULE[2:]]  # the control: another schedule is another run
    assert run("weights", model, *other, *TRAIN, "--biases", "--corpus", corpus.path, "--output", output) == 2


def test_a_step_of_a_pipeline_and_equal_steps_to_a_sparsity(corpus: Corpus, model: Path, tmp_path: Path) -> None:
    """After heads, by distillation from the whole model; three prunings are as if they were listed."""
    plan = tmp_path / "plan.toml"
    plan.write_text(
        '[[step]]\nmethod = "heads"\nkeep = 0.5\n[[step]]\nmethod = "iterative-weights"\n'
        "schedule = {sparsities = [0.25, 0.5, 0.75], warm_up = 4, period = 4}\n"
        "training = {steps = 4, batch_s = 8.0}\n[[step]]\nmethod = 'quantize'\nkind = 'fp16'\n"
    )
    assert run(plan, model, "--corpus", corpus.path, "--output", tmp_path / "out") == 0
    small = sslim.load_model(tmp_path / "out" / "model")
    assert sparsity_of(small, biases=False) == pytest.approx(0.75, abs=1e-3)
    assert [entry["step"] for entry in small.provenance] == ["heads", "distil", "weights", "quantize"]
    listed = small.provenance[2]["prunings"]
    steps = ["--period", "4", "--recover-steps", "4", "--batch-s", "8", "--loss", "logits"]
    arguments = ["weights", model, "--sparsity", "0.75", "--prunings", "3", *steps, "--corpus", corpus.path]
    assert run(*arguments, "--output", tmp_path / "linear") == 0
    equal = sslim.load_model(tmp_path / "linear" / "model").provenance[-1]["prunings"]
    assert equal == listed


def test_a_pruned_model_goes_on_where_it_stands(
    corpus: Corpus, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = prune_weights(sslim.load_model(model), WeightPruning(sparsity=0.5))
    sslim.save_model(half, tmp_path / "half")
    common = ["--period", "4", "--recover-steps", "4", "--batch-s", "8", "--corpus", corpus.path]
    assert run("weights", tmp_path / "half", "--schedule", "0.3,0.5,0.7", *common, "--output", tmp_path / "out") == 0
    assert "2 of 3 prunings are left out" in capsys.readouterr().err
    pruned = sslim.load_model(tmp_path / "out" / "model")
    assert sparsity_of(pruned, biases=False) == pytest.approx(0.7, abs=1e-3)
    before, after = held_zeros(half), held_zeros(pruned)
    assert all((after[name] | ~mask).all() for name, mask in before.items())  # nothing comes back
    assert run("weights", tmp_path / "half", "--schedule", "0.3,0.5", *common, "--output", tmp_path / "none") == 2
    assert "nothing is left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "nothing says how many weights go"),
        (["--sparsity", "0.5", "--condition", "converge"], "--condition belongs to prunings inside a training"),
        (["--schedule", "0.5,0.3"], "expected one or more rising numbers"),
        (["--schedule", "half"], "--schedule is 'half'; expected sparsities such as 0.2,0.4,0.6"),
        (["--schedule", "0.5", "--sparsity", "0.5"], "leave out --sparsity 0.5"),
        (["--prunings", "3"], "--prunings divides --sparsity into equal steps"),
        (["--schedule", "0.5", "--rounds", "2"], "--rounds is 2"),
        (["--schedule", "0.5", "--period", "0"], "warm_up is 0; expected a number from 1"),
        (["--schedule", "0.5"], "name a corpus with --corpus"),
    ],
)
def test_bad_input_is_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert run("weights", model, *arguments, "--output", tmp_path / "out") == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
