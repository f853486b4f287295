"""Pictures of fronts: what is read from a search, how accuracies are matched, what is drawn."""

import json
from pathlib import Path
from typing import Any

import pytest

from sslim.report.pareto import FrontPoint, draw_front, read_points, staircase, with_accuracies

ROWS = [
    {"name": "front-1", "on_front": True, "loss": 2.0, "costs": {"params": 1e6, "macs": 2e9}, "measured_ms": 3.5},
    {"name": None, "on_front": False, "loss": None, "costs": {"params": 2e6, "macs": 3e9}, "measured_ms": None},
    {"name": "front-2", "on_front": True, "loss": 1.0, "costs": {"params": 3e6, "macs": 4e9}, "measured_ms": None},
]


def card(name: str, mean: float, task: str = "speaker") -> dict[str, Any]:
    rows = [
        {"name": name, "model": f"search/{name}", "mean": mean, "sd": 0.01},
        {"name": "log-Mel", "model": None, "mean": 0.1},
    ]
    return {"task": task, "metric": "accuracy", "rows": rows}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "search.json").write_text(json.dumps({"candidates": ROWS}))
    return tmp_path


def test_points_hold_what_is_known(folder: Path) -> None:
    first, second, third = read_points(folder)
    assert first == FrontPoint(
        values={"loss": 2.0, "measured_ms": 3.5, "params": 1e6, "macs": 2e9}, name="front-1", on_front=True
    )
    assert "loss" not in second.values
    assert third.name == "front-2"


def test_accuracies_go_to_the_subnets_that_cards_name(folder: Path) -> None:
    points = with_accuracies(read_points(folder), [card("front-1", 0.6), card("front-2", 0.8)])
    assert [point.values.get("accuracy") for point in points] == [0.6, None, 0.8]
    assert [point.sd for point in points] == [0.01, None, 0.01]
    draw_front(points, folder / "accuracy.svg", y="accuracy")
    text = (folder / "accuracy.svg").read_text()
    assert "probe accuracy / %" in text
    assert ">front-2<" in text


def test_cards_that_do_not_fit_are_refused(folder: Path) -> None:
    points = read_points(folder)
    with pytest.raises(ValueError, match=r"different tasks.*: label \(accuracy\), speaker \(accuracy\)"):
        with_accuracies(points, [card("front-1", 0.6), card("front-2", 0.8, "label")])
    with pytest.raises(ValueError, match="no card names a subnet of this search; the cards have other"):
        with_accuracies(points, [card("other", 0.6)])


def test_the_same_points_give_the_same_picture(folder: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw_front(read_points(folder), folder / name, title="tiny")
    assert (folder / "a.svg").read_bytes() == (folder / "b.svg").read_bytes()
    assert "validation loss" in (folder / "a.svg").read_text()


def test_the_line_of_a_front_of_two_costs_never_rises() -> None:
    """Dearer in latency and worse, but smaller: on the front of both costs, and beside the line over latency."""
    rows = [(10.0, 3.0, 9.0), (11.0, 1.0, 8.0), (12.0, 2.0, 1.0), (13.0, 0.5, 9.5)]
    points = [FrontPoint(values={"latency_ms": a, "loss": b, "params": c}, on_front=True) for a, b, c in rows]
    line = staircase(points, "latency_ms", "loss")
    assert [point.values["latency_ms"] for point in line] == [10.0, 11.0, 13.0]
    assert [point.values["params"] for point in staircase(points, "params", "loss")] == [1.0, 8.0, 9.5]


def test_nothing_to_draw_and_nothing_to_read_are_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no subnet has both latency_ms and loss"):
        draw_front(read_points(folder), folder / "x.png", x="latency_ms")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="holds no finished search"):
        read_points(tmp_path / "other")
