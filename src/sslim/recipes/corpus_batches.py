"""From a corpus to micro-batches for a model: which utterances, stored features or waveforms, seconds into stored units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sslim.config import OMIT_DEFAULT, to_plain
from sslim.data.batching import BatchingConfig, BatchPlan, CorpusBatches, FrameFacts
from sslim.data.corpus import Corpus
from sslim.data.feature_presets import preset_name
from sslim.data.labels import LabelStore
from sslim.data.noise import Noise, NoiseConfig
from sslim.data.sources import SPLIT_ROLES, split_role
from sslim.frontends import SpectralFrontendConfig
from sslim.models import SpeechModel
from sslim.models.encoding import check_computable, reads_stored_features


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which utterances are trained on and how they are put together.

    Attributes:
        batch_s: Seconds of audio in a micro-batch, padding included; None leaves it to ``max_utterances`` whole crops.
        max_utterances: Utterances in a micro-batch at most.
        crop_s: Longer utterances are cut to this, at a random place in every epoch; None keeps them whole.
        min_s: Shorter utterances are left out.
        max_s: Longer utterances are left out.
        train_splits: Splits to train on; None is all but those for development, validation and test (``dev``, ``test-clean``).
        valid_split: Split to validate on; None is dev or valid(ation) where there is one, else the first like ``dev-clean``.
        valid_share: Share of the training utterances held out for validation when no such split exists.
        split_seed: Decides which these are; None leaves it to the run's seed. Runs that follow one another with seeds of their
            own go on holding out the same ones.
        noise: Added to the waveforms that are trained on, never to those of validation; a model of fixed features then computes
            them from waveforms, too. Reconstruction restores the features of the clean sound.
    """

    batch_s: float | None = 60.0
    max_utterances: int | None = None
    crop_s: float | None = 15.0
    min_s: float = 0.0
    max_s: float | None = None
    train_splits: tuple[str, ...] | None = None
    valid_split: str | None = None
    valid_share: float = 0.02
    split_seed: int | None = field(default=None, metadata={OMIT_DEFAULT: True})
    noise: NoiseConfig | None = field(default=None, metadata={OMIT_DEFAULT: True})


def _chosen(corpus: Corpus, wanted: Callable[[str | None], bool]) -> np.ndarray:
    splits = corpus.column("split")
    return np.array([i for i, split in enumerate(splits) if wanted(split)], dtype=np.int64)


def utterance_seconds(corpus: Corpus) -> np.ndarray:
    """Returns (N,) the length of every utterance: its stored frames, or its samples where no features are stored."""
    return corpus.num_frames * corpus.base_frame_shift_s if corpus.base_dim else corpus.num_samples / corpus.sample_rate


