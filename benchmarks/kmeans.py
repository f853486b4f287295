"""Our k-means against scikit-learn's MiniBatchKMeans: 200,000 frames of 768 dimensions into 500 clusters, interleaved, medians.

The frames are drawn from 5,000 unequal components within 64 dimensions, under noise in all 768 that is stronger: many more
components than clusters and none of them separated, as in the layers of a speech model. Ours runs with its defaults.
scikit-learn runs with one k-means++ start (``n_init=1``), at its default batch size, which is fast and stops early, and at
10,000, which finds better clusters. Both sides have the same number of threads. Processor seconds are there because they
suffer less from other work on the machine. Run it on an idle one: ``python benchmarks/kmeans.py``.
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

OURS = {"sslim": 10, "sslim, two epochs": 2}  # at most so many epochs; the first is the default
PEERS = {"scikit-learn, batch 1,024": 1024, "scikit-learn, batch 10,000": 10_000}
MEASURES = ("seconds", "cpu_seconds", "inertia_per_frame")


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


def ours(frames: np.ndarray, num_clusters: int, seed: int, max_epochs: int = 10) -> np.ndarray:
    return (
        fit(frames, KMeansConfig(num_clusters=num_clusters, seed=seed, max_epochs=max_epochs)).codebook().centroids_KF.numpy()
    )


def scikit_learn(frames: np.ndarray, num_clusters: int, seed: int, batch_size: int) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(num_clusters, init="k-means++", n_init=1, batch_size=batch_size, random_state=seed)
    return model.fit(frames).cluster_centers_


def inertia_per_frame(frames: np.ndarray, centroids: np.ndarray) -> float:
    _, distances = Codebook(torch.from_numpy(np.asarray(centroids, dtype=np.float32))).assign(torch.from_numpy(frames))
    return float(distances.double().mean())


def measure(frames: np.ndarray, num_clusters: int, repetitions: int) -> dict[str, dict[str, list[float]]]:
    """Returns what every repetition (seed) measured for each side, the sides taking turns."""
    sides: dict[str, Callable[[int], np.ndarray]] = {}
    for name, max_epochs in OURS.items():
        sides[name] = lambda seed, max_epochs=max_epochs: ours(frames, num_clusters, seed, max_epochs)
    for name, batch_size in PEERS.items():
        sides[name] = lambda seed, batch_size=batch_size: scikit_learn(frames, num_clusters, seed, batch_size)
    ours(frames[:2000], 20, 0)  # libraries start their threads
    scikit_learn(frames[:2000], 20, 0, 1024)
    measured: dict[str, dict[str, list[float]]] = {name: {what: [] for what in MEASURES} for name in sides}
    for seed in range(repetitions):
        for name, run in sides.items():
            started, started_cpu = time.perf_counter(), time.process_time()
            centroids = run(seed)
            values = (time.perf_counter() - started, time.process_time() - started_cpu, inertia_per_frame(frames, centroids))
            for what, value in zip(MEASURES, values, strict=True):
                measured[name][what].append(value)
    return measured


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
        measured = measure(frames, options.clusters, options.repetitions)
    medians = {name: {what: statistics.median(values[what]) for what in MEASURES} for name, values in measured.items()}
    print(f"{options.frames:,} frames x {options.dim} into {options.clusters} clusters, {options.threads} threads")
    print(f"{'':28s} {'seconds':>10s} {'cpu':>10s} {'inertia/frame':>14s}")
    for name, values in medians.items():
        print(f"{name:28s} {values['seconds']:10.1f} {values['cpu_seconds']:10.1f} {values['inertia_per_frame']:14.2f}")
    ratios = {
        f"{name} / {peer}": {what: medians[name][what] / medians[peer][what] for what in MEASURES}
        for peer in PEERS
        for name in OURS
    }
    for name, values in ratios.items():
        print(f"{name:48s} " + ", ".join(f"{what} {value:.3f}" for what, value in values.items()))
    print(json.dumps({"benchmark": "kmeans", "measured": measured, "ratios": ratios}))


if __name__ == "__main__":
    main()
