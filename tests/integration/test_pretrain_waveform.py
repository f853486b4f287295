"""Waveform models from the command line: train, stop and resume, cluster a layer, train again, under two processes too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import sslim
from sslim.cli import main
from sslim.data.corpus import Corpus
from sslim.data.labels import LabelStore
from sslim.training import WALL_CLOCK_FIELDS, read_metrics

RATE = 16000
NUM_UTTERANCES = 12
TINY = ["hubert-tiny", "--threads", "1", "--set", "data.batch_s=4", "--set", "training.log_every=1"]
SMALL_TARGETS = ["--set", 'targets=[{"num_clusters": 6}, {"num_clusters": 5, "layer": 1}]']


def write_audio(folder: Path) -> None:
    """Tones that change every 200 ms, in noise."""
    folder.mkdir()
    for i in range(NUM_UTTERANCES):
        rng = np.random.default_rng(i)
        hz = np.repeat(rng.choice([300, 500, 900, 1600, 2600], 8), RATE // 5)[: RATE + 400 * i]
        wave = 0.3 * np.sin(2 * np.pi * np.cumsum(hz) / RATE) + 0.02 * rng.standard_normal(len(hz))
        soundfile.write(folder / f"utt{i:02d}.wav", wave, RATE)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with log-Mel features beside its audio, and MFCC labels."""
    folder = tmp_path_factory.mktemp("waveform")
    write_audio(folder / "audio")
    assert run("prepare", folder / "audio", folder / "corpus") == 0
    assert run("cluster", folder / "corpus", "--mfcc", "--clusters", 6) == 0
    return folder


@pytest.fixture(scope="module")
def iterated(folder: Path) -> Path:
    """Two iterations, the first stopped on the way and the command repeated."""
    command = [
        "pretrain",
        *TINY,
        folder / "corpus",
        "--iterations",
        2,
        "--steps",
        4,
        "--output",
        folder / "run",
        *SMALL_TARGETS,
    ]
    assert run(*command, "--set", "training.save_every=1") == 0
    return folder / "run"


def figures(run_folder: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in WALL_CLOCK_FIELDS} for r in read_metrics(run_folder / "metrics.jsonl")]


def test_two_iterations_give_two_runs_and_labels_of_the_first_ones_layer(folder: Path, iterated: Path) -> None:
    corpus = Corpus.open(folder / "corpus")
    first, second = (sslim.load_model(iterated / f"iteration-{k}" / "model") for k in (1, 2))
    assert [m.config.heads["masked_prediction"].num_clusters for m in (first, second)] == [6, 5]
    name = next(name for name in corpus.label_names() if name.startswith("layer1-kmeans5-"))
    labels = corpus.labels(name)
    assert labels.origin["layer"] == 1
    assert labels.frame_period_s == pytest.approx(0.02)
    lengths = [first.frontend.num_frames(int(n)) for n in corpus.num_samples]
    assert [len(labels.get(i)) for i in range(len(corpus))] == lengths
    assert not torch.equal(first.frontend.layers[0].weight, second.frontend.layers[0].weight)


def test_repeating_the_command_changes_nothing(folder: Path, iterated: Path) -> None:
    digests = [(iterated / f"iteration-{k}" / "model" / "digests.json").read_text() for k in (1, 2)]
    command = ["pretrain", *TINY, folder / "corpus", "--iterations", 2, "--steps", 4, "--output", iterated, *SMALL_TARGETS]
    assert run(*command) == 0
    assert [(iterated / f"iteration-{k}" / "model" / "digests.json").read_text() for k in (1, 2)] == digests


def test_a_stopped_run_goes_on_as_if_it_had_not_been(folder: Path, iterated: Path) -> None:
    """Its last checkpoint and its model are taken away, as if it had been killed two steps before the end."""
    whole, again = iterated / "iteration-1", folder / "again"
    command = ["pretrain", *TINY, folder / "corpus", "--labels", "mfcc-kmeans6", "--output", again, *SMALL_TARGETS]
    assert run(*command, "--steps", 4, "--set", "training.save_every=1") == 0
    for path in (again / "model", again / "checkpoints" / "step-00000004"):
        shutil.rmtree(path)
    assert run(*command, "--steps", 4, "--set", "training.save_every=1") == 0
    assert (again / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    assert figures(again) == figures(whole)


def test_two_processes_give_the_losses_of_one(folder: Path) -> None:
    """Over two iterations: the processes part between them, while the first one clusters, and meet again."""
    assert run("prepare", folder / "audio", folder / "fresh") == 0
    common = ["pretrain", *TINY, folder / "fresh", "--iterations", 2, "--steps", 2, *SMALL_TARGETS]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sslim"]
    process = subprocess.run(
        [*launcher, *map(str, common), "--output", str(folder / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert run(*common, "--accumulate", 2, "--output", folder / "one") == 0
    for iteration in ("iteration-1", "iteration-2"):
        one, two = (
            [r["masked_loss"] for r in figures(folder / name / iteration) if r["kind"] == "train"] for name in ("one", "two")
        )
        assert len(one) == 2
        assert two == pytest.approx(one, rel=1e-5)


def test_a_second_stage_keeps_the_front_end_and_the_head_where_asked(folder: Path, iterated: Path) -> None:
    common = ["pretrain", *TINY, folder / "corpus", "--labels", "mfcc-kmeans6", "--steps", 1, "--learning-rate", 1e-5]
    assert run(*common, "--init-from", iterated / "iteration-1", "--keep-head", "--output", folder / "kept") == 0
    kept, first = sslim.load_model(folder / "kept" / "model"), sslim.load_model(iterated / "iteration-1" / "model")
    for name in ("frontend.layers.0.weight", "heads.masked_prediction.codewords", "heads.mask.embedding"):
        moved = (kept.state_dict()[name] - first.state_dict()[name]).abs().max()
        assert 0 < moved < 1e-4, name


def test_a_corpus_of_waveforms_alone_trains_and_reports(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = folder / "bare"
    assert run("prepare", folder / "audio", bare, "--features", "waveform") == 0
    corpus = Corpus.open(bare)
    values = [np.arange(n // 320) % 6 for n in corpus.num_samples]  # at times one more than the model has frames
    LabelStore.write(bare / "labels" / "made", values, frame_period_s=0.02, num_clusters=6, corpus_digest=corpus.digest,
                     origin={}, quality={})  # fmt: skip
    assert run("doctor", bare) == 0
    assert run("pretrain", *TINY, bare, "--steps", 2, "--output", folder / "bare-run") == 0
    assert run("report", folder / "bare-run", "--output", folder / "page.html") == 0
    assert (folder / "page.html").stat().st_size > 1000
    capsys.readouterr()
    assert run("pretrain", *TINY, bare, "--iterations", 2, "--steps", 1, "--output", folder / "no") == 2
    assert "holds no features" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["--set", "model.frontend.sample_rate=8000"], "was prepared at 16000 Hz, the model reads waveforms at 8000 Hz"),
        (["--iterations", 3], "says what to cluster for 2 iterations, 3 are asked for"),
        (["--set", "data.crop_s=0.001"], "max_length 320 is below min_length 400"),
    ],
)
def test_mistakes_get_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], settings: list[object], sentence: str
) -> None:
    command = ["pretrain", *TINY, folder / "corpus", "--labels", "mfcc-kmeans6", "--output", folder / "mistake", *settings]
    assert run(*command) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
