"""``sslim pretrain`` from end to end on a made corpus: reaches a stated loss, resumes, refuses, goes on from other models."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import sslim
from sslim.cli import main
from sslim.data.corpus import Corpus
from sslim.data.labels import LabelStore
from sslim.data.prepare import prepare
from sslim.data.sources import Source, SourceUtterance
from sslim.models.melhubert import melhubert_frontend
from sslim.training import WALL_CLOCK_FIELDS, read_metrics

CLUSTERS = 6
TINY = [
    "melhubert-tiny",
    "--steps",
    "60",
    "--set",
    "model.encoder.dropout=0.0",
    "--set",
    "data.batch_s=8",
    "--set",
    "model.frontend.normalization.kind=global",
    "--threads",
    "1",
]


def label_sequence(i: int) -> np.ndarray:
    rng = np.random.default_rng(i)
    return np.repeat(rng.integers(0, CLUSTERS, 30), rng.integers(14, 26))[: 200 + 10 * (i % 7)]


def write_corpus(folder: Path, num_utterances: int = 40) -> Corpus:
    """Frames whose loudest bands tell the cluster; clusters last about 200 ms, so a hidden stretch can be guessed."""

    def read(i: int) -> np.ndarray:
        noise = np.random.default_rng(1000 + i).normal(0, 0.5, (len(label_sequence(i)), 40))
        return (noise + 4 * (np.arange(40) // 7 == label_sequence(i)[:, None])).astype(np.float32)

    utterances = [SourceUtterance(id=f"utt{i}", read_features=lambda i=i: read(i)) for i in range(num_utterances)]  # type: ignore[misc]
    source = Source(name="made", utterances=utterances, num_utterances=num_utterances, frontend=melhubert_frontend(10))
    corpus = prepare(source, folder).corpus
    write_labels(corpus, "made", [label_sequence(i) for i in range(num_utterances)], CLUSTERS)
    return corpus


def write_labels(corpus: Corpus, name: str, labels: list[np.ndarray], num_clusters: int) -> None:
    LabelStore.write(
        corpus.path / "labels" / name, labels, frame_period_s=0.01, num_clusters=num_clusters,
        corpus_digest=corpus.digest, origin={"made": name}, quality={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("pretrain") / "corpus")


def run(*arguments: object) -> int:
    return main(["pretrain", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pretrain") / "run"
    assert run(*TINY, corpus.path, "--labels", "made", "--output", output) == 0
    return output


def test_it_reaches_the_stated_loss_and_saves_a_model_that_loads(corpus: Corpus, finished: Path) -> None:
    records = [record for record in read_metrics(finished / "metrics.jsonl") if record["kind"] == "train"]
    assert records[0]["masked_loss"] > 1.6  # a blind guess among six is ln 6 = 1.79
    assert records[-1]["masked_loss"] < 1.45
    assert records[-1]["masked_accuracy"] > 0.5  # chance is 0.17
    valid = [record for record in read_metrics(finished / "metrics.jsonl") if record["kind"] == "valid"]
    assert [record["step"] for record in valid] == [30, 60]
    model = sslim.load_model(finished / "model")
    assert model.config.heads["masked_prediction"].num_clusters == CLUSTERS
    assert model.frontend.statistics_source == "measured on this corpus"
    assert model.provenance[-1]["recipe"] == "melhubert-tiny"


def test_the_same_command_on_a_finished_run_changes_nothing(corpus: Corpus, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_text()
    digest = (finished / "model" / "digests.json").read_text()
    assert run(*TINY, corpus.path, "--labels", "made", "--output", finished) == 0
    assert (finished / "metrics.jsonl").read_text() == before
    assert (finished / "model" / "digests.json").read_text() == digest


def start(arguments: list[object], *launcher: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *(launcher or ("sslim",)), "pretrain", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_run_killed_with_kill_9_and_started_again_is_the_undisturbed_run(
    corpus: Corpus, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    arguments = [*TINY, corpus.path, "--labels", "made", "--output", output, "--set", "training.save_every=7"]
    process = start(arguments)
    deadline = time.monotonic() + 120
    while not (output / "checkpoints" / "step-00000021").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (output / "model").exists()  # it was stopped in the middle
    again = start(arguments)
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0, said
    for name in ("model/model.safetensors", "checkpoints/step-00000060/optimizer.safetensors"):
        assert (output / name).read_bytes() == (finished / name).read_bytes(), name
    logs = []
    for folder in (output, finished):
        records = read_metrics(folder / "metrics.jsonl")
        logs.append([{k: v for k, v in record.items() if k not in WALL_CLOCK_FIELDS} for record in records])
    assert logs[0] == logs[1]


def test_torchrun_with_two_processes_gives_the_losses_of_one(corpus: Corpus, tmp_path: Path) -> None:
    common = [*TINY, corpus.path, "--labels", "made", "--steps", "6", "--set", "training.log_every=1"]
    assert run(*common, "--output", tmp_path / "one", "--accumulate", "2") == 0
    process = start(
        [*common, "--output", tmp_path / "two"], "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sslim"
    )
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    one, two = (
        [record["masked_loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl") if record["kind"] == "train"]
        for name in ("one", "two")
    )
    assert len(one) == 6
    assert two == pytest.approx(one, rel=1e-5)


def test_other_settings_in_the_same_folder_are_refused(
    corpus: Corpus, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*TINY, corpus.path, "--labels", "made", "--output", finished, "--seed", "7") == 2
    assert "seed = 0, this command asks for 7" in capsys.readouterr().err


def test_a_run_can_be_repeated_from_its_run_json(corpus: Corpus, finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert run(finished / "run.json", corpus.path, "--labels", "made", "--output", again, "--threads", "1") == 0
    want, got = (sslim.load_model(folder / "model").state_dict() for folder in (finished, again))
    for name, tensor in want.items():
        assert torch.equal(tensor, got[name]), name


def test_a_second_stage_starts_from_the_first_with_a_new_head(corpus: Corpus, finished: Path, tmp_path: Path) -> None:
    finer = [2 * label_sequence(i) + np.arange(len(label_sequence(i))) % 2 for i in range(len(corpus))]
    write_labels(corpus, "finer", finer, 2 * CLUSTERS)
    second = tmp_path / "second"
    settings = ["--labels", "finer", "--output", second, "--init-from", finished]
    assert run(*TINY, corpus.path, *settings, "--init-optimizer", "--steps", "1") == 0
    model, first = sslim.load_model(second / "model"), sslim.load_model(finished / "model")
    assert model.config.heads["masked_prediction"].num_clusters == 2 * CLUSTERS
    moved = (model.encoder.blocks[0].attention.query.weight - first.encoder.blocks[0].attention.query.weight).abs().max()
    assert 0 < moved < 0.01  # one step away from the first stage, not drawn anew
    assert [p["recipe"] for p in model.provenance if p.get("step") == "pretrain"] == ["melhubert-tiny"] * 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["melhubert-tinny"], "did you mean 'melhubert-tiny'"),
        ([*TINY, "--labels", "mad"], "has no label set 'mad'; did you mean 'made'"),
        ([*TINY, "--set", "objective.masking.span_lengt=3"], "did you mean 'span_length'"),
        ([*TINY, "--set", "data.min_s=100"], "is left to train on"),
        ([*TINY, "--labels", "made", "--set", "data.valid_split=dev"], "has no split 'dev'"),
        ([*TINY, "--set", "nonsense"], "is not of the form KEY=VALUE"),
        ([*TINY, "--labels", "made", "--model-config", "x.yaml"], "give both"),
    ],
)
def test_mistakes_get_one_sentence(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    labels = [] if "--labels" in arguments else ["--labels", "made"]
    assert run(arguments[0], corpus.path, *arguments[1:], *labels, "--output", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_corpus_with_a_fault_is_refused_in_the_first_seconds(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [None if i == 3 else label_sequence(i) for i in range(len(corpus))]
    write_labels(corpus, "broken", broken, CLUSTERS)  # type: ignore[arg-type]
    assert run(*TINY, corpus.path, "--labels", "broken", "--output", tmp_path / "run") == 2
    assert "utterance utt3 has no labels in broken" in capsys.readouterr().err


def write_reference_layout(folder: Path, num_utterances: int = 12) -> Path:
    """The reference's CSV with normalised float64 features and int64 labels as npy (spec/melhubert.md 3.2)."""
    (folder / "feature").mkdir(parents=True)
    (folder / "cluster").mkdir()
    rows = ["file_path,label_path,length"]
    for i in range(num_utterances):
        values = label_sequence(i)
        np.save(folder / "feature" / f"utt{i}.npy", np.random.default_rng(i).normal(size=(len(values), 40)))
        np.save(folder / "cluster" / f"utt{i}.npy", values.astype(np.int64))
        rows.append(f"{folder}/feature/utt{i}.npy,{folder}/cluster/utt{i}.npy,{len(values)}")
    np.save(folder / "mean-std.npy", np.stack([np.full(40, 13.0), np.full(40, 3.5)]))
    path = folder / "data.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


