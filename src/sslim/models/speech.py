"""SpeechModel: front-end, input projection, encoder, and the heads that objectives train on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sslim.batch import EncoderOutput, Padded, zero_padding
from sslim.frontends import ConvFrontend, FrontendConfig, build_frontend
from sslim.models.ragged import encode_in_groups, is_worth_splitting
from sslim.models.search_space import SearchSpace
from sslim.nn.encoder import Encoder, EncoderConfig
from sslim.nn.heads import HeadConfig, build_head


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """How front-end features enter the encoder.

    Attributes:
        feature_dim: Width F of the front-end's output.
        norm: Whether a layer norm over F comes first (HuBERT's ``layer_norm``).
        linear: Whether a linear map F to D follows (``pre_extract_proj``, ``post_extract_proj``); False only when F equals D.
    """

    feature_dim: int
    norm: bool = False
    linear: bool = True


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Description of a model; with a dictionary of tensors it is the model.

    Attributes:
        family: Where the architecture comes from, for people: ``melhubert``, ``hubert``, ...
        frontend: Waveform to features; None for models over features that sslim cannot compute (fMLLR).
        projection: Features to model width.
        encoder: The Transformer.
        heads: Heads by the name of the objective that trains them.
        search_space: What a supernet's subnets can be; None for an ordinary model.
    """

    family: str
    frontend: FrontendConfig | None
    projection: ProjectionConfig
    encoder: EncoderConfig
    heads: dict[str, HeadConfig] = field(default_factory=dict)
    search_space: SearchSpace | None = None

    def __post_init__(self) -> None:
        if not self.projection.linear and self.projection.feature_dim != self.encoder.dim:
            raise ValueError(
                f"without a linear projection the {self.projection.feature_dim} features must equal dim {self.encoder.dim}"
            )


class Projection(nn.Module):
    """Optional norm over the features, then the linear map to model width."""

    def __init__(self, config: ProjectionConfig, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.feature_dim) if config.norm else None
        self.linear = nn.Linear(config.feature_dim, dim) if config.linear else None

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """torch's default for a linear map, U(-1/sqrt(F), 1/sqrt(F)) for weight and bias."""
        if self.linear is not None:
            bound = self.linear.in_features**-0.5
            nn.init.uniform_(self.linear.weight, -bound, bound, generator=generator)
            nn.init.uniform_(self.linear.bias, -bound, bound, generator=generator)

    def forward(self, x_BTF: Tensor) -> Tensor:
        x_BTF = x_BTF if self.norm is None else self.norm(x_BTF)
        return x_BTF if self.linear is None else self.linear(x_BTF)


class SpeechModel(nn.Module):
    """A self-supervised speech model. See ``load_model`` to read one and ``build_model`` to make one.

    Attributes:
        config: Its description.
        frontend: Waveform to features, with ``sample_rate``, ``frame_shift_s`` and ``num_frames(num_samples)``; may be None.
        projection: Features to model width.
        encoder: The Transformer.
        heads: Heads by objective name.
        provenance: Where the tensors come from, newest last: plain JSON values, saved with the model.
    """

    def __init__(self, config: ModelConfig, provenance: list[dict[str, Any]] | None = None) -> None:
        super().__init__()
        self.config = config
        self.frontend = None if config.frontend is None else build_frontend(config.frontend)
        if self.frontend is not None and self.frontend.feature_dim != config.projection.feature_dim:
            raise ValueError(
                f"the front-end gives {self.frontend.feature_dim} features, "
                f"the projection takes {config.projection.feature_dim}"
            )
        self.projection = Projection(config.projection, config.encoder.dim)
        self.encoder = Encoder(config.encoder)
        self.heads = nn.ModuleDict({name: build_head(config.encoder.dim, head) for name, head in config.heads.items()})
        self.provenance = list(provenance or [])

    def initialize(self, generator: torch.Generator | None = None) -> SpeechModel:
        """Draws every parameter anew; returns the model."""
        if isinstance(self.frontend, ConvFrontend):
            self.frontend.initialize(generator)
        self.projection.initialize(generator)
        self.encoder.initialize(generator)
        for head in self.heads.values():
            head.initialize(generator)  # type: ignore[operator]
        return self

    @property
    def num_layers(self) -> int:
        return self.config.encoder.num_layers

    def set_statistics(self, mean_F: Tensor, std_F: Tensor, *, source: str) -> None:
        """Gives the front-end its global mean and standard deviation, and the description their origin."""
        assert self.frontend is not None
        self.frontend.set_statistics(mean_F, std_F, source=source)
        self.config = replace(self.config, frontend=self.frontend.config)

    def num_parameters(self, *, with_heads: bool = True) -> int:
        """Counts distinct parameters, shared blocks once, statistics not at all."""
        total = sum(p.numel() for p in self.parameters())
        return total if with_heads else total - sum(p.numel() for p in self.heads.parameters())

    def embed(self, features: Padded) -> Padded:
        """Projects front-end output to model width; zero beyond each length."""
        return Padded(values=zero_padding(self.projection(features.values), features.lengths), lengths=features.lengths)

    def encode_features(
        self, features_BTF: Tensor, lengths_B: Tensor | None = None, *, keep_layers: bool = True, need_weights: bool = False
    ) -> EncoderOutput:
        """Encodes front-end output.

        Args:
            features_BTF: (B, T, F), normalised and stacked as the model's front-end would give it.
            lengths_B: Valid frames; None when nothing is padded.
            keep_layers: Whether to return every layer.
            need_weights: Whether to return attention weights.

        Raises:
            ValueError: The features have another width than the model takes.
        """
        if features_BTF.dim() != 3 or features_BTF.shape[-1] != self.config.projection.feature_dim:
            raise ValueError(
                f"features have shape {tuple(features_BTF.shape)}; "
                f"this model takes (batch, frames, {self.config.projection.feature_dim})"
            )
        if lengths_B is None:
            lengths_B = torch.full((len(features_BTF),), features_BTF.shape[1], device=features_BTF.device)
        lengths_B = lengths_B.to(features_BTF.device)
        if not need_weights and is_worth_splitting(features_BTF, lengths_B):
            return encode_in_groups(
                partial(self.encode_features, keep_layers=keep_layers), features_BTF, lengths_B, features_BTF.shape[1]
            )
        embedded = self.embed(Padded(values=features_BTF, lengths=lengths_B))
        full = bool((lengths_B == features_BTF.shape[1]).all())
        output = self.encoder(embedded.values, None if full else lengths_B, keep_layers=keep_layers, need_weights=need_weights)
        return replace(output, embed=embedded.values, lengths=lengths_B)

    def encode(
        self, waveform_BS: Tensor, lengths_B: Tensor | None = None, *, keep_layers: bool = True, need_weights: bool = False
    ) -> EncoderOutput:
        """Encodes waveforms at the front-end's sample rate, float in [-1, 1]; all normalisation happens inside.

        Args:
            waveform_BS: (B, S).
            lengths_B: Valid samples; None when nothing is padded.
            keep_layers: Whether to return every layer.
            need_weights: Whether to return attention weights.

        Raises:
            ValueError: The model has no front-end, or its front-end lacks its statistics.
        """
        if self.frontend is None:
            raise ValueError(f"this {self.config.family} model takes features, not waveforms: use encode_features")
        if waveform_BS.dim() != 2:
            raise ValueError(f"waveforms have shape {tuple(waveform_BS.shape)}; expected (batch, samples)")
        if lengths_B is None:
            lengths_B = torch.full((len(waveform_BS),), waveform_BS.shape[1], device=waveform_BS.device)
        lengths_B = lengths_B.to(waveform_BS.device)
        compatible = getattr(self.config.frontend, "compat", None) is None
        if compatible and not need_weights and is_worth_splitting(waveform_BS, lengths_B):
            num_frames = self.frontend.num_frames(waveform_BS.shape[1])
            return encode_in_groups(partial(self.encode, keep_layers=keep_layers), waveform_BS, lengths_B, num_frames)
        features = self.frontend(waveform_BS, lengths_B)
        return self.encode_features(features.values, features.lengths, keep_layers=keep_layers, need_weights=need_weights)


def build_model(config: ModelConfig, generator: torch.Generator | None = None) -> SpeechModel:
    """Returns a new model in eval mode with random parameters drawn from ``generator``."""
    return SpeechModel(config).initialize(generator).eval()


def with_head(
    model: SpeechModel,
    name: str,
    head: HeadConfig,
    generator: torch.Generator | None = None,
    *,
    replace_existing: bool = False,
) -> SpeechModel:
    """Returns a model that shares ``model``'s tensors and has ``head`` under ``name``.

    The head is newly drawn, unless one of the same description is there already and ``replace_existing`` is False.
    """
    if model.config.heads.get(name) == head and not replace_existing:
        return model
    grown = SpeechModel(replace(model.config, heads={**model.config.heads, name: head}), model.provenance)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(f"heads.{name}.")}
    restore_statistics(grown, state)
    grown.heads[name].initialize(generator)  # type: ignore[operator]
    state |= {f"heads.{name}.{key}": value for key, value in grown.heads[name].state_dict().items()}
    grown.load_state_dict(state, strict=True, assign=True)
    return grown.train(model.training)


def restore_statistics(model: SpeechModel, state: Mapping[str, Tensor]) -> None:
    """Makes room for the front-end statistics in ``state``, which a model without statistics has no buffers for."""
    if model.frontend is not None and "frontend.mean" in state:
        source = model.frontend.statistics_source or "unknown"
        model.set_statistics(state["frontend.mean"], state["frontend.std"], source=source)
