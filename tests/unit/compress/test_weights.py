"""Weight pruning: exact counts against a sort, what is never touched, and zeros that no optimiser moves."""

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslim.checkpoints import load_model, save_model
from sslim.compress import weights as weights_module
from sslim.compress.weight_schedule import PruningSchedule
from sslim.compress.weights import (
    IterativeWeightPruning,
    WeightChoice,
    WeightPruning,
    choose_zeros,
    held_zeros,
    prunable_weights,
    prune_weights,
    remaining_parameters,
    sparsity_of,
)
from sslim.config import from_plain, to_plain
from sslim.models import ModelConfig, SpeechModel, build_model
from sslim.models.elastic import count_parameters
from sslim.models.hubert import hubert, narrow_conv_layers
from sslim.models.melhubert import melhubert
from sslim.nn.encoder import BlockConfig, LinearRanks
from sslim.nn.relative_positions import RelativePositionsConfig
from toy_training import ToyBatches
from weight_pruning_training import BIASED, SCHEDULE, pruning_objective, toy_model, toy_prediction

ASSETS = Path(__file__).parents[2] / "parity" / "assets" / "melhubert_legacy"
SMALL: Any = {"dim": 32, "num_heads": 4, "feedforward_dim": 48, "conv_kernel_size": 8, "conv_groups": 4}


def with_blocks(config: ModelConfig, blocks: tuple[BlockConfig, ...], **changes: Any) -> ModelConfig:
    return replace(config, encoder=replace(config.encoder, blocks=blocks, **changes))


def waveform() -> ModelConfig:
    return hubert(num_layers=3, conv_layers=narrow_conv_layers(12), **SMALL)


def uneven() -> ModelConfig:
    """A block without attention, one without feed-forward, factored maps, two layers that share a block."""
    sizes = ((3, 40), (0, 48), (4, 0))
    blocks = [BlockConfig(num_heads=n, head_dim=8, feedforward_dim=u, keep_norms=True) for n, u in sizes]
    blocks[0] = replace(blocks[0], ranks=LinearRanks(query=5, up=7, down=6))
    return with_blocks(melhubert(num_layers=3, **SMALL), tuple(blocks), depth_map=(0, 1, 0, 2))


def relative() -> ModelConfig:
    first, middle, last = waveform().encoder.blocks
    positions = RelativePositionsConfig(num_buckets=16, max_distance=20, num_heads=4)
    blocks = (first, replace(middle, num_heads=2, head_ids=(0, 2)), last)
    return with_blocks(waveform(), blocks, relative_positions=positions)


KINDS: dict[str, Callable[[], ModelConfig]] = {
    "melhubert": lambda: melhubert(num_layers=3, **SMALL),
    "waveform, relative positions": relative,
    "uneven, factored, shared": uneven,
}


@cache
def model_of(kind: str) -> SpeechModel:
    """Random everywhere, biases and norms included."""
    model = build_model(KINDS[kind](), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def by_sorting(pools: list[dict[str, Tensor]], sparsity: float) -> dict[str, Tensor]:
    """What a stable sort of each pool's magnitudes marks."""
    masks = {}
    for pool in pools:
        flat = torch.cat([tensor.detach().abs().flatten() for tensor in pool.values()])
        mask = torch.zeros_like(flat, dtype=torch.bool)
        mask[flat.argsort(stable=True)[: round(sparsity * len(flat))]] = True
        parts = mask.split([tensor.numel() for tensor in pool.values()])
        masks |= {name: part.view(pool[name].shape) for name, part in zip(pool, parts, strict=True)}
    return masks


def pools_of(weights: dict[str, nn.Parameter], scope: str) -> list[dict[str, Tensor]]:
    numbers = sorted({name.split(".")[2] for name in weights})
    layers: list[dict[str, Tensor]] = [{k: v for k, v in weights.items() if k.split(".")[2] == number} for number in numbers]
    return layers if scope == "layer" else [dict(weights)]


def zeros(model: SpeechModel, *, biases: bool = True) -> dict[str, Tensor]:
    return {name: parameter.detach() == 0 for name, parameter in prunable_weights(model, biases=biases).items()}


def count(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.001, 0.37, 0.9])
def test_the_smallest_become_zero_and_nothing_else_changes(kind: str, biases: bool, scope: Any, sparsity: float) -> None:
    model = model_of(kind)
    pruned = prune_weights(model, WeightPruning(sparsity=sparsity, scope=scope, biases=biases))
    weights = prunable_weights(model, biases=biases)
    expected = by_sorting(pools_of(weights, scope), sparsity)
    for name, tensor in model.state_dict().items():
        wanted = tensor.masked_fill(expected[name], 0.0) if name in expected else tensor
        assert torch.equal(pruned.state_dict()[name], wanted), name
    assert pruned.config == model.config
    assert pruned.num_parameters() == count_parameters(model.config)
    assert not pruned.training
    note = pruned.provenance[-1]
    assert (note["zeros"], note["of"]) == (count(expected), sum(tensor.numel() for tensor in weights.values()))
    assert sum(note["zeros_of_blocks"].values()) == note["zeros"]