MODEL_YAML = """
melhubert:
  feat_emb_dim: 80
  pos_emb_type: conv
  pos_conv_depth: 1
  conv_pos: 16
  conv_pos_groups: 4
  encoder_layers: 2
  encoder_embed_dim: 32
  encoder_ffn_embed_dim: 64
  encoder_attention_heads: 4
  activation_fn: gelu
  layer_norm_first: False
  attention_type: original
  num_cluster: 512
  pred_masked_weight: 1.0
  pred_nomask_weight: 0.0
  mask_prob: 0.70
  mask_length: 5
  mask_selection: static
  mask_other: 0.0
  no_mask_overlap: False
  mask_min_space: 1
  learnable_mask_emb: False
  mask_before_proj: True
  dropout: 0.1
  attention_dropout: 0.1
  activation_dropout: 0.1
  encoder_layerdrop: 0.0
"""
RUNNER_YAML = """
runner:
  n_epochs: 2
  total_steps: -1
  gradient_clipping: 10.0
  gradient_accumulate_steps: 2
  log_step: 2
  save_every_x_epochs: 1
optimizer:
  lr: 1.e-4
  betas: [0.9, 0.999]
  eps: 1.e-8
  weight_decay: 0
datarc:
  num_workers: 0
  train_batch_size: 4
  max_timestep: -100
  sequence_length: 750
  sets: ['{csv}']
"""


