"""One body over every method of compression and every kind of model.

The result has the parameters of its description and of the prediction; it computes what the original computes with the removed
parts masked; nothing to remove is the identity; it can be saved and loaded. Each with a control.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslim.batch import EncoderOutput, Padded, valid_mask
from sslim.checkpoints import load_model, save_model
from sslim.compress.calibration import Calibration
from sslim.compress.depth import DepthPruning, depth_config, prune_depth
from sslim.compress.gate_cut import cut_gates
from sslim.compress.gates import GateConfig, Gates
from sslim.compress.heads import HeadPruning, heads_config, prune_heads
from sslim.compress.low_rank import MAPS, LowRank, factorize, low_rank_config, maps_of
from sslim.compress.origins import origins
from sslim.compress.rows import RowPruning, prune_rows, rows_config
from sslim.compress.sharing import Sharing, share_layers, sharing_config
from sslim.compress.weights import WeightPruning, prunable_weights, prune_weights
from sslim.models import ModelConfig, SpeechModel, build_model
from sslim.models.elastic import count_parameters, extract_model
from sslim.models.hubert import hubert, narrow_conv_layers
from sslim.models.lighthubert import lighthubert
from sslim.models.melhubert import melhubert
from sslim.models.reconstruction import tera
from sslim.models.search_space import SearchSpace, Subnet
from sslim.nn.encoder import BlockConfig, EncoderConfig, LinearRanks
from sslim.nn.linear import FactoredLinear, whole_matrix
from sslim.nn.relative_positions import RelativePositionsConfig

SMALL: Any = {"dim": 32, "num_heads": 4, "feedforward_dim": 48, "conv_kernel_size": 8, "conv_groups": 4}
CONV = narrow_conv_layers(12)
SPACE = SearchSpace(dims=(16, 32), num_heads=(2, 3, 4), feedforward_ratios=(1.0, 1.5), num_layers=(2, 3))
UNEVEN = Subnet(dim=16, num_heads=(3, 2, 4), feedforward_dims=(24, 16, 24))


def with_encoder(config: ModelConfig, **changes: Any) -> ModelConfig:
    return replace(config, encoder=replace(config.encoder, **changes))


def large_style() -> ModelConfig:
    style: Any = {"conv_norm": "layer", "conv_bias": True, "normalize_waveform": True, "norm_placement": "pre"}
    return hubert(num_layers=3, conv_layers=CONV, **style, **SMALL)


def shared() -> ModelConfig:
    blocks = (
        BlockConfig(num_heads=4, head_dim=8, feedforward_dim=48),
        BlockConfig(num_heads=2, head_dim=8, feedforward_dim=32),
    )
    return with_encoder(melhubert(num_layers=2, **SMALL), blocks=blocks, depth_map=(0, 1, 0, 1, 0))


def low_rank() -> ModelConfig:
    config = melhubert(num_layers=3, **SMALL)
    ranks = (LinearRanks(query=5, value=6, up=7), LinearRanks(key=4, output=9, down=10), LinearRanks())
    blocks = tuple(replace(block, ranks=rank) for block, rank in zip(config.encoder.blocks, ranks, strict=True))
    return with_encoder(config, blocks=blocks)


def relative() -> ModelConfig:
    """Heads 1 and 3 of the middle layer are gone already."""
    config = hubert(num_layers=3, conv_layers=CONV, **SMALL)
    first, _, last = config.encoder.blocks
    blocks = (first, replace(first, num_heads=2, head_ids=(0, 2)), last)
    positions = RelativePositionsConfig(num_buckets=16, max_distance=20, num_heads=4)
    return with_encoder(config, blocks=blocks, relative_positions=positions)


def missing_parts() -> ModelConfig:
    config = hubert(num_layers=4, conv_layers=CONV, **SMALL)
    sizes = ((3, 40), (0, 48), (4, 0), (1, 7))
    blocks = tuple(BlockConfig(num_heads=n, head_dim=8, feedforward_dim=u, keep_norms=True) for n, u in sizes)
    return with_encoder(config, blocks=blocks)


def windows() -> ModelConfig:
    config = hubert(num_layers=3, conv_layers=CONV, **SMALL)
    first, middle, last = config.encoder.blocks
    blocks = (replace(first, attention_window=2), middle, replace(last, attention_window=5))
    return with_encoder(config, blocks=blocks)


KINDS: dict[str, Callable[[], ModelConfig]] = {
    "melhubert": lambda: melhubert(num_layers=3, **SMALL),
    "hubert, base style": lambda: hubert(num_layers=3, conv_layers=CONV, **SMALL),
    "hubert, large style": large_style,
    "shared layers": shared,
    "subnet of a supernet": lambda: lighthubert(SPACE, num_layers=3, teacher_dim=20, conv_layers=CONV, **SMALL),
    "low rank": low_rank,
    "relative positions": relative,
    "missing parts": missing_parts,
    "windows": windows,
    "tera, pre-norm": lambda: tera(feature_dim=20, num_layers=3, dim=32, num_heads=4, feedforward_dim=48, norm_placement="pre"),
}


@cache
def model_of(kind: str) -> SpeechModel:
    """Random everywhere, norms and biases included."""
    model = build_model(KINDS[kind](), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.2 if parameter.dim() == 1 else 0.1) * torch.randn(parameter.shape, generator=generator))
    if model.config.frontend is not None and model.config.frontend.kind == "spectral":
        model.set_statistics(torch.zeros(40), torch.ones(40), source="test")
    return model if model.config.search_space is None else extract_model(model, UNEVEN)


def speech_of(model: SpeechModel, seed: int = 3) -> Padded:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 21, model.config.projection.feature_dim, generator=generator)
    return Padded(values=values, lengths=torch.tensor([21, 14, 6]))


@cache
def calibration_of(kind: str) -> Calibration:
    """Two batches; the loss is the squared distance to random targets."""
    model = model_of(kind)
    batches = tuple(speech_of(model, seed) for seed in (5, 6))
    generator = torch.Generator().manual_seed(7)
    shape = (*batches[0].values.shape[:2], model.config.encoder.dim)
    targets = [torch.randn(shape, generator=generator) for _ in batches]

    def loss_on(batch: Padded, target: Tensor) -> Callable[[SpeechModel], Tensor]:
        def loss(model: SpeechModel) -> Tensor:
            valid_BT = valid_mask(batch.lengths, target.shape[1])
            return (model.encode_features(batch.values, batch.lengths).final - target)[valid_BT].square().mean() / len(batches)

        return loss

    return Calibration(
        features=batches, losses=tuple(loss_on(batch, target) for batch, target in zip(batches, targets, strict=True))
    )


def silence(module: nn.Module, channels: list[int]) -> None:
    """Zeroes channels of what enters a module."""
    module.register_forward_pre_hook(
        lambda _, inputs: (inputs[0].index_fill(-1, torch.tensor(channels, dtype=torch.long), 0.0),)
    )


def other_part(gone: list[int], count: int) -> list[int]:
    """As many parts as are gone, one of them another."""
    left = [part for part in range(count) if part not in gone]
    return [*gone[1:], left[0]] if gone and left else gone


def gone_parts(before: tuple[tuple[int, ...], ...], after: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    """For each block the positions of the parts whose original numbers are missing afterwards."""
    return [[i for i, part in enumerate(old) if part not in new] for old, new in zip(before, after, strict=True)]


def without_heads(model: SpeechModel, small: SpeechModel, *, other: bool) -> None:
    gone = gone_parts(origins(model).heads, origins(small).heads)
    for block, described, heads in zip(model.encoder.blocks, model.config.encoder.blocks, gone, strict=True):
        heads = other_part(heads, described.num_heads) if other else heads
        if block.attention is not None:
            width = described.head_dim
            silence(block.attention.output, [head * width + i for head in heads for i in range(width)])


def without_units(model: SpeechModel, small: SpeechModel, *, other: bool) -> None:
    gone = gone_parts(origins(model).units, origins(small).units)
    for block, described, units in zip(model.encoder.blocks, model.config.encoder.blocks, gone, strict=True):
        units = other_part(units, described.feedforward_dim) if other else units
        if block.feedforward is not None:
            silence(block.feedforward.down, units)


def without_layers(model: SpeechModel, small: SpeechModel, *, other: bool) -> None:
    gone = small.provenance[-1]["removed_depths"]
    gone = other_part(gone, model.num_layers) if other else gone
    applications = iter(range(10**6))

    def skip(_: nn.Module, inputs: tuple, output: tuple) -> tuple | None:
        return (inputs[0], None) if next(applications) % model.num_layers in gone else output

    for block in model.encoder.blocks:
        block.register_forward_hook(skip)


def with_tied_layers(model: SpeechModel, small: SpeechModel, *, other: bool) -> None:
    """One block runs at every depth: that of the first layer (of the second one, for the control)."""
    depth_map = model.config.encoder.depth_map
    source = model.config.encoder.blocks[depth_map[int(other)]], model.encoder.blocks[depth_map[int(other)]]
    model.encoder.config = replace(model.encoder.config, blocks=(source[0],) * len(model.encoder.blocks))
    model.encoder.blocks = nn.ModuleList([source[1]] * len(model.encoder.blocks))


def with_projected_maps(model: SpeechModel, small: SpeechModel, *, other: bool) -> None:
    """What a factored map gives loses its part outside the columns of the outer factor, and one direction more as a control."""

    def projection(outer: Tensor, mean: Tensor) -> Callable[..., Tensor]:
        basis = torch.linalg.qr(outer.double())[0][:, int(other) :]
        return lambda _, inputs, output: (mean + (output.double() - mean) @ basis @ basis.T).float()

    for part in maps_of(small.config.encoder):
        path = f"encoder.blocks.{part.block}.{MAPS[part.name]}"
        ours, theirs = model.get_submodule(path), small.get_submodule(path)
        if isinstance(theirs, FactoredLinear) and not torch.equal(whole_matrix(ours)[0], whole_matrix(theirs)[0]):
            ours.register_forward_hook(projection(theirs.outer.weight.detach(), whole_matrix(theirs)[1]))


def without_weights(model: SpeechModel, small: SpeechModel, *, other: bool) -> None:
    """The weights that are gone are zero (their neighbours, for the control)."""
    left = small.state_dict()
    with torch.no_grad():
        for name, tensor in prunable_weights(model, biases=False).items():
            tensor.masked_fill_((left[name] == 0).roll(int(other), -1), 0.0)


def gates_of(config: ModelConfig, seed: int = 3) -> Gates:
    """Gates of all degrees for heads and units, in eval mode."""
    gates = Gates(config, GateConfig(channels=None), torch.Generator().manual_seed(seed)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for log_alpha in gates.parameters():
            log_alpha.copy_(3 * torch.randn(log_alpha.shape, generator=generator) - 1)
    return gates


def open_gates_of(config: ModelConfig) -> Gates:
    gates = gates_of(config)
    with torch.no_grad():
        for log_alpha in gates.parameters():
            log_alpha.fill_(60.0)
    return gates


def with_gates(model: SpeechModel, small: SpeechModel, *, other: bool) -> None:
    gates_of(model.config, seed=4 if other else 3).attach(model)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method under test.

    Attributes:
        apply: Model and calibration to a smaller model.
        nothing: The same, told to remove nothing.
        mask: Changes a copy of the original so that it computes what the small model does; with ``other`` something else.
        predict: Description to that of the small model, as far as sizes go; None where training decides.
        unpredictable: Kinds of models whose size after the method depends on data.
        keeps_sizes: Whether only values change.
    """

    apply: Callable[[SpeechModel, Calibration], SpeechModel]
    nothing: Callable[[SpeechModel, Calibration], SpeechModel]
    mask: Callable[..., None]
    predict: Callable[[ModelConfig], ModelConfig] | None
    unpredictable: tuple[str, ...] = ()
    keeps_sizes: bool = False


