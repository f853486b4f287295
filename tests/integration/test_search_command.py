"""``sslim compress search`` on a tiny supernet: results, resuming, extraction, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import sslim.recipes.search as search_recipe
from sslim.checkpoints import load_model, save_model
from sslim.cli import parse_options
from sslim.commands import compress_search
from sslim.compress.search_journal import JOURNAL
from sslim.data.corpus import Corpus
from sslim.data.prepare import prepare
from sslim.data.sources import Source, SourceUtterance
from sslim.frontends import ConvFrontendConfig
from sslim.frontends.config import ConvLayerConfig
from sslim.models import ModelConfig, ProjectionConfig, SpeechModel, build_model
from sslim.models.elastic import extract_model
from sslim.models.search_space import SearchSpace, Subnet
from sslim.nn.encoder import EncoderConfig, plain_blocks
from sslim.nn.heads import MaskEmbeddingConfig, RegressionHeadConfig
from sslim.nn.positions import ConvPositionsConfig
from sslim.recipes.subnet_fitness import FitnessConfig, build_fitness

SPACE = SearchSpace(dims=(8, 16), num_heads=(1, 2), feedforward_ratios=(2.0, 3.0), num_layers=(2, 3))
CONFIG = ModelConfig(
    family="test",
    frontend=ConvFrontendConfig(
        layers=(ConvLayerConfig(channels=5, kernel=10, stride=10), ConvLayerConfig(channels=6, kernel=32, stride=32))
    ),
    projection=ProjectionConfig(feature_dim=6),
    encoder=EncoderConfig(dim=16, positions=ConvPositionsConfig(kernel_size=8, groups=4), **plain_blocks(3, 2, 8, 48)),
    heads={"distillation": RegressionHeadConfig(output_dim=12), "mask": MaskEmbeddingConfig(dim=16)},
    search_space=SPACE,
)
TEACHER = replace(
    CONFIG,
    encoder=EncoderConfig(dim=12, positions=ConvPositionsConfig(kernel_size=8, groups=4), **plain_blocks(2, 2, 6, 24)),
    heads={},
    search_space=None,
)


def built(config: ModelConfig, seed: int) -> SpeechModel:
    return build_model(config, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Corpus, supernet and teacher."""
    folder = tmp_path_factory.mktemp("search")
    utterances = []
    for i in range(8):
        rng = np.random.default_rng(i)
        soundfile.write(folder / f"u{i}.wav", 0.1 * rng.normal(size=4000 + 900 * i), 16000)
        utterances.append(SourceUtterance(id=f"u{i}", audio=folder / f"u{i}.wav", split="dev" if i < 6 else "train"))
    prepare(Source(name="noise", utterances=utterances, num_utterances=8), folder / "corpus", None, jobs=1)
    save_model(built(CONFIG, 1), folder / "supernet")
    save_model(built(TEACHER, 2), folder / "teacher")
    return folder


def run(place: Path, output: Path, *more: str) -> None:
    arguments = [str(place / name) for name in ("supernet", "teacher", "corpus")]
    arguments += ["--output", str(output), "--population", "6", "--seconds", "0.5", "--latency-repeats", "1", *more]
    compress_search.main(parse_options("compress search", compress_search, arguments))


def result(output: Path) -> dict:
    return json.loads((output / "search.json").read_text())


def test_a_front_with_latency_and_extracted_models(place, tmp_path, capsys) -> None:
    run(place, tmp_path, "--algorithm", "pareto", "--generations", "2", "--latency", "--extract", "2", "--budget", "params=9k")
    found = result(tmp_path)
    assert all(row["costs"]["params"] <= 9000 for row in found["candidates"])
    assert found["additivity"]["median_error"] >= 0
    named = {row["name"]: row for row in found["candidates"] if row["name"]}
    assert set(named) == {"front-1", "front-2"}
    assert named["front-1"]["costs"]["params"] < named["front-2"]["costs"]["params"]
    supernet = load_model(place / "supernet", subnet="whole")
    for name, row in named.items():
        model = load_model(tmp_path / name)
        assert model.config.search_space is None
        assert model.num_parameters(with_heads=False) == row["costs"]["params"]
        assert row["on_front"]
        assert row["measured_ms"] > 0
        subnet = Subnet(**{k: tuple(v) if isinstance(v, list) else v for k, v in row["subnet"].items()})
        wave = torch.randn(1, 3000, generator=torch.Generator().manual_seed(0))
        assert torch.equal(model.encode(wave).final, extract_model(supernet, subnet).encode(wave).final)
    table = capsys.readouterr().out
    assert table == (tmp_path / "table.txt").read_text()
    assert "front-1" in table
    assert "measured ms" in table
    ratios = sorted(row["measured_ms"] / row["costs"]["latency_ms"] for row in named.values())
    assert f"{sum(ratios) / 2:.2f} times the prediction" in " ".join(table.split())
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


