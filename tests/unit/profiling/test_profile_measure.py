"""Measuring in turns: which rounds count, what is compared with what, and how zeros are counted."""

from dataclasses import replace

import pytest
import torch

from sslim.frontends import ConvFrontendConfig, FilterbankConfig, NormalizationConfig, SpectralFrontendConfig
from sslim.frontends.config import ConvLayerConfig
from sslim.models import ModelConfig, ProjectionConfig, SpeechModel, build_model
from sslim.nn.encoder import EncoderConfig, plain_blocks
from sslim.nn.heads import ClusterHeadConfig
from sslim.profiling import Conditions, count_macs
from sslim.profiling.latency import with_some_statistics
from sslim.profiling.measure import encode_once, macs_at, measure_models, nonzero_parameters, zero_share
from sslim.profiling.turns import times_in_turns, using_threads


def tiny(num_layers: int = 2, **values) -> ModelConfig:
    config = ModelConfig(
        family="test",
        frontend=ConvFrontendConfig(layers=(ConvLayerConfig(channels=4, kernel=400, stride=320),), norm="layer"),
        projection=ProjectionConfig(feature_dim=4),
        encoder=EncoderConfig(dim=16, **plain_blocks(num_layers, 2, 8, 32)),
    )
    return replace(config, **values)


def built(config: ModelConfig) -> SpeechModel:
    return build_model(config, torch.Generator().manual_seed(0))


def test_rounds_keep_their_places_and_warm_ups_do_not_count() -> None:
    now, order = 0.0, []
    durations = {"a": iter([50.0, 50.0, 1.0, 2.0, 30.0]), "b": iter([50.0, 50.0, 10.0, 20.0, 300.0])}

    def call(name: str):
        def run() -> None:
            nonlocal now
            order.append((name, torch.is_inference_mode_enabled()))
            now += next(durations[name]) / 1000

        return run

    calls = {name: call(name) for name in "ab"}
    times = times_in_turns(calls, device="cpu", repeats=3, warm_ups=2, seed=1, clock=lambda: now)
    assert times["a"] == pytest.approx([1.0, 2.0, 30.0])
    assert times["b"] == pytest.approx([10.0, 20.0, 300.0])
    rounds = [tuple(name for name, _ in order[i : i + 2]) for i in range(0, 10, 2)]
    assert set(rounds) == {("a", "b"), ("b", "a")}
    assert all(inference for _, inference in order)


def test_threads_are_put_back_when_a_measurement_fails() -> None:
    before, seen = torch.get_num_threads(), []

    def fail() -> None:
        with using_threads(before + 1):
            seen.append(torch.get_num_threads())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


def test_every_model_is_measured_under_every_condition_beside_the_baseline(monkeypatch) -> None:
    models = {"whole": built(tiny(3)), "small": built(tiny(1))}
    conditions = [Conditions(seconds=1.0), Conditions(seconds=0.5, batch=3)]
    fake = {"whole": [6.0, 8.0], "small": [3.0, 2.0]}
    ran = []

    def in_turns(calls, **options):
        ran.append((options["repeats"], [call().final.shape for call in calls.values()]))
        return fake

    monkeypatch.setattr("sslim.profiling.measure.times_in_turns", in_turns)
    said: list[str] = []
    rows = measure_models(models, "whole", conditions, repeats=2, say=said.append)
    assert [(row.model, row.conditions) for row in rows] == [(m, c) for c in conditions for m in ("whole", "small")]
    assert ran == [(2, [(1, 49, 16)] * 2), (2, [(3, 24, 16)] * 2)]
    whole, small = rows[2:]
    counts = [count_macs(models[name].config, seconds=0.5, batch=3).total for name in models]
    assert [whole.macs, small.macs] == counts
    assert small.predicted_speedup == counts[0] / counts[1]
    assert (whole.predicted_speedup, whole.measured_speedup) == (1.0, 1.0)
    assert small.measured_speedup == 3.0  # 2 and 4
    assert small.real_time_factor == pytest.approx(0.0025 / 1.5)
    assert said[1] == "0.5 s, batch 3, 1 thread: 2 models in turns, 2 rounds after 2 to warm up"


def test_audio_without_a_frame_is_refused_before_anything_is_timed(monkeypatch) -> None:
    monkeypatch.setattr("sslim.profiling.measure.times_in_turns", lambda *args, **options: pytest.fail("it was timed"))
    conditions = [Conditions(seconds=1.0), Conditions(seconds=0.01)]
    with pytest.raises(ValueError, match=r"0\.01 s of audio are shorter than one frame"):
        measure_models({"it": built(tiny())}, "it", conditions)


def test_a_model_over_features_takes_a_frame_for_every_10_ms() -> None:
    config = replace(tiny(), frontend=None)
    assert macs_at(config, 0.5).total == count_macs(config, num_frames=50).total
    output = encode_once(built(config), Conditions(seconds=0.5), torch.Generator().manual_seed(0))()
    assert output.final.shape == (1, 50, 16)
    assert output.layers == ()  # only the last is kept


def test_a_front_end_without_statistics_can_be_timed_and_one_with_them_keeps_its_own() -> None:
    normalization = NormalizationConfig(kind="global", statistics=None)
    frontend = SpectralFrontendConfig(features=FilterbankConfig(num_mel_bins=8), normalization=normalization)
    config = replace(tiny(), frontend=frontend, projection=ProjectionConfig(feature_dim=8))
    bare, conditions = built(config), Conditions(seconds=0.3)
    with pytest.raises(ValueError, match="needs a global mean"):
        encode_once(bare, conditions, torch.Generator())()
    assert encode_once(with_some_statistics(bare), conditions, torch.Generator())().final.isfinite().all()
    own = built(config)
    own.set_statistics(torch.ones(8), torch.full((8,), 2.0), source="own")
    assert with_some_statistics(own).frontend.statistics_source == "own"


@pytest.mark.parametrize("shared", [False, True])
def test_zeros_are_counted_where_they_are_stored(shared: bool) -> None:
    depths = {**plain_blocks(1, 2, 8, 32), "depth_map": (0, 0, 0)} if shared else plain_blocks(2, 2, 8, 32)
    config = replace(tiny(), encoder=EncoderConfig(dim=16, **depths), heads={"it": ClusterHeadConfig(num_clusters=5)})
    model = built(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    whole = model.num_parameters(with_heads=False)
    assert (nonzero_parameters(model), zero_share(model)) == (whole, 0.0)
    with torch.no_grad():
        model.heads["it"].linear.weight.zero_()  # heads do not count
        model.encoder.blocks[0].feedforward.up.bias.zero_()  # 32, in no matrix
        model.encoder.blocks[0].feedforward.up.weight[:8].zero_()  # 8 x 16
    assert nonzero_parameters(model) == whole - 32 - 128
    entries = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and not name.startswith("heads."))
    assert zero_share(model) == pytest.approx(128 / entries)
