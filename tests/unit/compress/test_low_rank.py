"""Low-rank factorisation: against other ways of finding the same matrices, ranks by every rule, covariances frame by frame."""

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from sslim.batch import Padded
from sslim.compress.calibration import Calibration
from sslim.compress.low_rank import MAPS, LowRank, Spectrum, decompose, factorize, low_rank_config, maps_of
from sslim.compress.moments import Moments, Watched, gather_moments
from sslim.config import from_plain, to_plain
from sslim.models import ModelConfig, SpeechModel, build_model
from sslim.models.elastic import count_parameters
from sslim.models.hubert import hubert, narrow_conv_layers
from sslim.models.lighthubert import lighthubert
from sslim.models.melhubert import melhubert
from sslim.models.search_space import SearchSpace
from sslim.nn.encoder import BlockConfig, LinearRanks
from sslim.nn.linear import FactoredLinear, whole_matrix
from sslim.nn.relative_positions import RelativePositionsConfig

SMALL: Any = {"dim": 24, "num_heads": 4, "feedforward_dim": 40, "conv_kernel_size": 4, "conv_groups": 2}
SHAPES = ((24, 40), (40, 24), (24, 24), (6, 24), (24, 6))


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain() -> ModelConfig:
    return melhubert(num_layers=3, num_clusters=5, **SMALL)


def shared() -> ModelConfig:
    """Uneven widths, one block that runs three times, factors of ranks that are and are not worth it, missing parts."""
    blocks = (
        BlockConfig(num_heads=3, head_dim=6, feedforward_dim=31, ranks=LinearRanks(query=4, up=11, down=23)),
        BlockConfig(num_heads=0, head_dim=6, feedforward_dim=2),
        BlockConfig(num_heads=1, head_dim=6, feedforward_dim=0),
    )
    config = plain()
    return replace(config, encoder=replace(config.encoder, blocks=blocks, depth_map=(0, 1, 0, 2, 0)))


def pre_norm() -> ModelConfig:
    config = hubert(num_layers=2, conv_layers=narrow_conv_layers(80), norm_placement="pre", **SMALL)
    positions = RelativePositionsConfig(num_buckets=16, max_distance=20, num_heads=4)
    first, second = config.encoder.blocks
    blocks = (replace(first, num_heads=2, head_ids=(1, 3), attention_window=3), second)
    return replace(config, encoder=replace(config.encoder, relative_positions=positions, blocks=blocks))


KINDS = {"plain": plain, "shared, uneven": shared, "pre-norm, relative": pre_norm}
of_every_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def model_of(kind: str) -> SpeechModel:
    model = build_model(KINDS[kind](), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.dim() == 1 else 0.15) * torch.randn(parameter.shape, generator=generator))
    return model


