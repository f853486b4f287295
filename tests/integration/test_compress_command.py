"""``sslim compress METHOD`` from end to end on a made corpus: cuts, trains again, goes on, and says what was bought."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sslim
from sslim.cli import main
from sslim.data.corpus import Corpus
from sslim.data.prepare import prepare
from sslim.data.sources import Source, SourceUtterance
from sslim.frontends import NormalizationConfig
from sslim.models import build_model
from sslim.models.melhubert import melhubert, melhubert_frontend
from sslim.training import read_metrics

SMALL = {"num_layers": 3, "dim": 32, "num_heads": 4, "feedforward_dim": 64, "conv_kernel_size": 16, "conv_groups": 4}
TRAIN = ("--recover-steps", "30", "--learning-rate", "1e-3", "--batch-s", "8")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Features whose loud bands change every 200 ms."""

    def read(i: int) -> np.ndarray:
        rng = np.random.default_rng(i)
        bands = np.repeat(rng.integers(0, 6, 12), 20)[: 120 + 20 * (i % 7)]
        return (rng.normal(0, 0.5, (len(bands), 40)) + 4 * (np.arange(40) // 7 == bands[:, None])).astype(np.float32)

    utterances = [SourceUtterance(id=f"utt{i}", read_features=lambda i=i: read(i)) for i in range(24)]  # type: ignore[misc]
    source = Source(name="made", utterances=utterances, num_utterances=24, frontend=melhubert_frontend(10))
    return prepare(source, tmp_path_factory.mktemp("compress") / "corpus").corpus


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = melhubert(dropout=0.0, **SMALL)  # type: ignore[arg-type]
    assert config.frontend is not None
    frontend = replace(config.frontend, normalization=NormalizationConfig(kind="utterance", eps=1e-3))
    made = build_model(replace(config, frontend=frontend, heads={}), torch.Generator().manual_seed(5))
    for block in made.encoder.blocks:  # so that layers differ clearly
        for parameter in block.parameters():
            parameter.data *= 4.0
    folder = tmp_path_factory.mktemp("compress") / "model"
    sslim.save_model(made, folder)
    return folder


def run(*arguments: object) -> int:
    return main(["compress", *map(str, arguments)])


@pytest.mark.parametrize(
    "method",
    [
        ("heads", "--keep", "0.5", "--score", "data"),
        ("rows", "--keep", "0.25", "--scope", "model", "--score", "data"),
        ("width", "--keep", "0.5", "--rounds", "2"),
        ("depth", "--num-layers", "2"),
        ("sharing", "--num-blocks", "1"),
        ("low-rank", "--params", "0.6", "--whiten"),
        ("weights", "--sparsity", "0.8"),
    ],
    ids=lambda method: method[0],
)
def test_training_recovers_what_a_cut_lost(
    corpus: Corpus, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    assert run(method[0], model, *method[1:], "--corpus", corpus.path, "--output", out, *TRAIN) == 0
    rounds = sorted(path for path in out.iterdir() if path.name[0] == "0")
    losses = [r["loss"] for r in read_metrics(rounds[-1] / "recovery" / "metrics.jsonl", kind="train")]
    assert losses[-1] < losses[0]
    small, whole = sslim.load_model(out / "model"), sslim.load_model(model)
    rows = json.loads((out / "compression.json").read_text())["rows"]
    assert rows[-1]["num_nonzero"] < 0.9 * rows[0]["num_nonzero"]
    assert [entry["step"] for entry in small.provenance] == [method[0], "distil"] * len(rounds)
    assert small.num_parameters() <= whole.num_parameters()
    said = capsys.readouterr()
    assert ("zeros are multiplied" in said.out) is (method[0] == "weights")
    if method[0] == "weights":
        pruned = sslim.load_model(rounds[0] / "cut").state_dict()
        zeros = {name: tensor == 0 for name, tensor in pruned.items() if name.endswith(("up.weight", "query.weight"))}
        assert all((small.state_dict()[name][mask] == 0).all() for name, mask in zeros.items())
        assert any((small.state_dict()[name] != pruned[name]).any() for name in zeros)  # the control: the others moved


def test_a_killed_pipeline_goes_on_to_the_same_model(corpus: Corpus, model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(
        '[recover]\nsteps = 60\nbatch_s = 8.0\n[[step]]\nmethod = "heads"\nkeep = 0.5\n[[step]]\nmethod = "rows"\nkeep = 0.5\n'
    )
    arguments = [str(plan), str(model), "--corpus", str(corpus.path), "--output"]
    assert run(*arguments, tmp_path / "whole") == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sslim", "compress", *arguments, str(tmp_path / "killed")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    recovery = tmp_path / "killed" / "02-rows" / "recovery"
    deadline = time.monotonic() + 300  # on a busy machine
    while not (recovery / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert recovery.exists()
    assert not (tmp_path / "killed" / "model").exists()
    assert run(*arguments, tmp_path / "killed") == 0
    expected, found = (sslim.load_model(tmp_path / name / "model").state_dict() for name in ("whole", "killed"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_labels_train_by_masked_prediction_and_then_score(
    corpus: Corpus, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(corpus.path, tmp_path / "corpus")
    assert main(["cluster", str(tmp_path / "corpus"), "--clusters", "6", "--name", "six"]) == 0
    settings = ("--corpus", tmp_path / "corpus", "--labels", "six")
    out = tmp_path / "out"
    assert run("rows", model, "--keep", "0.5", "--score", "data", "--output", out, *settings, *TRAIN) == 0
    losses = [r["masked_loss"] for r in read_metrics(out / "01-rows" / "recovery" / "metrics.jsonl", kind="train")]
    assert losses[-1] < losses[0]
    assert "the model has no head over clusters and the labels are of 6" in " ".join(capsys.readouterr().err.split())
    trained = sslim.load_model(out / "model")
    assert "masked_prediction" in trained.config.heads
    assert trained.provenance[0]["calibration"] == {"corpus": "made", "num_utterances": 24, "labels": None}
    by_labels, by_itself = tmp_path / "labels", tmp_path / "itself"  # now it has a head, and labels change the scores
    assert run("rows", out, "--keep", "0.5", "--score", "data", "--output", by_labels, *settings) == 0
    assert run("rows", out, "--keep", "0.5", "--score", "data", "--output", by_itself, *settings[:2]) == 0
    notes = [sslim.load_model(folder / "model").provenance[-1] for folder in (by_labels, by_itself)]
    assert [note["calibration"]["labels"] for note in notes] == ["six", None]
    assert notes[0]["kept_units"] != notes[1]["kept_units"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_data_scores_are_computed_where_they_are_asked_for(
    corpus: Corpus, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--keep", "0.5", "--corpus", corpus.path, "--device", "cuda", "--output")
    assert run("rows", model, "--score", "data", *common, tmp_path / "data") == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err
    assert run("rows", model, *common, tmp_path / "l1") == 0  # sizes of weights need none


def test_none_is_not_the_default(model: Path, tmp_path: Path) -> None:
    common = ("heads", model, "--keep", "0.5", "--scope", "model", "--output")
    assert run(*common, tmp_path / "default") == 0
    assert run(*common, tmp_path / "none", "--normalize", "None") == 0
    notes = [sslim.load_model(tmp_path / name / "model").provenance[-1]["normalize"] for name in ("default", "none")]
    assert notes == [2.0, None]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("heads", "{model}", "--output", "out"), "give one of keep, num_kept, a budget"),
        (("heads", "{model}", "--keep", "2", "--output", "out"), "keep is 2"),
        (("heads", "{model}", "--keep", "0.5", "--recover-steps", "5", "--output", "out"), "name a corpus with --corpus"),
        (("heads", "{model}", "--keep", "0.5", "--loss", "layers", "--output", "out"), "--recover-steps"),
        (("heads", "{model}", "--keep", "0.5", "--labels", "six", "--output", "out"), "--labels is for training"),
        (("heads", "{model}", "--keep", "0.5", "--precision", "bf16", "--output", "out"), "--precision is for training"),
        (("heads", "{model}", "--num-kept", "2", "--budget", "params=1k", "--output", "out"), "both a budget and num_kept"),
        (("width", "{model}", "--output", "out"), "nothing says how much width removes: give one of keep, a budget"),
        (("low-rank", "{model}", "--ratio", "0.5", "--params", "0.5", "--output", "out"), "ratio and params"),
        (("heads", "nowhere", "--keep", "0.5", "--output", "out"), "nowhere"),
        (("rows", "{model}", "--budget", "params=1", "--output", "out"), "more than the budget"),
        (("rows", "{model}", "--budget", "params=1k", "--keep", "0.5", "--output", "out"), "both a budget and keep"),
        (("plan.toml", "{model}", "--output", "out"), "plan.toml"),
        (("hads", "{model}"), "did you mean 'heads'"),
    ],
)
def test_bad_input_is_one_sentence(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*(part.format(model=model) for part in arguments)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sslim")]
    assert len(said) == 1
    assert complaint in said[0]
    assert not (tmp_path / "out" / "model").exists()