def head_method(unpredictable: tuple[str, ...] = (), **settings: Any) -> Method:
    half, whole = HeadPruning(keep=0.5, **settings), HeadPruning(keep=1.0, **settings)
    return Method(
        apply=lambda model, calibration: prune_heads(model, half, calibration),
        nothing=lambda model, calibration: prune_heads(model, whole, calibration),
        mask=without_heads,
        predict=lambda config: heads_config(config, half),
        unpredictable=unpredictable,
    )


def row_method(unpredictable: tuple[str, ...] = (), **settings: Any) -> Method:
    some, whole = RowPruning(keep=0.4, **settings), RowPruning(keep=1.0, **settings)
    return Method(
        apply=lambda model, calibration: prune_rows(model, some, calibration),
        nothing=lambda model, calibration: prune_rows(model, whole, calibration),
        mask=without_units,
        predict=lambda config: rows_config(config, some),
        unpredictable=unpredictable,
    )


def depth_method(**settings: Any) -> Method:
    half = DepthPruning(keep=0.5, **settings)
    return Method(
        apply=lambda model, calibration: prune_depth(model, half, calibration),
        nothing=lambda model, calibration: prune_depth(model, DepthPruning(keep=1.0, **settings), calibration),
        mask=without_layers,
        predict=lambda config: depth_config(config, half),
        unpredictable=("subnet of a supernet", "shared layers", "low rank", "relative positions", "missing parts"),
    )


