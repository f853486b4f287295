"""A frozen teacher: which of its layers are learnt from, and what a batch gives there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sslim.batch import Padded, valid_mask, zero_padding
from sslim.config import dump_json, to_plain
from sslim.models import ModelConfig, SpeechModel
from sslim.objectives.model_inputs import frontend_output

INSTANCE_NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """What a student learns from.

    Attributes:
        layers: Teacher layers, counted from 1; the last one is the model's final output (after its final norm, if it has one),
            and 0 the output of the input projection (DPHuBERT's layer 0).
        average: One target, the mean of these layers (data2vec, LightHuBERT), instead of one for each.
        source: A layer's output, or its feed-forward part's output before the residual connection and the norm, which data2vec
            and LightHuBERT average.
        instance_norm: Whether each channel of each layer gets zero mean and unit variance over the utterance's real frames,
            before layers are averaged.
    """

    layers: tuple[int, ...]
    average: bool = False
    source: Literal["layer", "feedforward"] = "layer"
    instance_norm: bool = False

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("no teacher layer is named: a student needs at least one to learn from")

    @property
    def num_targets(self) -> int:
        """Targets of each frame L."""
        return 1 if self.average else len(self.layers)


def model_digest(model: SpeechModel) -> str:
    """Returns the SHA-256 of a model's description and tensors: tells a teacher from every other, whatever file it came in."""
    digest = hashlib.sha256(dump_json(to_plain(model.config)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def normalize_instances(x_BTD: Tensor, lengths_B: Tensor, eps: float = INSTANCE_NORM_EPS) -> Tensor:
    """Returns (B, T, D) with zero mean and unit (biased) variance over each row's real frames; zero beyond them."""
    real_BT1 = valid_mask(lengths_B, x_BTD.shape[1])[..., None]
    count_B11 = lengths_B.clamp(min=1)[:, None, None]
    centred = (x_BTD - x_BTD.masked_fill(~real_BT1, 0.0).sum(1, keepdim=True) / count_B11).masked_fill(~real_BT1, 0.0)
    return centred * (centred.square().sum(1, keepdim=True) / count_B11 + eps).rsqrt()


def check_widths(config: ModelConfig, layers: Sequence[int], who: str) -> None:
    """Raises ValueError unless layers are as wide as the model's last one; layer 0 stands for the projection's output here.

    Args:
        config: The model's description.
        layers: Layers that it has, from 0.
        who: What a complaint calls the model.
    """
    encoder = config.encoder
    for layer in layers:
        if (width := encoder.layer_dims[layer] if layer else encoder.input_dim) != encoder.dim:
            raise ValueError(
                f"{who} layer {layer} is {width} wide and the last one {encoder.dim}: name layers as wide as the last"
            )


class Teacher:
    """Runs a frozen model and keeps what is learnt from. Deliberately no ``nn.Module``: no training mode, no saved state.

    Args:
        model: The teacher; put in eval mode, its parameters get no gradient.
        config: What is kept.
        bf16: Run it under bf16 autocast; targets are float32 all the same.

    Raises:
        ValueError: A layer that the model does not have, or that has no feed-forward part when that is asked for.
    """

    def __init__(self, model: SpeechModel, config: TargetConfig, *, bf16: bool = False) -> None:
        first = 1 if config.source == "feedforward" else 0
        for layer in config.layers:
            if not first <= layer <= model.num_layers:
                raise ValueError(f"teacher layer {layer} is asked for, the teacher has layers {first} to {model.num_layers}")
            if config.source == "feedforward":
                block = model.config.transformer.blocks[model.config.transformer.depth_map[layer - 1]]
                if not block.feedforward_dim:
                    raise ValueError(f"teacher layer {layer} has no feed-forward part to learn from")
        check_widths(model.config, config.layers, "teacher")
        self.model, self.config, self.bf16 = model.eval().requires_grad_(False), config, bf16
        self.dim = model.config.encoder.dim * config.num_targets

    def features(self, inputs: Tensor, lengths_B: Tensor) -> Padded:
        """Front-end output of base features (B, T, F) or samples (B, S)."""
        return frontend_output(self.model, Padded(values=inputs.float(), lengths=lengths_B), "teacher")

    @torch.no_grad()
    def frames(self, inputs: Tensor, lengths_B: Tensor) -> Padded:
        """Returns the targets at the teacher's own frame rate.

        Args:
            inputs: (B, T, F) base features, or (B, S) samples.
            lengths_B: Their valid frames or samples.

        Returns:
            (B, T', L * D) float32, the L targets of a frame one after another; zero beyond each length.
        """
        assert not self.model.training
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            features = self.features(inputs, lengths_B)
            layers = self._feedforwards(features) if self.config.source == "feedforward" else self._layers(features)
        layers = [layer.float() for layer in layers]
        if self.config.instance_norm:
            layers = [normalize_instances(layer, features.lengths) for layer in layers]
        values = torch.stack(layers).mean(0) if self.config.average else torch.cat(layers, dim=-1)
        return Padded(values=zero_padding(values, features.lengths), lengths=features.lengths)

    def _layers(self, features: Padded) -> list[Tensor]:
        output = self.model.encode_features(features.values, features.lengths)
        assert output.embed is not None
        by_number = {0: output.embed, **dict(enumerate(output.layers[1:], 1)), self.model.num_layers: output.final}
        return [by_number[layer] for layer in self.config.layers]

    def _feedforwards(self, features: Padded) -> list[Tensor]:
        """Outputs of the feed-forward parts, in the order in which blocks are applied (shared blocks several times)."""
        kept: list[Tensor] = []
        applied: list[int] = []  # layers that have a feed-forward part at all
        blocks = self.model.config.transformer.blocks
        for number, block in enumerate(self.model.config.transformer.depth_map, 1):
            if blocks[block].feedforward_dim:
                applied.append(number)

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            kept.append(output)

        parts = [part for block in self.model.transformer.blocks if (part := block.feedforward) is not None]
        hooks = [part.register_forward_hook(keep) for part in parts]  # type: ignore[union-attr]
        try:
            embedded = self.model.embed(features)
            self.model.transformer(embedded.values, embedded.lengths)
        finally:
            for hook in hooks:
                hook.remove()
        by_number = dict(zip(applied, kept, strict=True))
        return [by_number[layer] for layer in self.config.layers]

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Moves the teacher along when the objective that owns it is moved."""
        self.model._apply(function)
