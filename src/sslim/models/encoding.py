"""Running a frozen model over many utterances: length-sorted batches, features or waveforms, one result for each utterance.

What an utterance gets does not depend on what it is batched with (``EncoderOutput`` is zero on padding and masked inside), so
the batches here are only a matter of speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sslim.audio import num_stacked_frames, read_audio
from sslim.batch import EncoderOutput, Padded
from sslim.data.corpus import Corpus
from sslim.data.feature_presets import preset_name
from sslim.frontends import SpectralFrontendConfig, StoredFeaturesConfig, build_frontend
from sslim.frontends.config import same_base_features
from sslim.models.speech import SpeechModel
from sslim.models.stacking import padded_to_stacks

DEFAULT_BATCH_S = 60.0  # seconds of padded audio; 13 layers of 768 channels at 20 ms are then 120 MB


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a model is to be run on.

    Attributes:
        lengths: (n,) base frames or samples of each utterance; estimates do (they only shape the batches).
        unit_s: Seconds of a base frame or sample.
        read: Position to its base features (T, F) or samples (S,), float32.
        is_waveform: Which of the two.
    """

    lengths: np.ndarray
    unit_s: float
    read: Callable[[int], Tensor]
    is_waveform: bool


def reads_stored_features(model: SpeechModel, corpus: Corpus) -> bool:
    """Whether the base features of ``corpus`` are those the model's front-end would compute."""
    stored, frontend = corpus.frontend_config, model.config.frontend
    return stored is not None and isinstance(frontend, SpectralFrontendConfig) and same_base_features(stored, frontend)


def check_computable(model: SpeechModel, corpus: Corpus) -> None:
    """Raises ValueError where a model's features were made elsewhere and are not those of the corpus: no sound gives them."""
    features = getattr(model.config.frontend, "features", None)
    if isinstance(features, StoredFeaturesConfig):
        held = "none" if corpus.frontend_config is None else preset_name(corpus.frontend_config) or "others"
        raise ValueError(
            f"this {model.config.family} model takes {features.name} features, which cannot be computed from sound, and corpus "
            f"{corpus.name} holds {held}: prepare one of stored {features.name} features"
        )


def give_features(model: SpeechModel, corpus: Corpus) -> None:
    """Gives a model without a front-end that of a corpus, so that it reads the features that the corpus is named for.

    A corpus stores what is below deltas and normalisation; the front-end adds these. A model with a front-end stays as it is.

    Raises:
        ValueError: The corpus has no features, or not of the width that the model takes.
    """
    if model.frontend is not None:
        return
    config, projection = corpus.frontend_config, model.config.projection
    held = 0 if config is None else build_frontend(replace(config, stack=1)).feature_dim
    if config is None or held != projection.feature_dim:
        raise ValueError(
            f"this {model.config.family} model takes {projection.feature_dim} features from outside, and corpus {corpus.name} "
            f"holds {held or 'no'} features for each frame"
        )
    bare = replace(config, normalization=replace(config.normalization, statistics=None))
    model.set_frontend(bare)
    if bare.normalization.kind == "global" and corpus.statistics is not None:
        mean, std, source = corpus.statistics
        model.set_statistics(torch.as_tensor(mean), torch.as_tensor(std), source=source)


def corpus_inputs(
    model: SpeechModel, corpus: Corpus, indices: Sequence[int] | np.ndarray, *, waveforms: bool = False
) -> Inputs:
    """Stored base features where they are the model's own, else waveforms at the model's sample rate.

    Args:
        model: Whose front-end decides.
        corpus: Where from.
        indices: (n,) utterances.
        waveforms: Read waveforms in any case.

    Raises:
        ValueError: The model has no front-end (:func:`give_features` gives it that of a corpus), or takes stored features that
            are not the corpus's.
    """
    indices = np.asarray(indices, dtype=np.int64)
    if model.frontend is None:
        raise ValueError(f"this {model.config.family} model has no front-end: nothing tells which features it takes")
    if not waveforms and reads_stored_features(model, corpus):

        def read_features(position: int) -> Tensor:
            return torch.from_numpy(np.asarray(corpus.features(int(indices[position])), dtype=np.float32))

        lengths = np.asarray(corpus.num_frames)[indices]
        return Inputs(lengths=lengths, unit_s=corpus.base_frame_shift_s, read=read_features, is_waveform=False)
    check_computable(model, corpus)
    rate = model.frontend.sample_rate

    def read_waveform(position: int) -> Tensor:
        index = int(indices[position])
        if rate == corpus.sample_rate:
            return torch.from_numpy(corpus.waveform(index))
        utterance = corpus.utterance(index)
        if utterance.audio is None:
            raise ValueError(f"{utterance.id} has stored features only, and they are not those of the model's front-end")
        span = {"start_s": utterance.start_s, "duration_s": utterance.duration_s}
        return torch.from_numpy(read_audio(utterance.audio, sample_rate=rate, **span))

    lengths = np.asarray(corpus.num_samples)[indices] * rate // corpus.sample_rate
    return Inputs(lengths=lengths, unit_s=1.0 / rate, read=read_waveform, is_waveform=True)