def test_what_is_pruned_is_every_matrix_of_every_block_and_no_more() -> None:
    names = prunable_weights(model_of("waveform, relative positions"), biases=True)
    parts = ("attention.query", "attention.key", "attention.value", "attention.output", "feedforward.up", "feedforward.down")
    assert set(names) == {
        f"encoder.blocks.{b}.{part}.{leaf}" for b in range(3) for part in parts for leaf in ("weight", "bias")
    }
    factored = prunable_weights(model_of("uneven, factored, shared"), biases=False)
    assert {name for name in factored if "blocks.0.attention.query" in name or "blocks.1" in name} == {
        "encoder.blocks.0.attention.query.inner.weight",
        "encoder.blocks.0.attention.query.outer.weight",
        "encoder.blocks.1.feedforward.up.weight",
        "encoder.blocks.1.feedforward.down.weight",
    }


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_of_equal_weights_the_first_go_and_the_count_stays_exact(sparsity: float) -> None:
    """Weights of few values, such as quantised ones; the control is a plain threshold."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {
        f"encoder.blocks.{b}.x": torch.randint(-2, 3, (9, 7), generator=generator) * 0.5 for b in range(3)
    }
    masks = choose_zeros(tensors, sparsity, WeightChoice())
    expected = by_sorting([tensors], sparsity)
    assert all(torch.equal(masks[name], expected[name]) for name in tensors)
    flat = torch.cat([tensor.abs().flatten() for tensor in tensors.values()])
    threshold = flat.sort().values[count(masks) - 1]
    assert int((flat <= threshold).sum()) > count(masks) == round(sparsity * len(flat))


def test_extreme_magnitudes_are_told_apart() -> None:
    values = torch.tensor([[1e-45, -0.0, 3e38, -1e-38, 1.0, float("inf"), -1.0000001, 2e-45]])
    for number, gone in ((1, {1}), (2, {0, 1}), (3, {0, 1, 7}), (5, {0, 1, 3, 4, 7}), (7, {0, 1, 2, 3, 4, 6, 7})):
        mask = choose_zeros({"encoder.blocks.0.x": values}, number / 8, WeightChoice())["encoder.blocks.0.x"]
        assert set(mask[0].nonzero().flatten().tolist()) == gone


@pytest.mark.parametrize("score", ["magnitude", "random"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_sparsity_is_absolute_and_what_was_pruned_stays_so(score: Any, scope: Any) -> None:
    model, settings = model_of("melhubert"), {"score": score, "scope": scope, "biases": True}
    some = prune_weights(model, WeightPruning(sparsity=0.3, **settings))
    more = prune_weights(some, WeightPruning(sparsity=0.6, **settings))
    first, second = zeros(some), zeros(more)
    assert all(bool((second[name] | ~first[name]).all()) for name in first)
    sizes = [sum(t.numel() for t in pool.values()) for pool in pools_of(prunable_weights(model, biases=True), scope)]
    assert (count(first), count(second)) == tuple(sum(round(s * size) for size in sizes) for s in (0.3, 0.6))
    at_once = zeros(prune_weights(model, WeightPruning(sparsity=0.6, **settings)))
    assert all(torch.equal(at_once[name], second[name]) for name in at_once)
    other = zeros(prune_weights(model, WeightPruning(sparsity=0.6, score="random", scope=scope, biases=True, seed=1)))
    assert any(not torch.equal(at_once[name], other[name]) for name in at_once)  # the control
    with pytest.raises(ValueError, match=r"sparsity is 0\.3, and 0\.6\d* of the model's weights are zero already"):
        prune_weights(more, WeightPruning(sparsity=0.3, **settings))


def test_a_layer_keeps_zeros_beyond_its_share() -> None:
    uneven_zeros = prune_weights(model_of("melhubert"), WeightPruning(sparsity=0.0))
    with torch.no_grad():
        for name, parameter in prunable_weights(uneven_zeros, biases=False).items():
            if name.startswith("encoder.blocks.1."):
                parameter.zero_()
    shares = prune_weights(uneven_zeros, WeightPruning(sparsity=0.5, scope="layer")).provenance[-1]["zeros_of_blocks"]
    assert shares == {"0": shares["1"] // 2, "1": shares["1"], "2": shares["1"] // 2}


def test_nothing_to_prune_is_the_identity_and_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = copy.deepcopy(model_of("melhubert")).train()
    same = prune_weights(model, WeightPruning(sparsity=0.0))
    for name, tensor in model.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor)
        assert not same.state_dict()[name].is_set_to(tensor)
    pruned = prune_weights(model, WeightPruning(sparsity=0.5))
    assert model.training
    assert model.provenance == pruned.provenance[:-1]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in model_of("melhubert").state_dict().items())
    assert count(zeros(pruned)) > 0 == count(zeros(same))  # the control
    pruned.set_statistics(torch.zeros(40), torch.ones(40), source="test")
    save_model(pruned, tmp_path / "pruned")
    loaded = load_model(tmp_path / "pruned")
    assert loaded.provenance == pruned.provenance
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in pruned.state_dict().items())
    settings = {key: loaded.provenance[-1][key] for key in to_plain(WeightPruning(sparsity=0.5))}
    assert from_plain(WeightPruning, settings) == WeightPruning(sparsity=0.5)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_sparsity_that_cannot_be(sparsity: float) -> None:
    with pytest.raises(ValueError, match="expected a share from 0 below 1"):
        WeightPruning(sparsity=sparsity)


def test_remaining_parameters_are_the_published_ones() -> None:
    """Millions left of the 12-layer MelHuBERT with biases in the pool, as the compression suite counts them."""
    published = {0.2: 73.2, 0.5: 47.7, 0.7: 30.7, 0.8: 22.2, 0.9: 13.7, 0.95: 9.46}
    config = melhubert()
    for sparsity, millions in published.items():
        left = remaining_parameters(config, WeightPruning(sparsity=sparsity, biases=True))
        assert left / 1e6 == pytest.approx(millions, abs=0.05)
    assert remaining_parameters(config, WeightPruning(sparsity=0.95)) / 1e6 != pytest.approx(9.46, abs=0.05)
    for scope in ("global", "layer"):
        settings = WeightPruning(sparsity=0.37, scope=scope, biases=True)
        model = prune_weights(model_of("melhubert"), settings)
        counted = sum(int(torch.count_nonzero(parameter)) for parameter in model.parameters())
        assert remaining_parameters(model.config, settings) == counted


def test_held_zeros_are_those_of_pruned_matrices_wherever_they_were_pruned() -> None:
    fresh = toy_model()
    assert held_zeros(fresh) == {}
    assert count(zeros(fresh)) > 0  # its biases: zero, not pruned
    pruned = prune_weights(fresh, WeightPruning(sparsity=0.5))
    held = held_zeros(pruned)
    assert all(name.endswith(".weight") for name in held)
    assert all(torch.equal(held[name], zeros(pruned)[name]) for name in held)
    assert count(held) == pruned.provenance[-1]["zeros"]
    biased = held_zeros(prune_weights(fresh, WeightPruning(sparsity=0.5, biases=True)))
    assert any(name.endswith(".bias") for name in biased)
    by_hand = copy.deepcopy(fresh)
    with torch.no_grad():
        by_hand.encoder.blocks[1].attention.key.weight[2, 3] = 0.0  # type: ignore[union-attr]
    assert {name: mask.nonzero().tolist() for name, mask in held_zeros(by_hand).items()} == {
        "encoder.blocks.1.attention.key.weight": [[2, 3]]
    }


def test_a_foreign_pruned_checkpoint_is_pruned_further(shared_golden: Path) -> None:
    """The reference masked weights and biases; in 2022 weights alone, and then its biases are free."""
    foreign = load_model(ASSETS / "weight_pruned.ckpt")
    held = held_zeros(foreign)
    assert count(held) >= foreign.provenance[0]["masked_weights"]["hidden"]
    assert any(name.endswith(".bias") for name in held)
    early = "synth_s3prl_2022_weightpruned_floatmask_nobias.ckpt"
    without = held_zeros(load_model(shared_golden / "melhubert_legacy" / early))
    assert without
    assert not any(name.endswith(".bias") for name in without)
    more = prune_weights(foreign, WeightPruning(sparsity=0.9, biases=True))
    assert count(zeros(more)) == round(0.9 * foreign.provenance[0]["masked_weights"]["of"])
    assert all(bool((zeros(more)[name] | ~mask).all()) for name, mask in held.items())


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1),
}


def train(objective: IterativeWeightPruning, optimizer: torch.optim.Optimizer, steps: int, *, start: int = 0) -> None:
    """Steps of two micro-batches, as the trainer takes them."""
    batches = ToyBatches()
    objective.train()
    for step in range(start, start + steps):
        losses = []
        for i in range(2):
            prepared = objective.prepare(batches[step, i], torch.Generator().manual_seed(step))
            output = objective(prepared, prepared.weights)
            output.loss.backward()
            losses.append(float(output.loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        objective.end_step(step, sum(losses), optimizer)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_pruned_weights_and_their_moments_stay_zero(kind: str) -> None:
    objective = pruning_objective(replace(SCHEDULE, condition="normal"))
    optimizer = OPTIMIZERS[kind](list(objective.parameters()))
    weights = prunable_weights(objective.model, biases=True)
    total, start = sum(tensor.numel() for tensor in weights.values()), 0
    for steps, sparsity in ((3, 0.3), (5, 0.6), (5, 0.8), (10, 0.8)):
        train(objective, optimizer, steps, start=start)
        start += steps
        masks = {name: objective.mask(name) for name in weights}
        assert count(masks) == round(sparsity * total)
        assert float(objective.sparsity) == pytest.approx(sparsity, abs=1 / total)
        for name, parameter in weights.items():
            moments = [value for value in optimizer.state[parameter].values() if value.shape == parameter.shape]
            assert len(moments) == (1 if kind == "momentum" else 2)
            for tensor in (parameter, *moments):
                assert not tensor[masks[name]].any()
                assert tensor[~masks[name]].all()
    assert objective.shortfall is None


def test_control_old_moments_move_pruned_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the reference does: gradients are masked, moments are not."""
    hold = IterativeWeightPruning._hold
    monkeypatch.setattr(IterativeWeightPruning, "_hold", lambda objective, _: hold(objective, None))
    objective = pruning_objective(replace(SCHEDULE, condition="normal"))
    optimizer = OPTIMIZERS["adam"](list(objective.parameters()))
    train(objective, optimizer, 4)
    weights = prunable_weights(objective.model, biases=True)
    assert any(bool(parameter[objective.mask(name)].any()) for name, parameter in weights.items())


