"""Properties of the encoder: padding changes nothing, causal never leaks, masks and weights agree with the fused kernel."""

from dataclasses import replace

import pytest
import torch

from sslim.nn.attention import SelfAttention, attention_mask
from sslim.nn.encoder import BlockConfig, Encoder, EncoderConfig, LinearRanks, plain_blocks
from sslim.nn.positions import ConvPositionsConfig, SinusoidPositionsConfig, sinusoids

CONV = ConvPositionsConfig(kernel_size=6, groups=4)
BASE = EncoderConfig(
    dim=16, **plain_blocks(3, 4, 4, 24), positions=CONV, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0
)
UNEVEN = (
    BlockConfig(num_heads=1, head_dim=6, feedforward_dim=10, ranks=LinearRanks(query=3, down=4)),
    BlockConfig(num_heads=0, head_dim=4, feedforward_dim=8),
    BlockConfig(num_heads=3, head_dim=4, feedforward_dim=0, attention_window=3),
)
CONFIGS = {
    "post": BASE,
    "pre": replace(BASE, norm_placement="pre", input_norm=False, final_norm=True),
    "shared": replace(BASE, blocks=BASE.blocks[:2], depth_map=(0, 1, 0, 1)),
    "uneven": replace(BASE, blocks=UNEVEN),
    "sinusoid": replace(BASE, positions=SinusoidPositionsConfig(), activation="swish"),
    "causal": replace(BASE, causal=True, positions=replace(CONV, causal=True)),
    "causal window": replace(
        BASE, causal=True, positions=replace(CONV, causal=True), blocks=(replace(BASE.blocks[0], attention_window=2),) * 3
    ),
}


def build(config: EncoderConfig) -> Encoder:
    encoder = Encoder(config)
    encoder.initialize(torch.Generator().manual_seed(1))
    with torch.no_grad():  # larger weights than at initialisation, so that a leak is far above rounding
        for parameter in encoder.parameters():
            parameter.mul_(3.0)
    return encoder.eval()


def inputs(num_frames: int = 12) -> torch.Tensor:
    return torch.randn(3, num_frames, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(name: str) -> None:
    encoder, x = build(CONFIGS[name]), inputs()
    lengths = torch.tensor([12, 7, 1])
    x[1, 7:] = float("nan")  # whatever stands in the padding must not matter
    batch = encoder(x, lengths, keep_layers=True)
    for row, length in enumerate(lengths.tolist()):
        alone = encoder(x[row : row + 1, :length], keep_layers=True)
        for together, single in zip(batch.layers, alone.layers, strict=True):
            torch.testing.assert_close(together[row, :length], single[0], atol=1e-5, rtol=0)
            assert (together[row, length:] == 0).all()
    without_lengths = encoder(x.nan_to_num(1.0), keep_layers=True)
    harm = (without_lengths.final[1, :7] - batch.final[1, :7]).abs().max()
    assert harm == 0 if encoder.config.causal else harm > 1e-3  # the control: padding taken for speech, unless it is the future


@pytest.mark.parametrize("name", CONFIGS)
def test_causal_never_leaks(name: str) -> None:
    encoder, x = build(CONFIGS[name]), inputs()
    changed = x.clone()
    changed[:, 8:] *= -2.0
    difference = (encoder(x).final - encoder(changed).final)[:, :8].abs().max()
    if CONFIGS[name].causal:
        assert difference == 0
    else:  # the control: every other encoder sees the future
        assert difference > 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_explicit_weights_give_the_same_output(name: str) -> None:
    encoder, x = build(CONFIGS[name]), inputs()
    lengths = torch.tensor([12, 7, 3])
    plain, explicit = encoder(x, lengths), encoder(x, lengths, need_weights=True)
    torch.testing.assert_close(plain.final, explicit.final, atol=1e-5, rtol=0)
    with_attention = sum(encoder.config.blocks[b].num_heads > 0 for b in encoder.config.depth_map)
    assert len(explicit.attentions) == with_attention
    for weights in explicit.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        if not encoder.config.causal:
            assert weights[1, :, :7, 7:].abs().max() == 0


def test_a_causal_encoder_with_centred_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="look ahead"):
        replace(BASE, causal=True)


def test_window_is_the_explicit_band() -> None:
    mask = attention_mask(torch.tensor([6, 4]), 6, causal=False, window=1, device=torch.device("cpu"))
    assert mask is not None
    t = torch.arange(6)
    for row, length in enumerate((6, 4)):
        want = ((t[:, None] - t[None, :]).abs() <= 1) & (t[None, :] < length) | torch.eye(6, dtype=torch.bool)
        assert torch.equal(mask[row, 0], want)


def test_attention_equals_torch_multihead_attention() -> None:
    ours, theirs = SelfAttention(16, 4, 4), torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    x = inputs()
    valid = torch.arange(12)[None] < torch.tensor([12, 7, 3])[:, None]
    want = theirs(x, x, x, key_padding_mask=~valid, need_weights=False)[0]
    torch.testing.assert_close(ours(x, valid[:, None, None])[0], want, atol=1e-6, rtol=0)


def test_sinusoids_follow_the_formula_and_continue() -> None:
    table = sinusoids(9, 6)
    for p in (0, 3, 8):
        for i in range(6):
            angle = torch.tensor(p / 10000 ** (2 * (i // 2) / 6), dtype=torch.float64)
            assert table[p, i] == (angle.sin() if i % 2 == 0 else angle.cos()).float()
    assert torch.equal(sinusoids(4, 6, start=5), table[5:])


def test_shared_blocks_are_the_same_tensors_and_run_in_order() -> None:
    shared = build(CONFIGS["shared"])
    unrolled = Encoder(replace(BASE, blocks=(BASE.blocks[0],) * 4, depth_map=(0, 1, 2, 3))).eval()
    state = {}
    for name, tensor in shared.state_dict().items():
        if name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            state |= {f"blocks.{depth}.{rest}": tensor for depth, b in enumerate((0, 1, 0, 1)) if b == int(block)}
        else:
            state[name] = tensor
    unrolled.load_state_dict(state)
    torch.testing.assert_close(shared(inputs()).final, unrolled(inputs()).final)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    x = inputs()
    gradients = []
    for enabled in (False, True):
        encoder = build(replace(BASE, dropout=0.1)).train()
        encoder.gradient_checkpointing = enabled
        torch.manual_seed(3)
        encoder(x).final.square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_layer_drop_skips_only_while_training() -> None:
    encoder, x = build(replace(BASE, layer_drop=1.0)), inputs()
    kept = encoder(x, keep_layers=True)
    assert not torch.equal(kept.layers[0], kept.final)
    skipped = encoder.train()(x, keep_layers=True)
    assert torch.equal(skipped.layers[0], skipped.final)
    assert len(skipped.layers) == 4
