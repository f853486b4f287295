"""Search spaces: LightHuBERT's published sizes, its feed-forward units, what users may write, and what is refused."""

from dataclasses import replace

import pytest
import torch

from sslim.config import from_plain, to_plain
from sslim.models.search_space import (
    LIGHTHUBERT_BASE,
    LIGHTHUBERT_SMALL,
    SearchSpace,
    Subnet,
    feedforward_units,
    units_of,
)
from sslim.nn.encoder import EncoderConfig, plain_blocks
from sslim.nn.positions import ConvPositionsConfig
from sslim.nn.slicing import slice_config

LIGHTHUBERT = EncoderConfig(dim=768, **plain_blocks(12, 12, 64, 3072))
SPACE = SearchSpace(dims=(8, 16), num_heads=(1, 2), feedforward_ratios=(1.5, 2.0), num_layers=(2, 3))
ENCODER = EncoderConfig(dim=16, **plain_blocks(3, 2, 4, 32), positions=ConvPositionsConfig(kernel_size=4, groups=4))
SHARED = replace(ENCODER, blocks=ENCODER.blocks[:2], depth_map=(0, 1, 0))


def draws(space: SearchSpace, count: int) -> list[Subnet]:
    generator = torch.Generator().manual_seed(0)
    return [space.sample(generator) for _ in range(count)]


def test_sizes_of_the_published_spaces() -> None:
    assert LIGHTHUBERT_BASE.num_subnets() == 6_530_347_008
    assert LIGHTHUBERT_SMALL.num_subnets() == 951_892_141_473


def test_layers_kept_at_each_depth() -> None:
    assert LIGHTHUBERT_SMALL.kept_depths(10) == (0, 1, 2, 3, 4, 5, 6, 8, 9, 10)
    assert LIGHTHUBERT_SMALL.kept_depths(6) == (0, 1, 4, 5, 8, 9)
    for space in (LIGHTHUBERT_BASE, LIGHTHUBERT_SMALL):
        space.check(LIGHTHUBERT)
    with pytest.raises(ValueError, match="5 layers are asked for, but the space says which layers to keep for 6, 7"):
        LIGHTHUBERT_BASE.kept_depths(5)


def test_feedforward_units_of_lighthubert() -> None:
    """The example of spec 2.5: width 640, 2240 units are the first 640 of three blocks of 768 and 320 of the fourth."""
    want = (*range(640), *range(768, 1408), *range(1536, 2176), *range(2304, 2624))
    assert feedforward_units("blocks", 768, 3072, 640, 2240) == want
    assert feedforward_units("blocks", 768, 3072, 768, 2688) == tuple(range(2688))
    assert feedforward_units("prefix", 768, 3072, 640, 2240) == tuple(range(2240))
    with pytest.raises(ValueError, match="2561 feed-forward units are asked for, the supernet has 2560 at width 640"):
        feedforward_units("blocks", 768, 3072, 640, 2561)


def test_samples_are_members_and_reach_every_choice() -> None:
    for space in (SPACE, LIGHTHUBERT_SMALL):
        subnets = draws(space, 200)
        assert all(space.contains(subnet) for subnet in subnets)
        assert {subnet.dim for subnet in subnets} == set(space.dims)
        assert {subnet.num_layers for subnet in subnets} == set(space.num_layers)
        assert {heads for subnet in subnets for heads in subnet.num_heads} == set(space.num_heads)
        ratios = {units / subnet.dim for subnet in subnets for units in subnet.feedforward_dims}
        assert ratios == set(space.feedforward_ratios)
    assert draws(SPACE, 5) == draws(SPACE, 5)


def test_counting_agrees_with_the_subnets_there_are() -> None:
    assert len(set(draws(SPACE, 3000))) == SPACE.num_subnets() == 2 * (4**2 + 4**3)
    shared = replace(SPACE, depth_map=SHARED.depth_map)
    assert len(set(draws(shared, 1000))) == shared.num_subnets() == 2 * (4**2 + 4**2)


def test_layers_of_a_shared_block_are_chosen_once() -> None:
    shared = replace(SPACE, depth_map=SHARED.depth_map)
    for subnet in draws(shared, 100):
        units_of(SHARED, shared, subnet)
        assert shared.contains(subnet)
    torn = Subnet(dim=8, num_heads=(1, 1, 2), feedforward_dims=(12, 12, 12))
    assert SPACE.contains(torn)  # the control: layers of their own may differ
    assert not shared.contains(torn)
    with pytest.raises(ValueError, match="layers 1 and 3 of the subnet share a block, so they need the same number of heads"):
        units_of(SHARED, shared, torn)
    with pytest.raises(ValueError, match=r"run the blocks \(0, 1, 0\), so the search space needs the same depth_map"):
        SPACE.check(SHARED)


def test_members() -> None:
    assert SPACE.contains(SPACE.largest())
    assert SPACE.contains(SPACE.smallest())
    assert SPACE.largest() == Subnet(dim=16, num_heads=(2,) * 3, feedforward_dims=(32,) * 3)
    for other in (
        replace(SPACE.largest(), dim=12),
        replace(SPACE.largest(), feedforward_dims=(32, 32, 12)),
        replace(SPACE.largest(), windows=(None, 3, None)),
        Subnet(dim=16, num_heads=(2,), feedforward_dims=(32,)),
    ):
        assert not SPACE.contains(other)


