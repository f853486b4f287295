"""Scores against slow oracles: rows added up one by one, and gates on every frame with their gradients."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslim.batch import Padded, valid_mask
from sslim.compress.calibration import Calibration
from sslim.compress.importance import (
    best_of_all,
    best_of_each,
    check_amount,
    head_sensitivities,
    head_weights,
    least_of,
    normalized,
    share_of,
    unit_sensitivities,
    unit_weights,
)
from sslim.models import ModelConfig, SpeechModel, build_model
from sslim.models.melhubert import melhubert
from sslim.nn.encoder import BlockConfig, LinearRanks

SENSITIVITIES = pytest.mark.parametrize("scores_of", [head_sensitivities, unit_sensitivities])


def described(dropout: float = 0.0) -> ModelConfig:
    """Uneven blocks, one of them factored, one without attention, one without feed-forward; the first runs twice."""
    config = melhubert(num_layers=1, dim=16, num_heads=4, conv_kernel_size=4, conv_groups=2, num_clusters=3, dropout=dropout)
    blocks = (
        BlockConfig(num_heads=3, head_dim=4, feedforward_dim=10),
        BlockConfig(num_heads=2, head_dim=5, feedforward_dim=6, ranks=LinearRanks(query=2, output=3, up=4, down=5)),
        BlockConfig(num_heads=0, head_dim=4, feedforward_dim=7),
        BlockConfig(num_heads=2, head_dim=4, feedforward_dim=0),
    )
    return replace(config, encoder=replace(config.encoder, blocks=blocks, depth_map=(0, 1, 2, 3, 0)))


def made(config: ModelConfig | None = None) -> SpeechModel:
    model = build_model(config or described(), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def speech(seed: int, frames: tuple[int, ...] = (9, 6), padded_to: int = 9) -> Padded:
    values = torch.zeros(len(frames), padded_to, 80)
    generator = torch.Generator().manual_seed(seed)
    for row, length in enumerate(frames):
        values[row, :length] = torch.randn(length, 80, generator=generator)
    return Padded(values=values, lengths=torch.tensor(frames))


def loss_on(batch: Padded) -> Callable[[SpeechModel], Tensor]:
    def loss(model: SpeechModel) -> Tensor:
        output = model.encode_features(batch.values, batch.lengths)
        return output.final[valid_mask(batch.lengths, batch.values.shape[1])].pow(3).sin().sum()

    return loss


def calibration(*batches: Padded) -> Calibration:
    return Calibration(features=batches, losses=tuple(loss_on(batch) for batch in batches))


ONE, TWO = speech(2), speech(3, (9, 4))
BOTH = calibration(ONE, TWO)


def weight_and_bias(part: torch.nn.Module) -> tuple[Tensor, Tensor]:
    if hasattr(part, "outer"):
        return (part.outer.weight @ part.inner.weight).detach(), part.outer.bias.detach()
    return part.weight.detach(), part.bias.detach()


def test_weights_of_heads_are_added_up() -> None:
    model = made()
    plain, full = head_weights(model), head_weights(model, with_output=True)
    for block, config in enumerate(model.config.encoder.blocks):
        assert plain[block].shape == (config.num_heads,)
        attention, width = model.encoder.blocks[block].attention, config.head_dim
        for head in range(config.num_heads):
            rows = slice(head * width, (head + 1) * width)
            pairs = [weight_and_bias(part) for part in (attention.query, attention.key, attention.value)]
            expected = sum(float(w[rows].abs().sum() + b[rows].abs().sum()) for w, b in pairs)
            assert float(plain[block][head]) == pytest.approx(expected, rel=1e-5)
            expected += float(weight_and_bias(attention.output)[0][:, rows].abs().sum())
            assert float(full[block][head]) == pytest.approx(expected, rel=1e-5)


def test_weights_of_units_are_added_up() -> None:
    model = made()
    for block, scores in enumerate(unit_weights(model)):
        assert scores.shape == (model.config.encoder.blocks[block].feedforward_dim,)
        for unit, score in enumerate(scores.tolist()):
            (up, bias), (down, _) = map(
                weight_and_bias, (model.encoder.blocks[block].feedforward.up, model.encoder.blocks[block].feedforward.down)
            )
            expected = float(up[unit].abs().sum() + bias[unit].abs() + down[:, unit].abs().sum())
            assert score == pytest.approx(expected, rel=1e-5)


def gated_scores(model: SpeechModel, part: str, losses: tuple[Callable[[SpeechModel], Tensor], ...]) -> list[Tensor]:
    """A gate of 1 on every part in every frame and application; the change of the loss to first order is its gradient."""
    model = copy.deepcopy(model)
    totals = []
    for block, config in enumerate(model.config.encoder.blocks):
        heads = part == "heads"
        module = model.encoder.blocks[block].attention if heads else model.encoder.blocks[block].feedforward
        count, width = (config.num_heads, config.head_dim) if heads else (config.feedforward_dim, 1)
        total = torch.zeros(count)
        if module is not None:
            gates: list[Tensor] = []

            def gate(_: torch.nn.Module, inputs: tuple, gates: list = gates, count: int = count, width: int = width) -> tuple:
                gates.append(torch.ones(*inputs[0].shape[:2], count, requires_grad=True))
                return (inputs[0] * gates[-1].repeat_interleave(width, -1),)

            hook = (module.output if heads else module.down).register_forward_pre_hook(gate)
            for loss in losses:
                gates.clear()
                value = loss(model)
                total += sum(gradient.abs().sum((0, 1)) for gradient in torch.autograd.grad(value, gates))
            hook.remove()
        totals.append(total)
    return totals


@pytest.mark.parametrize(("part", "scores_of"), [("heads", head_sensitivities), ("units", unit_sensitivities)])
def test_sensitivities_are_gradients_of_gates(part: str, scores_of: Callable) -> None:
    """Every block, the one that runs twice included; all batches count."""
    model = made()
    scores, expected = scores_of(model, BOTH), gated_scores(model, part, BOTH.losses)
    for ours, theirs in zip(scores, expected, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-5)
    assert all(bool((part > 0).all()) for part in scores)
    first = gated_scores(model, part, BOTH.losses[:1])  # the control: the first batch alone is not it
    assert all(float((a - b).abs().max()) > 1e-2 for a, b in zip(scores, first, strict=True) if len(a))


def test_first_order_change_is_the_change_of_a_small_cut() -> None:
    """Scaling one head down by a little changes the loss by what the signed gate gradients sum to, no more than the score."""
    model, part = made(), calibration(ONE)
    score = head_sensitivities(model, part)[1][0]
    width, before = 5, loss_on(ONE)(model).item()
    with torch.no_grad():
        model.encoder.blocks[1].attention.output.inner.weight[:, :width] *= 1 - 1e-3
    change = abs(loss_on(ONE)(model).item() - before) / 1e-3
    assert 0 < change <= float(score) * 1.05


@SENSITIVITIES
def test_batches_add_up_and_padding_does_not_count(scores_of: Callable) -> None:
    model = made()
    both, one, two = (scores_of(model, calibration(*batches)) for batches in ((ONE, TWO), (ONE,), (TWO,)))
    longer = scores_of(
        model, calibration(Padded(values=torch.cat([ONE.values, torch.zeros(2, 5, 80)], 1), lengths=ONE.lengths))
    )
    for block in range(4):
        torch.testing.assert_close(both[block], one[block] + two[block])
        torch.testing.assert_close(longer[block], one[block], rtol=1e-4, atol=1e-6)
    assert float((one[0] - two[0]).abs().max()) > 1e-3


@SENSITIVITIES
def test_mode_gradients_and_random_state_stay(scores_of: Callable) -> None:
    """Dropout plays no part, whatever mode the model comes in, nor do frozen parameters; hooks are gone even after an error."""
    model = made(described(dropout=0.5))
    expected = scores_of(model, BOTH)
    model.train()
    state = torch.get_rng_state()
    scores = scores_of(model, BOTH)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(scores, expected, strict=True))
    model.requires_grad_(False)
    with torch.no_grad():
        frozen = scores_of(model, BOTH)
    assert all(torch.equal(a, b) for a, b in zip(frozen, expected, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())

    def broken(_: SpeechModel) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        scores_of(model, Calibration(features=(ONE,), losses=(broken,)))
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


@SENSITIVITIES
def test_scores_that_cannot_be_had_are_errors(scores_of: Callable) -> None:
    model = made()
    for nothing in (None, Calibration(features=(ONE,))):
        with pytest.raises(ValueError, match="need calibration speech with a loss"):
            scores_of(model, nothing)
    with torch.no_grad():
        model.encoder.blocks[1].feedforward_norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="of block 0 are not finite"):
        scores_of(model, BOTH)


def test_broken_weights_are_errors() -> None:
    model = made()
    with torch.no_grad():
        model.encoder.blocks[1].attention.key.weight[3, 2] = float("nan")
        model.encoder.blocks[2].feedforward.down.weight[3, 2] = float("inf")
    with pytest.raises(ValueError, match="heads of block 1 are not finite"):
        head_weights(model)
    with pytest.raises(ValueError, match="feed-forward units of block 2 are not finite"):
        unit_weights(model)


def test_normalised_scores_have_norm_one() -> None:
    scores = (torch.tensor([3.0, 4.0]), torch.zeros(2), torch.zeros(0), torch.tensor([1.0, 1.0, 2.0]))
    two, one = normalized(scores, 2.0), normalized(scores, 1.0)
    assert two[0].tolist() == pytest.approx([0.6, 0.8])
    assert one[3].tolist() == pytest.approx([0.25, 0.25, 0.5])
    assert two[1].tolist() == [0.0, 0.0]
    assert two[2].shape == (0,)
    assert normalized(scores, None) is scores


def test_the_best_of_each_block() -> None:
    scores = (torch.tensor([1.0, 5.0, 3.0, 5.0]), torch.tensor([2.0, 2.0, 2.0]), torch.zeros(0))
    assert best_of_each(scores, [2, 1, 0]) == ((1, 3), (0,), ())  # of equal ones the first
    assert best_of_each(scores, [3, 3, 0]) == ((1, 2, 3), (0, 1, 2), ())


SCORES = st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=4), min_size=1, max_size=3)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(SCORES, st.integers(0, 12))
def test_the_best_of_all_are_worth_most(values: list[list[int]], extra: int) -> None:
    """Among all choices of as many parts with one part of each block at least, none adds up to more."""
    scores = tuple(torch.tensor(block, dtype=torch.float64) for block in values)
    least, everything = sum(len(block) > 0 for block in values), sum(map(len, values))
    total = min(least + extra, everything)
    chosen = best_of_all(scores, total)
    assert sum(map(len, chosen)) == total
    assert all(kept or not block for kept, block in zip(chosen, values, strict=True))
    parts = [(block, part) for block, row in enumerate(values) for part in range(len(row))]
    possible = [choice for choice in itertools.combinations(parts, total) if len({block for block, _ in choice}) == least]
    best = max(sum(values[block][part] for block, part in choice) for choice in possible)
    assert sum(values[block][part] for block, kept in enumerate(chosen) for part in kept) == best


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=4),
    st.integers(1, 60),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_multiples_and_the_least_width_are_kept(sizes: list[int], total: int, minimum: int, multiple: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = tuple(torch.rand(size, generator=generator, dtype=torch.float64) for size in sizes)
    chosen = best_of_all(scores, total, minimum=minimum, multiple=multiple)
    least = [least_of(size, minimum, multiple) for size in sizes]
    for size, kept, low, part in zip(sizes, chosen, least, scores, strict=True):
        assert len(kept) % multiple == 0 or len(kept) == size
        assert len(kept) >= min(minimum, size)
        assert len(kept) >= low
        assert kept == best_of_each((part,), [len(kept)])[0]  # within a block the best ones
    assert sum(map(len, chosen)) <= max(total, sum(least))
    if all(size % multiple == 0 for size in sizes) and sum(least) <= total <= sum(sizes):
        assert sum(map(len, chosen)) == total // multiple * multiple


def test_groups_are_ranked_by_their_mean() -> None:
    scores = (torch.tensor([9.0, 1.0, 1.0, 1.0]), torch.tensor([5.0, 5.0, 4.0, 4.0]))
    assert best_of_all(scores, 6, multiple=2) == ((0, 1), (0, 1, 2, 3))
    assert best_of_all(scores, 5, multiple=2) == ((0, 1), (0, 1))  # at most five
    assert best_of_all(scores, 3) == ((0,), (0, 1))


def test_shares_are_rounded_to_the_nearest() -> None:
    assert [share_of(keep, 12) for keep in (1.0, 0.5, 0.3, 0.04, 1e-9)] == [12, 6, 4, 1, 1]
    assert share_of(0.5, 3) == 2
    assert share_of(0.5, 0) == 0


@pytest.mark.parametrize(
    ("keep", "number", "message"),
    [
        (None, None, "keep is None and num_kept is None; expected one"),
        (0.5, 3, "keep is 0.5 and num_kept is 3; expected one"),
        (0.0, None, "keep is 0.0; expected a share above 0"),
        (1.01, None, "keep is 1.01; expected a share"),
        (float("nan"), None, "keep is nan; expected a share"),
        (None, 0, "num_kept is 0; expected at least 1"),
    ],
)
def test_amounts_that_mean_nothing_are_refused(keep: float | None, number: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_amount(keep, number)
