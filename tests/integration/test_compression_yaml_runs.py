"""``sslim compress yaml``: the reference's files run as they are, on a checkpoint that the reference wrote, and go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_pretrain import MODEL_YAML, write_reference_layout

import sslim
from sslim.cli import main
from sslim.compress.calibration import Calibration
from sslim.compress.heads import HeadPruning, prune_heads
from sslim.compress.origins import origins
from sslim.compress.weights import held_zeros, prunable_weights
from sslim.data.corpus import Corpus
from sslim.models import SpeechModel
from sslim.recipes import compression_runs
from sslim.recipes.compression_runs import run_compression
from sslim.recipes.compression_yaml import read_compression_yaml
from sslim.recipes.corpus_batches import DataConfig, split_utterances
from sslim.training import read_metrics

CHECKPOINT = Path(__file__).resolve().parents[1] / "parity" / "assets" / "melhubert_legacy" / "pretrain.ckpt"
MODEL = MODEL_YAML.replace("encoder_layers: 2", "encoder_layers: 3") + "task:\n  sequence_length: 150\n"
RUNNER = """
runner:
  n_epochs: -1
  total_steps: {steps}
  gradient_clipping: 10.0
  gradient_accumulate_steps: 1
  log_step: 1
optimizer:
  lr: 1.e-3
  betas: [0.9, 0.999]
  eps: 1.e-8
  weight_decay: 0
datarc:
  num_workers: 0
  train_batch_size: 4
  max_timestep: -100
  sets: ['{csv}']
"""
WEIGHTS = """
prune:
  sparsity: [.3, .6]
  warnup: 4
  period: 4
  n_iters: 2
  pruning_condition: converge
  converge_loss_tolerance: 0
  average_length: 2
  smooth_factor: 0.5
  strategy: L1Unstructured
"""
HEADS = """
prune:
  target: by_whole
  metric: data-driven
  total_steps: 2
  num_heads_each_step: 4
  interval: [0, 4]
  warm_up: 3
  data_ratio: 0.5
  normalize_by_layer: 2
"""
ROWS = """
prune:
  total_steps: 2
  num_rows_each_step: 16
  interval: 4
  warm_up: 3
"""
SECTION = MODEL_YAML.strip().removeprefix("melhubert:\n")
DISTILLATION = f"""
melhubert:
  initial_from_teacher: True
{SECTION}
teacher:
{SECTION.replace("encoder_layers: 2", "encoder_layers: 3")}
task:
  sequence_length: 150
loss_param:
  T: 2
  alpha: 0.5
  type: masked
"""


class Files:
    """The reference's corpus, a folder for YAML files, and the corpus that the first run prepares."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.csv = folder, write_reference_layout(folder / "reference")
        self.corpus: Path | None = None

    def write(self, name: str, runner: str, model: str = MODEL) -> tuple[Path, Path]:
        paths = self.folder / f"{name}-model.yaml", self.folder / f"{name}-runner.yaml"
        for path, text in zip(paths, (model, runner), strict=True):
            path.write_text(text)
        return paths

    def run(self, name: str, runner: str, output: Path, *options: object, model: str = MODEL) -> int:
        corpus = [] if self.corpus is None else [self.corpus]
        arguments = [*self.write(name, runner.replace("{csv}", str(self.csv)), model), CHECKPOINT, *corpus, "--output", output]
        code = main(["compress", "yaml", *map(str, arguments), *map(str, options)])
        if self.corpus is None and code == 0:
            self.corpus = output.with_name(f"{output.name}-corpus")
        return code


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("yaml"))


@pytest.fixture(scope="module")
def finished(files: Files) -> dict[str, Path]:
    """One run of each kind; the first one prepares the corpus from the CSV file."""
    runs = {
        "weights": (RUNNER.replace("{steps}", "12") + WEIGHTS, MODEL),
        "heads": (RUNNER.replace("{steps}", "10") + HEADS, MODEL),
        "rows": (RUNNER.replace("{steps}", "10") + ROWS, MODEL),
        "distil": (RUNNER.replace("n_epochs: -1", "n_epochs: 2").replace("{steps}", "-1"), DISTILLATION),
    }
    for name, (runner, model) in runs.items():
        assert files.run(name, runner, files.folder / name, model=model) == 0
    return {name: files.folder / name for name in runs}


def rows_of(run: Path) -> list[dict]:
    return json.loads((run / "compression.json").read_text())["rows"]


