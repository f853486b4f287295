"""k-means against scikit-learn, brute force, and its own interrupted runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sslim.targets.kmeans import Codebook, KMeansConfig, KMeansState, fit, greedy_start


def mixture(num_frames: int, dim: int, components: int, *, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Frames around random centres (spread 1), and the component of each."""
    rng = np.random.default_rng(seed)
    component = np.concatenate([np.arange(components), rng.integers(0, components, num_frames - components)])
    frames = rng.normal(size=(components, dim))[component] + noise * rng.normal(size=(num_frames, dim))
    return frames.astype(np.float32), component


def inertia(frames: np.ndarray, centroids: np.ndarray) -> float:
    """Mean squared distance in float64, by brute force."""
    distances = torch.cdist(torch.from_numpy(frames).double(), torch.from_numpy(np.asarray(centroids)).double())
    return float(distances.min(1).values.square().mean())


def as_bytes(state: KMeansState) -> bytes:
    return b"".join(getattr(state, name).numpy().tobytes() for name in KMeansState.TENSORS)


def test_separated_clusters_are_found_exactly():
    frames, component = mixture(3000, 12, 40, noise=0.01)
    state = fit(frames, KMeansConfig(num_clusters=40, batch_frames=500, memory=0.0))
    labels, distances = state.codebook().assign(torch.from_numpy(frames))
    pairs = set(zip(component.tolist(), labels.tolist(), strict=True))
    assert len(pairs) == 40  # each component has one cluster, each cluster one component
    means = np.stack([frames[labels.numpy() == k].astype(np.float64).mean(0) for k in range(40)])
    np.testing.assert_allclose(state.codebook().centroids_KF.numpy(), means, atol=1e-5)
    assert float(distances.mean()) == pytest.approx(12 * 0.01**2, rel=0.1)
    worse = fit(frames, KMeansConfig(num_clusters=39, batch_frames=500))  # the control: one too few
    assert inertia(frames, worse.codebook().centroids_KF.numpy()) > 10 * float(distances.mean())


def test_the_seed_decides_everything():
    frames, _ = mixture(2000, 8, 100, noise=0.5)
    config = KMeansConfig(num_clusters=20, batch_frames=300)
    first, second = fit(frames, config), fit(frames, config)
    assert as_bytes(first) == as_bytes(second)
    assert first.codebook().digest == second.codebook().digest
    assert fit(frames, replace(config, seed=1)).codebook().digest != first.codebook().digest


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_assignment_is_brute_force_whatever_the_chunks(offset):
    """Far from the origin, |x|^2 + |c|^2 - 2 x.c would lose everything to rounding if nothing were centred."""
    rng = np.random.default_rng(0)
    frames = (rng.normal(size=(1000, 24)) + offset).astype(np.float32)
    centroids = (rng.normal(size=(50, 24)) + offset).astype(np.float32)
    exact = ((frames[:, None].astype(np.float64) - centroids[None]) ** 2).sum(2)
    codebook = Codebook(torch.from_numpy(centroids))
    for chunk_frames in (8192, 64, 7):
        labels, distances = codebook.assign(torch.from_numpy(frames), chunk_frames)
        np.testing.assert_array_equal(labels.numpy(), exact.argmin(1))
        np.testing.assert_allclose(distances.numpy(), exact.min(1), rtol=2e-4)
    if offset:
        naive = (frames**2).sum(1, keepdims=True) + (centroids**2).sum(1) - 2 * frames @ centroids.T
        assert np.abs(naive.min(1) / exact.min(1) - 1).max() > 2e-3  # the control


def test_batch_sizes_hardly_matter():
    frames, _ = mixture(4000, 8, 200, noise=0.5)
    found = [
        inertia(frames, fit(frames, KMeansConfig(num_clusters=30, batch_frames=n)).codebook().centroids_KF.numpy())
        for n in (200, 1000, 4000)
    ]
    assert max(found) / min(found) < 1.03


def stuck_start(frames: np.ndarray, num_clusters: int) -> KMeansState:
    """All centroids but one are where no frame is."""
    centroids = torch.full((num_clusters, frames.shape[1]), 1e3)
    centroids[0] = 0.0
    zeros = torch.zeros(num_clusters, dtype=torch.float64)
    return KMeansState(
        shift_F=torch.zeros(frames.shape[1]),
        centroids_KF=centroids,
        sums_KF=torch.zeros(num_clusters, frames.shape[1], dtype=torch.float64),
        counts_K=zeros,
        carried_K=zeros.clone(),
    )


def test_dead_clusters_are_revived():
    frames, _ = mixture(2000, 8, 10, noise=0.05)
    config = KMeansConfig(num_clusters=10, batch_frames=500)
    revived = fit(frames, config, state=stuck_start(frames, 10))
    labels, _ = revived.codebook().assign(torch.from_numpy(frames))
    assert len(labels.unique()) == 10
    assert revived.num_revived >= 9
    dead = fit(frames, replace(config, revive_below=0.0), state=stuck_start(frames, 10))
    labels, _ = dead.codebook().assign(torch.from_numpy(frames))
    assert len(labels.unique()) == 1  # the control


def test_a_memory_map_gives_the_bits_of_an_array(tmp_path):
    frames, _ = mixture(3000, 8, 50, noise=0.5)
    frames.tofile(tmp_path / "frames")
    mapped = np.memmap(tmp_path / "frames", dtype=np.float32, mode="r", shape=frames.shape)
    config = KMeansConfig(num_clusters=20, batch_frames=256, start_frames=700)
    expected = as_bytes(fit(frames, config))
    assert as_bytes(fit(mapped, config)) == expected
    assert as_bytes(fit(torch.from_numpy(frames), config)) == expected


