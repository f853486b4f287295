"""Hard-concrete gates on attention heads, feed-forward units and front-end channels, trained to a target sparsity.

Louizos, Welling and Kingma 2018, "Learning sparse neural networks through L0 regularization" (arXiv 1712.01312); used as in
DPHuBERT (Peng et al., Interspeech 2023, arXiv 2305.17651). A gate multiplies a head's context before the output map, a unit's
activation before the second map, or a convolution's channel after its activation; while training it is a random number that is
often exactly 0 or 1. ``cut_gates`` (``gate_cut``) makes an ordinary smaller model of what stays open.

The model has no switch for this: :meth:`Gates.attach` hooks the gates onto an ordinary model. Where the gated model and the cut
one could part ways, the gated one is made to compute what the cut one will:

- a norm over channels runs over the open ones (DPHuBERT's runs over closed ones too, and its pruned front-end gives other
  features than the trained one: by 14 to 37 % with layer norms);
- a block's part whose gates are all closed is silent, its output bias included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from sslim.compress.gate_costs import can_vanish, parameter_costs
from sslim.frontends import ConvFrontendConfig
from sslim.frontends.convolution import ConvFrontend, ConvLayer
from sslim.models import ModelConfig, SpeechModel
from sslim.nn.encoder import Block

Kind = Literal["heads", "feedforward", "channels"]
KINDS: tuple[Kind, ...] = ("heads", "feedforward", "channels")

TEMPERATURE = 2 / 3  # beta
STRETCH = 0.1  # the concrete distribution on (0, 1) is stretched to (-0.1, 1.1) before it is clamped
SETTLED_SLOPE = 0.8  # of log alpha in the value that an open gate settles on
NOISE_MARGIN = 1e-6  # uniform noise keeps this distance from 0 and 1
SHIFT = -TEMPERATURE * math.log(STRETCH / (1 + STRETCH))  # 1.5986: log alpha + SHIFT are the log odds of being open


def sample_gates(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Returns gates of the hard-concrete distribution (Louizos et al., equations 10 to 12).

    Args:
        log_alpha: (N,) location.
        noise: (N,) uniform on (0, 1).
    """
    concrete = torch.sigmoid((torch.logit(noise) + log_alpha) / TEMPERATURE)
    return ((1 + 2 * STRETCH) * concrete - STRETCH).clamp(0.0, 1.0)


def open_probability(log_alpha: Tensor) -> Tensor:
    """Returns the probability that a sampled gate is above zero; their sum is the expected L0 norm (equation 12)."""
    return torch.sigmoid(log_alpha + SHIFT)