def test_weights_are_pruned_inside_one_training(finished: dict[str, Path]) -> None:
    """The loss never rests: the second pruning is put off four times, and the run is longer by that."""
    model = sslim.load_model(finished["weights"] / "model")
    weights = prunable_weights(model, biases=True)
    zeros, total = sum(int((t == 0).sum()) for t in weights.values()), sum(t.numel() for t in weights.values())
    assert zeros == round(0.6 * total)
    record = model.provenance[-1]
    assert (record["step"], record["scope"], record["biases"]) == ("weights", "global", True)
    assert [(each["update"], each["extensions"]) for each in record["prunings"]] == [(4, 0), (24, 4)]
    assert any(name.endswith(".bias") for name in held_zeros(model))  # known as pruned from the provenance
    records = read_metrics(finished["weights"] / "training" / "metrics.jsonl", kind="train")
    assert [records[0]["step"], records[-1]["step"]] == [1, 28]
    assert {each["lr"] for each in records} == {1e-3}


def test_heads_are_pruned_between_trainings(finished: dict[str, Path]) -> None:
    run = finished["heads"]
    assert [sum(row["heads"]) for row in rows_of(run)] == [12, 8, 4]
    model = sslim.load_model(run / "model")
    assert [entry["step"] for entry in model.provenance][-5:] == ["pretrain", "heads", "pretrain", "heads", "pretrain"]
    assert [len(part) for part in origins(model).heads] == rows_of(run)[-1]["heads"]
    lengths = {}
    for name in ("00-training", "01-heads", "02-heads"):
        lengths[name] = read_metrics(run / name / "training" / "metrics.jsonl", kind="train")[-1]["step"]
    assert lengths == {"00-training": 3, "01-heads": 4, "02-heads": 3}


def test_every_training_has_an_order_of_its_own_and_holds_out_the_same(files: Files, finished: dict[str, Path]) -> None:
    described = [json.loads(path.read_text()) for path in sorted(finished["heads"].glob("*/training/run.json"))]
    recipes = [each["recipe"] for each in described]
    assert len({recipe["training"]["seed"] for recipe in recipes}) == 3
    assert {recipe["data"]["split_seed"] for recipe in recipes} == {0}
    assert files.corpus is not None
    corpus, held_out = Corpus.open(files.corpus), {}
    for split_seed in (0, None):
        data = DataConfig(split_seed=split_seed)
        held_out[split_seed] = {tuple(split_utterances(corpus, data, seed)[1].tolist()) for seed in range(10)}
    assert len(held_out[0]) == 1
    assert len(held_out[None]) > 1  # the control


def test_rows_are_pruned_between_trainings(finished: dict[str, Path]) -> None:
    assert [row["feedforward"] for row in rows_of(finished["rows"])] == [[64] * 3, [48] * 3, [32] * 3]
    model = sslim.load_model(finished["rows"] / "model")
    assert [entry["step"] for entry in model.provenance].count("rows") == 2
    torch.testing.assert_close(model.frontend.mean, torch.full((40,), 13.0))  # those of the CSV's corpus


def test_distillation_trains_the_student_of_the_model_file(files: Files, finished: dict[str, Path]) -> None:
    student = sslim.load_model(finished["distil"] / "model")
    assert student.num_layers == 2
    origin = student.provenance[-1]
    assert (origin["step"], origin["loss"], origin["steps"]) == ("distil", "logits", 6)  # 12 utterances, 4 a batch, 2 epochs
    described = json.loads((finished["distil"] / "training" / "run.json").read_text())["recipe"]
    objective = described["objective"]
    assert (objective["temperature"], objective["alpha"], objective["masking"]["edges"]) == (2.0, 0.5, "reference")
    assert objective["scale_by_temperature"] is False
    assert described["init"]["layers"] == [1, 2]
    record = read_metrics(finished["distil"] / "training" / "metrics.jsonl", kind="valid")[-1]
    assert record["loss"] == pytest.approx(0.5 * record["divergence"] + 0.5 * record["label_loss"], rel=1e-5)
    assert (objective["mask_at"], objective["teacher_mask_at"]) == ("features", "features")


