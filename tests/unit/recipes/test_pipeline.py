"""Pipelines: what a file may say, what is refused, rounds, budgets, and going on where one stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sslim
from sslim.compress.methods import METHODS
from sslim.config import from_plain, to_plain
from sslim.frontends import NormalizationConfig
from sslim.models import SpeechModel, build_model
from sslim.models.melhubert import melhubert
from sslim.profiling import Conditions
from sslim.recipes.pipeline import Pipeline, StepConfig, compress, read_pipeline

TEXT = """
[conditions]
seconds = 2.0
[recover]
steps = 40
[[step]]
method = "heads"
keep = 0.5
rounds = 2
[[step]]
method = "rows"
budget = "params=30k"
recover.steps = 20
[[step]]
method = "quantize"
kind = "int8-weights"
"""


def small_model() -> SpeechModel:
    config = melhubert(num_layers=2, dim=32, num_heads=4, feedforward_dim=64, conv_kernel_size=16, conv_groups=4)
    assert config.frontend is not None
    frontend = replace(config.frontend, normalization=NormalizationConfig(kind="utterance", eps=1e-3))
    return build_model(replace(config, frontend=frontend, heads={}), torch.Generator().manual_seed(1))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    sslim.save_model(small_model(), tmp_path / "model")
    return tmp_path / "model"


def pipeline(*steps: StepConfig) -> Pipeline:
    return Pipeline(steps=steps, conditions=Conditions(seconds=2.0))


def test_a_file_is_read_with_its_common_recovery(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(TEXT)
    read = read_pipeline(path)
    heads, rows, last = read.steps
    assert (heads.method, heads.settings, heads.rounds) == ("heads", {"keep": 0.5}, 2)
    assert [step.recover and step.recover.steps for step in read.steps] == [40, 20, None]  # nothing is trained after int8
    assert rows.budget == "params=30k"
    assert last.settings == {"kind": "int8-weights"}
    assert read.conditions.seconds == 2.0
    assert from_plain(Pipeline, to_plain(read)) == read


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('method = "heads"', 'method = "head"', "did you mean 'heads'"),
        ("keep = 0.5", "kept = 0.5", "no key 'kept'"),
        ("keep = 0.5", "keep = 1.5", "keep"),
        ("rounds = 2", "rounds = 0", "rounds of heads is 0"),
        ("params=30k", "parameters=30k", "no budget 'parameters'"),
        ("params=30k", "much", "cannot be read"),
        ('kind = "int8-weights"', 'kind = "int8-weights"\nrecover = true', "cannot be trained after quantize"),
        ('kind = "int8-weights"', 'kind = "int8-weights"\nbudget = "params=1k"', "cannot meet a budget"),
        ("steps = 40", "step = 40", "no key 'step'"),
        ("[[step]]\nmethod = \"rows\"", "[[steps]]\nmethod = \"rows\"", "steps"),
    ],
)  # fmt: skip
def test_what_a_file_may_not_say(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    path = tmp_path / "wrong.toml"
    assert old in TEXT
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(ValueError, match=complaint):
        read_pipeline(path)


def test_quantising_comes_last() -> None:
    with pytest.raises(ValueError, match="quantize is not the last step"):
        pipeline(StepConfig(method="quantize", settings={"kind": "fp16"}), StepConfig(method="rows", settings={"keep": 0.5}))


def test_every_method_runs_without_training_where_it_needs_no_speech(model: Path, tmp_path: Path) -> None:
    settings = {
        "weights": {"sparsity": 0.5},
        "heads": {"keep": 0.5},
        "rows": {"keep": 0.5},
        "width": {"keep": 0.5},
        "sharing": {"num_blocks": 1},
        "low-rank": {"ratio": 0.25},
        "quantize": {"kind": "int8-weights"},
    }
    assert set(settings) == set(METHODS) - {"depth"}
    whole = sslim.load_model(model)
    for name, values in settings.items():
        step = StepConfig(method=name, settings=values)
        assert compress(pipeline(step), model, None, tmp_path / name, say=lambda _: None) is None
        rows = json.loads((tmp_path / name / "compression.json").read_text())["rows"]
        small = sslim.load_model(tmp_path / name / "model")
        assert rows[0]["num_parameters"] == whole.num_parameters(with_heads=False)
        assert rows[1]["num_parameters"] == small.num_parameters(with_heads=False)
        changed = (rows[1][key] < rows[0][key] for key in ("num_parameters", "num_nonzero", "num_bytes"))
        assert any(changed), name


def test_speech_is_asked_for_where_it_is_needed(model: Path, tmp_path: Path) -> None:
    for step in (
        StepConfig(method="depth", settings={"num_layers": 1}),
        StepConfig(method="heads", settings={"keep": 0.5, "score": "data"}),
    ):
        with pytest.raises(ValueError, match="name a corpus"):
            compress(pipeline(step), model, None, tmp_path / "out")
        assert not (tmp_path / "out").exists()  # nothing half-written stays


def test_rounds_reach_the_share_asked_for(model: Path, tmp_path: Path) -> None:
    step = StepConfig(method="rows", settings={"keep": 0.25}, rounds=2)
    compress(pipeline(step), model, None, tmp_path / "out", say=lambda _: None)
    rows = json.loads((tmp_path / "out" / "compression.json").read_text())["rows"]
    assert [row["feedforward"] for row in rows] == [[64, 64], [32, 32], [16, 16]]


def test_a_budget_of_parameters_is_met_closely(model: Path, tmp_path: Path) -> None:
    whole = sslim.load_model(model).num_parameters(with_heads=False)
    step = StepConfig(method="rows", budget=f"params={0.8 * whole:.0f}")
    compress(pipeline(step), model, None, tmp_path / "out", say=lambda _: None)
    small = sslim.load_model(tmp_path / "out" / "model").num_parameters(with_heads=False)
    unit = 2 * (2 * 32 + 1)  # a unit of both layers
    assert 0.8 * whole - unit <= small <= 0.8 * whole


def test_a_budget_out_of_reach_is_one_sentence(model: Path, tmp_path: Path) -> None:
    step = StepConfig(method="heads", budget="params=1k")
    with pytest.raises(ValueError, match="smallest model that this method leaves has"):
        compress(pipeline(step), model, None, tmp_path / "out", say=lambda _: None)


def test_it_goes_on_and_refuses_another_pipeline(model: Path, tmp_path: Path) -> None:
    steps = (StepConfig(method="heads", settings={"keep": 0.5}), StepConfig(method="rows", settings={"keep": 0.5}))
    compress(pipeline(*steps), model, None, tmp_path / "out", say=lambda _: None)
    first = (tmp_path / "out" / "01-heads" / "model" / "model.safetensors").stat().st_mtime_ns
    expected = sslim.load_model(tmp_path / "out" / "model").state_dict()
    for lost in ("model", "02-rows"):
        (tmp_path / "out" / lost).rename(tmp_path / f"lost-{lost}")
    compress(pipeline(*steps), model, None, tmp_path / "out", say=lambda _: None)
    assert (tmp_path / "out" / "01-heads" / "model" / "model.safetensors").stat().st_mtime_ns == first
    for name, tensor in sslim.load_model(tmp_path / "out" / "model").state_dict().items():
        assert torch.equal(tensor, expected[name])
    with pytest.raises(ValueError, match="another pipeline"):
        compress(pipeline(steps[0]), model, None, tmp_path / "out")
    sslim.save_model(build_model(small_model().config, torch.Generator().manual_seed(2)), tmp_path / "other")
    with pytest.raises(ValueError, match="another model"):
        compress(pipeline(*steps), tmp_path / "other", None, tmp_path / "out")


def test_provenance_tells_every_step(model: Path, tmp_path: Path) -> None:
    steps = (StepConfig(method="heads", settings={"keep": 0.5}), StepConfig(method="quantize", settings={"kind": "fp16"}))
    compress(pipeline(*steps), model, None, tmp_path / "out", say=lambda _: None)
    told = [entry["step"] for entry in sslim.load_model(tmp_path / "out" / "model").provenance]
    assert told == ["heads", "quantize"]
