"""Training a model together with a probe's classifier: how good it gets when it may change for the task.

The model is copied, so that the one that was given stays as it is. It and the classifier have learning rates of their own
(S3PRL v0.1 gave both 4e-3, twenty times the rate of pre-training), a warm-up and a linear decay. Everything is chosen on dev:
the epoch, and the model's rate where several are tried. Padding enters neither loss nor accuracy.

Training starts from the classifier that was fitted on the frozen layers, and what that reaches on dev is the mark to beat: a
classifier drawn at random would pull the layers about before it knows anything (Kumar et al., "Fine-tuning can distort
pretrained features and underperform out-of-distribution", arXiv 2202.10054). Digits after three epochs: 97.7 % from a random
one, where the frozen layers give 99.0 %.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslim.batch import Padded, valid_mask
from sslim.data.corpus import Corpus
from sslim.frontends import ConvFrontend
from sslim.models.encoding import Inputs, corpus_inputs, length_batches, num_model_frames, pad_batch
from sslim.models.speech import SpeechModel, restore_statistics
from sslim.models.storage import require_float
from sslim.probes.classifiers import ProbeClassifier, neighbours
from sslim.probes.features import (
    model_representation,
    stacked,
)
from sslim.probes.layers import pick_layers
from sslim.probes.protocol import Parts
from sslim.probes.tasks import Task
from sslim.training.engine import TrainingError
from sslim.training.schedules import ScheduleConfig, learning_rate_factor
from sslim.training.seeds import derive_seed, seed_device

LENGTH_JITTER = (
    0.25  # lengths are lengthened by up to so much before batches are made, so that batches differ from epoch to epoch
)
LEAST_VARIANCE = 1e-10  # below it a pooled deviation has no gradient


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig:
    """How a model is trained with a classifier.

    Attributes:
        learning_rates: Of the model; each is tried, and dev chooses.
        head_learning_rate: Of the classifier.
        warmup_share: Of all steps; the rates fall to zero on a straight line afterwards.
        max_epochs: The best epoch is chosen on dev.
        patience: Epochs without a better dev accuracy before it stops.
        batch_s: Seconds of padded speech in a step.
        weight_decay: Decoupled, of matrices.
        max_gradient_norm: Of all gradients together.
        train_frontend: Whether a learnt front-end (HuBERT's convolutions) is trained too; its authors leave it as it is.
    """

    learning_rates: tuple[float, ...] = (1e-4,)
    head_learning_rate: float = 2e-3
    warmup_share: float = 0.1
    max_epochs: int = 10
    patience: int = 3
    batch_s: float = 20.0
    weight_decay: float = 1e-2
    max_gradient_norm: float = 1.0
    train_frontend: bool = False

    def __post_init__(self) -> None:
        if not self.learning_rates or min(*self.learning_rates, self.head_learning_rate) <= 0:
            raise ValueError(
                f"the learning rates {self.learning_rates} of the model and {self.head_learning_rate} of the classifier must "
                "be above 0, and there must be one of the model at least"
            )
        if self.max_epochs < 1 or self.patience < 1 or not 0 < self.batch_s < float("inf"):
            raise ValueError(
                f"max_epochs {self.max_epochs} and patience {self.patience} must be at least 1, and batch_s {self.batch_s:g} "
                "above 0 and finite"
            )
        if not 0 <= self.warmup_share < 1:
            raise ValueError(f"warmup_share is {self.warmup_share:g}; expected 0 or more and less than 1")


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """A model with its classifier, both in eval mode.

    Attributes:
        model: Changed for the task, without heads.
        classifier: What takes its layers.
        learning_rate: Of the model, as dev chose it; 0 where no epoch was better than the frozen model.
        epoch: Likewise.
        dev_accuracy: Reached there.
        test_accuracy: Scored once, afterwards.
        seed: Of everything random.
    """

    model: SpeechModel
    classifier: ProbeClassifier
    learning_rate: float
    epoch: int
    dev_accuracy: float
    test_accuracy: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the model's utterances are, end to end.

    Attributes:
        inputs: Features or waveforms of all utterances.
        y_N: (N,) int64 class of every frame, or of every utterance; negative where there is none.
        offsets: (n + 1,) int64 where the examples of each utterance begin.
        num_frames: (n,) int64 of the model.
        pooling: ``mean`` or ``mean-std`` for utterances; None for frames.
        layer: See ``sslim.probes.layers``.
        context: Frames on either side of each.
    """

    inputs: Inputs
    y_N: Tensor
    offsets: Tensor
    num_frames: np.ndarray
    pooling: str | None
    layer: str
    context: int


class TunedModel(nn.Module):
    """A model and a classifier of its layers as one module."""

    def __init__(self, model: SpeechModel, classifier: ProbeClassifier, *, train_frontend: bool) -> None:
        super().__init__()
        self.model, self.classifier = model, classifier
        self.freezes_frontend = isinstance(model.frontend, ConvFrontend) and not train_frontend
        if self.freezes_frontend:
            assert model.frontend is not None
            model.frontend.requires_grad_(False)

    def train(self, mode: bool = True) -> TunedModel:
        super().train(mode)
        if self.freezes_frontend:
            self.model.frontend.eval()  # type: ignore[union-attr]
        return self

    def forward(
        self, values: Sequence[Tensor], *, is_waveform: bool, layer: str, pooling: str | None, context: int
    ) -> tuple[Tensor, Tensor]:
        """Encodes utterances and classifies them or their frames.

        Args:
            values: Each (T, F) base features or (S,) samples.
            is_waveform: Which of the two.
            layer: Which layers the classifier sees.
            pooling: ``mean`` or ``mean-std`` for utterances; None for frames.
            context: Frames on either side of each.

        Returns:
            Logits (n, V) of all utterances, or of all valid frames end to end, and the (B,) numbers of valid frames.
        """
        x_LBTD, lengths_B = self._layers(values, layer, is_waveform=is_waveform)
        if pooling is None:
            x_LNP = frames_with_context(x_LBTD, lengths_B, context)
        else:
            x_LNP = pooled(x_LBTD, lengths_B, pooling)
        return self.classifier(x_LNP.float()), lengths_B

    def _layers(self, values: Sequence[Tensor], layer: str, *, is_waveform: bool) -> tuple[Tensor, Tensor]:
        model = self.model
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freezes_frontend):
            batch = pad_batch(model, values, is_waveform=is_waveform)
            if is_waveform:
                assert model.frontend is not None
                batch = model.frontend(batch.values, batch.lengths)
        embedded: Padded = model.embed(batch)
        is_full = bool((embedded.lengths == embedded.values.shape[1]).all())
        output = model.encoder(embedded.values, None if is_full else embedded.lengths, keep_layers=True)
        return pick_layers(stacked(output.layers), layer), embedded.lengths


