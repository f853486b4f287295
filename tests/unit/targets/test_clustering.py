"""Clustering a corpus: what is labelled, how often it can be killed, and whose codebook it is."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from sslim.data.alignment import frame_symbols
from sslim.data.corpus import Corpus
from sslim.data.labels import LabelStore
from sslim.targets import KMeansConfig, apply_codebook, cluster_corpus, make_vectors, phone_measures
from sslim.targets.clustering import _draw
from sslim.targets.journal import only_one

KMEANS = KMeansConfig(num_clusters=12)


def stacked(corpus: Corpus, i: int, mean: np.ndarray, std: np.ndarray, stack: int = 2) -> np.ndarray:
    """Normalised and stacked features by hand."""
    x = (corpus.features(i).astype(np.float64) - mean) / std
    x = np.concatenate([x, np.zeros((-len(x) % stack, x.shape[1]))])
    return x.reshape(-1, stack * x.shape[1])


def nearest(x: np.ndarray, centroids: torch.Tensor) -> np.ndarray:
    return ((x[:, None] - centroids.numpy().astype(np.float64)[None]) ** 2).sum(2).argmin(1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("stack", [1, 2])
def test_every_frame_gets_the_nearest_centroid_of_normalised_features(corpus, stack):
    store = cluster_corpus(corpus, "k", make_vectors(corpus, frame_period_s=0.01 * stack), KMEANS)
    mean, std, _ = corpus.statistics
    assert store.frame_period_s == pytest.approx(0.01 * stack)
    for i in range(len(corpus)):
        expected = nearest(stacked(corpus, i, mean, std, stack), store.codebook()["centroids"])
        np.testing.assert_array_equal(store.get(i), expected)
    assert corpus.labels("k").digest == store.digest
    assert store.corpus_digest == corpus.digest
    assert [path.name for path in store.folder.parent.iterdir()] == ["k"]  # nothing is left of the work


def test_quality_is_that_of_the_labels(corpus):
    store = cluster_corpus(corpus, "k", make_vectors(corpus), KMEANS)
    phones, labels, runs = [], [], 0
    for i in range(len(corpus)):
        own = store.get(i)
        phones += frame_symbols(corpus.utterance(i).alignment, len(own), 0.01, 0.025)
        labels += own.tolist()
        runs += 1 + int((own[1:] != own[:-1]).sum())
    names = sorted(set(phones) - {None})
    joint = np.zeros((len(names), 12), dtype=int)
    for phone, label in zip(phones, labels, strict=True):
        if phone is not None:
            joint[names.index(phone), label] += 1
    expected = phone_measures(joint)
    assert {name: store.quality[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert store.quality["pnmi"] > 0.8  # three tones are easy
    assert store.quality["num_phones"] == 3
    assert store.quality["occupied_clusters"] == len(set(labels))
    assert store.quality["mean_run_s"] == pytest.approx(0.01 * len(labels) / runs, abs=1e-4)
    mean, std, _ = corpus.statistics
    x = np.concatenate([stacked(corpus, i, mean, std, 1) for i in range(len(corpus))])
    distances = ((x - store.codebook()["centroids"].numpy()[labels]) ** 2).sum(1)
    assert store.quality["inertia_per_frame"] == pytest.approx(distances.mean(), rel=1e-4)


def test_equal_seeds_give_equal_bytes(corpus):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cluster_corpus(corpus, name, make_vectors(corpus), KMeansConfig(num_clusters=12, seed=seed), max_sample_frames=200)
    first, second, third = (contents(corpus.path / "labels" / name) for name in "abc")
    assert first == second
    assert first["labels.safetensors"] != third["labels.safetensors"]


def test_the_sample_is_random_frames_of_random_utterances():
    num_frames = np.random.default_rng(0).integers(0, 50, 400)
    sample = _draw(num_frames, 500, 0)
    picked = [(i, t) for i, picks in zip(sample.utterances, sample.picks, strict=True) for t in picks]
    assert len(picked) == len(set(picked)) == sample.num_frames == 500
    assert all(0 <= t < num_frames[i] for i, t in picked)
    assert np.diff(sample.first_rows).tolist() == [len(picks) for picks in sample.picks]
    assert 60 < len(sample.utterances) < 110  # 2,000 frames of about 25 each
    assert 0.4 < np.mean([t / num_frames[i] for i, t in picked]) < 0.6
    everything = _draw(num_frames, 10**6, 0)
    assert everything.num_frames == num_frames.sum()
    assert [len(picks) for picks in everything.picks] == num_frames.tolist()


KILLED_AT = [("sample", 1), ("sample", 3), ("fit", 2), ("fit", 7), ("label", 0), ("label", 2)]

# Each attempt is a process of its own that kills itself in the middle; forked, so that torch is imported once.
ATTEMPTS = """
    import os, signal, sys
    import torch
    torch.set_num_threads(1)
    from sslim.data.corpus import Corpus
    from sslim.targets import KMeansConfig, cluster_corpus, make_vectors, vectors
    vectors.BATCH_FRAMES = 200

    def attempt(corpus, kill_at):
        def watch(stage, done, total):
            if (stage, done) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        cluster_corpus(corpus, "k", make_vectors(corpus), KMeansConfig(num_clusters=12, batch_frames=100, max_epochs=3),
                       commit_period_s=0.0, on_progress=watch)

    for stage, done in KILLED_AT:
        child = os.fork()
        if not child:
            attempt(Corpus.open(sys.argv[1]), (stage, done))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, (stage, done)