def settled_gates(log_alpha: Tensor, least: int = 0) -> Tensor:
    """Returns the gates of a trained model, without noise: as many are closed as sampling would close on average.

    The ``round(N - expected L0)`` smallest are exactly zero, the first ones among equals; the others keep the soft value
    ``sigmoid(0.8 log_alpha / beta)``.

    Args:
        log_alpha: (N,) location.
        least: Gates that stay open in any case.
    """
    count = len(log_alpha)
    expected = float(open_probability(log_alpha.detach().double()).sum())
    num_closed = max(0, min(round(count - expected), count - least))
    closed = log_alpha.detach().sort(stable=True).indices[:num_closed]  # by location: soft values may round to equal ones
    soft = torch.sigmoid(SETTLED_SLOPE / TEMPERATURE * log_alpha)
    return soft.index_fill(0, closed, 0.0)


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What is gated, and how open it starts.

    A starting value m stands for ``log_alpha ~ N(log((1 - m) / m), 0.01)``: 0.01 keeps a gate open with probability 0.998,
    0.5 with probability 0.832.

    Attributes:
        heads: Start of attention heads; None leaves them ungated.
        feedforward: Start of feed-forward units; None leaves them ungated.
        channels: Start of channels of a convolutional front-end; None leaves them ungated. Other front-ends have none.
    """

    heads: float | None = 0.01
    feedforward: float | None = 0.5
    channels: float | None = 0.01

    def __post_init__(self) -> None:
        for kind in KINDS:
            start = getattr(self, kind)
            if start is not None and not 0.0 < start < 1.0:
                raise ValueError(f"the start of {kind} gates is {start}; expected a number between 0 and 1, or None")
        if self.heads is None and self.feedforward is None and self.channels is None:
            raise ValueError("nothing is gated: give at least one of heads, feedforward and channels a start")


class Gates(nn.Module):
    """The gates of a model.

    Blocks that run several times (``depth_map``) have one set of gates, applied every time. In training mode gates have the
    values of the last :meth:`sample`; in eval mode those of :func:`settled_gates`, computed from the parameters of the moment.

    Attributes:
        config: Description of the gated model.
        heads: Log alpha of the heads of each block that has any, by the block's number from 0.
        feedforward: That of the feed-forward units.
        channels: That of the output channels of each convolution of the front-end, by its number from 0. The last convolution
            has none where no linear map follows that could take fewer features.

    Args:
        config: Description of the model that they are for.
        settings: What is gated.
        generator: Draws the start.

    Raises:
        ValueError: The model has nothing of what is to be gated.
    """

    def __init__(
        self, config: ModelConfig, settings: GateConfig = GateConfig(), generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config, self.settings = config, settings
        sizes = _sizes(config)
        self._sizes, self._least = sizes, {kind: _least(config, kind) for kind in KINDS}
        for kind in KINDS:
            start = getattr(settings, kind)
            gated = {} if start is None else {index: n for index, n in sizes[kind].items() if n > 0}
            if kind == "channels" and not config.projection.linear:
                gated.pop(len(sizes[kind]) - 1, None)
            drawn = {str(index): _initial(n, start, generator) for index, n in gated.items()}
            self.add_module(kind, nn.ParameterDict(drawn))
        if next(self.parameters(), None) is None:
            raise ValueError(f"this {config.family} model has nothing that could be gated by {settings}")
        self._costs = parameter_costs(config)
        self._noise: dict[tuple[Kind, int], Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self.num_parameters = int(self._costs.expected(*self._open_sizes()))

    def log_alpha(self, kind: Kind, index: int) -> Tensor | None:
        """Returns the log alpha (N,) of a block's or a convolution's gates; None where it has none."""
        part = cast(nn.ParameterDict, getattr(self, kind))
        return part.get(str(index))

    def sample(self) -> None:
        """Draws the noise that gates have in training mode until the next call, from torch's global generator."""
        for kind in KINDS:
            for name, log_alpha in cast(nn.ParameterDict, getattr(self, kind)).items():
                uniform = torch.rand_like(log_alpha.detach())
                self._noise[kind, int(name)] = uniform * (1 - 2 * NOISE_MARGIN) + NOISE_MARGIN

    def settled(self, kind: Kind, index: int) -> Tensor | None:
        """Returns a part's gates (N,) without noise, whatever the mode; None where it has none."""
        log_alpha = self.log_alpha(kind, index)
        return None if log_alpha is None else settled_gates(log_alpha, self._least[kind][index])

    def values(self, kind: Kind, index: int) -> Tensor:
        """Returns a part's gates (N,) in the present mode.

        Raises:
            RuntimeError: In training mode, when nothing was sampled yet.
        """
        log_alpha = self.log_alpha(kind, index)
        assert log_alpha is not None
        if not self.training:
            return settled_gates(log_alpha, self._least[kind][index])
        if (kind, index) not in self._noise:
            raise RuntimeError("gates are in training mode and were never sampled: call sample() before every forward pass")
        return sample_gates(log_alpha, self._noise[kind, index])

    def expected_parameters(self) -> Tensor:
        """Returns the expected number of parameters (float64, with gradient) of what sampled gates leave.

        The model's own parameters are counted as in ``count_parameters``, heads of objectives are not.
        """
        sizes, present = self._open_sizes()
        for kind in KINDS:
            for name, log_alpha in cast(nn.ParameterDict, getattr(self, kind)).items():
                sizes[kind][int(name)] = open_probability(log_alpha.double()).sum()
                none = functional.logsigmoid(-(log_alpha.double() + SHIFT)).sum()
                present[kind][int(name)] = -torch.expm1(none)
        return cast(Tensor, self._costs.expected(sizes, present))

    def expected_sparsity(self) -> Tensor:
        """Returns the share of the parameters that is expected to go (float64, with gradient)."""
        return 1.0 - self.expected_parameters() / self.num_parameters

    def largest_sparsity(self) -> float:
        """Returns the share of the parameters that goes when every gate is closed."""
        sizes, present = self._open_sizes()
        for kind in KINDS:
            for name in cast(nn.ParameterDict, getattr(self, kind)):
                index = int(name)
                sizes[kind][index] = least = self._least[kind][index]
                present[kind][index] = float(least > 0)
        return 1.0 - float(self._costs.expected(sizes, present)) / self.num_parameters

    def _open_sizes(self) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Sizes with every gate open, and whether there is any; the arguments of ``ParameterCosts.expected``."""
        sizes: dict[str, list[Any]] = {kind: list(self._sizes[kind].values()) for kind in KINDS}
        return sizes, {kind: [float(size > 0) for size in sizes[kind]] for kind in KINDS}

    def attach(self, model: SpeechModel) -> None:
        """Makes a model compute with these gates, until :meth:`detach`. Mode and device are the caller's business.

        Raises:
            ValueError: The model has other sizes than the one that the gates were made for.
            RuntimeError: They are attached already.
        """
        if self._hooks:
            raise RuntimeError("these gates are attached to a model already: detach them first")
        if _sizes(model.config) != self._sizes:
            raise ValueError(
                f"the gates are for a {self.config.family} model of other sizes than this {model.config.family} model"
            )
        for index, block in enumerate(model.transformer.blocks):
            self._attach_block(index, cast(Block, block), model.config.transformer.blocks[index].head_dim)
        if self.channels:
            self._attach_frontend(cast(ConvFrontend, model.frontend), model.projection)

    def detach(self) -> None:
        """Takes the gates off the model: it computes again what it did without them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _attach_block(self, index: int, block: Block, head_dim: int) -> None:
        if self.log_alpha("heads", index) is not None:
            assert block.attention is not None
            self._attach_part("heads", index, block.attention.output, head_dim)
        if self.log_alpha("feedforward", index) is not None:
            assert block.feedforward is not None
            self._attach_part("feedforward", index, block.feedforward.down, 1)

    def _attach_part(self, kind: Kind, index: int, output: nn.Module, width: int) -> None:
        """Gates what enters the last map of a part, ``width`` columns each; a part that can vanish is silent when all close."""

        def scale(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            gates = self.values(kind, index).repeat_interleave(width)
            return (inputs[0] * gates.to(inputs[0].dtype), *inputs[1:])

        def silence(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output * self._open(kind, index).any()

        self._hooks.append(output.register_forward_pre_hook(scale))
        if self._least[kind][index] == 0:
            self._hooks.append(output.register_forward_hook(silence))

    def _attach_frontend(self, frontend: ConvFrontend, projection: nn.Module) -> None:
        last = len(frontend.layers) - 1
        for index, layer in enumerate(frontend.layers):
            if self.log_alpha("channels", index) is None:
                continue
            if cast(ConvLayer, layer).norm_kind == "layer":
                self._hooks.append(cast(nn.LayerNorm, layer.norm).register_forward_hook(self._over_open(index)))
            self._hooks.append(layer.register_forward_hook(self._scale_channels(index)))
        if self.log_alpha("channels", last) is None:
            return
        if (norm := cast(nn.LayerNorm | None, projection.norm)) is not None:
            self._hooks.append(norm.register_forward_hook(self._over_open(last)))

        def drop_closed(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0] * self._open("channels", last).to(inputs[0].dtype), *inputs[1:])

        self._hooks.append(cast(nn.Linear, projection.linear).register_forward_pre_hook(drop_closed))

    def _open(self, kind: Kind, index: int) -> Tensor:
        return self.values(kind, index).detach() > 0

    def _scale_channels(self, index: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def scale(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output * self.values("channels", index).to(output.dtype)

        return scale

    def _over_open(self, index: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        """Hook of a norm over gated channels: computes it anew, over the open ones."""

        def normalize(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return norm_over_open(cast(nn.LayerNorm, module), inputs[0], self._open("channels", index))

        return normalize


def norm_over_open(norm: nn.LayerNorm, x_BTC: Tensor, open_C: Tensor) -> Tensor:
    """Returns a layer norm (B, T, C) float32 whose mean and variance are those of the open channels alone.

    On open channels it is the norm of a layer that has only those; on closed ones it is finite and of no meaning.
    """
    x_BTC, share_C = x_BTC.float(), open_C / open_C.sum().clamp(min=1)
    centred_BTC = x_BTC - (x_BTC * share_C).sum(-1, keepdim=True)
    variance_BT1 = (centred_BTC.square() * share_C).sum(-1, keepdim=True)
    return centred_BTC * (variance_BT1 + norm.eps).rsqrt() * norm.weight + norm.bias


def gate_values(gates: Gates) -> dict[str, Any]:
    """Returns the settled gates as plain values: for each block or convolution a list, 0 where closed; None without gates."""
    values: dict[str, Any] = {
        kind: [_rounded(gates.settled(kind, index)) for index in _sizes(gates.config)[kind]] for kind in KINDS
    }
    return {"expected_parameters": round(gates.expected_parameters().item()), **values}


def _rounded(values: Tensor | None) -> list[float] | None:
    return None if values is None else [round(value, 4) for value in values.tolist()]


def _sizes(config: ModelConfig) -> Mapping[Kind, dict[int, int]]:
    """Heads and units of every block, channels of every convolution, by number from 0."""
    blocks = config.transformer.blocks
    layers = config.frontend.layers if isinstance(config.frontend, ConvFrontendConfig) else ()
    return {
        "heads": {index: block.num_heads for index, block in enumerate(blocks)},
        "feedforward": {index: block.feedforward_dim for index, block in enumerate(blocks)},
        "channels": {index: layer.channels for index, layer in enumerate(layers)},
    }


def _least(config: ModelConfig, kind: Kind) -> list[int]:
    """How many gates of each part stay open in any case: a convolution is nothing without channels."""
    if kind == "channels":
        return [1] * len(_sizes(config)[kind])
    return [int(not can_vanish(config.transformer, block)) for block in config.transformer.blocks]


def _initial(count: int, start: float, generator: torch.Generator | None) -> nn.Parameter:
    return nn.Parameter(math.log((1 - start) / start) + 0.01 * torch.randn(count, generator=generator))
