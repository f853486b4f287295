"""Mean and variance normalisation of padded features, over valid frames only."""

from __future__ import annotations

from torch import Tensor

from sslim.batch import Padded, valid_mask, zero_padding

# Smallest variance divided by: a silent utterance, whose channels are constant, becomes zeros with a finite gradient. Channels
# of real speech vary by more than 1e-3, so nothing else is touched.
VARIANCE_FLOOR = 1e-20


def normalize_globally(features: Padded, mean_F: Tensor, std_F: Tensor, eps: float = 0.0) -> Padded:
    """Returns ``(x - mean) / (std + eps)``, zero beyond each length.

    Args:
        features: (B, T, F).
        mean_F: (F,) stored mean.
        std_F: (F,) stored standard deviation.
        eps: Added to the standard deviation.
    """
    values = (features.values - mean_F) / (std_F + eps if eps else std_F)
    return Padded(values=zero_padding(values, features.lengths), lengths=features.lengths)


def without_mean(features: Padded) -> Padded:
    """Returns ``x - mean`` with each utterance's own mean per channel, zero beyond each length.

    Args:
        features: (B, T, F).
    """
    if features.values.shape[1] == 0:
        return features
    values = zero_padding(features.values, features.lengths)
    mean_B1F = values.sum(dim=1, keepdim=True) / features.lengths.clamp(min=1)[:, None, None]
    return Padded(values=zero_padding(values - mean_B1F, features.lengths), lengths=features.lengths)


def normalize_per_utterance(features: Padded, *, unbiased: bool = False, eps: float = 0.0) -> Padded:
    """Returns ``(x - mean) / (std + eps)`` with each utterance's own mean and standard deviation per channel.

    The first frame is subtracted before anything is summed: a constant channel then gives exact zeros (a rounded mean would
    leave 1e-6 / 1e-10 = 10,000), and no accuracy is lost to a large mean.

    Args:
        features: (B, T, F).
        unbiased: Divide by T - 1 (S3PRL's extracter, with ``eps`` 1e-10) instead of T. One frame alone gives zeros.
        eps: Added to the standard deviation.
    """
    if features.values.shape[1] == 0:
        return features
    mask_BT1 = valid_mask(features.lengths, features.values.shape[1])[..., None]
    count_B11 = features.lengths.clamp(min=1)[:, None, None]
    shifted = (features.values - features.values[:, :1].detach()).masked_fill(~mask_BT1, 0.0)
    mean_B1F = shifted.sum(dim=1, keepdim=True) / count_B11
    centred = (shifted - mean_B1F).masked_fill(~mask_BT1, 0.0)
    divisor = (count_B11 - int(unbiased)).clamp(min=1)
    std_B1F = (centred.square().sum(dim=1, keepdim=True) / divisor).clamp(min=VARIANCE_FLOOR).sqrt()
    return Padded(values=centred / (std_B1F + eps), lengths=features.lengths)
