"""The one table between MelHuBERT's tensor names (fairseq-like) and the native ones, used by importer and exporter."""

from __future__ import annotations

import re

_PAIRS = {  # foreign -> native; {i} is a layer counted from 0
    "pre_extract_proj": "projection.linear",
    "encoder.layers.{i}.self_attn.k_proj": "encoder.blocks.{i}.attention.key",
    "encoder.layers.{i}.self_attn.v_proj": "encoder.blocks.{i}.attention.value",
    "encoder.layers.{i}.self_attn.q_proj": "encoder.blocks.{i}.attention.query",
    "encoder.layers.{i}.self_attn.out_proj": "encoder.blocks.{i}.attention.output",
    "encoder.layers.{i}.self_attn_layer_norm": "encoder.blocks.{i}.attention_norm",
    "encoder.layers.{i}.fc1": "encoder.blocks.{i}.feedforward.up",
    "encoder.layers.{i}.fc2": "encoder.blocks.{i}.feedforward.down",
    "encoder.layers.{i}.final_layer_norm": "encoder.blocks.{i}.feedforward_norm",
    "final_proj": "heads.masked_prediction.linear",
}
_SINGLE = {
    "encoder.pos_conv.0.bias": "encoder.positions.bias",
    "encoder.pos_conv.0.weight_g": "encoder.positions.gain",
    "encoder.pos_conv.0.weight_v": "encoder.positions.direction",
    "mask_emb": "heads.masked_prediction.mask_embedding",
}
_MODERN = {  # torch.nn.utils.parametrizations.weight_norm instead of torch.nn.utils.weight_norm
    "encoder.pos_conv.0.parametrizations.weight.original0": "encoder.positions.gain",
    "encoder.pos_conv.0.parametrizations.weight.original1": "encoder.positions.direction",
}
_LAYER = re.compile(r"\.(\d{1,4})\.")


def _table(*, final_norm: bool) -> dict[str, str]:
    norm = {"encoder.layer_norm": "encoder.final_norm" if final_norm else "encoder.input_norm"}
    table = dict(_SINGLE)
    for foreign, native in (_PAIRS | norm).items():
        table |= {f"{foreign}.{part}": f"{native}.{part}" for part in ("weight", "bias")}
    return table


def _translate(name: str, table: dict[str, str]) -> str | None:
    if name in table:
        return table[name]
    layer = _LAYER.search(name)
    if layer is None:
        return None
    native = table.get(f"{name[: layer.start(1)]}{{i}}{name[layer.end(1) :]}")
    return None if native is None else native.replace("{i}", layer[1])


def native_name(name: str, *, final_norm: bool) -> str | None:
    """Returns the native name of a foreign one, or None; ``encoder.layer_norm`` is the final norm of pre-norm models only."""
    return _translate(name, _table(final_norm=final_norm) | _MODERN)


def foreign_name(name: str, *, final_norm: bool) -> str | None:
    """Returns the foreign name (with classic weight norm) of a native one, or None."""
    return _translate(name, {native: foreign for foreign, native in _table(final_norm=final_norm).items()})
