"""Which phones attend to which: attention mass from phone to phone, and to a phone's own segment and its neighbours.

With A (T, T) the attention of a head and y the phone of each frame, the map of a head is ``P[m, n] = E[1/T sum_q sum_k A[q, k]
[y_q = m][y_k = n]]`` over utterances. Frequent phones get more of it by chance, so it is read beside ``U``, the same for
uniform attention: ``P / U - 1`` is 0 where a phone is attended to as often as it occurs (Yang et al. 2020, arXiv 2006.03265).

Beside the map, relations that a map over phones cannot tell apart: a frame may look at its own segment, at the one before or
after it, at the same phone elsewhere, or at other phones. Frames outside of every segment neither ask nor answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sslim.analysis.attention import DEFAULT_BATCH_S, attention_batches
from sslim.data.alignment import NO_SEGMENT, frame_segments
from sslim.data.sources import Segment
from sslim.models.encoding import Inputs
from sslim.models.speech import SpeechModel

RELATIONS = ("own segment", "segment before", "segment after", "same phone elsewhere", "other phones")


@dataclass(frozen=True, kw_only=True)
class PhoneHead:
    """What a head looks at.

    Attributes:
        layer: Block application, from 1.
        head: From 1.
        relations: Relation to its share of the attention between frames of phones.
        divergence: Kullback-Leibler divergence of the map from that of uniform attention, in nats.
    """

    layer: int
    head: int
    relations: dict[str, float]
    divergence: float


@dataclass(frozen=True, kw_only=True)
class PhoneRelations:
    """Phone-relation maps of all heads.

    Attributes:
        phones: Names of the classes, in the order of the maps.
        uniform_CC: Map of uniform attention; sums to 1.
        maps_HCC: Map of each head, query phone by key phone; each sums to 1.
        heads: What each looks at, in the same order.
        uniform: Relation to its share in uniform attention.
    """

    phones: list[str]
    uniform_CC: np.ndarray
    maps_HCC: np.ndarray
    heads: list[PhoneHead]
    uniform: dict[str, float]

    def log_ratio(self, head: int | None = None) -> np.ndarray:
        """Returns (C, C) ``log2(P / U)`` of a head (its place in ``heads``), or of the mean over heads; NaN where U is 0."""
        found = self.maps_HCC.mean(0) if head is None else self.maps_HCC[head]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.uniform_CC > 0, np.log2(found / self.uniform_CC), np.nan)


def relation_masks(segments_T: np.ndarray, alignment: Sequence[Segment]) -> np.ndarray:
    """Returns (5, T, T) bool: for each of ``RELATIONS``, the pairs of query and key that have it; others have none.

    Args:
        segments_T: (T,) index into ``alignment``, ``NO_SEGMENT`` outside (``frame_segments``).
        alignment: Segments in any order; before and after go by their starts.
    """
    order = np.argsort([segment.start_s for segment in alignment], kind="stable")
    place = np.empty(len(alignment), dtype=np.int64)
    place[order] = np.arange(len(alignment))
    symbols = np.unique([segment.symbol for segment in alignment], return_inverse=True)[1]
    known_T = segments_T != NO_SEGMENT
    place_T, symbol_T = (np.where(known_T, values[segments_T], -9) for values in (place, symbols))
    step_TT = place_T[None, :] - place_T[:, None]
    known_TT = known_T[:, None] & known_T[None, :]
    own, before, after = (known_TT & (step_TT == step) for step in (0, -1, 1))
    far = known_TT & ~(own | before | after)
    same_TT = symbol_T[None, :] == symbol_T[:, None]
    return np.stack([own, before, after, far & same_TT, far & ~same_TT])


def phone_relations(
    model: SpeechModel,
    inputs: Inputs,
    alignments: Sequence[Sequence[Segment]],
    *,
    frame_shift_s: float,
    frame_length_s: float,
    batch_s: float = DEFAULT_BATCH_S,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> PhoneRelations:
    """Adds up attention from phone to phone over utterances.

    Args:
        model: In eval mode.
        inputs: Utterances of at least one frame.
        alignments: Segments of each.
        frame_shift_s: Seconds from one frame of the model to the next.
        frame_length_s: Seconds that a frame stands for (``sslim.data.alignment``).
        batch_s: Seconds of padded audio in a batch.
        tell: Called with utterances done and in all.

    Raises:
        ValueError: No frame belongs to a segment, or as for ``attention_batches``.
    """
    phones = sorted({segment.symbol for alignment in alignments for segment in alignment})
    number = {name: i for i, name in enumerate(phones)}
    num_heads = [model.config.transformer.blocks[depth].num_heads for depth in model.config.transformer.depth_map]
    maps = torch.zeros(sum(num_heads), len(phones), len(phones), dtype=torch.float64)
    shares = torch.zeros(sum(num_heads), len(RELATIONS), dtype=torch.float64)
    uniform = torch.zeros(len(phones), len(phones), dtype=torch.float64)
    uniform_shares = torch.zeros(len(RELATIONS), dtype=torch.float64)
    done = 0
    for positions, layers, lengths_B in attention_batches(model, inputs, batch_s=batch_s):
        for row, position in enumerate(positions):
            length, alignment = int(lengths_B[row]), alignments[position]
            segments_T = frame_segments(alignment, length, frame_shift_s, frame_length_s)
            if (segments_T == NO_SEGMENT).all():
                continue
            phones_T = np.array([-1 if s == NO_SEGMENT else number[alignment[s].symbol] for s in segments_T.tolist()])
            phone_TC = torch.from_numpy((phones_T[:, None] == np.arange(len(phones))[None, :]).astype(np.float32))
            masks_RTT = torch.from_numpy(relation_masks(segments_T, alignment).astype(np.float32))
            heads = [weights[row, :, :length, :length].float().cpu() for weights in layers if weights is not None]
            weights_HTT = torch.cat(heads) / length
            maps += (phone_TC.T @ weights_HTT @ phone_TC).double()
            shares += torch.einsum("htk,rtk->hr", weights_HTT, masks_RTT).double()
            counts_C = phone_TC.sum(0).double() / length
            uniform += counts_C[:, None] * counts_C[None, :]
            uniform_shares += masks_RTT.sum((1, 2)).double() / length**2
        done += len(positions)
        tell(done, len(inputs.lengths))
    if not bool(uniform.sum() > 0):
        raise ValueError("no frame of the utterances lies in a segment of their alignments; are these of other recordings?")
    return _finished(phones, num_heads, maps, shares, uniform, uniform_shares)


def _finished(
    phones: list[str], num_heads: list[int], maps: Tensor, shares: Tensor, uniform: Tensor, uniform_shares: Tensor
) -> PhoneRelations:
    """Sums to shares of the attention between frames of phones."""
    maps = maps / maps.sum((1, 2), keepdim=True).clamp(min=1e-30)
    uniform = uniform / uniform.sum()
    shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-30)
    terms = torch.special.xlogy(maps, maps / uniform.clamp(min=1e-30))
    places = [(layer + 1, head + 1) for layer, count in enumerate(num_heads) for head in range(count)]
    heads = [
        PhoneHead(layer=layer, head=head, relations=_named(shares[i]), divergence=float(terms[i].sum()))
        for i, (layer, head) in enumerate(places)
    ]
    return PhoneRelations(
        phones=phones,
        uniform_CC=uniform.numpy(),
        maps_HCC=maps.numpy(),
        heads=heads,
        uniform=_named(uniform_shares / uniform_shares.sum()),
    )


def _named(shares_R: Tensor) -> dict[str, float]:
    return dict(zip(RELATIONS, shares_R.tolist(), strict=True))