def low_rank_method(*, whiten: bool) -> Method:
    settings = LowRank(ratio=0.3, whiten=whiten)
    return Method(
        apply=lambda model, calibration: factorize(model, settings, calibration),
        nothing=lambda model, calibration: factorize(model, LowRank(ratio=1.0, whiten=whiten), calibration),
        mask=with_projected_maps,
        predict=lambda config: low_rank_config(config, settings),
    )


METHODS_UNDER_TEST: dict[str, Method] = {
    "heads, l1, layer": head_method(),
    "heads, l1 with output, model": head_method(("low rank",), scope="model", score="l1-output"),
    "heads, data, layer": head_method(score="data"),
    "heads, data, model": head_method(("low rank",), scope="model", score="data"),
    "rows, l1, uniform": row_method(),
    "rows, data, uniform, eights": row_method(score="data", multiple=8),
    "rows, data, model": row_method(("low rank",), scope="model", score="data"),
    "rows, l1, model, eights": row_method(("low rank", "missing parts"), scope="model", multiple=8),
    "depth, greedy": depth_method(),
    "depth, run": depth_method(choose="run"),
    "sharing": Method(
        apply=lambda model, _: share_layers(model, Sharing(num_blocks=1)),
        nothing=lambda model, _: share_layers(model, Sharing(num_blocks=len(model.encoder.blocks))),
        mask=with_tied_layers,
        predict=lambda config: sharing_config(config, Sharing(num_blocks=1)),
    ),
    "low-rank, plain": low_rank_method(whiten=False),
    "low-rank, whitened": low_rank_method(whiten=True),
    "weights": Method(
        apply=lambda model, _: prune_weights(model, WeightPruning(sparsity=0.6)),
        nothing=lambda model, _: prune_weights(model, WeightPruning(sparsity=0.0)),
        mask=without_weights,
        predict=lambda config: config,
        keeps_sizes=True,
    ),
    "gates": Method(
        apply=lambda model, _: cut_gates(model, gates_of(model.config)),
        nothing=lambda model, _: cut_gates(model, open_gates_of(model.config)),
        mask=with_gates,
        predict=None,
    ),
}
everywhere = pytest.mark.parametrize("method", METHODS_UNDER_TEST)
of_every_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def small_of(kind: str, method: str) -> SpeechModel:
    return METHODS_UNDER_TEST[method].apply(model_of(kind), calibration_of(kind))