class KilledError(BaseException):
    pass


def test_a_killed_command_goes_on_to_the_same_result(place, tmp_path, monkeypatch) -> None:
    options = ("--generations", "2", "--mask-probability", "0.6", "--seed", "4")
    run(place, tmp_path / "whole", *options)
    evaluated = []

    def interrupted(limit: int):
        def build(*arguments, **options):
            fitness = build_fitness(*arguments, **options)

            def counting(subnet):
                if len(evaluated) == limit:
                    raise KilledError
                evaluated.append(subnet)
                return fitness(subnet)

            return counting

        return build

    monkeypatch.setattr(search_recipe, "build_fitness", interrupted(7))
    with pytest.raises(KilledError):
        run(place, tmp_path / "cut", *options)
    assert not (tmp_path / "cut" / "search.json").exists()
    with (tmp_path / "cut" / JOURNAL).open("a") as file:
        file.write('{"subnet"')
    monkeypatch.setattr(search_recipe, "build_fitness", interrupted(10**9))
    run(place, tmp_path / "cut", *options)
    whole = result(tmp_path / "whole")
    assert result(tmp_path / "cut") == whole
    assert len(evaluated) == len(set(evaluated)) == len(whole["candidates"])
    run(place, tmp_path / "cut", "--generations", "3", *options[2:])  # a longer search goes on
    assert len(evaluated) == len(set(evaluated)) == len(result(tmp_path / "cut")["candidates"]) > len(whole["candidates"])


def test_models_of_a_shorter_front_do_not_stay(place, tmp_path) -> None:
    """A longer search of the folder has another front, so the names of the first one must not outlive it."""
    run(place, tmp_path, "--algorithm", "pareto", "--generations", "0", "--extract", "99")
    before = {folder.name for folder in tmp_path.glob("front-*")}
    assert before == {f"front-{number}" for number in range(1, len(before) + 1)}
    assert len(before) > 2
    run(place, tmp_path, "--algorithm", "pareto", "--generations", "1", "--extract", "2")
    assert {folder.name for folder in tmp_path.glob("front-*")} == {"front-1", "front-2"}
    for row in result(tmp_path)["candidates"]:
        if row["name"]:
            assert load_model(tmp_path / row["name"]).num_parameters(with_heads=False) == row["costs"]["params"]


@pytest.mark.parametrize("count", ["1", "2"])
def test_the_best_is_among_the_extracted(place, tmp_path, count: str) -> None:
    """On a front of two costs too, where it need not be at an end."""
    run(place, tmp_path, "--generations", "1", "--front", "macs", "params", "--extract", count, "--seed", "2")
    rows = [row for row in result(tmp_path)["candidates"] if row["on_front"]]
    named = [row for row in rows if row["name"]]
    assert len(named) == int(count) < len(rows)
    assert min(row["loss"] for row in named) == min(row["loss"] for row in result(tmp_path)["candidates"])
    assert [row["costs"]["macs"] for row in sorted(named, key=lambda row: row["name"])] == sorted(
        row["costs"]["macs"] for row in named
    )


def test_the_table_is_ordered_by_the_cost_searched_for(place, tmp_path, capsys) -> None:
    run(place, tmp_path, "--algorithm", "pareto", "--generations", "1", "--front", "macs", "--extract", "99")
    rows = {row["name"]: row["costs"]["macs"] for row in result(tmp_path)["candidates"] if row["name"]}
    assert list(rows.values()) != sorted(rows.values())  # evaluated in another order
    text = capsys.readouterr()
    order = [word for word in text.out.replace("│", " ").split() if word.startswith("front-")]
    assert [rows[name] for name in order] == sorted(rows.values())
    assert f"the front has {len(rows)} subnets: that many models are written, not 99" in text.err