def test_gradients_are_masked_as_they_arrive_and_the_others_are_untouched() -> None:
    """So that the norm that clipping sees, and sums over processes, are those of what is trained."""
    pruned = prune_weights(toy_model(), WeightPruning(sparsity=0.5))
    plain = toy_prediction(copy.deepcopy(pruned))
    objective = pruning_objective(None, copy.deepcopy(pruned))
    gradients = []
    for each in (plain, objective):
        each.eval()
        prepared = each.prepare(ToyBatches()[0, 0], torch.Generator().manual_seed(0))
        for _ in range(2):
            each(prepared, prepared.weights).loss.backward()
        model = next(module for module in each.modules() if isinstance(module, SpeechModel))
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    held = held_zeros(pruned)
    assert held
    for name, whole in gradients[0].items():
        assert whole is not None
        expected = whole.masked_fill(held[name], 0.0) if name in held else whole
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=0)
    assert any(bool(gradients[0][name][mask].any()) for name, mask in held.items())  # type: ignore[index]


def test_without_a_schedule_zeros_stay_and_only_they_are_held() -> None:
    pruned = prune_weights(toy_model(), WeightPruning(sparsity=0.5))
    before = zeros(pruned, biases=False)
    for wrapped in (True, False):
        model = copy.deepcopy(pruned)
        masks = None if wrapped else {}  # the control holds nothing
        objective = IterativeWeightPruning(toy_prediction(model), masks=masks)
        optimizer = OPTIMIZERS["adamw"](list(objective.parameters()))
        train(objective, optimizer, 5)
        after = zeros(model, biases=False)
        assert all(torch.equal(before[name], after[name]) for name in before) is wrapped
        assert "sparsity" not in objective.state_dict()
        assert objective.steps_needed == 0


