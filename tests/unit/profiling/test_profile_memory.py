"""Peak memory of a process: what was freed again counts, what was there before does not."""

import sys
from pathlib import Path

import pytest
import torch

from sslim.profiling import memory
from sslim.profiling.memory import added_peak_bytes, includes, peak_resident_bytes

MB = 10**6
linux = pytest.mark.skipif(not memory.STATUS.is_file(), reason="only Linux lets a process set its peak back")


def fill(megabytes: int) -> torch.Tensor:
    return torch.ones(megabytes * MB // 4)


@linux
def test_memory_that_was_given_back_counts() -> None:
    assert 190 * MB < added_peak_bytes(lambda: fill(200).sum().item(), "cpu") < 230 * MB
    assert added_peak_bytes(lambda: None, "cpu") < 2 * MB  # control, after that peak


@linux
def test_memory_from_before_does_not_count() -> None:
    before = fill(150)
    assert 90 * MB < added_peak_bytes(lambda: fill(100).sum().item(), "cpu") < 130 * MB
    assert before[0] == 1


@linux
def test_both_sources_of_the_peak_agree(monkeypatch) -> None:
    fill(100)
    own = peak_resident_bytes()
    monkeypatch.setattr(memory, "STATUS", Path("nowhere"))
    assert peak_resident_bytes() >= own - 2 * MB  # of the whole life of the process, and of the one that started it
    assert peak_resident_bytes() > 100 * MB


@pytest.mark.skipif(sys.platform == "darwin", reason="kilobytes are what other systems count in")
def test_where_the_peak_cannot_be_set_back_it_only_grows(monkeypatch) -> None:
    monkeypatch.setattr(memory, "STATUS", Path("nowhere"))
    monkeypatch.setattr(memory, "CLEAR_REFS", Path("nowhere") / "clear_refs")
    peak = peak_resident_bytes()
    added = added_peak_bytes(lambda: fill(100 + peak // MB).sum().item(), "cpu")
    assert added > 50 * MB
    assert added_peak_bytes(lambda: fill(10).sum().item(), "cpu") < 2 * MB  # below the peak so far: nothing is known


def test_it_says_what_it_includes() -> None:
    assert "resident memory" in includes("cpu")
    assert "allocator" in includes("cuda:1")
