"""Optimisers, and their state by parameter *name*, so that it survives a change of the parameter list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sslim.storage import load_tensors, save_tensors

STATE_FILE = "optimizer.safetensors"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimiser settings; the defaults are MelHuBERT's.

    Attributes:
        kind: ``adam`` (weight decay added to the gradient) or ``adamw`` (decoupled, and not on vectors: biases and norms).
        lr: Learning rate at factor 1 of the schedule.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Strength.
    """

    kind: Literal["adam", "adamw"] = "adam"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}; it must be above 0")


def _can_fuse(parameters: list[nn.Parameter]) -> bool:
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def _adam(named: dict[str, nn.Parameter], config: OptimizerConfig) -> Optimizer:
    parameters = list(named.values())
    return torch.optim.Adam(
        parameters,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=_can_fuse(parameters),
    )


def _adamw(named: dict[str, nn.Parameter], config: OptimizerConfig) -> Optimizer:
    parameters = list(named.values())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=_can_fuse(parameters))


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that have a gradient, each once, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Returns an optimiser of everything in ``module`` that is trained, fused where the device can.

    Raises:
        ValueError: Nothing is trained.
    """
    named = trained_parameters(module)
    if not named:
        raise ValueError("no parameter of the objective has requires_grad: there is nothing to train")
    return OPTIMIZERS[config.kind](named, config)


def save_optimizer_state(folder: Path, optimizer: Optimizer, module: nn.Module) -> None:
    """Writes ``optimizer.safetensors``: tensors ``NAME/FIELD`` for each parameter that has been updated."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained_parameters(module).items():
        for field, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{field}"] = torch.as_tensor(value)
    save_tensors(folder / STATE_FILE, tensors, {"optimizer": type(optimizer).__name__})


def load_optimizer_state(folder: str | Path, optimizer: Optimizer, module: nn.Module, *, strict: bool = False) -> list[str]:
    """Gives ``optimizer`` the moments in ``folder``. Learning rate, betas and the rest stay as configured.

    (Loading torch's own optimiser state would silently bring back the old learning rate: ``spec/melhubert.md``, trap 32.)

    Args:
        folder: Checkpoint folder with ``optimizer.safetensors``.
        optimizer: Made by ``build_optimizer`` from ``module``.
        module: The objective.
        strict: Whether every stored tensor must be used.

    Returns:
        Names of parameters that start without moments: new ones, those never updated, and those of another shape now.

    Raises:
        ValueError: The file is missing or unreadable, nothing in it fits, or ``strict`` is violated.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {STATE_FILE}; take a folder RUN/checkpoints/step-..., or start without optimiser state"
        )
    stored: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_tensors(path).items():
        name, _, field = key.rpartition("/")
        stored.setdefault(name, {})[field] = tensor
    fused = bool(optimizer.defaults.get("fused"))
    fresh = []
    for name, parameter in trained_parameters(module).items():
        state = stored.pop(name, None)
        fits = state is not None and all(value.dim() == 0 or value.shape == parameter.shape for value in state.values())
        if strict and state is not None and not fits:
            raise ValueError(f"{path} has no fitting moments for {name!r}")
        if state is None or not fits:  # without moments: never updated so far, or new
            fresh.append(name)
            continue
        optimizer.state[parameter] = {field: _place(value, field, parameter, fused) for field, value in state.items()}
    if strict and stored:
        raise ValueError(f"{path} holds moments of {sorted(stored)[0]!r}, which this objective does not train")
    if not strict and not optimizer.state:
        raise ValueError(f"{path} has no moments that fit any parameter of this objective")
    return fresh


def _place(value: Tensor, field: str, parameter: nn.Parameter, fused: bool) -> Any:
    # Fused kernels count steps on the device, the others on the CPU. A copy, because what was read may be a mapped file.
    return value.to("cpu" if field == "step" and not fused else parameter.device, copy=True)


OPTIMIZERS: dict[str, Callable[[dict[str, nn.Parameter], OptimizerConfig], Optimizer]] = {"adam": _adam, "adamw": _adamw}
