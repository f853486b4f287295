"""The table of measured parts: what it holds, when it is refused, and how sums are judged."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sslim.frontends import ConvFrontendConfig, FilterbankConfig, NormalizationConfig, SpectralFrontendConfig
from sslim.frontends.config import ConvLayerConfig
from sslim.models import ModelConfig, ProjectionConfig
from sslim.models.elastic import subnet_config
from sslim.models.search_space import SearchSpace
from sslim.nn.encoder import EncoderConfig, plain_blocks
from sslim.nn.positions import ConvPositionsConfig
from sslim.profiling import Conditions, LatencyTable, latency, measure_latency
from sslim.profiling.latency import check_device, compare, measure_whole, time_in_turns, varied_subnets

SPACE = SearchSpace(dims=(8, 16), num_heads=(1, 2), feedforward_ratios=(2.0, 3.0), num_layers=(1, 3))
CONFIG = ModelConfig(
    family="test",
    frontend=ConvFrontendConfig(
        layers=(ConvLayerConfig(channels=5, kernel=10, stride=5), ConvLayerConfig(channels=4, kernel=8, stride=8))
    ),
    projection=ProjectionConfig(feature_dim=4),
    encoder=EncoderConfig(dim=16, positions=ConvPositionsConfig(kernel_size=8, groups=4), **plain_blocks(3, 2, 8, 48)),
    search_space=SPACE,
)
CONDITIONS = Conditions(seconds=0.2)


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    return measure_latency(CONFIG, CONDITIONS, repeats=3, whole_nets=4)


def test_every_subnet_is_the_sum_of_measured_parts(table: LatencyTable) -> None:
    assert len(table.parts) == 1 + 2 + 2 * 2 * 2  # front-end, entry of each width, blocks
    assert all(milliseconds > 0 for milliseconds in table.parts.values())
    parts = table.parts
    for subnet in varied_subnets(SPACE, 20, 1):
        net = subnet_config(CONFIG, subnet)
        widths = zip(subnet.num_heads, subnet.feedforward_dims, strict=True)
        blocks = sum(parts[f"block {subnet.dim}: {heads} x 8 heads, {units} units"] for heads, units in widths)
        assert table.raw_ms(net) == pytest.approx(parts["front-end"] + parts[f"entry {subnet.dim}"] + blocks)
        line = table.additivity
        assert line is not None
        assert table.predict(net) == pytest.approx(line.intercept_ms + line.slope * table.raw_ms(net))


def test_a_window_is_a_part_of_its_own(table: LatencyTable) -> None:
    with pytest.raises(ValueError, match=r"no 'block 16: 2 x 8 heads, 48 units, window 3': it was measured for another"):
        table.predict(subnet_config(CONFIG, replace(SPACE.largest(), windows=(3, 3, 3))))


def test_it_survives_the_disk(table: LatencyTable, tmp_path: Path) -> None:
    table.save(tmp_path / "latency.json")
    assert LatencyTable.load(tmp_path / "latency.json") == table
    assert {"processor", "system", "torch", "repeats"} <= set(table.machine)
    (tmp_path / "other.json").write_text('{"format_version": 0}')
    with pytest.raises(ValueError, match=r"other.json is not a latency table of version 1"):
        LatencyTable.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"threads": 4}, "measured with threads 1, not 4"),
        ({"seconds": 5.0}, r"measured with seconds 0\.2, not 5\.0"),
        ({"batch": 2}, "measured with batch 1, not 2"),
        ({"device": "cuda"}, "measured with device cpu, not cuda"),
    ],
)
def test_other_conditions_are_refused(table: LatencyTable, change: dict[str, float], sentence: str) -> None:
    table.require(CONDITIONS)
    with pytest.raises(ValueError, match=sentence):
        table.require(replace(CONDITIONS, **change))  # type: ignore[arg-type]


def test_threads_are_set_while_measuring_and_put_back() -> None:
    seen: list[int] = []

    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return x

    before = torch.get_num_threads()
    measure_whole({"it": subnet_config(CONFIG, "min")}, replace(CONDITIONS, threads=2), repeats=1)
    assert torch.get_num_threads() == before
    time_in_turns({"spy": (Spy(), torch.zeros(1))}, device="cpu", repeats=2)
    assert seen == [before] * 3  # one of them the warm-up


def test_rounds_change_their_order() -> None:
    now, order = 0.0, []
    durations = {"a": iter([9.0, 1.0, 2.0, 30.0]), "b": iter([9.0, 5.0, 5.0, 5.0])}

    class Slow(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal now
            order.append(self.name)
            now += next(durations[self.name]) / 1000
            return x

    pairs = {name: (Slow(name), torch.zeros(1)) for name in "ab"}
    times = time_in_turns(pairs, device="cpu", repeats=3, seed=1, clock=lambda: now)
    assert times["a"] == pytest.approx([1.0, 2.0, 30.0])  # the warm-up of 9 does not count
    assert times["b"] == pytest.approx([5.0, 5.0, 5.0])
    rounds = {tuple(order[i : i + 2]) for i in range(0, 8, 2)}
    assert rounds == {("a", "b"), ("b", "a")}


def test_rounds_go_on_until_the_time_is_over() -> None:
    now = 0.0

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal now
            now += 0.5
            return x

    def rounds(repeats: int, least_s: float) -> int:
        pairs = {name: (Slow(), torch.zeros(1)) for name in "ab"}
        return len(time_in_turns(pairs, device="cpu", repeats=repeats, least_s=least_s, clock=lambda: now)["a"])

    assert rounds(3, 0.0) == 3
    assert rounds(3, 2.0) == 3  # these take three seconds anyway
    assert rounds(3, 7.5) == 7  # 1 s each, after one that warms up
    with pytest.raises(ValueError, match="measured in 0 rounds; expected 1 or more"):
        rounds(0, 1.0)


def test_the_median_of_the_rounds_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounds(pairs: dict, **_: object) -> dict[str, list[float]]:
        return {name: [9.0, float(i + 1), 0.1] for i, name in enumerate(pairs)}

    monkeypatch.setattr(latency, "times_in_turns", rounds)
    table = measure_latency(CONFIG, CONDITIONS)
    assert list(table.parts.values()) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 9.0, 9.0]
    assert table.machine["repeats"] == "3"
    assert measure_whole({"it": subnet_config(CONFIG, "min")}, CONDITIONS) == {"it": 1.0}


@pytest.mark.parametrize("name", ["gpu", "cpu:1", "cuda:one", "cuda:", "mps"])
def test_devices_that_torch_is_not_asked_for_are_refused(name: str) -> None:
    check_device("cpu")
    with pytest.raises(ValueError, match=f"device is '{name}'; accepted are cpu, cuda and cuda:N"):
        check_device(name)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda:1', but torch finds no GPU here"):
        check_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_device("cuda:0")
    with pytest.raises(ValueError, match="device is 'cuda:1', but torch finds 1 here"):
        check_device("cuda:1")


def test_a_biased_sum_is_corrected_by_a_line() -> None:
    sums = [10.0, 12.0, 15.0, 20.0, 24.0]
    judged = compare(sums, [2.0 + 1.1 * s for s in sums])
    assert judged.intercept_ms == pytest.approx(2.0)
    assert judged.slope == pytest.approx(1.1)
    assert judged.median_error == pytest.approx(3.5 / 18.5)
    assert judged.max_error == pytest.approx(3.0 / 13.0)
    assert judged.corrected_max_error == pytest.approx(0.0, abs=1e-9)


def test_a_line_that_does_not_help_nets_it_has_not_seen_is_not_used() -> None:
    judged = compare([10.0, 11.0, 20.0], [10.0, 11.1, 19.9])
    assert (judged.intercept_ms, judged.slope, judged.corrected_median_error) == (0.0, 1.0, None)
    assert judged.median_error == pytest.approx(0.1 / 19.9)


def test_spectral_models_and_models_over_features_can_be_measured() -> None:
    spectral = replace(
        CONFIG,
        frontend=SpectralFrontendConfig(
            features=FilterbankConfig(), normalization=NormalizationConfig(kind="global", statistics="libri-960"), stack=2
        ),
        projection=ProjectionConfig(feature_dim=80),
    )
    assert "front-end" in measure_latency(spectral, CONDITIONS, repeats=1).parts
    assert len(measure_whole({"min": subnet_config(spectral, "min")}, CONDITIONS, repeats=1)) == 1
    bare = replace(CONFIG, frontend=None, search_space=None)
    table = measure_latency(bare, CONDITIONS, repeats=1)
    assert set(table.parts) == {"entry 16", "block 16: 2 x 8 heads, 48 units"}
    assert table.predict(bare) == pytest.approx(table.parts["entry 16"] + 3 * table.parts["block 16: 2 x 8 heads, 48 units"])


def test_conditions_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="threads 0 must be above 0"):
        Conditions(threads=0)
    with pytest.raises(ValueError, match="2 whole nets cannot check the sums"):
        measure_latency(CONFIG, CONDITIONS, whole_nets=2)


def test_varied_subnets_are_distinct_and_hold_both_ends() -> None:
    nets = varied_subnets(SPACE, 12, 0)
    assert len(set(nets)) == 12
    assert {SPACE.smallest(), SPACE.largest()} <= set(nets)
    tiny = SearchSpace(dims=(8,), num_heads=(1,), feedforward_ratios=(1.0,), num_layers=(1, 2))
    assert len(varied_subnets(tiny, 12, 0)) == 2
