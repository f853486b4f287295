"""Frozen features of a corpus, computed once and kept for all classifiers: pooled by utterance, or frame by frame.

What is probed is a ``Representation``: the layers of a model, features as one layer (``sslim.probes.baselines``), or whatever
else gives frames (``sslim.probes.adapter``). Padding never reaches pooling or storage: a representation yields each utterance's
valid frames alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslim.data.alignment import frame_length_s
from sslim.data.corpus import Corpus
from sslim.models.encoding import DEFAULT_BATCH_S, corpus_inputs, encode_utterances, give_features, num_model_frames
from sslim.models.speech import SpeechModel, build_model, restore_statistics

IN_MEMORY_BYTES = 2**30  # larger frame stores go to an unlinked temporary file


@dataclass(frozen=True, kw_only=True)
class Representation:
    """Something that gives each utterance of a corpus one or more layers of frames.

    Attributes:
        name: For the table.
        kind: ``model``, ``random`` or ``features``.
        num_layers: L, the input of the first block included.
        frame_shift_s: Seconds from one frame to the next.
        frame_length_s: Seconds that a frame sees, from the start of its shift: its middle decides which phone it is given. None
            for the shift itself.
        num_parameters: Of the model without its heads; 0 for features.
        num_frames: Corpus indices (n,) to frames (n,).
        layers_of: Corpus indices (n,) to an iterator over (position, (L, T, D) float32), in any order.
    """

    name: str
    kind: str
    num_layers: int
    frame_shift_s: float
    num_parameters: int
    num_frames: Callable[[np.ndarray], np.ndarray]
    layers_of: Callable[[np.ndarray], Iterator[tuple[int, Tensor]]]
    frame_length_s: float | None = None


def model_representation(
    model: SpeechModel, corpus: Corpus, name: str, *, kind: str = "model", batch_s: float = DEFAULT_BATCH_S, bf16: bool = False
) -> Representation:
    """All N + 1 layers of a frozen model in eval mode; one without a front-end gets the corpus's (``give_features``)."""
    give_features(model, corpus)
    assert model.frontend is not None

    def layers_of(indices: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        inputs = corpus_inputs(model, corpus, indices)
        for position, layers, _ in encode_utterances(model, inputs, batch_s=batch_s, bf16=bf16):
            yield position, stacked(layers)

    return Representation(
        name=name,
        kind=kind,
        num_layers=model.num_layers + 1,
        frame_shift_s=model.frontend.frame_shift_s,
        frame_length_s=frame_length_s(model.frontend.config),
        num_parameters=model.num_parameters(with_heads=False),
        num_frames=lambda indices: num_model_frames(model, corpus_inputs(model, corpus, indices)),
        layers_of=layers_of,
    )


def stacked(layers: Sequence[Tensor]) -> Tensor:
    """Returns (L, T, D) of layers (T, D_l); narrower ones, as what enters a recurrent encoder, are filled up with zeros."""
    widest = max(layer.shape[-1] for layer in layers)
    return torch.stack([F.pad(layer, (0, widest - layer.shape[-1])) for layer in layers])


def randomised(model: SpeechModel, seed: int) -> SpeechModel:
    """Returns a model of the same description and statistics with newly drawn parameters and no heads."""
    drawn = build_model(replace(model.config, heads={}), torch.Generator().manual_seed(seed))
    restore_statistics(drawn, model.state_dict())
    return drawn.to(next(model.parameters()).device)


def mean_pooling(x_LTD: Tensor) -> Tensor:
    """Returns (L, D), the mean over frames."""
    return x_LTD.mean(1)


def mean_std_pooling(x_LTD: Tensor) -> Tensor:
    """Returns (L, 2 D), mean and (population) standard deviation over frames."""
    return torch.cat([x_LTD.mean(1), x_LTD.std(1, correction=0)], dim=-1)


POOLINGS = {"mean": mean_pooling, "mean-std": mean_std_pooling}


def _checked(x_LTD: Tensor, representation: Representation, corpus: Corpus, index: int) -> Tensor:
    if not bool(torch.isfinite(x_LTD).all()):
        utterance = corpus.utterance(int(index)).id
        raise ValueError(f"{representation.name} gives non-finite features for utterance {utterance}, so it cannot be probed")
    return x_LTD


def pooled_features(representation: Representation, corpus: Corpus, indices: np.ndarray, pooling: str) -> Tensor:
    """Returns (L, n, P) float32: each utterance pooled over its valid frames, layer by layer.

    Args:
        representation: What to compute.
        corpus: Where from.
        indices: (n,) utterances, each with at least one frame.
        pooling: A name in ``POOLINGS``.

    Raises:
        ValueError: Features that are not finite.
    """
    pool = POOLINGS[pooling]
    store: Tensor | None = None
    for position, x_LTD in representation.layers_of(indices):
        row_LP = pool(_checked(x_LTD, representation, corpus, indices[position]))
        if store is None:
            store = torch.empty(len(row_LP), len(indices), row_LP.shape[-1])
        store[:, position] = row_LP
    assert store is not None, "pooled_features needs at least one utterance"
    return store


def _frame_store(shape: tuple[int, ...]) -> Tensor:
    if 2 * int(np.prod(shape)) <= IN_MEMORY_BYTES:
        return torch.empty(shape, dtype=torch.float16)
    with tempfile.TemporaryFile() as file:  # the mapping outlives the file's name and goes with the tensor
        return torch.from_numpy(np.memmap(file, dtype=np.float16, mode="w+", shape=shape))


def frame_features(representation: Representation, corpus: Corpus, indices: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Returns (L, N, D) float16 frames of all utterances end to end, and (n + 1,) offsets of the utterances.

    Args:
        representation: What to compute.
        corpus: Where from.
        indices: (n,) utterances; see :func:`choose_utterances` for a cap.

    Raises:
        ValueError: Features that are not finite in float16, or whose number differs from what was announced.
    """
    offsets = np.concatenate([[0], np.cumsum(representation.num_frames(indices))])
    store: Tensor | None = None
    for position, x_LTD in representation.layers_of(indices):
        start, stop = int(offsets[position]), int(offsets[position + 1])
        if x_LTD.shape[1] != stop - start:
            utterance = corpus.utterance(int(indices[position])).id
            raise ValueError(f"{utterance}: {representation.name} gives {x_LTD.shape[1]} frames, {stop - start} were expected")
        if store is None:
            store = _frame_store((len(x_LTD), int(offsets[-1]), x_LTD.shape[-1]))
        _checked(x_LTD, representation, corpus, indices[position])
        if x_LTD.numel() and x_LTD.abs().max() > torch.finfo(torch.float16).max:
            utterance = corpus.utterance(int(indices[position])).id
            raise ValueError(f"{representation.name} gives features beyond the range of float16 for utterance {utterance}")
        store[:, start:stop] = x_LTD.half()
    assert store is not None, "frame_features needs at least one utterance"
    return store, offsets


def choose_utterances(num_frames: np.ndarray, max_frames: int | None, seed: int) -> np.ndarray:
    """Returns sorted positions of whole utterances, at least one, drawn by ``seed`` until ``max_frames`` are reached."""
    if max_frames is None or num_frames.sum() <= max_frames:
        return np.arange(len(num_frames))
    order = np.random.default_rng(seed).permutation(len(num_frames))
    count = int(np.searchsorted(np.cumsum(num_frames[order]), max_frames, side="right"))
    return np.sort(order[: max(count, 1)])
