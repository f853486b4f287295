"""The probes of S3PRL v0.1 as they were published (``--protocol s3prl-v0.1``), without the faults of their code.

Reproduced: raw features, no standardisation; the last layer, or the mean of the blocks' outputs where its weighted sum was
asked for (the weights were never trained); heads as torch draws them; six utterances a step, sorted by length into batches that
come in random order, halved above 3,000 frames; Adam at a constant 4e-3, gradients clipped to a norm of 1; 500,000 steps;
labels laid on frames in their order, the longer of the two cut; CPC's 41 phones or the Montreal aligner's at their own clocks.
Rows of plain features are standardised by the training part, which stands in for the normalisation they were stored with there.

Not reproduced: frames of padding that counted as right and wrong answers and entered means of utterances, real frames that
vanished where their sum was zero, utterances lost with the last batch, the checkpoint that was best on the test part (here dev
chooses and the test part is scored once). So numbers are close to the published ones, not equal to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslim.probes.classifiers import Examples, ProbeClassifier, score, standardisation
from sslim.probes.features import Representation
from sslim.probes.layers import repeated
from sslim.probes.selection import Fitted, check_parts
from sslim.probes.tasks import NO_CLASS, Task, segment_classes

NAME = "s3prl-v0.1"
HIDDEN_DIM = 768  # of phone_1hidden
PERIOD_TOLERANCE = 0.01
EDGE_S = 1e-6

REPRODUCED = (
    "S3PRL v0.1: models' layers as they are, Adam at a constant 4e-3, batches of 6 utterances, gradient norm at most 1, labels "
    "laid on frames in their order and the longer of the two cut, mean of layers in place of a weighted sum"
)
NOT_REPRODUCED = (
    "padding in loss, accuracy and means; frames dropped for a zero sum; utterances lost with the last batch; the best step "
    "taken on test"
)


@dataclass(frozen=True, kw_only=True)
class PublishedConfig:
    """Settings of S3PRL's ``config/downstream.yaml``.

    Attributes:
        num_steps: ``total_steps``.
        dev_steps: Steps from one look at the dev part to the next (``dev_step``); there is one at the end as well.
        learning_rate: Of Adam, constant.
        batch_size: Utterances in a step; one that holds more than ``halved_above`` frames in its longest is cut in two.
        halved_above: ``HALF_BATCHSIZE_TIME``.
        max_gradient_norm: ``gradient_clipping``.
    """

    num_steps: int = 500_000
    dev_steps: int = 10_000
    learning_rate: float = 4e-3
    batch_size: int = 6
    halved_above: int = 3000
    max_gradient_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.dev_steps < 1:
            raise ValueError(f"num_steps {self.num_steps} and dev_steps {self.dev_steps} must be at least 1")


# ---- labels on frames ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LabelClock:
    """When the labels of a published set are.

    Attributes:
        shift_s: Seconds from one to the next.
        centre_s: The moment that the first one tells of.
        tail_s: The last label begins this much before the end of the last segment, or earlier.
    """

    shift_s: float
    centre_s: float
    tail_s: float

    def num_labels(self, end_s: float) -> int:
        """Returns how many labels there are of segments that end at ``end_s``."""
        return max(0, int(np.ceil((end_s - self.tail_s) / self.shift_s - EDGE_S)))


LABEL_CLOCKS = {
    # Kaldi's frames: windows of 25 ms every 10 ms, as many as fit
    "cpc": LabelClock(shift_s=0.01, centre_s=0.0125, tail_s=0.015),
    # preprocess_alignment.py moves segments half a window of 50 ms to the front and counts multiples of 12.5 ms inside them
    "montreal": LabelClock(shift_s=0.0125, centre_s=0.025, tail_s=0.025),
}


def with_label_clock(task: Task, clock: LabelClock) -> Task:
    """Returns a phone task whose label j goes to frame j, whatever the frames' times; frames beyond the labels have none."""
    if task.segments_of is None:
        return task
    segments_of = task.segments_of

    def frame_classes(index: int, num_frames: int, frame_shift_s: float, frame_length_s: float | None) -> np.ndarray:
        segments = segments_of(index)
        end_s = max(segment.end_s for segment in segments)
        num_labels = min(clock.num_labels(end_s), num_frames)
        labels = segment_classes(segments, task.classes, num_labels, clock.shift_s, 2 * clock.centre_s)
        return np.concatenate([labels, np.full(num_frames - num_labels, NO_CLASS, dtype=np.int64)])

    return replace(task, frame_classes=frame_classes)


