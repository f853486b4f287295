"""Quantisation of models: what changes and what does not, how far outputs move, what cannot be done afterwards."""

import json
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from sslim.batch import Padded
from sslim.checkpoints.exporters.melhubert import melhubert_contents
from sslim.compress.calibration import Calibration
from sslim.compress.depth import DepthPruning, prune_depth
from sslim.compress.heads import HeadPruning, prune_heads
from sslim.compress.low_rank import LowRank, factorize
from sslim.compress.quantize import Quantization, quantize, quantize_config
from sslim.compress.rows import RowPruning, prune_rows
from sslim.compress.sharing import Sharing, share_layers
from sslim.compress.weights import WeightPruning, prune_weights
from sslim.config import from_plain, to_plain
from sslim.models import ModelConfig, SpeechModel, build_model, with_head
from sslim.models.elastic import count_parameters
from sslim.models.hubert import hubert, narrow_conv_layers
from sslim.models.lighthubert import lighthubert
from sslim.models.melhubert import melhubert
from sslim.models.search_space import SearchSpace
from sslim.models.storage import HALF, INT8, Storage, loaded_state, require_float, stored_state
from sslim.nn.encoder import BlockConfig, LinearRanks
from sslim.nn.heads import ClusterHeadConfig
from sslim.nn.quantized import Int8Linear
from sslim.nn.relative_positions import RelativePositionsConfig
from sslim.profiling import count_macs

SMALL: Any = {"dim": 32, "num_heads": 4, "feedforward_dim": 48, "conv_kernel_size": 8, "conv_groups": 4}
KINDS: tuple[Storage, ...] = get_args(Storage)
SPEECH = Padded(values=torch.randn(3, 40, 80, generator=torch.Generator().manual_seed(2)), lengths=torch.tensor([40, 23, 9]))
ERROR = {
    "int8-dynamic": 0.05,
    "int8-weights": 0.03,
    "bf16": 0.03,
    "fp16": 0.004,
}  # share of the output; 0.4 to 0.7 of it is seen


def uneven() -> ModelConfig:
    """Shared blocks of odd sizes, factored maps, a missing part."""
    config = melhubert(num_layers=1, num_clusters=5, **SMALL)
    blocks = (
        BlockConfig(num_heads=3, head_dim=8, feedforward_dim=41, ranks=LinearRanks(query=3, up=7)),
        BlockConfig(num_heads=0, head_dim=8, feedforward_dim=48),
    )
    return replace(config, encoder=replace(config.encoder, blocks=blocks, depth_map=(0, 1, 0)))


def relative() -> ModelConfig:
    config = hubert(num_layers=2, conv_layers=narrow_conv_layers(80), norm_placement="pre", **SMALL)
    positions = RelativePositionsConfig(num_buckets=16, max_distance=20, num_heads=4)
    return replace(config, encoder=replace(config.encoder, relative_positions=positions))


MODELS = {
    "melhubert": lambda: melhubert(num_layers=3, num_clusters=5, **SMALL),
    "uneven": uneven,
    "relative, convolutions": relative,
}


def made(name: str = "melhubert") -> SpeechModel:
    model = build_model(MODELS[name](), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.2 if parameter.dim() == 1 else 0.1) * torch.randn(parameter.shape, generator=generator))
    return model


def final(model: SpeechModel) -> Tensor:
    with torch.no_grad():
        return model.encode_features(SPEECH.values, SPEECH.lengths).final


