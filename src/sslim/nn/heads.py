"""Prediction heads that an objective trains on top of a model. They are saved with it and are no part of its features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ClusterHeadConfig:
    """Linear classifier over cluster ids (``final_proj`` of MelHuBERT).

    Attributes:
        num_clusters: K.
    """

    kind: Literal["clusters"] = "clusters"
    num_clusters: int


@dataclass(frozen=True, kw_only=True)
class MaskEmbeddingConfig:
    """A learnt vector in place of hidden frames (``mask_emb`` in fairseq, ``masked_spec_embed`` in transformers).

    Attributes:
        dim: Its width: the model's where frames are hidden after the projection, the features' where before.
    """

    kind: Literal["mask"] = "mask"
    dim: int


@dataclass(frozen=True, kw_only=True)
class CodewordHeadConfig:
    """Cosine similarity with learnt codewords (HuBERT, equation 3; ``final_proj`` and ``label_embs_concat`` in fairseq).

    Attributes:
        num_clusters: Codewords K.
        codeword_dim: Their width.
        temperature: Divides the similarities.
    """

    kind: Literal["codewords"] = "codewords"
    num_clusters: int
    codeword_dim: int = 256
    temperature: float = 0.1


@dataclass(frozen=True, kw_only=True)
class RegressionHeadConfig:
    """Linear map to a teacher's width (``layer_pred_heads`` of LightHuBERT, ``distill_linear_projs`` of DPHuBERT).

    Attributes:
        output_dim: The teacher's width.
        bias: Whether it has one.
    """

    kind: Literal["regression"] = "regression"
    output_dim: int
    bias: bool = True


@dataclass(frozen=True, kw_only=True)
class SplitHeadConfig:
    """DistilHuBERT's prediction heads: one shared linear layer and GELU, then a linear map for each teacher layer.

    Attributes:
        num_tasks: Teacher layers N.
        hidden_dim: Hidden units I of each.
        output_dim: The teacher's width O.
    """

    kind: Literal["split"] = "split"
    num_tasks: int
    hidden_dim: int
    output_dim: int


@dataclass(frozen=True, kw_only=True)
class SpectrogramHeadConfig:
    """Estimate of the features that went in (``SpecHead`` in S3PRL): linear, activation, layer norm, linear.

    Attributes:
        hidden_dim: Hidden units I.
        output_dim: Width O of the estimate; where frames are stacked, that of all frames of a stack.
        activation: After the first linear map.
        layer_norm_eps: Epsilon of the norm.
    """

    kind: Literal["spectrogram"] = "spectrogram"
    hidden_dim: int
    output_dim: int
    activation: Literal["gelu", "relu", "swish"] = "gelu"
    layer_norm_eps: float = 1e-12


HeadConfig = (
    ClusterHeadConfig
    | MaskEmbeddingConfig
    | CodewordHeadConfig
    | RegressionHeadConfig
    | SplitHeadConfig
    | SpectrogramHeadConfig
)


def _initialize_linear(linear: nn.Linear, generator: torch.Generator | None) -> None:
    """torch's default for a linear map, U(-1/sqrt(D), 1/sqrt(D)) for weight and bias."""
    bound = linear.in_features**-0.5
    nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
    if linear.bias is not None:
        nn.init.uniform_(linear.bias, -bound, bound, generator=generator)


class ClusterHead(nn.Module):
    """Logits over K clusters for any leading shape."""

    def __init__(self, dim: int, config: ClusterHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(dim, config.num_clusters)

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """torch's default for a linear map."""
        _initialize_linear(self.linear, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class MaskEmbedding(nn.Module):
    """Puts its vector in place of the frames that a mask names."""

    def __init__(self, dim: int, config: MaskEmbeddingConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.dim))

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """U(0, 1) as in wav2vec 2.0 and HuBERT."""
        nn.init.uniform_(self.embedding, generator=generator)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Returns (B, T, D) with the vector where ``mask_BT`` is True."""
        return torch.where(mask_BT[..., None], self.embedding.to(x_BTD.dtype), x_BTD)


class CodewordHead(nn.Module):
    """Logits over K codewords for any leading shape: cosine similarity over temperature, in float32."""

    def __init__(self, dim: int, config: CodewordHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.projection = nn.Linear(dim, config.codeword_dim)
        self.codewords = nn.Parameter(torch.empty(config.num_clusters, config.codeword_dim))

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """torch's default for the linear map; codewords U(0, 1) as in fairseq."""
        _initialize_linear(self.projection, generator)
        nn.init.uniform_(self.codewords, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.projection(x)
        with torch.autocast(x.device.type, enabled=False):  # cosines near 1 divided by 0.1 need more than bfloat16's 8 bits
            projected = F.normalize(projected.float(), dim=-1, eps=1e-8)
            codewords_KC = F.normalize(self.codewords.float(), dim=-1, eps=1e-8)
            return F.linear(projected, codewords_KC) / self.config.temperature


class RegressionHead(nn.Module):
    """Linear map of any leading shape."""

    def __init__(self, dim: int, config: RegressionHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(dim, config.output_dim, bias=config.bias)

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """torch's default for a linear map."""
        _initialize_linear(self.linear, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class SplitHead(nn.Module):
    """(B, T, D) to (B, N, T, O): an estimate of each of N teacher layers."""

    def __init__(self, dim: int, config: SplitHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.inner = nn.Linear(dim, config.num_tasks * config.hidden_dim)
        self.weight = nn.Parameter(torch.empty(config.num_tasks, config.hidden_dim, config.output_dim))
        self.bias = nn.Parameter(torch.empty(config.num_tasks, config.output_dim))

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """torch's default for a linear map, for every task's own too."""
        _initialize_linear(self.inner, generator)
        bound = self.config.hidden_dim**-0.5
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.bias, -bound, bound, generator=generator)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden_BTNI = F.gelu(self.inner(x_BTD)).unflatten(-1, (self.config.num_tasks, self.config.hidden_dim))
        return torch.einsum("btni,nio->bnto", hidden_BTNI, self.weight) + self.bias[None, :, None, :]


_SPECTROGRAM_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "swish": F.silu}


class SpectrogramHead(nn.Module):
    """(…, D) to (…, O): an estimate of the features of each frame."""

    def __init__(self, dim: int, config: SpectrogramHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.inner = nn.Linear(dim, config.hidden_dim)
        self.activation = _SPECTROGRAM_ACTIVATIONS[config.activation]
        self.norm = nn.LayerNorm(config.hidden_dim, config.layer_norm_eps)
        self.outer = nn.Linear(config.hidden_dim, config.output_dim)

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """BERT's: linear weights N(0, 0.02), biases zero, norm one and zero."""
        for linear in (self.inner, self.outer):
            nn.init.normal_(linear.weight, 0.0, 0.02, generator=generator)
            nn.init.zeros_(linear.bias)
        self.norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.norm(self.activation(self.inner(x))))


_HEADS: dict[str, Any] = {
    "clusters": ClusterHead,
    "mask": MaskEmbedding,
    "codewords": CodewordHead,
    "regression": RegressionHead,
    "split": SplitHead,
    "spectrogram": SpectrogramHead,
}


def build_head(dim: int, config: HeadConfig) -> nn.Module:
    """Builds the head that ``config`` describes on a model of width ``dim``."""
    return _HEADS[config.kind](dim, config)
