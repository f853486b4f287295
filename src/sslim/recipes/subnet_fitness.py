"""How good a subnet is without training: an objective's loss on fixed crops, fixed masks and one pass of the teacher.

Everything that is random or costly and the same for all subnets is done once: crops, masks, front-end (no subnet cuts it) and
the teacher's targets are prepared and kept. LightHuBERT's search drew new masks and ran the teacher anew for every candidate;
its ranking was as noisy as the masks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sslim.compress.search_journal import Fitness
from sslim.data.corpus import Corpus
from sslim.data.labels import LabelStore
from sslim.models import SpeechModel
from sslim.models.elastic import model_units, model_view
from sslim.models.search_space import Subnet
from sslim.objectives import (
    Distillation,
    DistillationConfig,
    MaskedPrediction,
    MaskedPredictionConfig,
    MaskingConfig,
    TargetConfig,
)
from sslim.objectives.model_inputs import mask_place
from sslim.recipes.corpus_batches import DataConfig, make_batches, split_utterances


@dataclass(frozen=True, kw_only=True)
class FitnessConfig:
    """What a subnet's loss is measured on.

    Attributes:
        num_utterances: Validation utterances at most, drawn by the seed; they are divided into two halves.
        crop_s: Longer utterances are cut to this.
        batch_s: Seconds of audio in a batch.
        valid_split: Split to validate on; None is dev or valid(ation), else a held-out share of the rest.
        train_splits: Splits that are held out from; None is all but dev, test and validation.
        valid_share: That share, where no split is for validation. A search holds out what its supernet's training held out.
        split_seed: Decides the utterances held out.
        objective: The distillation loss; None is the mean L1 distance from the mean of the teacher's last ``target_layers``
            layers. A search takes the loss that its supernet was trained with.
        prediction: The loss where labels are predicted; None hides frames as :class:`MaskingConfig` does, and only these count.
            A search takes that of its supernet's training here too.
        masking: Hidden frames, in place of the objective's; the loss then covers these only.
        target_layers: The teacher's last so many layers as targets, in place of the objective's.
        mask_at: Where masked prediction hides frames: ``features`` or ``projection``; None as ``prediction`` says, else where
            the mask embedding fits, or as HuBERT (convolutional front-end: after the projection) and MelHuBERT (features) do.
        seed: Decides which of the validation utterances count, crops and masks.
    """

    num_utterances: int = 200
    crop_s: float = 10.0
    batch_s: float = 30.0
    valid_split: str | None = None
    train_splits: tuple[str, ...] | None = None
    valid_share: float = 0.1
    split_seed: int = 0
    objective: DistillationConfig | None = None
    prediction: MaskedPredictionConfig | None = None
    masking: MaskingConfig | None = None
    target_layers: int | None = None
    mask_at: Literal["features", "projection"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_utterances < 2:
            raise ValueError(f"{self.num_utterances} utterances to validate on are too few; a search needs 2 or more")
        for name in ("crop_s", "batch_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name):g}; expected seconds above 0")
        if self.masking is not None and self.masking.probability == 0:
            raise ValueError("mask probability 0 hides no frame, so nothing would be compared; expected more, up to 1")


class SubnetFitness:
    """Loss of any subnet of a supernet.

    Args:
        objective: Holds the supernet; runs on a view of a subnet in its place (``training.Objective``).
        supernet: The same.
        halves: Prepared batches of two disjoint halves of the validation data.
    """

    def __init__(self, objective: nn.Module, supernet: SpeechModel, halves: Sequence[Sequence[Any]]) -> None:
        names = [name for name, child in objective.named_children() if child is supernet]
        assert len(names) == 1, "the objective holds the supernet"
        self.objective, self.supernet, self.name, self.halves = objective.eval(), supernet.eval(), names[0], halves
        self.totals = [_totals(half) for half in halves]

    @torch.inference_mode()
    def __call__(self, subnet: Subnet) -> Fitness:
        """Returns the loss on all the data, and on each half."""
        running = copy.copy(self.objective)
        view = model_view(self.supernet, model_units(self.supernet.config, subnet)).eval()
        running._modules = {**self.objective._modules, self.name: view}
        losses = [
            sum(float(running(prepared, totals).loss) for prepared in half)
            for half, totals in zip(self.halves, self.totals, strict=True)
        ]
        counts = [float(next(iter(totals.values()))) for totals in self.totals]
        loss = sum(part * count for part, count in zip(losses, counts, strict=True)) / sum(counts)
        if not math.isfinite(loss):
            return Fitness(loss=math.inf, halves=tuple(part if math.isfinite(part) else math.inf for part in losses))
        return Fitness(loss=loss, halves=tuple(losses))


def _totals(half: Sequence[Any]) -> dict[str, Tensor]:
    return {name: torch.stack([prepared.weights[name] for prepared in half]).sum() for name in half[0].weights}


def held_out(corpus: Corpus, config: FitnessConfig) -> np.ndarray:
    """Returns the utterances to validate on, corpus indices."""
    data = DataConfig(valid_split=config.valid_split, train_splits=config.train_splits, valid_share=config.valid_share)
    return split_utterances(corpus, data, config.split_seed)[1]


def halves_of(corpus: Corpus, config: FitnessConfig) -> list[np.ndarray]:
    """Returns two disjoint halves of the validation utterances, corpus indices.

    Raises:
        ValueError: Fewer than two utterances to validate on.
    """
    valid = held_out(corpus, config)
    if len(valid) < 2:
        raise ValueError(
            f"corpus {corpus.name} has {len(valid)} utterances to validate on, and a search needs 2 or more: "
            "name another split to validate on, or search with another corpus"
        )
    drawn = np.random.default_rng([config.seed, 2]).permutation(valid)[: config.num_utterances]
    return [np.sort(drawn[::2]), np.sort(drawn[1::2])]


def distillation_of(teacher: SpeechModel, config: FitnessConfig) -> DistillationConfig:
    """Returns the loss that subnets are compared by.

    Raises:
        ValueError: More target layers than the teacher has.
    """
    objective, count = config.objective, config.target_layers
    if objective is None:
        objective = DistillationConfig(target=TargetConfig(layers=(teacher.num_layers,), average=True), cosine_weight=0.0)
    if count is not None:
        if not 1 <= count <= teacher.num_layers:
            raise ValueError(f"target_layers is {count}; the teacher has {teacher.num_layers} layers")
        layers = tuple(range(teacher.num_layers - count + 1, teacher.num_layers + 1))
        objective = replace(objective, target=replace(objective.target, layers=layers))
    if config.masking is not None:
        objective = replace(objective, masking=config.masking, loss_frames="masked")
    return objective


def prediction_of(supernet: SpeechModel, config: FitnessConfig) -> MaskedPredictionConfig:
    """Returns the loss that subnets are compared by where labels are predicted; the same front-end for all costs nothing."""
    prediction = config.prediction or MaskedPredictionConfig(mask_at=mask_place(supernet.config))
    prediction = replace(prediction, mask_at=config.mask_at or prediction.mask_at, feature_penalty=0.0)
    if config.masking is not None:
        prediction = replace(prediction, masking=config.masking, unmasked_weight=0.0)
    return prediction


def build_fitness(
    supernet: SpeechModel,
    teacher: SpeechModel | None,
    corpus: Corpus,
    labels: LabelStore | None,
    config: FitnessConfig,
    device: str = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> SubnetFitness:
    """Prepares everything that is the same for all subnets.

    Args:
        supernet: With its search space; its front-end is taken as it is.
        teacher: Whose frames are the targets; None with ``labels``.
        corpus: Whose validation part is used.
        labels: Targets of masked prediction; None with a teacher.
        config: Crops, masks, targets.
        device: Where models run.
        say: Told how many utterances count.

    Raises:
        ValueError: A head is missing, frames do not fit, or there is nothing to validate on.
    """
    supernet = supernet.to(device).eval()
    if labels is not None:
        objective: nn.Module = MaskedPrediction(supernet, prediction_of(supernet, config))
    else:
        assert teacher is not None
        objective = Distillation(supernet, teacher.to(device), distillation_of(teacher, config))
    if hasattr(objective, "trains_frontend"):  # no subnet cuts the front-end: its output is computed once, in prepare
        objective.trains_frontend = False  # type: ignore[assignment]
    data = DataConfig(batch_s=config.batch_s, crop_s=config.crop_s)
    chosen, halves = halves_of(corpus, config), []
    say(f"subnets are compared on {sum(map(len, chosen))} utterances")
    for number, utterances in enumerate(chosen):
        batches = make_batches(corpus, labels, utterances, supernet, data, config.seed, shuffle=False)
        _check_inputs(corpus, supernet, teacher, batches.facts.is_waveform)
        prepared = []
        for index in range(len(batches)):
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + 2 * index + number)
            with torch.no_grad():
                prepared.append(objective.prepare(batches[0, index].to(device), generator))  # type: ignore[operator]
        halves.append(prepared)
    return SubnetFitness(objective, supernet, halves)


def _check_inputs(corpus: Corpus, supernet: SpeechModel, teacher: SpeechModel | None, is_waveform: bool) -> None:
    """Both models read the same batch: stored features only where they suit both."""
    if teacher is None or is_waveform or supernet.frontend is None or teacher.frontend is None:
        return
    if getattr(teacher.frontend.config, "features", None) != getattr(supernet.frontend.config, "features", None):
        raise ValueError(f"corpus {corpus.name} holds the supernet's features, not the teacher's: prepare one without features")
