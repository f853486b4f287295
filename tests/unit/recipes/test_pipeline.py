"""Pipelines: what a file may say, what is refused, rounds, budgets, and going on where one stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sslim
from sslim.compress.methods import METHODS
from sslim.compress.strength import Stopwatch
from sslim.config import from_plain, to_plain
from sslim.frontends import NormalizationConfig
from sslim.models import ModelConfig, SpeechModel, build_model
from sslim.models.elastic import count_parameters
from sslim.models.lighthubert import lighthubert
from sslim.models.melhubert import melhubert
from sslim.models.search_space import SearchSpace
from sslim.profiling import Conditions
from sslim.recipes import pipeline as module
from sslim.recipes.compression_table import printed_table
from sslim.recipes.pipeline import Pipeline, StepConfig, compress, read_pipeline
from sslim.training.run_folder import RunFolder

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


def table(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "compression.json").read_text())["rows"]


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
        ("keep = 0.5", "keep = 1.5", r"step 1: heads: keep is 1\.5"),
        ("keep = 0.5\n", "", "step 1: nothing says how much heads removes: give one of keep, num_kept, a budget"),
        ("rounds = 2", "rounds = 0", "rounds of heads is 0"),
        ("params=30k", "parameters=30k", "no budget 'parameters'"),
        ("params=30k", "much", "cannot be read"),
        ('kind = "int8-weights"', 'kind = "int8-weights"\nrecover = true', "cannot be trained after quantize"),
        ('kind = "int8-weights"', 'kind = "int8-weights"\nbudget = "params=1k"', "cannot meet a budget"),
        ("steps = 40", "step = 40", "no key 'step'"),
        ("[[step]]\nmethod = \"rows\"", "[[steps]]\nmethod = \"rows\"", "steps"),
        ('budget = "params=30k"', 'budget = "params=30k"\nkeep = 0.5', "step 2: rows has both a budget and keep"),
        ('budget = "params=30k"', 'budget = "params=30k"\nnum_kept = 5', "step 2: rows has both a budget and num_kept"),
        ("recover.steps = 20", "recover = 20", "step 2: recover is 20; expected a table, true or false"),
        ("[recover]\nsteps = 40", "recover = 40", r"wrong\.toml is not|recover is 40|recover"),
    ],
)  # fmt: skip
def test_what_a_file_may_not_say(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    path = tmp_path / "wrong.toml"
    assert old in TEXT
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(ValueError, match=complaint):
        read_pipeline(path)


def test_a_file_can_say_none(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(TEXT.replace("keep = 0.5", 'keep = 0.5\nnormalize = "none"'))
    assert read_pipeline(path).steps[0].read().normalize is None
    path.write_text(TEXT)
    assert read_pipeline(path).steps[0].read().normalize == 2.0


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


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_rounds_end_within_the_budget_too(model: Path, tmp_path: Path, rounds: int) -> None:
    whole = sslim.load_model(model).num_parameters(with_heads=False)
    step = StepConfig(method="rows", budget=f"params={0.8 * whole:.0f}", rounds=rounds)
    compress(pipeline(step), model, None, tmp_path / "out", say=lambda _: None)
    rows = table(tmp_path / "out")
    assert len(rows) == rounds + 1
    assert 0.8 * whole - 2 * (2 * 32 + 1) <= rows[-1]["num_parameters"] <= 0.8 * whole
    assert rows[-1]["budget"]["reached"] == rows[-1]["num_parameters"]
    assert "budget" not in rows[0]


def test_steps_that_are_alike_find_strengths_of_their_own(model: Path, tmp_path: Path) -> None:
    first = count_parameters(small_model().config, with_heads=False)
    rows = StepConfig(method="rows", budget=f"params={0.8 * first:.0f}")
    heads = StepConfig(method="heads", settings={"keep": 0.5})
    compress(pipeline(rows, heads, rows), model, None, tmp_path / "out", say=lambda _: None)
    said = table(tmp_path / "out")
    assert said[3]["feedforward"] == said[1]["feedforward"]  # the heads made room: nothing more has to go
    assert said[3]["num_parameters"] < said[1]["num_parameters"]


@pytest.mark.parametrize("target", [6.0, 8.0])
def test_a_budget_of_latency_is_measured_and_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: float
) -> None:
    def latency_ms(config: ModelConfig) -> float:
        return 2.0 + sum(0.1 * block.feedforward_dim for block in config.encoder.blocks) / 2

    def time(configs: Any) -> dict[str, list[float]]:
        return {name: [latency_ms(config)] * 5 for name, config in configs.items()}

    monkeypatch.setattr(module, "stopwatch", lambda config, conditions: Stopwatch(reference=config, time=time))
    measured = lambda configs, *_, **__: {name: 1.04 * latency_ms(config) for name, config in configs.items()}  # noqa: E731
    monkeypatch.setattr(module, "measure_whole", measured)
    said: list[str] = []
    step = StepConfig(method="rows", budget=f"latency_ms={target:g}")
    compress(pipeline(step), model, None, tmp_path / "out", say=said.append)
    whole, cut = table(tmp_path / "out")
    assert 0.94 * target <= latency_ms(sslim.load_model(tmp_path / "out" / "model").config) <= target
    assert (
        cut["latency_ms"]
        == cut["budget"]["reached"]
        == pytest.approx(1.04 * latency_ms(sslim.load_model(tmp_path / "out" / "model").config))
    )
    assert whole["latency_ms"] == pytest.approx(1.04 * 8.4)
    told = f"of {target:g}"
    assert any("as measured" in line and told in line for line in said)
    assert told in (tmp_path / "out" / "model-card.md").read_text()
    assert "ms" in [column.header for column in printed_table(tmp_path / "out").columns]


def test_a_budget_out_of_reach_is_one_sentence(model: Path, tmp_path: Path) -> None:
    step = StepConfig(method="heads", budget="params=1k")
    with pytest.raises(ValueError, match="smallest model that this method leaves has"):
        compress(pipeline(step), model, None, tmp_path / "out", say=lambda _: None)


HEADS, ROWS = ({"method": method, "settings": {"keep": 0.5}} for method in ("heads", "rows"))


def test_it_goes_on_and_refuses_another_pipeline(model: Path, tmp_path: Path) -> None:
    steps = (StepConfig(**HEADS), StepConfig(**ROWS))
    compress(pipeline(*steps), model, None, tmp_path / "out", say=lambda _: None)
    first = (tmp_path / "out" / "01-heads" / "model" / "model.safetensors").stat().st_mtime_ns
    expected = sslim.load_model(tmp_path / "out" / "model").state_dict()
    for lost in ("model", "02-rows"):
        (tmp_path / "out" / lost).rename(tmp_path / f"lost-{lost}")
    compress(pipeline(*steps), model, None, tmp_path / "out", say=lambda _: None)
    assert (tmp_path / "out" / "01-heads" / "model" / "model.safetensors").stat().st_mtime_ns == first
    for name, tensor in sslim.load_model(tmp_path / "out" / "model").state_dict().items():
        assert torch.equal(tensor, expected[name])
    with pytest.raises(ValueError, match=r"another pipeline \(steps is of 2 parts there and of 1 parts here\)"):
        compress(pipeline(steps[0]), model, None, tmp_path / "out")
    sslim.save_model(build_model(small_model().config, torch.Generator().manual_seed(2)), tmp_path / "other")
    with pytest.raises(ValueError, match="another model"):
        compress(pipeline(*steps), tmp_path / "other", None, tmp_path / "out")


def test_what_has_not_begun_may_change(model: Path, tmp_path: Path) -> None:
    heads, rows = StepConfig(**HEADS), StepConfig(**ROWS)
    out, quiet = tmp_path / "out", lambda _: None
    compress(pipeline(heads), model, None, out, say=quiet)
    compress(pipeline(heads, rows), model, None, out, say=quiet)
    assert [row["name"] for row in table(out)] == ["whole", "01-heads", "02-rows"]
    assert sslim.load_model(out / "model").config.encoder.blocks[0].feedforward_dim == 32
    other = StepConfig(method="rows", settings={"keep": 0.25})
    with pytest.raises(ValueError, match=r"another pipeline \(steps\[2\]\.settings\.keep is 0\.5 there and 0\.25 here\)"):
        compress(pipeline(heads, other), model, None, out, say=quiet)
    with pytest.raises(ValueError, match=r"another pipeline \(conditions\.seconds is 2\.0 there and 3\.0 here\)"):
        compress(Pipeline(steps=(heads, rows), conditions=Conditions(seconds=3.0)), model, None, out, say=quiet)
    assert (out / "model").is_dir()


def test_a_command_that_failed_can_be_mended(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="more than the budget"):
        compress(pipeline(StepConfig(method="heads", budget="params=1k")), model, None, out, say=lambda _: None)
    (out / ".pipeline.json.1.tmp").touch()  # as a killed process leaves it
    compress(pipeline(StepConfig(**HEADS)), model, None, out, say=lambda _: None)
    assert (out / "model").is_dir()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds no compression"):
        compress(pipeline(StepConfig(**HEADS)), model, None, foreign, say=lambda _: None)


def test_it_goes_on_wherever_it_was_killed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write in turn fails before, or after, it is done."""
    first = count_parameters(small_model().config, with_heads=False)
    steps = (
        StepConfig(method="rows", budget=f"params={0.8 * first:.0f}"),
        StepConfig(method="quantize", settings={"kind": "int8-weights"}),
    )
    writers = {name: getattr(module, name) for name in ("save_model", "write_json", "write_table", "write_model_card")}
    done: list[str] = []

    def watched(name: str, last: int) -> Any:
        def write(*arguments: Any) -> None:
            done.append(name)
            if len(done) == last and last % 2:
                raise KeyboardInterrupt
            writers[name](*arguments)
            if len(done) == last:
                raise KeyboardInterrupt

        return write

    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # most of the time of a run this small

    def run(out: Path, last: int) -> None:
        done.clear()
        for name in writers:
            monkeypatch.setattr(module, name, watched(name, last))
        compress(pipeline(*steps), model, None, out, say=lambda _: None)

    run(tmp_path / "expected", 0)
    num_writes, expected = len(done), sslim.load_model(tmp_path / "expected" / "model").state_dict()
    assert num_writes == 10
    for last in range(1, num_writes + 1):
        out = tmp_path / f"out-{last}"
        with pytest.raises(KeyboardInterrupt):
            run(out, last)
        run(out, 0)
        found = sslim.load_model(out / "model").state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert table(out) == table(tmp_path / "expected")
        assert (out / "model-card.md").is_file()


