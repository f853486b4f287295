"""DPHuBERT and DPWavLM checkpoints: jointly distilled and pruned HuBERT and WavLM (Peng et al., arXiv 2305.17651).

Layout: ``state_dict`` with torchaudio's names, ``config`` with the sizes of every layer, and in released files
``distill_linear_projs``, the maps from student layers to the teacher's. Unpruned students have the same layout. A file with
``encoder_remaining_heads`` is a WavLM. Files from the middle of pruning hold gates (``log_alpha``) and are refused: what they
compute is not what is left after pruning.

The maps become the heads ``distillation_K`` of layer K, 0 being the projection's output. The file does not say which layers
they belong to; four of them are those of the published recipes, a third of the depth apart. Maps that share storage are copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sslim.checkpoints.importers import Imported, huggingface, wavlm_names
from sslim.checkpoints.importers.conv_layers import parse_conv_layers
from sslim.checkpoints.importers.fairseq_names import rename, tensors_of, translate
from sslim.checkpoints.importers.hubert import padding_note
from sslim.checkpoints.importers.settings import Settings, plain, short
from sslim.checkpoints.restricted_pickle import CheckpointError
from sslim.frontends import ConvFrontendConfig, ConvLayerConfig
from sslim.models import ModelConfig
from sslim.models.dphubert import dphubert
from sslim.nn.heads import HeadConfig, RegressionHeadConfig
from sslim.nn.positions import ConvPositionsConfig

WEIGHTS, SETTINGS, MAPS = "state_dict", "config", "distill_linear_projs"
CONVOLUTIONS, REMAINING_HEADS = "extractor_conv_layer_config", "encoder_remaining_heads"
EXTRACTOR_MODES = {"group_norm": "group", "layer_norm": "layer"}
MAX_LAYERS = 256
_PREFIXES = {"encoder.transformer.": "encoder.", "encoder.feature_projection.": "feature_projection."}
_DUMMY = "feature_extractor.dummy_weight"
_OWN = {_DUMMY: "frontend.scale"}
_CLASSIC = {
    "encoder.pos_conv_embed.conv.weight_g": "encoder.positions.gain",
    "encoder.pos_conv_embed.conv.weight_v": "encoder.positions.direction",
}
_GATES = ("gru_rel_pos_const", "gru_rel_pos_linear.weight", "gru_rel_pos_linear.bias")


def recognises(contents: Any) -> bool:
    """Whether a file's contents are a DPHuBERT or DPWavLM checkpoint."""
    settings = contents.get(SETTINGS) if isinstance(contents, dict) else None
    return isinstance(settings, dict) and CONVOLUTIONS in settings and WEIGHTS in contents


def convert(contents: Mapping[str, Any], source: str) -> Imported:
    """Translates a checkpoint.

    Args:
        contents: What ``read_pickle`` gives.
        source: The file's name, for errors.

    Raises:
        CheckpointError: Gates of an unfinished pruning, a tensor nobody knows, settings that are malformed.
    """
    weights = tensors_of(contents[WEIGHTS], source, WEIGHTS)
    if gate := next((name for name in weights if name.endswith("log_alpha")), None):
        raise CheckpointError(
            f"{source} holds gates ({gate[:80]}), so it is from the middle of DPHuBERT's pruning: "
            "give the file that its prune.py or final distillation wrote"
        )
    config = _describe(Settings(contents[SETTINGS], source), weights)
    dropped = _unused(weights, config, wavlm=REMAINING_HEADS in contents[SETTINGS])
    table = huggingface.names(final_norm=config.transformer.final_norm) | _CLASSIC | _OWN | wavlm_names.NAMES
    state = rename(weights, source, lambda name: translate(_short_name(name), table), what="a DPHuBERT", dropped=dropped)
    assert isinstance(config.frontend, ConvFrontendConfig)
    notes: dict[str, Any] = {"settings": plain(contents[SETTINGS]), "padding": padding_note(config.frontend)}
    if dropped:
        notes["dropped"] = dropped
    heads, maps = _distillation(contents.get(MAPS), config.transformer.num_layers, source, notes)
    return Imported(config=replace(config, heads=heads), state=wavlm_names.flat_constants(state) | maps, notes=notes)


