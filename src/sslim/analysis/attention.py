"""Attention heads by what they look at: globalness, verticality, diagonality, their ranks and the category of each head.

For A (T, T) the attention of a head on an utterance of T frames, rows summing to 1, H Shannon's entropy in nats, and E the mean
over utterances (Yang et al. 2020, "Understanding self-attention of self-supervised audio transformers", arXiv 2006.03265):

- globalness   ``E[1/T sum_q H(A[q])]``: how widely a query spreads; log T at most, where all is uniform;
- verticality  ``E[-H(1/T sum_q A[q])]``: how far all queries agree on few keys; 0 at most, one key for all;
- diagonality  ``E[-1/T^2 sum_q sum_k |q - k| A[q, k]]``: how near to itself a frame looks; 0 at most, itself alone.

Heads are ranked by each; a head belongs to the category in which it ranks best. That always fills categories: they tell heads
of one model apart and say nothing in absolute terms, which is what the scores beside those of uniform attention are for.

A block that runs at several depths has heads of its own at each of them here. Layers and heads count from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sslim.batch import valid_mask
from sslim.models.encoding import Inputs, length_batches, run_batch
from sslim.models.speech import SpeechModel

GLOBALNESS, VERTICALITY, DIAGONALITY = "globalness", "verticality", "diagonality"
METRICS = (GLOBALNESS, VERTICALITY, DIAGONALITY)
CATEGORIES = {GLOBALNESS: "global", VERTICALITY: "vertical", DIAGONALITY: "diagonal"}
MEAN_DISTANCE = "mean_distance"
DEFAULT_BATCH_S = 20.0  # weights of 12 layers of 12 heads on 20 s of 20 ms frames in one utterance are 600 MB


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head and what it was found to be.

    Attributes:
        layer: Block application, from 1.
        head: Its number in the block, from 1.
        globalness: In nats.
        verticality: In nats, at most 0.
        diagonality: As a share of the utterance's length, at most 0.
        mean_distance: Frames between a query and what it attends to, on average.
        ranks: Metric to the head's place among all heads, 1 for the highest score.
        category: ``global``, ``vertical`` or ``diagonal``.
    """

    layer: int
    head: int
    globalness: float
    verticality: float
    diagonality: float
    mean_distance: float
    ranks: dict[str, int]
    category: str

    @property
    def place(self) -> tuple[int, int]:
        return self.layer, self.head


def head_scores(weights_BNTT: Tensor, lengths_B: Tensor) -> dict[str, Tensor]:
    """Scores the heads of one layer on a batch.

    Args:
        weights_BNTT: Attention weights; what padded queries have does not count, and no valid query may look at padding.
        lengths_B: (B,) valid frames, at least 1.

    Returns:
        Metric, and ``mean_distance`` in frames, to (B, N) float64.
    """
    num_frames = weights_BNTT.shape[-1]
    query_BTT = valid_mask(lengths_B, num_frames)[:, None, :, None]
    weights = weights_BNTT.masked_fill(~query_BTT, 0.0).float()
    lengths_B1 = lengths_B.to(weights.device).double()[:, None]
    place_T = torch.arange(num_frames, device=weights.device, dtype=weights.dtype)
    distance_TT = (place_T[:, None] - place_T[None, :]).abs()
    far_BN = (weights * distance_TT).sum((-1, -2)).double()
    mean_BNT = weights.sum(-2).double() / lengths_B1[..., None]
    return {
        GLOBALNESS: -torch.special.xlogy(weights, weights).sum((-1, -2)).double() / lengths_B1,
        VERTICALITY: torch.special.xlogy(mean_BNT, mean_BNT).sum(-1),
        DIAGONALITY: -far_BN / lengths_B1.square(),
        MEAN_DISTANCE: far_BN / lengths_B1,
    }