def split_utterances(corpus: Corpus, data: DataConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the corpus indices to train and to validate on; validation may be empty.

    Raises:
        ValueError: A named split does not exist, or nothing is left to train on.
    """
    names = sorted({split for split in corpus.column("split") if split})
    for split in (*(data.train_splits or ()), *([data.valid_split] if data.valid_split else [])):
        if split not in names:
            raise ValueError(f"corpus {corpus.name} has no split {split!r}; it has {names or 'none'}")
    plain_first = sorted(names, key=lambda name: (name not in SPLIT_ROLES, name))
    valid_split = data.valid_split or next((name for name in plain_first if split_role(name) == "dev"), None)
    if data.train_splits is not None:
        train = _chosen(corpus, lambda split: split in data.train_splits)  # type: ignore[operator]
    else:
        train = _chosen(corpus, lambda split: split_role(split) not in ("dev", "test") and split != (valid_split or ""))
    if valid_split is not None:
        valid = _chosen(corpus, lambda split: split == valid_split)
    else:
        order = np.random.default_rng([seed if data.split_seed is None else data.split_seed, 1]).permutation(len(train))
        least = 1 if data.valid_share and len(train) >= 10 else 0
        held_out = np.sort(order[: max(least, int(data.valid_share * len(train)))])
        valid, train = train[held_out], np.delete(train, held_out)
    duration_s = utterance_seconds(corpus)
    keep = duration_s[train] > data.min_s
    if data.max_s is not None:
        keep &= duration_s[train] < data.max_s
    train = train[keep]
    if len(train) == 0:
        raise ValueError(
            f"no utterance of corpus {corpus.name} is left to train on: check splits, min_s {data.min_s} and max_s"
        )
    return train, valid


def frame_facts(corpus: Corpus, model: SpeechModel, *, waveforms: bool = False) -> FrameFacts:
    """Tells what a model reads from a corpus: its stored features where they are the model's own, else waveforms.

    Args:
        corpus: The corpus.
        model: Whose front-end decides.
        waveforms: Read waveforms in any case.

    Raises:
        ValueError: The model has no front-end, or it needs waveforms that the corpus does not have or has at another rate.
    """
    frontend = model.frontend
    if frontend is None:
        raise ValueError(f"this {model.config.family} model has no front-end: nothing tells which features it takes")
    if not waveforms and reads_stored_features(model, corpus):
        return FrameFacts.of_features(frontend)
    check_computable(model, corpus)
    if corpus.sample_rate != frontend.sample_rate:
        raise ValueError(
            f"corpus {corpus.name} was prepared at {corpus.sample_rate} Hz, the model reads waveforms at "
            f"{frontend.sample_rate} Hz: prepare it again at that rate"
        )
    if len(corpus) and corpus.utterance(0).audio is None:
        raise ValueError(
            f"corpus {corpus.name} holds features only, and the model needs waveforms ({_difference(corpus, model)}): "
            "prepare it from audio"
        )
    return FrameFacts.of_waveform(frontend)


def _difference(corpus: Corpus, model: SpeechModel) -> str:
    """Why stored features will not do."""
    config = model.config.frontend
    if not isinstance(config, SpectralFrontendConfig):
        return "its front-end is learnt"
    if corpus.frontend_config is None:
        return "no features are stored"
    stored, needed = to_plain(corpus.frontend_config.features), to_plain(config.features)
    if stored.get("kind") != needed.get("kind"):
        names = [preset_name(each) or each.features.kind for each in (corpus.frontend_config, config)]
        return f"its features are {names[0]}, the model's {names[1]}"
    if reads_stored_features(model, corpus):
        return "its target or the noise for it is made of waveforms"
    if stored == needed:
        has = "lack" if corpus.frontend_config.normalization.kind == "speaker" else "have"
        return f"its stored features {has} the mean of their speakers, unlike the model's"
    key = next(key for key in sorted(set(stored) | set(needed)) if stored.get(key) != needed.get(key))
    return f"its features have {key}={stored.get(key)!r}, the model's {key}={needed.get(key)!r}"


def _units(seconds: float, facts: FrameFacts) -> int:
    """Stored units in ``seconds``, a whole number of the model's frames."""
    return max(1, round(seconds / facts.unit_s / facts.hop)) * facts.hop


def _shortest(facts: FrameFacts) -> int:
    """Stored units that the first frame needs."""
    return next(units for units in range(1, round(1 / facts.unit_s) + facts.hop + 1) if facts.num_frames(units) >= 1)


def make_batches(
    corpus: Corpus,
    labels: LabelStore | None,
    utterances: np.ndarray,
    model: SpeechModel,
    data: DataConfig,
    seed: int,
    *,
    shuffle: bool,
    facts: FrameFacts | None = None,
) -> CorpusBatches:
    """Plans micro-batches over the chosen utterances, of stored features or of waveforms (see :func:`frame_facts`).

    Utterances shorter than one frame of the model are left out.

    Args:
        corpus: Where they come from.
        labels: Targets; None for objectives without.
        utterances: (U,) corpus indices.
        model: Whose front-end decides what is read.
        data: Lengths and sizes.
        seed: Decides every order and every cut.
        shuffle: False keeps one order for good (validation).
        facts: What is read, where it is not the model alone that decides.

    Raises:
        ValueError: The corpus does not hold what the model needs, or no utterance is as long as a frame, or the noise cannot
            be added.
    """
    facts = facts or frame_facts(corpus, model, waveforms=data.noise is not None)
    lengths = (corpus.num_samples if facts.is_waveform else corpus.num_frames)[utterances]
    crop = None if data.crop_s is None else _units(data.crop_s, facts)
    longest = int(lengths.max()) if crop is None else min(crop, int(lengths.max()))
    budget = longest * (data.max_utterances or 1) if data.batch_s is None else max(_units(data.batch_s, facts), longest)
    config = BatchingConfig(
        max_frames_per_batch=budget,
        max_utterances=data.max_utterances,
        max_length=crop,
        min_length=_shortest(facts),
        crop_multiple=facts.hop,
        shuffle=shuffle,
    )
    noise = None if data.noise is None or not shuffle else Noise(data.noise, corpus.sample_rate)
    plan = BatchPlan(lengths, config, seed=seed)
    return CorpusBatches(corpus, plan, facts, labels=labels, utterances=utterances, noise=noise)
