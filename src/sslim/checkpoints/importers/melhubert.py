"""MelHuBERT checkpoints of all four generations, pruned and distilled ones included.

Lin et al., "MelHuBERT" (arXiv 2211.09944), and Lin et al., "Compressing Transformer-based self-supervised models for speech
processing" (arXiv 2211.09949). Layout of the files:

- mid-2022, inside S3PRL: ``model``, ``Upstream_Config.hubert``, ``Config``;
- from 2022-07-14, standalone: ``Model``, ``Upstream_Config.hubert``, ``Runner``;
- from 2022-12-08: ``model``, ``Upstream_Config.hubert``, ``Runner``;
- from 2022-12-10: ``model``, ``Upstream_Config.melhubert``, ``Runner``.

Shapes come from the tensors, because the files' own account of pruning can be lost; settings that contradict them where it
matters are errors. The files never hold the features' mean and standard deviation: ``load_model(path, statistics=...)``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sslim.checkpoints.importers import Imported
from sslim.checkpoints.importers.fairseq_names import rename, tensors_of
from sslim.checkpoints.importers.melhubert_names import native_name
from sslim.checkpoints.importers.settings import Settings, plain, short, state_of
from sslim.checkpoints.restricted_pickle import CheckpointError
from sslim.frontends import FrontendConfig
from sslim.models import ModelConfig, ProjectionConfig
from sslim.models.melhubert import HEAD, MASK, melhubert_frontend
from sslim.nn.encoder import BlockConfig, EncoderConfig
from sslim.nn.heads import ClusterHeadConfig, HeadConfig, MaskEmbeddingConfig
from sslim.nn.positions import ConvPositionsConfig

ACTIVATIONS = {"gelu": "gelu", "gelu_accurate": "gelu_tanh", "relu": "relu", "tanh": "tanh", "linear": "linear"}
FRAME_PERIODS_MS = {40: 10, 80: 20}  # 40 log-Mel bins, as they are or two frames stacked
STATISTICS_NAMES = re.compile(r"(?:libri|train)[-_]?(?:clean)?[-_]?(100|360|960)", re.IGNORECASE)


def recognises(contents: Any) -> bool:
    """Whether a file's contents are a MelHuBERT checkpoint."""
    section = contents.get("Upstream_Config") if isinstance(contents, dict) else None
    return isinstance(section, dict) and any(isinstance(section.get(key), dict) for key in ("melhubert", "hubert"))


def is_head_scores(contents: Any) -> bool:
    """Whether contents are what head pruning writes beside its checkpoints: ``[((layer, head), score), ...]``."""
    if not isinstance(contents, list) or not contents:
        return False
    first = contents[0]
    return isinstance(first, tuple) and len(first) == 2 and isinstance(first[0], tuple) and len(first[0]) == 2


def convert(contents: Mapping[str, Any], source: str) -> Imported:
    """Translates a checkpoint.

    Args:
        contents: What ``read_pickle`` gives.
        source: The file's name, for errors.

    Raises:
        CheckpointError: A tensor nobody knows, a setting that contradicts the tensors, or a model that cannot be expressed.
    """
    upstream = contents["Upstream_Config"]
    section = next(upstream[key] for key in ("melhubert", "hubert") if isinstance(upstream.get(key), dict))
    settings = Settings(section, source)
    weights = _weights(contents, source)
    effective, masked = bake_masks(weights, source)
    final_norm = settings.boolean("layer_norm_first", False)
    state = _translate_names(effective, source, final_norm=final_norm)
    notes = _notes(contents, upstream)
    if masked:
        notes["masked_weights"] = masked
        notes["masked_biases"] = any(name.endswith("bias_mask") for name in weights)
    config = _Shapes(state, settings, source).model_config(contents, notes)
    return Imported(config=config, state=state, notes=notes)