def attention_batches(
    model: SpeechModel, inputs: Inputs, *, batch_s: float = DEFAULT_BATCH_S
) -> Iterator[tuple[list[int], tuple[Tensor | None, ...], Tensor]]:
    """Runs a model and keeps its attention weights.

    Args:
        model: In eval mode.
        inputs: Utterances of at least one frame.
        batch_s: Seconds of padded audio in a batch.

    Yields:
        Positions, for each block application (B, N, T, T) weights or None where it has no attention, and (B,) lengths.

    Raises:
        ValueError: No block has attention, or its windows have no matrix of frames to frames.
    """
    encoder = model.config.transformer
    if encoder.has_reference_windows:
        raise ValueError(
            "this model attends by LightHuBERT's windows, which mix frames: its weights have no frame for each key"
        )
    has_attention = [encoder.blocks[depth].num_heads > 0 for depth in encoder.depth_map]
    if not any(has_attention):
        raise ValueError("no layer of this model has attention heads, so there is nothing to look at")
    for positions in length_batches(inputs.lengths, batch_s / inputs.unit_s):
        values = [inputs.read(position) for position in positions]
        with torch.inference_mode():
            output = run_batch(model, values, is_waveform=inputs.is_waveform, need_weights=True)
        weights = iter(output.attentions)
        yield positions, tuple(next(weights) if has else None for has in has_attention), output.lengths


def uniform_scores(lengths: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Returns what a head that attends to all frames alike would score (:func:`head_scores`) on utterances of these lengths."""
    lengths = np.asarray(lengths, dtype=np.float64)
    distance = (lengths**2 - 1) / (3 * lengths)
    return {
        GLOBALNESS: float(np.log(lengths).mean()),
        VERTICALITY: float(-np.log(lengths).mean()),
        DIAGONALITY: float(-(distance / lengths).mean()),
        MEAN_DISTANCE: float(distance.mean()),
    }


def rank_heads(scores: Mapping[str, Sequence[float]]) -> tuple[list[dict[str, int]], list[str]]:
    """Ranks heads by each metric and gives each the category where it ranks best.

    Args:
        scores: Metric to the score of every head.

    Returns:
        For every head its ranks (metric to place, from 1; of equal scores the first head is ahead), and its category; of equal
        ranks the metric counts in which the head stands out more, in standard deviations.
    """
    table = {metric: np.asarray(values, dtype=np.float64) for metric, values in scores.items()}
    ranks = {metric: np.empty(len(values), dtype=np.int64) for metric, values in table.items()}
    for metric, values in table.items():
        ranks[metric][np.argsort(-values, kind="stable")] = np.arange(1, len(values) + 1)
    above = {metric: (values - values.mean()) / (values.std() or 1.0) for metric, values in table.items()}
    categories = []
    for head in range(len(next(iter(table.values())))):
        best = min(table, key=lambda metric: (ranks[metric][head], -above[metric][head]))
        categories.append(CATEGORIES[best])
    return [{metric: int(ranks[metric][head]) for metric in table} for head in range(len(categories))], categories


def score_heads(
    model: SpeechModel,
    inputs: Inputs,
    *,
    batch_s: float = DEFAULT_BATCH_S,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[Head]:
    """Scores, ranks and names every head of a model, layer by layer.

    Args:
        model: In eval mode.
        inputs: Utterances of at least one frame; each counts the same.
        batch_s: Seconds of padded audio in a batch.
        tell: Called with utterances done and in all.

    Raises:
        ValueError: As for :func:`attention_batches`.
    """
    totals: dict[str, list[Tensor | None]] = {}
    done = 0
    for positions, layers, lengths_B in attention_batches(model, inputs, batch_s=batch_s):
        for depth, weights in enumerate(layers):
            for metric, values_BN in ({} if weights is None else head_scores(weights, lengths_B)).items():
                sums = totals.setdefault(metric, [None] * len(layers))
                before = sums[depth]
                sums[depth] = values_BN.sum(0).cpu() + (0 if before is None else before)
        done += len(positions)
        tell(done, len(inputs.lengths))
    places = [(d + 1, n + 1) for d, sums in enumerate(totals[GLOBALNESS]) if sums is not None for n in range(len(sums))]
    flat = {
        metric: (torch.cat([part for part in sums if part is not None]) / len(inputs.lengths)).tolist()
        for metric, sums in totals.items()
    }
    ranks, categories = rank_heads({metric: flat[metric] for metric in METRICS})
    return [
        Head(layer=layer, head=head, ranks=ranks[i], category=categories[i], **{name: flat[name][i] for name in flat})
        for i, (layer, head) in enumerate(places)
    ]


def ordered(heads: Sequence[Head], metric: str) -> list[tuple[int, int]]:
    """Returns the places (layer, head) of all heads, the highest score first."""
    return [head.place for head in sorted(heads, key=lambda head: head.ranks[metric])]
