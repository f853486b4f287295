"""Cards and profiles are joined by model, by nothing else, and only what can be compared is compared."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sslim.profiling import Conditions
from sslim.profiling.profile import Profile, ProfiledModel, profile_row
from sslim.report.cards import Row, read_card
from sslim.report.trade_offs import compare, is_same

TEN, ONE = Conditions(seconds=10.0), Conditions(seconds=1.0)


def a_row(name: str, mean: float = 0.5, **values: Any) -> Row:
    settings: dict[str, Any] = {
        "kind": "model", "layer": "mix", "scores": (mean - 0.1, mean + 0.1), "mean": mean, "sd": 0.1, "dev": mean,
        "num_parameters": 100, "path": f"runs/{name}", "digest": f"digest of {name}",
    }  # fmt: skip
    return Row(name=name, **settings | values)


def a_card(*rows: Row, **values: Any) -> tuple[dict[str, Any], list[Row]]:
    card = {"task": "phones", "metric": "accuracy", "corpus": {"name": "speech", "digest": "c"}, "protocol": {"split": "s"}}
    return card | values, list(rows)


def a_profile(latency_ms: dict[str, float], *, conditions: tuple[Conditions, ...] = (TEN,), **values: Any) -> Profile:
    models = [
        ProfiledModel(
            name=name, path=f"runs/{name}", digest=f"digest of {name}", family="f", num_parameters=7, nonzero_parameters=7,
            zero_share=0.0, file_bytes=9, num_layers=1,
        )
        for name in latency_ms
    ]  # fmt: skip
    rows = [
        profile_row(
            name, one, macs=int(1000 * one.seconds), macs_by_group={}, times_ms=[time * one.seconds], baseline_macs=1000,
            baseline_times_ms=[1.0],
        )
        for one in conditions
        for name, time in latency_ms.items()
    ]  # fmt: skip
    return Profile(baseline=next(iter(latency_ms)), models=tuple(models), rows=tuple(rows), **values)


def test_costs_come_from_the_card_and_from_every_profile_of_the_same_model() -> None:
    card = a_card(a_row("a", macs_per_second=5.0, macs_seconds=4.0), a_row("b", num_parameters=None), a_row("c"))
    profiles = [a_profile({"a": 1.0, "b": 2.0, "other": 3.0}), a_profile({"b": 4.0}, conditions=(ONE, TEN))]
    (comparison,) = compare([card], profiles)
    a, b, c = comparison.models
    assert (a.num_parameters, b.num_parameters, c.num_parameters) == (100, 7, 100)
    assert (a.score, a.sd) == (50.0, 10.0)  # in %
    assert a.macs == {4.0: 5.0, 10.0: 1000.0}
    assert b.macs == {10.0: 1000.0, 1.0: 1000.0}
    assert a.latency_ms == {(0, TEN): 10.0}
    assert b.latency_ms == {(0, TEN): 20.0, (1, ONE): 4.0, (1, TEN): 40.0}
    assert (c.macs, c.latency_ms) == ({}, {})
    assert comparison.seconds() == 10.0
    assert comparison.measurements() == [(0, TEN)]  # only there are two of them


@pytest.mark.parametrize(
    ("row", "model", "shared", "same"),
    [
        ({}, {}, False, True),
        ({"path": "elsewhere", "name": "renamed"}, {}, False, True),  # the digest decides
        ({"digest": "another"}, {}, False, False),  # although the path is the same: it was overwritten since
        ({"digest": ""}, {}, False, True),  # cards of old: the path
        ({"digest": "", "path": "elsewhere"}, {}, False, False),
        ({"digest": "", "path": ""}, {}, False, False),
        ({}, {}, True, True),
        ({"path": "elsewhere"}, {}, True, True),
        ({"name": "renamed"}, {}, True, True),
        ({"path": "elsewhere", "name": "windowed"}, {}, True, False),  # the same tensors, another description
    ],
)
def test_what_makes_two_models_one(row: dict[str, str], model: dict[str, str], shared: bool, same: bool) -> None:
    profiled = a_profile({"a": 1.0}).models[0]
    digests = {"digest of a"} if shared else set()
    assert is_same(replace(a_row("a"), **row), replace(profiled, **model), digests) is same


def test_models_of_equal_tensors_are_told_apart_by_name() -> None:
    rows = (a_row("whole", digest="d"), a_row("narrow", digest="d"))
    profile = a_profile({"whole": 2.0, "narrow": 1.0})
    profile = replace(profile, models=tuple(replace(m, digest="d", path="") for m in profile.models))
    (comparison,) = compare([a_card(*rows)], [profile])
    assert [model.latency_ms for model in comparison.models] == [{(0, TEN): 20.0}, {(0, TEN): 10.0}]


@pytest.mark.parametrize(
    "other",
    [
        {"task": "speaker"},
        {"metric": "error rate"},
        {"corpus": {"name": "speech", "digest": "grown since"}},
        {"protocol": {"split": "s", "classifier": "mlp"}},
    ],
)
def test_only_what_was_probed_in_one_way_is_compared(other: dict[str, Any]) -> None:
    cards = [a_card(a_row("a")), a_card(a_row("b"))]
    assert [len(comparison.models) for comparison in compare(cards, [])] == [2]  # control
    assert compare([cards[0], a_card(a_row("b"), **other)], []) == []


def test_the_newest_result_counts_and_the_others_are_told() -> None:
    old = a_card(a_row("a", 0.9), a_row("b", 0.8), date="2025-01-02")
    new = a_card(a_row("a", 0.6), date="2025-01-03")
    (comparison,) = compare([new, old], [])
    assert {model.name: model.score for model in comparison.models} == {"a": 60.0, "b": 80.0}
    assert comparison.notes == ("a was probed more than once: the newest result counts.",)


def test_baselines_without_a_cost_are_references_and_random_weights_are_left_out() -> None:
    rows = (a_row("log-Mel", 0.3, kind="features", path="", digest=""), a_row("random weights", 0.4, kind="random"))
    (comparison,) = compare([a_card(*rows, a_row("a"), a_row("b"))], [])
    assert comparison.references == {"log-Mel": 30.0}
    assert [model.name for model in comparison.models] == ["a", "b"]
    assert compare([a_card(*rows, a_row("a"))], []) == []  # one model alone is no trade-off


def test_an_error_is_the_better_the_lower() -> None:
    rows = (a_row("a", 3.0), a_row("b", 2.0))
    assert compare([a_card(*rows, metric="phone error rate")], [])[0].lower_is_better
    assert not compare([a_card(*rows, metric="accuracy")], [])[0].lower_is_better


def test_cards_without_costs_can_still_be_read(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_text(
        '{"task": "x", "rows": [{"model": "m", "scores": [1, 2], "mean": 1.5, "sd": 0.7},'
        ' {"name": "n", "model": "n", "model_digest": "d", "scores": [1], "mean": 1, "sd": 0, "macs_per_second": 3,'
        ' "macs_seconds": 10}]}',
        encoding="utf-8",
    )
    old, new = read_card(path)[1]
    assert (old.path, old.digest, old.macs_per_second, old.macs_seconds) == ("m", "", None, None)
    assert (new.path, new.digest, new.macs_per_second, new.macs_seconds) == ("n", "d", 3.0, 10.0)
