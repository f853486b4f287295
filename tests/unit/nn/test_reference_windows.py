"""LightHuBERT's windows: the rule written out in loops, in padded batches, with gradients; what has them and what may not."""

from dataclasses import replace

import pytest
import torch

from sslim.config import from_plain, to_plain
from sslim.nn.attention import SelfAttention
from sslim.nn.encoder import Block, BlockConfig, Encoder, EncoderConfig
from sslim.nn.relative_positions import RelativePositionsConfig
from sslim.nn.slicing import Units, extract_subnet

GLOBAL = BlockConfig(num_heads=3, head_dim=4, feedforward_dim=10)
WINDOWED = replace(GLOBAL, attention_window=2, window_rule="lighthubert")
NARROW = replace(WINDOWED, attention_window=1, num_heads=2)
CONFIG = EncoderConfig(
    dim=12,
    blocks=(GLOBAL, WINDOWED, NARROW),
    depth_map=(0, 1, 2, 0, 1),
    positions=None,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
)


def encoder(config: EncoderConfig = CONFIG) -> Encoder:
    generator = torch.Generator().manual_seed(0)
    made = Encoder(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator))
    return made


def frames(batch: int, num_frames: int) -> torch.Tensor:
    return torch.randn(batch, num_frames, CONFIG.dim, generator=torch.Generator().manual_seed(1))


def attended(attention: SelfAttention, x_TD: torch.Tensor, window: int | None, num_valid: int) -> torch.Tensor:
    """One utterance, position by position; rows of x from ``num_valid`` on are the frame that makes its length even."""
    num_frames, heads, width = len(x_TD), attention.num_heads, attention.head_dim
    queries, keys, values = (part(x_TD) for part in (attention.query, attention.key, attention.value))
    misread = window is not None and num_frames % (2 * window) == 0

    def piece(x: torch.Tensor, head: int, position: int) -> torch.Tensor:
        if position < 0:
            return torch.zeros(width)
        index = head * num_frames + position if misread and x is not values else position * heads + head
        return x.reshape(-1)[index * width : (index + 1) * width]

    first = 0
    while window is not None and (num_frames - first) % (2 * window):
        first -= 1
    context = torch.zeros(num_frames, heads, width)
    for head in range(heads):
        for i in range(num_frames):
            seen = [j for j in range(first, num_frames) if j < num_valid and (window is None or abs(i - j) <= window)]
            scores = torch.stack([piece(queries, head, i) @ piece(keys, head, j) for j in seen]) / width**0.5
            context[i, head] = sum(p * piece(values, head, j) for p, j in zip(scores.softmax(0), seen, strict=True))
    return attention.output(context.flatten(1))


