"""``sslim analyze``: every analysis on a tiny model and corpus: results, pictures, the same numbers again, mistakes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sslim
from sslim.cli import main
from sslim.config import read_json
from sslim.data.prepare import prepare
from sslim.data.sources import Segment, Source, SourceUtterance
from sslim.frontends import NormalizationConfig
from sslim.models import build_model
from sslim.models.melhubert import melhubert, melhubert_frontend

SMALL = {"num_layers": 2, "dim": 16, "num_heads": 2, "feedforward_dim": 32, "conv_kernel_size": 8, "conv_groups": 4}
PICTURES = {
    "lnsr": ["lnsr.png"],
    "attention": ["heads.png", "examples.png", "maps.png"],
    "ablation": ["ablation.png"],
    "phones": ["phones.png", "relations.png"],
    "similarity": ["similarity.png"],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features whose loud bands change every 200 ms, and are the phones."""

    def bands(i: int) -> np.ndarray:
        return np.random.default_rng(i).integers(0, 4, 5 + i % 3)

    def read(i: int) -> np.ndarray:
        loud = np.repeat(bands(i), 20)[:, None] == np.arange(40) // 10
        return (np.random.default_rng(100 + i).normal(0, 0.5, loud.shape) + 4 * loud).astype(np.float32)

    def utterance(i: int) -> SourceUtterance:
        phones = tuple(Segment(symbol="abcd"[b], start_s=0.2 * k, end_s=0.2 * (k + 1)) for k, b in enumerate(bands(i).tolist()))
        return SourceUtterance(id=f"utt{i}", read_features=lambda: read(i), label="ab"[i % 2], alignment=phones)

    source = Source(name="made", utterances=map(utterance, range(24)), num_utterances=24, frontend=melhubert_frontend(10))
    return prepare(source, tmp_path_factory.mktemp("analyze") / "corpus").corpus.path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = melhubert(dropout=0.0, **SMALL)  # type: ignore[arg-type]
    assert config.frontend is not None
    frontend = replace(config.frontend, normalization=NormalizationConfig(kind="utterance", eps=1e-3))
    made = build_model(replace(config, frontend=frontend, heads={}), torch.Generator().manual_seed(5))
    folder = tmp_path_factory.mktemp("analyze") / "small"
    sslim.save_model(made, folder)
    return folder


def run(*arguments: object) -> int:
    return main(["analyze", *map(str, arguments)])


OPTIONS = {
    "lnsr": ("--steps", "2", "--epsilons", "0.1"),
    "attention": ("--example", "utt3"),
    "ablation": ("--points", "3", "--random-orders", "1"),
    "phones": (),
    "similarity": ("{model}",),
}


def analysed(analysis: str, corpus: Path, model: Path, output: Path, *more: object) -> bytes:
    """The result of an analysis of six utterances, as it was written."""
    given = [option.format(model=model) for option in OPTIONS[analysis]]
    assert run(analysis, model, *given, "--corpus", corpus, "--output", output, "--utterances", "6", *more) == 0
    return (output / f"{analysis}.json").read_bytes()


@pytest.mark.parametrize("analysis", list(OPTIONS))
def test_an_analysis_writes_results_and_pictures(
    corpus: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], analysis: str
) -> None:
    result = json.loads(analysed(analysis, corpus, model, tmp_path / "out"))
    assert "small" in capsys.readouterr().out
    assert (result["kind"], len(result["utterances"])) == (f"analyze {analysis}", 6)
    assert sorted(PICTURES[analysis]) == sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert all((tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG" for name in PICTURES[analysis])


@pytest.mark.parametrize("analysis", ["lnsr", "ablation"])
def test_the_seed_decides_everything(corpus: Path, model: Path, tmp_path: Path, analysis: str) -> None:
    first, again = (analysed(analysis, corpus, model, tmp_path / name, "--seed", 0) for name in ("first", "again"))
    assert first == again
    other = json.loads(analysed(analysis, corpus, model, tmp_path / "other", "--seed", 1))
    assert other["utterances"] != json.loads(first)["utterances"]
    assert other["result"] != json.loads(first)["result"]


def test_heads_can_be_judged_by_a_probe_and_its_layer_weights_read(corpus: Path, model: Path, tmp_path: Path) -> None:
    options = ("--measure", "label", "--points", "2", "--random-orders", "0")
    assert run("ablation", model, "--corpus", corpus, "--output", tmp_path / "heads", "--utterances", "4", *options) == 0
    curves = read_json(tmp_path / "heads" / "ablation.json")["result"]
    assert all(0 <= value <= 1 for curve in curves for value in curve["values"])
    card = tmp_path / "card.json"
    assert (
        main(["probe", "label", str(model), "--corpus", str(corpus), "--seeds", "1", "--no-baselines", "--output", str(card)])
        == 0
    )
    assert run("layer-weights", card, "--output", tmp_path / "weights") == 0
    rows = read_json(tmp_path / "weights" / "layer-weights.json")["result"]
    assert [row["name"] for row in rows] == ["small"]
    assert all(sum(row["weights"]) == pytest.approx(1.0, abs=1e-3) for row in rows)
    assert (tmp_path / "weights" / "layer-weights.png").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "no analysis given; the analyses are lnsr, attention"),
        (("atention",), "there is no analysis 'atention'; did you mean 'attention'?"),
        (("attention", "{model}", "--example", "nobody"), "has no utterance 'nobody'"),
        (("attention", "{model}", "--split", "dev"), "has no split 'dev'; it has none"),
        (("lnsr", "{model}", "--utterances", "0"), "num_utterances is 0"),
        (("lnsr", "{model}", "--perturb", "waveform"), "has features only, no audio"),
        (("layer-weights", "--output", "x"), "there is nothing to read"),
    ],
)
def test_mistakes_are_one_sentence(
    corpus: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str
) -> None:
    filled = [argument.format(model=model) for argument in arguments]
    speech = ["--corpus", corpus, "--output", tmp_path / "out"] if "{model}" in arguments else []
    assert run(*filled, *speech) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_it_is_said_before_anything_is_computed(
    corpus: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("attention", model, "--corpus", corpus, "--output", tmp_path / "out") == 1
    assert 'pip install "sslim[report]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_lists_the_analyses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in (*PICTURES, "layer-weights"))
    assert run("lnsr", "--help") == 0
    assert "--attacked-layer" in capsys.readouterr().out
