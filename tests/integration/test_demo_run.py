"""The demo from end to end, small: everything it promises is there, it can be repeated, and it goes on where it stopped."""

from __future__ import annotations

import json
import shutil

import pytest

from sslim import cli

pytest.importorskip("espeakng_loader")


def run(output, capsys) -> str:
    assert cli.main(["demo", "--utterances", "60", "--minutes", "0.02", "--output", str(output)]) == 0
    return capsys.readouterr().out


def test_the_demo_tells_the_whole_story_and_goes_on(tmp_path, capsys):
    output = tmp_path / "demo"
    told = run(output, capsys)
    for verb in ("prepare", "cluster", "pretrain", "probe phones", "probe speaker", "report"):
        assert f"$ sslim {verb}" in told
    assert told.strip().endswith(str(output / "report.html"))
    page = (output / "report.html").read_text(encoding="utf-8")
    for shown in ("phones on", "speaker on", "log-Mel", "random weights", "One utterance", "predictions", "Targets"):
        assert shown in page
    card = json.loads((output / "melhubert-mini" / "cards" / "phones.json").read_text(encoding="utf-8"))
    assert {row["kind"] for row in card["rows"]} == {"features", "random", "model"}

    model = (output / "melhubert-mini" / "model" / "model.safetensors").read_bytes()
    (output / "melhubert-mini" / "cards" / "speaker.json").unlink()  # as if it had been stopped there
    again = run(output, capsys)
    assert again.count("done before, skipped") == 3  # cluster, pretrain, phones
    assert (output / "melhubert-mini" / "cards" / "speaker.json").is_file()
    assert (output / "melhubert-mini" / "model" / "model.safetensors").read_bytes() == model


def test_the_demo_on_ones_own_audio(tmp_path, capsys):
    import numpy as np
    import soundfile

    audio, random = tmp_path / "my audio", np.random.default_rng(0)
    audio.mkdir()
    for i in range(12):
        noise = random.normal(size=16000)
        tone = np.sin(np.arange(16000) * (0.05 + 0.01 * i))
        soundfile.write(audio / f"take{i}.wav", 0.05 * noise + 0.3 * tone * (noise > 0), 16000)
    output = tmp_path / "out"
    arguments = ["demo", "--data", str(audio), "--minutes", "0.01", "--output", str(output)]
    assert cli.main(arguments) == 0
    assert "No probe was run" in capsys.readouterr().out
    assert (output / "report.html").is_file()
    assert cli.main([*arguments, "--seed", "5"]) == 2
    assert "holds a demo with seed 0, now it is 5" in capsys.readouterr().err
    shutil.rmtree(output)