def test_one_process_at_a_time(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(pipeline(StepConfig(**HEADS)), model, None, out, say=lambda _: None)
    with RunFolder(out).lock(), pytest.raises(ValueError, match="another process"):
        compress(pipeline(StepConfig(**HEADS)), model, None, out, say=lambda _: None)


def test_supernets_and_quantised_models_are_refused(model: Path, tmp_path: Path) -> None:
    space = SearchSpace(dims=(16, 32), num_heads=(2, 4), feedforward_ratios=(1.0, 2.0), num_layers=(1, 2))
    sizes: Any = {"dim": 32, "num_heads": 4, "feedforward_dim": 64, "conv_kernel_size": 8, "conv_groups": 4}
    supernet = build_model(lighthubert(space, num_layers=2, teacher_dim=20, **sizes), torch.Generator().manual_seed(0))
    sslim.save_model(supernet, tmp_path / "supernet")
    with pytest.raises(ValueError, match="supernet is a supernet: cut one of its subnets out first"):
        compress(pipeline(StepConfig(**HEADS)), tmp_path / "supernet", None, tmp_path / "out")
    half = StepConfig(method="quantize", settings={"kind": "fp16"})
    compress(pipeline(half), model, None, tmp_path / "half", say=lambda _: None)
    for step in (StepConfig(**HEADS), half):
        with pytest.raises(ValueError, match="stored as fp16, and this needs a float32 model"):
            compress(pipeline(step), tmp_path / "half", None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_compression_is_compressed_on_by_its_folder(model: Path, tmp_path: Path) -> None:
    compress(pipeline(StepConfig(**HEADS)), model, None, tmp_path / "first", say=lambda _: None)
    compress(pipeline(StepConfig(**ROWS)), tmp_path / "first", None, tmp_path / "second", say=lambda _: None)
    assert [entry["step"] for entry in sslim.load_model(tmp_path / "second" / "model").provenance] == ["heads", "rows"]


def test_a_method_that_trains_is_given_a_model_of_its_own(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model is frozen while it teaches; what is trained must not be."""
    given: list[Any] = []

    def train(settings: Any, trained: Any, whole: Any, corpus: Path, output: Path, *, say: Any) -> Any:
        whole.model.requires_grad_(False)
        given.append(trained)
        raise KeyboardInterrupt

    monkeypatch.setitem(module.TRAINED_METHODS, "gates", replace(module.TRAINED_METHODS["gates"], train=train))
    monkeypatch.setattr(module, "claim", lambda *_, **__: False)
    with pytest.raises(KeyboardInterrupt):
        compress(pipeline(StepConfig(method="gates", settings={"sparsity": 0.5})), model, tmp_path, tmp_path / "out")
    assert all(parameter.requires_grad for parameter in given[0].model.parameters())
    assert given[0].name == str(model)


def test_provenance_tells_every_step(model: Path, tmp_path: Path) -> None:
    whole = count_parameters(small_model().config, with_heads=False)
    steps = (
        StepConfig(method="heads", settings={"keep": 0.5}),
        StepConfig(method="rows", budget=f"params={0.7 * whole:.0f}"),
        StepConfig(method="quantize", settings={"kind": "fp16"}),
    )
    compress(pipeline(*steps), model, None, tmp_path / "out", say=lambda _: None)
    told = sslim.load_model(tmp_path / "out" / "model").provenance
    assert [entry["step"] for entry in told] == ["heads", "rows", "quantize"]
    assert [entry.get("budget") for entry in told] == [None, f"params={0.7 * whole:.0f}", None]
