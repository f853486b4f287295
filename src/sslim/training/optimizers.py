"""Optimisers, and their state by parameter *name*, so that it survives a change of the parameter list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sslim.storage import load_tensors, save_tensors

STATE_FILE = "optimizer.safetensors"
FACTOR = "lr_factor"  # key of a parameter group: its learning rate as a multiple of the run's


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


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Parameters that share a learning rate.

    Attributes:
        parameters: The parameters.
        factor: Their learning rate as a multiple of the run's.
        decays: Whether weight decay is for them.
    """

    parameters: list[nn.Parameter]
    factor: float = 1.0
    decays: bool = True

    def options(self, config: OptimizerConfig) -> dict[str, Any]:
        """Returns them as torch's optimisers take them."""
        weight_decay = config.weight_decay if self.decays else 0.0
        rates = {"lr": config.lr * self.factor, FACTOR: self.factor}
        return {"params": self.parameters, "weight_decay": weight_decay, **rates}


def _adam(groups: list[_Group], config: OptimizerConfig) -> Optimizer:
    return torch.optim.Adam([group.options(config) for group in groups], **_options(groups, config))


def _adamw(groups: list[_Group], config: OptimizerConfig) -> Optimizer:
    split = [
        replace(group, parameters=part, decays=group.decays and matrices)
        for group in groups
        for matrices in (True, False)
        if (part := [p for p in group.parameters if (p.dim() >= 2) is matrices])
    ]
    return torch.optim.AdamW([group.options(config) for group in split], **_options(groups, config))


def _options(groups: list[_Group], config: OptimizerConfig) -> dict[str, Any]:
    fused = _can_fuse([p for group in groups for p in group.parameters])
    return {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": fused}


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that have a gradient, each once, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _groups(module: nn.Module) -> list[_Group]:
    """The trained parameters, apart from them those for which the objective asks for learning rates of their own."""
    named = trained_parameters(module)
    if not named:
        raise ValueError("no parameter of the objective has requires_grad: there is nothing to train")
    factors = module.learning_rate_factors() if hasattr(module, "learning_rate_factors") else {}  # type: ignore[operator]
    special: dict[str, list[nn.Parameter]] = {}
    for prefix in factors:
        names = [name for name in named if name == prefix or name.startswith(f"{prefix}.")]
        special[prefix] = [named.pop(name) for name in names]
        if not names:
            raise ValueError(f"learning_rate_factors names {prefix!r}, which no trained parameter of the objective starts with")
    own = [_Group(parameters=part, factor=factors[prefix], decays=False) for prefix, part in special.items()]
    return [*([_Group(parameters=list(named.values()))] if named else []), *own]


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Returns an optimiser of everything in ``module`` that is trained, fused where the device can.

    Parameters that ``module.learning_rate_factors()`` names (see ``Objective``) have their own multiples of the learning rate
    and no weight decay.

    Raises:
        ValueError: Nothing is trained, or a factor is given for parameters that there are not.
    """
    return OPTIMIZERS[config.kind](_groups(module), config)


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of the next update; parameters with a factor of their own get that multiple."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(FACTOR, 1.0)


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


OPTIMIZERS: dict[str, Callable[[list[_Group], OptimizerConfig], Optimizer]] = {"adam": _adam, "adamw": _adamw}
