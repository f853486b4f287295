"""Vector quantisation with learnt codes, chosen by Gumbel-softmax while training and by the largest logit otherwise.

Chung, Tang and Glass, "Vector-Quantized Autoregressive Predictive Coding" (arXiv 2005.08392, section 2.2); Liu, Chung and
Glass, "Non-Autoregressive Predictive Coding" (arXiv 2011.00406, section 2.3), which cuts a frame into groups of channels, each
with a codebook of its own. Not to be mixed up with ``sslim.nn.quantized``, which stores weights as integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslim.batch import valid_mask

SMALLEST, LARGEST = 1e-10, 1 - 1e-7  # of a uniform number, so that its logarithm and that one's are finite


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Codebooks over groups of channels.

    Attributes:
        num_codes: Codes V of each group (``codebook_size`` in S3PRL).
        code_dims: Channels of each group, which its codes have too (``code_dim``); together they are the width of a frame.
        temperature: Of the Gumbel-softmax (``gumbel_temperature``).
    """

    num_codes: tuple[int, ...]
    code_dims: tuple[int, ...]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.num_codes or len(self.num_codes) != len(self.code_dims):
            raise ValueError(
                f"num_codes {self.num_codes} and code_dims {self.code_dims} must name the same groups, at least one"
            )
        if min(self.num_codes) < 1 or min(self.code_dims) < 1 or self.temperature <= 0:
            raise ValueError(
                f"num_codes {self.num_codes}, code_dims {self.code_dims} and temperature {self.temperature:g} must be above 0"
            )

    @property
    def dim(self) -> int:
        """Width of a frame, before and after."""
        return sum(self.code_dims)

    def check(self, dim: int, where: str) -> None:
        """Raises ValueError unless the groups make up a frame of width ``dim``; ``where`` tells which frame."""
        if self.dim != dim:
            raise ValueError(f"code_dims {self.code_dims} add up to {self.dim}, {where} is {dim} wide")


class Codebook(nn.Module):
    """One group: (…, E) to the code of each frame.

    Its logits are parameters of its own, no linear layer: int8 would tip choices between codes that are near each other.
    """

    def __init__(self, num_codes: int, code_dim: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Parameter(torch.empty(num_codes, code_dim))
        self.bias = nn.Parameter(torch.empty(num_codes))
        self.codes = nn.Parameter(torch.empty(num_codes, code_dim))

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """torch's default for the two linear maps that S3PRL has here."""
        num_codes, code_dim = self.weight.shape
        for tensor, fan_in in ((self.weight, code_dim), (self.bias, code_dim), (self.codes, num_codes)):
            nn.init.uniform_(tensor, -(fan_in**-0.5), fan_in**-0.5, generator=generator)

    def logits(self, x: Tensor) -> Tensor:
        """Returns (…, V), in float32."""
        with torch.autocast(x.device.type, enabled=False):  # a choice between 512 codes needs more than bfloat16's 8 bits
            return F.linear(x.float(), self.weight.float(), self.bias.float())

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns the codes of frames (M, E).

        Args:
            x: (M, E).
            noise: (M, V) Gumbel noise; None takes the largest logit, without gradients for the logits.
        """
        logits_MV = self.logits(x)
        if noise is None:
            return self.codes[logits_MV.argmax(-1)]
        soft_MV = ((logits_MV + noise) / self.temperature).softmax(-1)
        hard_MV = F.one_hot(soft_MV.argmax(-1), soft_MV.shape[-1]).to(soft_MV.dtype)
        return (hard_MV + soft_MV - soft_MV.detach()) @ self.codes.float()  # the gradient is that of the soft choice


class Quantizer(nn.Module):
    """(B, T, D) to codes of the same width, group by group."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        pairs = zip(config.num_codes, config.code_dims, strict=True)
        self.groups = nn.ModuleList(Codebook(codes, dim, config.temperature) for codes, dim in pairs)

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draws every codebook."""
        for group in self.groups:
            group.initialize(generator)  # type: ignore[operator]

    def choices(self, x_BTD: Tensor) -> Tensor:
        """Returns (B, T, G): the number of the code that each group takes, counted from 0."""
        parts = x_BTD.split(list(self.config.code_dims), dim=-1)
        return torch.stack([g.logits(part).argmax(-1) for g, part in zip(self.groups, parts, strict=True)], dim=-1)  # type: ignore[operator]

    def code_entropy(self, x_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Returns the entropy in nats of the choices of all valid frames together, mean over groups: 0 for a single code."""
        chosen_MG = self.choices(x_BTD)[valid_mask(lengths_B, x_BTD.shape[1])]
        entropies = []
        for group, num_codes in enumerate(self.config.num_codes):
            counts_V = torch.bincount(chosen_MG[:, group], minlength=num_codes).float()
            entropies.append(torch.special.entr(counts_V / counts_V.sum().clamp(min=1)).sum())
        return torch.stack(entropies).mean()

    def forward(self, x_BTD: Tensor, lengths_B: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Replaces each frame by its codes.

        While training, noise is drawn for valid frames alone, one utterance after the other: what an utterance is padded to
        changes no choice.

        Args:
            x_BTD: Frames.
            lengths_B: Valid frames; None when nothing is padded. Frames beyond them become zero.
            generator: Draws the noise, on the frames' device; None for torch's own, as dropout has it.
        """
        valid_BT = None if lengths_B is None else valid_mask(lengths_B, x_BTD.shape[1])
        frames_MD = x_BTD.flatten(0, 1) if valid_BT is None else x_BTD[valid_BT]
        noises: list[Tensor | None] = [None] * len(self.config.num_codes)
        if self.training:
            noise = gumbel_noise(len(frames_MD), sum(self.config.num_codes), x_BTD.device, generator)
            noises = list(noise.split(list(self.config.num_codes), dim=-1))
        parts = frames_MD.split(list(self.config.code_dims), dim=-1)
        codes = [group(part, noise) for group, part, noise in zip(self.groups, parts, noises, strict=True)]
        chosen_MD = torch.cat(codes, dim=-1).to(x_BTD.dtype)
        if valid_BT is None:
            return chosen_MD.view(x_BTD.shape)
        return torch.zeros_like(x_BTD).masked_scatter(valid_BT[..., None], chosen_MD)


def gumbel_noise(num_frames: int, num_codes: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Returns (M, V) float32 draws of the standard Gumbel distribution."""
    uniform_MV = torch.rand(num_frames, num_codes, device=device, generator=generator)
    return -(-uniform_MV.clamp(SMALLEST, LARGEST).log()).log()
