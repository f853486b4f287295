"""Global statistics: the published ones, files, and measuring."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from sslim.frontends import (
    PUBLISHED_STATISTICS,
    FilterbankConfig,
    NormalizationConfig,
    RunningStatistics,
    SpectralFrontendConfig,
    build_frontend,
    load_statistics,
)
from sslim.frontends.statistics import STD_FLOOR


@pytest.mark.parametrize("name", PUBLISHED_STATISTICS)
def test_published_statistics_are_the_published_files(name: str, shared_data: Path) -> None:
    stored = np.load(shared_data / "librispeech" / f"{name}-mean-std.npy").astype(np.float32)
    mean, std, source = load_statistics(name)
    np.testing.assert_array_equal(mean, stored[0])
    np.testing.assert_array_equal(std, stored[1])
    assert source == name


def test_published_statistics_differ_from_each_other() -> None:
    first_bins = [round(float(load_statistics(name)[0][0]), 3) for name in PUBLISHED_STATISTICS]
    assert first_bins == [12.220, 12.183, 11.858]  # MelHuBERT's documented values


def test_statistics_files(tmp_path: Path) -> None:
    mean, std = np.arange(3.0), np.arange(1.0, 4.0)
    np.save(tmp_path / "own.npy", np.stack([mean, std]))
    save_file({"mean": mean, "std": std, "count": np.array([7])}, tmp_path / "statistics.safetensors")
    for path, expected in (
        (tmp_path / "own.npy", "own.npy"),
        (tmp_path / "statistics.safetensors", "statistics.safetensors"),
        (tmp_path, f"{tmp_path.name}/statistics.safetensors"),
    ):
        loaded_mean, loaded_std, source = load_statistics(path)
        np.testing.assert_array_equal(loaded_mean, mean)
        np.testing.assert_array_equal(loaded_std, std)
        assert (loaded_mean.dtype, source) == (torch.float32, expected)


def test_bad_statistics_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"libri-96 is no statistics.*did you mean 'libri-960'"):
        load_statistics("libri-96")
    cases = {
        "shape": (np.zeros((3, 4)), r"\(3, 4\)"),
        "zero": (np.zeros((2, 4)), "standard deviation 0"),
        "nan": (np.array([[np.nan], [1.0]]), "non-finite"),
        "text": (np.array([["a"], ["b"]]), "<U1"),
    }
    for name, (array, named) in cases.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match=named):
            load_statistics(tmp_path / f"{name}.npy")
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"objects\.npy"):  # pickles are never opened
        load_statistics(tmp_path / "objects.npy")
    (tmp_path / "short.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match=r"short\.npy"):
        load_statistics(tmp_path / "short.npy")
    save_file({"mean": np.ones(2)}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="'std'"):
        load_statistics(tmp_path / "half.safetensors")
    (tmp_path / "own.txt").write_text("1 2")
    with pytest.raises(ValueError, match=r"'.txt'; accepted are .npy"):
        load_statistics(tmp_path / "own.txt")


def pieces(offset: float = 0.0) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal((count, 4)) * [1, 2, 3, 0] + offset for count in (5, 0, 1, 300, 17)]


def test_running_statistics_are_those_of_all_frames() -> None:
    running = RunningStatistics()
    for piece in pieces():
        running.add(piece)
    mean, std = running.result()
    whole = np.concatenate(pieces())
    assert running.count == len(whole)
    np.testing.assert_allclose(mean, whole.mean(axis=0), atol=1e-7)
    np.testing.assert_allclose(std[:3], whole.std(axis=0)[:3], rtol=1e-6)
    assert float(std[3]) == pytest.approx(STD_FLOOR)  # the constant channel
    assert np.abs(std.numpy()[:3] - whole.std(axis=0, ddof=1)[:3]).max() > 1e-4  # population, not sample


def test_merging_in_any_grouping_is_the_same() -> None:
    halves = [RunningStatistics(), RunningStatistics()]
    for number, piece in enumerate(pieces()):
        halves[number % 2].add(torch.from_numpy(piece))
    restored = RunningStatistics.from_plain(json.loads(json.dumps(halves[1].to_plain())))
    assert restored.to_plain() == halves[1].to_plain()
    merged = RunningStatistics()
    for part in (restored, RunningStatistics(), halves[0]):
        merged.merge(part)
    in_order = RunningStatistics()
    for piece in pieces():
        in_order.add(piece)
    for result, expected in zip(merged.result(), in_order.result(), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-7)
    halves[0].add(np.ones((1, 4)))
    assert merged.count == in_order.count  # nothing is shared between the parts


def test_a_large_mean_costs_no_accuracy() -> None:
    running = RunningStatistics()
    for piece in pieces(offset=1e9):
        running.add(piece)
    spread = np.concatenate(pieces()).std(axis=0)[:3]
    np.testing.assert_allclose(running.result()[1][:3], spread, rtol=1e-5)
    whole = np.concatenate(pieces(offset=1e9))  # sums of squares, the textbook way, lose everything
    naive = np.sqrt(np.maximum((whole**2).mean(axis=0) - whole.mean(axis=0) ** 2, 0))
    assert np.abs(naive[:3] - spread).max() > 1.0


def test_running_statistics_refuse_what_they_cannot_count() -> None:
    running = RunningStatistics()
    with pytest.raises(ValueError, match="at least one frame"):
        running.result()
    with pytest.raises(ValueError, match="non-finite"):
        running.add(np.array([[1.0, np.inf]]))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        running.add(np.zeros(3))
    running.add(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="width 4, earlier ones 3"):
        running.add(np.zeros((2, 4)))


def frontend(kind: str = "global", deltas: int = 0) -> torch.nn.Module:
    normalization = NormalizationConfig(kind=kind)  # type: ignore[arg-type]
    return build_frontend(SpectralFrontendConfig(features=FilterbankConfig(), normalization=normalization, deltas=deltas))


def test_a_frontend_without_statistics_says_what_to_pass() -> None:
    with pytest.raises(ValueError, match='pass statistics="libri-960"'):
        frontend()(torch.zeros(1, 800), torch.tensor([800]))
    assert not frontend().state_dict()  # nothing stored, so nothing can be taken for statistics


def test_set_statistics_updates_state_and_description() -> None:
    model = frontend()
    mean, std, source = load_statistics("libri-100")
    model.set_statistics(mean, std, source=source)
    assert model.config.normalization.statistics == model.statistics_source == "libri-100"
    assert set(model.state_dict()) == {"mean", "std"}
    mean.add_(1)  # the front-end keeps its own copy
    assert not torch.equal(model.mean, mean)
    with pytest.raises(ValueError, match="for 40 features; this front-end has 120"):
        frontend(deltas=2).set_statistics(mean, std, source=source)
    with pytest.raises(ValueError, match="'utterance' takes no global"):
        frontend("utterance").set_statistics(mean, std, source=source)
    with pytest.raises(ValueError, match="standard deviation 0"):
        model.set_statistics(mean, std * 0, source=source)
