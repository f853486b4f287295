"""LNSR: how much of a perturbation of the input arrives in each layer, for worst-case (PGD) and for Gaussian noise.

The layer-wise noise-to-signal ratio is the mean over utterances of ``||H_l(x') - H_l(x)|| / ||H_l(x)||``, with H_l (T, D) a
layer's valid frames (Wu et al. 2020, arXiv 2006.03214). The paper describes an L2 norm, which is ``frobenius`` here; S3PRL's
script takes the largest singular value instead, which is ``spectral``. The script reads adversarial files made elsewhere, for
another model; here the noise is made for the model itself, without labels: projected gradient ascent (Madry et al. 2018, arXiv
1706.06083) on the relative change of one layer, in an L-infinity ball, from a random start. One step is FGSM.

Gaussian noise is scaled, utterance by utterance, to the L2 norm of the PGD noise: both are equally loud.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sslim.batch import EncoderOutput, Padded, valid_mask
from sslim.models.encoding import Inputs, length_batches, pad_batch
from sslim.models.speech import SpeechModel

PGD, GAUSSIAN = "pgd", "gaussian"
STEP_SHARE = 2.5  # a step of PGD is this share of the radius, divided by the number of steps: it can cross the ball


@dataclass(frozen=True, kw_only=True)
class LnsrConfig:
    """How inputs are perturbed.

    Attributes:
        perturb: ``features``: what the front-end gives to the encoder; ``waveform``: samples.
        epsilons: Largest change of a single value, as a share of the utterance's root mean square; so the noise-to-signal ratio
            of the input is at most epsilon, and 0.1 is a signal-to-noise ratio of at least 20 dB.
        steps: Steps of PGD.
        attacked_layer: Layer whose relative change PGD raises; 0 enters the first block, None is the last one.
        norm: Of the (T, D) frames of a layer.
        batch_s: Seconds of padded audio in a batch.
        seed: Decides all noise, utterance by utterance, however they are batched.
    """

    perturb: Literal["features", "waveform"] = "features"
    epsilons: tuple[float, ...] = (0.03, 0.1, 0.3)
    steps: int = 10
    attacked_layer: int | None = None
    norm: Literal["frobenius", "spectral"] = "frobenius"
    batch_s: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.epsilons or not all(0 <= epsilon < math.inf for epsilon in self.epsilons):
            raise ValueError(f"epsilons are {list(self.epsilons)}; expected at least one share of the input, 0 or above")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; PGD needs at least 1 step")


@dataclass(frozen=True, kw_only=True)
class LnsrCurve:
    """One kind of noise of one size.

    Attributes:
        noise: ``pgd`` or ``gaussian``.
        epsilon: Its size.
        input: Noise-to-signal ratio of what was perturbed, mean over utterances.
        layers: LNSR of layers 0 (enters the first block) to N.
        layers_sd: Standard deviation over utterances, likewise.
    """

    noise: str
    epsilon: float
    input: float
    layers: list[float]
    layers_sd: list[float]


def relative_changes(clean: EncoderOutput, noisy: EncoderOutput, norm: str = "frobenius") -> Tensor:
    """Returns (B, N + 1) ``||noisy - clean|| / ||clean||`` of each utterance and layer; padding is zero in both.

    Args:
        clean: With its layers.
        noisy: Likewise, of the same lengths.
        norm: ``frobenius`` or ``spectral``.
    """
    of_layers = [_norm(b - a, norm) / _norm(a, norm) for a, b in zip(clean.layers, noisy.layers, strict=True)]
    return torch.stack(of_layers, dim=1)


def _norm(x_BTD: Tensor, norm: str) -> Tensor:
    return x_BTD.flatten(1).norm(dim=1) if norm == "frobenius" else torch.linalg.matrix_norm(x_BTD, ord=2)


def measure_lnsr(
    model: SpeechModel, inputs: Inputs, config: LnsrConfig, *, tell: Callable[[int, int], None] = lambda done, total: None
) -> list[LnsrCurve]:
    """Measures a PGD and a Gaussian curve for every epsilon.

    Args:
        model: In eval mode; its gradients stay as they are.
        inputs: Utterances of at least one frame, waveforms where these are to be perturbed.
        config: How.
        tell: Called with utterances done and in all.

    Raises:
        ValueError: There is no such layer, waveforms are to be perturbed and features were given, or a layer is all zero.
    """
    layer = model.num_layers if config.attacked_layer is None else config.attacked_layer
    if not 0 <= layer <= model.num_layers:
        raise ValueError(f"attacked_layer is {layer}; this model has layers 0 to {model.num_layers}")
    if config.perturb == "waveform" and not inputs.is_waveform:
        raise ValueError("perturb is 'waveform', but the utterances are features; expected waveforms")
    shape = (len(inputs.lengths), model.num_layers + 2)  # the input itself, then the layers
    found = {(noise, epsilon): np.zeros(shape) for epsilon in config.epsilons for noise in (PGD, GAUSSIAN)}
    done = 0
    for positions, batch, encode in _batches(model, inputs, config):
        with torch.no_grad():
            clean = encode(batch)
        for epsilon in config.epsilons:
            noises = _noises(encode, batch, clean, positions, epsilon, layer, config)
            for noise, delta in noises.items():
                with torch.no_grad():
                    noisy = encode(Padded(values=batch.values + delta, lengths=batch.lengths))
                    ratios = relative_changes(clean, noisy, config.norm)
                    first = _row_norms(delta) / _row_norms(batch.values)
                found[noise, epsilon][positions] = torch.cat([first[:, None], ratios], dim=1).double().cpu().numpy()
        done += len(positions)
        tell(done, len(inputs.lengths))
    return [_curve(noise, epsilon, values) for (noise, epsilon), values in found.items()]


def _curve(noise: str, epsilon: float, ratios_UL: np.ndarray) -> LnsrCurve:
    if not np.isfinite(ratios_UL).all():
        raise ValueError("a layer of an utterance is all zero or not finite: its noise-to-signal ratio does not exist")
    spread = ratios_UL.std(0, ddof=1) if len(ratios_UL) > 1 else np.zeros(ratios_UL.shape[1])
    mean = ratios_UL.mean(0).tolist()
    return LnsrCurve(noise=noise, epsilon=epsilon, input=mean[0], layers=mean[1:], layers_sd=spread[1:].tolist())


Encode = Callable[[Padded], EncoderOutput]


def _batches(model: SpeechModel, inputs: Inputs, config: LnsrConfig) -> Iterator[tuple[list[int], Padded, Encode]]:
    """Positions, what is perturbed, and how it is encoded."""
    for positions in length_batches(inputs.lengths, config.batch_s / inputs.unit_s):
        batch = pad_batch(model, [inputs.read(position) for position in positions], is_waveform=inputs.is_waveform)
        if inputs.is_waveform and config.perturb == "features":
            assert model.frontend is not None
            with torch.no_grad():
                batch = model.frontend(batch.values, batch.lengths)
        run = model.encode if config.perturb == "waveform" else model.encode_features
        yield positions, batch, lambda padded, run=run: run(padded.values, padded.lengths)  # type: ignore[misc]


def _row_norms(values: Tensor) -> Tensor:
    return values.flatten(1).norm(dim=1)


def _draw(batch: Padded, positions: list[int], seed: int, kind: int, *, uniform: bool) -> Tensor:
    """Noise on the valid values, a function of seed, kind and the utterance alone: U(-1, 1) or N(0, 1)."""
    noise = torch.zeros(batch.values.shape)
    for row, (position, length) in enumerate(zip(positions, batch.lengths.tolist(), strict=True)):
        generator = np.random.default_rng([seed, kind, position])
        shape = (length, *batch.values.shape[2:])
        drawn = generator.uniform(-1, 1, shape) if uniform else generator.standard_normal(shape)
        noise[row, :length] = torch.from_numpy(drawn)
    return noise.to(batch.values)


def _noises(
    encode: Encode, batch: Padded, clean: EncoderOutput, positions: list[int], epsilon: float, layer: int, config: LnsrConfig
) -> dict[str, Tensor]:
    """PGD noise in the ball of ``epsilon``, and Gaussian noise of the same L2 norm."""
    trailing = (1,) * (batch.values.dim() - 1)
    counts_B = batch.lengths * math.prod(batch.values.shape[2:])
    radii = (epsilon * _row_norms(batch.values) / counts_B.clamp(min=1).sqrt()).view(-1, *trailing)
    start = radii * _draw(batch, positions, config.seed, 0, uniform=True)
    pgd = ascend(encode, batch, clean, start, radii, layer=layer, steps=config.steps)
    gaussian = _draw(batch, positions, config.seed, 1, uniform=False)
    scale = _row_norms(pgd) / _row_norms(gaussian).clamp(min=1e-20)
    return {PGD: pgd, GAUSSIAN: gaussian * scale.view(-1, *trailing)}


def ascend(
    encode: Encode, batch: Padded, clean: EncoderOutput, start: Tensor, radii: Tensor, *, layer: int, steps: int
) -> Tensor:
    """Projected gradient ascent on the relative change of a layer; each utterance keeps the best noise that was met.

    Args:
        encode: Padded input to output, differentiable.
        batch: The clean input.
        clean: What it gives.
        start: First noise, of the input's shape, inside the ball; at zero the change has no gradient.
        radii: (B, 1, ...) largest change of a value of each utterance.
        layer: Whose change is raised.
        steps: Steps of ``STEP_SHARE * radii / steps`` along the gradient's signs.

    Returns:
        The noise, zero on padding.
    """
    shape = (*batch.values.shape[:2], *(1,) * (batch.values.dim() - 2))
    valid = valid_mask(batch.lengths, batch.values.shape[1]).view(shape)
    whole_B = clean.layers[layer].flatten(1).square().sum(1)
    delta, best, best_B = start, start, torch.full_like(whole_B, -1.0)
    for step in range(steps + 1):
        delta = delta.detach().requires_grad_(step < steps)
        with torch.set_grad_enabled(step < steps):
            noisy = encode(Padded(values=batch.values + delta, lengths=batch.lengths))
            change_B = (noisy.layers[layer] - clean.layers[layer]).flatten(1).square().sum(1) / whole_B
        better_B = change_B.detach() > best_B
        best = torch.where(better_B.view(radii.shape), delta.detach(), best)
        best_B = torch.where(better_B, change_B.detach(), best_B)
        if step < steps:
            (gradient,) = torch.autograd.grad(change_B.sum(), delta)
            moved = delta.detach() + STEP_SHARE / steps * radii * gradient.sign()
            delta = torch.maximum(torch.minimum(moved, radii), -radii) * valid
    return best
