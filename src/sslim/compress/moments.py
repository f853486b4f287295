"""Means and covariances of what the maps of an encoder take or give on calibration speech."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sslim.batch import Padded, valid_mask
from sslim.compress.calibration import Calibration
from sslim.models import SpeechModel
from sslim.models.stacking import stack_given


@dataclass(frozen=True, kw_only=True)
class Watched:
    """One side of a module.

    Attributes:
        path: Name of the module in the model.
        of_input: Whether what it takes counts, not what it gives.
    """

    path: str
    of_input: bool


@dataclass(frozen=True, kw_only=True)
class Moments:
    """First and second moments over frames; float64 on the CPU.

    Attributes:
        watched: What they are of.
        mean: (k,).
        covariance: (k, k), divided by the number of frames.
    """

    watched: Watched
    mean: Tensor
    covariance: Tensor


def gather_moments(model: SpeechModel, watched: Collection[Watched], calibration: Calibration) -> dict[Watched, Moments]:
    """Runs a model over calibration speech and sums up what passes.

    Every valid frame of all batches counts, in a block that runs at several depths as often as it runs.

    Args:
        model: Its mode stays as it is; it runs in eval mode.
        watched: Sides of modules of its encoder.
        calibration: Its ``features``.

    Returns:
        The moments of every side; of a block that no layer uses there are none.

    Raises:
        ValueError: A sum is not finite, or there are no frames.
    """
    sums = {side: _Sums() for side in watched}
    lengths: list[Tensor] = []  # those of the batch that runs
    hooks = [
        model.get_submodule(side.path).register_forward_hook(_adder(total, lengths, side.of_input))
        for side, total in sums.items()
    ]
    was_training = model.training
    try:
        model.eval()
        for batch in calibration.features:
            batch = Padded(values=batch.values, lengths=batch.lengths.to(batch.values.device))
            lengths[:] = [stack_given(batch, model.config.projection.stack).lengths]
            _run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    if sums and not any(total.count for total in sums.values()):
        raise ValueError("calibration speech has no frames: all its utterances are empty")
    return {side: _moments(side, total) for side, total in sums.items() if total.count}


class _Sums:
    """Running sums over frames."""

    def __init__(self) -> None:
        self.count, self.first, self.second = 0, torch.zeros(()), torch.zeros(())

    def add(self, x_RK: Tensor) -> None:
        x_RK = x_RK.double()
        self.count += len(x_RK)
        self.first = self.first.to(x_RK) + x_RK.sum(0)
        self.second = self.second.to(x_RK) + x_RK.T @ x_RK


def _adder(sums: _Sums, lengths: Sequence[Tensor], of_input: bool) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        x_BTK = inputs[0] if of_input else output
        sums.add(x_BTK[valid_mask(lengths[0], x_BTK.shape[1])])

    return hook


def _run(model: SpeechModel, batch: Padded) -> None:
    """Encodes a batch in one piece: ``encode_features`` may run it in several, whose lengths the hooks could not know."""
    with torch.no_grad():
        embedded = model.embed(batch)
        full = bool((batch.lengths == batch.values.shape[1]).all())
        model.transformer(embedded.values, None if full else embedded.lengths)


def _moments(watched: Watched, sums: _Sums) -> Moments:
    mean, second = (total.cpu() / sums.count for total in (sums.first, sums.second))
    if not bool(torch.isfinite(second).all()):
        raise ValueError(f"what {watched.path} is given on calibration speech is not finite: the model or the speech is broken")
    return Moments(watched=watched, mean=mean, covariance=second - torch.outer(mean, mean))
