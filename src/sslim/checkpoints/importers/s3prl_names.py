"""The one table between S3PRL's names of Mockingjay, TERA and AALBERT tensors and the native ones, for both directions."""

from __future__ import annotations

from sslim.checkpoints.importers.fairseq_names import translate, with_parts
from sslim.models.reconstruction import HEAD

ENCODER = {  # under ``Transformer``, each with .weight and .bias; {i} is a layer counted from 0
    "input_representations.spec_transform": "projection.linear",
    "input_representations.LayerNorm": "encoder.input_norm",
    "encoder.layer.{i}.attention.self.query": "encoder.blocks.{i}.attention.query",
    "encoder.layer.{i}.attention.self.key": "encoder.blocks.{i}.attention.key",
    "encoder.layer.{i}.attention.self.value": "encoder.blocks.{i}.attention.value",
    "encoder.layer.{i}.attention.output.dense": "encoder.blocks.{i}.attention.output",
    "encoder.layer.{i}.attention.output.LayerNorm": "encoder.blocks.{i}.attention_norm",
    "encoder.layer.{i}.intermediate.dense": "encoder.blocks.{i}.feedforward.up",
    "encoder.layer.{i}.output.dense": "encoder.blocks.{i}.feedforward.down",
    "encoder.layer.{i}.output.LayerNorm": "encoder.blocks.{i}.feedforward_norm",
}
HEAD_NAMES = {  # under ``SpecHead``
    "dense": f"heads.{HEAD}.inner",
    "LayerNorm": f"heads.{HEAD}.norm",
    "output": f"heads.{HEAD}.outer",
}
ALIASES = {  # pre-norm models register these norms of a layer twice: the second name -> the first
    "attention.LayerNorm": "attention.output.LayerNorm",
    "LayerNorm": "output.LayerNorm",
}
STATE_NORM = "encoder.LayerNorm."  # pre-norm: one for each returned state, the last one is the final norm
OLD_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}  # of norms, before v0.1


def modern_name(name: str) -> str:
    """Returns a tensor's name with the endings that norms have had since v0.1."""
    for old, new in OLD_ENDINGS.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def native_name(name: str, *, head: bool, last_norm: str | None = None) -> str | None:
    """Returns the native name of a tensor, or None when no such model has it.

    Args:
        name: S3PRL's name, in modern form.
        head: Whether it is one of ``SpecHead``.
        last_norm: Of a pre-norm model, which of its ``encoder.LayerNorm.`` is the final one.
    """
    if last_norm is not None and not head and name.startswith(f"{STATE_NORM}{last_norm}."):
        return f"encoder.final_norm.{name.rpartition('.')[2]}"
    return translate(name, with_parts(HEAD_NAMES if head else ENCODER))


def foreign_name(name: str) -> tuple[str, str] | None:
    """Returns where a native tensor goes, ``Transformer`` or ``SpecHead``, and its name there; None for the final norm."""
    for key, table in (("Transformer", ENCODER), ("SpecHead", HEAD_NAMES)):
        other = translate(name, {native: foreign for foreign, native in with_parts(table).items()})
        if other is not None:
            return key, other
    return None
