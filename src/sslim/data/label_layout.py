"""Rules that hold for stored labels in every one of MelHuBERT's layouts: their values and the time that one covers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

NUM_CLUSTERS = 512
LABEL_PERIODS_S = {0.01: 1, 0.02: 2}  # seconds of a label: feature frames it covers
MIN_FRAMES_TO_TELL = 8  # shorter utterances fit both periods within the tolerance of one frame
NUM_VERIFIED = 50


class LayoutError(ValueError):
    """A data folder or list that cannot be read; the message says where and what was found."""


def check_labels(labels: np.ndarray, num_clusters: int, where: str) -> np.ndarray:
    """Returns labels as int64 (T,).

    Raises:
        LayoutError: They are no vector of whole numbers, or one is not a cluster.
    """
    if labels.ndim != 1 or len(labels) == 0 or labels.dtype.kind not in "iu":
        raise LayoutError(f"{where}: expected a vector of whole numbers, found {labels.dtype} of shape {labels.shape}")
    if labels.min() < 0 or labels.max() >= num_clusters:
        bad = labels[(labels < 0) | (labels >= num_clusters)][0]
        raise LayoutError(f"{where}: the label {bad} is not within 0 to {num_clusters - 1}")
    return labels.astype(np.int64)


def label_period_s(lengths: Iterable[tuple[str, int, int]], *, declared_s: float | None, name: str) -> float:
    """Tells a label set's frame period and verifies it on utterances.

    Args:
        lengths: (utterance, feature frames of 10 ms, labels).
        declared_s: What the user or a folder's name says; None to find out.
        name: Of the label set, for errors.

    Returns:
        0.01 or 0.02.

    Raises:
        LayoutError: An utterance fits neither period, not the declared one, or another than the ones before.
    """
    if declared_s is not None and declared_s not in LABEL_PERIODS_S:
        raise LayoutError(f"labels {name}: a label covers 0.01 or 0.02 s, not {declared_s}")
    period, witness = declared_s, "declared" if declared_s is not None else ""
    for utterance, num_frames, num_labels in lengths:
        if num_frames < MIN_FRAMES_TO_TELL:
            continue
        fits = [s for s, ratio in LABEL_PERIODS_S.items() if abs(num_labels - -(-num_frames // ratio)) <= 1]
        if not fits:
            raise LayoutError(
                f"labels {name}: {utterance} has {num_labels} labels for {num_frames} frames of 10 ms, which is neither one for"
                " every frame nor one for every two"
            )
        if period is None:
            period, witness = fits[0], f"as in {utterance}"
        elif period not in fits:
            raise LayoutError(
                f"labels {name}: {utterance} has {num_labels} labels for {num_frames} frames of 10 ms, so one covers {fits[0]}"
                f" s, not {period} s ({witness})"
            )
    if period is None:
        raise LayoutError(f"labels {name}: no utterance is long enough to tell whether a label covers 10 or 20 ms, declare it")
    return period


def period_in_name(name: str) -> float | None:
    """Returns the label period that a name states (``10ms``, ``20ms``); None when it states none or both."""
    found = [s for s in LABEL_PERIODS_S if f"{round(s * 1000)}ms" in name.lower()]
    return found[0] if len(found) == 1 else None