def test_masks_can_be_given_and_clear_what_they_hide() -> None:
    model = toy_model()
    name = "encoder.blocks.0.feedforward.up.weight"
    mask = torch.rand(model.get_parameter(name).shape, generator=torch.Generator().manual_seed(0)) < 0.5
    objective = IterativeWeightPruning(toy_prediction(model), masks={name: mask})
    assert torch.equal(model.get_parameter(name) == 0, mask)
    assert set(objective.state_dict()) - set(toy_prediction(model).state_dict()) >= {f"masks.{name.replace('.', '/')}"}
    for bad in (
        {"encoder.blocks.0.attention_norm.weight": torch.ones(8, dtype=torch.bool)},
        {name: mask[:3]},
        {name: mask.float()},
    ):
        with pytest.raises(ValueError, match="the model has no such matrix"):
            IterativeWeightPruning(toy_prediction(toy_model()), masks=bad)


def test_moments_from_another_run_do_not_move_what_is_held() -> None:
    pruned = prune_weights(toy_model(), WeightPruning(sparsity=0.5))
    held = held_zeros(pruned)
    objective = pruning_objective(None, pruned)
    optimizer = OPTIMIZERS["adam"](list(objective.parameters()))
    for parameter in objective.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(9.0),
            "exp_avg": torch.ones_like(parameter),
            "exp_avg_sq": torch.ones_like(parameter),
        }
    train(objective, optimizer, 3)
    for name, mask in held.items():
        parameter = pruned.get_parameter(name)
        assert not parameter[mask].any()
        assert not optimizer.state[parameter]["exp_avg"][mask].any()
        assert bool(optimizer.state[parameter]["exp_avg"][~mask].any())


