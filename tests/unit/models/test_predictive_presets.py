"""APC, VQ-APC and NPC have the reference's sizes; what works on any encoder works on theirs, the rest says that it does not."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import sslim
from sslim.analysis.attention import attention_batches
from sslim.analysis.similarity import measure_similarity
from sslim.batch import Batch
from sslim.compress.methods import METHODS
from sslim.compress.quantize import Quantization, quantize
from sslim.config import ConfigError, from_plain, to_plain
from sslim.models import PRESETS, ModelConfig, build_model
from sslim.models.elastic import count_parameters
from sslim.models.encoding import Inputs
from sslim.models.melhubert import melhubert
from sslim.models.predictive import apc, npc, predictive_frontend
from sslim.models.search_space import SearchSpace
from sslim.nn.quantizer import QuantizerConfig
from sslim.objectives import Distillation, DistillationConfig, TargetConfig, heads_for
from sslim.profiling.macs import count_macs
from sslim.profiling.torch_counter import check_macs

CODES = QuantizerConfig(num_codes=(6, 9), code_dims=(8, 16))
SMALL = {
    "apc": lambda: apc(dims=(24, 24), prenet_dims=(24,)),
    "vq-apc": lambda: apc(dims=(24, 24), codes=CODES),
    "npc": lambda: npc(dim=24, codes=CODES),
}


def built(name: str, **changes: Any):
    return build_model(replace(SMALL[name](), **changes), torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("preset", "count"), [("apc", 4_105_296), ("vq-apc", 4_630_096), ("npc", 19_380_560)])
def test_published_sizes(preset: str, count: int) -> None:
    config = PRESETS[preset]()
    assert count_parameters(config) == build_model(config).num_parameters() == count
    assert config.frontend == predictive_frontend()


def test_the_small_one_is_as_large_as_the_small_ones_of_other_families() -> None:
    sizes = [count_parameters(PRESETS[name](), with_heads=False) for name in ("apc-mini", "melhubert-mini")]
    assert abs(sizes[0] / sizes[1] - 1) < 0.02


@pytest.mark.parametrize("name", SMALL)
def test_descriptions_survive_json_and_transformers_do_not_write_their_kind(name: str) -> None:
    config = SMALL[name]()
    values = json.loads(json.dumps(to_plain(config)))
    assert from_plain(ModelConfig, values) == config
    assert values["encoder"]["kind"] in ("recurrent", "convolutional")
    assert "kind" not in to_plain(melhubert())["encoder"]
    values["encoder"]["kind"] = "recurent"
    with pytest.raises(ConfigError, match="did you mean 'recurrent'"):
        from_plain(ModelConfig, values)


@pytest.mark.parametrize("name", SMALL)
def test_multiply_accumulates_are_those_that_torch_counts(name: str) -> None:
    parts = check_macs(SMALL[name](), seconds=0.5, batch=2)
    assert sum(parts.values()) > 0
    whole = count_macs(SMALL[name](), seconds=0.5)
    assert sum(whole.groups().values()) == whole.total


def test_published_multiply_accumulates() -> None:
    """Three gates of 512 units, and 20 taps of NPC's 60 that are not hidden."""
    recurrent = count_macs(PRESETS["apc"](), num_frames=1).groups()
    assert recurrent == {"recurrent layers": 3 * 512 * (80 + 512 + 4 * 512)}
    convolutions = count_macs(PRESETS["npc"](), num_frames=1).groups()
    assert convolutions["convolutions"] == 512 * (3 * 80 + 3 * 3 * 512 + 4 * 512 + 20 * 512)
    assert convolutions["quantiser"] == 4 * 64 * 128


def test_int8_changes_the_linear_maps_that_there_are() -> None:
    model, waveform_BS = built("npc"), 0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(1))
    small = quantize(model, Quantization(kind="int8-dynamic"))
    whole, rounded = model.encode(waveform_BS).layers[-1], small.encode(waveform_BS).layers[-1]
    assert 0 < (whole - rounded).norm() / whole.norm() < 0.05
    with pytest.raises(
        ValueError, match="recurrent encoder of this vq-apc model has no linear maps, so int8-dynamic would change"
    ):
        quantize(built("vq-apc"), Quantization(kind="int8-dynamic"))
    assert quantize(built("vq-apc"), Quantization(kind="fp16")).config.storage == "fp16"


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("storage", ["fp16", "bf16"])
def test_half_precision_files_hold_them(name: str, storage: str, tmp_path) -> None:
    small = quantize(built(name), Quantization(kind=storage))  # type: ignore[arg-type]
    sslim.save_model(small, tmp_path / "model")
    waveform_BS = torch.ones(1, 4000).cumsum(1).sin()
    assert torch.equal(sslim.load_model(tmp_path / "model").encode(waveform_BS).final, small.encode(waveform_BS).final)