def _short_name(name: str) -> str:
    """torchaudio's name as transformers has it."""
    for long, short_one in _PREFIXES.items():
        if name.startswith(long):
            return short_one + name.removeprefix(long)
    return name


def _describe(settings: Settings, weights: Mapping[str, Tensor]) -> ModelConfig:
    num_layers, dim = settings.count("encoder_num_layers", 12), settings.count("encoder_embed_dim", 768)
    attention = _per_layer(settings, "encoder_use_attention", num_layers, bool, True)
    feedforward = _per_layer(settings, "encoder_use_feed_forward", num_layers, bool, True)
    units = _per_layer(settings, "encoder_ff_interm_features", num_layers, int, 3072)
    sizes: dict[str, Any] = {}
    if REMAINING_HEADS in settings.values:
        sizes |= _wavlm_heads(settings, num_layers, dim, attention)
        if wavlm_names.TABLE not in map(_short_name, weights) and not attention[0]:
            # Without attention in its first layer the reference has no table, hence no bias anywhere.
            sizes |= {"relative_positions": None, "head_ids": None}
    else:
        heads = _per_layer(settings, "encoder_num_heads", num_layers, int, 12)
        sizes |= {"num_heads": _where(attention, heads), "head_dim": settings.count("encoder_head_dim", 64)}
    conv_layers = parse_conv_layers(settings.values[CONVOLUTIONS], settings.source)
    frontend = ConvFrontendConfig(
        layers=conv_layers,
        norm=settings.choice("extractor_mode", "group_norm", EXTRACTOR_MODES),
        bias=settings.boolean("extractor_conv_bias", False),
        channel_scale=_DUMMY in weights or _is_pruned(conv_layers, sizes, dim),
        normalize_waveform=settings.boolean("normalize_waveform", False),
    )
    positions = ConvPositionsConfig(
        kernel_size=settings.count("encoder_pos_conv_kernel", 128), groups=settings.count("encoder_pos_conv_groups", 16)
    )
    try:
        return dphubert(
            **sizes,
            feedforward_dims=_where(feedforward, units),
            dim=dim,
            frontend=frontend,
            positions=positions,
            norm_placement="pre" if settings.boolean("encoder_layer_norm_first", False) else "post",
            dropout=settings.number("encoder_dropout", 0.1, high=1.0),
            attention_dropout=settings.number("encoder_attention_dropout", 0.1, high=1.0),
            activation_dropout=settings.number("encoder_ff_interm_dropout", 0.0, high=1.0),
            layer_drop=settings.number("encoder_layer_drop", 0.0, high=1.0),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{settings.source} describes a model that cannot be: {error}") from error


def _is_pruned(conv_layers: tuple[ConvLayerConfig, ...], sizes: Mapping[str, Any], dim: int) -> bool:
    """Whether heads or channels are gone; only files from before pruning may lack the factors on the last channels."""
    uniform = len({layer.channels for layer in conv_layers}) == 1
    return not uniform or any(heads * sizes["head_dim"] != dim for heads in sizes["num_heads"])


def _per_layer(settings: Settings, name: str, num_layers: int, kind: type, default: Any) -> list[Any]:
    """A setting with one value for each layer; a missing one is the default everywhere."""
    if num_layers > MAX_LAYERS:
        raise CheckpointError(f"{settings.source}: its setting encoder_num_layers is {num_layers}, expected up to {MAX_LAYERS}")
    values = settings.values.get(name, [default] * num_layers)
    fits = isinstance(values, list | tuple) and len(values) == num_layers
    if not fits or not all(isinstance(value, int) and type(value) is kind and 0 <= value <= 1 << 20 for value in values):
        what = "true or false" if kind is bool else "whole numbers"
        raise CheckpointError(f"{settings.source}: its setting {name} is {short(values)}, expected {num_layers} of {what}")
    return list(values)


def _where(present: list[bool], sizes: list[int]) -> tuple[int, ...]:
    return tuple(size if there else 0 for there, size in zip(present, sizes, strict=True))


def _wavlm_heads(settings: Settings, num_layers: int, dim: int, attention: list[bool]) -> dict[str, Any]:
    """Heads of a DPWavLM: how many there were, which are left in each layer."""
    totals = set(_per_layer(settings, "encoder_total_num_heads", num_layers, int, 12))
    total = max(totals)
    if len(totals) != 1 or total < 1 or dim % total:
        raise CheckpointError(
            f"{settings.source}: its setting encoder_total_num_heads holds {sorted(totals)}, "
            f"expected one number that divides {dim}"
        )
    remaining = settings.values[REMAINING_HEADS]
    fits = isinstance(remaining, list | tuple) and len(remaining) == num_layers
    for heads in remaining if fits else [None]:
        if not isinstance(heads, list | tuple) or not all(type(head) is int and 0 <= head < total for head in heads):
            raise CheckpointError(
                f"{settings.source}: its setting {REMAINING_HEADS} is {short(remaining)}, expected {num_layers} lists of "
                f"heads from 0 to {total - 1}"
            )
    kept = [tuple(heads) if there else () for heads, there in zip(remaining, attention, strict=True)]
    return {
        "num_heads": [len(heads) for heads in kept],
        "head_dim": dim // total,
        "head_ids": [None if heads == tuple(range(len(heads))) else heads for heads in kept],
        "relative_positions": wavlm_names.relative_positions(
            settings, total, buckets_name="encoder_num_buckets", distance_name="encoder_max_distance"
        ),
    }


def _unused(weights: Mapping[str, Tensor], config: ModelConfig, *, wavlm: bool) -> list[str]:
    """Names of tensors that the model does not compute with.

    They are the output layer of a fine-tuned model (``aux``), the norms of parts that are gone from a pre-norm model, and gates
    of a WavLM whose table went with its first layer's attention.
    """
    names = {"aux.weight", "aux.bias"}
    for number, block in enumerate(config.transformer.blocks):
        layer = f"encoder.transformer.layers.{number}"
        norms = {"layer_norm": block.num_heads, "final_layer_norm": block.feedforward_dim}
        gone = [norm for norm, width in norms.items() if not width and config.transformer.norm_placement == "pre"]
        names |= {f"{layer}.{norm}.{part}" for norm in gone for part in ("weight", "bias")}
        if wavlm and config.transformer.relative_positions is None:
            names |= {f"{layer}.attention.{gate}" for gate in _GATES}
    return sorted(names & weights.keys())


def _distillation(
    maps: Any, num_layers: int, source: str, notes: dict[str, Any]
) -> tuple[dict[str, HeadConfig], dict[str, Tensor]]:
    """The maps to the teacher as heads and native tensors; says in ``notes`` whose they are taken to be."""
    if maps is None or maps == {}:
        return {}, {}
    weights = tensors_of(maps, source, MAPS)
    numbers = sorted({name.split(".")[0] for name in weights})
    linear = set(weights) <= {f"{number}.{part}" for number in range(4) for part in ("weight", "bias")}
    if numbers != ["0", "1", "2", "3"] or not linear or num_layers % 3 or any(f"{n}.weight" not in weights for n in numbers):
        notes[MAPS] = f"left out: {', '.join(sorted(weights))[:200]}; only four linear maps have documented layers"
        return {}, {}
    layers = {number: int(number) * num_layers // 3 for number in numbers}
    heads: dict[str, HeadConfig] = {}
    for number, layer in layers.items():
        weight = weights[f"{number}.weight"]
        if weight.dim() != 2:
            raise CheckpointError(f"{source}: {MAPS} {number}.weight has shape {tuple(weight.shape)}, expected a matrix")
        heads[f"distillation_{layer}"] = RegressionHeadConfig(output_dim=weight.shape[0], bias=f"{number}.bias" in weights)

    def native(name: str) -> str:
        number, part = name.split(".")
        return f"heads.distillation_{layers[number]}.linear.{part}"

    last = weights[f"{numbers[-1]}.weight"]
    same = [layers[n] for n in numbers if torch.equal(weights[f"{n}.weight"], last)]
    notes[MAPS] = f"taken for layers {', '.join(map(str, layers.values()))}, as in the published recipes; the file does not say"
    if len(same) > 1:
        notes["equal_maps"] = same
    return heads, rename(weights, source, native, what="a DPHuBERT")
