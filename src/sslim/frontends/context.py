"""Features from neighbouring frames of padded sequences: deltas, and stacking of frames into one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from sslim.audio import num_stacked_frames
from sslim.batch import Padded, valid_mask, zero_padding


def _hold_last_frame(features: Padded) -> Tensor:
    """Replaces padding by each row's last valid frame (rows without frames keep what they have)."""
    values_BTF, lengths_B = features.values, features.lengths
    last_B11 = (lengths_B - 1).clamp(min=0)[:, None, None].expand(-1, 1, values_BTF.shape[2])
    mask_BT1 = valid_mask(lengths_B, values_BTF.shape[1])[..., None]
    return torch.where(mask_BT1, values_BTF, values_BTF.gather(1, last_B11))


def delta(features: Padded, window: int = 2) -> Padded:
    """Returns the regression slope of each channel over ``window`` frames on each side.

    ``d[t] = sum_k k (x[t+k] - x[t-k]) / (2 sum_k k^2)``; the first and last valid frame are repeated outwards. Corresponds to
    ``compute_deltas(win_length=2*window+1)`` of torchaudio.
    """
    num_frames = features.values.shape[1]
    if num_frames == 0:
        return features
    held = _hold_last_frame(features)
    edge = functional.pad(held.transpose(1, 2), (window, window), mode="replicate").transpose(1, 2)
    slope = torch.zeros_like(held)
    for k in range(1, window + 1):
        later, earlier = edge[:, window + k : window + k + num_frames], edge[:, window - k : window - k + num_frames]
        slope = slope + k * (later - earlier)
    slope = slope / (2 * sum(k * k for k in range(1, window + 1)))
    return Padded(values=zero_padding(slope, features.lengths), lengths=features.lengths)


def savitzky_golay(features: Padded, order: int, window: int = 4) -> Padded:
    """Returns the ``order``-th derivative of a polynomial of that order, fitted to ``window`` frames on each side.

    Frames with fewer neighbours have the derivative that the outermost whole window gives. Corresponds to
    ``librosa.feature.delta(width=2*window+1, order=order)``, which refuses what is shorter than a window; here its last valid
    frame is repeated until there is one.

    Args:
        features: (B, T, F).
        order: 1 or 2.
        window: Frames on each side.
    """
    num_frames = features.values.shape[1]
    if num_frames == 0:
        return features
    width = 2 * window + 1
    held = _hold_last_frame(features)
    if num_frames < width:
        held = functional.pad(held.transpose(1, 2), (0, width - num_frames), mode="replicate").transpose(1, 2)
    offsets = torch.arange(-window, window + 1, dtype=torch.float64)
    basis = offsets if order == 1 else offsets.square() - offsets.square().mean()
    weights = (order * basis / basis.square().sum()).to(held)  # the derivative of b k is b, that of a k^2 is 2 a
    # the first frame is subtracted first: constants then give exact zeros, whatever the weights add up to in float32
    shifted = held - held[:, :1].detach()
    fitted = functional.conv1d(shifted.transpose(1, 2).reshape(-1, 1, held.shape[1]), weights[None, None])
    fitted_BTF = fitted.reshape(held.shape[0], held.shape[2], -1).transpose(1, 2)
    last_B1 = (features.lengths - width).clamp(min=0)[:, None]
    place_BT = torch.minimum((torch.arange(num_frames, device=held.device)[None] - window).clamp(min=0), last_B1)
    slope = fitted_BTF.gather(1, place_BT[..., None].expand(-1, -1, held.shape[2]))
    return Padded(values=zero_padding(slope, features.lengths), lengths=features.lengths)


def append_deltas(
    features: Padded, orders: int, window: int = 2, kind: Literal["regression", "savitzky_golay"] = "regression"
) -> Padded:
    """Returns features with ``orders`` deltas appended: (B, T, F * (1 + orders)).

    By ``regression`` each order is the delta of the one before, edges repeated anew each time, as S3PRL's extracter does.
    Kaldi's ``add-deltas`` repeats only the features' own edges: its second order differs within ``window`` frames of either
    end. By ``savitzky_golay`` each order is fitted to the features themselves.
    """
    parts = [features]
    for order in range(1, orders + 1):
        parts.append(delta(parts[-1], window) if kind == "regression" else savitzky_golay(features, order, window))
    return Padded(values=torch.cat([part.values for part in parts], dim=-1), lengths=features.lengths)


def stack_frames(features: Padded, stack: int, tail: Literal["pad", "drop"] = "pad") -> Padded:
    """Concatenates every ``stack`` consecutive frames: (B, T, F) to (B, T', stack * F), frame t' from ``stack * t'`` on.

    Args:
        features: (B, T, F), zero beyond each length.
        stack: Frames in one.
        tail: ``pad`` fills an incomplete last frame with zero vectors (T' = ceil(T / stack)), ``drop`` leaves it out.
    """
    if stack == 1:
        return features
    lengths_B = num_stacked_frames(features.lengths, stack, tail)
    batch, num_frames, dim = features.values.shape
    kept = num_stacked_frames(num_frames, stack, tail)
    missing = kept * stack - num_frames
    whole = functional.pad(features.values, (0, 0, 0, missing)) if missing >= 0 else features.values[:, : kept * stack]
    values = whole.reshape(batch, kept, stack * dim)
    return Padded(values=zero_padding(values, lengths_B), lengths=lengths_B)
