"""Which layers of a representation a row of the table is about, and frames repeated to a finer period."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from torch import Tensor

from sslim.probes.features import Representation

MIX, ALL, LAST, MEAN = "mix", "all", "last", "mean"
LAYER_NAMES = (MIX, ALL, LAST, MEAN)
NO_LAYERS = "-"  # what features have instead


def check_layer(layer: str) -> None:
    """Raises ValueError for what is neither one of ``LAYER_NAMES`` nor a number."""
    if layer not in LAYER_NAMES and not layer.isdecimal():
        raise ValueError(
            f"layer {layer!r} is not known; accepted are 'mix', 'all', 'last', 'mean' or a number (0 enters the first block)"
        )


def pick_layers(x_LTD: Tensor, layer: str) -> Tensor:
    """Returns what a classifier sees of all layers: all (``mix``, ``all``), the last, one, or the mean of the blocks' outputs.

    Args:
        x_LTD: (L, ...) all layers, [0] what enters the first block; of features there is one, which is all there is to choose.
        layer: As :func:`check_layer` accepts it.

    Returns:
        (L, ...) or (1, ...).

    Raises:
        ValueError: There is no such layer.
    """
    if len(x_LTD) == 1 or layer in (MIX, ALL):
        return x_LTD
    if layer == LAST:
        return x_LTD[-1:]
    if layer == MEAN:
        return x_LTD[1:].mean(0, keepdim=True)
    check_number(int(layer), len(x_LTD))
    return x_LTD[int(layer) : int(layer) + 1]


def check_number(layer: int, num_layers: int) -> None:
    """Raises ValueError when a model of ``num_layers``, the input of the first block included, has no such layer."""
    if layer >= num_layers:
        raise ValueError(f"there is no layer {layer}; this model has 0 (what enters the first block) to {num_layers - 1}")


def with_layers(representation: Representation, layer: str) -> Representation:
    """Returns a representation of the layers that :func:`pick_layers` picks, so that the others are never stored.

    Raises:
        ValueError: There is no such layer.
    """
    if representation.num_layers == 1 or layer in (MIX, ALL):
        return representation
    if layer.isdecimal():
        check_number(int(layer), representation.num_layers)

    def layers_of(indices: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        for position, x_LTD in representation.layers_of(indices):
            yield position, pick_layers(x_LTD, layer)

    return replace(representation, num_layers=1, layers_of=layers_of)


def row_layers(num_layers: int, layer: str) -> dict[str, slice]:
    """Returns a table's rows of one representation by the name of their layer, and what each takes of the stored layers.

    Args:
        num_layers: Of the whole representation, before :func:`with_layers`.
        layer: What was asked for.
    """
    if num_layers == 1:
        return {NO_LAYERS: slice(0, 1)}
    if layer == ALL:
        return {str(number): slice(number, number + 1) for number in range(num_layers)}
    return {str(num_layers - 1) if layer == LAST else layer: slice(None)}


def repeated(representation: Representation, times: int) -> Representation:
    """Returns a representation with every frame ``times`` over, at a period that much shorter."""
    if times == 1:
        return representation

    def layers_of(indices: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        for position, x_LTD in representation.layers_of(indices):
            yield position, x_LTD.repeat_interleave(times, dim=1)

    return replace(
        representation,
        frame_shift_s=representation.frame_shift_s / times,
        num_frames=lambda indices: representation.num_frames(indices) * times,
        layers_of=layers_of,
    )
