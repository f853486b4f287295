"""Optimisers against their formulas, and their state by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sslim.training import OPTIMIZERS, OptimizerConfig, build_optimizer, load_optimizer_state
from sslim.training.optimizers import save_optimizer_state, set_learning_rate


def small_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(5, 3, generator=generator)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_two_steps_by_hand(kind: str):
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    config = OptimizerConfig(kind=kind, lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5)  # type: ignore[arg-type]
    optimizer = build_optimizer(module, config)
    value, m, v = torch.tensor([[1.0, -2.0]], dtype=torch.float64), 0.0, 0.0
    for n, gradient in enumerate((torch.tensor([[0.5, 1.0]]), torch.tensor([[-1.0, 3.0]])), start=1):
        module.weight.grad = gradient
        optimizer.step()
        g = gradient.double()
        if kind == "adam":
            g = g + 0.5 * value
        else:
            value = value * (1 - 0.1 * 0.5)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        value = value - 0.1 * (m / (1 - 0.8**n)) / ((v / (1 - 0.9**n)).sqrt() + 1e-6)
    assert torch.allclose(module.weight.double(), value, atol=1e-5)
    assert optimizer.defaults["fused"]


def test_adamw_does_not_decay_vectors_and_frozen_parameters_stay_out():
    module = small_module()
    module[2].requires_grad_(False)
    optimizer = build_optimizer(module, OptimizerConfig(kind="adamw", lr=0.1, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {name for name, p in module.named_parameters() if not p.equal(before[name])}
    assert changed == {"0.weight"}
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(small_module().requires_grad_(False), OptimizerConfig())


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_state_comes_back_bit_for_bit_and_the_learning_rate_does_not(kind: str, tmp_path: Path):
    config = OptimizerConfig(kind=kind, lr=0.05, weight_decay=0.1)  # type: ignore[arg-type]
    module = small_module()
    optimizer = build_optimizer(module, config)
    train(module, optimizer, 3)
    save_optimizer_state(tmp_path, optimizer, module)

    twin = small_module()
    twin.load_state_dict(module.state_dict())
    resumed = build_optimizer(twin, config)
    assert load_optimizer_state(tmp_path, resumed, twin, strict=True) == []
    train(module, optimizer, 2, seed=1)
    train(twin, resumed, 2, seed=1)
    assert all(a.equal(b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))

    # Control: without the moments the same steps lead elsewhere.
    train(forgetful := small_module(), build_optimizer(forgetful, config), 2, seed=1)
    assert not forgetful[0].weight.equal(module[0].weight)

    gentle = build_optimizer(twin, OptimizerConfig(kind=kind, lr=1e-5))  # type: ignore[arg-type]
    load_optimizer_state(tmp_path, gentle, twin)
    assert {group["lr"] for group in gentle.param_groups} == {1e-5}  # spec/melhubert.md, trap 32


def test_a_new_head_starts_without_moments(tmp_path: Path):
    module = small_module()
    optimizer = build_optimizer(module, OptimizerConfig())
    train(module, optimizer, 2)
    save_optimizer_state(tmp_path, optimizer, module)
    grown = nn.Sequential(module[0], module[1], nn.Linear(4, 7))
    fresh = build_optimizer(grown, OptimizerConfig())
    assert load_optimizer_state(tmp_path, fresh, grown) == ["2.weight", "2.bias"]
    assert fresh.state[grown[0].weight]["exp_avg"].equal(optimizer.state[module[0].weight]["exp_avg"])
    with pytest.raises(ValueError, match=r"no fitting moments for '2\.weight'"):
        load_optimizer_state(tmp_path, build_optimizer(grown, OptimizerConfig()), grown, strict=True)
    other = nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match="no moments that fit any parameter"):
        load_optimizer_state(tmp_path, build_optimizer(other, OptimizerConfig()), other)
    with pytest.raises(ValueError, match=r"has no optimizer\.safetensors"):
        load_optimizer_state(tmp_path / "nowhere", fresh, grown)


class Uneven(nn.Module):
    """Learns one part and one bare parameter faster than the rest."""

    def __init__(self, factors: dict[str, float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.body2, self.factors = nn.Linear(3, 3), nn.Linear(3, 3), factors
        self.scale = nn.Parameter(torch.ones(2, 2))

    def learning_rate_factors(self) -> dict[str, float]:
        return self.factors


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_parameters_with_their_own_learning_rate(kind: str, tmp_path: Path):
    """The first update of Adam is the learning rate, whatever the gradient; decay is for the others alone."""
    module = Uneven({"body": 10.0, "scale": 0.5})
    config = OptimizerConfig(kind=kind, lr=0.01, weight_decay=0.5)  # type: ignore[arg-type]
    optimizer = build_optimizer(module, config)
    set_learning_rate(optimizer, 0.001)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 1e4)
    optimizer.step()
    moved = {name: (before[name] - p.detach()) for name, p in module.named_parameters()}
    for name, expected in (("body.weight", 0.01), ("body.bias", 0.01), ("scale", 0.0005), ("body2.bias", 0.001)):
        torch.testing.assert_close(moved[name], torch.full_like(moved[name], expected), atol=1e-6, rtol=1e-3)
    decayed = 0.001 * 0.5 * before["body2.weight"] if kind == "adamw" else 0.0
    torch.testing.assert_close(moved["body2.weight"], torch.full_like(before["body2.weight"], 0.001) + decayed)

    save_optimizer_state(tmp_path, optimizer, module)
    twin = Uneven({"body": 10.0, "scale": 0.5})
    twin.load_state_dict(module.state_dict())
    resumed = build_optimizer(twin, config)
    assert load_optimizer_state(tmp_path, resumed, twin, strict=True) == []
    for net, own in ((module, optimizer), (twin, resumed)):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, -3.0)
        set_learning_rate(own, 0.002)
        own.step()
    assert all(a.equal(b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))
    with pytest.raises(ValueError, match="learning_rate_factors names 'bod', which no trained parameter"):
        build_optimizer(Uneven({"bod": 2.0}), config)