def test_a_model_outlives_the_pruning_of_it() -> None:
    """Hooks of a wrapper that is gone do nothing: training without masks is training without masks."""
    model = prune_weights(toy_model(), WeightPruning(sparsity=0.5))
    objective = pruning_objective(None, model)
    del objective
    plain = toy_prediction(model)
    prepared = plain.prepare(ToyBatches()[0, 0], torch.Generator().manual_seed(0))
    plain(prepared, prepared.weights).loss.backward()
    held = held_zeros(model)
    assert any(bool(model.get_parameter(name).grad[mask].any()) for name, mask in held.items())  # type: ignore[index]


def test_what_a_run_records_and_announces() -> None:
    seen: list[tuple[int, float, int]] = []
    model = toy_model()

    def note(completed: int, sparsity: float) -> None:
        seen.append((completed, round(sparsity, 2), count(held_zeros(model))))

    schedule = replace(SCHEDULE, condition="normal", recovery_steps=2)
    objective = IterativeWeightPruning(toy_prediction(model), schedule, before_pruning=note)
    optimizer = OPTIMIZERS["adamw"](list(objective.parameters()))
    assert objective.steps_needed == 15
    train(objective, optimizer, 9)
    assert objective.shortfall == (
        "sparsity 0.6004 is reached of the 0.8 asked for: 1 of 3 prunings were not made, "
        "the next would be considered after update 13"
    )
    train(objective, optimizer, 6, start=9)
    total = objective.record()["of"]
    assert seen == [(3, 0.0, 0), (8, 0.3, round(0.3 * total)), (13, 0.6, round(0.6 * total))]
    record = objective.record()
    assert record["prunings"] == [
        {"sparsity": sparsity, "update": update, "extensions": 0} for sparsity, update in ((0.3, 3), (0.6, 8), (0.8, 13))
    ]
    assert record["zeros"] == round(0.8 * total)
    assert from_plain(PruningSchedule, record["schedule"]) == schedule
    assert record["zeros"] == count(held_zeros(model))


