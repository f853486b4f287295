"""Calibration speech for compression: the same crops, masks and targets for every model that is looked at.

The loss is masked prediction where labels are named, as in MelHuBERT's compression, or masked reconstruction where that is
asked for. Else the model teaches itself: it sees speech with frames hidden and is compared with its own layers on the whole
speech (nothing hidden, the loss and every gradient would be zero). Unlike the reference's scores these have no dropout, masks
that are drawn once, and all batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sslim.batch import Padded
from sslim.compress.calibration import Calibration
from sslim.config import OMIT_DEFAULT
from sslim.data.corpus import Corpus
from sslim.data.labels import LabelStore
from sslim.models import SpeechModel
from sslim.objectives import (
    AlterationConfig,
    Distillation,
    DistillationConfig,
    MaskedPrediction,
    MaskedPredictionConfig,
    MaskingConfig,
    Reconstruction,
    ReconstructionConfig,
    TargetConfig,
)
from sslim.objectives.masked_prediction import HEAD
from sslim.objectives.model_inputs import frontend_output, mask_place
from sslim.recipes.corpus_batches import DataConfig, make_batches, split_utterances
from sslim.recipes.distil_losses import thirds
from sslim.recipes.pretrain import give_statistics, label_set

MASKING = MaskingConfig(probability=0.5, span_length=5)
RECONSTRUCTION = ReconstructionConfig(alteration=AlterationConfig(time_share=0.3, span_min=5, span_max=5, dice="span"))


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """What speech a method looks at.

    Attributes:
        num_utterances: Training utterances, drawn by the seed.
        crop_s: Longer utterances are cut to this.
        batch_s: Seconds of audio in a batch.
        seed: Decides utterances, crops and masks.
        labels: Label set for masked prediction; None compares the model with itself, or takes those that it is trained on.
        reconstruct: Whether losses are of masked reconstruction, by the model's own head, as they are in any case where the
            model is trained by that after the cut.
        device: Where the model looks at it: ``auto``, ``cpu`` or ``cuda``.
    """

    num_utterances: int = 200
    crop_s: float = 10.0
    batch_s: float = 60.0
    seed: int = 0
    labels: str | None = field(default=None, metadata={OMIT_DEFAULT: True})
    reconstruct: bool = field(default=False, metadata={OMIT_DEFAULT: True})
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={OMIT_DEFAULT: True})

    def __post_init__(self) -> None:
        if self.reconstruct and self.labels is not None:
            raise ValueError(f"calibration has labels {self.labels!r} and reconstruct: a loss is of one or the other")
        if self.num_utterances < 1:
            raise ValueError(f"num_utterances is {self.num_utterances}; calibration needs at least 1 utterance")
        for name in ("crop_s", "batch_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} of calibration is {getattr(self, name)}; expected seconds above 0")


def calibrate(
    model: SpeechModel,
    corpus_folder: Path,
    config: CalibrationConfig,
    *,
    labels_name: str | None = None,
    prediction: MaskedPredictionConfig | None = None,
    reconstruct: bool = False,
    device: str = "cpu",
) -> Calibration:
    """Prepares calibration speech for a model.

    Args:
        model: The model that is to be compressed; its front-end computes the features once.
        corpus_folder: A prepared corpus.
        config: How much of it.
        labels_name: Label set for masked prediction; None compares the model with itself.
        prediction: How labels are predicted; None hides half of the frames.
        reconstruct: Compare what the model's head ``reconstruction`` restores, and not the model with itself.
        device: Where batches are kept and losses computed.

    Raises:
        ValueError: The corpus does not hold what the model reads, or the model's head is not for the labels that are named, or
            not for the features that are to be restored.
    """
    corpus = Corpus.open(corpus_folder)
    model = copy.deepcopy(model).to(device).eval()
    give_statistics(model, corpus)
    labels = None if labels_name is None else corpus.labels(label_set(corpus, labels_name))
    if labels is not None and (missing := no_head_for(labels, model)):
        raise ValueError(f"label set {labels.name} is named for scores, but {missing}: leave it out")
    objective: nn.Module
    if reconstruct:
        objective = _fixed(Reconstruction(model, RECONSTRUCTION))
    else:
        objective = _self_distillation(model) if labels is None else _prediction(model, prediction)
    data = DataConfig(batch_s=config.batch_s, crop_s=config.crop_s)
    utterances, _ = split_utterances(corpus, data, config.seed)
    drawn = np.sort(np.random.default_rng([config.seed, 3]).permutation(utterances)[: config.num_utterances])
    batches = make_batches(corpus, labels, drawn, model, data, config.seed, shuffle=False)
    prepared, features = [], []
    for index in range(len(batches)):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
        batch = batches[0, index].to(device)
        with torch.no_grad():
            prepared.append(objective.prepare(batch, generator))  # type: ignore[operator]
            whole = frontend_output(model, Padded(values=batch.inputs.float(), lengths=batch.lengths)) if reconstruct else None
        features.append(whole or Padded(values=prepared[-1].inputs.values.detach(), lengths=prepared[-1].inputs.lengths))
    names = prepared[0].weights
    totals = {name: torch.stack([item.weights[name] for item in prepared]).sum().clamp(min=1) for name in names}
    return Calibration(
        features=tuple(features),
        losses=tuple(_loss(objective, item, totals) for item in prepared),
    )


def no_head_for(labels: LabelStore, model: SpeechModel) -> str | None:
    """Returns why a model cannot predict labels; None where it has a head over as many clusters."""
    clusters = getattr(model.config.heads.get(HEAD), "num_clusters", None)
    if clusters == labels.num_clusters:
        return None
    found = "no head over clusters" if clusters is None else f"a head over {clusters} clusters"
    return f"the model has {found} and the labels are of {labels.num_clusters}"


def _self_distillation(model: SpeechModel) -> nn.Module:
    layers = thirds(model.num_layers)
    config = DistillationConfig(
        target=TargetConfig(layers=layers),
        student_layers=layers,
        cosine="raw",
        masking=MASKING,
        mask_at=mask_place(model.config),
    )
    return _fixed(Distillation(copy.copy(model), model, config))


def _prediction(model: SpeechModel, config: MaskedPredictionConfig | None) -> nn.Module:
    return _fixed(MaskedPrediction(model, config or MaskedPredictionConfig(masking=MASKING, mask_at=mask_place(model.config))))


def _fixed(objective: nn.Module) -> nn.Module:
    """In eval mode; a front-end that would be trained is computed once."""
    objective.trains_frontend = False  # type: ignore[assignment]
    return objective.eval()


def _loss(objective: nn.Module, prepared: Any, totals: dict[str, Tensor]) -> Callable[[SpeechModel], Tensor]:
    name = next(name for name, child in objective.named_children() if isinstance(child, SpeechModel))

    def loss(model: SpeechModel) -> Tensor:
        running = copy.copy(objective)
        running._modules = {**objective._modules, name: model}
        return running(prepared, totals).loss

    return loss
