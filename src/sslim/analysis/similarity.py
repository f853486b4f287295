"""Similarity of layers: linear CKA and canonical correlation, within a model and between two models, on the same frames.

All need nothing but covariances of channels, which are added up utterance by utterance: the result is that of all frames at
once, whatever the batches. With centred frames X (n, D) and Y (n, E):

- linear CKA   ``||X'Y||_F^2 / (||X'X||_F ||Y'Y||_F)`` (Kornblith et al. 2019, arXiv 1905.00414): 1 for equal frames up to
  rotation and scale; its value for unrelated frames is about sqrt(D E) / n, so let there be many more frames than channels;
- mean CCA     the mean of the canonical correlations, here over the directions that hold most of the variance (SVCCA, Raghu et
  al. 2017, arXiv 1706.05806): the rest is noise whose correlations would count as much as any;
- PWCCA        the mean weighted by how much of X each canonical direction carries (Morcos et al. 2018, arXiv 1806.05759), which
  is not the same from Y's side.

Frames of models with different frame periods are brought to the slower one's (``objectives/frame_alignment.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sslim.batch import Padded
from sslim.models.encoding import Inputs, run_batch
from sslim.models.speech import SpeechModel
from sslim.objectives.frame_alignment import align_frames, frame_period

KEPT_VARIANCE = 0.99
SMALLEST = 1e-10  # of the largest variance; directions below it are rounding


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Similarity of each layer of one model (rows) to each layer of another, or of the same one (columns), from 0.

    Attributes:
        cka: Linear CKA.
        cca: Mean canonical correlation over the kept directions.
        pwcca: Projection-weighted, from the row's side.
        num_frames: Frames that were compared.
    """

    cka: list[list[float]]
    cca: list[list[float]]
    pwcca: list[list[float]]
    num_frames: int