def encoded(model: Encoder, x_TD: torch.Tensor) -> list[torch.Tensor]:
    """Every layer of one utterance by the written rule."""
    num_valid = len(x_TD)
    x_TD = model.input_norm(x_TD)
    x_TD = torch.cat([x_TD, torch.zeros(num_valid % 2, CONFIG.dim)])
    layers = [x_TD]
    for depth in model.config.depth_map:
        block = model.blocks[depth]
        assert isinstance(block, Block)
        attention_TD = attended(block.attention, x_TD, model.config.blocks[depth].attention_window, num_valid)
        x_TD = block.attention_norm(x_TD + attention_TD)
        x_TD = block.feedforward_norm(x_TD + block.feedforward(x_TD))
        layers.append(x_TD)
    return [layer[:num_valid] for layer in layers]


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5, 7, 8, 10, 11])  # even, and made even; multiples of 4 and not
def test_it_is_the_written_rule(num_frames: int) -> None:
    model, x = encoder(), frames(1, num_frames)
    with torch.inference_mode():
        for output in (model(x, keep_layers=True), model(x, torch.tensor([num_frames]), keep_layers=True)):
            assert output.final.shape == x.shape
            for ours, written in zip(output.layers, encoded(model, x[0]), strict=True):
                torch.testing.assert_close(ours[0], written, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_frames", [6, 7, 8])
def test_neither_fault_is_the_exact_band(num_frames: int) -> None:
    """The control: both faults, and the frame of zeros, change the output; so does reading ``slide_wsz`` as ``windows``."""
    model, x = encoder(), frames(1, num_frames)
    exact = Encoder(replace(CONFIG, blocks=tuple(replace(block, window_rule="band") for block in CONFIG.blocks))).eval()
    exact.load_state_dict(model.state_dict())
    with torch.inference_mode():
        ours, theirs = (each(x, keep_layers=True).layers for each in (model, exact))
    assert torch.equal(ours[1], theirs[1])  # up to the first window nothing differs
    assert (ours[2] - theirs[2]).abs().max() > 0.1  # 1e-5 is what the written rule is held to; norms shrink it further up
    assert (ours[-1] - theirs[-1]).abs().max() > 1e-3


def test_the_frame_of_zeros_is_seen_only_where_keys_are_misread() -> None:
    """Three frames made four: with the window of 4 its key is read as another's. With six frames read in order it is masked."""
    block = encoder().blocks[1]
    x = frames(1, 4)[0]
    changed = torch.cat([x[:3], x[3:] + 1.0])
    with torch.inference_mode():
        difference = (attended(block.attention, x, 2, 3) - attended(block.attention, changed, 2, 3)).abs().amax(1)
        assert difference[:3].max() > 1e-3
        difference = (attended(block.attention, x, 3, 3) - attended(block.attention, changed, 3, 3)).abs().amax(1)
        assert difference[:3].max() < 1e-6


def test_rows_of_a_batch_are_computed_alone() -> None:
    model, x, lengths = encoder(), frames(5, 9), [9, 8, 5, 1, 0]
    x.requires_grad_()
    output = model(x, torch.tensor(lengths), keep_layers=True)
    assert all(layer.isfinite().all() for layer in output.layers)
    for row, length in enumerate(lengths):
        assert (output.final[row, length:] == 0).all()
        if length:
            alone = model(x[row : row + 1, :length], keep_layers=True)
            for ours, theirs in zip(output.layers, alone.layers, strict=True):
                torch.testing.assert_close(ours[row, :length], theirs[0], atol=1e-5, rtol=0)
    output.final.square().sum().backward()
    assert all(x.grad[row, :length].abs().sum() > 0 for row, length in enumerate(lengths) if length)
    assert all((x.grad[row, length:] == 0).all() for row, length in enumerate(lengths))
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_an_input_without_frames_gives_none() -> None:
    """What a batch of utterances shorter than one frame of a front-end is."""
    model = encoder()
    for need_weights in (False, True):
        output = model(frames(2, 0), torch.tensor([0, 0]), keep_layers=True, need_weights=need_weights)
        assert {layer.shape for layer in (*output.layers, output.final)} == {(2, 0, CONFIG.dim)}
        assert all(weights.shape[2:] == (0, 0) for weights in output.attentions)


def test_weights_are_those_that_are_applied() -> None:
    model, x = encoder(), frames(2, 7)
    with torch.inference_mode():
        output = model(x, torch.tensor([7, 6]), need_weights=True)
        torch.testing.assert_close(output.final, model(x, torch.tensor([7, 6])).final, atol=1e-5, rtol=0)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, heads, 7, 7) for heads in (3, 3, 2, 3, 3)]
    windowed = output.attentions[1]
    distance = (torch.arange(7)[:, None] - torch.arange(7)).abs()
    assert (windowed[:, :, distance > 2] == 0).all()
    sums = windowed.sum(-1)
    assert (sums[0] > 0.999).all()  # seven frames, made eight: nothing is added on the left
    assert (sums[1, :, :2] < 0.999).all()  # six: two zero keys, which the first two see
    assert (sums[1, :, 2:6] > 0.999).all()


def test_training_drops_weights_and_recomputes() -> None:
    model, x = encoder(replace(CONFIG, attention_dropout=0.5)).train(), frames(2, 7)
    torch.manual_seed(0)
    first = model(x).final
    assert not torch.equal(first, model(x).final)
    model.gradient_checkpointing = True
    torch.manual_seed(0)
    torch.testing.assert_close(model(x).final, first)


def test_descriptions_keep_the_rule_and_old_ones_mean_the_band() -> None:
    assert from_plain(EncoderConfig, to_plain(CONFIG), "encoder") == CONFIG
    plain = to_plain(WINDOWED)
    del plain["window_rule"]  # as saved before there was one
    assert from_plain(BlockConfig, plain, "block") == replace(WINDOWED, window_rule="band")
    with pytest.raises(ValueError, match="window_rule"):
        from_plain(BlockConfig, {**plain, "window_rule": "bands"}, "block")


def test_slices_keep_the_rule_unless_the_windows_are_chosen() -> None:
    model, x = encoder(), frames(1, 8)
    units = replace(Units.full(CONFIG), depths=(0, 1, 2))
    assert extract_subnet(model, units).config.blocks == CONFIG.blocks
    chosen = replace(units, windows=(3, None, 2))
    rules = {
        rule: extract_subnet(model, replace(chosen, window_rule=rule)).config.blocks  # type: ignore[arg-type]
        for rule in ("band", "lighthubert")
    }
    assert [block.window_rule for block in rules["band"]] == ["band"] * 3
    assert [block.window_rule for block in rules["lighthubert"]] == ["lighthubert", "band", "lighthubert"]
    ordinary = replace(CONFIG, blocks=(replace(GLOBAL, window_rule="lighthubert"),), depth_map=(0,))
    assert not ordinary.has_reference_windows  # no window, no rule
    assert torch.equal(encoder(ordinary)(x).final, encoder(replace(ordinary, blocks=(GLOBAL,)))(x).final)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"causal": True}, "window_rule of block 1 is 'lighthubert', which a causal encoder cannot have; expected 'band'"),
        (
            {"relative_positions": RelativePositionsConfig(num_heads=3), "blocks": (GLOBAL, WINDOWED, GLOBAL)},
            "which an encoder with relative positions cannot have",
        ),
        ({"blocks": (replace(WINDOWED, attention_window=0),) * 3}, "attention_window of block 0 is 0, expected 1 or more"),
    ],
)
def test_where_it_may_not_be(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