def known_logits(tuned: TunedModel, targets: Targets, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns logits (n, V) and classes (n,) of the frames or utterances that have a class.

    Args:
        tuned: Model and classifier.
        targets: Whose utterances at ``positions`` are meant.
        positions: (B,) places.
    """
    logits_NV, lengths_B = tuned(
        [targets.inputs.read(position) for position in positions],
        is_waveform=targets.inputs.is_waveform,
        layer=targets.layer,
        pooling=targets.pooling,
        context=targets.context,
    )
    expected = targets.num_frames[list(positions)].tolist()
    if lengths_B.tolist() != expected:
        raise ValueError(f"the model gives {lengths_B.tolist()} frames for utterances of which {expected} were expected")
    y_N = torch.cat([targets.y_N[targets.offsets[p] : targets.offsets[p + 1]] for p in positions]).to(logits_NV.device)
    known_N = y_N >= 0
    return logits_NV[known_N], y_N[known_N]


@torch.inference_mode()
def classify(
    tuned: TunedModel, values: Sequence[Tensor], *, is_waveform: bool, layer: str, pooling: str | None, context: int
) -> list[Tensor]:
    """Returns the classes of each utterance (1,), or of each of its frames (T,), as numbers; arguments as of the module.

    Raises:
        ValueError: An utterance to be classified as a whole is shorter than one frame.
    """
    logits_NV, lengths_B = tuned(values, is_waveform=is_waveform, layer=layer, pooling=pooling, context=context)
    if pooling is not None and not bool(lengths_B.all()):
        raise ValueError(f"utterance {int(lengths_B.argmin())} is shorter than one frame of the model, so it has no class")
    counts = [1] * len(values) if pooling is not None else lengths_B.tolist()
    return list(logits_NV.argmax(-1).cpu().split(counts))


def frames_with_context(x_LBTD: Tensor, lengths_B: Tensor, context: int) -> Tensor:
    """Returns (L, N, (2 context + 1) D): every valid frame, utterance after utterance, its neighbours beside it.

    Args:
        x_LBTD: Layers.
        lengths_B: Valid frames.
        context: Frames on either side.
    """
    x_LND = x_LBTD[:, valid_mask(lengths_B, x_LBTD.shape[2])]
    if not context:
        return x_LND
    offsets = torch.cat([lengths_B.new_zeros(1), lengths_B.cumsum(0)])
    rows = torch.arange(x_LND.shape[1], device=x_LND.device)
    return x_LND[:, neighbours(rows, offsets, context)].flatten(2)


def pooled(x_LBTD: Tensor, lengths_B: Tensor, pooling: str) -> Tensor:
    """Returns (L, B, D), or (L, B, 2 D) for ``mean-std``: each utterance over its valid frames, with a gradient.

    Args:
        x_LBTD: Layers.
        lengths_B: Valid frames.
        pooling: ``mean`` or ``mean-std``.
    """
    valid_BT1 = valid_mask(lengths_B, x_LBTD.shape[2])[..., None]
    count_B1 = lengths_B[:, None]
    mean_LBD = x_LBTD.where(valid_BT1, 0.0).sum(2) / count_B1
    if pooling == "mean":
        return mean_LBD
    squares_LBD = (x_LBTD - mean_LBD[:, :, None]).square().where(valid_BT1, 0.0).sum(2)
    return torch.cat([mean_LBD, (squares_LBD / count_B1).clamp_min(LEAST_VARIANCE).sqrt()], dim=-1)


def bare_copy(model: SpeechModel) -> SpeechModel:
    """Returns a model of its own tensors, without heads, that can be trained.

    Raises:
        ValueError: Its weights are quantised, or it is a supernet.
    """
    require_float(model)
    if model.config.search_space is not None:
        raise ValueError("a supernet cannot be fine-tuned: extract a subnet with `sslim compress extract` and tune that")
    twin = SpeechModel(replace(model.config, heads={}), model.provenance).to(next(model.parameters()).device)
    state = {name: t.detach().clone() for name, t in model.state_dict().items() if not name.startswith("heads.")}
    restore_statistics(twin, state)
    twin.load_state_dict(state, strict=True, assign=True)
    return twin.requires_grad_(True)


def model_targets(
    model: SpeechModel, corpus: Corpus, task: Task, *, pooling: str, layer: str, context: int, shuffle_seed: int | None = None
) -> Targets:
    """Lays the task's classes beside the model's frames.

    Args:
        model: Whose frames.
        corpus: Where from.
        task: The classes.
        pooling: For utterances.
        layer: Which layers the classifier sees.
        context: Frames on either side of each.
        shuffle_seed: A control: classes are shuffled over all examples.
    """
    representation = model_representation(model, corpus, "")
    inputs = corpus_inputs(model, corpus, task.indices)
    num_frames = num_model_frames(model, inputs)
    if task.unit == "utterance":
        assert task.classes_N is not None
        y_N, offsets = task.classes_N.copy(), np.arange(len(task.indices) + 1)
    else:
        assert task.frame_classes is not None
        shift_s, length_s = representation.frame_shift_s, representation.frame_length_s
        pairs = zip(task.indices.tolist(), num_frames.tolist(), strict=True)
        y_N = np.concatenate([task.frame_classes(index, count, shift_s, length_s) for index, count in pairs])
        offsets = np.concatenate([[0], np.cumsum(num_frames)])
    if shuffle_seed is not None:
        y_N[y_N >= 0] = np.random.default_rng(shuffle_seed).permutation(y_N[y_N >= 0])
    return Targets(
        inputs=inputs,
        y_N=torch.from_numpy(y_N),
        offsets=torch.from_numpy(offsets),
        num_frames=num_frames,
        pooling=pooling if task.unit == "utterance" else None,
        layer=layer,
        context=context,
    )


def training_batches(inputs: Inputs, part: np.ndarray, batch_s: float, generator: torch.Generator) -> list[list[int]]:
    """Returns every position of ``part`` once, utterances of about the same length together, batches in random order.

    Args:
        inputs: Lengths of all utterances.
        part: (n,) positions.
        batch_s: Seconds of padded speech in a batch, at most, where more than one utterance is in it.
        generator: Draws.
    """
    jitter = 1 + LENGTH_JITTER * torch.rand(len(part), generator=generator).numpy()
    batches = length_batches(inputs.lengths[part] * jitter, batch_s / inputs.unit_s)
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [part[batches[number]].tolist() for number in order]


@torch.inference_mode()
def _score(tuned: TunedModel, targets: Targets, part: np.ndarray, batch_s: float) -> tuple[float, float]:
    """Accuracy and mean cross-entropy over the frames or utterances of ``part`` that have a class."""
    tuned.eval()
    right, count, loss = 0, 0, 0.0
    for batch in length_batches(targets.inputs.lengths[part], batch_s / targets.inputs.unit_s):
        positions = part[batch].tolist()
        logits_NV, y_N = known_logits(tuned, targets, positions)
        right += int((logits_NV.argmax(-1) == y_N).sum())
        loss += float(cross_entropy(logits_NV.float(), y_N, reduction="sum"))
        count += len(y_N)
    if not count:
        raise ValueError("a part of the split has no frame or utterance with a class, so it cannot be scored")
    return right / count, loss / count


def _optimizer(tuned: TunedModel, rate: float, config: FineTuningConfig) -> torch.optim.Optimizer:
    groups = []
    for module, module_rate in ((tuned.model, rate), (tuned.classifier, config.head_learning_rate)):
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for is_matrix in (True, False):
            members = [parameter for parameter in parameters if (parameter.dim() > 1) is is_matrix]
            if members:
                decay = config.weight_decay if is_matrix else 0.0
                groups.append({"params": members, "lr": module_rate, "peak": module_rate, "weight_decay": decay})
    return torch.optim.AdamW(groups)


def _epochs(
    tuned: TunedModel, targets: Targets, train: np.ndarray, rate: float, config: FineTuningConfig, seed: int, bf16: bool
) -> Iterator[int]:
    """Trains; yields the number of each epoch when it is over."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "batches"))
    device = next(tuned.parameters()).device
    optimizer = _optimizer(tuned, rate, config)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    schedule = ScheduleConfig(kind="linear", warmup_share=config.warmup_share)
    per_epoch = len(training_batches(targets.inputs, train, config.batch_s, torch.Generator().manual_seed(seed)))
    steps = itertools.count()
    for epoch in range(1, config.max_epochs + 1):
        tuned.train()
        for positions in training_batches(targets.inputs, train, config.batch_s, generator):
            step = next(steps)
            factor = learning_rate_factor(schedule, step, per_epoch * config.max_epochs)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            seed_device(derive_seed(seed, "dropout", step), device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                logits_NV, y_N = known_logits(tuned, targets, positions)
            if not len(y_N):
                continue
            optimizer.zero_grad()
            cross_entropy(logits_NV.float(), y_N).backward()
            norm = nn.utils.clip_grad_norm_(trained, config.max_gradient_norm)
            if not bool(torch.isfinite(norm)):
                raise TrainingError(
                    f"the gradient of step {step + 1} is not finite at a learning rate of {rate:g}: take a lower one"
                )
            optimizer.step()
        yield epoch


def _best_epoch(
    begin: Callable[[], TunedModel],
    targets: Targets,
    division: Parts,
    config: FineTuningConfig,
    seed: int,
    bf16: bool,
    tell: Callable[[str], None],
) -> tuple[TunedModel, float, int, float]:
    """Trains at each learning rate; returns model and classifier at their best on dev, its rate, its epoch, its accuracy."""
    tuned = begin()
    frozen, loss = _score(tuned, targets, division.dev, config.batch_s)
    tell(f"frozen: {100 * frozen:.1f} % on dev")
    best, kept = (frozen, -loss), (0.0, 0, {name: tensor.detach().clone() for name, tensor in tuned.state_dict().items()})
    devices = [p.device for p in itertools.islice(tuned.parameters(), 1) if p.device.type == "cuda"]
    with torch.random.fork_rng(devices=devices):  # dropout draws from the global generators
        for rate in config.learning_rates:
            tuned, path_best, stale = begin(), frozen, 0
            for epoch in _epochs(tuned, targets, division.train, rate, config, seed, bf16):
                accuracy, loss = _score(tuned, targets, division.dev, config.batch_s)
                tell(f"learning rate {rate:g}, epoch {epoch}: {100 * accuracy:.1f} % on dev")
                if (accuracy, -loss) > best:
                    state = {name: tensor.detach().clone() for name, tensor in tuned.state_dict().items()}
                    best, kept = (accuracy, -loss), (rate, epoch, state)
                stale = 0 if accuracy > path_best else stale + 1
                path_best = max(path_best, accuracy)
                if stale >= config.patience:
                    break
    tuned.load_state_dict(kept[2])
    return tuned, kept[0], kept[1], best[0]


def fine_tune(
    model: SpeechModel,
    division: Parts,
    targets: Targets,
    *,
    start: ProbeClassifier,
    config: FineTuningConfig,
    seed: int,
    bf16: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> FineTuned:
    """Trains a copy of ``model`` with a classifier on the train part, chooses on dev, and scores the test part once.

    Args:
        model: Left as it is.
        division: Parts of the utterances.
        targets: From :func:`model_targets`.
        start: Classifier of the frozen layers, which is copied.
        config: Settings.
        seed: Of the order of batches and of dropout.
        bf16: Whether to train under bf16 autocast.
        tell: Called with a line for each epoch.

    Raises:
        ValueError: A part of the split is empty, or the model cannot be trained.
        TrainingError: Training went astray.
    """
    for name in ("train", "dev", "test"):
        if not len(getattr(division, name)):
            raise ValueError(f"there are no {name} examples: the split leaves that part empty")
    model.eval()

    def begin() -> TunedModel:
        classifier = copy.deepcopy(start).to(next(model.parameters()).device).requires_grad_(True)
        return TunedModel(bare_copy(model), classifier, train_frontend=config.train_frontend)

    tuned, rate, epoch, accuracy = _best_epoch(begin, targets, division, config, seed, bf16, tell)
    return FineTuned(
        model=tuned.model.eval(),
        classifier=tuned.classifier.eval(),
        learning_rate=rate,
        epoch=epoch,
        dev_accuracy=accuracy,
        test_accuracy=_score(tuned, targets, division.test, config.batch_s)[0],
        seed=seed,
    )