def distance(model: SpeechModel, other: SpeechModel) -> float:
    return float((final(model) - final(other)).norm() / final(other).norm())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_move_little_and_counts_not_at_all(kind: Storage, name: str) -> None:
    model = made(name)
    small = quantize(model, Quantization(kind=kind))
    assert 1e-5 < distance(small, model) < ERROR[kind]
    assert small.num_parameters() == model.num_parameters() == count_parameters(small.config)
    assert small.num_parameters(with_heads=False) == model.num_parameters(with_heads=False)
    assert count_macs(small.config, num_frames=50) == count_macs(model.config, num_frames=50)
    assert small.config == quantize_config(model.config, Quantization(kind=kind)) != model.config
    assert small.provenance == [*model.provenance, {"step": "quantize", "kind": kind}]
    assert json.loads(json.dumps(small.provenance)) == small.provenance
    assert not small.training


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_stays_as_it_is(kind: Storage) -> None:
    model, fresh = made().train(), made()
    small = quantize(model, Quantization(kind=kind))
    assert model.training
    assert model.config.storage is None
    assert model.provenance == []
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert torch.equal(final(model.eval()), final(fresh))


@pytest.mark.parametrize("kind", INT8)
def test_int8_changes_the_maps_of_the_encoder_alone(kind: Storage) -> None:
    model = made("relative, convolutions")
    small = quantize(model, Quantization(kind=kind))
    changed = {name for name, tensor in small.state_dict().items() if tensor.dtype == torch.int8}
    maps = {
        f"{name}.weight"
        for name, module in model.encoder.named_modules(prefix="encoder")
        if isinstance(module, nn.Linear) and ".gate." not in name
    }
    assert changed == maps != set()
    before = model.state_dict()
    for name, tensor in small.state_dict().items():
        if name in before and name not in changed:
            assert torch.equal(tensor, before[name]), name
    added = small.state_dict().keys() - before.keys()
    assert added == {name.replace(".weight", ".scale") for name in changed}


def test_weights_alone_are_closer_than_activations_too() -> None:
    model = made()
    weights, dynamic = (distance(quantize(model, Quantization(kind=kind)), model) for kind in ("int8-weights", "int8-dynamic"))
    assert weights < dynamic


@pytest.mark.parametrize("kind", HALF)
def test_half_precision_is_rounded_weights_in_float32(kind: Storage) -> None:
    model = made("relative, convolutions")
    small = quantize(model, Quantization(kind=kind))
    for (name, parameter), original in zip(small.named_parameters(), model.parameters(), strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, original.to(HALF[kind]).float()), name
    stored = stored_state(small)
    assert all(stored[name].dtype == HALF[kind] for name, _ in small.named_parameters())
    back = loaded_state(stored, kind)
    assert all(torch.equal(back[name], tensor) for name, tensor in small.state_dict().items())


def test_statistics_of_features_are_not_rounded() -> None:
    model = made()
    model.set_statistics(torch.linspace(-1, 1, 40) / 3, torch.linspace(1, 2, 40) / 3, source="mine")
    small = quantize(model, Quantization(kind="bf16"))
    assert torch.equal(stored_state(small)["frontend.mean"], model.frontend.mean)
    assert stored_state(small)["frontend.mean"].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_can_be_done_to_a_quantised_model(kind: Storage) -> None:
    small = quantize(made(), Quantization(kind=kind))
    speech = Calibration(features=(SPEECH,))
    for cut in (
        lambda: prune_heads(small, HeadPruning(keep=0.5)),
        lambda: prune_rows(small, RowPruning(keep=0.5)),
        lambda: prune_depth(small, DepthPruning(keep=0.5), speech),
        lambda: prune_weights(small, WeightPruning(sparsity=0.5)),
        lambda: share_layers(small, Sharing(num_blocks=1)),
        lambda: factorize(small, LowRank(ratio=0.25)),
        lambda: quantize(small, Quantization(kind="int8-weights")),
    ):
        with pytest.raises(ValueError, match=f"stored as {kind}, and this needs a float32 model: quantise last"):
            cut()
    with pytest.raises(ValueError, match="layout cannot express this model") if kind in INT8 else nullcontext():
        melhubert_contents(small)
    require_float(made())
    if kind in HALF:
        require_float(small, allow_half=True)
    else:
        with pytest.raises(ValueError, match="quantise last"):
            require_float(small, allow_half=True)
        with pytest.raises(ValueError, match="quantise last"):
            small.initialize()


