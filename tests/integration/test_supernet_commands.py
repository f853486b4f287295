"""``sslim compress supernet`` and ``sslim compress extract`` on a made corpus: both stages, outputs of the extracted model."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

import sslim.recipes.search as search_recipe
from sslim.batch import Padded
from sslim.checkpoints import load_model, save_model
from sslim.commands import compress_extract, compress_search, compress_supernet
from sslim.config import dump_json, to_plain
from sslim.data.corpus import Corpus
from sslim.data.labels import LabelStore
from sslim.data.prepare import prepare
from sslim.data.sources import Source, SourceUtterance
from sslim.models import build_model
from sslim.models.elastic import run_subnet
from sslim.models.melhubert import melhubert_frontend
from sslim.models.search_space import SearchSpace
from sslim.recipes.corpus_batches import split_utterances
from sslim.recipes.melhubert import melhubert_tiny
from sslim.recipes.subnet_fitness import FitnessConfig, build_fitness, halves_of
from sslim.recipes.supernet import RECIPES, read_recipe, stage_training

SPACE = SearchSpace(dims=(16, 32), num_heads=(2, 4), feedforward_ratios=(1.0, 2.0), num_layers=(1, 2))
QUICK = ["--steps", "4", "--batch-s", "8", "--threads", "1", "--set", "training.log_every=1", "--set", "training.save_every=2"]
QUICK += ["--set", "data.valid_share=0.25"]


def run(method: str, *arguments: object) -> None:
    module = {"supernet": compress_supernet, "search": compress_search, "extract": compress_extract}[method]
    module.main(tyro.cli(module.Options, args=[str(argument) for argument in arguments]))  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, a teacher, a search space and a finished stage 1 and 2."""
    folder = tmp_path_factory.mktemp("supernet")

    def read(i: int) -> np.ndarray:
        return np.random.default_rng(i).normal(0, 1, (120 + i, 40)).astype(np.float32)

    utterances = [SourceUtterance(id=f"utt{i}", read_features=lambda i=i: read(i)) for i in range(12)]  # type: ignore[misc]
    source = Source(name="made", utterances=utterances, num_utterances=12, frontend=melhubert_frontend(10))
    corpus = prepare(source, folder / "corpus").corpus
    labels = [np.random.default_rng(i).integers(0, 5, 120 + i) for i in range(12)]
    LabelStore.write(
        corpus.path / "labels" / "made", labels, frame_period_s=0.01, num_clusters=5, corpus_digest=corpus.digest,
        origin={"made": "made"}, quality={},
    )  # fmt: skip
    teacher = build_model(melhubert_tiny().model, torch.Generator().manual_seed(0))
    teacher.set_statistics(torch.zeros(40), torch.ones(40), source="made")
    save_model(teacher, folder / "teacher")
    (folder / "space.json").write_text(dump_json(to_plain(SPACE)))
    (folder / "list.json").write_text("[1]")
    common = ["supernet-mini", folder / "teacher", folder / "corpus", *QUICK, "--space", folder / "space.json"]
    common += ["--set", "objective.target.layers=[1, 2]"]
    run("supernet", *common, "--output", folder / "one", "--stage", "1")
    run("supernet", *common, "--output", folder / "labels", "--labels", "made", "--steps", "2")
    run("supernet", *common, "--output", folder / "two", "--stage", "2", "--init-from", folder / "one", "--sandwich", "1")
    return folder


def test_stages_start_from_the_teacher_and_from_each_other(place: Path) -> None:
    teacher, one, two = (
        load_model(place / name, subnet="whole" if name != "teacher" else None)
        for name in ("teacher", "one/model", "two/model")
    )
    assert two.config.search_space == SPACE
    assert [entry["stage"] for entry in two.provenance if entry.get("step") == "supernet"] == [1, 2]
    weights = [model.encoder.blocks[0].attention.query.weight for model in (teacher, one, two)]
    for a, b in itertools.pairwise(weights):
        assert 0 < (a - b).abs().max() < 0.02  # four small steps away, not drawn anew
    assert (set(one.config.heads), set(two.config.heads)) == ({"distillation", "mask"},) * 2
    assert set(load_model(place / "labels" / "model", subnet="whole").config.heads) == {"masked_prediction"}
    described = json.loads((place / "two" / "run.json").read_text())
    assert (described["kind"], described["stage"], described["recipe"]["once_for_all"]) == ("supernet", 2, {"sandwich": 1})