def length_batches(lengths: np.ndarray, max_padded: float) -> list[list[int]]:
    """Positions sorted by length, longest first, cut so that a batch's padded size stays within ``max_padded`` (or is one)."""
    batches: list[list[int]] = []
    for position in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > max_padded:
            batches.append([])
        batches[-1].append(position)
    return batches


def pad_batch(model: SpeechModel, values: Sequence[Tensor], *, is_waveform: bool) -> Padded:
    """Pads utterances on the model's device: samples (S,) to a batch of them, base features (T, F) to what the encoder takes.

    What a model without a front-end stacks is padded to whole stacks: no utterance gains or loses a frame by its batch.
    """
    device = next(model.parameters()).device
    lengths_B = torch.tensor([len(value) for value in values], device=device)
    padded = torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True).to(device)
    batch = Padded(values=padded, lengths=lengths_B)
    if is_waveform:
        return batch
    if model.frontend is None:
        return Padded(values=padded_to_stacks(padded, model.config.projection.stack), lengths=lengths_B)
    return model.frontend.finish(batch)


def run_batch(model: SpeechModel, values: Sequence[Tensor], *, is_waveform: bool, need_weights: bool = False) -> EncoderOutput:
    """Pads utterances, each (T, F) base features or (S,) samples, and encodes them on the model's device.

    Args:
        model: The model.
        values: The utterances.
        is_waveform: Which of the two they are.
        need_weights: Whether to return attention weights.
    """
    batch = pad_batch(model, values, is_waveform=is_waveform)
    encode = model.encode if is_waveform else model.encode_features
    return encode(batch.values, batch.lengths, need_weights=need_weights)


def _num_output_frames(model: SpeechModel, length: int, is_waveform: bool) -> int:
    if model.frontend is None:
        return num_stacked_frames(length, model.config.projection.stack, "pad")
    return model.frontend.num_frames(length) if is_waveform else model.frontend.num_stacked_frames(length)


def num_model_frames(model: SpeechModel, inputs: Inputs) -> np.ndarray:
    """Returns (n,) int64: the model's output frames for each utterance of ``inputs``."""
    return np.array([_num_output_frames(model, int(length), inputs.is_waveform) for length in inputs.lengths], dtype=np.int64)


def encode_utterances(
    model: SpeechModel,
    inputs: Inputs,
    *,
    batch_s: float = DEFAULT_BATCH_S,
    bf16: bool = False,
    on_error: Callable[[int, Exception], None] | None = None,
) -> Iterator[tuple[int, tuple[Tensor, ...], Tensor]]:
    """Runs a frozen model over ``inputs``.

    Args:
        model: In eval mode.
        inputs: What to run it on.
        batch_s: Seconds of padded audio in a batch.
        bf16: Whether to run under bf16 autocast; results are float32 all the same.
        on_error: Told the position and error of an utterance that cannot be read, which is left out; None lets it rise.

    Yields:
        Position, its N + 1 layers (T, D) and its final output (T, D), on the CPU; longest utterances first. T is 0 where the
        utterance is shorter than one frame.
    """
    assert not model.training
    device = next(model.parameters()).device
    for batch in length_batches(inputs.lengths, batch_s / inputs.unit_s):
        positions, values = [], []
        for position in batch:
            try:
                value = inputs.read(position)
            except (ValueError, OSError) as error:
                if on_error is None:
                    raise
                on_error(position, error)
                continue
            if _num_output_frames(model, len(value), inputs.is_waveform) < 1:
                encoder = model.config.encoder
                yield position, tuple(torch.zeros(0, dim) for dim in encoder.layer_dims), torch.zeros(0, encoder.dim)
                continue
            positions.append(position)
            values.append(value)
        if not values:
            continue
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            output = run_batch(model, values, is_waveform=inputs.is_waveform)
        for row, position in enumerate(positions):
            length = int(output.lengths[row])
            layers = tuple(layer[row, :length].float().cpu() for layer in output.layers)
            yield position, layers, output.final[row, :length].float().cpu()
