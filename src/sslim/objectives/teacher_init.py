"""Starting a student from its teacher's tensors: copied whole where shapes are equal, never cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sslim.frontends import SpectralFrontendConfig
from sslim.models import SpeechModel


@dataclass(frozen=True, kw_only=True)
class TeacherInitConfig:
    """What a student takes over from its teacher.

    Attributes:
        layers: For each of the student's blocks, in order, the teacher layer (from 1) it starts as; 0 leaves it random.
        frontend: The front-end's tensors or statistics.
        projection: The input projection and its norm. (The references forgot the norm.)
        positions: The positions, and the norms before and after the blocks. (Likewise.)
    """

    layers: tuple[int, ...] = ()
    frontend: bool = True
    projection: bool = True
    positions: bool = True


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" and more" if len(names) > 3 else "")


def _copy_part(name: str, prefix: str, mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Copies a part's tensors of equal shape; returns a note when some do not fit."""
    fits = [key for key in mine if key in theirs and mine[key].shape == theirs[key].shape]
    for key in fits:
        mine[key].copy_(theirs[key])
    left = [f"{prefix}{key}" for key in mine if key not in fits]
    unused = [f"{prefix}{key}" for key in theirs if key not in mine]
    notes = []
    if left:
        notes.append(f"{name}: {_few(left)} did not fit and are not taken over")
    if unused:
        notes.append(f"{name}: the student has no place for the teacher's {_few(unused)}")
    return notes


@torch.no_grad()
def init_from_teacher(student: SpeechModel, teacher: SpeechModel, config: TeacherInitConfig) -> list[str]:
    """Copies the teacher's tensors into a student, in place.

    Tensors are copied whole or not at all: a narrower student takes no prefix of a wider teacher (``sslim compress`` has
    methods that cut models).

    Args:
        student: The student.
        teacher: The teacher; layers of a stack that is shared are the blocks that run there.
        config: What is taken over.

    Returns:
        Notes on what did not fit outside the blocks, and on settings that make other use of what did.

    Raises:
        ValueError: The layers are not one for each block, or do not exist, or a block has other shapes than its layer.
    """
    blocks = student.config.transformer.blocks if config.layers else ()
    depths = teacher.config.transformer.depth_map if config.layers else ()
    if config.layers and len(config.layers) != len(blocks):
        raise ValueError(
            f"init.layers names {len(config.layers)} teacher layers, the student has {len(blocks)} blocks: name one for each, "
            "or 0 to leave a block random"
        )
    mine, theirs = dict(student.state_dict()), teacher.state_dict()
    notes: list[str] = []
    if config.frontend:
        notes += _copy_frontend(student, teacher)
    if config.projection:
        notes += _copy_part("projection", "projection.", _part(mine, "projection."), _part(theirs, "projection."))
    if config.positions:
        for part in ("encoder.positions.", "encoder.input_norm.", "encoder.final_norm."):
            notes += _copy_part("positions and norms", part, _part(mine, part), _part(theirs, part))
    for number, layer in enumerate(config.layers):
        if layer == 0:
            continue
        if not 1 <= layer <= len(depths):
            raise ValueError(f"init.layers names teacher layer {layer}, the teacher has layers 1 to {len(depths)}")
        source = _part(theirs, f"encoder.blocks.{depths[layer - 1]}.")
        _copy_block(number, layer, _part(mine, f"encoder.blocks.{number}."), source)
    return notes + _other_settings(student, teacher, config)


def _other_settings(student: SpeechModel, teacher: SpeechModel, config: TeacherInitConfig) -> list[str]:
    """Notes on settings that give the copied tensors another meaning than they had in the teacher."""
    mine, theirs = student.config, teacher.config
    compared: list[tuple[str, Any, Any]] = []
    if config.frontend:
        compared.append(("normalize_waveform", mine.frontend, theirs.frontend))
    if any(config.layers):
        compared += [(name, mine.encoder, theirs.encoder) for name in ("norm_placement", "activation")]
    pairs = [(name, getattr(here, name, None), getattr(there, name, None)) for name, here, there in compared]
    return [
        f"{name} is {there!r} in the teacher and {here!r} in the student"
        for name, here, there in pairs
        if None not in (here, there) and here != there
    ]


def _copy_block(number: int, layer: int, block: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    for key in sorted(block.keys() | source.keys()):
        here, there = block.get(key), source.get(key)
        if here is None or there is None or here.shape != there.shape:
            shapes = [("no such tensor" if t is None else f"shape {tuple(t.shape)}") for t in (here, there)]
            raise ValueError(
                f"block {number + 1} of the student cannot start as teacher layer {layer}: its {key} has {shapes[0]}, the "
                f"teacher's {shapes[1]}, and tensors are copied whole or not at all (put 0 for this block)"
            )
        here.copy_(there)


def _copy_frontend(student: SpeechModel, teacher: SpeechModel) -> list[str]:
    if student.frontend is None or teacher.frontend is None:
        return []
    mine, theirs = student.config.frontend, teacher.config.frontend
    if type(mine) is not type(theirs):
        return ["front-end: the teacher's is of another kind"]
    if not isinstance(mine, SpectralFrontendConfig) or not isinstance(theirs, SpectralFrontendConfig):
        parts = (dict(student.frontend.state_dict()), dict(teacher.frontend.state_dict()))
        return _copy_part("front-end", "frontend.", *parts)
    if mine.normalization.kind != "global" or student.frontend.statistics_source is not None:
        return []
    same = (mine.features, mine.cepstra, mine.deltas) == (theirs.features, theirs.cepstra, theirs.deltas)
    mean, std = getattr(teacher.frontend, "mean", None), getattr(teacher.frontend, "std", None)
    if not same or mean is None or std is None:
        return ["front-end: the teacher has no statistics of these features"]
    student.set_statistics(mean, std, source=str(teacher.frontend.statistics_source))
    return []
