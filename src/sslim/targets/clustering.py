"""Frame targets of a corpus by k-means on its features or on a layer of a model.

Three stages, each of bounded memory and continued when a killed run is repeated: vectors of a random sample of frames go to a
file; k-means makes a codebook of them; every frame of the corpus gets its nearest centroid. The result has the same bytes
whether it was interrupted or not (on the CPU with the same number of threads).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sslim.data.corpus import LABELS, Corpus
from sslim.data.labels import LabelStore, packed_type
from sslim.models import SpeechModel
from sslim.targets.journal import COMMIT_PERIOD_S, FRAMES, Journal, WorkLabels, only_one
from sslim.targets.kmeans import Codebook, KMeansConfig, KMeansState, fit
from sslim.targets.quality import label_quality
from sslim.targets.vectors import FeatureVectors, LayerVectors, Vectors, mfcc_config

OVERSAMPLING = 4  # a sampled utterance gives about every fourth frame, so the sample has four times the utterances
MAX_SAMPLE_FRAMES = 500_000  # 1,000 for each of 500 clusters; 1.5 GB on disk at 768 dimensions
SAMPLE = 3  # its random stream; k-means has others

OnProgress = Callable[[str, int, int], None]  # stage, batches done, batches in all


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Frames drawn.

    Attributes:
        utterances: (n,) int64, ascending.
        picks: Frames taken of each, ascending.
        first_rows: (n + 1,) where they go in the sample.
    """

    utterances: np.ndarray
    picks: list[np.ndarray]
    first_rows: np.ndarray

    @property
    def num_frames(self) -> int:
        return int(self.first_rows[-1])


def _draw(num_frames: np.ndarray, max_frames: int, seed: int) -> _Sample:
    """Draws utterances until they have enough frames, then frames of them; all frames where there are fewer than asked for."""
    if max_frames < 1:
        raise ValueError(f"max_sample_frames is {max_frames}; it must be at least 1")
    rng = np.random.default_rng([seed, SAMPLE])
    order = rng.permutation(len(num_frames))
    enough = np.cumsum(num_frames[order])
    chosen = np.sort(order[: int(np.searchsorted(enough, OVERSAMPLING * max_frames)) + 1])
    starts = np.concatenate([[0], np.cumsum(num_frames[chosen])])
    total = int(starts[-1])
    size = min(total, max_frames)
    flat = np.arange(total) if size == total else np.sort(rng.choice(total, size, replace=False))
    first_rows = np.searchsorted(flat, starts)
    picks = [flat[a:b] - start for a, b, start in zip(first_rows[:-1], first_rows[1:], starts[:-1], strict=True)]
    return _Sample(utterances=chosen, picks=picks, first_rows=first_rows)


def _gather(vectors: Vectors, sample: _Sample, journal: Journal, corpus: Corpus, on_progress: OnProgress) -> None:
    """Fills the file of the sample."""
    frames = journal.sample(sample.num_frames, vectors.dim)
    place = {int(i): n for n, i in enumerate(sample.utterances) if len(sample.picks[n])}
    batches = vectors.batches(np.array(list(place), dtype=np.int64))
    on_progress("sample", journal.batch, len(batches))
    for batch in batches[journal.batch :]:
        for i, x_TF in zip(batch, vectors.read(batch), strict=True):
            if len(x_TF) == 0:
                raise ValueError(f"utterance {corpus.utterance(i).id} gives no frames: leave it out of the corpus")
            n = place[i]
            picks = np.minimum(sample.picks[n], len(x_TF) - 1)  # resampling may have dropped the last one
            frames[sample.first_rows[n] : sample.first_rows[n + 1]] = x_TF[picks].numpy()
        journal.batch += 1
        if journal.is_due() or journal.batch == len(batches):
            frames.flush()
            journal.commit(journal.folder / FRAMES)
        on_progress("sample", journal.batch, len(batches))
    journal.enter("fit")


