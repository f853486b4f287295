"""Prediction heads that an objective trains on top of a model. They are saved with it and are no part of its features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ClusterHeadConfig:
    """Linear classifier over cluster ids (``final_proj`` of MelHuBERT).

    Attributes:
        num_clusters: K.
        mask_embedding_dim: Width of a learnable vector that replaces masked frames (``mask_emb``); None for zeros.
    """

    kind: Literal["clusters"] = "clusters"
    num_clusters: int
    mask_embedding_dim: int | None = None


HeadConfig = ClusterHeadConfig  # becomes a union, told apart by ``kind``, with the next head


class ClusterHead(nn.Module):
    """Logits over K clusters for any leading shape."""

    def __init__(self, dim: int, config: ClusterHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(dim, config.num_clusters)
        width = config.mask_embedding_dim
        self.mask_embedding = None if width is None else nn.Parameter(torch.empty(width))

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """torch's default for a linear map, U(-1/sqrt(D), 1/sqrt(D)); the mask embedding U(0, 1) as in the reference."""
        bound = self.linear.in_features**-0.5
        nn.init.uniform_(self.linear.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.linear.bias, -bound, bound, generator=generator)
        if self.mask_embedding is not None:
            nn.init.uniform_(self.mask_embedding, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def build_head(dim: int, config: HeadConfig) -> ClusterHead:
    """Builds the head that ``config`` describes on a model of width ``dim``."""
    return ClusterHead(dim, config)
