"""Features as rows of a table: the corpus's own (log-Mel), and any others by name.

They are what a model has to beat. Global normalisation is left out, since the probe standardises every channel anyway. So is
normalisation by utterance where features are pooled: the mean of mean-normalised features is nothing but zeros (S3PRL's issue
275: 0.5 % of the keywords of SUPERB).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sslim.audio import read_audio
from sslim.batch import Padded
from sslim.data.alignment import frame_length_s
from sslim.data.corpus import Corpus
from sslim.data.feature_presets import feature_preset, preset_name
from sslim.frontends import FilterbankConfig, NormalizationConfig, SpectralFrontendConfig, StftConfig, build_frontend
from sslim.frontends.config import StoredFeaturesConfig, same_base_features
from sslim.probes.features import Representation

LOG_MEL = "log-Mel"


def log_mel_representation(corpus: Corpus, *, pooled: bool, stack: int = 1) -> Representation:
    """The corpus's own features as one layer; features are computed with Kaldi's defaults where it stores none.

    Args:
        corpus: Where from.
        pooled: Whether utterances will be pooled.
        stack: Base frames in a frame, so that frames are those of the model in the same table; 1 when pooled.
    """
    config = corpus.frontend_config or SpectralFrontendConfig(features=FilterbankConfig(sample_rate=corpus.sample_rate))
    return features_representation(corpus, config, own_name(config), pooled=pooled, stack=stack)


def own_name(config: SpectralFrontendConfig) -> str:
    """Returns what the row of a corpus's own features is called: ``log-Mel`` where they are that, else their name or kind."""
    features = config.features
    is_mel = isinstance(features, FilterbankConfig) or (isinstance(features, StftConfig) and features.num_mel_bins > 0)
    if is_mel and not config.cepstra:
        return LOG_MEL
    name = preset_name(config)
    return features.kind if name is None else name.partition("@")[0]


def named_representation(corpus: Corpus, name: str, *, pooled: bool, frame_shift_s: float | None = None) -> Representation:
    """Features that have a name, as one layer: stored ones where the corpus has these, else computed from its audio.

    Args:
        corpus: Where from.
        name: As ``sslim prepare --features`` takes it, see ``sslim.data.feature_presets``.
        pooled: Whether utterances will be pooled.
        frame_shift_s: Seconds from one frame to the next that other rows have: a whole number of frames is stacked to match.

    Raises:
        ValueError: There is no such name, it stands for waveforms, or for features that must be stored and are not.
    """
    config = feature_preset(name)
    if config is None:
        raise ValueError(f"{name} is no baseline: it stands for samples, and a probe needs frames")
    if isinstance(config.features, StoredFeaturesConfig) and not _is_stored(corpus, config):
        raise ValueError(f"{name} cannot be computed from audio, and corpus {corpus.name!r} holds other features")
    shift_s = build_frontend(replace(config, stack=1)).frame_shift_s
    stack = round(frame_shift_s / shift_s) if frame_shift_s else 1
    matches = frame_shift_s is not None and abs(stack * shift_s - frame_shift_s) < 1e-6
    return features_representation(corpus, config, name, pooled=pooled, stack=stack if matches else 1)


def _is_stored(corpus: Corpus, config: SpectralFrontendConfig) -> bool:
    stored = corpus.frontend_config
    return stored is not None and corpus.base_dim > 0 and same_base_features(stored, config)


def features_representation(
    corpus: Corpus, config: SpectralFrontendConfig, name: str, *, pooled: bool, stack: int = 1
) -> Representation:
    """Features of any spectral front-end as one layer.

    Args:
        corpus: Where from; its stored features are taken where they are the front-end's own.
        config: The front-end; its stacking does not count.
        name: For the table.
        pooled: Whether utterances will be pooled: then normalisation by utterance and stacking are left out.
        stack: Base frames in a frame.
    """
    kind = config.normalization.kind
    dropped = kind == "global" or (pooled and kind == "utterance")
    normalization = NormalizationConfig() if dropped else config.normalization
    config = replace(config, normalization=normalization, stack=1 if pooled else stack)
    frontend = build_frontend(config)
    is_stored = _is_stored(corpus, config)

    def base(index: int) -> Padded:
        if is_stored:
            values = torch.from_numpy(np.asarray(corpus.features(index), dtype=np.float32))
            return Padded(values=values[None], lengths=torch.tensor([len(values)]))
        samples = torch.from_numpy(waveform_at(corpus, index, frontend.sample_rate))
        return frontend.base_features(samples[None], torch.tensor([len(samples)]))

    def layers_of(indices: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        for position, index in enumerate(indices.tolist()):
            with torch.inference_mode():
                yield position, frontend.finish(base(index)).values

    def num_frames(indices: np.ndarray) -> np.ndarray:
        if is_stored:
            return np.array([frontend.num_stacked_frames(n) for n in corpus.num_frames[indices].tolist()], dtype=np.int64)
        num_samples = corpus.num_samples[indices] * frontend.sample_rate // corpus.sample_rate
        return np.array([frontend.num_frames(n) for n in num_samples.tolist()], dtype=np.int64)

    return Representation(
        name=name,
        kind="features",
        num_layers=1,
        frame_shift_s=frontend.frame_shift_s,
        frame_length_s=frame_length_s(config),
        num_parameters=0,
        num_frames=num_frames,
        layers_of=layers_of,
    )


def waveform_at(corpus: Corpus, index: int, sample_rate: int) -> np.ndarray:
    """Returns the sound of an utterance (S,) float32 at a sample rate of choice.

    Raises:
        ValueError: There is no audio.
    """
    if sample_rate == corpus.sample_rate:
        return corpus.waveform(index)
    utterance = corpus.utterance(index)
    if utterance.audio is None:
        raise ValueError(f"utterance {utterance.id} of corpus {corpus.name} has features only, no audio")
    return read_audio(utterance.audio, sample_rate=sample_rate, start_s=utterance.start_s, duration_s=utterance.duration_s)
