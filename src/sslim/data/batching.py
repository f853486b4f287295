"""From a corpus to micro-batches: which utterances, cut where, in which order, and the padded tensors themselves.

``BatchPlan`` decides; it is a pure function of (lengths, seed, epoch, index) and knows no files. ``CorpusBatches`` reads what
the plan asks for. Neither depends on the number of processes: the trainer hands micro-batch ``i`` to whichever process it
likes. Lengths are in *stored units*: base frames for stored features, samples for waveforms.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sslim.batch import IGNORED_LABEL, Batch
from sslim.data.labels import LabelStore, align_labels
from sslim.data.noise import Noise
from sslim.frontends import Frontend

if TYPE_CHECKING:
    from sslim.data.corpus import Corpus

NOISE_STREAM = 7919  # keeps the numbers drawn for noise apart from those for orders and cuts
BIN_GROWTH = 1.03  # lengths within 3 % share a bin: padding costs about half of that


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """How utterances are put together.

    Attributes:
        max_frames_per_batch: Most stored units in a micro-batch, padding included.
        max_utterances: Most utterances in a micro-batch; None for no limit.
        max_length: Longer utterances are cut to this length, at a random start that changes every epoch; None keeps them whole.
        min_length: Shorter utterances are left out.
        crop_multiple: Cuts start at multiples of this; a multiple of the stored units in a frame of the model.
        shuffle: False keeps one order for good (validation).
    """

    max_frames_per_batch: int
    max_utterances: int | None = None
    max_length: int | None = None
    min_length: int = 1
    crop_multiple: int = 1
    shuffle: bool = True

    def __post_init__(self) -> None:
        for name in ("max_frames_per_batch", "max_utterances", "max_length", "min_length", "crop_multiple"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError(f"max_length {self.max_length} is below min_length {self.min_length}")


@dataclass(frozen=True, kw_only=True)
class PlannedBatch:
    """One micro-batch.

    Attributes:
        indices: (B,) positions in the ``lengths`` given to the plan.
        starts: (B,) first stored unit of each cut; 0 for whole utterances.
        lengths: (B,) stored units taken.
    """

    indices: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class _Epoch:
    order: np.ndarray  # utterances, in runs that the boundaries cut into batches
    batches: np.ndarray  # a permutation of the batches
    starts: np.ndarray  # start of each utterance's cut


class BatchPlan:
    """Length-bucketed micro-batches with the same boundaries in every epoch.

    Lengths are quantised into geometric bins, and the utterances, sorted by bin, cut wherever one more would exceed the
    budget at its bin's largest length. An epoch permutes utterances inside their bins and then the batches. Any permutation
    inside bins fits the same boundaries, so the number of batches is constant and batch ``i`` costs no look at the batches
    before it.

    Args:
        lengths: (U,) stored units of each utterance.
        config: How to batch them.
        seed: Decides every order and every cut.

    Attributes:
        num_batches: Micro-batches in an epoch.
        num_dropped: Utterances left out as too short.
        efficiency: Share of real units among all units of the padded batches, on average.

    Raises:
        ValueError: No utterance is left, or one exceeds the budget on its own.
    """

    def __init__(self, lengths: np.ndarray, config: BatchingConfig, *, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed {seed} is negative")
        self.config, self.seed = config, seed
        self.full_lengths = np.asarray(lengths, dtype=np.int64)
        kept = np.flatnonzero(self.full_lengths >= config.min_length)
        self.num_dropped = len(self.full_lengths) - len(kept)
        if len(kept) == 0:
            raise ValueError(f"none of the {len(self.full_lengths)} utterances has min_length {config.min_length} or more")
        limit = config.max_length if config.max_length is not None else int(self.full_lengths.max())
        self.lengths = np.minimum(self.full_lengths, limit)
        longest = int(kept[self.lengths[kept].argmax()])
        if self.lengths[longest] > config.max_frames_per_batch:
            raise ValueError(
                f"utterance number {longest} is {self.lengths[longest]} long, more than max_frames_per_batch "
                f"{config.max_frames_per_batch}: raise that, or cut utterances with a max_length up to it"
            )
        bins = np.floor(np.log(self.lengths[kept]) / math.log(BIN_GROWTH)).astype(np.int64)
        order = np.argsort(bins, kind="stable")
        self._sorted, self._bins = kept[order], bins[order]
        self._boundaries = self._cut()
        self.num_batches = len(self._boundaries) - 1
        self._epochs: dict[int, _Epoch] = {}

    def _cut(self) -> np.ndarray:
        """Returns (num_batches + 1,) boundaries in the sorted utterances."""
        edges = np.flatnonzero(np.diff(self._bins, prepend=-1))
        largest = np.maximum.reduceat(self.lengths[self._sorted], edges)
        boundaries, begin = [np.array([0])], 0  # begin: where the open batch starts
        for first, end, length in zip(edges.tolist(), [*edges[1:].tolist(), len(self._sorted)], largest.tolist(), strict=True):
            capacity = max(1, self.config.max_frames_per_batch // length)
            if self.config.max_utterances is not None:
                capacity = min(capacity, self.config.max_utterances)
            # What is open from shorter bins is closed early when it already holds what this bin allows.
            next_cut = max(begin + capacity, first)
            cuts = np.arange(next_cut, end, capacity)
            if len(cuts):
                boundaries.append(cuts)
                begin = int(cuts[-1])
        return np.concatenate([*boundaries, [len(self._sorted)]])

    def _epoch(self, epoch: int) -> _Epoch:
        if not self.config.shuffle:
            epoch = 0
        if epoch not in self._epochs:
            rng = np.random.default_rng([self.seed, epoch])
            count = len(self._sorted)
            keys, places = rng.random(count), rng.random(len(self.lengths))
            possible = (self.full_lengths - self.lengths) // self.config.crop_multiple + 1
            starts = (places * possible).astype(np.int64) * self.config.crop_multiple
            if self.config.shuffle:
                order = self._sorted[np.argsort(self._bins + keys, kind="stable")]
                batches = rng.permutation(self.num_batches)
            else:
                order, batches = self._sorted, np.arange(self.num_batches)
            while len(self._epochs) > 1:  # at an epoch's end two are in use
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = _Epoch(order, batches, starts)
        return self._epochs[epoch]

    def batch(self, epoch: int, index: int) -> PlannedBatch:
        """Returns micro-batch ``index`` (below ``num_batches``) of an epoch."""
        if not 0 <= index < self.num_batches:
            raise IndexError(f"batch {index} of {self.num_batches}")
        plan = self._epoch(epoch)
        place = int(plan.batches[index])
        indices = plan.order[self._boundaries[place] : self._boundaries[place + 1]]
        return PlannedBatch(indices=indices, starts=plan.starts[indices], lengths=self.lengths[indices])

    @property
    def efficiency(self) -> float:
        plan = self._epoch(0)
        lengths, edges = self.lengths[plan.order], self._boundaries[:-1]
        padded = np.maximum.reduceat(lengths, edges) * np.diff(self._boundaries)
        return float(lengths.sum() / padded.sum())

    @property
    def digest(self) -> str:
        """Tells this plan from every other: lengths, settings and seed."""
        text = f"{self.config} {self.seed} ".encode()
        return hashlib.sha256(text + self.full_lengths.tobytes()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class FrameFacts:
    """What batching must know of a front-end.

    Attributes:
        hop: Stored units (base frames or samples) from one frame of the model to the next.
        unit_s: Seconds in a stored unit.
        frame_period_s: Seconds from one frame of the model to the next.
        num_frames: Stored units to frames of the model.
        is_waveform: Whether stored units are samples.
    """

    hop: int
    unit_s: float
    frame_period_s: float
    num_frames: Callable[[int], int] = field(repr=False)
    is_waveform: bool = False

    @staticmethod
    def of_features(frontend: Frontend) -> FrameFacts:
        """For a model fed with stored base features."""
        return FrameFacts(
            hop=frontend.stack,
            unit_s=frontend.base_frame_shift_s,
            frame_period_s=frontend.frame_shift_s,
            num_frames=frontend.num_stacked_frames,
        )

    @staticmethod
    def of_waveform(frontend: Frontend) -> FrameFacts:
        """For a model fed with waveforms."""
        return FrameFacts(
            hop=round(frontend.frame_shift_s * frontend.sample_rate),
            unit_s=1.0 / frontend.sample_rate,
            frame_period_s=frontend.frame_shift_s,
            num_frames=frontend.num_frames,
            is_waveform=True,
        )


class CorpusBatches:
    """Micro-batches of a corpus; item ``(epoch, index)`` is a pure function of the two.

    Stored features stay float16 on the way to the device (half the bytes to copy); an objective converts them to float32
    before it computes anything.

    Args:
        corpus: Where features, waveforms and ids come from.
        plan: Made from the lengths of exactly ``utterances``.
        facts: Of the model's front-end.
        labels: Targets; None without.
        utterances: Corpus indices that the plan's positions stand for; None for the whole corpus.
        noise: What is added to waveforms, drawn from the plan's seed, the epoch and the batch; None adds nothing.

    Raises:
        ValueError: The plan was made for another number of utterances, its cuts fall between frames, or noise is to be added to
            stored features.
    """

    def __init__(
        self,
        corpus: Corpus,
        plan: BatchPlan,
        facts: FrameFacts,
        *,
        labels: LabelStore | None = None,
        utterances: np.ndarray | None = None,
        noise: Noise | None = None,
    ) -> None:
        self.corpus, self.plan, self.facts, self.labels, self.noise = corpus, plan, facts, labels, noise
        if noise is not None and not facts.is_waveform:
            raise ValueError(f"noise is added to waveforms, and what is read of corpus {corpus.name} are its stored features")
        self.utterances = np.arange(len(corpus)) if utterances is None else np.asarray(utterances, dtype=np.int64)
        if len(self.utterances) != len(plan.full_lengths):
            raise ValueError(f"the plan is for {len(plan.full_lengths)} utterances, the corpus part has {len(self.utterances)}")
        if plan.config.max_length is not None and plan.config.crop_multiple % facts.hop:
            raise ValueError(
                f"crop_multiple {plan.config.crop_multiple} is not a multiple of a frame's {facts.hop} stored units"
            )

    @property
    def num_batches(self) -> int:
        return self.plan.num_batches

    @property
    def digest(self) -> str:
        """Tells these batches from all others."""
        labels = None if self.labels is None else self.labels.digest
        parts = f"{self.plan.digest} {self.corpus.digest} {labels} {self.facts.hop} {self.facts.frame_period_s} "
        added = b"" if self.noise is None else str(self.noise.config).encode()
        return hashlib.sha256(parts.encode() + self.utterances.tobytes() + added).hexdigest()[:16]

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        planned = self.plan.batch(*key)
        utterances = self.utterances[planned.indices].tolist()
        starts, lengths = planned.starts.tolist(), planned.lengths.tolist()
        read = self._waveforms if self.facts.is_waveform else self._features
        inputs = read(utterances, starts, lengths)
        return Batch(
            inputs=inputs if self.noise is None else self._noisy(self.noise, inputs, lengths, key),
            lengths=torch.from_numpy(planned.lengths.copy()),
            ids=tuple(self.corpus.utterance(i).id for i in utterances),
            labels=None if self.labels is None else self._labels(self.labels, utterances, planned),
            duration_s=sum(lengths) * self.facts.unit_s,
            clean=None if self.noise is None else inputs,
        )

    def _noisy(self, noise: Noise, clean_BS: Tensor, lengths: list[int], key: tuple[int, int]) -> Tensor:
        generator = np.random.default_rng([self.plan.seed, NOISE_STREAM, *key])
        noisy_BS = clean_BS.clone()
        rows = noisy_BS.numpy()
        for row, length in enumerate(lengths):
            rows[row, :length] = noise.add(rows[row, :length], generator)
        return noisy_BS

    # torch allocates: its tensors are aligned to 64 bytes, numpy's to 16, and matrix products may round by alignment.

    def _features(self, utterances: list[int], starts: list[int], lengths: list[int]) -> Tensor:
        pieces = [self.corpus.features(i, s, s + n) for i, s, n in zip(utterances, starts, lengths, strict=True)]
        inputs_BTF = torch.zeros(len(pieces), max(lengths), pieces[0].shape[1], dtype=torch.float16)
        rows = inputs_BTF.numpy()
        for row, piece in enumerate(pieces):
            rows[row, : len(piece)] = piece
        return inputs_BTF

    def _waveforms(self, utterances: list[int], starts: list[int], lengths: list[int]) -> Tensor:
        inputs_BS = torch.zeros(len(utterances), max(lengths))
        rows = inputs_BS.numpy()
        for row, (i, start, length) in enumerate(zip(utterances, starts, lengths, strict=True)):
            waveform_S = self.corpus.waveform(i)[start : start + length]
            if len(waveform_S) < length:
                raise ValueError(
                    f"utterance {self.corpus.utterance(i).id} is {length - len(waveform_S)} samples shorter than when corpus "
                    f"{self.corpus.name} was prepared: prepare it again"
                )
            rows[row, :length] = waveform_S
        return inputs_BS

    def _labels(self, labels: LabelStore, utterances: list[int], planned: PlannedBatch) -> Tensor:
        """Aligns each utterance's labels with its whole length, then cuts them where its features are cut."""
        facts = self.facts
        counts = [facts.num_frames(length) for length in planned.lengths.tolist()]
        labels_BT = np.full((len(utterances), max(counts)), IGNORED_LABEL, dtype=np.int64)
        for row, (i, count) in enumerate(zip(utterances, counts, strict=True)):
            position, first = int(planned.indices[row]), int(planned.starts[row]) // facts.hop
            whole = facts.num_frames(int(self.plan.full_lengths[position]))
            try:
                aligned = align_labels(
                    labels.get(i),
                    label_period_s=labels.frame_period_s,
                    frame_period_s=facts.frame_period_s,
                    num_frames=whole,
                )
            except ValueError as error:
                raise ValueError(f"utterance {self.corpus.utterance(i).id}: {error}") from error
            labels_BT[row, :count] = aligned[first : first + count]
        return torch.from_numpy(labels_BT)
