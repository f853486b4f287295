"""How good frame targets are: how evenly clusters are used, how long they last, and what they tell about phones.

Phone purity, cluster purity and phone-normalised mutual information are those of Hsu et al., "HuBERT" (arXiv 2106.07447),
section 4.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from sslim.data.alignment import NO_SEGMENT, frame_segments
from sslim.data.corpus import Corpus

Read = Callable[[int], np.ndarray | None]  # utterance to its labels (T,), None where it has none


def entropy(probabilities: np.ndarray) -> float:
    """Returns the entropy of a distribution of any shape in nats."""
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log(positive)).sum())


def perplexity(counts_K: np.ndarray) -> float:
    """Returns the exponential of the entropy of the usage: the number of equally used clusters that would be as uncertain."""
    total = counts_K.sum()
    return math.exp(entropy(counts_K / total)) if total else 0.0


def phone_measures(joint_PK: np.ndarray) -> dict[str, float]:
    """Measures of how clusters and phones go together.

    Args:
        joint_PK: Frames of each (phone, cluster).

    Returns:
        ``phone_purity``, the accuracy of naming each cluster after its most frequent phone; ``cluster_purity``, that of
        representing each phone by its most frequent cluster; ``pnmi``, the share of the phones' entropy that the clusters
        remove (0 when there is one phone only).

    Raises:
        ValueError: There are no frames.
    """
    total = joint_PK.sum()
    if not total > 0:
        raise ValueError("phone measures need at least one frame that has a phone and a label, there is none")
    p_PK = joint_PK / total
    phones = entropy(p_PK.sum(1))
    information = phones + entropy(p_PK.sum(0)) - entropy(p_PK)
    return {
        "phone_purity": float(p_PK.max(0).sum()),
        "cluster_purity": float(p_PK.max(1).sum()),
        "pnmi": max(0.0, information / phones) if phones > 0 else 0.0,
    }


def num_runs(labels_T: np.ndarray) -> int:
    """Returns how many stretches of one and the same label there are."""
    return int(np.count_nonzero(labels_T[1:] != labels_T[:-1])) + 1 if len(labels_T) else 0


class PhoneCounter:
    """Counts frames of each phone and cluster over utterances.

    Args:
        num_clusters: K.
        frame_period_s: Seconds from one label to the next.
        frame_length_s: Seconds that a label's frame sees; None for the period itself.
    """

    def __init__(self, num_clusters: int, frame_period_s: float, frame_length_s: float | None) -> None:
        self.num_clusters, self.frame_period_s, self.frame_length_s = num_clusters, frame_period_s, frame_length_s
        self._number: dict[str, int] = {}
        self._joint_PK = np.zeros((64, num_clusters), dtype=np.int64)

    def add(self, labels_T: np.ndarray, alignment: Any) -> None:
        """Counts one utterance; frames outside of every segment do not count."""
        numbers = np.array(
            [self._number.setdefault(segment.symbol, len(self._number)) for segment in alignment], dtype=np.int64
        )
        while len(self._number) > len(self._joint_PK):
            self._joint_PK = np.concatenate([self._joint_PK, np.zeros_like(self._joint_PK)])
        segments = frame_segments(alignment, len(labels_T), self.frame_period_s, self.frame_length_s)
        inside = segments != NO_SEGMENT
        np.add.at(self._joint_PK, (numbers[segments[inside]], labels_T[inside]), 1)

    def joint(self) -> np.ndarray:
        """Returns the frames of each (phone, cluster), for the phones that have any: (P, K) int64."""
        return self._joint_PK[self._joint_PK.any(axis=1)]


def label_quality(
    corpus: Corpus,
    read: Read,
    *,
    frame_period_s: float,
    num_clusters: int,
    frame_length_s: float | None = None,
    inertia: float | None = None,
) -> dict[str, Any]:
    """Measures a label set.

    Args:
        corpus: Whose alignments are used, if it has any.
        read: Its labels.
        frame_period_s: Seconds from one label to the next.
        num_clusters: K.
        frame_length_s: Seconds that a label's frame sees; None for the period itself.
        inertia: Sum of squared distances from the centroids, if known.

    Returns:
        Plain values by name: ``occupied_clusters``, ``perplexity``, ``mean_run_s``, ``inertia_per_frame``; with alignments also
        ``num_phones``, ``phone_purity``, ``cluster_purity`` and ``pnmi``. What is not known is left out.
    """
    counts_K = np.zeros(num_clusters, dtype=np.int64)
    phones = PhoneCounter(num_clusters, frame_period_s, frame_length_s)
    total_runs = 0
    for i in range(len(corpus)):
        labels_T = read(i)
        if labels_T is None or not len(labels_T):
            continue
        labels_T = labels_T.astype(np.int64)
        counts_K += np.bincount(labels_T, minlength=num_clusters)
        total_runs += num_runs(labels_T)
        alignment = corpus.utterance(i).alignment
        if alignment:
            phones.add(labels_T, alignment)
    num_frames = int(counts_K.sum())
    quality: dict[str, Any] = {
        "occupied_clusters": int((counts_K > 0).sum()),
        "perplexity": round(perplexity(counts_K), 2),
        "mean_run_s": round(frame_period_s * num_frames / max(total_runs, 1), 4),
    }
    if inertia is not None and num_frames:
        quality["inertia_per_frame"] = round(inertia / num_frames, 6)
    joint_PK = phones.joint()
    if len(joint_PK):
        quality["num_phones"] = len(joint_PK)
        quality |= {name: round(value, 4) for name, value in phone_measures(joint_PK).items()}
    return quality
