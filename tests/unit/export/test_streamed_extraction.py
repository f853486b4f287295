"""``sslim extract --stream-chunk-ms``: the same files as without, what it says of latency, and what it refuses."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sslim.checkpoints import save_model
from sslim.cli import main
from sslim.export import ExtractConfig, extract
from sslim.models import PRESETS, SpeechModel, build_model
from sslim.storage import load_tensors

LENGTHS_S = {"a": 0.83, "b": 0.31, "c": 1.27, "blip": 0.01}


def made(preset: str) -> SpeechModel:
    model = build_model(PRESETS[preset](), torch.Generator().manual_seed(0))
    model.set_statistics(torch.full((40,), 8.0), torch.full((40,), 4.0), source="made up")
    return model


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    folder = tmp_path / "audio"
    folder.mkdir()
    for name, seconds in LENGTHS_S.items():
        soundfile.write(folder / f"{name}.wav", 0.1 * random.normal(size=round(16000 * seconds)), 16000, subtype="FLOAT")
    return folder


@pytest.mark.parametrize("chunk_ms", [10.0, 80.0, 5000.0])
def test_files_are_the_same(chunk_ms: float, audio: Path, tmp_path: Path) -> None:
    model, times_s = made("melhubert-causal-tiny"), []
    whole = extract(model, [audio], tmp_path / "whole", ExtractConfig(max_bad=1.0))
    config = ExtractConfig(max_bad=1.0, stream_chunk_ms=chunk_ms)
    streamed = extract(model, [audio], tmp_path / "streamed", config, note=times_s.append)
    assert streamed == whole
    assert len(times_s) == sum(int(1000 * seconds / chunk_ms + 1e-9) for seconds in LENGTHS_S.values())
    for name in ("a", "b", "c"):
        ours, theirs = (load_tensors(tmp_path / kind / f"{name}.safetensors") for kind in ("streamed", "whole"))
        assert ours.keys() == theirs.keys()
        for key, states_TD in ours.items():
            torch.testing.assert_close(states_TD, theirs[key], atol=1e-5, rtol=0)
    assert "blip" in (tmp_path / "streamed" / "quarantine.jsonl").read_text()  # shorter than a frame, here as there


def test_an_interrupted_run_may_go_on_in_chunks(audio: Path, tmp_path: Path) -> None:
    model = made("melhubert-causal-tiny")
    (audio / "blip.wav").unlink()

    def dies(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(model, [audio], tmp_path / "features", ExtractConfig(batch_s=0.1), tell=dies)
    assert extract(model, [audio], tmp_path / "features", ExtractConfig(stream_chunk_ms=40.0))["num_utterances"] == 3


def test_the_command_tells_the_latency(audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(made("melhubert-causal-tiny"), tmp_path / "model")
    arguments = ["extract", str(tmp_path / "model"), str(audio / "a.wav"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--stream-chunk-ms", "80"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "streamed in chunks of 80 ms: a frame comes at most 100 ms after its first sample" in said
    assert re.search(r"a chunk took [\d.]+ ms \(p95 [\d.]+ ms\), real-time factor [\d.]+", said)
    assert main([*arguments, "--stream-chunk-ms", "80"]) == 0  # it is done already: nothing was timed
    said = capsys.readouterr().err
    assert "at most 100 ms" in " ".join(said.split())
    assert "real-time" not in said


def test_other_models_and_chunks_are_refused_before_anything_is_written(
    audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for preset in ("melhubert-tiny", "melhubert-causal-tiny"):
        save_model(made(preset), tmp_path / preset)
    for preset, chunk, sentence in (
        ("melhubert-tiny", "80", "this melhubert model cannot be streamed: its transformer encoder is not causal"),
        ("melhubert-causal-tiny", "0.01", "not a whole number"),
        ("melhubert-causal-tiny", "0", "a chunk of 0 s has no samples; expected more than 0 s"),
    ):
        arguments = ["extract", str(tmp_path / preset), str(audio), "--output", str(tmp_path / "out")]
        assert main([*arguments, "--stream-chunk-ms", chunk]) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
