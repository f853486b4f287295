"""k-means for frames that need not fit into memory: a greedy k-means++ start on a sample, then mini-batches.

The start is that of Arthur and Vassilvitskii (2007) in its greedy form: frames are drawn with a probability proportional to
their squared distance from the centres so far, and of 2 + log K such trials the best becomes a centre. Most of the cost of
k-means is there. So trials are drawn for several centres at once, which makes their distances one large matrix product, and the
centres are taken from these one after the other, each the best after those before it.

The batches follow MacQueen's rule in epochs: a centroid is the mean of the frames assigned to it in this epoch, with a remnant
of the last one. So it forgets frames that it won before it moved, and improves like Lloyd's algorithm, only sooner.

Everything random is a function of (seed, epoch), so a run that was killed continues from a saved state with the same result to
the bit (on the CPU with the same number of threads).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sslim.storage import atomic_file, load_tensors, save_tensors

CHUNK_FRAMES = 8192  # frames whose distances are held at once: 16 MB for 500 clusters
START_FRAMES_PER_CLUSTER = 30
HALVING_STEP = 0.01
MAX_PICKS = 8  # starting centres taken from one set of trials
START, SHUFFLE, REVIVE = 0, 1, 2  # what a random stream is for


@dataclass(frozen=True, kw_only=True)
class KMeansConfig:
    """How to cluster.

    Attributes:
        num_clusters: K.
        seed: Decides the sample, the start and the order of frames.
        max_epochs: Passes over the frames at most.
        tolerance: Stop when an epoch lowers the inertia by less than this share.
        batch_frames: Frames after which the centroids move.
        start_frames: Frames of the sample on which the start is chosen; 30 for each cluster if that is more.
        start_trials: Frames tried for each starting centre; None for 2 + log K.
        memory: Weight of the last epoch's frames in this one's means.
        revive_below: Clusters that have less than this share of the mean number of frames after an epoch get half of another;
            0 for never.
    """

    num_clusters: int
    seed: int = 0
    max_epochs: int = 10
    tolerance: float = 5e-3
    batch_frames: int = 10_000
    start_frames: int = 20_000
    start_trials: int | None = None
    memory: float = 0.02
    revive_below: float = 0.01

    def __post_init__(self) -> None:
        for name, least in (("num_clusters", 1), ("max_epochs", 1), ("batch_frames", 1), ("start_frames", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 or above")
        if not (0 <= self.memory < 1 and 0 <= self.revive_below < 1):
            raise ValueError(f"memory is {self.memory} and revive_below {self.revive_below}; both must be in [0, 1)")


@dataclass(kw_only=True)
class KMeansState:
    """Everything that the rest of a run depends on, besides the frames and the configuration.

    Attributes:
        shift_F: Subtracted from every frame before anything else, so that float32 distances lose nothing to a large mean.
        centroids_KF: Centroids of shifted frames, float32.
        sums_KF: Weighted sums of the frames assigned in this epoch, float64.
        counts_K: Their weights, float64.
        carried_K: Share of ``counts_K`` that comes from the last epoch.
        epoch: Epochs completed.
        batch: Batches of the next epoch completed.
        inertia: Sum of squared distances in it so far, each measured before the centroids moved.
        history: Such inertia per frame of every completed epoch.
        num_revived: Centres that were replaced, over all epochs.
        done: Whether the run is over.
    """

    shift_F: Tensor
    centroids_KF: Tensor
    sums_KF: Tensor
    counts_K: Tensor
    carried_K: Tensor
    epoch: int = 0
    batch: int = 0
    inertia: float = 0.0
    history: list[float] = field(default_factory=list)
    num_revived: int = 0
    done: bool = False

    TENSORS = ("shift_F", "centroids_KF", "sums_KF", "counts_K", "carried_K")
    NUMBERS = ("epoch", "batch", "num_revived", "done")

    def save(self, path: Path) -> None:
        """Writes the state whole, or leaves the old one in place."""
        tensors = {name: getattr(self, name) for name in self.TENSORS}
        tensors["numbers"] = torch.tensor([int(getattr(self, name)) for name in self.NUMBERS])
        tensors["inertia"] = torch.tensor([*self.history, self.inertia], dtype=torch.float64)
        with atomic_file(path) as temporary:
            save_tensors(temporary, tensors)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> KMeansState:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: The file is no state.
        """
        tensors = load_tensors(path)
        if set(tensors) != {*cls.TENSORS, "numbers", "inertia"}:
            raise ValueError(f"{path} is no state of a k-means run: it holds {', '.join(sorted(tensors)) or 'nothing'}")
        epoch, batch, num_revived, done = tensors["numbers"].tolist()
        *history, inertia = tensors["inertia"].tolist()
        return cls(
            **{name: tensors[name].to(device) for name in cls.TENSORS},
            epoch=epoch,
            batch=batch,
            inertia=inertia,
            history=history,
            num_revived=num_revived,
            done=bool(done),
        )

    def codebook(self) -> Codebook:
        """Returns the centroids in the frames' own coordinates."""
        return Codebook((self.centroids_KF.double() + self.shift_F.double()).float().cpu())