def _weights(contents: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """Weights under ``model`` or ``Model``."""
    return tensors_of(next((contents[key] for key in ("model", "Model") if key in contents), None), source, "model")


def bake_masks(weights: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Applies the masks of weight pruning: ``X_orig`` where ``X_mask``, 0 elsewhere.

    Decided for each tensor by its name: mid-2022 files mask weights only, and with floats. ``X_orig`` alone is never right, its
    masked values are old ones that the optimiser's momentum keeps moving.

    Returns:
        The effective weights, copied; and how many numbers the masks hide, empty without masks.
    """
    effective, hidden, total = {}, 0, 0
    for name, tensor in weights.items():
        stem = name.removesuffix("_orig").removesuffix("_mask")
        if stem == name:
            effective[name] = tensor.clone(memory_format=torch.contiguous_format)
            continue
        original, mask = weights.get(f"{stem}_orig"), weights.get(f"{stem}_mask")
        if original is None or mask is None or stem in weights:
            found = ", ".join(sorted({f"{stem}{end}" for end in ("", "_orig", "_mask")} & weights.keys()))
            raise CheckpointError(f"{source}: pruned weights are an _orig and a _mask, but it has {found}")
        if mask.shape != original.shape or not bool(((mask == 0) | (mask == 1)).all()):
            raise CheckpointError(f"{source}: {stem}_mask is no mask of zeros and ones of shape {tuple(original.shape)}")
        if name.endswith("_orig"):
            effective[stem] = torch.where(mask.bool(), original, original.new_zeros(()))
            hidden, total = hidden + int((mask == 0).sum()), total + mask.numel()
    return effective, {"hidden": hidden, "of": total} if total else {}


def _translate_names(weights: Mapping[str, Tensor], source: str, *, final_norm: bool) -> dict[str, Tensor]:
    return rename(weights, source, lambda name: native_name(name, final_norm=final_norm), what="a MelHuBERT", copy=False)


class _Shapes:
    """Reads the description off the tensors and checks it against the settings."""

    def __init__(self, state: Mapping[str, Tensor], settings: Settings, source: str) -> None:
        self.state, self.settings, self.source = state, settings, source

    def model_config(self, contents: Mapping[str, Any], notes: dict[str, Any]) -> ModelConfig:
        encoder = self.encoder(contents, notes)
        feature_dim = self.agreed("feat_emb_dim", self.width("projection.linear.weight", 1, encoder.dim))
        heads: dict[str, HeadConfig] = {}
        if f"heads.{HEAD}.linear.weight" in self.state:
            heads[HEAD] = ClusterHeadConfig(num_clusters=self.width(f"heads.{HEAD}.linear.weight", 0))
        if f"heads.{MASK}.embedding" in self.state:
            heads[MASK] = MaskEmbeddingConfig(dim=self.width(f"heads.{MASK}.embedding", 0))
        return ModelConfig(
            family="melhubert",
            frontend=self.frontend(feature_dim, contents, notes),
            projection=ProjectionConfig(feature_dim=feature_dim, linear="projection.linear.weight" in self.state),
            encoder=encoder,
            heads=heads,
        )

    def encoder(self, contents: Mapping[str, Any], notes: dict[str, Any]) -> EncoderConfig:
        settings = self.settings
        if settings.choice("attention_type", "original", {"original": "original", "causal": "causal"}) == "causal":
            raise CheckpointError(
                f"{self.source} was trained with attention_type causal, whose positional convolution still sees the future: "
                "sslim has no such half-causal encoder, only attention_type original loads"
            )
        if settings.number("encoder_layers", 1) == 0:
            raise CheckpointError(
                f"{self.source} has no encoder layers (encoder_layers 0), so it has no representations to load"
            )
        pre_norm = settings.boolean("layer_norm_first", False)
        dim = self.width(f"encoder.{'final' if pre_norm else 'input'}_norm.weight", 0)
        self.agreed("encoder_embed_dim", dim)
        blocks = self.blocks(dim, contents, notes)
        return EncoderConfig(
            dim=dim,
            blocks=blocks,
            depth_map=tuple(range(len(blocks))),
            positions=self.positions(dim),
            norm_placement="pre" if pre_norm else "post",
            input_norm=not pre_norm,
            final_norm=pre_norm,
            activation=settings.choice("activation_fn", "gelu", ACTIVATIONS),
            dropout=settings.number("dropout", 0.1, high=1.0),
            attention_dropout=settings.number("attention_dropout", 0.1, high=1.0),
            activation_dropout=settings.number("activation_dropout", 0.1, high=1.0),
            layer_drop=settings.number("encoder_layerdrop", 0.0, high=1.0),
        )

    def width(self, name: str, axis: int, default: int | None = None) -> int:
        """Size of one axis of a matrix or vector; ``default`` when the tensor is absent."""
        tensor = self.state.get(name)
        if tensor is None:
            if default is not None:
                return default
            raise CheckpointError(f"{self.source} lacks {name}, which every MelHuBERT has")
        if tensor.dim() <= axis:
            raise CheckpointError(f"{self.source}: {name} has shape {tuple(tensor.shape)}")
        return tensor.shape[axis]

    def agreed(self, name: str, found: int) -> int:
        """Returns ``found`` unless the setting of that name says otherwise."""
        stated = self.settings.count(name, found)
        if stated != found:
            raise CheckpointError(f"{self.source}: its setting {name} is {stated}, its tensors say {found}")
        return found

    def positions(self, dim: int) -> ConvPositionsConfig | None:
        if not any(name.startswith("encoder.positions.") for name in self.state):
            return None
        direction = self.state.get("encoder.positions.direction")
        if direction is None or direction.dim() != 3 or not direction.shape[1] or dim % direction.shape[1]:
            raise CheckpointError(f"{self.source} has no readable positional convolution (encoder.pos_conv.0.weight_v)")
        if (depth := self.settings.count("pos_conv_depth", 1)) != 1:
            raise CheckpointError(f"{self.source}: its setting pos_conv_depth is {depth}, expected 1")
        groups = self.agreed("conv_pos_groups", dim // direction.shape[1])
        return ConvPositionsConfig(kernel_size=self.agreed("conv_pos", direction.shape[2]), groups=groups)

    def blocks(self, dim: int, contents: Mapping[str, Any], notes: dict[str, Any]) -> tuple[BlockConfig, ...]:
        found = {int(match[1]) for name in self.state if (match := re.match(r"encoder\.blocks\.(\d+)\.", name))}
        num_layers = self.agreed("encoder_layers", len(found))
        num_heads = self.settings.count("encoder_attention_heads", 12)
        if found != set(range(num_layers)) or dim % num_heads:
            reason = (
                "its layers are not numbered in a row"
                if found != set(range(num_layers))
                else f"{num_heads} heads do not divide {dim}"
            )
            raise CheckpointError(f"{self.source}: {reason}")
        head_dim = dim // num_heads  # stays what it was when heads are pruned
        blocks = tuple(self.block(layer, head_dim) for layer in range(num_layers))
        stated = self.settings.count("encoder_ffn_embed_dim", 3072)
        if any(block.feedforward_dim != stated for block in blocks):
            notes["stated_feedforward_dim"] = stated
        remaining = [block.num_heads for block in blocks]
        if contents.get("Pruned_heads") or any(heads != num_heads for heads in remaining):
            notes |= _head_notes(contents.get("Pruned_heads"), num_heads, remaining)
        return blocks

    def block(self, layer: int, head_dim: int) -> BlockConfig:
        inner = self.width(f"encoder.blocks.{layer}.attention.query.weight", 0)
        rows = self.width(f"encoder.blocks.{layer}.feedforward.up.weight", 0)
        if not inner or not rows:
            part = "feed-forward units" if inner else "attention heads"
            raise CheckpointError(
                f"{self.source}: layer {layer + 1} has no {part} left; the bias and norm that remain have no place"
            )
        if inner % head_dim:
            raise CheckpointError(
                f"{self.source}: layer {layer + 1} has {inner} attention rows, no multiple of head width {head_dim}"
            )
        return BlockConfig(num_heads=inner // head_dim, head_dim=head_dim, feedforward_dim=rows)

    def frontend(self, feature_dim: int, contents: Mapping[str, Any], notes: dict[str, Any]) -> FrontendConfig | None:
        """The documented front-end of 40 or 80 features; None, with a note, for any other input."""
        period_ms = FRAME_PERIODS_MS.get(feature_dim)
        stated = state_of(contents.get("Args")).get("frame_period")
        if period_ms is not None and isinstance(stated, int) and stated != period_ms:
            raise CheckpointError(
                f"{self.source}: its Args say frames of {stated} ms, {feature_dim} features mean frames of {period_ms} ms"
            )
        audio = contents["Upstream_Config"].get("data", {})
        audio = audio.get("audio", {}) if isinstance(audio, dict) else {}
        expected = {"feat_type": "fbank", "feat_dim": 40, "frame_length": 25, "frame_shift": 10}
        other = {
            key: audio[key] for key, value in expected.items() if isinstance(audio, dict) and audio.get(key, value) != value
        }
        if period_ms is None or other:
            notes["frontend"] = f"unknown: {feature_dim} features{''.join(f', {k} {short(v)}' for k, v in other.items())}"
            return None
        notes["frontend"] = f"40 log-Mel bins every 10 ms, as documented for {feature_dim} features; the file does not say"
        return melhubert_frontend(period_ms)


def _head_notes(steps: Any, num_heads: int, remaining: list[int]) -> dict[str, Any]:
    """Original numbers (from 0) of the heads that are left, where the file's list of prunings fits the tensors.

    Each step's numbers count the heads that were left at that step, so the list is replayed.
    """
    kept = [list(range(num_heads)) for _ in remaining]
    try:
        for step in steps or []:
            for layer, heads in step.items():
                kept[layer] = [head for index, head in enumerate(kept[layer]) if index not in heads]
    except (AttributeError, IndexError, KeyError, TypeError):
        return {"pruned_heads": "the file's list is malformed; shapes come from the tensors"}
    if [len(heads) for heads in kept] != remaining:
        return {"pruned_heads": f"the file's list leaves {[len(h) for h in kept]} heads, the tensors have {remaining}"}
    return {"kept_heads": kept}


def _notes(contents: Mapping[str, Any], upstream: Mapping[str, Any]) -> dict[str, Any]:
    runner = contents.get("Runner", contents.get("Config"))
    runner = runner if isinstance(runner, dict) else {}
    expert = runner.get("pretrain_expert")
    datarc = runner.get("datarc") or (expert.get("datarc") if isinstance(expert, dict) else None)
    sets = datarc.get("sets") if isinstance(datarc, dict) else None
    args = state_of(contents.get("Args"))
    notes = {
        "settings": plain(upstream),
        "step": plain(contents.get("Step")),
        "training_sets": plain(sets),
        "mode": plain(args.get("mode")),
        "initial_weight": plain(args.get("initial_weight")),
    }
    found = {match for name in sets or [] if isinstance(name, str) for match in STATISTICS_NAMES.findall(name)}
    if len(found) == 1:
        notes["likely_statistics"] = f"libri-{found.pop()}"
    return {key: value for key, value in notes.items() if value is not None}
