"""Gated relative positions: buckets, padding, pruned heads keep their own column, slicing; and norms of missing parts."""

import math
from dataclasses import replace

import pytest
import torch

from sslim.config import from_plain, to_plain
from sslim.nn.encoder import BlockConfig, Encoder, EncoderConfig, plain_blocks
from sslim.nn.positions import ConvPositionsConfig
from sslim.nn.relative_positions import RelativeGate, RelativePositionsConfig, by_query_and_key, distance_buckets
from sslim.nn.slicing import Units, encoder_view, extract_subnet, run_subnet

RELATIVE = RelativePositionsConfig(num_buckets=12, max_distance=30, num_heads=4)
CONFIG = EncoderConfig(
    dim=16,
    **plain_blocks(2, 4, 4, 24),
    positions=ConvPositionsConfig(kernel_size=4, groups=4),
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    relative_positions=RELATIVE,
)


def build(config: EncoderConfig = CONFIG) -> Encoder:
    encoder = Encoder(config)
    encoder.initialize(torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        if encoder.relative_positions is not None:
            encoder.relative_positions.table.mul_(3.0)
    return encoder.eval()


def inputs(num_frames: int = 23) -> torch.Tensor:
    return torch.randn(2, num_frames, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(12, 30), (32, 128), (320, 800)])
def test_buckets_follow_the_rule(num_buckets: int, max_distance: int) -> None:
    """Plain arithmetic: exact up to a quarter of the buckets, logarithmic to max_distance, the rest in the last."""
    half, exact = num_buckets // 2, num_buckets // 4
    for distance in (0, 1, -1, exact - 1, -exact, exact + 3, 2 * exact + 1, max_distance - 1, -max_distance, 5 * max_distance):
        size = abs(distance)
        want = size if size < exact else exact + int(math.log(size / exact) / math.log(max_distance / exact) * (half - exact))
        want = min(want, half - 1) + (half if distance > 0 else 0)
        assert distance_buckets(torch.tensor(distance), num_buckets, max_distance) == want


def test_numbers_over_distances_are_spread_to_queries_and_keys() -> None:
    reach = 9
    distances = torch.arange(-reach, reach + 1)[None].float()
    for num_queries, num_keys, before in ((5, 5, 0), (3, 8, 2), (1, 1, 0), (10, 10, 0)):
        got = by_query_and_key(distances, num_queries, num_keys, before)[0]
        want = torch.arange(num_keys)[None] - before - torch.arange(num_queries)[:, None]
        assert torch.equal(got, want.float())


def test_padding_changes_nothing_and_weights_agree() -> None:
    encoder, x = build(), inputs()
    lengths = torch.tensor([23, 9])
    batch = encoder(x, lengths)
    torch.testing.assert_close(batch.final[1, :9], encoder(x[1:, :9]).final[0], atol=1e-5, rtol=0)
    explicit = encoder(x, lengths, need_weights=True)
    torch.testing.assert_close(explicit.final, batch.final, atol=1e-5, rtol=0)
    assert explicit.attentions[0][1, :, :9, 9:].abs().max() == 0


def test_the_bias_and_its_gate_matter() -> None:
    encoder, x = build(), inputs()
    before = encoder(x).final
    for parameter in (encoder.relative_positions.table, encoder.blocks[1].attention.gate.linear.weight):
        with torch.no_grad():
            parameter.mul_(2.0)
        after = encoder(x).final
        assert (after - before).abs().max() > 1e-4
        before = after


def test_a_causal_encoder_never_leaks() -> None:
    encoder = build(replace(CONFIG, causal=True, positions=replace(CONFIG.positions, causal=True)))
    x = inputs()
    changed = x.clone()
    changed[:, 8:] *= -2.0
    assert torch.equal(encoder(x).final[:, :8], encoder(changed).final[:, :8])
    assert (encoder(x).final - encoder(changed).final)[:, 8:].abs().max() > 1e-2
    torch.testing.assert_close(encoder(x, need_weights=True).final, encoder(x).final, atol=1e-5, rtol=0)