class Codebook:
    """Centroids, and the nearest of them to a frame.

    Args:
        centroids_KF: (K, F).

    Raises:
        ValueError: They are no finite matrix.
    """

    def __init__(self, centroids_KF: Tensor) -> None:
        if centroids_KF.dim() != 2 or not len(centroids_KF) or not bool(torch.isfinite(centroids_KF).all()):
            raise ValueError(f"a codebook of shape {tuple(centroids_KF.shape)} is not a matrix of finite centroids")
        self.centroids_KF = centroids_KF.detach().float()
        self._shift_F = self.centroids_KF.double().mean(0).float()
        self._centred_KF = self.centroids_KF - self._shift_F
        self._norms_K = self._centred_KF.square().sum(1)

    @property
    def num_clusters(self) -> int:
        return self.centroids_KF.shape[0]

    @property
    def feature_dim(self) -> int:
        return self.centroids_KF.shape[1]

    @property
    def digest(self) -> str:
        """SHA-256 of shape and values."""
        values = self.centroids_KF.cpu().numpy().astype("<f4")
        return hashlib.sha256(f"{values.shape} ".encode() + values.tobytes()).hexdigest()

    def to(self, device: torch.device | str) -> Codebook:
        return Codebook(self.centroids_KF.to(device))

    def assign(self, frames_TF: Tensor, chunk_frames: int = CHUNK_FRAMES) -> tuple[Tensor, Tensor]:
        """Returns the nearest cluster of each frame, (T,) int64, and the squared distance to it, (T,) float32.

        Raises:
            ValueError: The frames have another width than the centroids.
        """
        if frames_TF.dim() != 2 or frames_TF.shape[1] != self.feature_dim:
            raise ValueError(f"frames have shape {tuple(frames_TF.shape)}; the codebook takes (frames, {self.feature_dim})")
        parts = [
            _nearest(chunk.float() - self._shift_F, self._centred_KF, self._norms_K) for chunk in frames_TF.split(chunk_frames)
        ]
        return torch.cat([labels for labels, _ in parts]), torch.cat([distances for _, distances in parts])


