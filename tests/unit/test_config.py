"""Strict reading: what is written comes back, and every mistake is named with the nearest accepted word."""

from dataclasses import dataclass, replace

import pytest

from sslim.config import ConfigError, from_plain, override, read_json, to_plain
from sslim.frontends.config import FilterbankConfig, MfccConfig, SpectralFrontendConfig
from sslim.models import PRESETS, ModelConfig
from sslim.nn.positions import SinusoidPositionsConfig
from sslim.recipes.pretrain import PretrainRecipe
from sslim.recipes.pretrain_recipes import RECIPES


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 3


@dataclass(frozen=True, kw_only=True)
class Outer:
    rate: float
    names: tuple[str, ...] = ()
    inner: Inner = Inner()
    limit: int | None = None
    on: bool = False


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_back(name: str) -> None:
    config = PRESETS[name]()
    assert from_plain(ModelConfig, to_plain(config)) == config


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_comes_back(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert from_plain(PretrainRecipe, to_plain(recipe)) == recipe


def test_recipes_from_before_there_were_several_objectives_can_be_read() -> None:
    plain = to_plain(RECIPES["melhubert-mini"]())
    assert "kind" not in plain["objective"]
    assert from_plain(PretrainRecipe, plain).objective.kind == "masked_prediction"
    assert to_plain(RECIPES["tera-mini"]())["objective"]["kind"] == "reconstruction"
    assert "init_deviation" not in plain["model"]["projection"]


def test_unions_are_told_apart_by_kind() -> None:
    config = PRESETS["melhubert-tiny"]()
    for positions in (SinusoidPositionsConfig(), None):
        changed = replace(config, encoder=replace(config.encoder, positions=positions))
        assert from_plain(ModelConfig, to_plain(changed)) == changed
    frontend = SpectralFrontendConfig(features=MfccConfig(filterbank=FilterbankConfig(num_mel_bins=30)))
    assert from_plain(SpectralFrontendConfig, to_plain(frontend)) == frontend
    known = "filterbank, mfcc, spectrogram, stft, stft_mfcc, stored"
    with pytest.raises(ConfigError, match=f"features: kind is 'filterbnk', expected one of {known}; did"):
        from_plain(SpectralFrontendConfig, {"features": {"kind": "filterbnk"}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 1.0, "namse": []}, r"file has no key 'namse'; did you mean 'names'\?"),
        ({"rate": 1.0, "inner": {"widht": 1}}, r"file.inner has no key 'widht'; did you mean 'width'\?"),
        ({}, "file lacks the key 'rate'"),
        ({"rate": "fast"}, "file.rate: expected float, got 'fast'"),
        ({"rate": 1.0, "inner": {"width": 2.5}}, "file.inner.width: expected int, got 2.5"),
        ({"rate": 1.0, "inner": {"width": True}}, "file.inner.width: expected int, got True"),
        ({"rate": 1.0, "on": "False"}, "file.on: expected bool, got 'False'"),
        ({"rate": 1.0, "names": ["a", 3]}, r"file.names\[1\]: expected str, got 3"),
        ({"rate": 1.0, "limit": "none"}, "file.limit: expected int, got 'none'"),
    ],
)
def test_mistakes_are_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_plain(Outer, values, "file")


def test_whole_numbers_are_accepted_where_a_float_is_due() -> None:
    assert from_plain(Outer, {"rate": 2, "limit": None}) == Outer(rate=2.0)


def test_override_is_as_strict() -> None:
    assert override(Outer(rate=1.0), {"limit": 5}) == Outer(rate=1.0, limit=5)
    with pytest.raises(ConfigError, match="did you mean 'limit'"):
        override(Outer(rate=1.0), {"limt": 5})
    with pytest.raises(ConfigError, match="expected int"):
        override(Outer(rate=1.0), {"limit": 5.5})


def test_a_file_that_is_no_json_is_named(tmp_path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ConfigError, match=r"a\.json is not a JSON file"):
        read_json(tmp_path / "a.json")