@pytest.mark.parametrize("kind", INT8)
def test_training_int8_is_an_error_and_running_it_with_gradients_is_not(kind: Storage) -> None:
    small = quantize(made(), Quantization(kind=kind))
    with_gradients = small.encode_features(SPEECH.values, SPEECH.lengths).final.detach()
    assert (with_gradients - final(small)).norm() < 1e-3 * final(small).norm()
    with pytest.raises(ValueError, match="train the float model and quantise it last"):
        small.train().encode_features(SPEECH.values, SPEECH.lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_descriptions_build_quantised_models(kind: Storage) -> None:
    config = quantize_config(MODELS["melhubert"](), Quantization(kind=kind))
    drawn = build_model(config, torch.Generator().manual_seed(4))
    plain = build_model(MODELS["melhubert"](), torch.Generator().manual_seed(4))
    assert torch.equal(final(drawn), final(quantize(plain, Quantization(kind=kind))))
    grown = with_head(drawn, "more", ClusterHeadConfig(num_clusters=4), torch.Generator().manual_seed(1))
    assert grown.config.storage == kind
    assert torch.equal(final(grown), final(drawn))
    assert isinstance(grown.encoder.blocks[0].attention.query, Int8Linear) is (kind in INT8)


@pytest.mark.parametrize("kind", INT8)
def test_utterances_do_not_depend_on_their_batch(kind: Storage) -> None:
    small = quantize(made(), Quantization(kind=kind))
    together = final(small)
    for row, length in enumerate(SPEECH.lengths.tolist()):
        with torch.no_grad():
            alone = small.encode_features(SPEECH.values[row : row + 1, :length]).final[0]
        # a last bit of a float32 norm may round a number to the next integer: a few steps of 1 / 127
        assert (together[row, :length] - alone).abs().max() < 0.02
        assert (together[row, :length] - alone).norm() < 2e-3 * alone.norm()


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(
        ValueError, match=r"kind is 'int8'; did you mean 'int8-\w+'\?; expected one of int8-dynamic, int8-weights"
    ):
        Quantization(kind="int8")  # type: ignore[arg-type]
    assert from_plain(Quantization, to_plain(Quantization(kind="fp16"))) == Quantization(kind="fp16")
    model = made()
    with torch.no_grad():
        model.encoder.blocks[1].feedforward.up.weight[3, 4] = 7e4
    with pytest.raises(ValueError, match=r"encoder\.blocks\.1\.feedforward\.up\.weight reaches 7e\+04, which fp16 cannot hold"):
        quantize(model, Quantization(kind="fp16"))
    quantize(model, Quantization(kind="bf16"))
    with torch.no_grad():
        model.encoder.blocks[1].feedforward.up.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"up\.weight is not finite"):
        quantize(model, Quantization())
    space = SearchSpace(dims=(16, 32), num_heads=(2, 4), feedforward_ratios=(1.0, 1.5), num_layers=(2,))
    supernet = build_model(lighthubert(space, num_layers=2, teacher_dim=20, conv_layers=narrow_conv_layers(12), **SMALL))
    with pytest.raises(ValueError, match="a supernet cannot be stored as int8-dynamic: extract a subnet"):
        quantize(supernet, Quantization())
    with pytest.raises(ValueError, match=r"storage"):
        from_plain(ModelConfig, {**to_plain(model.config), "storage": "int4"})


def test_descriptions_of_float_models_do_not_mention_storage() -> None:
    """Files and digests of models from before there was a choice stay what they were."""
    config = MODELS["melhubert"]()
    assert "storage" not in to_plain(config)
    quantized = replace(config, storage="bf16")
    assert to_plain(quantized)["storage"] == "bf16"
    assert from_plain(ModelConfig, to_plain(quantized)) == quantized
    assert from_plain(ModelConfig, to_plain(config)) == config
