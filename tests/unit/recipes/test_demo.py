"""The demo's plan: every command it shows is one that sslim understands, and a folder is never taken for another demo."""

from __future__ import annotations

import importlib
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sslim import cli
from sslim.recipes import demo


@pytest.fixture
def config(tmp_path: Path) -> demo.DemoConfig:
    return demo.DemoConfig(data=None, output=tmp_path / "demo", minutes=1.5, num_utterances=40, seed=3)


class StandIn:
    """What ``tasks`` looks at in a corpus."""

    def __init__(self, *, aligned: bool = False, **columns: list[str | None]) -> None:
        self.columns, self.aligned = columns, aligned

    def __len__(self) -> int:
        return max(map(len, self.columns.values()))

    def column(self, name: str) -> list[str | None]:
        return self.columns.get(name, [None] * len(self))

    def utterance(self, i: int) -> SimpleNamespace:
        return SimpleNamespace(alignment=("a",) if self.aligned else None)


def all_steps(config: demo.DemoConfig) -> list[demo.Step]:
    probes = [demo.probe_step(config, task, "") for task in ("phones", "speaker", "label")]
    first = [demo.prepare_step(config), demo.cluster_step(config, 100_000), demo.pretrain_step(config)]
    return [*first, *probes, demo.report_step(config)]


@pytest.mark.parametrize("data", [None, Path("my own") / "audio"])
def test_every_step_can_be_typed_as_it_is_shown(config, data):
    for step in all_steps(replace(config, data=data)):
        program, verb, *arguments = shlex.split(step.line)
        assert (program, verb, *arguments) == ("sslim", *step.command)
        module = importlib.import_module(cli.VERBS[verb][0])
        assert cli.parse_options(verb, module, arguments) is not None


def test_settings_reach_the_commands(config):
    lines = [step.line for step in all_steps(config)]
    assert "--synthetic 40 --seed 3" in lines[0]
    assert "--num-clusters 100 " in lines[1] + " "
    assert "--minutes 1.5 --steps 225 --seed 3" in lines[2]


def test_few_frames_get_few_clusters(config):
    assert "--num-clusters 20 " in demo.cluster_step(config, 1000).line + " "
    assert "--num-clusters 2 " in demo.cluster_step(config, 10).line + " "


def test_the_same_demo_goes_on_and_another_is_refused(config):
    demo.claim(config)
    demo.claim(config)
    with pytest.raises(ValueError, match=r"a demo with minutes 1\.5, now it is 2"):
        demo.claim(replace(config, minutes=2.0))
    with pytest.raises(ValueError, match="seed 3, now it is 4"):
        demo.claim(replace(config, seed=4))
    with pytest.raises(ValueError, match="data None, now it is"):
        demo.claim(replace(config, data=Path("audio")))


def test_a_folder_with_other_things_is_left_alone(config):
    config.output.mkdir()
    (config.output / "thesis.tex").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="is not empty and holds no demo"):
        demo.claim(config)
    assert [p.name for p in config.output.iterdir()] == ["thesis.tex"]


def test_nonsense_minutes_are_refused(config):
    for minutes in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be more than 0"):
            demo.claim(replace(config, minutes=minutes))


@pytest.mark.parametrize(
    ("stand_in", "names"),
    [
        (StandIn(speaker=["a", "b"] * 4, aligned=True), ["phones", "speaker"]),
        (StandIn(speaker=["a", "b"] * 3), []),  # three each: not enough for three parts
        (StandIn(speaker=["a"] * 8), []),  # one class is none
        (StandIn(speaker=["a", "b"] * 4, label=["x"] * 4 + ["y"] * 4), ["speaker", "label"]),
        (StandIn(label=["x", "y", None, None] * 4), ["label"]),
        (StandIn(speaker=[None] * 4), []),
    ],
)
def test_probes_are_those_that_the_corpus_can_answer(stand_in, names):
    assert [name for name, _ in demo.tasks(stand_in)] == names


def test_frames_of_the_picture_are_means_of_what_the_model_sees():
    from sslim.recipes.report_example import _stack_means

    base_TF = np.arange(14, dtype=np.float32).reshape(7, 2)
    np.testing.assert_array_equal(_stack_means(base_TF, 2, 4), [[1, 2], [5, 6], [9, 10], [12, 13]])
    np.testing.assert_array_equal(_stack_means(base_TF, 1, 7), base_TF)


def test_the_command_refuses_a_missing_folder(capsys, tmp_path):
    assert cli.main(["demo", "--data", str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
