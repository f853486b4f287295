"""Reads the convolution layers of fairseq and S3PRL settings: ``[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2``.

The reference implementations hand that text to ``eval``. Here it is parsed, and only lists and tuples of whole numbers, ``+``
and repetition by ``*`` mean something.
"""

from __future__ import annotations

import ast
from typing import Any

from sslim.checkpoints.restricted_pickle import CheckpointError
from sslim.frontends import ConvLayerConfig

MAX_TEXT = 2000  # characters
MAX_LAYERS = 64
MAX_NUMBER = 1 << 16


def parse_conv_layers(layers: Any, source: str = "the checkpoint") -> tuple[ConvLayerConfig, ...]:
    """Translates a description of convolution layers.

    Args:
        layers: Text as above, or a list or tuple of (channels, kernel, stride).
        source: The file's name, for errors.

    Returns:
        The layers, first one first.

    Raises:
        CheckpointError: Anything else, no layers, or numbers that are no whole positive ones.
    """
    try:
        value = _evaluate(ast.parse(layers[:MAX_TEXT].strip(), mode="eval").body) if isinstance(layers, str) else layers
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        value = None
    too_long = isinstance(layers, str) and len(layers) > MAX_TEXT
    if too_long or not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_LAYERS or not all(map(_is_layer, value)):
        raise CheckpointError(
            f"{source}: its convolution layers are {repr(layers)[:80]}, expected one to {MAX_LAYERS} layers "
            "(channels, kernel, stride), for example [(512,10,5)] + [(512,3,2)] * 4"
        )
    return tuple(ConvLayerConfig(channels=c, kernel=k, stride=s) for c, k, s in value)


def _is_layer(value: Any) -> bool:
    whole = isinstance(value, list | tuple) and all(type(number) is int for number in value)
    return whole and len(value) == 3 and all(0 < number <= MAX_NUMBER for number in value)


def _evaluate(node: ast.expr) -> Any:
    """Value of the few expressions that are allowed; ValueError for every other one."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_evaluate(item) for item in node.elts]
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult):
            items, times = (left, right) if isinstance(left, list) else (right, left)
            if isinstance(items, list) and type(times) is int and len(items) * times <= MAX_LAYERS:
                return items * times
    raise ValueError("no list of layers")