def test_only_batches_are_read():
    """Bounded memory: never more rows at once than the sample or a batch has."""
    frames, _ = mixture(3000, 8, 50, noise=0.5)
    asked = []

    class Watched(np.ndarray):
        def __getitem__(self, key):
            asked.append(len(key))
            return np.asarray(self).__getitem__(key)

    fit(frames.view(Watched), KMeansConfig(num_clusters=20, batch_frames=256, start_frames=700))
    assert max(asked) == 700
    assert len(asked) > 12


@pytest.mark.parametrize("after", [1, 4, 5, 8])
def test_a_saved_run_continues_to_the_same_bits(tmp_path, after):
    frames, _ = mixture(1000, 8, 50, noise=0.5)
    config = KMeansConfig(num_clusters=20, batch_frames=200, max_epochs=4, tolerance=0.0)
    batches = 0

    class KilledError(Exception):
        pass

    def save_and_stop(state: KMeansState) -> None:
        nonlocal batches
        batches += 1
        if batches == after:
            state.save(tmp_path / "state.safetensors")
            raise KilledError

    whole = fit(frames, config)
    with pytest.raises(KilledError):
        fit(frames, config, on_batch=save_and_stop)
    continued = fit(frames, config, state=KMeansState.load(tmp_path / "state.safetensors"))
    assert as_bytes(continued) == as_bytes(whole)
    assert continued.history == whole.history
    forgetful = KMeansState.load(tmp_path / "state.safetensors")
    forgetful.sums_KF.zero_()
    assert as_bytes(fit(frames, config, state=forgetful)) != as_bytes(whole)  # the control


def test_another_file_is_no_state(tmp_path):
    from sslim.storage import save_tensors

    save_tensors(tmp_path / "other.safetensors", {"centroids": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="no state of a k-means run: it holds centroids"):
        KMeansState.load(tmp_path / "other.safetensors")


def test_inertia_is_within_a_hundredth_of_scikit_learn():
    from sklearn.cluster import MiniBatchKMeans

    frames, _ = mixture(8000, 16, 400, noise=0.6)
    ours = inertia(frames, fit(frames, KMeansConfig(num_clusters=40, batch_frames=1000)).codebook().centroids_KF.numpy())
    peer = MiniBatchKMeans(40, init="k-means++", n_init=1, batch_size=1000, random_state=0).fit(frames)
    assert ours <= 1.01 * inertia(frames, peer.cluster_centers_)
    barely = fit(frames, KMeansConfig(num_clusters=40, batch_frames=8000, max_epochs=1))  # the control
    assert inertia(frames, barely.codebook().centroids_KF.numpy()) > 1.01 * ours


def test_the_start_takes_a_frame_of_every_cluster():
    frames, component = mixture(4000, 32, 60, noise=0.02)
    rows = greedy_start(torch.from_numpy(frames), 60, np.random.default_rng(0))
    assert len(set(component[rows.numpy()].tolist())) == 60
    random = np.random.default_rng(0).choice(4000, 60, replace=False)
    assert len(set(component[random].tolist())) < 50  # the control


def test_drawing_for_several_centres_at_once_starts_as_well_as_one_by_one(monkeypatch):
    frames, _ = mixture(3000, 64, 300, noise=0.7)
    x = torch.from_numpy(frames)

    def start(picks: int, trials: int | None = None) -> float:
        monkeypatch.setattr("sslim.targets.kmeans.MAX_PICKS", picks)
        found = [frames[greedy_start(x, 100, np.random.default_rng(seed), trials=trials).numpy()] for seed in range(3)]
        return sum(inertia(frames, centres) for centres in found)

    one_by_one = start(1)
    assert start(8) < 1.01 * one_by_one
    assert start(1, trials=1) > 1.02 * one_by_one  # the control: k-means++ that is not greedy


def test_fewer_places_than_clusters_still_end():
    frames = np.repeat(np.eye(3, dtype=np.float32), 20, axis=0)
    state = fit(frames, KMeansConfig(num_clusters=5))
    labels, distances = state.codebook().assign(torch.from_numpy(frames))
    assert len(labels.unique()) == 3
    assert float(distances.max()) < 1e-6


def test_what_cannot_be_clustered_is_refused():
    frames, _ = mixture(100, 4, 10, noise=0.1)
    with pytest.raises(ValueError, match="101 clusters need at least as many frames; there are 100"):
        fit(frames, KMeansConfig(num_clusters=101))
    frames[50, 2] = np.nan
    with pytest.raises(ValueError, match="non-finite"):
        fit(frames, KMeansConfig(num_clusters=5))
    with pytest.raises(ValueError, match="non-finite"):  # seen only after the start
        fit(frames, KMeansConfig(num_clusters=5), state=stuck_start(frames, 5))
    with pytest.raises(ValueError, match=r"shape \(3, 5\); the codebook takes \(frames, 4\)"):
        Codebook(torch.randn(2, 4)).assign(torch.zeros(3, 5))


@pytest.mark.parametrize(
    "wrong", [{"num_clusters": 0}, {"max_epochs": 0}, {"seed": -1}, {"memory": 1.0}, {"revive_below": -0.1}]
)
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        KMeansConfig(**{"num_clusters": 5, **wrong})