def test_melhuberts_yaml_files_run_as_they_are(tmp_path: Path) -> None:
    csv = write_reference_layout(tmp_path / "reference")
    (tmp_path / "model.yaml").write_text(MODEL_YAML)
    (tmp_path / "runner.yaml").write_text(RUNNER_YAML.replace("{csv}", str(csv)))
    output = tmp_path / "run"
    assert run("-g", tmp_path / "model.yaml", "-c", tmp_path / "runner.yaml", "-n", output) == 0
    model = sslim.load_model(output / "model")
    assert model.config.encoder.dim == 32
    assert model.frontend.frame_shift_s == pytest.approx(0.02)
    torch.testing.assert_close(model.frontend.mean, torch.full((40,), 13.0))
    settings = json.loads((output / "run.json").read_text())["recipe"]
    assert (
        settings["objective"]["masking"] | {"probability": 0.7, "span_length": 5, "edges": "reference"}
        == settings["objective"]["masking"]
    )
    records = [record for record in read_metrics(output / "metrics.jsonl") if record["kind"] == "train"]
    assert records[-1]["step"] == 4  # 12 utterances by 4 are 3 micro-batches, 2 of them a step: 2 steps an epoch, 2 epochs
    assert abs(records[0]["masked_loss"] - math.log(512)) < 0.7


@pytest.mark.parametrize(
    ("model", "runner", "sentence"),
    [
        (MODEL_YAML.replace("mask_prob", "mask_porb"), RUNNER_YAML, "has no key 'mask_porb'; did you mean 'mask_prob'"),
        (MODEL_YAML.replace("original", "causal"), RUNNER_YAML, "was not causal in the reference"),
        (MODEL_YAML, RUNNER_YAML.replace("datarc", "datarcs"), "has no section 'datarc'; did you mean 'datarcs'"),
        (MODEL_YAML, RUNNER_YAML + "prune:\n  sparsity: [0.2]\n", "'prune' belongs to compression"),
        (MODEL_YAML, RUNNER_YAML.replace("1.e-4", "fast"), "lr is 'fast', expected a number"),
        ("- a\n- b\n", RUNNER_YAML, "holds no sections"),
        ("a: [", RUNNER_YAML, "is not a YAML file"),
    ],
)
def test_mistakes_in_the_yaml_files_get_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, runner: str, sentence: str
) -> None:
    (tmp_path / "model.yaml").write_text(model)
    (tmp_path / "runner.yaml").write_text(runner)
    assert run("-g", tmp_path / "model.yaml", "-c", tmp_path / "runner.yaml", "-n", tmp_path / "run") == 2
    assert sentence in capsys.readouterr().err
