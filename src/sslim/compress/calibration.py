"""Speech on which compression methods look at a model: what its layers are given, and how its loss reacts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sslim.batch import Padded
from sslim.models import SpeechModel


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Batches prepared once: the same crops, masks and targets for every model that is looked at.

    Attributes:
        features: Front-end output (B, T, F) of every batch, on the model's device; methods that cut no front-end start here.
        losses: For every batch a function from a model to its differentiable share of the mean loss; the shares add up to the
            mean over all frames that count. Empty where a method needs no loss. The model has to be in eval mode.
    """

    features: tuple[Padded, ...]
    losses: tuple[Callable[[SpeechModel], Tensor], ...] = ()

    def __post_init__(self) -> None:
        if not self.features:
            raise ValueError("calibration speech has no batches: name a corpus with at least one utterance")
