"""How good a subnet is without training: an objective's loss on fixed crops, fixed masks and one pass of the teacher.

Everything that is random or costly and the same for all subnets is done once: crops, masks, front-end (no subnet cuts it) and
the teacher's targets are prepared and kept. LightHuBERT's search drew new masks and ran the teacher anew for every candidate;
its ranking was as noisy as the masks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sslim.compress.search_journal import Fitness
from sslim.data.corpus import Corpus
from sslim.data.labels import LabelStore
from sslim.frontends import ConvFrontend
from sslim.models import SpeechModel
from sslim.models.elastic import model_units, model_view
from sslim.models.search_space import Subnet
from sslim.nn.heads import MaskEmbeddingConfig
from sslim.objectives import (
    Distillation,
    DistillationConfig,
    MaskedPrediction,
    MaskedPredictionConfig,
    MaskingConfig,
    TargetConfig,
)
from sslim.recipes.corpus_batches import DataConfig, make_batches, split_utterances

MASK = "mask"


@dataclass(frozen=True, kw_only=True)
class FitnessConfig:
    """What a subnet's loss is measured on.

    Attributes:
        num_utterances: Validation utterances at most, drawn by the seed; they are divided into two halves.
        crop_s: Longer utterances are cut to this.
        batch_s: Seconds of audio in a batch.
        valid_split: Split to validate on; None is dev or valid(ation), else a held-out share of the rest.
        objective: The distillation loss; None is the mean L1 distance from the mean of the teacher's last ``target_layers``
            layers. A search takes the loss that its supernet was trained with.
        masking: Hidden frames, in place of the objective's; the loss then covers these only.
        target_layers: The teacher's last so many layers as targets, in place of the objective's.
        mask_at: Where masked prediction hides frames: ``features`` or ``projection``; None where the mask embedding fits, or as
            HuBERT (convolutional front-end: after the projection) and MelHuBERT (features) do.
        seed: Decides utterances, crops and masks.
    """

    num_utterances: int = 200
    crop_s: float = 10.0
    batch_s: float = 60.0
    valid_split: str | None = None
    objective: DistillationConfig | None = None
    masking: MaskingConfig | None = None
    target_layers: int | None = None
    mask_at: Literal["features", "projection"] | None = None
    seed: int = 0


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


def halves_of(corpus: Corpus, config: FitnessConfig) -> list[np.ndarray]:
    """Returns two disjoint halves of the validation utterances, corpus indices.

    Raises:
        ValueError: Fewer than two utterances to validate on.
    """
    data = DataConfig(valid_split=config.valid_split, valid_share=0.1)
    _, valid = split_utterances(corpus, data, config.seed)
    if len(valid) < 2:
        raise ValueError(f"corpus {corpus.name} has {len(valid)} utterances to validate on; a search needs 2 or more")
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


def build_fitness(
    supernet: SpeechModel,
    teacher: SpeechModel | None,
    corpus: Corpus,
    labels: LabelStore | None,
    config: FitnessConfig,
    device: str = "cpu",
) -> SubnetFitness:
    """Prepares everything that is the same for all subnets.

    Args:
        supernet: With its search space; its front-end is taken as it is.
        teacher: Whose frames are the targets; None with ``labels``.
        corpus: Whose validation part is used.
        labels: Targets of masked prediction; None with a teacher.
        config: Crops, masks, targets.
        device: Where models run.

    Raises:
        ValueError: A head is missing, frames do not fit, or there is nothing to validate on.
    """
    supernet = supernet.to(device).eval()
    if labels is not None:
        mask_at = config.mask_at or _mask_place(supernet)
        masked = MaskedPredictionConfig(masking=config.masking or MaskingConfig(), mask_at=mask_at)
        objective: nn.Module = MaskedPrediction(supernet, masked)
    else:
        assert teacher is not None
        objective = Distillation(supernet, teacher.to(device), distillation_of(teacher, config))
    if hasattr(objective, "trains_frontend"):  # no subnet cuts the front-end: its output is computed once, in prepare
        objective.trains_frontend = False  # type: ignore[assignment]
    data = DataConfig(batch_s=config.batch_s, crop_s=config.crop_s)
    halves = []
    for number, utterances in enumerate(halves_of(corpus, config)):
        batches = make_batches(corpus, labels, utterances, supernet, data, config.seed, shuffle=False)
        _check_inputs(corpus, supernet, teacher, batches.facts.is_waveform)
        prepared = []
        for index in range(len(batches)):
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + 2 * index + number)
            with torch.no_grad():
                prepared.append(objective.prepare(batches[0, index].to(device), generator))  # type: ignore[operator]
        halves.append(prepared)
    return SubnetFitness(objective, supernet, halves)


def _mask_place(model: SpeechModel) -> Literal["features", "projection"]:
    head, widths = model.config.heads.get(MASK), (model.config.projection.feature_dim, model.config.encoder.dim)
    if isinstance(head, MaskEmbeddingConfig) and widths[0] != widths[1]:
        return "projection" if head.dim == widths[1] else "features"
    return "projection" if isinstance(model.frontend, ConvFrontend) else "features"


def _check_inputs(corpus: Corpus, supernet: SpeechModel, teacher: SpeechModel | None, is_waveform: bool) -> None:
    """Both models read the same batch: stored features only where they suit both."""
    if teacher is None or is_waveform or supernet.frontend is None or teacher.frontend is None:
        return
    if getattr(teacher.frontend.config, "features", None) != getattr(supernet.frontend.config, "features", None):
        raise ValueError(f"corpus {corpus.name} holds the supernet's features, not the teacher's: prepare one without features")
