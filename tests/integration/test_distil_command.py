"""``sslim compress distil`` from end to end on a made corpus: learns, resumes, caches the teacher, runs on two processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import sslim
from sslim.cli import main
from sslim.data.corpus import Corpus
from sslim.data.prepare import prepare
from sslim.data.sources import Source, SourceUtterance
from sslim.frontends import NormalizationConfig
from sslim.models import SpeechModel, build_model
from sslim.models.hubert import hubert, narrow_conv_layers
from sslim.models.melhubert import melhubert, melhubert_frontend
from sslim.objectives import TargetConfig, Teacher
from sslim.objectives.teacher_cache import TeacherCache
from sslim.recipes import distil_recipes
from sslim.recipes.distil_losses import LayerChoice, read_layers, thirds
from sslim.storage import load_tensors
from sslim.training import read_metrics

SMALL = {"dim": 32, "num_heads": 4, "feedforward_dim": 64, "conv_kernel_size": 16, "conv_groups": 4}
BLOCK = '{"num_heads":4,"head_dim":8,"feedforward_dim":64}'
POSITIONS = '{"kind":"convolution","kernel_size":16,"groups":4}'
TINY = [
    *("distil-shared-mini", "--loss", "distil-alhubert", "--layers", "4:4"),  # layer to layer, frames hidden
    *("--set", 'objective.masking={"probability":0.4,"span_length":5}', "--set", "objective.distance=l1"),
    *("--set", "model.encoder.dim=32", "--set", f"model.encoder.blocks=[{BLOCK},{BLOCK}]"),
    *("--set", f"model.encoder.positions={POSITIONS}", "--set", "data.batch_s=8", "--set", "data.crop_s=1.6"),
    *("--set", "training.log_every=5", "--set", "training.save_every=10", "--steps", "30", "--threads", "1"),
]  # fmt: skip


def saved(model: SpeechModel, folder: Path) -> Path:
    sslim.save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Features whose loud bands change every 200 ms; lengths of 1.2 to 2.4 s, crops of 1.6 s."""

    def read(i: int) -> np.ndarray:
        rng = np.random.default_rng(i)
        bands = np.repeat(rng.integers(0, 6, 12), 20)[: 120 + 20 * (i % 7)]
        return (rng.normal(0, 0.5, (len(bands), 40)) + 4 * (np.arange(40) // 7 == bands[:, None])).astype(np.float32)

    utterances = [SourceUtterance(id=f"utt{i}", read_features=lambda i=i: read(i)) for i in range(24)]  # type: ignore[misc]
    source = Source(name="made", utterances=utterances, num_utterances=24, frontend=melhubert_frontend(10))
    return prepare(source, tmp_path_factory.mktemp("distil") / "corpus").corpus


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random net whose layers differ clearly; its front-end normalises each utterance."""
    frontend = replace(melhubert_frontend(20), normalization=NormalizationConfig(kind="utterance", eps=1e-3))
    config = replace(melhubert(num_layers=4, dropout=0.1, **SMALL), frontend=frontend, heads={})  # type: ignore[arg-type]
    model = build_model(config, torch.Generator().manual_seed(5))
    for block in model.encoder.blocks:
        for parameter in block.parameters():
            parameter.data *= 4.0
    return saved(model, tmp_path_factory.mktemp("distil") / "teacher")


def run(*arguments: object) -> int:
    return main(["compress", "distil", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(corpus: Corpus, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("distil") / "run"
    assert run(*TINY, teacher, corpus.path, "--output", output) == 0
    return output


def test_the_student_comes_closer_and_tells_where_it_comes_from(teacher: Path, finished: Path) -> None:
    records = read_metrics(finished / "metrics.jsonl", kind="train")
    assert records[-1]["distance_loss"] < 0.9 * records[0]["distance_loss"]
    assert records[-1]["cosine"] > records[0]["cosine"]
    student = sslim.load_model(finished / "model")
    assert student.config.encoder.depth_map == (0, 1, 0, 1)
    assert len(student.encoder.blocks) == 2
    assert set(student.heads) == {"distillation_4", "mask"}  # what hidden frames were replaced with, and the map to the target
    origin = student.provenance[-1]
    assert (origin["step"], origin["loss"], origin["steps"]) == ("distil", "distil-alhubert", 30)
    described = json.loads((finished / "run.json").read_text())
    assert described["teacher"]["digest"] == origin["teacher"]["digest"]
    assert not any("teacher" in name for name in load_tensors(finished / "checkpoints/step-00000030/objective.safetensors"))


def test_an_interrupted_run_goes_on_to_the_same_student(corpus: Corpus, teacher: Path, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)  # as if it had been killed after its second checkpoint
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints" / "step-00000030")
    assert run(*TINY, teacher, corpus.path, "--output", output) == 0
    name = "model/model.safetensors"
    assert (output / name).read_bytes() == (finished / name).read_bytes()
    assert run(*TINY, teacher, corpus.path, "--output", output, "--loss", "distil-hubert") == 2  # another run


def test_another_teacher_in_the_same_folder_is_refused(
    corpus: Corpus, teacher: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = sslim.load_model(teacher)
    next(model.parameters()).data += 1.0
    assert run(*TINY, saved(model, tmp_path / "other"), corpus.path, "--output", finished) == 2
    assert "teacher" in capsys.readouterr().err


def test_two_processes_equal_one_that_accumulates(corpus: Corpus, teacher: Path, tmp_path: Path) -> None:
    """The first of the two fills the cache, which the one then reads."""
    common = [*TINY, teacher, corpus.path, "--steps", "4", "--set", "training.log_every=1", "--set", "data.batch_s=4"]
    common += ["--cache-teacher", tmp_path / "cache"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sslim", "compress", "distil"]
    command = [sys.executable, "-m", *launcher, *map(str, common), "--output", str(tmp_path / "two")]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("MB in") == 1
    assert run(*common, "--output", tmp_path / "one", "--accumulate", "2") == 0
    one, two = ([r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl", kind="train")] for name in ("one", "two"))
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-5)


def test_a_teacher_without_statistics_gets_those_of_the_corpus_and_a_note(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(melhubert(num_layers=2, dropout=0.0, **SMALL), heads={})  # type: ignore[arg-type]
    without, given = (build_model(config, torch.Generator().manual_seed(0)) for _ in range(2))
    mean, std, source = corpus.statistics  # type: ignore[misc]
    given.set_statistics(torch.as_tensor(mean), torch.as_tensor(std), source=source)
    options, digests = [corpus.path, "--layers", "2:1,4:2", "--init-from-teacher", "none", "--steps", "1"], []
    for name, model in (("without", without), ("given", given)):
        command = [*TINY, saved(model, tmp_path / f"teacher-{name}"), *options, "--output", tmp_path / name]
        assert run(*command) == 0
        assert ("the teacher brings no mean and standard deviation" in capsys.readouterr().out) is (name == "without")
        digests.append(json.loads((tmp_path / name / "run.json").read_text())["teacher"]["digest"])
    assert digests[0] == digests[1]


# ---- the teacher's outputs on disk ---------------------------------------------------------------------------------------


def cache_of(folder: Path, teacher: Path, corpus: Corpus, layers: tuple[int, ...] = (2, 4)) -> TeacherCache:
    return TeacherCache(folder, Teacher(sslim.load_model(teacher), TargetConfig(layers=layers)), corpus)


def test_a_run_from_the_cache_is_the_live_run(
    corpus: Corpus, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without crops, so that the teacher sees the same; with crops it sees more and the losses differ.

    The student starts at random: one that starts as its teacher is at distance zero in layer 2, where rounding to float16
    (0.0006 on average here) turns no L1 gradient into a full one, and the runs part by 0.001 within five steps.
    """
    common = [*TINY, teacher, corpus.path, "--steps", "5", "--set", "training.log_every=1", "--init-from-teacher", "none"]
    losses = {}
    for name, options in {
        "live": ["--set", "data.crop_s=null"],
        "cached": ["--set", "data.crop_s=null", "--cache-teacher", tmp_path / "cache"],
        "live crops": [],
        "cached crops": ["--cache-teacher", tmp_path / "cache"],
    }.items():
        assert run(*common, *options, "--output", tmp_path / name) == 0
        losses[name] = [r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl", kind="train")]
        said = capsys.readouterr().out
        assert ("MB in" in said) is (name == "cached")  # made once, then reused
    assert losses["cached"] == pytest.approx(losses["live"], abs=1e-4)  # 2e-5 was measured
    apart = np.abs(np.subtract(losses["cached crops"], losses["live crops"]))
    assert 1e-3 < apart.max() < 0.05  # the control: what whole utterances make of the frames at a crop's ends


def test_crops_get_the_frames_from_their_start_on(corpus: Corpus, teacher: Path, tmp_path: Path) -> None:
    from sslim.data.batching import FrameFacts
    from sslim.objectives.teacher_cache import CachedBatches
    from sslim.recipes.corpus_batches import DataConfig, make_batches

    cache = cache_of(tmp_path / "cache", teacher, corpus)
    cache.fill(np.arange(24), batch_s=20.0, say=print)
    facts = FrameFacts.of_features(cache.teacher.model.frontend)
    data = DataConfig(batch_s=8, crop_s=1.0)
    batches = make_batches(corpus, None, np.arange(24), cache.teacher.model, data, 0, shuffle=True)
    cached, seen = CachedBatches(batches, cache, facts), 0
    for index in range(batches.num_batches):
        batch, planned = cached[1, index], batches.plan.batch(1, index)
        for row, (position, start, length) in enumerate(zip(planned.indices, planned.starts, planned.lengths, strict=True)):
            whole = cache.frames(int(batches.utterances[position]))
            want = whole[start // 2 : start // 2 + (length + 1) // 2]
            count = int(batch.teacher.lengths[row])
            assert count == len(want) == 50
            assert np.array_equal(batch.teacher.values[row, :count].numpy(), want)
            seen += int(start > 0)
    assert seen > 5


def test_a_killed_cache_goes_on_where_it_stopped(corpus: Corpus, teacher: Path, tmp_path: Path) -> None:
    whole = cache_of(tmp_path / "whole", teacher, corpus)
    whole.fill(np.arange(24), batch_s=5.0, say=print)
    folder = tmp_path / "killed"
    killed = cache_of(folder, teacher, corpus)
    killed.fill(np.arange(10), batch_s=5.0, say=print)
    with (folder / "shard-00000.bin").open("ab") as shard:  # rows and half a line that no commit finished
        shard.write(b"\1" * 1000)
    with (folder / "index.jsonl").open("a") as index:
        index.write("[11, 0, 5")
    again = cache_of(folder, teacher, corpus)
    assert again.missing(np.arange(24)).tolist() == list(range(10, 24))
    again.fill(np.arange(24), batch_s=5.0, say=print)
    for opened in (again, cache_of(folder, teacher, corpus)):
        assert len(opened.missing(np.arange(24))) == 0
        for i in range(24):
            assert np.allclose(opened.frames(i), whole.frames(i), atol=2e-3)


def test_a_stale_cache_is_refused(corpus: Corpus, teacher: Path, tmp_path: Path) -> None:
    cache_of(tmp_path / "cache", teacher, corpus).fill(np.arange(2), batch_s=5.0, say=print)
    with pytest.raises(ValueError, match=r"holds outputs for target layers \[2, 4\], and this run needs \[1, 4\]"):
        cache_of(tmp_path / "cache", teacher, corpus, layers=(1, 4))
    model = sslim.load_model(teacher)
    next(model.parameters()).data += 1.0
    with pytest.raises(ValueError, match="holds outputs of another teacher"):
        cache_of(tmp_path / "cache", saved(model, tmp_path / "other"), corpus)
    with pytest.raises(ValueError, match="of a teacher in fp32, and this run's is in bf16"):
        TeacherCache(tmp_path / "cache", Teacher(sslim.load_model(teacher), TargetConfig(layers=(2, 4)), bf16=True), corpus)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no teacher outputs"):
        cache_of(tmp_path / "full", teacher, corpus)


def test_a_cache_that_is_not_whole_is_refused(corpus: Corpus, teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache_of(folder, teacher, corpus).fill(np.arange(3), batch_s=5.0, say=print)
    shard = folder / "shard-00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole + b"12")  # what a kill leaves behind the last commit
    assert len(cache_of(folder, teacher, corpus).missing(np.arange(3))) == 0
    shard.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match="it is not whole"):
        cache_of(folder, teacher, corpus)
    killed = tmp_path / "killed"  # before its description was written
    killed.mkdir()
    (killed / ".teacher.json.1234.tmp").write_text('{"format')
    cache_of(killed, teacher, corpus).fill(np.arange(3), batch_s=5.0, say=print)
    assert (killed / "shard-00000.bin").read_bytes() == whole


def test_outputs_that_float16_cannot_hold_are_refused(corpus: Corpus, teacher: Path, tmp_path: Path) -> None:
    model = sslim.load_model(teacher)
    for name, factor in (("large", 1e3), ("too-large", 1e6)):
        scaled = Teacher(model, TargetConfig(layers=(4,)))
        model.encoder.blocks[3].feedforward_norm.weight.data.fill_(factor)  # type: ignore[union-attr, operator]
        cache = TeacherCache(tmp_path / name, scaled, corpus)
        if name == "large":
            cache.fill(np.arange(3), batch_s=5.0, say=print)
            continue
        with pytest.raises(ValueError, match=r"outputs for utterance utt\d reach .*e\+06, and float16 holds 65504 at most"):
            cache.fill(np.arange(3), batch_s=5.0, say=print)
        assert len(cache.missing(np.arange(3))) == 3


def test_other_processes_wait_for_the_one_that_fills(
    corpus: Corpus, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filling, waiting = (cache_of(tmp_path / "cache", teacher, corpus) for _ in range(2))
    waits: list[float] = []

    def sleep(seconds: float) -> None:  # meanwhile the first process gets two utterances further
        waits.append(seconds)
        filling.fill(np.arange(2 * len(waits)), batch_s=5.0, say=print)

    monkeypatch.setattr("sslim.objectives.teacher_cache.time.sleep", sleep)
    waiting.wait_for(np.arange(5))
    assert len(waits) == 3
    assert np.array_equal(waiting.frames(4), filling.frames(4))
    waiting.wait_for(np.arange(5))  # nothing is missing
    assert len(waits) == 3


# ---- students of every kind ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("distil") / "audio"
    folder.mkdir()
    for i in range(6):
        rng = np.random.default_rng(i)
        pitch = np.repeat(rng.uniform(0.02, 0.3, 10), 1600)[: 9600 + 800 * i]
        soundfile.write(folder / f"utt{i}.wav", 0.3 * np.sin(np.cumsum(pitch)) + 0.01 * rng.normal(size=len(pitch)), 16000)
    output = folder.parent / "audio-corpus"
    assert main(["prepare", str(folder), str(output)]) == 0
    return Corpus.open(output)


@pytest.mark.parametrize("loss", ["distil-hubert", "distil-alhubert", "dp-hubert", "data2vec"])
def test_a_log_mel_student_of_a_waveform_teacher(audio: Corpus, tmp_path: Path, loss: str) -> None:
    """Also: a student that exists, and a preset's name."""
    settings = {**SMALL, "num_layers": 3, "conv_layers": narrow_conv_layers(8), "num_clusters": None}
    teacher = build_model(hubert(**settings), torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    path = saved(teacher, tmp_path / "teacher")
    student: object = "melhubert-tiny"
    if loss == "dp-hubert":
        student = saved(build_model(melhubert(num_layers=2, **SMALL), torch.Generator().manual_seed(2)), tmp_path / "student")  # type: ignore[arg-type]
    output = tmp_path / "run"
    assert run(student, path, audio.path, "--loss", loss, "--steps", "2", "--output", output, "--threads", "1") == 0
    model = sslim.load_model(output / "model")
    assert model.provenance[-1]["loss"] == loss
    want = {"distil-hubert": {"distillation"}, "distil-alhubert": set(), "data2vec": {"distillation", "mask"}}
    own = {"masked_prediction"}  # of a student that exists; a preset's heads would stay untrained, so it has none
    assert set(model.heads) == want.get(loss, {"distillation_0", "distillation_1", *own})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["distil-plain-mni"], "did you mean 'distil-plain-mini'"),
        ([*TINY, "--loss", "distil"], "no loss 'distil'; did you mean"),
        ([*TINY, "--layers", "2-4"], "--layers is '2-4'; expected"),
        ([*TINY, "--layers", "2:7"], "teacher layer 7 is asked for"),
        ([*TINY, "--init-from-teacher", "first"], "expected teacher layers such as 1,3, or none"),
        ([*TINY, "--set", "objective.cosine_wieght=2"], "did you mean 'cosine_weight'"),
        ([*TINY, "--set", "model.frontend.stack=3", "--set", "model.projection.feature_dim=120"], "a whole multiple"),
    ],
)
def test_mistakes_get_one_sentence(
    corpus: Corpus, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert run(*arguments, teacher, corpus.path, "--output", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_methods_are_listed_and_unknown_ones_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "--help"]) == 0
    assert "distil" in capsys.readouterr().out
    assert main(["compress", "distill"]) == 2
    assert "did you mean 'distil'" in capsys.readouterr().err
    assert main(["compress"]) == 2
    assert "no method given" in capsys.readouterr().err


def test_published_recipes_are_whole() -> None:
    """The layers that the papers name, from the same rule that other depths use."""
    recipes = {name: make() for name, make in distil_recipes.RECIPES.items()}
    assert recipes["distil-hubert"].objective.target.layers == (4, 8, 12)
    small = recipes["distil-alhubert-small"].objective
    assert small.target.layers == small.student_layers == (2, 4, 6, 8, 10, 12)
    assert (small.distance, small.over_targets, small.map_groups) == ("l2", "sum", ())
    stage1 = recipes["light-hubert-stage1"].objective.target
    assert (stage1.layers, stage1.average, stage1.source) == (tuple(range(5, 13)), True, "feedforward")
    for name in ("distil-plain-mini", "distil-shared-mini"):
        with torch.device("meta"):
            assert 0.9e6 < SpeechModel(recipes[name].model).num_parameters() < 1.1e6
    assert (thirds(4), thirds(1)) == ((1, 3, 4), (1,))
    assert read_layers("2:4, 4:8") == LayerChoice(student=(2, 4), teacher=(4, 8))
