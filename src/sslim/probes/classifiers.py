"""Linear and one-hidden-layer classifiers over a learned mix of frozen layers, and the ways to train them.

The mix is SUPERB's weighted sum (Yang et al., "SUPERB: speech processing universal performance benchmark", arXiv 2105.01051,
section 3): one softmax weight for each layer, shared by all channels. Each layer is first standardised, per channel, with the
mean and standard deviation of the training examples, so that a loud layer does not win for being loud.

A classifier of frames may see the frames around each one too (``context``): they are laid end to end, earliest first, and the
utterance's first and last frame stand in for those beyond its ends. S3PRL's ``phone_concat`` has the same nine frames, latest
first, which is the same classifier with its weights in another order.

Two solvers, one rule: few examples and a linear classifier are fitted by full-batch L-BFGS along a path of weight decays from
strong to weak, each starting where the last one ended; everything else by AdamW on mini-batches. Both yield one classifier
for each setting; ``sslim.probes.selection`` chooses among them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

FULL_BATCH_EXAMPLES = 20_000  # 13 layers of 1,536 channels are then 1.6 GB, and an evaluation half a second
FULL_BATCH_BYTES = 2 * 2**30
SCORING_BATCH = 8192


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """How a classifier is fitted; the values in tuples are tried and one is chosen on dev.

    Attributes:
        hidden_dim: Width of the hidden layer (ReLU); None for a linear classifier.
        weight_decays: For L-BFGS: factors on half the squared weights beside the mean cross-entropy. 1 / (N C) in
            scikit-learn's terms.
        max_iterations: For L-BFGS: at most so many for each weight decay.
        learning_rates: For AdamW.
        batch_size: For AdamW, examples.
        max_epochs: For AdamW; the best epoch is chosen on dev.
        patience: For AdamW: epochs without a better dev accuracy before it stops.
        decoupled_weight_decay: For AdamW.
    """

    hidden_dim: int | None = None
    weight_decays: tuple[float, ...] = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
    max_iterations: int = 30
    learning_rates: tuple[float, ...] = (1e-2, 2e-3)
    batch_size: int = 256
    max_epochs: int = 40
    patience: int = 5
    decoupled_weight_decay: float = 1e-2


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Chosen rows of stored features with their classes.

    Attributes:
        x_LNP: (L, N, P) features of every stored example, layer first: a mix is then one product over contiguous memory, seven
            times faster on a CPU than layer last. Any float type; may lie in a memory-mapped file.
        y_N: (N,) int64 classes.
        rows: (n,) int64 which of the N are meant.
        offsets: (U + 1,) int64 where each utterance's rows begin, and N; needed for ``context`` and for what goes by utterance.
        context: Frames on either side of each one that belong to its example.
        num_frames_U: (U,) int64 frames of each stored utterance; needed where utterances are ordered by their length.
    """

    x_LNP: Tensor
    y_N: Tensor
    rows: Tensor
    offsets: Tensor | None = None
    context: int = 0
    num_frames_U: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        """Channels of an example, its context included."""
        return self.x_LNP.shape[-1] * (2 * self.context + 1)

    def batch(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ((L, n, width) float32, (n,)) of the examples at ``positions`` of ``rows``."""
        rows = self.rows[positions]
        if not self.context:
            return self.x_LNP[:, rows].float(), self.y_N[rows]
        assert self.offsets is not None
        around_NC = neighbours(rows, self.offsets, self.context)
        return self.x_LNP[:, around_NC].flatten(2).float(), self.y_N[rows]

    def batches(self, size: int = SCORING_BATCH) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them in order."""
        for positions in torch.arange(len(self)).split(max(1, size // (2 * self.context + 1))):
            yield self.batch(positions)

    def by_utterance(self) -> tuple[list[Tensor], list[int]]:
        """Returns the positions of each utterance's examples, in order, and its frames; utterances without any are left out."""
        assert self.offsets is not None
        assert self.num_frames_U is not None
        numbers = torch.searchsorted(self.offsets, self.rows, right=True) - 1
        present, counts = torch.unique_consecutive(numbers, return_counts=True)
        return list(torch.arange(len(self)).split(counts.tolist())), self.num_frames_U[present].tolist()


def neighbours(rows: Tensor, offsets: Tensor, context: int) -> Tensor:
    """Returns (n, 2 context + 1) rows around each of ``rows``, earliest first, that stay within their utterances.

    Args:
        rows: (n,) int64.
        offsets: (U + 1,) int64 where each utterance's rows begin, and where the last one ends.
        context: Frames on either side; the first and the last frame of an utterance are repeated beyond its ends.
    """
    utterance = torch.searchsorted(offsets, rows, right=True)
    steps = torch.arange(-context, context + 1, device=rows.device)
    around_NC = torch.maximum(rows[:, None] + steps, offsets[utterance - 1][:, None])
    return torch.minimum(around_NC, offsets[utterance][:, None] - 1)


Setting = tuple[str, float, int]  # what was varied, its value, and after how many epochs (0: run to convergence)


class ProbeClassifier(nn.Module):
    """Standardisation, layer mix, classifier.

    Attributes:
        mean_LP: (L, P) of the training examples.
        scale_LP: (L, P) one over their standard deviation; zero where a channel is constant.
        mix_L: (L,) logits of the layer weights.
    """

    mean_LP: Tensor
    scale_LP: Tensor

    def __init__(self, mean_LP: Tensor, scale_LP: Tensor, num_classes: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        num_layers, width = mean_LP.shape
        self.register_buffer("mean_LP", mean_LP)
        self.register_buffer("scale_LP", scale_LP)
        self.mix_L = nn.Parameter(torch.zeros(num_layers))
        self.hidden = None if hidden_dim is None else nn.Linear(width, hidden_dim)
        self.output = nn.Linear(hidden_dim or width, num_classes)

    def initialize(self, generator: torch.Generator) -> ProbeClassifier:
        """Uniform mix; a linear classifier starts near zero, a hidden layer as He et al. 2015; biases zero."""
        with torch.no_grad():
            self.mix_L.zero_()
            if self.hidden is not None:
                nn.init.normal_(self.hidden.weight, 0.0, (2.0 / self.hidden.in_features) ** 0.5, generator=generator)
                nn.init.zeros_(self.hidden.bias)
            std = 0.01 * self.output.in_features**-0.5 if self.hidden is None else self.output.in_features**-0.5
            nn.init.normal_(self.output.weight, 0.0, std, generator=generator)
            nn.init.zeros_(self.output.bias)
        return self

    @property
    def layer_weights(self) -> list[float]:
        """The softmax weights, one for each layer."""
        return self.mix_L.detach().softmax(0).tolist()

    def standardise(self, x_LNP: Tensor) -> Tensor:
        return (x_LNP - self.mean_LP[:, None]) * self.scale_LP[:, None]

    def classify(self, x_LNP: Tensor) -> Tensor:
        """Standardised (L, N, P) to logits (N, V)."""
        num_layers, num_examples, width = x_LNP.shape
        if num_layers == 1:
            z_NP = x_LNP[0]
        else:
            z_NP = (self.mix_L.softmax(0) @ x_LNP.reshape(num_layers, -1)).view(num_examples, width)
        if self.hidden is not None:
            z_NP = relu(self.hidden(z_NP))
        return self.output(z_NP)

    def forward(self, x_LNP: Tensor) -> Tensor:
        """Raw (L, N, P) to logits (N, V)."""
        return self.classify(self.standardise(x_LNP))


def standardisation(examples: Examples) -> tuple[Tensor, Tensor]:
    """Returns mean and inverse standard deviation, each (L, P), of ``examples``; float64 sums in chunks."""
    total = squares = torch.zeros(())
    shift_L1P = examples.batch(torch.arange(1))[0].double()  # keeps the difference of squares accurate
    for x_LNP, _ in examples.batches():
        centred = x_LNP.double() - shift_L1P
        total = total + centred.sum(1)
        squares = squares + centred.square().sum(1)
    mean_LP = total / len(examples)
    variance_LP = (squares / len(examples) - mean_LP.square()).clamp_min(0)
    mean_LP = mean_LP + shift_L1P[:, 0]
    constant = variance_LP.sqrt() <= 1e-6 * (mean_LP.abs() + 1e-6)
    scale_LP = torch.where(constant, 0.0, variance_LP.clamp_min(1e-30).rsqrt())
    return mean_LP.float(), scale_LP.float()


@torch.inference_mode()
def score(classifier: ProbeClassifier, examples: Examples) -> tuple[float, float]:
    """Returns accuracy and mean cross-entropy over ``examples``."""
    right, loss = 0, 0.0
    for x_LNP, y_N in examples.batches():
        logits_NV = classifier(x_LNP)
        right += int((logits_NV.argmax(-1) == y_N).sum())
        loss += float(cross_entropy(logits_NV, y_N, reduction="sum"))
    return right / len(examples), loss / len(examples)


def _new(train: Examples, num_classes: int, config: ClassifierConfig, seed: int) -> ProbeClassifier:
    mean_LP, scale_LP = standardisation(train)
    classifier = ProbeClassifier(mean_LP, scale_LP, num_classes, config.hidden_dim)
    return classifier.initialize(torch.Generator().manual_seed(seed)).eval()


def train_paths(
    train: Examples,
    *,
    num_classes: int,
    config: ClassifierConfig,
    seed: int,
    sized_as: int | None = None,
) -> Iterator[Iterator[tuple[Setting, ProbeClassifier]]]:
    """Trains along every path of settings: L-BFGS has one path, of weight decays; AdamW one of epochs for each learning rate.

    Args:
        train: Training examples.
        num_classes: V.
        config: What to try.
        seed: Of the initial weights and the order of batches.
        sized_as: Choose between the two as for so many examples, so that a choice and the training that follows it agree.

    Yields:
        Paths; each yields a setting and the classifier as it is then (it goes on changing). A path may be left early.
    """
    classifier = _new(train, num_classes, config, seed)
    num_examples = len(train) if sized_as is None else sized_as
    num_bytes = 4 * num_examples * len(train.x_LNP) * train.width
    if config.hidden_dim is None and num_examples <= FULL_BATCH_EXAMPLES and num_bytes <= FULL_BATCH_BYTES:
        yield _weight_decay_path(classifier, train, config)
        return
    for rate in config.learning_rates:
        generator = torch.Generator().manual_seed(seed)
        yield _epoch_path(classifier.initialize(generator), train, rate, config, generator)


def _weight_decay_path(
    classifier: ProbeClassifier, train: Examples, config: ClassifierConfig
) -> Iterator[tuple[Setting, ProbeClassifier]]:
    x_LNP, y_N = train.batch(torch.arange(len(train)))
    x_LNP = classifier.standardise(x_LNP)
    for weight_decay in sorted(config.weight_decays, reverse=True):
        _minimise(classifier, x_LNP, y_N, weight_decay, config.max_iterations)
        yield ("weight_decay", weight_decay, 0), classifier


def _minimise(classifier: ProbeClassifier, x_LNP: Tensor, y_N: Tensor, weight_decay: float, max_iterations: int) -> None:
    """Mean cross-entropy plus half ``weight_decay`` times the squares of weights and mix logits (the biases go free)."""
    penalised = [classifier.output.weight, classifier.mix_L]
    optimizer = torch.optim.LBFGS(
        [classifier.mix_L, classifier.output.weight, classifier.output.bias],
        max_iter=max_iterations,
        history_size=20,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = sum(parameter.square().sum() for parameter in penalised)
        loss = cross_entropy(classifier.classify(x_LNP), y_N) + 0.5 * weight_decay * penalty
        loss.backward()
        return loss

    optimizer.step(closure)


def _epoch_path(
    classifier: ProbeClassifier, train: Examples, rate: float, config: ClassifierConfig, generator: torch.Generator
) -> Iterator[tuple[Setting, ProbeClassifier]]:
    """AdamW at a constant rate; what is yielded is the average of an epoch's weights (Polyak and Juditsky 1992).

    Without averaging the last steps' noise costs one to two points (phones of synthetic speech, 43,000 frames).
    """
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=rate, weight_decay=config.decoupled_weight_decay)
    averaged = copy.deepcopy(classifier)
    for epoch in range(1, config.max_epochs + 1):
        for step, positions in enumerate(torch.randperm(len(train), generator=generator).split(config.batch_size)):
            # sorted: the rows of a memory-mapped store are then read in order
            x_LNP, y_N = train.batch(positions.sort().values)
            optimizer.zero_grad()
            cross_entropy(classifier(x_LNP), y_N).backward()
            optimizer.step()
            with torch.no_grad():
                for mean, now in zip(averaged.parameters(), classifier.parameters(), strict=True):
                    mean.lerp_(now, 1 / (step + 1))
        yield ("learning_rate", rate, epoch), averaged