"""


def test_killed_at_any_stage_it_continues_to_the_same_bytes(corpus, tmp_path, monkeypatch):
    script = textwrap.dedent(ATTEMPTS).replace("KILLED_AT", repr(KILLED_AT))
    subprocess.run([sys.executable, "-c", script, str(corpus.path)], check=True)
    assert not (corpus.path / "labels" / "k").exists()
    assert corpus.label_names() == []
    monkeypatch.setattr("sslim.targets.vectors.BATCH_FRAMES", 200)
    config = KMeansConfig(num_clusters=12, batch_frames=100, max_epochs=3)
    seen: list[tuple[str, int]] = []
    vectors = make_vectors(corpus)
    continued = cluster_corpus(corpus, "k", vectors, config, on_progress=lambda stage, done, total: seen.append((stage, done)))
    whole = cluster_corpus(corpus, "whole", vectors, config)
    assert contents(continued.folder) == contents(whole.folder)
    assert seen[0] == ("label", 2)  # the control: it did continue


def test_another_job_does_not_continue_what_was_left(corpus, monkeypatch):
    monkeypatch.setattr("sslim.targets.vectors.BATCH_FRAMES", 200)

    class StoppedError(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "label":
            raise StoppedError

    with pytest.raises(StoppedError):
        cluster_corpus(corpus, "k", make_vectors(corpus), KMEANS, commit_period_s=0.0, on_progress=stop)
    other = KMeansConfig(num_clusters=12, seed=5)
    store = cluster_corpus(corpus, "k", make_vectors(corpus), other)
    assert contents(store.folder) == contents(cluster_corpus(corpus, "fresh", make_vectors(corpus), other).folder)


def test_two_processes_do_not_write_the_same_labels(corpus):
    with only_one(corpus.path / "labels" / ".k.work"), pytest.raises(ValueError, match="another process is writing"):
        cluster_corpus(corpus, "k", make_vectors(corpus), KMEANS)


def test_a_codebook_brings_its_own_statistics(corpus, other_corpus):
    source = cluster_corpus(corpus, "k", make_vectors(corpus), KMEANS)
    same = apply_codebook(corpus, "again", make_vectors(corpus, codebook=source), source)
    for i in range(len(corpus)):
        np.testing.assert_array_equal(same.get(i), source.get(i))
    applied = apply_codebook(other_corpus, "k", make_vectors(other_corpus, codebook=source), source)
    mean, std, _ = corpus.statistics
    own_mean, own_std, _ = other_corpus.statistics
    differing = 0
    for i in range(len(other_corpus)):
        centroids = source.codebook()["centroids"]
        np.testing.assert_array_equal(applied.get(i), nearest(stacked(other_corpus, i, mean, std, 1), centroids))
        differing += int((applied.get(i) != nearest(stacked(other_corpus, i, own_mean, own_std, 1), centroids)).sum())
    assert differing > 0  # the control
    assert applied.origin["codebook_digest"] == source.origin["codebook_digest"]
    assert applied.origin["codebook_from"] == "k"
    third = apply_codebook(corpus, "back", make_vectors(corpus, codebook=applied), applied)  # a copy serves as well
    np.testing.assert_array_equal(third.get(0), source.get(0))


def test_a_codebook_of_other_vectors_is_refused(corpus, model):
    features = cluster_corpus(corpus, "k", make_vectors(corpus), KMEANS)
    layer = cluster_corpus(corpus, "l", make_vectors(corpus, model, 1), KMEANS)

    def refused(match: str, source: LabelStore, *arguments, **options) -> None:
        with pytest.raises(ValueError, match=match):
            apply_codebook(corpus, "new", make_vectors(corpus, *arguments, codebook=source, **options), source)

    refused("another kind of vectors", features, model, 1)
    refused("another kind of vectors", layer)
    refused("another layer", layer, model, 2)
    refused("another front-end", features, frame_period_s=0.02)
    with torch.no_grad():
        next(model.projection.parameters())[0, 0] += 1e-3
    refused("another model", layer, model, 1)


def test_names_that_are_taken_or_no_names(corpus):
    cluster_corpus(corpus, "k", make_vectors(corpus), KMEANS)
    with pytest.raises(ValueError, match="has labels 'k' already"):
        cluster_corpus(corpus, "k", make_vectors(corpus), KMEANS)
    replaced = cluster_corpus(corpus, "k", make_vectors(corpus), KMeansConfig(num_clusters=5), overwrite=True)
    assert corpus.labels("k").num_clusters == replaced.num_clusters == 5
    for wrong in ("", ".hidden", "a/b", "../k"):
        with pytest.raises(ValueError, match="is no name for labels"):
            cluster_corpus(corpus, wrong, make_vectors(corpus), KMEANS)


def test_too_few_frames_and_no_statistics(corpus, waveforms):
    with pytest.raises(ValueError, match="60 clusters need at least as many frames; the sample has 50"):
        cluster_corpus(corpus, "k", make_vectors(corpus), KMeansConfig(num_clusters=60), max_sample_frames=50)
    with pytest.raises(ValueError, match="max_sample_frames is 0"):
        cluster_corpus(corpus, "k", make_vectors(corpus), KMEANS, max_sample_frames=0)
    with pytest.raises(ValueError, match="holds no features: cluster a layer of a model"):
        make_vectors(waveforms)
    with pytest.raises(ValueError, match="15 ms is not a multiple of the 10 ms"):
        make_vectors(corpus, frame_period_s=0.015)
    corpus.statistics = None
    with pytest.raises(ValueError, match="has no mean and standard deviation"):
        make_vectors(corpus)
