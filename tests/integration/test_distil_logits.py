"""``sslim compress distil --loss logits`` and recovery with it, from end to end on a made corpus with labels."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_pretrain import CLUSTERS, write_corpus, write_labels

import sslim
from sslim.cli import main
from sslim.config import from_plain, to_plain
from sslim.data.corpus import Corpus
from sslim.frontends import NormalizationConfig
from sslim.models import SpeechModel, build_model
from sslim.models.melhubert import melhubert
from sslim.objectives import DistillationConfig, LogitDistillationConfig, MaskingConfig
from sslim.recipes import distil_recipes
from sslim.recipes.distil_recipes import DistilRecipe
from sslim.training import read_metrics

SMALL = {"dim": 32, "num_heads": 4, "feedforward_dim": 64, "conv_kernel_size": 16, "conv_groups": 4}
BLOCK = '{"num_heads":4,"head_dim":8,"feedforward_dim":64}'
TINY = [
    "distil-plain-mini", "--loss", "logits", "--init-from-teacher", "none",
    *("--set", "model.encoder.dim=32", "--set", f"model.encoder.blocks=[{BLOCK}]", "--set", "model.encoder.depth_map=[0]"),
    *("--set", 'model.encoder.positions={"kind":"convolution","kernel_size":16,"groups":4}'),
    *("--set", "data.batch_s=8", "--set", "data.crop_s=1.6", "--set", "training.log_every=5", "--steps", "30"),
    *("--set", "training.save_every=10", "--threads", "1"),
]  # fmt: skip


def random_model(num_layers: int, num_clusters: int, seed: int) -> SpeechModel:
    """Sure of its clusters; its front-end normalises each utterance."""
    config = melhubert(num_layers=num_layers, dropout=0.1, num_clusters=num_clusters, **SMALL)  # type: ignore[arg-type]
    assert config.frontend is not None
    frontend = replace(config.frontend, normalization=NormalizationConfig(kind="utterance", eps=1e-3))
    model = build_model(replace(config, frontend=frontend), torch.Generator().manual_seed(seed))
    for parameter in model.heads["masked_prediction"].parameters():
        parameter.data *= 20.0
    return model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    corpus = write_corpus(tmp_path_factory.mktemp("logits") / "corpus", 24)
    write_labels(corpus, "finer", [corpus.labels("made").get(i) for i in range(24)], 2 * CLUSTERS)
    return corpus


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logits") / "teacher"
    sslim.save_model(random_model(2, CLUSTERS, 5), folder)
    return folder


def run(*arguments: object) -> int:
    return main(["compress", "distil", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(corpus: Corpus, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("logits") / "run"
    settings = ["--temperature", "2", "--scale-by-temperature", "--alpha", "0.7", "--labels", "made", "--frames", "masked"]
    assert run(*TINY, *settings, teacher, corpus.path, "--output", output) == 0
    return output


def test_the_student_learns_from_the_teacher_and_the_labels(teacher: Path, finished: Path) -> None:
    records = read_metrics(finished / "metrics.jsonl", kind="train")
    assert records[-1]["divergence"] < 0.9 * records[0]["divergence"]
    assert records[-1]["agreement"] > records[0]["agreement"]
    valid = read_metrics(finished / "metrics.jsonl", kind="valid")[-1]
    assert valid["loss"] == pytest.approx(0.7 * 4 * valid["divergence"] + 0.3 * valid["label_loss"], rel=1e-5)
    student = sslim.load_model(finished / "model")
    assert student.config.heads == sslim.load_model(teacher).config.heads
    origin = student.provenance[-1]
    assert (origin["step"], origin["loss"], origin["labels"]) == ("distil", "logits", {"made": "made"})
    described = json.loads((finished / "run.json").read_text())
    objective = from_plain(DistilRecipe, described["recipe"]).objective
    assert isinstance(objective, LogitDistillationConfig)
    assert (objective.temperature, objective.alpha, objective.masking) == (2.0, 0.7, MaskingConfig())


def test_an_interrupted_run_goes_on_to_the_same_student(corpus: Corpus, teacher: Path, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)  # as if it had been killed after its second checkpoint
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints" / "step-00000030")
    common = [*TINY, "--temperature", "2", "--scale-by-temperature", "--frames", "masked", teacher, corpus.path]
    assert run(*common, "--alpha", "0.7", "--labels", "made", "--output", output) == 0
    name = "model/model.safetensors"
    assert (output / name).read_bytes() == (finished / name).read_bytes()
    assert run(*common, "--alpha", "0.5", "--labels", "made", "--output", output) == 2  # the control: another run
    assert run(*common, "--output", output) == 2


def test_a_run_from_stored_logits_is_the_live_run(corpus: Corpus, teacher: Path, tmp_path: Path) -> None:
    common = [*TINY, "--set", "data.crop_s=null", "--steps", "5", "--set", "training.log_every=1", teacher, corpus.path]
    losses = {}
    for name, options in {"live": [], "cached": ["--cache-teacher", tmp_path / "cache"]}.items():
        assert run(*common, *options, "--output", tmp_path / name) == 0
        losses[name] = [record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl", kind="train")]
    assert losses["cached"] == pytest.approx(losses["live"], abs=2e-3)
    assert min(losses["live"]) > 0.1


def test_labels_are_the_students_where_the_teacher_is_slower(corpus: Corpus, teacher: Path, tmp_path: Path) -> None:
    faster = ["--set", "model.frontend.stack=1", "--set", "model.projection.feature_dim=40", "--steps", "2"]
    options = ["--alpha", "0.5", "--labels", "made", "--set", "training.log_every=1", "--set", "data.batch_s=1000"]
    assert run(*TINY, *faster, *options, teacher, corpus.path, "--output", tmp_path / "run") == 0
    assert sslim.load_model(tmp_path / "run" / "model").frontend.frame_shift_s == 0.01
    valid = read_metrics(tmp_path / "run" / "metrics.jsonl", kind="valid")[-1]
    assert valid["loss"] == pytest.approx(0.5 * valid["divergence"] + 0.5 * valid["label_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--alpha", "0.5"], "has the label sets"),
        (["--alpha", "0.5", "--labels", "finer"], "label set finer has 12 clusters, teacher and student have heads over 6"),
        (["--labels", "made"], "label set 'made' is named, but logits does not use labels"),
        (["--layers", "1,2"], "learns from the head over clusters and from no layer"),
        (["--alpha", "2"], "alpha is 2.0; expected a weight from 0"),
        (["--loss", "distil-hubert", "--alpha", "0"], "--alpha belongs to --loss logits, and the loss is distil-hubert"),
        (["--loss", "dp-hubert", "--scale-by-temperature"], "--scale-by-temperature belongs to --loss logits"),
        (["--frames", "masked", "--cache-teacher", "cache"], "hidden anew in every step, which no cache can hold"),
    ],
)
def test_mistakes_get_one_sentence(
    corpus: Corpus, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert run(*TINY, *arguments, teacher, corpus.path, "--output", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_descriptions_from_before_logits_are_read_and_written_as_they_were() -> None:
    recipe = distil_recipes.distil_plain_mini()
    values = to_plain(recipe)
    assert "kind" not in values["objective"]
    assert from_plain(DistilRecipe, values) == recipe
    assert isinstance(from_plain(DistilRecipe, values).objective, DistillationConfig)
    values["objective"]["kind"] = "logits"
    with pytest.raises(ValueError, match="has no key"):
        from_plain(DistilRecipe, values)


def test_a_cut_model_recovers_from_the_whole_ones_logits(corpus: Corpus, teacher: Path, tmp_path: Path) -> None:
    options = ["--keep", "0.5", "--corpus", corpus.path, "--recover-steps", "20", "--loss", "logits", "--batch-s", "8"]
    arguments = ["compress", "heads", teacher, *options, "--output", tmp_path / "out"]
    assert main([str(argument) for argument in arguments]) == 0
    small = sslim.load_model(tmp_path / "out" / "model")
    assert [block.num_heads for block in small.config.encoder.blocks] == [2, 2]
    assert [entry["step"] for entry in small.provenance] == ["heads", "distil"]
    records = read_metrics(tmp_path / "out" / "01-heads" / "recovery" / "metrics.jsonl", kind="train")
    assert records[-1]["divergence"] < records[0]["divergence"]
