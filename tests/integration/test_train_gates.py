"""Joint distillation and pruning from end to end: reaches the target, cuts what was trained, resumes, is distilled again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import soundfile
import torch

import sslim
from sslim.compress.gates import GateConfig
from sslim.compress.origins import numbers
from sslim.data.corpus import Corpus
from sslim.data.prepare import prepare
from sslim.data.source_kinds import load_source
from sslim.data.sources import Source, SourceUtterance
from sslim.frontends import ConvFrontend, ConvFrontendConfig
from sslim.models import SpeechModel, build_model
from sslim.models.elastic import count_parameters
from sslim.models.hubert import hubert, narrow_conv_layers
from sslim.models.melhubert import melhubert, melhubert_frontend
from sslim.objectives.gated import GatedConfig
from sslim.recipes.corpus_batches import DataConfig
from sslim.recipes.distil import NamedTeacher, distil
from sslim.recipes.distil_losses import loss_for
from sslim.recipes.distil_recipes import recipe_for_model
from sslim.recipes.gates import GatesRecipe, gates_mini_recipe, train_gates
from sslim.storage import load_tensors
from sslim.training import OptimizerConfig, read_metrics

SMALL = {"dim": 32, "num_heads": 8, "feedforward_dim": 64, "conv_kernel_size": 16, "conv_groups": 4}
STEPS, TARGET = 150, 0.5


def quiet(text: str) -> None:
    """Says nothing."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Features whose loud bands change every 200 ms."""

    def read(i: int) -> np.ndarray:
        rng = np.random.default_rng(i)
        bands = np.repeat(rng.integers(0, 6, 8), 20)[: 100 + 20 * (i % 4)]
        return (rng.normal(0, 0.5, (len(bands), 40)) + 4 * (np.arange(40) // 7 == bands[:, None])).astype(np.float32)

    utterances = [SourceUtterance(id=f"utt{i}", read_features=lambda i=i: read(i)) for i in range(16)]  # type: ignore[misc]
    source = Source(name="made", utterances=utterances, num_utterances=16, frontend=melhubert_frontend(10))
    return prepare(source, tmp_path_factory.mktemp("gates") / "corpus").corpus


def teacher() -> NamedTeacher:
    """A random net whose layers do something."""
    model = build_model(replace(melhubert(num_layers=3, dropout=0.1, **SMALL), heads={}), torch.Generator().manual_seed(5))
    for parameter in model.encoder.blocks.parameters():
        parameter.data *= 4.0
    return NamedTeacher(model=model, name="teacher")


def recipe(model: SpeechModel, **changes: object) -> GatesRecipe:
    base = gates_mini_recipe(model.config, model.config)
    training = replace(
        base.training, total_steps=STEPS, log_every=10, save_every=75, validate_every=75, device="cpu",
        optimizer=replace(base.training.optimizer, lr=1e-3),
    )  # fmt: skip
    lagrangian = GatedConfig(sparsity=TARGET, ramp_steps=75, learning_rate_factor=100.0)
    data = DataConfig(batch_s=4.0, crop_s=1.2)
    return replace(base, training=training, lagrangian=lagrangian, data=data, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("gates") / "run"
    whole = teacher()
    said: list[str] = []
    assert train_gates(recipe(whole.model), whole, corpus.path, output, say=said.append).finished
    assert "of the parameters are gone, 50.0% were asked for" in said[-1]
    assert "train for more steps" not in said[-1]
    return output


def test_the_target_is_reached_and_the_cut_model_is_what_was_trained(finished: Path) -> None:
    records, checks = read_metrics(finished, kind="train"), read_metrics(finished, kind="valid")
    assert records[-1]["sparsity"] == pytest.approx(TARGET, abs=0.02)
    assert records[-1]["target"] == TARGET
    assert records[0]["target"] < 0.1
    assert records[0]["sparsity"] < 0.25
    assert {"lambda1", "lambda2", "cosine"} <= records[-1].keys()
    whole, small = teacher().model, sslim.load_model(finished / "model")
    sizes = [count_parameters(model.config, with_heads=False) for model in (whole, small)]
    assert 1 - sizes[1] / sizes[0] == pytest.approx(TARGET, abs=0.02)
    encoder, values = small.config.encoder, json.loads((finished / "gates.json").read_text())
    assert [sum(v > 0 for v in part) for part in values["heads"]] == [block.num_heads for block in encoder.blocks]
    assert len({block.feedforward_dim for block in encoder.blocks}) > 1  # layers differ
    assert (encoder.dropout, encoder.attention_dropout) == (0.1, 0.1)  # those of the whole model, for later training
    assert [note["step"] for note in small.provenance] == ["distil", "gates"]
    assert checks[-1]["sparsity"] == pytest.approx(values["expected_parameters"] / -sizes[0] + 1, abs=1e-5)


def test_every_checkpoint_has_the_model_of_the_moment(finished: Path) -> None:
    early = finished / "checkpoints" / "step-00000075"
    small, last = (sslim.load_model(folder / "model") for folder in (early, finished))
    assert small.num_parameters() != last.num_parameters()
    tensors = load_tensors(early / "objective.safetensors")
    assert tensors["multipliers"].shape == (2,)
    assert tensors["gates.heads.0"].shape == (8,)
    whole = teacher().model.encoder.blocks[0].feedforward.up.weight.shape  # type: ignore[union-attr]
    assert tensors["objective.student.encoder.blocks.0.feedforward.up.weight"].shape == whole
    assert "gates" in json.loads((finished / "run.json").read_text())["recipe"]


def test_an_interrupted_run_goes_on_to_the_same_model(corpus: Corpus, finished: Path, tmp_path: Path) -> None:
    output, whole = tmp_path / "run", teacher()
    shutil.copytree(finished, output)  # as if it had been killed after its first checkpoint
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints" / f"step-{STEPS:08d}")
    train_gates(recipe(whole.model), whole, corpus.path, output, say=quiet)
    for name in ("model/model.safetensors", "gates.json"):
        assert (output / name).read_bytes() == (finished / name).read_bytes()
    other = replace(recipe(whole.model), lagrangian=GatedConfig(sparsity=0.6))
    with pytest.raises(ValueError, match="lagrangian"):
        train_gates(other, whole, corpus.path, output, say=quiet)


def test_the_model_that_is_pruned_stays_as_it_is(corpus: Corpus, tmp_path: Path) -> None:
    whole, same = teacher(), teacher()
    short, said = recipe(whole.model), list[str]()
    two = replace(short, training=replace(short.training, total_steps=2))
    train_gates(two, whole, corpus.path, tmp_path / "run", say=said.append)
    assert said[-1].endswith("train for more steps, or let the gates learn faster")
    assert all(a.equal(b) for a, b in zip(whole.model.parameters(), same.model.parameters(), strict=True))
    assert not whole.model.heads
    with pytest.raises(ValueError, match=r"sparsity 0\.97 is asked for"):
        train_gates(replace(short, lagrangian=GatedConfig(sparsity=0.97)), whole, corpus.path, tmp_path / "far", say=quiet)
    compiled = replace(short, training=replace(short.training, compile=True))
    with pytest.raises(ValueError, match="compile is asked for"):
        train_gates(compiled, whole, corpus.path, tmp_path / "compiled", say=quiet)


def test_the_cut_model_is_distilled_again_from_where_the_gates_left_it(corpus: Corpus, finished: Path, tmp_path: Path) -> None:
    """Cut and gated model have one loss, linear maps included; then more training lowers it."""
    whole = teacher()
    losses = []
    for name, steps, learning_rate in (("at once", 1, 1e-12), ("later", 40, 1e-3)):
        small = sslim.load_model(finished / "model")
        again = recipe_for_model("again", small.config, whole.model.config, "dp-hubert", None)
        training = replace(
            recipe(whole.model).training, total_steps=steps, optimizer=OptimizerConfig(kind="adamw", lr=learning_rate)
        )
        again = replace(again, training=training, data=DataConfig(batch_s=4.0, crop_s=1.2))
        distil(again, whole, corpus.path, tmp_path / name, student=small, say=quiet)
        losses.append(read_metrics(tmp_path / name, kind="valid")[-1]["distance_loss"])
    assert losses[0] == pytest.approx(read_metrics(finished, kind="valid")[-1]["distance_loss"], abs=1e-5)
    assert losses[1] < losses[0]


def test_channels_of_a_waveform_model(tmp_path: Path) -> None:
    """Convolutions, heads and units together; gradients reach convolutions though the model's own scale for them is 0."""
    rng = np.random.default_rng(0)
    for i in range(8):
        pitch = np.repeat(rng.uniform(0.02, 0.5, 5), 3200)
        soundfile.write(tmp_path / f"utt{i}.wav", 0.3 * np.sin(np.cumsum(pitch)) + 0.01 * rng.normal(size=len(pitch)), 16000)
    corpus = prepare(load_source(tmp_path, "folder"), tmp_path / "corpus").corpus
    config = hubert(
        num_layers=2, **SMALL, conv_layers=narrow_conv_layers(16), num_clusters=None, gradient_scale=0.0, conv_norm="layer"
    )  # type: ignore[arg-type]
    whole = NamedTeacher(model=build_model(config, torch.Generator().manual_seed(5)), name="teacher")
    base = recipe(whole.model, gates=GateConfig(channels=0.5), objective=loss_for("dp-hubert", config, config))
    short = replace(base, training=replace(base.training, validate_every=None), data=DataConfig(batch_s=3.0, crop_s=1.0))
    train_gates(short, whole, corpus.path, tmp_path / "run", say=quiet)
    small = sslim.load_model(tmp_path / "run" / "model")
    front = small.config.frontend
    assert isinstance(front, ConvFrontendConfig)
    assert sum(layer.channels for layer in front.layers) < 0.9 * 16 * 7
    assert front.gradient_scale == 0.0
    assert front.channel_scale
    sizes = [count_parameters(model.config, with_heads=False) for model in (whole.model, small)]
    assert 1 - sizes[1] / sizes[0] == pytest.approx(TARGET, abs=0.03)
    kept = list(numbers(small.provenance[-1]["kept_channels"][0]))
    first, before = (cast(ConvFrontend, model.frontend).layers[0].weight for model in (small, whole.model))
    assert (first - before[kept]).abs().max() > 1e-3