def masked(kind: str, method: str, *, other: bool = False) -> SpeechModel:
    model = copy.deepcopy(model_of(kind))
    METHODS_UNDER_TEST[method].mask(model, small_of(kind, method), other=other)
    return model


def run(model: SpeechModel) -> EncoderOutput:
    speech = speech_of(model)
    with torch.no_grad():
        return model.encode_features(speech.values, speech.lengths)


@of_every_kind
@everywhere
def test_parameters_are_those_of_the_description_and_of_the_prediction(kind: str, method: str) -> None:
    whole, small = model_of(kind), small_of(kind, method)
    assert small.num_parameters() == count_parameters(small.config)
    same_size = METHODS_UNDER_TEST[method].keeps_sizes or (method.startswith("depth") and kind == "shared layers")
    assert same_size or small.num_parameters() < whole.num_parameters()
    predict = METHODS_UNDER_TEST[method].predict
    if predict is None:
        return
    if kind in METHODS_UNDER_TEST[method].unpredictable:
        with pytest.raises(ValueError, match="depends on"):
            predict(whole.config)
    else:
        assert count_parameters(predict(whole.config)) == small.num_parameters()


@of_every_kind
@everywhere
def test_output_is_that_of_the_masked_original(kind: str, method: str) -> None:
    small = run(small_of(kind, method))
    expected, control = run(masked(kind, method)), run(masked(kind, method, other=True))
    torch.testing.assert_close(small.final, expected.final, atol=1e-6, rtol=1e-6)
    if len(small.layers) == len(expected.layers):
        for ours, theirs in zip(small.layers, expected.layers, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert (small.final - control.final).abs().max() > 1e-3


@of_every_kind
@everywhere
def test_nothing_to_remove_is_the_identity(kind: str, method: str) -> None:
    whole = model_of(kind)
    same = METHODS_UNDER_TEST[method].nothing(whole, calibration_of(kind))
    assert same.config == whole.config
    assert same.state_dict().keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor), name
        assert not same.state_dict()[name].is_set_to(tensor), name
    small = small_of(kind, method)  # the control
    if METHODS_UNDER_TEST[method].keeps_sizes:
        assert any(not torch.equal(tensor, small.state_dict()[name]) for name, tensor in whole.state_dict().items())
    else:
        assert small.config != whole.config


