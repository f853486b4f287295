"""A search's folder on the page: every cost that it knows, its front, and the results that lie in it."""

import json
from pathlib import Path

import pytest

from sslim.report import build_report

CANDIDATES = [
    {"name": "front-1", "on_front": True, "loss": 2.0, "costs": {"params": 1e6, "macs": 2e9}, "measured_ms": 3.5},
    {"name": None, "on_front": False, "loss": None, "costs": {"params": 2e6, "macs": 3e9}, "measured_ms": None},
    {"name": None, "on_front": False, "loss": 2.5, "costs": {"params": 2e6, "macs": 3e9}, "measured_ms": None},
    {"name": "front-2", "on_front": True, "loss": 1.0, "costs": {"params": 3e6, "macs": 4e9}, "measured_ms": None},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "search.json").write_text(json.dumps({"candidates": CANDIDATES}), encoding="utf-8")
    return tmp_path


def test_a_picture_for_every_cost_that_two_subnets_have(folder: Path) -> None:
    text = build_report([folder])
    assert text.count("<svg") == 2  # parameters and MACs; only one latency was measured
    assert f"Search {folder.name}" in text
    assert "4 subnets were evaluated" in text
    assert "MACs / billion per second of audio" in text
    rows = [part for part in text.split("<tr>") if part.startswith("<td>front-")]
    assert len(rows) == 2
    assert "3.5" in rows[0]


def test_an_unfinished_search_is_refused(tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no finished search"):
        build_report([tmp_path])