def _nearest(x_TF: Tensor, centroids_KF: Tensor, norms_K: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid and squared distance by |x - c|^2 = |x|^2 + |c|^2 - 2 x.c; exact enough where both are centred."""
    partial_T, labels_T = torch.addmm(norms_K, x_TF, centroids_KF.T, alpha=-2).min(1)
    return labels_T, (partial_T + x_TF.square().sum(1)).clamp_(min=0)


Frames = np.ndarray | Tensor  # (N, F), of any float type; an array may be memory-mapped


def _rows(frames: Frames, indices: np.ndarray, device: torch.device | str) -> Tensor:
    """Copies rows; only they are read."""
    if isinstance(frames, Tensor):
        return frames[torch.from_numpy(indices).to(frames.device)].to(device=device, dtype=torch.float32)
    return torch.from_numpy(np.asarray(frames[indices], dtype=np.float32)).to(device)


def _random(config: KMeansConfig, purpose: int, epoch: int = 0) -> np.random.Generator:
    return np.random.default_rng([config.seed, purpose, epoch])


def greedy_start(x_NF: Tensor, num_clusters: int, rng: np.random.Generator, *, trials: int | None = None) -> Tensor:
    """Chooses starting centres among frames by greedy k-means++.

    Args:
        x_NF: (N, F) float32 frames.
        num_clusters: K, at most N.
        rng: Decides every draw.
        trials: Frames drawn for each centre; None for 2 + log K.

    Returns:
        (K,) int64 rows of ``x_NF``.
    """
    x_NF = x_NF - x_NF.mean(0)
    norms_N = x_NF.square().sum(1)
    transposed = x_NF.T.contiguous()
    trials = 2 + int(math.log(num_clusters)) if trials is None else trials

    def distances(rows: Tensor) -> Tensor:
        """(trials, N) squared distances; exactly 0 from a frame to itself, so that it is not drawn again."""
        result = torch.addmm(norms_N[None], x_NF[rows], transposed, alpha=-2).add_(norms_N[rows, None]).clamp_(min=0)
        return result.scatter_(1, rows[:, None], 0.0)

    chosen = [int(rng.integers(len(x_NF)))]
    closest_N = distances(torch.tensor(chosen, device=x_NF.device))[0]
    while len(chosen) < num_clusters:
        # the first centres change the distances most, so they are drawn one by one
        picks = min(MAX_PICKS, max(1, len(chosen) // MAX_PICKS), num_clusters - len(chosen))
        cumulated_N = closest_N.double().cumsum(0)
        draws = torch.from_numpy(rng.random(trials * picks)).to(x_NF.device) * cumulated_N[-1]
        rows = torch.searchsorted(cumulated_N, draws, right=True).clamp_(max=len(x_NF) - 1)
        improved = distances(rows)
        for _ in range(picks):
            torch.minimum(improved, closest_N, out=improved)
            best = int(improved.sum(1).argmin())
            closest_N = improved[best].clone()
            chosen.append(int(rows[best]))
    return torch.tensor(chosen, device=x_NF.device)


def start(frames: Frames, config: KMeansConfig, device: torch.device | str = "cpu") -> KMeansState:
    """Chooses the starting centroids on a sample.

    Args:
        frames: (N, F).
        config: How.
        device: Where to compute.

    Raises:
        ValueError: There are fewer frames than clusters, or a frame is not finite.
    """
    num_frames, num_clusters = len(frames), config.num_clusters
    if frames.ndim != 2 or num_frames < num_clusters:
        raise ValueError(
            f"{num_clusters} clusters need at least as many frames; there are {num_frames}: ask for fewer clusters"
        )
    rng = _random(config, START)
    size = min(num_frames, max(config.start_frames, START_FRAMES_PER_CLUSTER * num_clusters))
    x_NF = _rows(frames, np.sort(rng.choice(num_frames, size, replace=False)), device)
    if not bool(torch.isfinite(x_NF).all()):
        raise ValueError("the frames to be clustered hold a non-finite value")
    shift_F = x_NF.double().mean(0).float()
    x_NF = x_NF.sub_(shift_F)
    rows_K = greedy_start(x_NF, num_clusters, rng, trials=config.start_trials)
    zeros_K = torch.zeros(num_clusters, dtype=torch.float64, device=device)
    return KMeansState(
        shift_F=shift_F,
        centroids_KF=x_NF[rows_K].clone(),
        sums_KF=torch.zeros(num_clusters, x_NF.shape[1], dtype=torch.float64, device=device),
        counts_K=zeros_K,
        carried_K=zeros_K.clone(),
    )


def fit(
    frames: Frames,
    config: KMeansConfig,
    *,
    state: KMeansState | None = None,
    on_batch: Callable[[KMeansState], None] | None = None,
    device: torch.device | str = "cpu",
) -> KMeansState:
    """Clusters frames.

    Args:
        frames: (N, F) array, memory map or tensor; ``batch_frames`` rows are read at a time, ``start_frames`` for the start.
        config: How.
        state: Where to go on; None starts anew. It is changed.
        on_batch: Called with the state after every batch, for progress and saving.
        device: Where to compute. Equal bits in every run are promised for the CPU only.

    Returns:
        The final state, ``done``; its ``codebook()`` is the result.

    Raises:
        ValueError: There are fewer frames than clusters, or a frame is not finite.
    """
    state = start(frames, config, device) if state is None else state
    num_batches = -(-len(frames) // config.batch_frames)
    while not state.done:
        order = _random(config, SHUFFLE, state.epoch).permutation(len(frames))
        while state.batch < num_batches:
            indices = np.sort(order[state.batch * config.batch_frames : (state.batch + 1) * config.batch_frames])
            _move(state, _rows(frames, indices, device))
            if state.batch == num_batches:
                _end_epoch(state, frames, config)
            if on_batch is not None:
                on_batch(state)
            if state.batch == 0:
                break
    return state


def _move(state: KMeansState, x_BF: Tensor) -> None:
    """Takes in one batch: assigns it, then moves the centroids."""
    x_BF = x_BF.sub_(state.shift_F)
    norms_K = state.centroids_KF.square().sum(1)
    parts = [_nearest(chunk, state.centroids_KF, norms_K) for chunk in x_BF.split(CHUNK_FRAMES)]
    labels_B, inertia = torch.cat([labels for labels, _ in parts]), float(torch.cat([d for _, d in parts]).double().sum())
    if not math.isfinite(inertia):
        raise ValueError("the frames to be clustered hold a non-finite value")
    # float32 sums of one batch lose nothing; over an epoch they would
    state.sums_KF += torch.zeros_like(state.centroids_KF).index_add_(0, labels_B, x_BF)
    state.counts_K += torch.bincount(labels_B, minlength=len(norms_K))
    means_KF = (state.sums_KF / state.counts_K.clamp(min=torch.finfo(torch.float64).tiny)[:, None]).float()
    state.centroids_KF = torch.where(state.counts_K[:, None] > 0, means_KF, state.centroids_KF)
    state.inertia += inertia
    state.batch += 1


def _end_epoch(state: KMeansState, frames: Frames, config: KMeansConfig) -> None:
    """Decides whether to go on; revives weak clusters, fades what was summed up."""
    state.history.append(state.inertia / len(frames))
    state.epoch, state.batch, state.inertia = state.epoch + 1, 0, 0.0
    won_K = state.counts_K - state.carried_K
    weak = torch.nonzero(won_K < config.revive_below * len(frames) / config.num_clusters)[:, 0]
    if state.epoch == config.max_epochs:
        state.done = True
        return
    state.counts_K, state.sums_KF = state.counts_K * config.memory, state.sums_KF * config.memory
    revived = _revive(state, frames, config, weak) if len(weak) else 0
    state.carried_K = state.counts_K.clone()
    if len(state.history) > 1 and not revived:
        before, now = state.history[-2:]
        state.done = before - now <= config.tolerance * before


def _revive(state: KMeansState, frames: Frames, config: KMeansConfig, weak: Tensor) -> int:
    """Gives weak clusters a half of clusters with much inertia; returns how many.

    A frame is drawn in proportion to its squared distance, and the new centre put a small step from its centroid towards it, so
    that the plane between them halves the cluster. The frame itself would not do: under noise in many dimensions it wins none.
    """
    rng = _random(config, REVIVE, state.epoch)
    size = min(len(frames), max(config.batch_frames, 20 * len(weak)))
    x_NF = _rows(frames, np.sort(rng.choice(len(frames), size, replace=False)), state.shift_F.device) - state.shift_F
    norms_K = state.centroids_KF.square().sum(1)
    parts = [_nearest(chunk, state.centroids_KF, norms_K) for chunk in x_NF.split(CHUNK_FRAMES)]
    labels_N, distances_N = torch.cat([labels for labels, _ in parts]), torch.cat([distances for _, distances in parts])
    # frames that a centroid sits on differ from it by no more than rounding, and weak clusters are not worth halving
    usable_N = (distances_N > 1e-6 * x_NF.square().sum(1).mean()) & ~torch.isin(labels_N, weak)
    weights = (distances_N.double() * usable_N).cpu().numpy()
    number = min(len(weak), int((weights > 0).sum()))
    if number == 0:
        return 0
    rows = torch.from_numpy(rng.choice(size, number, replace=False, p=weights / weights.sum())).to(x_NF.device)
    weak, halved_KF = weak[:number], state.centroids_KF[labels_N[rows]]
    state.centroids_KF[weak] = halved_KF + HALVING_STEP * (x_NF[rows] - halved_KF)
    state.sums_KF[weak], state.counts_K[weak] = 0.0, 0.0
    state.num_revived += number
    return number