@pytest.mark.parametrize("subnet", ["min", "max", "json", "file"])
def test_an_extracted_model_gives_what_the_subnet_gives(place: Path, tmp_path: Path, subnet: str) -> None:
    sizes = {"dim": 16, "num_heads": [4, 2], "feedforward_dims": [32, 16]}
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    given = {"json": json.dumps(sizes), "file": str(tmp_path / "sizes.json")}.get(subnet, subnet)
    run("extract", place / "two", "--subnet", given, "--output", tmp_path / "model")
    small, whole = load_model(tmp_path / "model"), load_model(place / "two" / "model", subnet="whole")
    assert small.config.search_space is None
    chosen = SPACE.subnet(subnet if subnet in ("min", "max") else sizes)
    x = Padded(values=torch.randn(2, 20, 80), lengths=torch.tensor([20, 13]))
    with torch.no_grad():
        inside, alone = run_subnet(whole, chosen, x), small.encode_features(x.values, x.lengths)
    torch.testing.assert_close(inside.final, alone.final, atol=1e-5, rtol=0)
    if subnet != "max":
        other = run_subnet(whole, "max", x).final
        assert other.shape != alone.final.shape  # the control


def test_a_search_compares_subnets_as_they_were_trained(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss, masks and held-out utterances are those of the run; without it, or where these are too few, a tenth is held out."""
    asked: list[FitnessConfig] = []

    def build(supernet, teacher, corpus, labels, config, device, say):  # type: ignore[no-untyped-def]
        asked.append(config)
        return build_fitness(supernet, teacher, corpus, labels, config, device, say)

    monkeypatch.setattr(search_recipe, "build_fitness", build)
    common = ["corpus", "--generations", "0", "--population", "4", "--output"]
    monkeypatch.chdir(place)
    run("search", "two", "teacher", *common, tmp_path / "distance")
    run("search", "labels", "none", *common, tmp_path / "labels", "--labels", "made", "--seed", "5")
    corpus = Corpus.open(place / "corpus")
    for name, config in zip(("two", "labels"), asked, strict=True):
        recipe = read_recipe(str(place / name / "run.json"))
        assert (config.objective, config.prediction) == (recipe.objective, recipe.prediction)
        _, held_out = split_utterances(corpus, recipe.data, recipe.training.seed)
        assert sorted(np.concatenate(halves_of(corpus, config))) == sorted(held_out)
        assert len(held_out) == 3
    assert asked[1].prediction == replace(read_recipe("supernet-mini").prediction, unmasked_weight=0.5)
    shutil.copytree(place / "two" / "model", tmp_path / "alone")  # without its run nothing is known of the training
    with pytest.raises(ValueError, match="has 1 utterances to validate on, and a search needs 2 or more"):  # a tenth of twelve
        run("search", tmp_path / "alone", "teacher", *common, tmp_path / "other")
    assert len(asked) == 2
    shutil.copytree(place / "two", tmp_path / "few")
    described = json.loads((tmp_path / "few" / "run.json").read_text())
    described["recipe"]["data"]["valid_share"] = 0.01
    (tmp_path / "few" / "run.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="name another split to validate on, or search with another corpus"):
        run("search", tmp_path / "few", "teacher", *common, tmp_path / "other")
    assert "training held out 1 utterances, which is too few: others, which it learnt from, join" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("extract", "two", "--subnet", "mx", "--output", "new"), "no subnet 'mx'; did you mean 'max'"),
        (("extract", "two", "--subnet", "default", "--output", "new"), "no default subnet"),
        (("extract", "two", "--subnet", "min", "--output", "teacher"), "is not empty"),
        (("extract", "two", "--subnet", "min", "--output", "space.json"), "space.json is a file: name a new folder"),
        (("search", "teacher", "teacher", "corpus", "--output", "new"), "teacher is no supernet: it has no search space"),
        (("extract", "teacher", "--subnet", "min", "--output", "new"), "is no supernet"),
        (("supernet", "supernet-mni", "teacher", "corpus", "--output", "new"), "did you mean 'supernet-mini'"),
        (("supernet", "supernet-mini", "teacher", "corpus", "--output", "new"), "cannot be a supernet of that space: dim 96"),
        (("supernet", "supernet-mini", "teacher", "corpus", "--output", "new", "--space", "mibi"), "did you mean 'mini'"),
        (
            ("supernet", "supernet-mini", "teacher", "corpus", "--output", "new", "--space", "list.json"),
            "list.json holds a list",
        ),
        (("supernet", "supernet-mini", "teacher", "corpus", "--output", "new", "--compile"), "leave it out in stage 2"),
    ],
)
def test_mistakes_get_one_sentence(
    place: Path, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(ValueError, match=message):
        run(*arguments)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_hold_together(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(name)
    (tmp_path / "recipe.json").write_text(dump_json(to_plain(recipe)))
    assert read_recipe(str(tmp_path / "recipe.json")) == recipe
    assert recipe.space.num_subnets() >= 1000
    assert stage_training(recipe, 2).optimizer.lr <= stage_training(recipe, 1).optimizer.lr
    if recipe.model is not None:
        recipe.space.check(recipe.model.encoder)
