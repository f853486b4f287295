"""``sslim pretrain tera-tiny`` without labels from end to end, its report, and what compression does with the result."""

import json
import os
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
from sslim.config import dump_json, to_plain
from sslim.data.corpus import Corpus
from sslim.data.prepare import prepare
from sslim.data.sources import Source, SourceUtterance
from sslim.models import ModelConfig, build_model
from sslim.models.melhubert import melhubert_frontend
from sslim.models.reconstruction import HEAD, tera
from sslim.objectives import AlterationConfig, Reconstruction, ReconstructionConfig
from sslim.recipes.calibration import CalibrationConfig, calibrate
from sslim.recipes.pretrain import read_recipe
from sslim.recipes.reconstruction import RECIPES, tera_fmllr_base, tera_tiny
from sslim.recipes.report_example import make_restoration
from sslim.report import load_restoration
from sslim.storage import load_tensors
from sslim.training import read_metrics

TINY = ("tera-tiny", "--steps", "80", "--set", "data.batch_s=8", "--threads", "1", "--set", "training.save_every=20")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Features whose loud bands change every 200 ms, so that what is hidden can be guessed from what is left."""

    def read(i: int) -> np.ndarray:
        rng = np.random.default_rng(i)
        bands = np.repeat(rng.integers(0, 6, 12), 20)[: 161 + 20 * (i % 4)]
        return (rng.normal(0, 0.3, (len(bands), 40)) + 4 * (np.arange(40) // 7 == bands[:, None])).astype(np.float32)

    utterances = [SourceUtterance(id=f"utt{i}", read_features=lambda i=i: read(i)) for i in range(30)]  # type: ignore[misc]
    source = Source(name="made", utterances=utterances, num_utterances=30, frontend=melhubert_frontend(10))
    return prepare(source, tmp_path_factory.mktemp("reconstruct") / "corpus").corpus


def run(*arguments: object) -> int:
    return main([*map(str, arguments)])


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reconstruct") / "run"
    assert run("pretrain", *TINY, corpus.path, "--output", output) == 0
    return output


def losses(folder: Path, name: str = "altered_loss", kind: str = "train") -> list[float]:
    return [record[name] for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == kind]


def test_it_restores_better_than_the_mean_frame_and_saves_a_model_that_loads(finished: Path) -> None:
    first, last = losses(finished)[0], losses(finished)[-1]
    assert last < 0.9 * first
    assert losses(finished, kind="valid")[-1] < 0.9 * losses(finished, "mean_frame_loss", "valid")[-1]
    model = sslim.load_model(finished / "model")
    assert model.config.heads["reconstruction"].output_dim == 80
    told = json.loads((finished / "run.json").read_text())
    assert "labels" not in told
    assert "labels" not in model.provenance[-1]
    assert told["recipe"]["objective"]["kind"] == "reconstruction"
    assert read_recipe(finished / "run.json").task.head == "reconstruction"


def test_a_run_that_is_stopped_and_started_again_is_the_undisturbed_run(corpus: Corpus, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    script = (
        "import os, sslim.training.trainer as t; save = t.Trainer._save\n"
        "def stop(self):\n"
        "    save(self)\n"
        "    self.state.step == 40 and os._exit(9)\n"
        "t.Trainer._save = stop\n"
        "import sys; from sslim.cli import main; main(sys.argv[1:])\n"
    )
    arguments = [*TINY, str(corpus.path), "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", script, "pretrain", *arguments], env=environment, capture_output=True)
    assert killed.returncode == 9
    assert not (output / "model").exists()
    assert run("pretrain", *arguments) == 0
    want, got = (load_tensors(folder / "model" / "model.safetensors") for folder in (finished, output))
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert losses(output) == losses(finished)


def test_two_processes_give_the_losses_of_one(corpus: Corpus, tmp_path: Path) -> None:
    common = [*TINY, str(corpus.path), "--steps", "3", "--set", "training.log_every=1"]
    assert run("pretrain", *common, "--output", tmp_path / "one", "--accumulate", "2") == 0
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sslim"]
    command = [sys.executable, "-m", *launcher, "pretrain", *common, "--output", str(tmp_path / "two")]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert load_restoration(tmp_path / "two") is not None


def test_a_report_shows_what_was_altered_and_restored(corpus: Corpus, finished: Path, tmp_path: Path) -> None:
    assert run("report", finished, "--output", tmp_path / "report.html") == 0
    page = (tmp_path / "report.html").read_text()
    assert all(f">{title}<" in page for title in ("what the model saw", "restored", "difference"))
    shown = load_restoration(finished)
    assert shown is not None
    assert shown.frame_shift_s == pytest.approx(0.01)  # stacked frames taken apart
    hidden = np.abs(shown.altered_TF).sum(1) == 0
    assert hidden.any()
    assert shown.covered_T[hidden].all()
    assert (shown.altered_TF[:, shown.channels_O] == 0).all()
    index = corpus.ids().index(shown.id)
    model = sslim.load_model(finished / "model")
    base = torch.from_numpy(corpus.features(index).astype(np.float32))
    base = (base - model.frontend.mean) / model.frontend.std  # type: ignore[union-attr,operator]
    np.testing.assert_allclose(shown.original_TO, base.numpy()[: len(shown.original_TO)], atol=1e-3)
    visible = ~shown.covered_T
    noise = make_restoration(
        model,
        ReconstructionConfig(alteration=AlterationConfig(span_min=4, span_max=4, noise_probability=1.0)),
        corpus,
        index=index,
        seed=0,
    )
    kept = [np.abs(each.altered_TF - each.original_TO)[:, ~each.channels_O] for each in (shown, noise)]
    assert kept[1][~noise.covered_T].mean() == pytest.approx(0.16, abs=0.02)  # of noise with standard deviation 0.2
    assert kept[0][visible].mean() < 0.2


def test_a_model_goes_on_with_its_head_and_another_family_gets_one(corpus: Corpus, finished: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    assert run("pretrain", *TINY, corpus.path, "--init-from", finished, "--steps", "1", "--output", second) == 0
    names = "heads.reconstruction.outer.weight"
    before, after = (load_tensors(folder / "model" / "model.safetensors")[names] for folder in (finished, second))
    assert (before - after).abs().max() < 0.02  # one update away, not drawn anew
    assert losses(second, kind="valid")[0] < 1.05 * losses(finished, kind="valid")[-1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--labels", "made"), "labels 'made' are named, but recipe tera-tiny learns without labels: leave out --labels"),
        (("--iterations", "2"), "recipe tera-tiny learns without labels, so there is nothing to cluster"),
        (
            ("--set", "objective.kind=masked_predict"),
            "kind is 'masked_predict', expected one of masked_prediction, reconstruction",
        ),
        (("--set", "objective.alteration.span_min=9"), "spans of 9 to 4 frames"),
    ],
)
def test_mistakes_get_one_sentence(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str
) -> None:
    assert run("pretrain", *TINY, corpus.path, *arguments, "--output", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_front_end_trains_on_stored_features_of_its_width(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.json"
    sizes = {"num_layers": 1, "dim": 16, "num_heads": 2, "feedforward_dim": 16, "dropout": 0.0}
    made = to_plain(tera_fmllr_base()) | {"model": to_plain(tera(feature_dim=40, stack=3, **sizes))}
    made |= {"training": to_plain(tera_tiny().training) | {"total_steps": 3}}
    recipe.write_text(dump_json(made))
    assert run("pretrain", recipe, corpus.path, "--output", tmp_path / "run") == 0
    assert "names no features: the model takes those of corpus made" in capsys.readouterr().out
    trained = sslim.load_model(tmp_path / "run" / "model").config
    assert (trained.frontend.features, trained.frontend.stack) == (corpus.frontend_config.features, 3)  # type: ignore[union-attr]
    made["model"] = to_plain(tera(feature_dim=39, **sizes))
    recipe.write_text(dump_json(made))
    assert run("pretrain", recipe, corpus.path, "--output", tmp_path / "other") == 2
    assert "takes 39 features from outside, and corpus made holds 40 features" in capsys.readouterr().err


def narrow(model: ModelConfig, dim: int = 24) -> ModelConfig:
    """The model with its blocks made narrow; features, stacking and the width of what it restores stay."""
    block = replace(model.transformer.blocks[0], num_heads=2, head_dim=dim // 2, feedforward_dim=dim)
    encoder = replace(model.transformer, dim=dim, blocks=(block,) * len(model.transformer.blocks))
    return replace(model, encoder=encoder, heads={HEAD: replace(model.heads[HEAD], hidden_dim=dim)})  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("mockingjay-base", "fbank80-librosa"),
        ("mockingjay-large", "fbank160-librosa"),
        ("mockingjay-large-linear", "mel160-librosa"),
        ("tera-base", "logmel80"),
        ("tera-voxceleb", "mfcc24-voxceleb"),
        ("aalbert-6l", "fbank80-librosa"),
    ],
)
def test_published_recipes_train_on_audio_prepared_with_their_features(tmp_path: Path, name: str, features: str) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "audio").mkdir()
    for number in range(4):
        soundfile.write(tmp_path / "audio" / f"{number}.wav", rng.normal(0, 0.1, 40_000 + 3_000 * number), 16_000)
    assert run("prepare", tmp_path / "audio", tmp_path / "corpus", "--features", features) == 0
    recipe = RECIPES[name]()
    training = replace(recipe.training, total_steps=2, accumulate=1, log_every=1)
    path = tmp_path / "recipe.json"
    path.write_text(dump_json(to_plain(replace(recipe, model=narrow(recipe.model), training=training))))
    assert run("pretrain", path, tmp_path / "corpus", "--output", tmp_path / "run") == 0
    assert np.isfinite(losses(tmp_path / "run", "loss")).all()
    model = sslim.load_model(tmp_path / "run" / "model")
    restored = model.heads[HEAD](model.encode(torch.randn(1, 16_000)).final)
    assert restored.shape[-1] == recipe.model.heads[HEAD].output_dim  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "method", [("rows", "--keep", "0.5", "--score", "data"), ("width", "--keep", "0.5", "--score", "data")]
)
def test_compression_goes_on_with_reconstruction(
    corpus: Corpus, finished: Path, tmp_path: Path, method: tuple[str, ...]
) -> None:
    training = ("--recover-steps", "30", "--loss", "reconstruction", "--learning-rate", "3e-3", "--batch-s", "8")
    output = tmp_path / "cut"
    assert run("compress", method[0], finished, *method[1:], "--corpus", corpus.path, *training, "--output", output) == 0
    model = sslim.load_model(output / "model")
    assert model.num_parameters() < sslim.load_model(finished / "model").num_parameters()
    assert "reconstruction" in model.config.heads
    cut = next(step for step in model.provenance if "calibration" in step)
    assert cut["calibration"]["loss"] == "reconstruction"
    recovery = next(output.glob("*/recovery"))
    assert losses(recovery)[-1] < losses(recovery)[0]


def test_calibration_losses_are_the_objectives_and_its_features_are_whole(corpus: Corpus, finished: Path) -> None:
    model = sslim.load_model(finished / "model")
    config = CalibrationConfig(num_utterances=6)
    found = calibrate(model, corpus.path, config, reconstruct=True)
    loss = sum(part(model) for part in found.losses)
    assert 0.1 < loss < 2
    assert loss.requires_grad
    itself = calibrate(model, corpus.path, config)
    for whole, other in zip(found.features, itself.features, strict=True):
        torch.testing.assert_close(whole.values, other.values)  # not the altered ones, which the losses see
    assert sum(part(model) for part in itself.losses) != loss


def test_a_model_without_the_head_is_refused(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"num_layers": 1, "dim": 16, "num_heads": 2, "feedforward_dim": 16}
    config = tera(frontend=replace(melhubert_frontend(10), normalization=tera().frontend.normalization), **sizes)
    sslim.save_model(build_model(replace(config, heads={})), tmp_path / "bare")
    training = ("--recover-steps", "5", "--loss", "reconstruction")
    bare = ("compress", "rows", tmp_path / "bare", "--keep", "0.5", "--corpus", corpus.path, *training)
    assert run(*bare, "--output", tmp_path / "cut") == 2
    assert "the model has no head 'reconstruction'; there are 40 to restore" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no head 'reconstruction'"):
        Reconstruction(sslim.load_model(tmp_path / "bare"), ReconstructionConfig())