def test_a_run_that_gives_up_says_so() -> None:
    schedule = replace(SCHEDULE, at_cap="stop", tolerance=0.0)
    objective = pruning_objective(schedule)
    train(objective, OPTIMIZERS["adamw"](list(objective.parameters())), 20)
    assert objective.shortfall is not None
    assert "2 of 3 prunings were not made, the loss did not come to rest until update 13" in objective.shortfall
    assert [entry["sparsity"] for entry in objective.record()["prunings"]] == [0.3]


def test_mistakes() -> None:
    pruned = prune_weights(toy_model(), WeightPruning(sparsity=0.5, biases=True))
    with pytest.raises(ValueError, match=r"sparsity 0\.5 already and the schedule begins with 0\.3"):
        pruning_objective(SCHEDULE, pruned)
    reached = sparsity_of(pruned, biases=True)
    assert reached == pytest.approx(0.5, abs=1e-3) != sparsity_of(pruned, biases=False)
    assert float(pruning_objective(SCHEDULE.above(reached), pruned).sparsity) == pytest.approx(reached)
    with pytest.raises(ValueError, match="Linear trains 0 speech models"):
        IterativeWeightPruning(nn.Linear(2, 2))
    both = nn.ModuleList([toy_model(), toy_model()])
    with pytest.raises(ValueError, match="ModuleList trains 2 speech models"):
        IterativeWeightPruning(both)


def test_the_objective_inside_is_told_what_it_needs_to_know() -> None:
    calls: list[tuple] = []

    class Curious(type(toy_prediction(toy_model()))):  # type: ignore[misc]
        def begin_step(self, step: int, generator: torch.Generator) -> None:
            calls.append(("begin", step))

        def end_step(self, step: int, loss: float, optimizer: torch.optim.Optimizer) -> None:
            calls.append(("end", step, loss))

    plain = toy_prediction(toy_model())
    objective = IterativeWeightPruning(Curious(plain.model, plain.config), SCHEDULE, BIASED)
    objective.begin_step(4, torch.Generator())
    objective.set_gradient_checkpointing(True)
    assert objective.model.encoder.gradient_checkpointing
    optimizer = OPTIMIZERS["adamw"](list(objective.parameters()))
    objective.end_step(4, 1.5, optimizer)
    assert calls == [("begin", 4), ("end", 4, 1.5)]
    prepared = objective.prepare(ToyBatches()[0, 0], torch.Generator().manual_seed(0))
    metrics = objective.eval()(prepared, prepared.weights).metrics
    value, weight = metrics["sparsity"]
    assert (float(value), float(weight)) == (float(objective.sparsity), 1.0)
    assert "masked_loss" in metrics


def test_choosing_holds_the_scores_of_one_tensor_not_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: dict[str, Tensor] = {f"encoder.blocks.{b}.x": torch.randn(50, 40) for b in range(6)}
    whole, made, alive = weights_module._magnitudes, [], []

    def watched(tensor: Tensor, seed: int, number: int) -> Tensor:
        scores = whole(tensor, seed, number)
        made.append(weakref.ref(scores))
        alive.append(sum(reference() is not None for reference in made))
        return scores

    monkeypatch.setitem(weights_module.SCORES, "magnitude", watched)
    assert count(choose_zeros(tensors, 0.5, WeightChoice())) == 6000
    assert len(made) == 18  # upper halves, lower halves, masks
    assert max(alive) == 2  # the last one until the next is made
