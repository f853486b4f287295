"""Dropout that does not dominate a training step on a CPU.

torch draws one Mersenne-Twister number for every element on a CPU, 15 % of a training step of MelHuBERT (LOG.md,
2026-11-21). Here every 64-bit draw serves four elements. Elsewhere torch's own kernels are used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 2**16  # probabilities are rounded to multiples of 1 / LEVELS


def _dropped(shape: torch.Size, level: int) -> Tensor:
    """Returns bool of ``shape`` on the CPU, True with probability ``level / LEVELS``, from torch's global generator."""
    count = shape.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    return (bits.view(torch.int16)[:count] < level - LEVELS // 2).view(shape)


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Zeroes elements with ``probability`` while training and scales the others so that the mean stays.

    Equal to ``torch.nn.functional.dropout`` in distribution, to 1 / 65,536 of the probability.
    """
    if not training or probability == 0.0:
        return x
    level = round(probability * LEVELS)
    if x.device.type != "cpu" or level == LEVELS:
        return F.dropout(x, probability)
    return x.masked_fill(_dropped(x.shape, level), 0.0) * (LEVELS / (LEVELS - level))
