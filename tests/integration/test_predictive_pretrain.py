"""``sslim pretrain`` with recurrent and convolutional encoders: loss below plain guesses, a model that verbs take, resuming."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sslim
from sslim.cli import main
from sslim.data.corpus import Corpus
from sslim.data.prepare import prepare
from sslim.data.sources import Source, SourceUtterance
from sslim.models.melhubert import melhubert_frontend
from sslim.training import read_metrics

BOUNDS = {"apc-tiny": 0.6, "vq-apc-tiny": 0.85, "npc-tiny": 0.75}  # of the loss of the utterance's mean frame


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Bands that rise and fall slowly, each utterance from a place of its own: what comes next can be told from what came."""

    def read(i: int) -> np.ndarray:
        rng = np.random.default_rng(i)
        phase = rng.uniform(0, 6.28) + 0.08 * np.arange(200)[:, None] + 0.1 * np.arange(40)
        return (3 * np.sin(phase) + rng.normal(0, 0.2, (200, 40))).astype(np.float32)

    utterances = [SourceUtterance(id=f"utt{i}", read_features=lambda i=i: read(i)) for i in range(30)]  # type: ignore[misc]
    source = Source(name="made", utterances=utterances, num_utterances=30, frontend=melhubert_frontend(10))
    return prepare(source, tmp_path_factory.mktemp("predictive") / "corpus").corpus


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("recipe", BOUNDS)
def test_the_loss_falls_below_a_guess_and_the_model_can_be_used(recipe: str, corpus: Corpus, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert run("pretrain", recipe, corpus.path, "--output", output, "--threads", 1) == 0
    records = [record for record in read_metrics(output / "metrics.jsonl") if record["kind"] == "train"]
    assert records[-1]["predicted_loss"] < BOUNDS[recipe] * records[-1]["mean_frame_loss"]
    assert records[0]["predicted_loss"] > records[-1]["predicted_loss"] / BOUNDS[recipe]
    if recipe != "apc-tiny":
        assert records[-1]["code_entropy"] > 0.3  # more than one code is in use
    model = sslim.load_model(output / "model")
    features, lengths_B = torch.zeros(1, 9, 80), torch.tensor([9])
    assert len(model.encode_features(features, lengths_B).layers) == model.num_layers + 1
    description = json.loads((output / "run.json").read_text())
    assert description["recipe"]["objective"]["kind"] == ("npc" if recipe == "npc-tiny" else "autoregressive")
    profile = tmp_path / "profile.json"
    assert (
        run("profile", output / "model", "--repeats", 1, "--seconds", 0.5, "--no-memory", "--check-macs", "--output", profile)
        == 0
    )
    assert json.loads(profile.read_text())["rows"][0]["macs"] > 0


def test_resuming_gives_the_same_model(corpus: Corpus, tmp_path: Path) -> None:
    """Noise of the quantiser and statistics of batch norms included."""
    for recipe in ("vq-apc-tiny", "npc-tiny"):
        whole, parts = tmp_path / f"{recipe}-whole", tmp_path / f"{recipe}-parts"
        common = ("pretrain", recipe, corpus.path, "--threads", 1, "--set", "training.save_every=4")
        assert run(*common, "--output", whole, "--steps", 8) == 0
        assert run(*common, "--output", parts, "--steps", 4, "--set", "training.schedule.kind=constant") == 0
        constant = tmp_path / f"{recipe}-constant"
        assert run(*common, "--output", constant, "--steps", 8, "--set", "training.schedule.kind=constant") == 0
        assert run(*common, "--output", parts, "--steps", 8, "--set", "training.schedule.kind=constant") == 0
        states = [sslim.load_model(folder / "model").state_dict() for folder in (parts, constant, whole)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])  # the control: another schedule


def test_objectives_that_do_not_fit_are_refused_in_one_sentence(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run("pretrain", "npc-tiny", corpus.path, "--output", tmp_path / "run", "--set", 'objective={"kind": "autoregressive"}')
        == 2
    )
    assert "autoregressive prediction needs a causal encoder" in capsys.readouterr().err


def test_a_run_of_which_nothing_is_scored_ends_with_a_sentence(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No utterance is as long as what is predicted is away."""
    common = ("pretrain", "apc-tiny", corpus.path, "--output", tmp_path / "run", "--threads", 1, "--steps", 3)
    assert run(*common, "--set", "objective.shift=500") != 0
    error = " ".join(capsys.readouterr().err.split())
    assert "training stops after 3 skipped steps in a row; the last: step 2 is skipped: nothing in it is scored" in error
    assert not (tmp_path / "run" / "model").exists()