def test_gradients_reach_table_and_gates_also_when_recomputed() -> None:
    gradients = []
    for recompute in (False, True):
        encoder = build().train()
        encoder.gradient_checkpointing = recompute
        encoder(inputs()).final.square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
        gate = encoder.blocks[0].attention.gate
        assert encoder.relative_positions.table.grad.abs().max() > 0
        assert all(p.grad.abs().max() > 0 for p in gate.parameters())
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


KEPT = replace(Units.full(CONFIG), heads=((1, 3), (2, 0, 3)), feedforward=(tuple(range(0, 24, 2)), tuple(range(5))))


def test_pruned_heads_keep_their_own_column_and_gate() -> None:
    encoder, x = build(), inputs()
    pruned = extract_subnet(encoder, KEPT)
    assert [block.head_ids for block in pruned.config.blocks] == [(1, 3), (2, 0, 3)]
    for b, block in enumerate(encoder.blocks):
        with torch.no_grad():
            for head in set(range(4)) - set(KEPT.heads[b]):
                block.attention.output.weight[:, head * 4 : (head + 1) * 4] = 0
            block.feedforward.down.weight[:, sorted(set(range(24)) - set(KEPT.feedforward[b]))] = 0
    torch.testing.assert_close(pruned(x).final, encoder(x).final, atol=1e-5, rtol=0)
    others = replace(pruned.config.blocks[0], head_ids=(0, 1))  # the control: the first columns instead of their own
    wrong = Encoder(replace(pruned.config, blocks=(others, pruned.config.blocks[1]))).eval()
    wrong.load_state_dict(pruned.state_dict())
    assert (wrong(x).final - encoder(x).final).abs().max() > 1e-3


def test_elastic_equals_extracted_and_pruning_twice_composes() -> None:
    encoder, x = build(), inputs()
    lengths = torch.tensor([23, 9])
    once = extract_subnet(encoder, KEPT)
    torch.testing.assert_close(run_subnet(encoder, KEPT, x, lengths).final, once(x, lengths).final, atol=1e-6, rtol=0)
    twice = extract_subnet(once, replace(Units.full(once.config), heads=((1,), (0, 2)), depths=(1,)))
    assert [block.head_ids for block in twice.config.blocks] == [(2, 3)]
    direct = extract_subnet(encoder, replace(KEPT, heads=((3,), (2, 3)), depths=(1,)))
    assert torch.equal(twice(x).final, direct(x).final)
    encoder_view(encoder, KEPT)(x).final.sum().backward()
    assert encoder.relative_positions.table.grad.abs().max() > 0


def test_channels_go_with_the_heads_whose_gates_read_them() -> None:
    """Half the width leaves the first two heads their gates and their columns of the table."""
    encoder, kept = build(), Units.prefix(CONFIG, dim=8, num_heads=(1, 2))
    small, x = extract_subnet(encoder, kept), inputs()[..., :8]
    assert small.config.relative_positions.num_heads == 2
    torch.testing.assert_close(run_subnet(encoder, kept, x).final, small(x).final, atol=1e-6, rtol=0)
    wide = torch.cat([x, torch.full_like(x, torch.nan)], -1)  # what is cut does not count
    for ours, whole, heads in zip(small.blocks, encoder.blocks, (1, 2), strict=True):
        torch.testing.assert_close(ours.attention.gate(x), whole.attention.gate(wide)[..., :heads])
    assert torch.equal(small.relative_positions.table, encoder.relative_positions.table[:, :2])
    with pytest.raises(ValueError, match="at width 8 the gates of relative positions find the channels of 2 heads, but head 4"):
        extract_subnet(encoder, Units.prefix(CONFIG, dim=8))
    with pytest.raises(ValueError, match="4 at a time: 6 of 16 cannot be kept"):
        extract_subnet(encoder, Units.prefix(CONFIG, dim=6))
    with pytest.raises(ValueError, match="only the last channels can be cut"):
        extract_subnet(encoder, replace(kept, channels=(0, 1, 2, 3, 8, 9, 10, 11)))


