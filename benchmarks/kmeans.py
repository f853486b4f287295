"""Our k-means against scikit-learn's MiniBatchKMeans: 200,000 frames of 768 dimensions into 500 clusters, interleaved, medians.

The frames are drawn from 5,000 unequal components within 64 dimensions, under noise in all 768 that is stronger: many more
components than clusters and none of them separated, as in the layers of a speech model. Ours runs with its defaults.
scikit-learn runs with one k-means++ start (``n_init=1``), at its default batch size and at 10,000, which is slower and better;
the target is the time of the faster and, within 1 %, the inertia of the better. Both sides have the same number of threads.
Run it on an idle machine: ``python benchmarks/kmeans.py``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from sslim.targets.kmeans import Codebook, KMeansConfig, fit

OURS, PEERS = "sslim", {"scikit-learn, batch 1,024": 1024, "scikit-learn, batch 10,000": 10_000}


def frames_of_mixture(num_frames: int, dim: int, *, components: int = 5000, rank: int = 64, noise: float = 1.3) -> np.ndarray:
    """Returns (num_frames, dim) float32 frames, the same every time."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(rank, dim, generator=generator) / math.sqrt(rank)
    centres = torch.randn(components, rank, generator=generator) @ basis
    weights = torch.rand(components, generator=generator).square() + 0.05
    component = torch.multinomial(weights, num_frames, replacement=True, generator=generator)
    frames = torch.empty(num_frames, dim)
    for part, own in zip(frames.split(20_000), component.split(20_000), strict=True):
        part.copy_(centres[own] + noise * torch.randn(part.shape, generator=generator))
    return frames.numpy()


def ours(frames: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    return fit(frames, KMeansConfig(num_clusters=num_clusters, seed=seed)).codebook().centroids_KF.numpy()


def scikit_learn(frames: np.ndarray, num_clusters: int, seed: int, batch_size: int) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(num_clusters, init="k-means++", n_init=1, batch_size=batch_size, random_state=seed)
    return model.fit(frames).cluster_centers_


def inertia_per_frame(frames: np.ndarray, centroids: np.ndarray) -> float:
    _, distances = Codebook(torch.from_numpy(np.asarray(centroids, dtype=np.float32))).assign(torch.from_numpy(frames))
    return float(distances.double().mean())


def measure(frames: np.ndarray, num_clusters: int, repetitions: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Returns seconds and inertia per frame of every repetition (seed), the sides taking turns."""
    sides: dict[str, Callable[[int], np.ndarray]] = {OURS: lambda seed: ours(frames, num_clusters, seed)}
    for name, batch_size in PEERS.items():
        sides[name] = lambda seed, batch_size=batch_size: scikit_learn(frames, num_clusters, seed, batch_size)
    ours(frames[:2000], 20, 0), scikit_learn(frames[:2000], 20, 0, 1024)  # libraries start their threads
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    inertia: dict[str, list[float]] = {name: [] for name in sides}
    for seed in range(repetitions):
        for name, run in sides.items():
            started = time.perf_counter()
            centroids = run(seed)
            seconds[name].append(time.perf_counter() - started)
            inertia[name].append(inertia_per_frame(frames, centroids))
    return seconds, inertia


def main() -> None:
    from threadpoolctl import threadpool_limits

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--frames", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--clusters", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    frames = frames_of_mixture(options.frames, options.dim)
    with threadpool_limits(options.threads):
        seconds, inertia = measure(frames, options.clusters, options.repetitions)
    medians = {name: (statistics.median(seconds[name]), statistics.median(inertia[name])) for name in seconds}
    print(f"{options.frames:,} frames x {options.dim} into {options.clusters} clusters, {options.threads} threads")
    for name, (time_s, value) in medians.items():
        print(f"{name:28s} {time_s:8.1f} s   inertia per frame {value:10.2f}")
    fastest = min(time_s for name, (time_s, _) in medians.items() if name != OURS)
    best = min(value for name, (_, value) in medians.items() if name != OURS)
    ratios = {"time, sslim / fastest peer": medians[OURS][0] / fastest, "inertia, sslim / best peer": medians[OURS][1] / best}
    for name, ratio in ratios.items():
        print(f"{name:28s} {ratio:8.3f}")
    print(json.dumps({"benchmark": "kmeans", "seconds": seconds, "inertia_per_frame": inertia, "ratios": ratios}))


if __name__ == "__main__":
    main()
