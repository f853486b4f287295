"""SpeechModel: front-end, input projection, encoder, and the heads that objectives train on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sslim.batch import EncoderOutput, Padded, zero_padding
from sslim.config import OMIT_DEFAULT
from sslim.frontends import ConvFrontend, FrontendConfig, SpectralFrontendConfig, build_frontend
from sslim.models.chunking import ChunkingConfig, encode_in_chunks
from sslim.models.ragged import encode_in_groups, is_worth_splitting
from sslim.models.search_space import SearchSpace
from sslim.models.stacking import stack_given
from sslim.models.storage import Storage, prepare_storage, require_float, stored_as
from sslim.nn.encoder import Encoder, EncoderConfig
from sslim.nn.encoders import AnyEncoder, AnyEncoderConfig, build_encoder
from sslim.nn.heads import HeadConfig, build_head


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """How front-end features enter the encoder.

    Attributes:
        feature_dim: Width F of the front-end's output.
        norm: Whether a layer norm over F comes first (HuBERT's ``layer_norm``).
        linear: Whether a linear map F to D follows (``pre_extract_proj``, ``post_extract_proj``); False only when F equals D.
        stack: Frames concatenated before the linear map, which then takes ``stack * F``; for models without a front-end, which
            would do it itself (``downsample_rate`` of S3PRL; see ``sslim.models.stacking``).
        init_deviation: A new model's weights of the linear map are drawn from a normal distribution of this standard deviation,
            its biases zero (0.02 in S3PRL); None for torch's uniform default.
    """

    feature_dim: int
    norm: bool = False
    linear: bool = True
    stack: int = field(default=1, metadata={OMIT_DEFAULT: True})
    init_deviation: float | None = field(default=None, metadata={OMIT_DEFAULT: True})

    def __post_init__(self) -> None:
        if self.stack < 1:
            raise ValueError(f"stack is {self.stack}; it must be at least 1")
        if self.stack > 1 and (self.norm or not self.linear):
            raise ValueError(f"stack is {self.stack}: frames can be stacked only where a linear map alone follows")

    @property
    def stacked_dim(self) -> int:
        """What the linear map takes: ``stack * feature_dim``."""
        return self.stack * self.feature_dim


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Description of a model; with a dictionary of tensors it is the model.

    Attributes:
        family: Where the architecture comes from, for people: ``melhubert``, ``hubert``, ...
        frontend: Waveform to features; None for models over features that sslim cannot compute (fMLLR).
        projection: Features to model width.
        encoder: The Transformer, recurrent layers or convolutions (``sslim.nn.encoders``).
        heads: Heads by the name of the objective that trains them.
        search_space: What a supernet's subnets can be; None for an ordinary model.
        storage: How its weights are stored (``sslim.models.storage``); None for float32.
        chunking: How the reference cuts long inputs, which only ``compat`` does; None where it does not.
    """

    family: str
    frontend: FrontendConfig | None
    projection: ProjectionConfig
    encoder: AnyEncoderConfig
    heads: dict[str, HeadConfig] = field(default_factory=dict)
    search_space: SearchSpace | None = None
    storage: Storage | None = field(default=None, metadata={OMIT_DEFAULT: True})  # descriptions from before it stay the same
    chunking: ChunkingConfig | None = field(default=None, metadata={OMIT_DEFAULT: True})

    def __post_init__(self) -> None:
        if self.projection.stack > 1 and self.frontend is not None:
            raise ValueError(f"projection.stack is {self.projection.stack}; a model with a front-end leaves stacking to it")
        if self.storage is not None and self.search_space is not None:
            raise ValueError(f"a supernet cannot be stored as {self.storage}: extract a subnet and quantise that")
        if self.search_space is not None and not isinstance(self.encoder, EncoderConfig):
            raise ValueError(f"a supernet needs a Transformer, this {self.family} model has a {self.encoder.kind} encoder")
        if not self.projection.linear and self.projection.feature_dim != (width := self.encoder.input_dim):
            name = "dim" if isinstance(self.encoder, EncoderConfig) else "the encoder's input_dim"
            given = self.projection.feature_dim
            raise ValueError(f"without a linear projection the {given} features must equal {name} {width}")

    @property
    def transformer(self) -> EncoderConfig:
        """The encoder, for what works on attention heads, feed-forward parts or blocks.

        Raises:
            ValueError: It is of another kind.
        """
        if not isinstance(self.encoder, EncoderConfig):
            raise ValueError(
                f"this {self.family} model has a {self.encoder.kind} encoder, and this needs a Transformer's attention heads, "
                "feed-forward parts or blocks"
            )
        return self.encoder


class Projection(nn.Module):
    """Optional norm over the features, then the linear map to model width."""

    def __init__(self, config: ProjectionConfig, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.feature_dim) if config.norm else None
        self.linear = nn.Linear(config.stacked_dim, dim) if config.linear else None
        self.init_deviation = config.init_deviation

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """torch's default for a linear map, U(-1/sqrt(F), 1/sqrt(F)) for weight and bias, or N(0, ``init_deviation``) and 0."""
        if self.linear is None:
            return
        if self.init_deviation is not None:
            nn.init.normal_(self.linear.weight, 0.0, self.init_deviation, generator=generator)
            nn.init.zeros_(self.linear.bias)
        else:
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
        encoder: The Transformer, recurrent layers or convolutions.
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
        self.projection = Projection(config.projection, config.encoder.input_dim)
        self.encoder: AnyEncoder = build_encoder(config.encoder)
        self.heads = nn.ModuleDict({name: build_head(config.encoder.dim, head) for name, head in config.heads.items()})
        prepare_storage(self.encoder, config.storage)
        self.provenance = list(provenance or [])

    def initialize(self, generator: torch.Generator | None = None) -> SpeechModel:
        """Draws every parameter anew; returns the model, which must not have int8 weights."""
        require_float(self, allow_half=True)
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

    @property
    def transformer(self) -> Encoder:
        """The encoder, for what works on its blocks.

        Raises:
            ValueError: It is no Transformer; see ``ModelConfig.transformer``.
        """
        assert self.config.transformer is not None
        assert isinstance(self.encoder, Encoder)
        return self.encoder

    def set_frontend(self, config: SpectralFrontendConfig) -> None:
        """Gives a model that takes features from outside the front-end that computes them; it stacks what the model stacked.

        Args:
            config: Features as wide as the model takes, not stacked; they get its stack, and what does not fill one is dropped.
        """
        assert self.frontend is None
        projection = self.config.projection
        stacked = replace(config, stack=projection.stack, stack_tail="drop")
        frontend = build_frontend(stacked)
        assert frontend.feature_dim == projection.stacked_dim
        self.frontend = frontend.to(next(self.parameters()).device).train(self.training)
        whole = replace(projection, feature_dim=projection.stacked_dim, stack=1)
        self.config = replace(self.config, frontend=stacked, projection=whole)

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
        """Projects front-end output to model width, stacked first where the model stacks; zero beyond each length."""
        features = stack_given(features, self.config.projection.stack)
        return Padded(values=zero_padding(self.projection(features.values), features.lengths), lengths=features.lengths)

    def encode_features(
        self, features_BTF: Tensor, lengths_B: Tensor | None = None, *, keep_layers: bool = True, need_weights: bool = False
    ) -> EncoderOutput:
        """Encodes front-end output.

        Args:
            features_BTF: (B, T, F), normalised and stacked as the model's front-end would give it; for a model without one that
                stacks (``projection.stack``), frames as they are.
            lengths_B: Valid frames; None when nothing is padded.
            keep_layers: Whether to return every layer.
            need_weights: Whether to return attention weights.

        Raises:
            ValueError: The features have another width than the model takes, or are not float.
        """
        features_BTF = in_model_precision(self, features_BTF, "features are")
        if features_BTF.dim() != 3 or features_BTF.shape[-1] != self.config.projection.feature_dim:
            raise ValueError(
                f"features have shape {tuple(features_BTF.shape)}; "
                f"this model takes (batch, frames, {self.config.projection.feature_dim})"
            )
        if lengths_B is None:
            lengths_B = torch.full((len(features_BTF),), features_BTF.shape[1], device=features_BTF.device)
        lengths_B = lengths_B.to(features_BTF.device)
        embedded = self.embed(Padded(values=features_BTF, lengths=lengths_B))
        whole_batch = need_weights or self._cuts_long_inputs
        if not whole_batch and is_worth_splitting(embedded.values, embedded.lengths):
            run = partial(self._encode_embedded, keep_layers=keep_layers)
            return encode_in_groups(run, embedded.values, embedded.lengths, embedded.values.shape[1])
        return self._encode_embedded(embedded.values, embedded.lengths, keep_layers=keep_layers, need_weights=need_weights)

    @property
    def _cuts_long_inputs(self) -> bool:
        return self.config.chunking is not None and self.config.chunking.compat is not None

    def _encode_embedded(
        self, x_BTD: Tensor, lengths_B: Tensor, *, keep_layers: bool, need_weights: bool = False
    ) -> EncoderOutput:
        """Runs the encoder over a projected batch, long inputs in chunks where the description says so."""

        def run(x_BTD: Tensor, lengths_B: Tensor) -> EncoderOutput:
            full = bool((lengths_B == x_BTD.shape[1]).all())
            lengths = None if full else lengths_B
            if need_weights:
                return self.transformer(x_BTD, lengths, keep_layers=keep_layers, need_weights=True)
            return self.encoder(x_BTD, lengths, keep_layers=keep_layers)

        if self._cuts_long_inputs:
            assert self.config.chunking is not None
            output = encode_in_chunks(run, x_BTD, lengths_B, self.config.chunking.max_frames)
        else:
            output = run(x_BTD, lengths_B)
        return replace(output, embed=x_BTD, lengths=lengths_B)

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
            ValueError: The model has no front-end, or its front-end lacks its statistics, or the waveforms are not float.
        """
        waveform_BS = in_model_precision(self, waveform_BS, "waveforms are")
        if self.frontend is None:
            raise ValueError(f"this {self.config.family} model takes features, not waveforms: use encode_features")
        if waveform_BS.dim() != 2:
            raise ValueError(f"waveforms have shape {tuple(waveform_BS.shape)}; expected (batch, samples)")
        if lengths_B is None:
            lengths_B = torch.full((len(waveform_BS),), waveform_BS.shape[1], device=waveform_BS.device)
        lengths_B = lengths_B.to(waveform_BS.device)
        whole_batch = getattr(self.config.frontend, "compat", None) is not None or self._cuts_long_inputs
        if not whole_batch and not need_weights and is_worth_splitting(waveform_BS, lengths_B):
            num_frames = self.frontend.num_frames(waveform_BS.shape[1])
            return encode_in_groups(partial(self.encode, keep_layers=keep_layers), waveform_BS, lengths_B, num_frames)
        features = self.frontend(waveform_BS, lengths_B)
        return self.encode_features(features.values, features.lengths, keep_layers=keep_layers, need_weights=need_weights)


def in_model_precision(model: nn.Module, values: Tensor, name: str) -> Tensor:
    """Returns values of any float type in that of a model in float32 or float64; for a model in half precision as they are.

    Args:
        model: Whose first parameter decides.
        values: For example float64, as NumPy makes it.
        name: What they are, with its verb, for the sentence.

    Raises:
        ValueError: They are no tensor or whole numbers, such as 16-bit samples.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        found = str(values.dtype) if isinstance(values, Tensor) else f"a {type(values).__name__}, not a tensor"
        raise ValueError(f"the {name} {found}; expected a float tensor")
    precision = next(model.parameters()).dtype
    return values.to(precision) if precision in (torch.float32, torch.float64) else values


def build_model(config: ModelConfig, generator: torch.Generator | None = None) -> SpeechModel:
    """Returns a new model in eval mode with random parameters drawn from ``generator``, then stored as ``config`` says."""
    if config.storage is not None:
        return stored_as(build_model(replace(config, storage=None), generator), config.storage)
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


def with_settings(model: SpeechModel, config: ModelConfig) -> SpeechModel:
    """Returns a copy of a model with another description of the same tensors: other dropout, other gradient scale.

    Raises:
        RuntimeError: The description has other tensors.
    """
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    twin = SpeechModel(config, model.provenance).to(next(model.parameters()).device)
    restore_statistics(twin, state)
    twin.load_state_dict(state, strict=True, assign=True)
    return twin.train(model.training)


def restore_statistics(model: SpeechModel, state: Mapping[str, Tensor]) -> None:
    """Makes room for the front-end statistics in ``state``, which a model without statistics has no buffers for."""
    if model.frontend is not None and "frontend.mean" in state:
        source = model.frontend.statistics_source or "unknown"
        model.set_statistics(state["frontend.mean"], state["frontend.std"], source=source)
