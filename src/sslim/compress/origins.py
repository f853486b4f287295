"""Where the parts of a cut model come from: the numbers that its blocks, heads and units had before anything was removed.

Every cut notes what it kept in the model's provenance by these numbers, not by those of the round before, so that after any
number of rounds they still name the same parts. All of them count from 0.

A model that says nothing is its own origin. So is one whose sizes no longer fit its last note (a subnet extracted from a
pruned supernet, say): from there on numbers count within it. Relative positions keep the numbers of their heads in the
description, and those are the ones that count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sslim.models import SpeechModel
from sslim.models.elastic import slice_model
from sslim.nn.encoder import EncoderConfig, original_heads
from sslim.nn.slicing import Units

KEPT_BLOCKS, KEPT_HEADS, KEPT_UNITS = "kept_blocks", "kept_heads", "kept_units"


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Original numbers, from 0, of what a model has.

    Attributes:
        blocks: Of each block.
        heads: Of each block's attention heads, among those of its original block.
        units: Of each block's feed-forward units, likewise.
    """

    blocks: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    units: tuple[tuple[int, ...], ...]

    def fits(self, config: EncoderConfig) -> bool:
        """Whether there is a number for everything that an encoder has, and no more."""
        sizes = [(block.num_heads, block.feedforward_dim) for block in config.blocks]
        mine = [(len(heads), len(units)) for heads, units in zip(self.heads, self.units, strict=True)]
        return mine == sizes and len(self.blocks) == len(sizes)

    def kept(self, config: EncoderConfig, units: Units) -> Origins:
        """Returns the origins of what is left when ``units`` of an encoder with these origins are kept."""
        blocks = range(len(config.blocks))
        if units != Units.full(config):
            blocks = sorted({config.depth_map[depth] for depth in units.depths})  # type: ignore[assignment]
        return Origins(
            blocks=tuple(self.blocks[b] for b in blocks),
            heads=tuple(tuple(self.heads[b][head] for head in units.heads[b]) for b in blocks),
            units=tuple(tuple(self.units[b][unit] for unit in units.feedforward[b]) for b in blocks),
        )

    def entry(self) -> dict[str, Any]:
        """Returns them as plain values for a note in a model's provenance."""
        return {
            KEPT_BLOCKS: list(self.blocks),
            KEPT_HEADS: [list(heads) for heads in self.heads],
            KEPT_UNITS: [spans(units) for units in self.units],
        }


def origins(model: SpeechModel) -> Origins:
    """Returns the original numbers of a model's blocks, heads and units, as its provenance tells them.

    It reads the notes of this package and the ``kept_heads`` of an imported MelHuBERT that was pruned by its own code.
    """
    encoder = model.config.transformer
    own = Origins(
        blocks=tuple(range(len(encoder.blocks))),
        heads=tuple(original_heads(block) for block in encoder.blocks),
        units=tuple(tuple(range(block.feedforward_dim)) for block in encoder.blocks),
    )
    note = next((entry for entry in reversed(model.provenance) if KEPT_HEADS in entry), None)
    if note is None or note[KEPT_HEADS] is None:
        return own
    heads = own.heads if encoder.relative_positions is not None else tuple(map(tuple, note[KEPT_HEADS]))
    read = Origins(
        blocks=tuple(note.get(KEPT_BLOCKS, own.blocks)),
        heads=heads,
        units=tuple(map(numbers, note[KEPT_UNITS])) if KEPT_UNITS in note else own.units,
    )
    same_blocks = len(read.blocks) == len(read.heads) == len(read.units)
    return read if same_blocks and read.fits(encoder) else own


def cut(model: SpeechModel, units: Units, note: Mapping[str, Any]) -> SpeechModel:
    """Returns a standalone model of the kept units, in eval mode, with one more note in its provenance.

    Args:
        model: The model; it stays as it is.
        units: What is kept, by the model's own numbers.
        note: What the method says of itself, plain values.

    Raises:
        ValueError: Units that the model does not have.
    """
    units.check(model.config.transformer)
    kept = origins(model).kept(model.config.transformer, units)
    small = slice_model(model, units).eval()
    small.provenance.append({**note, **kept.entry()})
    return small


def spans(members: Iterable[int]) -> str:
    """Writes numbers as ``0-5,8,10-11``, in their order; empty for none."""
    runs: list[list[int]] = []
    for member in members:
        if runs and member == runs[-1][1] + 1:
            runs[-1][1] = member
        else:
            runs.append([member, member])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def numbers(text: str) -> tuple[int, ...]:
    """Reads what :func:`spans` writes."""
    members: list[int] = []
    for run in text.split(",") if text else ():
        first, _, last = run.partition("-")
        members += range(int(first), int(last or first) + 1)
    return tuple(members)