@dataclass(kw_only=True)
class LayerMoments:
    """Sums over frames from which covariances of all pairs of layers follow.

    Sums are of frames less the first utterance's mean, so that large means cost no digits; products are float32 within an
    utterance and added up in float64.

    Attributes:
        widths: Channels of each layer of the first and of the second model.
        is_same: Whether both are one model, whose frames are given once.
        num_frames: Frames so far.
    """

    widths: tuple[list[int], list[int]]
    is_same: bool = False
    num_frames: int = 0
    _shifts: list[Tensor] = field(default_factory=list)
    _sums: list[Tensor] = field(default_factory=list)
    _products: dict[tuple[int, int, int, int], Tensor] = field(default_factory=dict)

    def update(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Adds the frames of an utterance.

        Args:
            first: For each layer of the first model (T, D).
            second: For each layer of the second model (T, E); the same as ``first`` for one model.
        """
        models = [torch.cat(list(layers), dim=1).float() for layers in ((first,) if self.is_same else (first, second))]
        if not self._shifts:
            self._shifts = [frames.mean(0) for frames in models]
            self._sums = [torch.zeros(frames.shape[1], dtype=torch.float64) for frames in models]
        models = [frames - shift for frames, shift in zip(models, self._shifts, strict=True)]
        self.num_frames += len(models[0])
        for total, frames in zip(self._sums, models, strict=True):
            total += frames.double().sum(0)
        parts = [frames.split(widths, dim=1) for frames, widths in zip(models, self.widths[: len(models)], strict=True)]
        for key in self._pairs():
            product = parts[key[0]][key[1]].T @ parts[key[2]][key[3]]
            if key not in self._products:
                self._products[key] = torch.zeros(product.shape, dtype=torch.float64)
            self._products[key] += product

    def _pairs(self) -> Iterator[tuple[int, int, int, int]]:
        """Model and layer on either side: what is needed, each pair once."""
        counts = [len(widths) for widths in self.widths]
        if self.is_same:
            yield from ((0, i, 0, j) for i in range(counts[0]) for j in range(i, counts[0]))
            return
        yield from ((model, i, model, i) for model in (0, 1) for i in range(counts[model]))
        yield from ((0, i, 1, j) for i in range(counts[0]) for j in range(counts[1]))

    def covariance(self, one: tuple[int, int], other: tuple[int, int]) -> Tensor:
        """Returns (D, E) float64, the sum over frames of products of centred channels of two (model, layer)."""
        if self.is_same and one[1] > other[1]:
            return self.covariance(other, one).T
        sums = [self._sums[model].split(self.widths[model])[layer] for model, layer in (one, other)]
        return self._products[(*one, *other)] - torch.outer(*sums) / self.num_frames


def linear_cka(xx_DD: Tensor, xy_DE: Tensor, yy_EE: Tensor) -> float:
    """Returns linear CKA from covariances; 0 where a side never varies."""
    size = xx_DD.norm() * yy_EE.norm()
    return float(xy_DE.square().sum() / size) if size > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Whitening:
    """The directions of a layer that are kept.

    Attributes:
        whiten_DK: Frames to unit variance along each kept direction.
        carries_KD: Covariance of the whitened directions with the channels.
    """

    whiten_DK: Tensor
    carries_KD: Tensor


def whitening(xx_DD: Tensor, kept_variance: float = KEPT_VARIANCE) -> Whitening:
    """Keeps the directions of largest variance that together hold ``kept_variance`` of it, at least one.

    Args:
        xx_DD: Covariance (or any multiple of it).
        kept_variance: Share in (0, 1]; 1 keeps all that is more than rounding.

    Raises:
        ValueError: The share is not one, or the layer never varies.
    """
    if not 0 < kept_variance <= 1:
        raise ValueError(f"kept_variance is {kept_variance}; expected a share above 0 and up to 1")
    values, vectors = torch.linalg.eigh(xx_DD)
    values, vectors = values.flip(0), vectors.flip(1)
    if values[0] <= 0:
        raise ValueError("a layer has the same frame everywhere, so it correlates with nothing")
    enough = int((values.clamp(min=0).cumsum(0) < kept_variance * values.clamp(min=0).sum()).sum()) + 1
    count = min(enough, int((values > SMALLEST * values[0]).sum()))
    roots = values[:count].sqrt()
    return Whitening(whiten_DK=vectors[:, :count] / roots, carries_KD=(vectors[:, :count] * roots).T)


def canonical_correlations(x: Whitening, xy_DE: Tensor, y: Whitening) -> tuple[float, float, float]:
    """Returns the mean canonical correlation, and PWCCA from the side of x and of y."""
    left, values, right = torch.linalg.svd(x.whiten_DK.T @ xy_DE @ y.whiten_DK, full_matrices=False)
    values = values.clamp(0, 1)
    weights = [(left.T @ x.carries_KD).abs().sum(1), (right @ y.carries_KD).abs().sum(1)]
    return float(values.mean()), *(float((values * w).sum() / w.sum()) for w in weights)  # type: ignore[return-value]


def compare_layers(moments: LayerMoments, kept_variance: float = KEPT_VARIANCE) -> Similarity:
    """Compares every layer of the first model with every one of the second.

    Raises:
        ValueError: There are no frames, or a layer never varies.
    """
    if moments.num_frames < 2:
        raise ValueError(f"{moments.num_frames} frames cannot be compared; at least 2 are needed")
    counts = [len(widths) for widths in moments.widths]
    second = 0 if moments.is_same else 1
    own = {(m, i): moments.covariance((m, i), (m, i)) for m in {0, second} for i in range(counts[m])}
    white = {place: whitening(covariance, kept_variance) for place, covariance in own.items()}
    cka, cca, pwcca = ([[0.0] * counts[1] for _ in range(counts[0])] for _ in range(3))
    for i in range(counts[0]):
        for j in range(i if moments.is_same else 0, counts[1]):
            xy = moments.covariance((0, i), (second, j))
            cka[i][j] = linear_cka(own[0, i], xy, own[second, j])
            cca[i][j], pwcca[i][j], other_side = canonical_correlations(white[0, i], xy, white[second, j])
            if moments.is_same:
                cka[j][i], cca[j][i], pwcca[j][i] = cka[i][j], cca[i][j], other_side
    return Similarity(cka=cka, cca=cca, pwcca=pwcca, num_frames=moments.num_frames)


def measure_similarity(
    models: Sequence[SpeechModel],
    inputs: Sequence[Inputs],
    *,
    kept_variance: float = KEPT_VARIANCE,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Similarity:
    """Compares the layers of one model with each other, or those of two models.

    Args:
        models: One or two, in eval mode.
        inputs: The same utterances as each model reads them, of at least one frame.
        kept_variance: Share of a layer's variance that canonical correlation looks at.
        tell: Called with utterances done and in all.

    Raises:
        ValueError: Frame periods of which neither is a multiple of the other, or a layer never varies.
    """
    widths = [list(model.config.encoder.layer_dims) for model in models]
    moments = LayerMoments(widths=(widths[0], widths[-1]), is_same=len(models) == 1)
    join = _same if len(models) == 1 else _aligner(models[0], models[1])
    total = len(inputs[0].lengths)
    for position in range(total):
        layers = [_layers(model, given, position) for model, given in zip(models, inputs, strict=True)]
        moments.update(*join(layers[0], layers[-1]))
        tell(position + 1, total)
    return compare_layers(moments, kept_variance)


def _layers(model: SpeechModel, inputs: Inputs, position: int) -> list[Tensor]:
    """(T, D) for each layer, of one utterance."""
    with torch.inference_mode():
        output = run_batch(model, [inputs.read(position)], is_waveform=inputs.is_waveform)
    return [layer[0].float().cpu() for layer in output.layers]


Join = Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]


def _same(first: list[Tensor], second: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return first, second


def _aligner(first: SpeechModel, second: SpeechModel) -> Join:
    """Brings the faster model's frames to the slower one's, and leaves out frames that only one of them has."""
    if (first.frontend is None) != (second.frontend is None):
        raise ValueError("one of the two models takes features that sslim cannot compute: their frames cannot be aligned")
    slower_first = first.frontend is None or frame_period(first.frontend) >= frame_period(second.frontend)  # type: ignore[arg-type]
    slow, fast = (first, second) if slower_first else (second, first)
    alignment = align_frames(fast.frontend, slow.frontend)

    def join(first: list[Tensor], second: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        slow, fast = (first, second) if slower_first else (second, first)
        num_frames = len(slow[0])
        channels = torch.cat(fast, dim=1)[None]  # every channel is aligned for itself, and layers may differ in width
        padded = Padded(values=channels, lengths=torch.tensor([channels.shape[1]]))
        aligned, found = alignment(padded, torch.tensor([num_frames]), num_frames)
        split = aligned[0, found[0]].split([layer.shape[1] for layer in fast], dim=1)
        both = [layer[found[0]] for layer in slow], list(split)
        return both if slower_first else (both[1], both[0])

    return join