@of_every_kind
@everywhere
def test_it_can_be_saved_and_loaded(kind: str, method: str, tmp_path: Path) -> None:
    small = small_of(kind, method)
    save_model(small, tmp_path / "small")
    loaded = load_model(tmp_path / "small")
    assert loaded.config == small.config
    assert loaded.provenance == small.provenance
    assert torch.equal(run(loaded).final, run(small).final)
    assert origins(loaded) == origins(small)


@of_every_kind
@everywhere
def test_the_model_stays_as_it_is(kind: str, method: str) -> None:
    """Its tensors, gradients, mode and notes; and a second call, on a model in training mode, gives the same result."""
    model = copy.deepcopy(model_of(kind)).train()
    notes = copy.deepcopy(model.provenance)
    small = METHODS_UNDER_TEST[method].apply(model, calibration_of(kind))
    assert model.training
    assert not small.training
    assert model.provenance == notes == small.provenance[:-1]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, tensor in model_of(kind).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    for name, tensor in small_of(kind, method).state_dict().items():
        assert torch.equal(small.state_dict()[name], tensor), name


def test_the_encoders_under_test_are_what_they_say() -> None:
    """The control of the table: every kind has what it is there for."""
    encoders: dict[str, EncoderConfig] = {kind: model_of(kind).config.encoder for kind in KINDS}
    assert encoders["hubert, large style"].norm_placement == "pre"
    assert encoders["shared layers"].num_layers > len(encoders["shared layers"].blocks)
    assert {block.num_heads for block in encoders["subnet of a supernet"].blocks} == {2, 3, 4}
    assert encoders["relative positions"].relative_positions is not None
    assert {0} < {block.num_heads for block in encoders["missing parts"].blocks}