def _fit(
    vectors: Vectors, sample: _Sample, config: KMeansConfig, journal: Journal, device: str, on_progress: OnProgress
) -> KMeansState:
    """Makes the codebook, or reads it where that is done."""
    state = journal.kmeans_state(device) if journal.stage != "sample" else None
    if state is not None and state.done:
        return state
    num_batches = -(-sample.num_frames // config.batch_frames)

    def after_batch(state: KMeansState) -> None:
        if journal.is_due():
            journal.save_kmeans(state)
        on_progress("fit", state.epoch * num_batches + state.batch, config.max_epochs * num_batches)

    on_progress("fit", 0, config.max_epochs * num_batches)
    frames = journal.sample(sample.num_frames, vectors.dim)
    state = fit(frames, config, state=state, on_batch=after_batch, device=device)
    journal.save_kmeans(state)
    return state


def _label(
    corpus: Corpus, vectors: Vectors, codebook: Codebook, journal: Journal, device: str, on_progress: OnProgress
) -> WorkLabels:
    """Gives every frame of the corpus its nearest centroid."""
    kind = packed_type(codebook.num_clusters)
    if journal.stage != "label":
        journal.enter("label")
    journal.drop_sample()
    codebook = codebook.to(device)
    batches = vectors.batches(np.arange(len(corpus)))
    on_progress("label", journal.batch, len(batches))
    with journal.label_files(kind) as files:
        for batch in batches[journal.batch :]:
            for i, x_TF in zip(batch, vectors.read(batch), strict=True):
                labels_T, distances_T = codebook.assign(x_TF.to(device))
                files.add(i, labels_T.cpu().numpy(), float(distances_T.double().sum()))
            journal.batch += 1
            if journal.is_due() or journal.batch == len(batches):
                files.commit()
            on_progress("label", journal.batch, len(batches))
    return WorkLabels(journal.folder, kind, len(corpus))


def _write(
    corpus: Corpus, name: str, vectors: Vectors, codebook: Codebook, labels: WorkLabels, origin: dict[str, Any]
) -> LabelStore:
    quality = label_quality(
        corpus,
        labels.get,
        frame_period_s=vectors.frame_period_s,
        num_clusters=codebook.num_clusters,
        frame_length_s=vectors.frame_length_s,
        inertia=labels.inertia,
    )
    return LabelStore.write(
        corpus.path / LABELS / name,
        (labels.get(i) for i in range(len(corpus))),
        frame_period_s=vectors.frame_period_s,
        num_clusters=codebook.num_clusters,
        corpus_digest=corpus.digest,
        origin={**origin, "codebook_digest": codebook.digest},
        quality=quality,
        codebook={"centroids": codebook.centroids_KF.cpu(), **vectors.statistics},
    )


def label_folder(corpus: Corpus, name: str, *, overwrite: bool) -> Path:
    """Returns where labels of that name go.

    Raises:
        ValueError: The name is none, or is taken.
    """
    if not name or name.startswith(".") or Path(name).name != name:
        raise ValueError(f"{name!r} is no name for labels: use letters, digits and dashes")
    folder = corpus.path / LABELS / name
    if folder.exists() and not overwrite:
        raise ValueError(f"corpus {corpus.name} has labels {name!r} already: choose another name or pass --overwrite")
    return folder


def make_vectors(
    corpus: Corpus,
    model: SpeechModel | None = None,
    layer: int | None = None,
    *,
    mfcc: bool = False,
    frame_period_s: float | None = None,
    codebook: LabelStore | None = None,
) -> Vectors:
    """Returns the vectors that are clustered.

    Args:
        corpus: Whose frames.
        model: Whose layer; None for the corpus's features.
        layer: From 1; 0 is the input of the first block. Required with a model.
        mfcc: Whether to cluster MFCC made from the corpus's features, instead of these themselves.
        frame_period_s: Seconds from one frame to the next; None for that of the features or the model.
        codebook: Labels whose codebook will be applied; features are normalised like those it was made of.

    Raises:
        ValueError: These do not go together, or with the corpus.
    """
    if len(corpus) == 0:
        raise ValueError(f"corpus {corpus.name} holds no utterances, so there is nothing to cluster")
    if (model is None) != (layer is None):
        raise ValueError(
            f"a layer of a model needs both: {'a layer, but no model' if model is None else 'a model, but no layer'} is given"
        )
    if model is not None and layer is not None:
        return LayerVectors(corpus, model, layer, frame_period_s=frame_period_s)
    statistics, config = None, corpus.frontend_config
    if codebook is not None and codebook.origin.get("kind") == "features":
        mfcc = codebook.origin["frontend"].get("cepstra", 0) > 0
        tensors = codebook.codebook()
        if "mean" in tensors:
            source = codebook.origin["frontend"]["normalization"]["statistics"]
            statistics = (tensors["mean"], tensors["std"], source)
    if mfcc and config is not None:
        config = mfcc_config(config)
    return FeatureVectors(corpus, config=config, frame_period_s=frame_period_s, statistics=statistics)


def _ignore(stage: str, done: int, total: int) -> None:
    """Shows no progress."""


def cluster_corpus(
    corpus: Corpus,
    name: str,
    vectors: Vectors,
    kmeans: KMeansConfig,
    *,
    max_sample_frames: int = MAX_SAMPLE_FRAMES,
    notes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    commit_period_s: float = COMMIT_PERIOD_S,
    on_progress: OnProgress = _ignore,
) -> LabelStore:
    """Makes a codebook and labels every frame of a corpus with it.

    A run that was killed continues when it is repeated with the same arguments.

    Args:
        corpus: What to label.
        name: Of the labels; they are written to ``CORPUS/labels/NAME``.
        vectors: What is clustered, see :func:`make_vectors`.
        kmeans: How.
        max_sample_frames: Frames that k-means sees at most, drawn with its seed.
        notes: What else to record about their origin, plain JSON values; no influence on the result.
        overwrite: Replace labels of that name.
        device: Where to compute distances.
        commit_period_s: Seconds between the points from which a killed run continues.
        on_progress: Told the stage (``sample``, ``fit``, ``label``), how much of it is done and how much there is.

    Returns:
        The labels; ``origin`` and ``quality`` tell about them.

    Raises:
        ValueError: The name is taken, there are too few frames, an utterance cannot be read, or another process does this.
    """
    folder = label_folder(corpus, name, overwrite=overwrite)
    sample = _draw(vectors.num_frames, max_sample_frames, kmeans.seed)
    if sample.num_frames < kmeans.num_clusters:
        raise ValueError(f"{kmeans.num_clusters} clusters need at least as many frames; the sample has {sample.num_frames}")
    job = {
        "corpus_digest": corpus.digest,
        "vectors": vectors.origin,
        "frame_period_s": vectors.frame_period_s,
        "kmeans": asdict(kmeans),
        "max_sample_frames": max_sample_frames,
    }
    with only_one(folder.with_name(f".{name}.work")) as work:
        journal = Journal(work, job, commit_period_s)
        if journal.stage == "sample":
            _gather(vectors, sample, journal, corpus, on_progress)
        state = _fit(vectors, sample, kmeans, journal, device, on_progress)
        codebook = state.codebook()
        labels = _label(corpus, vectors, codebook, journal, device, on_progress)
        made = {"seed": kmeans.seed, "sample_frames": sample.num_frames, "epochs": state.epoch, "revived": state.num_revived}
        store = _write(corpus, name, vectors, codebook, labels, {**vectors.origin, **made, **(notes or {})})
        journal.remove()
    return store


def _check_codebook(source: LabelStore, vectors: Vectors) -> None:
    """Refuses vectors that are not what the codebook was made of."""
    made_of = {key: source.origin.get(key) for key in vectors.origin}
    if made_of != vectors.origin:
        key = next(key for key, value in vectors.origin.items() if source.origin.get(key) != value)
        have = {"kind": "kind of vectors", "model_digest": "model", "frontend": "front-end"}.get(key, key)
        raise ValueError(f"the codebook of {source.folder} was made with another {have} than this: they must be the same")
    if abs(source.frame_period_s - vectors.frame_period_s) > 1e-6:
        raise ValueError(
            f"the codebook of {source.folder} is for frames of {1000 * source.frame_period_s:g} ms, "
            f"not {1000 * vectors.frame_period_s:g} ms"
        )


def apply_codebook(
    corpus: Corpus,
    name: str,
    vectors: Vectors,
    source: LabelStore,
    *,
    notes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    commit_period_s: float = COMMIT_PERIOD_S,
    on_progress: OnProgress = _ignore,
) -> LabelStore:
    """Labels every frame of a corpus with the codebook of other labels, for example a development set like the training set.

    Args:
        corpus: What to label.
        name: Of the new labels.
        vectors: From :func:`make_vectors` with ``codebook=source``.
        source: Labels made by :func:`cluster_corpus`.
        notes: As for :func:`cluster_corpus`.
        overwrite: Likewise.
        device: Likewise.
        commit_period_s: Likewise.
        on_progress: Likewise.

    Raises:
        ValueError: The vectors are not what the codebook was made of; otherwise as for :func:`cluster_corpus`.
    """
    folder = label_folder(corpus, name, overwrite=overwrite)
    codebook = Codebook(source.codebook()["centroids"])
    _check_codebook(source, vectors)
    job = {"corpus_digest": corpus.digest, "vectors": vectors.origin, "codebook_digest": codebook.digest}
    with only_one(folder.with_name(f".{name}.work")) as work:
        journal = Journal(work, job, commit_period_s)
        labels = _label(corpus, vectors, codebook, journal, device, on_progress)
        inherited: dict[str, Any] = {
            key: source.origin[key] for key in ("seed", "sample_frames", "epochs", "revived") if key in source.origin
        }
        taken = {"codebook_from": source.name, "codebook_corpus_digest": source.corpus_digest}
        store = _write(corpus, name, vectors, codebook, labels, {**vectors.origin, **inherited, **taken, **(notes or {})})
        journal.remove()
    return store
