"""Distances between a student's estimate of a frame and a teacher's frame: one number for each frame.

Sums over frames take an explicit mask, so that padding enters a loss only where a caller asks for it. The references' own means
count padding too (DistilALHuBERT, DistilHuBERT); with a mask of all ones these functions give their numbers.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Distance = Literal["l1", "l2"]
Similarity = Literal["log_sigmoid", "raw"]


def frame_distance(student: Tensor, teacher: Tensor, kind: Distance) -> Tensor:
    """Returns the mean over the width of the absolute (``l1``) or squared (``l2``) difference.

    Args:
        student: (..., D).
        teacher: (..., D).
        kind: Which.

    Returns:
        (...) float32.
    """
    difference = student.float() - teacher.float()
    return (difference.abs() if kind == "l1" else difference.square()).mean(-1)


def frame_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the cosine of the angle between (..., D) and (..., D), (...) float32; 0 for a zero vector."""
    return F.cosine_similarity(student.float(), teacher.float(), dim=-1, eps=1e-8)


def similarity_loss(cosine: Tensor, kind: Similarity) -> Tensor:
    """Returns ``-log sigmoid(cosine)`` (DistilHuBERT, equation 1) or ``-cosine`` (``raw``, DPHuBERT)."""
    return -F.logsigmoid(cosine) if kind == "log_sigmoid" else -cosine


def sum_over_frames(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Returns the sum of the frames that the mask names, 0-d; a frame outside contributes no gradient, not even NaN."""
    return values_BT.masked_fill(~mask_BT, 0.0).sum()
