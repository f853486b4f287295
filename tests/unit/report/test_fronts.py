"""Fronts: who is on them, where names stand, and what the page and the files say."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from sslim import cli
from sslim.profiling import Conditions
from sslim.profiling.profile import Profile, ProfiledModel, profile_row
from sslim.report import build_report
from sslim.report.fronts import Dot, Panel, draw_panel, picture
from sslim.report.labels import log_ticks
from sslim.report.palette import PRINT
from sslim.report.profiles import draw_speedups, save_speedups

SCORES = {"dense": 0.80, "half": 0.79, "third": 0.70, "odd": 0.65}
SIZES = {"dense": 90_000_000, "half": 45_000_000, "third": 30_000_000, "odd": 60_000_000}
LATENCY_MS = {"dense": 100.0, "half": 60.0, "third": 50.0, "odd": 40.0}


def write_card(path: Path) -> Path:
    rows = [
        {"name": "log-Mel", "kind": "features", "layer": "-", "scores": [0.75, 0.77], "mean": 0.76, "sd": 0.01, "model": None}
    ]
    for name, mean in SCORES.items():
        row = {"name": name, "kind": "model", "layer": "mix", "scores": [mean - 0.01, mean + 0.01], "mean": mean, "sd": 0.014}
        rows.append(row | {"model": f"runs/{name}", "model_digest": name, "num_parameters": SIZES[name]})
    card = {"format_version": 1, "task": "phones", "metric": "accuracy", "corpus": {"name": "speech"}, "rows": rows}
    path.write_text(json.dumps(card), encoding="utf-8")
    return path


def a_profile() -> Profile:
    models = [
        ProfiledModel(
            name=name, path="", digest=name, family="f", num_parameters=size, nonzero_parameters=size // 2,
            zero_share=0.5 if name == "odd" else 0.0, file_bytes=4 * size, num_layers=2,
        )
        for name, size in SIZES.items()
    ]  # fmt: skip
    base = [100.0, 104.0, 98.0]
    rows = [
        profile_row(
            name, conditions, macs=SIZES[name] * 50, macs_by_group={"attention maps": 9, "feed-forward": 10},
            times_ms=[time * LATENCY_MS[name] / 100 for time in base], baseline_macs=SIZES["dense"] * 50,
            baseline_times_ms=base,
        )
        for conditions in (Conditions(seconds=10.0), Conditions(seconds=1.0, threads=2))
        for name in SIZES
    ]  # fmt: skip
    machine = {"processor": "Some <b>CPU</b>", "torch": "2"}
    return Profile(baseline="dense", models=tuple(models), rows=tuple(rows), machine=machine)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_card(tmp_path / "card.json")
    a_profile().save(tmp_path / "profile.json")
    (tmp_path / "notes.json").write_text('{"something": "else"}', encoding="utf-8")
    return tmp_path


def a_panel(points: dict[str, tuple[float, float]], **values) -> Panel:
    dots = tuple(Dot(name=name, cost=cost, score=score) for name, (cost, score) in points.items())
    return Panel(dots=dots, cost="cost", score="score", title="title", **values)


def test_the_front_holds_what_nothing_beats() -> None:
    points = {"cheap": (1, 50.0), "beaten": (3, 60.0), "good": (2, 60.0), "best": (9, 61.0), "worse": (9, 60.5)}
    panel = a_panel(points)
    assert [panel.dots[i].name for i in panel.front()] == ["cheap", "good", "best"]
    errors = replace(panel, lower_is_better=True)
    assert [errors.dots[i].name for i in errors.front()] == ["cheap"]


def drawn(panel: Panel):
    from matplotlib.figure import Figure

    axes = Figure(figsize=(6.4, 4.4)).subplots()
    draw_panel(axes, panel, PRINT)
    return axes


def boxes(axes, names):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    axes.figure.draw_without_rendering()
    found = {text.get_text(): Text.get_window_extent(text, renderer) for text in axes.texts}
    return [found[name] for name in names]


def overlaps(found) -> int:
    pairs = [(a, b) for i, a in enumerate(found) for b in found[:i]]
    return sum(a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1 for a, b in pairs)


def test_names_hide_neither_each_other_nor_points_and_stay_inside() -> None:
    points = {f"model-{i}": (10 * 1.08**i, 70 + 8 * math.sin(i)) for i in range(9)}
    points |= {"near": (10.1, 70.2), "nearer": (10.2, 69.8)}
    axes = drawn(a_panel(points))
    found = boxes(axes, points)
    assert overlaps(found) == 0
    frame, places = axes.bbox, axes.transData.transform(list(points.values()))
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in found)
    assert not any(box.x0 < x < box.x1 and box.y0 < y < box.y1 for box in found for x, y in places)
    for text in axes.texts:  # control: all names right of their points
        text.set(position=(7, 0), ha="left", va="center")
    assert overlaps(boxes(axes, points)) > 0


def test_the_line_is_that_of_the_best_score_for_a_cost() -> None:
    axes = drawn(a_panel({"a": (1.0, 50.0), "b": (4.0, 60.0), "beaten": (5.0, 55.0)}))
    line = next(line for line in axes.lines if line.get_drawstyle() == "steps-post")
    x, y = line.get_data()
    assert list(x[:2]) == [1.0, 4.0]
    assert list(y) == [50.0, 60.0, 60.0]
    assert x[2] == pytest.approx(axes.get_xlim()[1])


def test_references_far_below_are_told_but_not_drawn() -> None:
    near = drawn(a_panel({"a": (1.0, 50.0), "b": (4.0, 60.0)}, references={"log-Mel": 48.0}))
    assert any(line.get_linestyle() == "--" and 48.0 in line.get_ydata() for line in near.lines)
    far = drawn(a_panel({"a": (1.0, 50.0), "b": (4.0, 60.0)}, references={"log-Mel": 8.0}))
    assert far.get_ylim()[0] > 40
    assert "not shown: log-Mel 8" in [text.get_text() for text in far.texts]


@pytest.mark.parametrize("panel", [
    a_panel({"a": (1.0, 50.0), "b": (1.0, 50.0)}),
    a_panel({"a": (1e-6, 0.0), "b": (1e9, 0.0)}),
    a_panel({"$x^{$": (1.0, -3.0), "": (2.0, 4.0), "<b>&": (3.0, 4.0)}),
])  # fmt: skip
def test_odd_values_are_drawn_too(panel: Panel) -> None:
    assert picture(panel, name="odd").startswith("<svg")


@pytest.mark.parametrize(
    ("low", "high"), [(0.9, 3.2), (1.0, 1.1), (95.0, 97.0), (1e-3, 1e5), (8.0, 80.0), (0.45, 2.4), (29.0, 31.5)]
)
def test_ticks_are_few_round_numbers_within_the_axis(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 1 <= len(ticks) <= 8
    assert all(low <= tick <= high and tick == pytest.approx(float(f"{tick:.3g}")) for tick in ticks)
    assert len(ticks) >= 2 or high / low < 1.11


def test_the_report_joins_files_and_shows_fronts_and_profile(folder: Path) -> None:
    text = build_report([folder])
    assert build_report([folder / "card.json", folder / "profile.json"]).count("<svg") == text.count("<svg")
    alone = build_report([folder / "card.json"])
    assert "median latency / ms: 10 s, 1 thread" in text
    assert "median latency" not in alone
    assert "parameters / million" in alone  # what a card knows by itself
    assert "On the front, where no other model is better for the same cost or less: third, half, dense." in text
    assert "On the front, where no other model is better for the same cost or less: odd, third, half, dense." in text
    assert "measured on Some &lt;b&gt;CPU&lt;/b&gt;".lower() in text.lower()
    assert "<b>CPU" not in text
    assert "odd: 50 % of its weights are zeros; zeros are multiplied like any number" in text
    assert "as predicted" in text
    assert "MACs by part" in text


def test_pictures_for_paper(folder: Path, capsys) -> None:
    pictures = folder / "pictures"
    arguments = ["report", str(folder), "--output", str(folder / "page.html"), "--pictures", str(pictures)]
    assert cli.main(arguments) == 0
    names = sorted(path.name for path in pictures.iterdir())
    assert names == ["front-1.png", "front-2.png", "front-3.png", "front-4.png", "speedup-1.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in pictures.iterdir())


def test_speedups_lie_where_they_were_predicted_and_measured(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    profile = a_profile()
    axes = Figure(figsize=(6, 6)).subplots()
    draw_speedups(axes, profile, profile.conditions[0], PRINT, "machine: 10 s, 1 thread")
    assert axes.get_title(loc="center") == "machine: 10 s, 1 thread"
    assert axes.get_xlim() == axes.get_ylim()
    seen = [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines if len(line.get_xdata()) == 1]
    for row in profile.rows_at(profile.conditions[0]):
        place = (row.predicted_speedup, row.measured_speedup)
        assert any(place == pytest.approx(point) for point in seen)
    assert {text.get_text() for text in axes.texts} == {*SIZES, "as predicted"}
    assert overlaps(boxes(axes, SIZES)) == 0
    save_speedups(profile, tmp_path / "speedup.svg")
    text = (tmp_path / "speedup.svg").read_text(encoding="utf-8")
    assert "10 s, 1 thread" in text
    assert "1 s, 2 threads" in text
    alone = replace(profile, models=profile.models[:1], rows=profile.rows[:1])
    with pytest.raises(ValueError, match="holds dense alone"):
        save_speedups(alone, tmp_path / "x.png")