def test_dropout_is_the_files_and_the_architecture_the_models_own(files: Files, finished: dict[str, Path]) -> None:
    """A pruned model is pruned on though the file describes the whole one; without dropout training goes another way."""
    pruned = finished["rows"] / "model"
    quiet = MODEL.replace("dropout: 0.1", "dropout: 0.0")
    runner = RUNNER.replace("{steps}", "10").replace("{csv}", str(files.csv)) + ROWS.replace("16", "8")
    recipe = read_compression_yaml(*files.write("again", runner, quiet))
    assert files.corpus is not None
    assert run_compression(recipe, pruned, files.corpus, files.folder / "again", say=lambda _: None) is None
    model = sslim.load_model(files.folder / "again" / "model")
    assert [block.feedforward_dim for block in model.config.encoder.blocks] == [16] * 3
    assert model.config.encoder.dropout == 0.0
    assert sslim.load_model(pruned).config.encoder.dropout == 0.1


def test_scores_look_at_no_more_speech_than_fits_in_memory(
    files: Files, finished: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def watched(model: SpeechModel, settings: HeadPruning, calibration: Calibration) -> SpeechModel:
        seen.append(sum(len(features.lengths) for features in calibration.features))
        return prune_heads(model, settings, calibration)

    monkeypatch.setattr(compression_runs, "prune_heads", watched)
    recipe = read_compression_yaml(*(files.folder / f"heads-{part}.yaml" for part in ("model", "runner")))
    assert files.corpus is not None
    for most, notes in ((100, 0), (3, 1)):
        monkeypatch.setattr(compression_runs, "MOST_UTTERANCES", most)
        said: list[str] = []
        run_compression(recipe, CHECKPOINT, files.corpus, files.folder / f"at-most-{most}", say=said.append)
        assert len([text for text in said if "scores look at" in text]) == notes
    assert seen == [6, 6, 3, 3]  # half of 11 utterances to train on


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("weights", ["model", "training/model", "training/checkpoints/step-00000028"]),
        ("heads", ["model", "02-heads/model", "02-heads/training"]),
        ("heads", ["model", "02-heads", "01-heads/model", "01-heads/training/model"]),
        ("heads", ["model", "02-heads/model", "02-heads/cut", "02-heads/training"]),
        ("rows", ["model", "01-rows", "02-rows", "00-training/model", "00-training/training"]),
        ("distil", ["model", "training/model", "training/checkpoints"]),
    ],
)
def test_it_goes_on_at_any_point(files: Files, finished: dict[str, Path], tmp_path: Path, name: str, lost: list[str]) -> None:
    whole, output = finished[name], tmp_path / name
    shutil.copytree(whole, output)
    for part in lost:
        shutil.rmtree(output / part)
    runner, model = (files.folder / f"{name}-{part}.yaml" for part in ("runner", "model"))
    assert files.run(f"{name}-again", runner.read_text(), output, model=model.read_text()) == 0
    want, got = (sslim.load_model(folder / "model") for folder in (whole, output))
    assert got.provenance == want.provenance
    assert all(torch.equal(tensor, got.state_dict()[key]) for key, tensor in want.state_dict().items())
    assert rows_of(output) == rows_of(whole)


def test_what_is_printed_says_that_zeros_save_no_time(
    files: Files, finished: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("weights", "rows"):
        runner, model = (files.folder / f"{name}-{part}.yaml" for part in ("runner", "model"))
        assert files.run(name, runner.read_text(), finished[name], model=model.read_text()) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert ("time does not change without a sparse kernel" in said) is (name == "weights")


def test_mistakes_get_one_sentence(
    files: Files, finished: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = RUNNER.replace("{steps}", "10") + ROWS
    assert files.run("other", runner.replace("lr: 1.e-3", "lr: 1.e-4"), finished["rows"]) == 2
    assert "holds the compression of another recipe" in capsys.readouterr().err
    assert files.run("other", runner, tmp_path / "out", model=MODEL.replace("feat_emb_dim: 80", "feat_emb_dim: 40")) == 2
    assert "the files are for 40 features (feat_emb_dim), and" in capsys.readouterr().err
    assert files.run("other", runner, tmp_path / "out", "--labels", "km") == 2
    assert "has no label set 'km'" in capsys.readouterr().err
    corpus, files.corpus = files.corpus, None
    assert files.run("other", runner.replace("['{csv}']", "[]"), tmp_path / "out") == 2
    assert "no corpus given" in capsys.readouterr().err
    files.corpus = corpus
    shutil.copytree(corpus, tmp_path / "corpus")
    assert main(["cluster", str(tmp_path / "corpus"), "--clusters", "6", "--name", "six"]) == 0
    files.corpus = tmp_path / "corpus"
    assert files.run("other", runner, tmp_path / "out", "--labels", "six") == 2
    assert "has a head over 512 clusters and label set six 6" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    files.corpus = corpus