def at_clock(representation: Representation, clock: LabelClock) -> Representation:
    """Returns the representation with its frames repeated to the labels' period.

    Raises:
        ValueError: The frame period is no multiple of the labels': S3PRL laid such labels on frames all the same, and reached
            8 % (its issues 43 and 44).
    """
    times = max(1, round(representation.frame_shift_s / clock.shift_s))
    if abs(representation.frame_shift_s / times - clock.shift_s) > PERIOD_TOLERANCE * clock.shift_s:
        raise ValueError(
            f"{representation.name} has a frame every {1000 * representation.frame_shift_s:g} ms and the labels come every "
            f"{1000 * clock.shift_s:g} ms: laid on one another in their order they would drift apart; without "
            f"--protocol {NAME} they are laid by time"
        )
    return repeated(representation, times)


def published_task(task: Task, labels: Literal["cpc", "montreal"]) -> tuple[Task, Callable[[Representation], Representation]]:
    """Returns the task under this protocol, and what it does to every representation."""
    if task.segments_of is None:
        return task, lambda representation: representation
    clock = LABEL_CLOCKS[labels]
    return with_label_clock(task, clock), lambda representation: at_clock(representation, clock)


# ---- training --------------------------------------------------------------------------------------------------------


def utterance_batches(num_frames: list[int], config: PublishedConfig, generator: torch.Generator) -> list[list[int]]:
    """Returns utterances sorted by length, longest first, in batches; none is left out.

    Args:
        num_frames: Of each utterance.
        config: Size of a batch, and when it is halved.
        generator: Orders utterances of equal length.
    """
    drawn = torch.randperm(len(num_frames), generator=generator).numpy()
    order = drawn[np.argsort(-np.asarray(num_frames)[drawn], kind="stable")].tolist()
    batches = []
    for start in range(0, len(order), config.batch_size):
        batch = order[start : start + config.batch_size]
        if len(batch) > 1 and num_frames[batch[0]] > config.halved_above:
            half = len(batch) // 2
            batches += [batch[:half], batch[half:]]
        else:
            batches.append(batch)
    return batches


def new_classifier(
    train: Examples, num_classes: int, hidden_dim: int | None, generator: torch.Generator, *, standardise: bool = False
) -> ProbeClassifier:
    """Returns a classifier, its linear maps drawn as torch draws them; of raw features, unless ``standardise``."""
    shape = (len(train.x_LNP), train.width)
    mean_LP, scale_LP = standardisation(train) if standardise else (torch.zeros(shape), torch.ones(shape))
    classifier = ProbeClassifier(mean_LP, scale_LP, num_classes, hidden_dim)
    for linear in (classifier.hidden, classifier.output):
        if linear is not None:
            bound = linear.in_features**-0.5
            nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
            nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
    classifier.mix_L.requires_grad_(False)
    return classifier.eval()


def _step_batches(train: Examples, config: PublishedConfig, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions of the examples of one batch after another, for ever; the order of batches is drawn anew for each pass."""
    utterances, num_frames = train.by_utterance()
    batches = utterance_batches(num_frames, config, generator)
    while True:
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield torch.cat([utterances[member] for member in batches[number]])


def fit_published(
    train: Examples,
    dev: Examples,
    *,
    num_classes: int,
    config: PublishedConfig,
    hidden_dim: int | None,
    seed: int,
    standardise: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Fitted:
    """Trains for the published number of steps and keeps the step that is best on ``dev``: by accuracy, the first of equals.

    Args:
        train: Training examples, with ``offsets`` and ``num_frames_U``.
        dev: Examples of the choice.
        num_classes: V.
        config: The settings.
        hidden_dim: Width of a hidden layer; None for a linear classifier.
        seed: Of the initial weights and the order of batches.
        standardise: Whether channels are standardised by the training examples first.
        tell: Called with a line at each look at dev.

    Raises:
        ValueError: Train or dev is empty.
    """
    check_parts(training=train, dev=dev)
    generator = torch.Generator().manual_seed(seed)
    classifier = new_classifier(train, num_classes, hidden_dim, generator, standardise=standardise)
    trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.learning_rate)
    best, kept = -1.0, (0, classifier.state_dict())
    batches = _step_batches(train, config, generator)
    for step in range(1, config.num_steps + 1):
        x_LNP, y_N = train.batch(next(batches))
        optimizer.zero_grad()
        cross_entropy(classifier(x_LNP), y_N).backward()
        nn.utils.clip_grad_norm_(trained, config.max_gradient_norm)
        optimizer.step()
        if step % config.dev_steps and step != config.num_steps:
            continue
        accuracy = score(classifier, dev)[0]
        tell(f"step {step} of {config.num_steps}: {100 * accuracy:.1f} % on dev")
        if accuracy > best:
            best, kept = accuracy, (step, {name: tensor.clone() for name, tensor in classifier.state_dict().items()})
    classifier.load_state_dict(kept[1])
    return Fitted(classifier=classifier, setting=("step", kept[0], 0), dev_accuracy=best)
