"""Layer sharing: which layer each block comes from, means, what cannot be folded, original numbers, settings."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from sslim.compress.heads import HeadPruning, prune_heads, surviving_heads
from sslim.compress.origins import origins
from sslim.compress.sharing import Sharing, share_layers, sharing_config
from sslim.config import from_plain, to_plain
from sslim.models import ModelConfig, SpeechModel, build_model
from sslim.models.elastic import count_parameters
from sslim.models.melhubert import melhubert
from sslim.nn.encoder import LinearRanks
from sslim.nn.relative_positions import RelativePositionsConfig


def described(num_layers: int = 6, **encoder: Any) -> ModelConfig:
    config = melhubert(
        num_layers=num_layers, dim=16, num_heads=4, feedforward_dim=12, conv_kernel_size=4, conv_groups=2, num_clusters=3
    )
    return replace(config, encoder=replace(config.encoder, **encoder))


def made(config: ModelConfig | None = None) -> SpeechModel:
    model = build_model(config or described(), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def tensors(model: SpeechModel, block: int) -> dict[str, torch.Tensor]:
    return dict(model.encoder.blocks[block].state_dict())


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("settings", "depth_map", "layers"),
    [
        (Sharing(num_blocks=2), (0, 1, 0, 1, 0, 1), (0, 1)),
        (Sharing(num_blocks=2, order="sequence"), (0, 0, 0, 1, 1, 1), (0, 3)),
        (Sharing(num_blocks=4), (0, 1, 2, 3, 0, 1), (0, 1, 2, 3)),
        (Sharing(num_blocks=4, order="sequence"), (0, 0, 1, 2, 2, 3), (0, 2, 3, 5)),
        (Sharing(num_blocks=2, start="layers", layers=(2, 6)), (0, 1, 0, 1, 0, 1), (1, 5)),
        (Sharing(num_blocks=1, start="layers", layers=(4,)), (0,) * 6, (3,)),
    ],
)
def test_blocks_are_copies_of_layers(settings: Sharing, depth_map: tuple[int, ...], layers: tuple[int, ...]) -> None:
    model = made()
    small = share_layers(model, settings)
    assert small.config.encoder.depth_map == depth_map
    assert small.config == sharing_config(model.config, settings)
    assert count_parameters(small.config) == small.num_parameters()
    for block, layer in enumerate(layers):
        assert same(tensors(small, block), tensors(model, layer))
        assert not same(tensors(small, block), tensors(model, (layer + 1) % 6))
    assert origins(small).blocks == layers
    rest = {name: tensor for name, tensor in model.state_dict().items() if ".blocks." not in name}
    assert rest.keys() == {name for name in small.state_dict() if ".blocks." not in name}
    assert all(torch.equal(small.state_dict()[name], tensor) for name, tensor in rest.items())


def test_averages_are_means_of_the_layers_that_a_block_replaces() -> None:
    model = made()
    small = share_layers(model, Sharing(num_blocks=2, start="average"))
    for block in range(2):
        for name, tensor in tensors(small, block).items():
            mean = sum(tensors(model, layer)[name].double() for layer in (block, block + 2, block + 4)) / 3
            torch.testing.assert_close(tensor.double(), mean, atol=1e-6, rtol=0)
    assert small.provenance[-1]["block_depths"] == [[0, 2, 4], [1, 3, 5]]
    for name, tensor in tensors(share_layers(model, Sharing(num_blocks=6, start="average")), 3).items():
        assert torch.equal(tensor, tensors(model, 3)[name])  # of one layer it is a copy


def test_a_shared_model_can_be_folded_further() -> None:
    """Depth 4 of (0, 1, 2) * 2 is block 1; a block that stays itself at every depth stays as it is."""
    model = made(described(3, depth_map=(0, 1, 2) * 2))
    small = share_layers(model, Sharing(num_blocks=2, start="layers", layers=(5, 3)))
    assert same(tensors(small, 0), tensors(model, 1))
    assert same(tensors(small, 1), tensors(model, 2))
    assert origins(small).blocks == (1, 2)
    unchanged = share_layers(model, Sharing(num_blocks=3, start="average"))
    assert unchanged.config == model.config
    assert origins(unchanged).blocks == (0, 1, 2)
    for block in range(3):
        for name, tensor in tensors(unchanged, block).items():
            torch.testing.assert_close(tensor, tensors(model, block)[name])


def test_pruned_layers_keep_their_numbers_and_averages_get_new_ones() -> None:
    """Layers of uneven numbers of heads can be copied; averaged heads are nobody's."""
    pruned = prune_heads(made(), HeadPruning(num_kept=13, scope="model"))
    small = share_layers(pruned, Sharing(num_blocks=2, start="layers", layers=(2, 5)))
    assert surviving_heads(small) == (surviving_heads(pruned)[1], surviving_heads(pruned)[4])
    even = prune_heads(made(), HeadPruning(num_kept=2))
    assert surviving_heads(share_layers(even, Sharing(num_blocks=2, start="average"))) == ((0, 1), (0, 1))
    assert surviving_heads(even) != ((0, 1),) * 6