def speech(seed: int, lengths: tuple[int, ...] = (33, 20, 7)) -> Padded:
    """Few sources behind many features, with a mean; what lies in the padding is wild."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(5, 80, generator=torch.Generator().manual_seed(99))
    values = torch.randn(len(lengths), max(lengths), 5, generator=generator) @ mixing
    values += 1.0 + 0.1 * torch.randn(values.shape, generator=generator)
    for row, length in zip(values, lengths, strict=True):
        row[length:] = 1e3
    return Padded(values=values, lengths=torch.tensor(lengths))


CALIBRATION = Calibration(features=(speech(1), speech(2, (40, 3))))


def final(model: SpeechModel, batch: Padded) -> Tensor:
    with torch.no_grad():
        return model.encode_features(batch.values, batch.lengths).final


def error(small: SpeechModel, whole: SpeechModel, batch: Padded) -> float:
    return float((final(small, batch) - final(whole, batch)).norm() / final(whole, batch).norm())


def product(tensors: dict[str, Tensor]) -> Tensor:
    return tensors["outer.weight"] @ tensors["inner.weight"]


def moments_of(x_RI: Tensor, weight: Tensor, bias: Tensor) -> Moments:
    """Of the narrower side, as they are gathered."""
    of_input = weight.shape[1] <= weight.shape[0]
    seen = x_RI if of_input else x_RI @ weight.T + bias
    return Moments(watched=Watched(path="", of_input=of_input), mean=seen.mean(0), covariance=torch.cov(seen.T, correction=0))


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_factors_are_the_truncated_svd(shape: tuple[int, int]) -> None:
    weight, bias = double(*shape), double(shape[0], seed=1)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    spectrum = decompose(weight, bias)
    torch.testing.assert_close(spectrum.energies, values.square())
    for rank in (1, 3, min(shape)):
        tensors = spectrum.tensors(rank)
        torch.testing.assert_close(product(tensors), left[:, :rank] * values[:rank] @ right[:rank])
        assert torch.equal(tensors["outer.bias"], bias)
        inner, outer = tensors["inner.weight"], tensors["outer.weight"]
        torch.testing.assert_close(inner @ inner.T, outer.T @ outer)  # an even share of the scale
    torch.testing.assert_close(product(spectrum.tensors(min(shape))), weight)
    assert (product(spectrum.tensors(min(shape) - 1)) - weight).abs().max() > 1e-2  # the control
    assert torch.equal(spectrum.tensors(None)["weight"], weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_whitened_factors_are_those_of_the_whitened_svd(shape: tuple[int, int]) -> None:
    """Against the other way to the optimum: SVD of W L for the Cholesky factor L of the covariance, then the inverse of L."""
    weight, bias = double(*shape), double(shape[0], seed=1)
    x = double(400, shape[1], seed=2) @ (double(shape[1], shape[1], seed=3) * torch.logspace(0, -2, shape[1]).double()) + 2.0
    root = torch.linalg.cholesky(torch.cov(x.T, correction=0))
    left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
    spectrum = decompose(weight, bias, moments_of(x, weight, bias))
    torch.testing.assert_close(spectrum.energies, values.square(), rtol=0, atol=2e-6 * float(values.square().sum()))
    for rank in (1, 3, 5):
        tensors = spectrum.tensors(rank)
        expected = left[:, :rank] * values[:rank] @ right[:rank] @ torch.linalg.inv(root)
        torch.testing.assert_close(product(tensors) @ root, expected @ root, rtol=0, atol=1e-4 * float(values[0]))
        given = x @ product(tensors).T + tensors["outer.bias"]
        off = (given - (x @ weight.T + bias)).square().sum(1).mean()
        torch.testing.assert_close(off, values[rank:].square().sum(), rtol=1e-3, atol=1e-4)
        plain_off = (x @ product(decompose(weight, bias).tensors(rank)).T - x @ weight.T).square().sum(1).mean()
        assert off < 0.5 * plain_off


def test_white_speech_gives_the_plain_factors() -> None:
    """The control of the test above: without correlation or mean there is nothing to gain."""
    weight, bias = double(40, 24), double(40, seed=1)
    white = Moments(
        watched=Watched(path="", of_input=True),
        mean=torch.zeros(24, dtype=torch.float64),
        covariance=torch.eye(24, dtype=torch.float64),
    )
    ours, theirs = decompose(weight, bias, white).tensors(5), decompose(weight, bias).tensors(5)
    torch.testing.assert_close(product(ours), product(theirs))
    torch.testing.assert_close(ours["outer.bias"], bias)


@pytest.mark.parametrize("shape", SHAPES)
def test_few_frames_are_enough(shape: tuple[int, int]) -> None:
    """Four frames span three directions around their mean: at rank 3 all four come out right; nothing is inverted."""
    weight, bias, x = double(*shape), double(shape[0], seed=1), double(4, shape[1], seed=2)
    spectrum = decompose(weight, bias, moments_of(x, weight, bias))
    three, two = (spectrum.tensors(rank) for rank in (3, 2))
    wanted = x @ weight.T + bias
    assert (x @ product(three).T + three["outer.bias"] - wanted).norm() < 1e-2 * wanted.norm()
    assert (x @ product(two).T + two["outer.bias"] - wanted).norm() > 5e-2 * wanted.norm()
    # directions that speech never took follow in the order of what the weights have left
    left, values, right = torch.linalg.svd(weight - product(three), full_matrices=False)
    expected = product(three) + left[:, :2] * values[:2] @ right[:2]
    torch.testing.assert_close(product(spectrum.tensors(5)), expected, rtol=0, atol=1e-2 * float(values[0]))
    still = decompose(weight, bias, moments_of(x[:1].expand(4, -1), weight, bias)).tensors(5)
    assert (product(still) - product(decompose(weight, bias).tensors(5))).abs().max() < 1e-6
    assert (product(still) - expected).norm() > 0.1


def test_nothing_at_all_can_be_taken_apart() -> None:
    spectrum = decompose(torch.zeros(6, 4), torch.zeros(6))
    assert spectrum.left(1) == 1.0
    assert bool((product(spectrum.tensors(1)) == 0).all())


@of_every_kind
def test_moments_are_those_of_every_valid_frame(kind: str) -> None:
    """What query and up maps are given in a post-norm model are its layers, at every depth at which a block runs."""
    model = model_of(kind)
    first = model.config.encoder.depth_map[0]
    path = f"encoder.blocks.{first}.attention.query"
    side = Watched(path=path, of_input=True)
    seen = gather_moments(model, {side}, CALIBRATION)[side]
    frames = []
    for batch in CALIBRATION.features:
        for row, length in zip(batch.values, batch.lengths.tolist(), strict=True):
            with torch.no_grad():
                layers = model.encode_features(row[None, :length]).layers
                block = model.encoder.blocks[first]
                given = [layers[depth] for depth, index in enumerate(model.config.encoder.depth_map) if index == first]
                frames += [(block.attention_norm(x) if block.pre_norm else x)[0].double() for x in given]
    x = torch.cat(frames)
    torch.testing.assert_close(seen.mean, x.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen.covariance, torch.cov(x.T, correction=0), atol=1e-5, rtol=1e-4)
    assert (seen.covariance - torch.cov(frames[0].T, correction=0)).abs().max() > 1e-3  # the control: one utterance alone
    output = Watched(path=path, of_input=False)
    weight, bias = whole_matrix(model.get_submodule(path))
    given = gather_moments(model, {output}, CALIBRATION)[output]
    torch.testing.assert_close(given.mean, weight @ x.mean(0) + bias, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(given.covariance, weight @ torch.cov(x.T, correction=0) @ weight.T, atol=1e-5, rtol=1e-4)


def with_spectrum(squares: list[float], name: str = "up") -> SpeechModel:
    """The singular values of one map are planted."""
    model = build_model(plain(), torch.Generator().manual_seed(0))
    weight = model.get_submodule(f"encoder.blocks.1.{MAPS[name]}").weight
    left, right = (torch.linalg.qr(double(size, size, seed=size))[0] for size in weight.shape)
    values = torch.tensor(squares, dtype=torch.float64).sqrt()
    with torch.no_grad():
        weight.copy_(left[:, : len(values)] * values @ right[: len(values)])
    return model


@pytest.mark.parametrize(
    ("energy", "rank"),
    [(0.4, 1), (0.499, 1), (0.501, 2), (0.749, 2), (0.751, 3), (0.874, 3), (0.876, 4), (0.938, 5), (0.999, 5)],
)
def test_energy_keeps_the_smallest_rank_that_is_enough(energy: float, rank: int) -> None:
    """Squared singular values 8 4 2 1 1: shares 0.5, 0.75, 0.875, 0.9375, 1."""
    small = factorize(with_spectrum([8, 4, 2, 1, 1]), LowRank(energy=energy, maps=("up",)))
    assert small.config.encoder.blocks[1].ranks.up == rank
    assert small.provenance[-1]["ranks"][1] == {"up": rank}
    left = [0.5, 0.75, 0.875, 0.9375, 1.0][rank - 1]
    assert small.provenance[-1]["energy_left"][1]["up"] == pytest.approx(left, abs=1e-5)


def test_a_map_of_low_rank_is_factored_without_loss() -> None:
    model = with_spectrum([8, 4, 2, 1, 1])
    small = factorize(model, LowRank(energy=1 - 1e-7, maps=("up",)))
    assert [block.ranks.up for block in small.config.encoder.blocks] == [None, 5, None]
    assert small.num_parameters() < model.num_parameters()
    assert error(small, model, speech(3)) < 1e-5
    assert error(factorize(model, LowRank(energy=0.9, maps=("up",))), model, speech(3)) > 1e-4  # the control


@of_every_kind
def test_parameters_never_grow_and_ratios_are_predicted(kind: str) -> None:
    model = model_of(kind)
    sizes = []
    for ratio in (0.01, 0.1, 0.25, 0.4, 0.6, 1.0):
        small = factorize(model, LowRank(ratio=ratio))
        assert small.config == low_rank_config(model.config, LowRank(ratio=ratio))
        assert small.num_parameters() == count_parameters(small.config) <= model.num_parameters()
        for before, after in zip(maps_of(model.config.encoder), maps_of(small.config.encoder), strict=True):
            assert after.size(after.rank) <= min(before.size(before.rank), before.size(None))
            if after.rank is not None:
                assert after.size(after.rank) < before.size(None)
        sizes.append(small.num_parameters())
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1]


@of_every_kind
@pytest.mark.parametrize("settings", [LowRank(ratio=1.0), LowRank(energy=1.0), LowRank(params=1.0, whiten=True)])
def test_the_whole_strength_changes_no_output(kind: str, settings: LowRank) -> None:
    model = model_of(kind)
    same = factorize(model, settings, CALIBRATION)
    assert error(same, model, speech(3)) < 1e-5
    if kind != "shared, uneven":
        assert same.config == model.config
        assert all(torch.equal(same.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    else:  # factors of rank 23 that hold more than 31 times 24 numbers are multiplied out; those of rank 4 and 11 stay
        assert same.config.encoder.blocks[0].ranks == LinearRanks(query=4, up=11)
        before, after = model.encoder.blocks[0].attention.query, same.encoder.blocks[0].attention.query
        assert torch.equal(after.inner.weight, before.inner.weight)


@of_every_kind
@pytest.mark.parametrize("whiten", [False, True])
def test_the_model_computes_with_the_product_of_the_factors(kind: str, whiten: bool) -> None:
    """Every factored map is replaced by hand in a copy of the original; the outputs agree."""
    model = model_of(kind)
    small = factorize(model, LowRank(ratio=0.2, whiten=whiten), CALIBRATION)
    by_hand = build_model(replace(small.config, encoder=replace(small.config.encoder, blocks=_whole(model))))
    by_hand.load_state_dict({name: t for name, t in model.state_dict().items() if name in by_hand.state_dict()}, strict=False)
    with torch.no_grad():
        for part in maps_of(small.config.encoder):
            path = f"encoder.blocks.{part.block}.{MAPS[part.name]}"
            weight, bias = whole_matrix(small.get_submodule(path))
            by_hand.get_submodule(path).weight.copy_(weight)
            by_hand.get_submodule(path).bias.copy_(bias)
            original, _ = whole_matrix(model.get_submodule(path))
            if not whiten and part.rank is not None:
                left, values, right = torch.linalg.svd(original, full_matrices=False)
                truncated = left[:, : part.rank] * values[: part.rank] @ right[: part.rank]
                torch.testing.assert_close(weight, truncated, atol=1e-6, rtol=1e-5)
    assert error(small, by_hand, speech(3)) < 1e-5
    assert error(small, model, speech(3)) > 1e-2  # the control
    for part in maps_of(small.config.encoder):
        module = small.get_submodule(f"encoder.blocks.{part.block}.{MAPS[part.name]}")
        assert isinstance(module, FactoredLinear) is (part.rank is not None)


def _whole(model: SpeechModel) -> tuple[BlockConfig, ...]:
    return tuple(replace(block, ranks=LinearRanks()) for block in model.config.encoder.blocks)


@of_every_kind
def test_looking_at_speech_helps_on_other_speech(kind: str) -> None:
    model, other = model_of(kind), speech(7, (40, 40))
    aware = factorize(model, LowRank(ratio=0.2, whiten=True), CALIBRATION)
    blind = factorize(model, LowRank(ratio=0.2))
    assert aware.config == blind.config
    assert error(aware, model, other) < 0.8 * error(blind, model, other)


@of_every_kind
@pytest.mark.parametrize("whiten", [False, True])
def test_a_budget_is_met_within_a_rank(kind: str, whiten: bool) -> None:
    model = model_of(kind)
    whole = model.num_parameters(with_heads=False)
    least = factorize(model, LowRank(ratio=0.001)).num_parameters(with_heads=False) / whole  # rank 1
    for share in (0.8 + 0.2 * least, 0.5 + 0.5 * least, 0.1 + 0.9 * least):
        small = factorize(model, LowRank(params=share, whiten=whiten), CALIBRATION)
        spare = share * whole - small.num_parameters(with_heads=False)
        cut = [
            after
            for before, after in zip(maps_of(model.config.encoder), maps_of(small.config.encoder), strict=True)
            if after.rank is not None and after.rank != before.rank
        ]
        assert 0 <= spare < max(part.in_dim + part.out_dim for part in cut)
        assert len({part.rank for part in cut}) > 1
    assert small.config.heads == model.config.heads


def test_ranks_by_budget_lose_less_than_the_same_ratio_everywhere() -> None:
    """One layer has two strong directions, the others none: there ranks are saved."""
    model = with_spectrum([100, 90, *[1e-3] * 20])
    uniform = factorize(model, LowRank(ratio=0.3))
    share = (uniform.num_parameters(with_heads=False) + 1) / model.num_parameters(with_heads=False)
    chosen = factorize(model, LowRank(params=share))
    assert chosen.config.encoder.blocks[1].ranks.up == 2
    lost = [sum(1 - v for block in net.provenance[-1]["energy_left"] for v in block.values()) for net in (chosen, uniform)]
    assert lost[0] < lost[1]
    assert chosen.num_parameters() <= uniform.num_parameters()


def test_factored_maps_are_factored_anew() -> None:
    """The second round decomposes the product of the first: both ways lead to the same truncated SVD."""
    model = model_of("plain")
    twice = factorize(factorize(model, LowRank(ratio=0.4)), LowRank(ratio=0.2))
    once = factorize(model, LowRank(ratio=0.2))
    assert twice.config == once.config
    assert error(twice, once, speech(3)) < 1e-4
    assert [note["step"] for note in twice.provenance] == ["low-rank", "low-rank"]
    assert factorize(twice, LowRank(ratio=0.4)).config == twice.config  # larger ranks give nothing back


def test_only_the_named_maps_are_factored() -> None:
    small = factorize(model_of("plain"), LowRank(ratio=0.2, maps=("down", "value")))
    assert all(block.ranks == LinearRanks(down=5, value=5) for block in small.config.encoder.blocks)


def test_the_model_stays_as_it_is() -> None:
    model = build_model(plain(), torch.Generator().manual_seed(0)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = factorize(model, LowRank(ratio=0.2, whiten=True), CALIBRATION)
    assert model.training
    assert not small.training
    assert model.provenance == []
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert json.loads(json.dumps(small.provenance)) == small.provenance
    final(small.train(), speech(1))
    small.encode_features(speech(1).values).final.square().sum().backward()  # it can be trained
    assert small.encoder.blocks[0].attention.query.inner.weight.grad.abs().sum() > 0


def test_a_supernet_becomes_an_ordinary_model() -> None:
    space = SearchSpace(dims=(12, 24), num_heads=(2, 4), feedforward_ratios=(1.0, 1.5), num_layers=(2,))
    supernet = build_model(lighthubert(space, num_layers=2, teacher_dim=20, conv_layers=narrow_conv_layers(12), **SMALL))
    small = factorize(supernet, LowRank(ratio=0.2))
    assert small.config.search_space is None
    assert small.config == low_rank_config(supernet.config, LowRank(ratio=0.2))


def test_bad_input_is_one_sentence() -> None:
    for settings, message in (
        ({}, "none of ratio, energy and params is given; expected one"),
        ({"ratio": 0.5, "params": 0.5}, "ratio and params of ratio, energy and params is given"),
        ({"ratio": 0.0}, "ratio is 0.0; expected a share above 0"),
        ({"energy": 1.5}, "energy is 1.5; expected a share above 0 and up to 1"),
        ({"ratio": 0.5, "maps": ("quary",)}, "there is no map 'quary'; did you mean 'query'"),
        ({"ratio": 0.5, "maps": ()}, "maps is empty; expected some of query, key"),
    ):
        with pytest.raises(ValueError, match=message):
            LowRank(**settings)
    settings = LowRank(energy=0.9, whiten=True, maps=("up", "down"))
    assert from_plain(LowRank, json.loads(json.dumps(to_plain(settings)))) == settings
    model = build_model(plain(), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="whitened factors need calibration speech"):
        factorize(model, LowRank(ratio=0.5, whiten=True))
    with pytest.raises(ValueError, match="depend on singular values"):
        low_rank_config(model.config, LowRank(energy=0.5))
    with pytest.raises(ValueError, match=r"params is 0.01, but rank 1 everywhere leaves [\d,]+ of [\d,]+ parameters") as caught:
        factorize(model, LowRank(params=0.01))
    factorize(model, LowRank(params=float(str(caught.value).rpartition(" ")[2])))  # what it names is enough
    empty = Calibration(features=(Padded(values=torch.zeros(1, 4, 80), lengths=torch.tensor([0])),))
    with pytest.raises(ValueError, match="no frames"):
        factorize(model, LowRank(ratio=0.5, whiten=True), empty)
    broken = Calibration(features=(Padded(values=torch.full((1, 4, 80), float("nan")), lengths=torch.tensor([4])),))
    with pytest.raises(ValueError, match="is not finite: the model or the speech is broken"):
        factorize(model, LowRank(ratio=0.5, whiten=True), broken)
    with torch.no_grad():
        model.encoder.blocks[2].attention.value.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"encoder\.blocks\.2\.attention\.value is not finite"):
        factorize(model, LowRank(ratio=0.2))


def test_an_unused_direction_is_no_energy() -> None:
    spectrum = Spectrum(
        weight=torch.zeros(2, 2),
        bias=torch.zeros(2),
        directions=torch.eye(2),
        energies=torch.tensor([3.0, 1.0]),
        shift=torch.zeros(2),
    )
    assert (spectrum.left(1), spectrum.left(2)) == (0.75, 1.0)