NEEDS_A_TRANSFORMER = r"^this (vq-)?apc model has a recurrent encoder, and this needs a Transformer's attention heads"


METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "weights": {"sparsity": 0.5},
    "heads": {"keep": 0.5},
    "rows": {"keep": 0.5},
    "width": {"keep": 0.5},
    "depth": {"keep": 0.5},
    "sharing": {"num_blocks": 1},
    "low-rank": {"params": 0.5},
}


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_methods_that_cut_blocks_need_a_transformer(method: str) -> None:
    assert set(METHODS) == {*METHOD_SETTINGS, "quantize"}
    entry = METHODS[method]
    with pytest.raises(ValueError, match=NEEDS_A_TRANSFORMER):
        entry.apply(built("apc"), entry.settings(**METHOD_SETTINGS[method]), None)


def test_attention_supernets_and_weights_need_a_transformer() -> None:
    model = built("apc")
    inputs = Inputs(lengths=np.array([4000]), unit_s=1 / 16000, read=lambda i: torch.zeros(4000), is_waveform=True)
    with pytest.raises(ValueError, match=NEEDS_A_TRANSFORMER):
        next(iter(attention_batches(model, inputs)))
    with pytest.raises(ValueError, match=NEEDS_A_TRANSFORMER):
        model.encode(torch.zeros(1, 4000), need_weights=True)
    space = SearchSpace(dims=(24,), num_heads=(1,), feedforward_ratios=(1.0,), num_layers=(1,))
    with pytest.raises(ValueError, match="a supernet needs a Transformer, this apc model has a recurrent encoder"):
        replace(model.config, search_space=space)


def test_layers_of_other_widths_are_compared_as_they_are() -> None:
    model, waveform_BS = built("vq-apc"), torch.randn(1, 8000, generator=torch.Generator().manual_seed(1))
    inputs = Inputs(lengths=np.array([8000]), unit_s=1 / 16000, read=lambda i: waveform_BS[0], is_waveform=True)
    similarity = measure_similarity([model], [inputs])
    assert [round(similarity.cka[i][i], 4) for i in range(3)] == [1.0] * 3
    other = measure_similarity([model, built("npc")], [inputs, inputs])
    assert len(other.cka) == 3
    assert len(other.cka[0]) == 10
    assert other.cka[0][0] == pytest.approx(1.0, abs=1e-4)  # the features are the same


@pytest.mark.parametrize(("student", "teacher"), [("apc", "npc"), ("npc", "vq-apc")])
def test_distillation_from_and_to_them(student: str, teacher: str) -> None:
    config = DistillationConfig(target=TargetConfig(layers=(1, 2)))
    small = built(student, heads=heads_for(config, 24, 80, 24))
    objective = Distillation(small, built(teacher), config).train()
    samples = torch.randn(2, 6000, generator=torch.Generator().manual_seed(0))
    waveforms = Batch(inputs=samples, lengths=torch.tensor([6000, 4000]), ids=("a", "b"))
    prepared = objective.prepare(waveforms, torch.Generator().manual_seed(0))
    loss = objective(prepared, prepared.weights).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in small.encoder.parameters() if parameter.requires_grad)
    layered = DistillationConfig(target=TargetConfig(layers=(0, 2)))
    with pytest.raises(ValueError, match="teacher layer 0 is 80 wide and the last one 24"):
        Distillation(small, built(teacher), layered)


def test_front_ends_and_widths_must_agree() -> None:
    with pytest.raises(ValueError, match="feature_dim is 40; the front-end gives 80"):
        apc(frontend=predictive_frontend(), feature_dim=40)
    with pytest.raises(ValueError, match="the 80 features must equal the encoder's input_dim 40"):
        replace(SMALL["npc"](), encoder=replace(SMALL["npc"]().encoder, input_dim=40))
