"""What pre-training must know of each objective: whether it needs labels, its head, its warnings, what it reads.

``TASKS`` is the table; a further objective is one entry and one member of ``PretrainObjective``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sslim.data.labels import LabelStore
from sslim.models import ModelConfig, SpeechModel
from sslim.nn.heads import ClusterHeadConfig, CodewordHeadConfig, HeadConfig
from sslim.objectives import (
    Autoregressive,
    AutoregressiveConfig,
    MaskedPrediction,
    MaskedPredictionConfig,
    Npc,
    NpcConfig,
    Reconstruction,
    ReconstructionConfig,
)
from sslim.objectives.feature_prediction import feature_head
from sslim.objectives.reconstruction import needs_waveforms, reconstruction_head
from sslim.training import SENTINELS, Sentinel

PretrainObjective = MaskedPredictionConfig | ReconstructionConfig | AutoregressiveConfig | NpcConfig


@dataclass(frozen=True, kw_only=True)
class HeadRequest:
    """What a head is made for.

    Attributes:
        model: Description of the model that gets it: the recipe's, or that of a loaded one.
        recipe_head: The recipe's head of that name; None without.
        objective: Settings of the objective.
        labels: Targets; None for objectives without.
        owner: What a complaint calls the recipe.
    """

    model: ModelConfig
    recipe_head: HeadConfig | None
    objective: Any
    labels: LabelStore | None
    owner: str


@dataclass(frozen=True, kw_only=True)
class PretrainTask:
    """How one kind of objective is pre-trained.

    Attributes:
        head: Name of the head that it trains.
        needs_labels: Whether it learns from a label set of the corpus.
        describe_head: The head that a model needs; raises ValueError where the recipe does not say enough.
        build: Model and settings to the objective; raises ValueError where they do not fit, in one sentence.
        sentinels: Description of the head to warnings by name.
        keeps_head: Whether a loaded model's head of the right description goes on with its weights. Else it is drawn anew
            unless asked for: a head over clusters means nothing for those of another codebook.
        more_heads: Heads of the recipe that the objective uses beside its own.
        needs_waveforms: Whether waveforms are read even where the corpus holds the model's features.
    """

    head: str
    needs_labels: bool
    describe_head: Callable[[HeadRequest], HeadConfig]
    build: Callable[[SpeechModel, Any], nn.Module]
    sentinels: Callable[[HeadConfig], Mapping[str, Sentinel]]
    keeps_head: bool = True
    more_heads: tuple[str, ...] = ()
    needs_waveforms: Callable[[ModelConfig, Any], bool] = lambda model, objective: False


def _cluster_head(request: HeadRequest) -> HeadConfig:
    """As many clusters as the labels have."""
    if not isinstance(request.recipe_head, ClusterHeadConfig | CodewordHeadConfig):
        raise ValueError(f"{request.owner} has no head 'masked_prediction' of kind 'clusters' or 'codewords'")
    assert request.labels is not None
    return replace(request.recipe_head, num_clusters=request.labels.num_clusters)


TASKS: dict[str, PretrainTask] = {
    "masked_prediction": PretrainTask(
        head="masked_prediction",
        needs_labels=True,
        describe_head=_cluster_head,
        build=MaskedPrediction,
        sentinels=lambda head: SENTINELS["masked_prediction"](head.num_clusters),  # type: ignore[union-attr]
        keeps_head=False,
        more_heads=("mask",),
    ),
    "reconstruction": PretrainTask(
        head="reconstruction",
        needs_labels=False,
        describe_head=lambda request: reconstruction_head(request.model, request.objective, request.recipe_head),
        build=Reconstruction,
        sentinels=lambda head: SENTINELS["reconstruction"](),
        needs_waveforms=needs_waveforms,
    ),
    "autoregressive": PretrainTask(
        head="autoregressive",
        needs_labels=False,
        describe_head=lambda request: feature_head(request.model, request.recipe_head),
        build=Autoregressive,
        sentinels=lambda head: SENTINELS["autoregressive"](),
    ),
    "npc": PretrainTask(
        head="npc",
        needs_labels=False,
        describe_head=lambda request: feature_head(request.model, request.recipe_head),
        build=Npc,
        sentinels=lambda head: SENTINELS["npc"](),
    ),
}
"""By the objective's kind."""
