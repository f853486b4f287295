"""The slicing rule: full units are the model, elastic equals extracted, pruned equals zeroed; each with a control."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sslim.nn.encoder import BlockConfig, Encoder, EncoderConfig, LinearRanks, plain_blocks
from sslim.nn.positions import ConvPositionsConfig
from sslim.nn.slicing import (
    AXES,
    Units,
    encoder_view,
    extract_subnet,
    fold_positions,
    run_subnet,
    slice_config,
    slice_tensor,
)

CONFIG = EncoderConfig(
    dim=16,
    blocks=(
        BlockConfig(num_heads=4, head_dim=4, feedforward_dim=12),
        BlockConfig(num_heads=2, head_dim=8, feedforward_dim=20, ranks=LinearRanks(value=5, up=6)),
    ),
    depth_map=(0, 1, 1, 0),
    positions=ConvPositionsConfig(kernel_size=5, groups=2),
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
)


def build(config: EncoderConfig = CONFIG) -> Encoder:
    encoder = Encoder(config)
    encoder.initialize(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return encoder.eval()


def x_of(width: int) -> torch.Tensor:
    return torch.randn(2, 9, width, generator=torch.Generator().manual_seed(3))


@st.composite
def units(draw: st.DrawFn) -> Units:
    def subset(size: int, least: int = 0) -> tuple[int, ...]:
        return tuple(draw(st.permutations(range(size)))[: draw(st.integers(least, size))])

    channels = subset(CONFIG.dim, 2)
    channels = channels[: len(channels) // 2 * 2]  # the groups of the positions must divide the width
    return Units(
        channels=channels,
        heads=tuple(subset(block.num_heads) for block in CONFIG.blocks),
        feedforward=tuple(subset(block.feedforward_dim) for block in CONFIG.blocks),
        depths=tuple(sorted(subset(CONFIG.num_layers))),
    )


def test_full_units_are_the_model() -> None:
    encoder = build()
    whole = extract_subnet(encoder, Units.full(CONFIG))
    assert whole.config == CONFIG
    assert whole.state_dict().keys() == encoder.state_dict().keys()
    assert torch.equal(whole(x_of(16)).final, encoder(x_of(16)).final)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(units())
def test_elastic_equals_extracted(kept: Units) -> None:
    encoder, x = build(), x_of(len(kept.channels))
    lengths = torch.tensor([9, 5])
    extracted = extract_subnet(encoder, kept)
    elastic = run_subnet(encoder, kept, x, lengths, keep_layers=True)
    alone = extracted(x, lengths, keep_layers=True)
    assert extracted.config == slice_config(
        encoder.config if len(kept.channels) == 16 else fold_positions(CONFIG, encoder.state_dict())[0], kept
    )
    for ours, theirs in zip(elastic.layers, alone.layers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert sum(p.numel() for p in extracted.parameters()) == sum(p.numel() for p in Encoder(extracted.config).parameters())


def test_another_subnet_gives_another_output() -> None:
    """The control of the property above: the comparison can fail."""
    encoder, x = build(), x_of(16)
    a = replace(Units.full(CONFIG), heads=((0, 1), (0,)))
    b = replace(Units.full(CONFIG), heads=((0, 2), (0,)))
    assert (run_subnet(encoder, a, x).final - extract_subnet(encoder, b)(x).final).abs().max() > 1e-4


def test_pruned_heads_and_units_equal_zeroed_ones() -> None:
    encoder, x = build(), x_of(16)
    kept = replace(Units.full(CONFIG), heads=((1, 3), (0,)), feedforward=((0, 5, 7), tuple(range(0, 20, 2))))
    pruned = extract_subnet(encoder, kept)
    with torch.no_grad():
        for b, block in enumerate(encoder.blocks):
            gone_heads = set(range(CONFIG.blocks[b].num_heads)) - set(kept.heads[b])
            gone_units = set(range(CONFIG.blocks[b].feedforward_dim)) - set(kept.feedforward[b])
            width = CONFIG.blocks[b].head_dim
            for head in gone_heads:
                block.attention.output.weight[:, head * width : (head + 1) * width] = 0
            block.feedforward.down.weight[:, sorted(gone_units)] = 0
    torch.testing.assert_close(pruned(x).final, encoder(x).final, atol=1e-6, rtol=0)
    with torch.no_grad():
        encoder.blocks[0].feedforward.down.weight[:, 5] = 0  # the control: a unit that was kept
    assert (pruned(x).final - encoder(x).final).abs().max() > 1e-5


def test_gradients_reach_the_kept_part_of_the_supernet_only() -> None:
    encoder = build()
    kept = Units.prefix(CONFIG, dim=8, num_heads=(2, 1), feedforward_dims=(6, 10), num_layers=2)
    run_subnet(encoder, kept, x_of(8)).final.square().sum().backward()
    query, up = encoder.blocks[0].attention.query.weight.grad, encoder.blocks[0].feedforward.up.weight.grad
    assert query[:8, :8].abs().max() > 0
    assert query[8:].abs().max() == 0 == query[:, 8:].abs().max()
    assert up[6:].abs().max() == 0


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New memory holds NaN instead of what was there."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(1, 30), st.booleans())
def test_runs_and_prefixes_are_cut_and_their_gradients_put_back(
    poisoned_memory: None, prefix: int, width: int, gap: int, tail: int, count: int, transpose: bool
) -> None:
    """Against plain indexing: LightHuBERT's blocks of units on one axis, the first channels on the other."""
    period, runs = width + gap, -(-count // width)
    rows = [i // width * period + i % width for i in range(count)]
    shape, axes = (runs * period - gap + tail, 12), ("units", "channels")
    if transpose:
        shape, axes = shape[::-1], axes[::-1]
    generator = torch.Generator().manual_seed(count)
    whole = torch.randn(shape, generator=generator, requires_grad=True)
    cut = slice_tensor(whole, axes, {"units": rows, "channels": range(prefix)})
    indices = (torch.arange(prefix), torch.tensor(rows)) if transpose else (torch.tensor(rows), torch.arange(prefix))
    want = whole[indices[0][:, None], indices[1]]
    assert torch.equal(cut, want)
    weights = torch.randn(cut.shape, generator=generator)
    gradients = [torch.autograd.grad((part * weights).sum(), whole)[0] for part in (cut, want)]
    assert torch.equal(*gradients)


def test_gradients_of_a_cut_kernel_pass_through_the_norm_of_the_whole() -> None:
    positions = (encoder := build()).positions
    cut = encoder_view(encoder, Units.prefix(CONFIG, dim=8)).positions.weight
    want = positions.kernel()[:8, :4]
    assert torch.equal(cut, want)
    weights = torch.randn(cut.shape, generator=torch.Generator().manual_seed(4))
    parameters = (positions.gain, positions.direction)
    ours, whole = (torch.autograd.grad((kernel * weights).sum(), parameters) for kernel in (cut, want))
    for a, b in zip(ours, whole, strict=True):
        torch.testing.assert_close(a, b)
    assert ours[1][8:].abs().max() > 0  # the norm's share, beyond what is cut


def test_weight_norm_is_folded_before_slicing() -> None:
    """LightHuBERT's rule: the kernel of the subnet is a corner of the whole plain kernel, not a norm of its own."""
    encoder = build()
    kernel = encoder.positions.kernel()
    small = extract_subnet(encoder, Units.prefix(CONFIG, dim=8))
    assert torch.equal(small.positions.weight, kernel[:8, :4])
    direction = encoder.positions.direction[:8, :4]
    renormalised = direction * (encoder.positions.gain / direction.norm(dim=(0, 1), keepdim=True))
    assert (small.positions.weight - renormalised).abs().max() > 1e-3  # the control


def test_every_parameter_has_a_rule() -> None:
    for name in fold_positions(CONFIG, build().state_dict())[1]:
        assert name.split(".", 2)[2] in AXES if name.startswith("blocks.") else name in AXES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": (0, 99)}, "channels"),
        ({"heads": ((0, 0), (1,))}, "heads of block 0"),
        ({"feedforward": ((0,), (77,))}, "feed-forward units of block 1"),
        ({"heads": ((0,),)}, "1 blocks"),
    ],
)
def test_units_that_do_not_exist_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract_subnet(build(), replace(Units.full(CONFIG), **change))


def test_plain_blocks_makes_an_ordinary_encoder() -> None:
    config = EncoderConfig(dim=16, **plain_blocks(3, 2, 8, 32), positions=None)
    assert config.depth_map == (0, 1, 2)
    assert len(set(config.blocks)) == 1
