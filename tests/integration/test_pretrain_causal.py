"""Causal MelHuBERT from sound to stream: it predicts better than guesses, streams what it extracts, and can be compressed."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import sslim
from sslim.checkpoints import save_model
from sslim.cli import main
from sslim.models.causality import future_seen
from sslim.models.streaming import StreamingEncoder, encode_in_pieces
from sslim.training import read_metrics

STEPS = 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones that glide from one pitch and level to the next within 0.3 s: what comes can be guessed, and not only repeated."""
    folder = tmp_path_factory.mktemp("causal")
    (folder / "wavs").mkdir()
    for i in range(40):
        random = np.random.default_rng(i)
        num_notes = random.integers(8, 14)
        knots = np.arange(num_notes + 1) * 4800
        pitch, level = (
            np.interp(np.arange(num_notes * 4800), knots, random.uniform(low, high, num_notes + 1))
            for low, high in ((200, 3000), (0.02, 0.3))
        )
        tone = level * np.sin(2 * np.pi * np.cumsum(pitch) / 16000) + 0.003 * random.normal(size=len(pitch))
        soundfile.write(folder / "wavs" / f"{i:02d}.wav", tone, 16000)
    assert main(["prepare", str(folder / "wavs"), str(folder / "corpus")]) == 0
    return folder / "corpus"


@pytest.fixture(scope="module")
def run(corpus: Path) -> Path:
    output = corpus.parent / "run"
    assert main(["pretrain", "apc-melhubert-tiny", str(corpus), "--output", str(output), "--steps", str(STEPS)]) == 0
    return output


def test_it_predicts_better_than_the_mean_and_the_frame_it_has(run: Path) -> None:
    losses = read_metrics(run, "valid")[-1]
    assert losses["predicted_loss"] < 0.95 * min(losses["same_frame_loss"], losses["mean_frame_loss"])
    assert future_seen(sslim.load_model(run / "model").config) is None


def test_the_trained_model_streams_what_it_encodes(run: Path, corpus: Path) -> None:
    model = sslim.load_model(run / "model")
    samples, _ = soundfile.read(corpus.parent / "wavs" / "03.wav", dtype="float32")
    waveform_S = torch.from_numpy(samples)
    streamed, whole = encode_in_pieces(StreamingEncoder(model).open(), waveform_S, 700), model.encode(waveform_S[None])
    for ours, theirs in zip(streamed.layers, whole.layers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_normalisation_that_knows_the_future_is_pointed_out(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "pretrain",
        "apc-melhubert-tiny",
        str(corpus),
        "--output",
        str(corpus.parent / "run-utterance"),
        "--steps",
        "1",
    ]
    assert main([*arguments, "--set", "model.frontend.normalization.kind=utterance"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "note: the model cannot be streamed, though its encoder is causal: its features are normalised over the whole" in said
    )


@pytest.mark.parametrize("method", ["heads", "rows"])
def test_it_can_be_pruned_and_streamed(method: str, run: Path, tmp_path: Path) -> None:
    save_model(sslim.load_model(run / "model"), tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--output", str(tmp_path / "cut"), "--keep", "0.5", "--seconds", "0.5"]
    assert main(["compress", method, *arguments]) == 0
    small = sslim.load_model(tmp_path / "cut" / "model")
    assert small.config.transformer.causal
    assert small.num_parameters() < sslim.load_model(run / "model").num_parameters()
    waveform_S = 0.1 * torch.randn(9000, generator=torch.Generator().manual_seed(0))
    streamed = encode_in_pieces(StreamingEncoder(small).open(), waveform_S, 640)
    torch.testing.assert_close(streamed.final, small.encode(waveform_S[None]).final, atol=1e-5, rtol=0)
