"""What is clustered: one vector for each frame of a corpus, from its front-end features or from a layer of a model.

Both kinds offer the same: how many frames each utterance has, a fixed division of utterances into batches, and the vectors of a
batch. Nothing an utterance gets depends on the batch it is in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sslim.audio import frames_of_seconds
from sslim.batch import Padded
from sslim.config import to_plain
from sslim.data.alignment import frame_length_s
from sslim.data.corpus import Corpus
from sslim.frontends import FilterbankConfig, NormalizationConfig, SpectralFrontendConfig, build_frontend
from sslim.models import SpeechModel
from sslim.models.encoding import corpus_inputs, give_features, length_batches, num_model_frames

BATCH_FRAMES = 20_000  # of front-end features: 6 MB for 80 of them
BATCH_S = 60.0  # of padded speech through a model: every layer of 768 channels at 20 ms is then 9 MB
MAX_PIECE_S = 60.0  # longer utterances go through a model in pieces; attention over an hour would need its square in work


class Vectors(Protocol):
    """One vector for each frame.

    Attributes:
        dim: Width F of a vector.
        frame_period_s: Seconds from one frame to the next.
        frame_length_s: Seconds that a frame sees, counted from the start of its period; None where that is not known.
        num_frames: (N,) int64 frames of each utterance, as told without reading it (resampling may be off by one).
        origin: What the vectors are, plain JSON values; equal for vectors that may share a codebook.
        statistics: Tensors that a codebook of these vectors needs beside it; a model has its own.
    """

    dim: int
    frame_period_s: float
    frame_length_s: float | None
    num_frames: np.ndarray
    origin: dict[str, Any]
    statistics: dict[str, Tensor]

    def batches(self, indices: np.ndarray) -> list[list[int]]:
        """Divides utterances into batches; a function of ``indices`` and the corpus only."""
        ...

    def read(self, batch: Sequence[int]) -> list[Tensor]:
        """Returns (T, F) float32 for each utterance of a batch.

        Raises:
            ValueError: An utterance cannot be read or has a non-finite value.
        """
        ...


def _checked(vectors: list[Tensor], corpus: Corpus, batch: Sequence[int]) -> list[Tensor]:
    for i, x_TF in zip(batch, vectors, strict=True):
        if not bool(torch.isfinite(x_TF).all()):
            raise ValueError(f"utterance {corpus.utterance(i).id} gives a non-finite value: leave it out of the corpus")
    return vectors


def _stack(corpus: Corpus, config: SpectralFrontendConfig, frame_period_s: float | None) -> int:
    if frame_period_s is None:
        return config.stack
    try:
        stack = frames_of_seconds(frame_period_s, corpus.base_frame_shift_s)
    except ValueError:
        stack = 0
    if stack < 1:
        raise ValueError(
            f"a frame period of {1000 * frame_period_s:g} ms is not a multiple of the {1000 * corpus.base_frame_shift_s:g} ms "
            f"between the features of corpus {corpus.name}"
        )
    return stack


def mfcc_config(config: SpectralFrontendConfig) -> SpectralFrontendConfig:
    """Returns 13 cepstra of a corpus's filterbank with two orders of deltas, normalised for each utterance.

    What HuBERT's first iteration clusters (Hsu et al. 2021, section III-B), here without speaker and channel as
    far as a mean and a standard deviation hold them.

    Raises:
        ValueError: The corpus does not hold log filterbank features.
    """
    if not isinstance(config.features, FilterbankConfig) or not config.features.log:
        raise ValueError(f"MFCC are made from log filterbank features; this corpus holds {config.features.kind}")
    return replace(config, cepstra=13, deltas=2, normalization=NormalizationConfig(kind="utterance"))


class FeatureVectors:
    """The corpus's features as a model would get them: deltas, normalisation, stacking. Implements :class:`Vectors`.

    Args:
        corpus: A corpus with features.
        config: What to make of them; None for the corpus's own description.
        frame_period_s: Frames are stacked to reach it; None for the corpus's own.
        statistics: mean, std and source to normalise with (a codebook's); None for those of the corpus.

    Raises:
        ValueError: The corpus has no features or no statistics, or the frame period is not a multiple of its own.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        config: SpectralFrontendConfig | None = None,
        frame_period_s: float | None = None,
        statistics: tuple[Tensor, Tensor, str] | None = None,
    ) -> None:
        config = corpus.frontend_config if config is None else config
        if config is None:
            raise ValueError(f"corpus {corpus.name} holds no features: cluster a layer of a model, or prepare it with features")
        self.corpus = corpus
        self._frontend = build_frontend(replace(config, stack=_stack(corpus, config, frame_period_s)))
        self.statistics: dict[str, Tensor] = {}
        if config.normalization.kind == "global":
            if statistics is None and corpus.statistics is not None:
                mean, std, source = corpus.statistics
                statistics = (torch.as_tensor(mean), torch.as_tensor(std), source)
            if statistics is None:
                raise ValueError(f"corpus {corpus.name} has no mean and standard deviation of its features: prepare it again")
            self._frontend.set_statistics(statistics[0], statistics[1], source=statistics[2])
            self.statistics = {"mean": statistics[0], "std": statistics[1]}
        self.dim = self._frontend.feature_dim
        self.frame_period_s = self._frontend.frame_shift_s
        self.frame_length_s: float | None = frame_length_s(self._frontend.config)
        self.num_frames = np.asarray(self._frontend.num_stacked_frames(corpus.num_frames), dtype=np.int64)  # type: ignore[arg-type]
        self.origin: dict[str, Any] = {"kind": "features", "frontend": to_plain(self._frontend.config)}

    def batches(self, indices: np.ndarray) -> list[list[int]]:
        batches: list[list[int]] = []
        held = 0
        for i in indices.tolist():
            if not batches or held + int(self.num_frames[i]) > BATCH_FRAMES:
                batches.append([])
                held = 0
            batches[-1].append(i)
            held += int(self.num_frames[i])
        return batches

    def read(self, batch: Sequence[int]) -> list[Tensor]:
        vectors = []
        for i in batch:
            base_TF = torch.from_numpy(np.asarray(self.corpus.features(i), dtype=np.float32))
            padded = Padded(values=base_TF[None], lengths=torch.tensor([len(base_TF)]))
            vectors.append(self._frontend.finish(padded).values[0])
        return _checked(vectors, self.corpus, batch)


