"""The one table between fairseq's tensor names and the native ones, for every model of the wav2vec 2.0 and HuBERT line.

HuBERT, LightHuBERT, DistilHuBERT, DistilALHuBERT and MelHuBERT files name their encoder alike; all but the last have
convolutions over the waveform. What only one family has (heads, mask embedding) is in that family's importer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from sslim.checkpoints.restricted_pickle import CheckpointError

ENCODER = {  # fairseq -> native, each with .weight and .bias; {i} is a layer counted from 0
    "encoder.layers.{i}.self_attn.k_proj": "encoder.blocks.{i}.attention.key",
    "encoder.layers.{i}.self_attn.v_proj": "encoder.blocks.{i}.attention.value",
    "encoder.layers.{i}.self_attn.q_proj": "encoder.blocks.{i}.attention.query",
    "encoder.layers.{i}.self_attn.out_proj": "encoder.blocks.{i}.attention.output",
    "encoder.layers.{i}.self_attn_layer_norm": "encoder.blocks.{i}.attention_norm",
    "encoder.layers.{i}.fc1": "encoder.blocks.{i}.feedforward.up",
    "encoder.layers.{i}.fc2": "encoder.blocks.{i}.feedforward.down",
    "encoder.layers.{i}.final_layer_norm": "encoder.blocks.{i}.feedforward_norm",
}
POSITIONS = {
    "encoder.pos_conv.0.bias": "encoder.positions.bias",
    "encoder.pos_conv.0.weight_g": "encoder.positions.gain",
    "encoder.pos_conv.0.weight_v": "encoder.positions.direction",
}
MODERN_POSITIONS = {  # torch.nn.utils.parametrizations.weight_norm instead of torch.nn.utils.weight_norm
    "encoder.pos_conv.0.parametrizations.weight.original0": "encoder.positions.gain",
    "encoder.pos_conv.0.parametrizations.weight.original1": "encoder.positions.direction",
}
WAVEFORM = {
    "feature_extractor.conv_layers.{i}.0": "frontend.layers.{i}",
    "feature_extractor.conv_layers.{i}.2": "frontend.layers.{i}.norm",  # group norm, of the first layer
    "feature_extractor.conv_layers.{i}.2.1": "frontend.layers.{i}.norm",  # layer norm, of every layer
    "layer_norm": "projection.norm",
    "post_extract_proj": "projection.linear",
}
_LAYER = re.compile(r"\.(\d{1,4})\.")


def with_parts(pairs: Mapping[str, str]) -> dict[str, str]:
    """Spells out ``.weight`` and ``.bias`` of every pair."""
    return {f"{foreign}.{part}": f"{native}.{part}" for foreign, native in pairs.items() for part in ("weight", "bias")}


def encoder_norm(*, final_norm: bool) -> dict[str, str]:
    """``encoder.layer_norm`` is the final norm of pre-norm models, the input norm of post-norm ones."""
    return {"encoder.layer_norm": "encoder.final_norm" if final_norm else "encoder.input_norm"}


def translate(name: str, table: Mapping[str, str]) -> str | None:
    """Returns the other name of a tensor by a table in which {i} stands for the first number of the name, or None."""
    if name in table:
        return table[name]
    layer = _LAYER.search(name)
    if layer is None:
        return None
    other = table.get(f"{name[: layer.start(1)]}{{i}}{name[layer.end(1) :]}")
    return None if other is None else other.replace("{i}", layer[1])


def native_name(name: str, *, final_norm: bool) -> str | None:
    """Returns the native name of a tensor of a waveform model, or None when no such model has it.

    Args:
        name: fairseq's name; both forms of weight norm are known.
        final_norm: Whether the model is pre-norm, see :func:`encoder_norm`.
    """
    pairs = with_parts(ENCODER | WAVEFORM | encoder_norm(final_norm=final_norm))
    return translate(name, pairs | POSITIONS | MODERN_POSITIONS)


def native_state(
    weights: Mapping[str, Tensor],
    source: str,
    *,
    final_norm: bool,
    what: str = "a HuBERT",
    others: Mapping[str, str] | None = None,
    dropped: Collection[str] = (),
) -> dict[str, Tensor]:
    """Translates the tensors of a waveform model with fairseq's names; see :func:`rename`.

    Args:
        weights: Tensors by fairseq's names.
        source: The file's name, for errors.
        final_norm: Whether the model is pre-norm, see :func:`encoder_norm`.
        what: What the model is, for errors.
        others: Whole names that only this family has, and their native names.
        dropped: Names that are left out.
    """
    known = dict(others or {})
    pairs = with_parts(ENCODER | WAVEFORM | encoder_norm(final_norm=final_norm)) | POSITIONS | MODERN_POSITIONS | known
    return rename(weights, source, lambda name: translate(name, pairs), what=what, dropped=dropped)


def rename(
    weights: Mapping[str, Tensor],
    source: str,
    name_of: Callable[[str], str | None],
    *,
    what: str,
    dropped: Collection[str] = (),
    copy: bool = True,
) -> dict[str, Tensor]:
    """Puts tensors under their native names in float32; every one is used once or is among ``dropped``.

    Args:
        weights: Tensors by foreign names.
        source: The file's name, for errors.
        name_of: Foreign name to native one; None for a tensor nobody knows.
        what: What the model is, for errors.
        dropped: Foreign names that are left out.
        copy: False for tensors that are copies of the file's already.

    Raises:
        CheckpointError: A tensor nobody knows, one that is there under two names, one that holds no finite floating-point
            numbers.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name in dropped:
            continue
        native = name_of(name)
        if native is None:
            raise CheckpointError(f"{source} has a tensor {name[:80]!r}, which is no part of {what}")
        if native in state:
            raise CheckpointError(f"{source} has {native} twice, under two names")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{source}: {name} holds {tensor.dtype}, expected floating-point numbers")
        state[native] = tensor.to(torch.float32, copy=copy, memory_format=torch.contiguous_format)
        if not bool(state[native].sum().isfinite()) and not bool(state[native].isfinite().all()):  # the sum is ten times faster
            raise CheckpointError(f"{source}: {name} holds NaN or infinite values, the training had diverged")
    return state


def tensors_of(weights: object, source: str, key: str) -> dict[str, Tensor]:
    """Returns a file's weights when they are a dictionary of tensors by name; data parallel's ``module.`` is taken off.

    Args:
        weights: What the file holds under ``key``.
        source: The file's name, for errors.
        key: Where it was, for errors.

    Raises:
        CheckpointError: No dictionary, an empty one, or one that holds something else than tensors.
    """
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"{source} is a checkpoint without weights under {key!r}")
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{source}: {str(name)[:80]!r} in its weights is a {type(tensor).__name__}, not a tensor")
    prefixed = all(name.startswith("module.") for name in weights)
    return {name.removeprefix("module.") if prefixed else name: tensor for name, tensor in weights.items()}