def test_pruned_description_round_trips_and_old_ones_still_read() -> None:
    pruned = extract_subnet(build(), KEPT).config
    assert from_plain(EncoderConfig, to_plain(pruned)) == pruned
    plain = to_plain(replace(CONFIG, relative_positions=None))
    del plain["relative_positions"]
    for block in plain["blocks"]:
        del block["head_ids"], block["keep_norms"]
    assert from_plain(EncoderConfig, plain) == replace(CONFIG, relative_positions=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": (BlockConfig(num_heads=2, head_dim=8, feedforward_dim=4),)}, "need dim 32, not 16"),
        ({"blocks": (BlockConfig(num_heads=2, head_dim=4, feedforward_dim=4, head_ids=(1, 4)),)}, r"head_ids of block 0"),
        (
            {"blocks": (BlockConfig(num_heads=2, head_dim=4, feedforward_dim=4, head_ids=(1,)),)},
            "2 distinct numbers from 0 to 3",
        ),
        ({"blocks": (BlockConfig(num_heads=5, head_dim=4, feedforward_dim=4),)}, "5 distinct numbers"),
        (
            {
                "blocks": (BlockConfig(num_heads=2, head_dim=4, feedforward_dim=4, head_ids=(1, 2)),),
                "relative_positions": None,
            },
            "only relative positions",
        ),
    ],
)
def test_heads_that_the_table_does_not_have_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, depth_map=(0,), **change)


@pytest.mark.parametrize(("buckets", "distance"), [(7, 30), (2, 30), (40, 10)])
def test_buckets_that_cannot_be_are_refused(buckets: int, distance: int) -> None:
    with pytest.raises(ValueError, match=f"num_buckets is {buckets}|max_distance {distance}"):
        RelativePositionsConfig(num_buckets=buckets, max_distance=distance)


def test_gate_by_hand() -> None:
    gate = RelativeGate(3, 2, (2, 0))
    torch.nn.init.normal_(gate.scale)
    x = torch.randn(1, 1, 6)
    got = gate(x)[0, 0]
    for position, head in enumerate((2, 0)):
        a, b = (gate.linear.weight @ x[0, 0, 2 * head : 2 * head + 2] + gate.linear.bias).view(2, 4).sum(1).sigmoid()
        torch.testing.assert_close(got[position], a * (b * gate.scale[head] - 1.0) + 2.0)


def test_norms_of_missing_parts_can_stay() -> None:
    plain = replace(CONFIG, relative_positions=None)
    blocks = tuple(replace(block, keep_norms=True) for block in plain.blocks)
    encoder, x = build(replace(plain, blocks=blocks)), inputs()
    kept = replace(Units.full(plain), heads=((), (0, 1, 2, 3)), feedforward=(tuple(range(24)), ()))
    pruned = extract_subnet(encoder, kept)
    torch.testing.assert_close(run_subnet(encoder, kept, x).final, pruned(x).final, atol=1e-6, rtol=0)
    with torch.no_grad():
        for part in (encoder.blocks[0].attention.output, encoder.blocks[1].feedforward.down):
            part.weight.zero_()
            part.bias.zero_()
    torch.testing.assert_close(pruned(x).final, encoder(x).final, atol=1e-6, rtol=0)
    without = extract_subnet(build(plain), kept)  # the control: by default the norm goes with its part
    assert (without(x).final - pruned(x).final).abs().max() > 1e-3
    assert len(pruned.state_dict()) == len(without.state_dict()) + 4
    with pytest.raises(ValueError, match="pre-norm encoder has no use"):
        replace(plain, blocks=blocks, norm_placement="pre")