def model_digest(model: SpeechModel) -> str:
    """Returns the SHA-256 of everything that a model's layers depend on: description, tensors, statistics; not its heads."""
    description = {key: value for key, value in to_plain(model.config).items() if key != "heads"}
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("heads."):
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {tuple(values.shape)} {values.dtype} ".encode())
            digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class LayerVectors:
    """A layer of a model over the corpus's features, or its audio where the features are not those of the model.

    Utterances longer than ``MAX_PIECE_S`` go through the encoder in equal pieces, without context from one to the next; their
    features are still computed in one. Implements :class:`Vectors`.

    Args:
        corpus: What to run the model on.
        model: In eval mode, on the device to use.
        layer: From 1; 0 is the input of the first block.
        frame_period_s: The model's, or None; another one is an error.

    Raises:
        ValueError: The layer or the frame period is not one of the model's, or the corpus has nothing it can be run on.
    """

    def __init__(self, corpus: Corpus, model: SpeechModel, layer: int, *, frame_period_s: float | None = None) -> None:
        if not 0 <= layer <= model.num_layers:
            raise ValueError(
                f"layer is {layer}; this model has layers 1 to {model.num_layers}, and 0 for the input of the first"
            )
        give_features(model, corpus)
        assert model.frontend is not None
        self.frame_period_s = model.frontend.frame_shift_s
        if frame_period_s is not None and abs(frame_period_s - self.frame_period_s) > 1e-6:
            raise ValueError(
                f"the model has a frame every {1000 * self.frame_period_s:g} ms, so its layers cannot be clustered every "
                f"{1000 * frame_period_s:g} ms"
            )
        self.corpus, self.model, self.layer, self.dim = corpus, model, layer, model.config.encoder.layer_dims[layer]
        self._inputs = corpus_inputs(model, corpus, np.arange(len(corpus)))
        self._require_statistics(corpus)
        self.num_frames = num_model_frames(model, self._inputs)
        self.frame_length_s: float | None = frame_length_s(model.frontend.config)
        self.origin: dict[str, Any] = {"kind": "model", "layer": layer, "model_digest": model_digest(model)}
        self.statistics: dict[str, Tensor] = {}  # the model has its own
        self._max_padded = max(1, round(BATCH_S / self.frame_period_s))
        self._max_piece = max(1, round(MAX_PIECE_S / self.frame_period_s))

    def _require_statistics(self, corpus: Corpus) -> None:
        """Found out before hours are spent, by a frame of nothing."""
        frontend = self.model.frontend
        if frontend is not None and frontend.base_dim and len(corpus):
            device = next(self.model.parameters()).device
            values = torch.zeros(1, frontend.stack, frontend.base_dim, device=device)
            frontend.finish(Padded(values=values, lengths=torch.tensor([frontend.stack], device=device)))

    def batches(self, indices: np.ndarray) -> list[list[int]]:
        lengths = np.minimum(self.num_frames[indices], self._max_piece)
        long = self.num_frames[indices] > self._max_piece
        alone = [[i] for i in indices[long].tolist()]
        return alone + [indices[~long][part].tolist() for part in length_batches(lengths[~long], self._max_padded)]

    def read(self, batch: Sequence[int]) -> list[Tensor]:
        with torch.inference_mode():
            finished = [self._finished(i) for i in batch]
            pieces = [piece for x_TF in finished for piece in self._pieces(x_TF)]
            encoded = self._encode(pieces)
        vectors = []
        for x_TF in finished:
            own = [encoded.pop(0) for _ in self._pieces(x_TF)]
            vectors.append(torch.cat(own) if own else torch.zeros(0, self.dim))
        return _checked(vectors, self.corpus, batch)

    def _finished(self, i: int) -> Tensor:
        """The encoder's input for one utterance, (T, F)."""
        frontend = self.model.frontend
        assert frontend is not None
        values = self._inputs.read(i).to(next(self.model.parameters()).device)
        lengths_1 = torch.tensor([len(values)], device=values.device)
        if self._inputs.is_waveform:
            if frontend.num_frames(len(values)) < 1:
                return values.new_zeros(0, frontend.feature_dim)
            return frontend(values[None], lengths_1).values[0]
        return frontend.finish(Padded(values=values[None], lengths=lengths_1)).values[0]

    def _pieces(self, x_TF: Tensor) -> list[Tensor]:
        number = -(-len(x_TF) // self._max_piece)
        return list(torch.tensor_split(x_TF, number)) if number else []

    def _encode(self, pieces: list[Tensor]) -> list[Tensor]:
        encoded: dict[int, Tensor] = {}
        for part in length_batches(np.array([len(piece) for piece in pieces], dtype=np.int64), self._max_padded):
            lengths_B = torch.tensor([len(pieces[p]) for p in part], device=pieces[0].device)
            padded = torch.nn.utils.rnn.pad_sequence([pieces[p] for p in part], batch_first=True)
            layer_BTD = self.model.encode_features(padded, lengths_B).layers[self.layer]
            for row, p in enumerate(part):
                encoded[p] = layer_BTD[row, : len(pieces[p])].float().cpu()
        return [encoded[p] for p in range(len(pieces))]
