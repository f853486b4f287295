"""The file of a profile: figures follow from counts and times, reading is strict, the table says what a reader needs."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sslim.profiling import Conditions
from sslim.profiling.profile import ZEROS_NOTE, Profile, ProfiledModel, ProfileRow, describe_conditions, profile_row
from sslim.profiling.profile_table import WIDTH, profile_notes, profile_table

CONDITIONS = Conditions(seconds=5.0, batch=2, threads=2)


def a_model(name: str, **values: Any) -> ProfiledModel:
    settings: dict[str, Any] = {
        "path": f"runs/{name}", "digest": name, "family": "melhubert", "num_parameters": 90_000_000,
        "nonzero_parameters": 89_000_000, "zero_share": 0.0, "file_bytes": 360_000_000, "num_layers": 12,
    }  # fmt: skip
    return ProfiledModel(name=name, **settings | values)


def a_row(name: str, macs: int = 1000, times: tuple[float, ...] = (20.0, 40.0, 30.0), conditions=CONDITIONS) -> ProfileRow:
    return profile_row(
        name,
        conditions,
        macs=macs,
        macs_by_group={"feed-forward": macs},
        times_ms=times,
        baseline_macs=1000,
        baseline_times_ms=(20.0, 40.0, 30.0),
    )


@pytest.fixture
def profile() -> Profile:
    models = (a_model("dense"), a_model("half", num_parameters=45_000_000))
    return Profile(
        baseline="dense", models=models, rows=(a_row("dense"), a_row("half", 500, (10.0, 40.0, 10.0))), machine={"cores": "2"}
    )


def test_figures_follow_from_counts_and_times() -> None:
    row = a_row("half", 500, (10.0, 40.0, 10.0))
    assert (row.p50_ms, row.predicted_speedup) == (10.0, 2.0)
    assert row.p95_ms == pytest.approx(37.0)  # interpolated between the second and the last of 10, 10, 40
    assert row.macs_per_second == 500 / 10  # two utterances of five seconds
    assert row.real_time_factor == pytest.approx(0.010 / 10)
    assert row.measured_speedup == 2.0  # within rounds 2, 1 and 3; the ratio of medians would be 3
    assert row.speedup_quartiles == (1.5, 2.5)


def test_it_survives_the_disk(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "deep" / "profile.json")
    assert Profile.load(tmp_path / "deep" / "profile.json") == profile
    plain = json.loads((tmp_path / "deep" / "profile.json").read_text(encoding="utf-8"))
    assert {"format_version", "machine", "rows"} <= set(plain)
    assert plain["rows"][1]["conditions"] == {"seconds": 5.0, "batch": 2, "threads": 2, "device": "cpu"}


def broken(values: dict[str, Any], *path: Any) -> dict[str, Any]:
    """The values with one replaced: the last of ``path`` at the keys before it."""
    *keys, last, value = path
    inner: Any = values
    for key in keys:
        inner = inner[key]
    inner[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (("kind", "card"), "is not a result of `sslim profile`"),
        (("format_version", 9), "is a profile of version 9; this sslim reads 1"),
        (("rows", 0, "p50", 3.0), "has no key 'p50'; did you mean 'p50_ms'"),
        (("rows", 1, "times_ms", ["fast"]), "expected float, got 'fast'"),
        (("rows", 1, "model", "third"), "a profile of dense, half has no model 'third'"),
        (("rows", 1, "times_ms", []), "the row of 'half' has no times"),
        (("rows", 1, "p50_ms", float("nan")), "figures that are not above 0"),
        (("rows", []), "a profile without rows"),
        (("models", 1, "name", "dense"), "need distinct names"),
        (("baseline", "other"), "has no model 'other'"),
    ],
)
def test_reading_is_strict(profile: Profile, tmp_path: Path, path: tuple[Any, ...], sentence: str) -> None:
    file = tmp_path / "profile.json"
    profile.save(file)
    Profile.load(file)  # control
    file.write_text(json.dumps(broken(json.loads(file.read_text(encoding="utf-8")), *path)), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        Profile.load(file)
    assert sentence in str(caught.value)


def printed(profile: Profile, width: int = WIDTH) -> str:
    text = StringIO()
    Console(width=width, file=text).print(profile_table(profile, CONDITIONS))
    return text.getvalue()


def test_the_table_fits_120_columns_with_every_figure_whole(profile: Profile) -> None:
    wide = replace(
        profile,
        models=tuple(replace(m, num_parameters=3_170_000_000, zero_share=0.5, file_bytes=10**10) for m in profile.models),
        rows=tuple(replace(r, p50_ms=123456.7, p95_ms=123456.7, peak_memory_bytes=10**11) for r in profile.rows),
    )
    assert max(map(len, printed(wide, width=400).splitlines())) <= WIDTH == 120
    names = {"dense": "dense", "half": "a/long/path/to/tell/it/from/others/half"}
    long = replace(
        wide,
        models=tuple(replace(m, name=names[m.name]) for m in wide.models),
        rows=tuple(replace(r, model=names[r.model]) for r in wide.rows),
    )
    text = printed(long)
    for figure in ("3170.00", "123456.7", "100000", "2.00 (1.50-2.50)", "baseline"):
        assert figure in text
    assert "…" not in text  # the name folds, no figure is cut


def test_zeros_are_told_where_single_weights_were_pruned(profile: Profile) -> None:
    assert not any(ZEROS_NOTE in note for note in profile_notes(profile))
    assert "nonzero" not in printed(profile)
    sparse = replace(profile, models=(profile.models[0], replace(profile.models[1], zero_share=0.5)))
    assert f"half: 50 % of its weights are zeros; {ZEROS_NOTE}" in profile_notes(sparse)
    assert "nonzero" in printed(sparse)
    rounded = replace(profile, models=(profile.models[0], replace(profile.models[1], zero_share=0.02)))  # int8 does that
    assert profile_notes(rounded) == profile_notes(profile)


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        (Conditions(seconds=10.0), "10 s, 1 thread"),
        (Conditions(seconds=0.5, batch=8, threads=2), "0.5 s, batch 8, 2 threads"),
        (Conditions(seconds=1.0, device="cuda"), "1 s, 1 thread, cuda"),
    ],
)
def test_conditions_in_words(conditions: Conditions, words: str) -> None:
    assert describe_conditions(conditions) == words
