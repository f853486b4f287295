"""A fine-tuned model on disk: ``FOLDER/model`` is an ordinary model folder, ``FOLDER/classifier`` what was trained on top.

``load_model(FOLDER/model)`` and every verb of sslim take the first; :func:`read_tuned` gives both, to classify with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sslim.checkpoints import load_model, save_model
from sslim.config import from_plain, read_json, to_plain
from sslim.data.corpus import Corpus
from sslim.models.speech import SpeechModel
from sslim.probes.classifiers import ProbeClassifier
from sslim.probes.fine_tuning import FineTuned, TunedModel, classify
from sslim.storage import atomic_folder, check_folder, load_tensors, save_tensors, write_json

MODEL, CLASSIFIER = "model", "classifier"
DESCRIPTION, TENSORS = "classifier.json", "classifier.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ClassifierDescription:
    """What a stored classifier takes and gives.

    Attributes:
        task: What was asked.
        classes: Their names.
        unit: ``utterance`` or ``frame``.
        layer: Which layers it takes, see ``sslim.probes.layers``.
        pooling: How frames of an utterance become one vector; None for frames.
        context: Frames on either side of each.
        hidden_dim: Width of its hidden layer; None for a linear one.
    """

    task: str
    classes: tuple[str, ...]
    unit: str
    layer: str
    pooling: str | None
    context: int = 0
    hidden_dim: int | None = None


@dataclass(frozen=True, kw_only=True)
class StoredTuned:
    """A fine-tuned model with its classifier as read from disk, in eval mode.

    Attributes:
        model: The model.
        classifier: On its layers.
        description: What they give.
    """

    model: SpeechModel
    classifier: ProbeClassifier
    description: ClassifierDescription

    def classify(self, waveforms: list[Tensor]) -> list[list[str]]:
        """Returns the classes of waveforms (S,) at the model's sample rate: one for each utterance, or one for each frame.

        Raises:
            ValueError: The model takes features, not waveforms, or a waveform to be classified as a whole is too short.
        """
        if self.model.frontend is None:
            raise ValueError(f"this {self.model.config.family} model takes features, so waveforms cannot be classified")
        told = self.description
        tuned = TunedModel(self.model, self.classifier, train_frontend=False).eval()
        numbers = classify(tuned, waveforms, is_waveform=True, layer=told.layer, pooling=told.pooling, context=told.context)
        return [[told.classes[number] for number in of_one.tolist()] for of_one in numbers]


def write_tuned(tuned: FineTuned, description: ClassifierDescription, corpus: Corpus, folder: str | Path) -> None:
    """Writes ``folder/model`` and ``folder/classifier``; what was done stands last in the model's provenance.

    Args:
        tuned: What fine-tuning gave.
        description: Of its classifier.
        corpus: What it was trained on.
        folder: Where to; its two parts are replaced if they are there.

    Raises:
        ValueError: ``folder/model`` exists and is no model folder.
    """
    folder = Path(folder)
    model = tuned.model
    entry = {
        "step": "fine-tuned",
        "task": description.task,
        "corpus": corpus.name,
        "corpus_digest": corpus.digest,
        "layer": description.layer,
        "learning_rate": tuned.learning_rate,
        "epochs": tuned.epoch,
        "seed": tuned.seed,
        "dev_accuracy": round(tuned.dev_accuracy, 4),
        "test_accuracy": round(tuned.test_accuracy, 4),
    }
    before = list(model.provenance)
    try:
        model.provenance = [*before, entry]
        save_model(model, folder / MODEL)
    finally:
        model.provenance = before
    with atomic_folder(folder / CLASSIFIER) as temporary:
        write_json(temporary / DESCRIPTION, {"format_version": FORMAT_VERSION, **to_plain(description)})
        save_tensors(temporary / TENSORS, tuned.classifier.state_dict())


def read_tuned(folder: str | Path) -> StoredTuned:
    """Reads what :func:`write_tuned` wrote, in eval mode on the CPU.

    Raises:
        ValueError: The folder is no such folder, or a part of it is torn.
    """
    folder = Path(folder)
    description = folder / CLASSIFIER / DESCRIPTION
    if not description.is_file():
        raise ValueError(f"{folder} holds no fine-tuned model: it has no {CLASSIFIER}/{DESCRIPTION}")
    check_folder(folder / CLASSIFIER)
    values = read_json(description)
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"{description} has format version {version!r}, this sslim reads {FORMAT_VERSION}")
    told = from_plain(ClassifierDescription, values, str(description))
    state = load_tensors(folder / CLASSIFIER / TENSORS)
    empty = torch.zeros_like(state["mean_LP"])
    classifier = ProbeClassifier(empty, empty.clone(), len(told.classes), told.hidden_dim)
    classifier.load_state_dict(state)
    return StoredTuned(model=load_model(folder / MODEL), classifier=classifier.eval(), description=told)