def test_another_search_in_the_folder_is_refused(place, tmp_path) -> None:
    run(place, tmp_path, "--generations", "0")
    with pytest.raises(ValueError, match=r"holds another search \(search.seed was 0, now 1\)"):
        run(place, tmp_path, "--generations", "0", "--seed", "1")
    with pytest.raises(ValueError, match=r"fitness.crop_s was 10.0, now 0.2"):
        run(place, tmp_path, "--generations", "0", "--crop-seconds", "0.2")


def test_nothing_is_measured_for_budgets_that_cannot_be_met(place, tmp_path, monkeypatch) -> None:
    def measured(*_, **__):
        raise AssertionError

    monkeypatch.setattr(search_recipe, "measure_latency", measured)
    with pytest.raises(ValueError, match="the smallest subnet has 2,428 parameters, more than the budget of 1,000"):
        run(place, tmp_path / "a", "--budget", "params=1k", "--budget", "latency_ms=5")
    with pytest.raises(AssertionError):  # the control
        run(place, tmp_path / "b", "--budget", "params=1M", "--budget", "latency_ms=5")
    assert not (tmp_path / "a").exists()


def test_what_cannot_work_is_one_sentence(place, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"the smallest subnet has .* parameters, more than the budget of 1,000"):
        run(place, tmp_path / "a", "--budget", "params=1k")
    arguments = [str(place / name) for name in ("teacher", "teacher", "corpus")]
    options = parse_options("compress search", compress_search, [*arguments, "--output", str(tmp_path / "b")])
    with pytest.raises(ValueError, match="teacher is no supernet"):
        compress_search.main(options)
    with pytest.raises(ValueError, match="target_layers is 5; the teacher has 2 layers"):
        run(place, tmp_path / "c", "--target-layers", "5")
    with pytest.raises(ValueError, match="-1 models are to be extracted"):
        run(place, tmp_path / "c", "--extract", "-1")
    with pytest.raises(ValueError, match="mask probability 0 hides no frame"):
        run(place, tmp_path / "c", "--mask-probability", "0")
    with pytest.raises(ValueError, match="1 utterances to validate on are too few"):
        run(place, tmp_path / "c", "--utterances", "1")
    with pytest.raises(ValueError, match="crop_s is 0; expected seconds above 0"):
        run(place, tmp_path / "c", "--crop-seconds", "0")
    with pytest.raises(ValueError, match="measured in 0 rounds"):
        run(place, tmp_path / "c", "--latency-repeats", "0")
    with pytest.raises(ValueError, match="device is 'gpu'; accepted are cpu"):
        run(place, tmp_path / "c", "--device", "gpu")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; name a folder for the search"):
        run(place, tmp_path / "file")
    headless = replace(CONFIG, heads={})
    with pytest.raises(ValueError, match="has no head 'distillation'"):
        build_fitness(built(headless, 1), built(TEACHER, 2), Corpus.open(place / "corpus"), None, FitnessConfig())


@torch.no_grad()
def test_a_loss_is_that_of_the_extracted_subnet(place) -> None:
    """Computed here with an ordinary model, whole utterances and no batch."""
    supernet, teacher, corpus = built(CONFIG, 1), built(TEACHER, 2), Corpus.open(place / "corpus")
    torch.nn.init.normal_(supernet.frontend.layers[0].norm.weight)
    subnet = Subnet(dim=8, num_heads=(2, 1), feedforward_dims=(16, 24))
    fitness = build_fitness(supernet, teacher, corpus, None, FitnessConfig(batch_s=1.0))
    small = extract_model(supernet, subnet)
    sums, counts = [], []
    for i in range(6):
        wave = torch.from_numpy(corpus.waveform(i))[None]
        estimate, target = small.heads["distillation"](small.encode(wave).final), teacher.encode(wave).final
        sums.append(float((estimate - target).abs().mean(-1).sum()))
        counts.append(estimate.shape[1])
    assert fitness(subnet).loss == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert fitness(subnet) == fitness(subnet)
    assert len(fitness(subnet).halves) == 2
    assert fitness(SPACE.largest()) != fitness(subnet)
