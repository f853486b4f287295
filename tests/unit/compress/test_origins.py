"""Original numbers of parts through rounds of cuts, from the model's own notes and from those of an import."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sslim.compress.origins import Origins, cut, numbers, origins, spans
from sslim.models import SpeechModel, build_model
from sslim.models.elastic import extract_model
from sslim.models.melhubert import melhubert
from sslim.models.search_space import Subnet
from sslim.nn.encoder import BlockConfig
from sslim.nn.slicing import Units


def made(depth_map: tuple[int, ...] = (0, 1, 2)) -> SpeechModel:
    config = melhubert(num_layers=3, dim=16, num_heads=4, feedforward_dim=6, conv_kernel_size=4, conv_groups=2, num_clusters=3)
    return build_model(replace(config, encoder=replace(config.encoder, depth_map=depth_map)), torch.Generator().manual_seed(0))


def full(model: SpeechModel) -> Units:
    return Units.full(model.config.encoder)


@given(st.lists(st.integers(0, 40)))
def test_spans_are_read_back(members: list[int]) -> None:
    assert numbers(spans(members)) == tuple(members)


def test_spans_are_short() -> None:
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert spans([]) == ""
    assert spans([3, 2, 1]) == "3,2,1"


def test_a_model_without_notes_is_its_own_origin() -> None:
    found = origins(made())
    assert found == Origins(blocks=(0, 1, 2), heads=(tuple(range(4)),) * 3, units=(tuple(range(6)),) * 3)


def test_numbers_stay_through_rounds() -> None:
    """Three rounds: heads and units, a layer, heads again; the tensors are those of the parts that the numbers name."""
    model = made()
    units = replace(full(model), heads=((1, 3), (0, 1, 2), (2, 3)), feedforward=((0, 5), (1, 2, 3), (4,)))
    once = cut(model, units, {"step": "test"})
    twice = cut(once, replace(full(once), depths=(1, 2)), {"step": "test"})
    thrice = cut(twice, replace(full(twice), heads=((0, 2), (1,)), feedforward=((0, 2), (0,))), {"step": "test"})
    assert origins(once) == Origins(blocks=(0, 1, 2), heads=units.heads, units=units.feedforward)
    assert origins(thrice) == Origins(blocks=(1, 2), heads=((0, 2), (3,)), units=((1, 3), (4,)))
    assert [entry["step"] for entry in thrice.provenance] == ["test"] * 3
    assert thrice.provenance[-1]["kept_units"] == ["1,3", "4"]
    for block, original in enumerate(origins(thrice).blocks):
        heads, feedforward = origins(thrice).heads[block], origins(thrice).units[block]
        whole, small = model.encoder.blocks[original], thrice.encoder.blocks[block]
        rows = [head * 4 + i for head in heads for i in range(4)]
        assert torch.equal(small.attention.key.weight, whole.attention.key.weight[rows])
        assert torch.equal(small.attention.output.weight, whole.attention.output.weight[:, rows])
        assert torch.equal(small.feedforward.up.weight, whole.feedforward.up.weight[list(feedforward)])


def test_steps_that_cut_nothing_do_not_break_the_chain() -> None:
    model = cut(made(), replace(full(made()), heads=((3,), (2,), (1,))), {"step": "test"})
    model.provenance.append({"step": "distil", "steps": 10})
    assert origins(model).heads == ((3,), (2,), (1,))


def test_a_shared_block_has_one_origin() -> None:
    model = made((0, 2, 0, 2))
    assert origins(model).blocks == (0, 1, 2)
    small = cut(model, replace(full(model), depths=(1, 3)), {"step": "test"})
    assert small.config.encoder.depth_map == (0, 0)
    assert origins(small).blocks == (2,)


def test_notes_that_do_not_fit_begin_anew() -> None:
    """A subnet taken from a pruned model is its own origin: nobody noted what was left of it."""
    model = cut(made(), replace(full(made()), heads=((1, 3), (1, 2), (2, 3))), {"step": "test"})
    small = extract_model(model, Subnet(dim=16, num_heads=(1, 2), feedforward_dims=(6, 6)))
    assert origins(small).heads == ((0,), (0, 1))
    small.provenance.append({"step": "sharing", "kept_heads": None})
    assert origins(small).heads == ((0,), (0, 1))


def test_kept_heads_of_an_import_are_read() -> None:
    model = made()
    blocks = tuple(BlockConfig(num_heads=2, head_dim=4, feedforward_dim=6) for _ in range(3))
    pruned = build_model(replace(model.config, encoder=replace(model.config.encoder, blocks=blocks)))
    pruned.provenance = [{"action": "import", "kept_heads": [[0, 3], [1, 2], [2, 3]]}]
    assert origins(pruned).heads == ((0, 3), (1, 2), (2, 3))
    again = cut(pruned, replace(full(pruned), heads=((1,), (0,), (0, 1))), {"step": "test"})
    assert origins(again).heads == ((3,), (1,), (2, 3))
    pruned.provenance[0]["kept_heads"] = [[0], [1], [2]]  # the control: a list that does not fit is not believed
    assert origins(pruned).heads == ((0, 1),) * 3


def test_units_that_do_not_exist_are_refused() -> None:
    model = made()
    with pytest.raises(ValueError, match="heads of block 0"):
        cut(model, replace(full(model), heads=((9,), (0,), (0,))), {"step": "test"})