def test_named_subnets() -> None:
    assert LIGHTHUBERT_BASE.subnet("default").dim == 640
    assert LIGHTHUBERT_SMALL.subnet("min") == LIGHTHUBERT_SMALL.smallest()
    with pytest.raises(ValueError, match="has no default subnet"):
        SPACE.subnet("default")
    with pytest.raises(ValueError, match="no subnet 'mx'; did you mean 'max'"):
        SPACE.subnet("mx")


def test_dictionaries_of_both_kinds() -> None:
    ours = {"dim": 8, "num_heads": [1, 2], "feedforward_dims": [12, 16], "windows": [None, 4]}
    theirs = {"embed_dim": 8, "heads_num": [1, 2], "atten_dim": [64, 128], "ffn_embed": [12, 16], "layer_num": 2}
    theirs |= {"slide_wsz": ["global", 8]}
    want = Subnet(dim=8, num_heads=(1, 2), feedforward_dims=(12, 16), windows=(None, 4))
    assert SPACE.subnet(ours) == want
    assert SPACE.subnet(theirs) == replace(want, window_rule="lighthubert")
    ratios = {"embed_dim": 8, "heads_num": [1, 2], "ffn_ratio": [1.5, 2.0], "slide_wsz": ["global", "global"]}
    assert SPACE.subnet(ratios) == replace(want, windows=None)


def test_windows_of_lighthubert_are_told_from_exact_ones() -> None:
    theirs = SPACE.subnet(GOOD)
    assert from_plain(Subnet, to_plain(theirs), "subnet") == SPACE.subnet(to_plain(theirs)) == theirs
    rules = [block.window_rule for block in slice_config(ENCODER, units_of(ENCODER, SPACE, theirs)).blocks]
    assert rules == ["band", "lighthubert"]  # no window, no rule
    exact = replace(theirs, window_rule="band")
    assert all(block.window_rule == "band" for block in slice_config(ENCODER, units_of(ENCODER, SPACE, exact)).blocks)
    old = {"dim": 8, "num_heads": [1, 2], "feedforward_dims": [12, 16], "windows": [None, 4]}  # saved before there was a rule
    assert from_plain(Subnet, old, "subnet") == exact
    with pytest.raises(ValueError, match="window_rule of the subnet is 'lighthubert', but no layer has a window"):
        Subnet(dim=8, num_heads=(1,), feedforward_dims=(8,), windows=(None,), window_rule="lighthubert")


GOOD = {"embed_dim": 8, "heads_num": [1, 2], "ffn_embed": [12, 16], "layer_num": 2, "slide_wsz": ["global", 8]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**GOOD, "layer_num": 3}, "ffn_embed of the subnet has 2 values, expected one for each of 3 layers"),
        ({**GOOD, "slide_wsz": ["global", 7]}, "holds 7; expected 'global' or an even number"),
        ({**GOOD, "slide_wsz": ["global", 0]}, "holds 0; expected 'global' or an even number of frames above 0"),
        ({**GOOD, "heads_nun": [1]}, "no key 'heads_nun'; did you mean 'heads_num'"),
        ({**GOOD, "atten_dim": [64, 64]}, r"atten_dim of the subnet is \[64, 64\]; \[1, 2\] heads of 64 need \[64, 128\]"),
        ({**GOOD, "heads_num": 2}, "heads_num of the subnet is 2; expected a list"),
        ({"embed_dim": 8, "ffn_embed": [8]}, "lacks the key 'heads_num'"),
        ({"dim": 8, "num_heads": [1], "feedforward_dims": [8, 8]}, "num_heads for 1 layers, but feedforward_dims for 2"),
        ({"dim": 8, "num_heads": [1], "feedforward_dims": [8], "depth": 1}, "no key 'depth'"),
        ({"dim": 8, "num_heads": [1.5], "feedforward_dims": [8]}, "expected int"),
    ],
)
def test_wrong_dictionaries_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPACE.subnet(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 20}, "dim 20 of the subnet is more than the supernet's 16"),
        ({"dim": 6}, "dim 6 of the subnet is not divisible by the 4 groups"),
        ({"num_heads": (1, 3, 1)}, "layer 2 of the subnet: 3 heads are asked for, the supernet has 2"),
        ({"feedforward_dims": (8, 8, 40)}, "layer 3 of the subnet: 40 feed-forward units are asked for, the supernet has 32"),
        ({"num_heads": (1,) * 4, "feedforward_dims": (8,) * 4}, "the subnet keeps layer 4, the supernet has 3"),
    ],
)
def test_sizes_outside_the_tensors_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        units_of(ENCODER, SPACE, replace(SPACE.largest(), **change))


def test_a_space_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="the subnet keeps layer 12, the supernet has 3"):
        LIGHTHUBERT_BASE.check(ENCODER)
    with pytest.raises(ValueError, match="dim 512 of the subnet is more than the supernet's 256"):
        LIGHTHUBERT_BASE.check(replace(LIGHTHUBERT, dim=256))
    with pytest.raises(ValueError, match=r"dims of the search space is \(\)"):
        replace(SPACE, dims=())
    with pytest.raises(ValueError, match=r"kept_layers\['2'\] is \(1, 0\)"):
        replace(SPACE, kept_layers={"2": (1, 0), "3": (0, 1, 2)})


def test_json_round_trip() -> None:
    for space in (LIGHTHUBERT_SMALL, SPACE, replace(SPACE, depth_map=(0, 1, 0))):
        assert from_plain(SearchSpace, to_plain(space)) == space