def test_layers_without_a_common_shape_cannot_be_averaged() -> None:
    first, *rest = described().encoder.blocks
    average = Sharing(num_blocks=2, start="average")
    uneven = described(blocks=(first, rest[0], replace(first, num_heads=3), *rest[2:]))
    message = "layers 1 and 3 cannot be averaged, they have 4 heads of width 4 and 12 units and 3 heads"
    for fold in (lambda: share_layers(made(uneven), average), lambda: sharing_config(uneven, average)):
        with pytest.raises(ValueError, match=message):
            fold()
    windowed = described(blocks=(first, *rest[:3], replace(first, attention_window=3), rest[4]))
    with pytest.raises(ValueError, match="layers 1 and 5 cannot be averaged, they have another window"):
        share_layers(made(windowed), average)
    factored = described(blocks=(replace(first, ranks=LinearRanks(up=3)),) * 6)
    with pytest.raises(ValueError, match="layers 1 and 3 cannot be averaged, they have factored maps"):
        share_layers(made(factored), average)
    relative = RelativePositionsConfig(num_buckets=8, max_distance=10, num_heads=4)
    heads = [replace(first, num_heads=2, head_ids=ids) for ids in ((0, 2), (1, 3))]
    other_heads = described(blocks=(heads[0], heads[0], heads[1], *(heads[0],) * 3), relative_positions=relative)
    with pytest.raises(
        ValueError, match="layers 1 and 3 cannot be averaged, they have another window, rank or choice of heads"
    ):
        share_layers(made(other_heads), average)
    assert share_layers(made(uneven), Sharing(num_blocks=3)).config.encoder.blocks[2].num_heads == 3  # copies may differ


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Sharing(num_blocks=7), "num_blocks is 7, but the model has 6 blocks; expected 1 to 6"),
        (Sharing(num_blocks=2, start="layers", layers=(1, 7)), "layers names layer 7, the model has layers 1 to 6"),
        (Sharing(num_blocks=2, start="layers", layers=(0, 1)), "layers names layer 0, the model has layers 1 to 6"),
    ],
)
def test_blocks_that_do_not_exist_are_refused(settings: Sharing, message: str) -> None:
    model = made()
    for fold in (lambda: share_layers(model, settings), lambda: sharing_config(model.config, settings)):
        with pytest.raises(ValueError, match=message):
            fold()


def test_settings_are_plain_values_and_checked() -> None:
    settings = Sharing(num_blocks=2, order="sequence", start="layers", layers=(1, 5))
    assert from_plain(Sharing, to_plain(settings)) == settings
    note = share_layers(made(), settings).provenance[-1]
    assert (note["step"], note["num_blocks"], note["order"]) == ("sharing", 2, "sequence")
    for wrong, message in (
        ({"num_blocks": 0}, "num_blocks is 0; expected at least 1"),
        ({"num_blocks": 2, "start": "layers"}, "layers is None; layers belong to the start 'layers'"),
        ({"num_blocks": 2, "layers": (1, 2)}, "start is 'first' and layers is \\(1, 2\\)"),
        ({"num_blocks": 2, "start": "layers", "layers": (1,)}, "layers names 1 layers for 2 blocks; expected one for each"),
    ):
        with pytest.raises(ValueError, match=message):
            Sharing(**wrong)
