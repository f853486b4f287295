"""One utterance for the report of a run: what went in, what was hidden, what the model said, and what was really spoken.

A run of pre-training is given one when it is over (:func:`add_example`), of the kind that its objective has, if any.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sslim.batch import IGNORED_LABEL, Batch, Padded
from sslim.checkpoints import load_model
from sslim.config import read_json
from sslim.data.alignment import frame_length_s, frame_symbols
from sslim.data.corpus import Corpus
from sslim.data.labels import LabelStore, align_labels
from sslim.data.sources import split_role
from sslim.models import SpeechModel
from sslim.models.encoding import corpus_inputs, reads_stored_features
from sslim.objectives import MaskedPrediction, MaskedPredictionConfig, Reconstruction, ReconstructionConfig, span_mask
from sslim.objectives.reconstruction import PreparedReconstruction, needs_waveforms
from sslim.recipes.corpus_batches import utterance_seconds
from sslim.recipes.pretrain import PretrainRecipe
from sslim.report import Example, Restoration, save_example, save_restoration
from sslim.report.example import NO_PHONE

SHOWN_S = 4.0  # what fits on a page with its phones still readable
SEEDS = 50  # tried until an example hides something: one draw of ten leaves every frame as it is


def choose_utterance(corpus: Corpus) -> int:
    """Returns an utterance that was not trained on, where there is one, and that is long enough to fill the picture."""
    splits = corpus.column("split")
    held_out = [i for i, split in enumerate(splits) if split_role(split) in ("dev", "test")] or list(range(len(corpus)))
    duration_s = utterance_seconds(corpus)
    return next((i for i in held_out if duration_s[i] >= SHOWN_S), max(held_out, key=lambda i: duration_s[i]))


@torch.no_grad()
def make_example(
    model: SpeechModel, objective: MaskedPredictionConfig, corpus: Corpus, labels: LabelStore, *, index: int, seed: int
) -> Example:
    """Runs a model over one utterance with its own kind of mask.

    Args:
        model: In eval mode, with the objective's head.
        objective: How it was trained.
        corpus: Where the utterance comes from.
        labels: Its targets.
        index: Which utterance.
        seed: Of the mask.
    """
    assert model.frontend is not None
    base_TF = torch.from_numpy(corpus.features(index).astype(np.float32))
    features = model.frontend.finish(Padded(values=base_TF[None], lengths=torch.tensor([len(base_TF)])))
    num_frames, period_s = int(features.lengths[0]), model.frontend.frame_shift_s
    labels_T = align_labels(
        labels.get(index), label_period_s=labels.frame_period_s, frame_period_s=period_s, num_frames=num_frames
    )
    mask_BT = span_mask(features.lengths, num_frames, objective.masking, torch.Generator().manual_seed(seed))
    predictions_T = MaskedPrediction(model, objective).logits(features, mask_BT).argmax(-1)[0].numpy()
    utterance = corpus.utterance(index)
    phones_T: np.ndarray | None = None
    names: tuple[str, ...] = ()
    if utterance.alignment:
        symbols = list(frame_symbols(utterance.alignment, num_frames, period_s, frame_length_s(model.frontend.config)))
        names = tuple(sorted({symbol for symbol in symbols if symbol is not None}))
        phones_T = np.array([NO_PHONE if symbol is None else names.index(symbol) for symbol in symbols], dtype=np.int64)
    shown = slice(0, min(num_frames, round(SHOWN_S / period_s)))
    return Example(
        id=utterance.id,
        frame_shift_s=period_s,
        features_TF=_stack_means(base_TF.numpy(), model.frontend.stack, num_frames)[shown],
        labels_T=np.where(labels_T == IGNORED_LABEL, -1, labels_T)[shown],
        mask_T=mask_BT[0].numpy()[shown],
        predictions_T=predictions_T[shown],
        phones_T=None if phones_T is None else phones_T[shown],
        phone_names=names,
    )


def _stack_means(base_TF: np.ndarray, stack: int, num_frames: int) -> np.ndarray:
    """(num_frames, F): the mean of the base frames that make up each frame of the model."""
    starts = np.minimum(np.arange(num_frames) * stack, len(base_TF) - 1)
    sums = np.add.reduceat(base_TF, starts, axis=0)
    counts = np.diff(np.append(starts, len(base_TF)))
    return sums / counts[:, None]


@torch.no_grad()
def make_restoration(
    model: SpeechModel, objective: ReconstructionConfig, corpus: Corpus, *, index: int, seed: int
) -> Restoration:
    """Runs a model over one utterance, altered as in its training.

    Args:
        model: In eval mode, with the objective's head.
        objective: How it was trained.
        corpus: Where the utterance comes from.
        index: Which utterance.
        seed: Of what is altered: of this and the next few the first is taken that hides some of all there is to hide.
    """
    inputs = corpus_inputs(model, corpus, [index], waveforms=needs_waveforms(model.config, objective))
    values = inputs.read(0)
    batch = Batch(inputs=values[None], lengths=torch.tensor([len(values)]), ids=(corpus.utterance(index).id,))
    running = Reconstruction(model, objective).eval()
    prepared = next(
        (drawn for i in range(SEEDS) if _hides(drawn := running.prepare(batch, _generator(seed + i)), objective)),
        running.prepare(batch, _generator(seed)),
    )
    num_frames, stack = int(prepared.lengths_B[0]), running.stack
    shift_s = model.frontend.frame_shift_s / stack if model.frontend is not None else corpus.base_frame_shift_s

    def apart(frames_TF: torch.Tensor) -> np.ndarray:
        """Stacked frames (T, stack * F) one after the other, as far as they are shown."""
        return frames_TF[:num_frames].reshape(num_frames * stack, -1).numpy()[: round(SHOWN_S / shift_s)]

    altered = prepared.inputs.values[0]
    covered_T = prepared.time_BT[0] & objective.alteration.hides_something
    return Restoration(
        id=corpus.utterance(index).id,
        frame_shift_s=shift_s,
        original_TO=apart(prepared.target_BTO[0]),
        altered_TF=apart(altered.reshape(len(prepared.target_BTO[0]), -1)),
        restored_TO=apart(running.restore(prepared.inputs)[0].float()),
        covered_T=apart(covered_T[:, None].expand(-1, stack))[:, 0],
        channels_O=prepared.channels_BO[0].reshape(stack, -1).all(0).numpy(),  # in every frame of a stack
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _hides(prepared: PreparedReconstruction, objective: ReconstructionConfig) -> bool:
    """Whether frames are zero, and channels where the objective has that."""
    frames_BT = prepared.inputs.values.abs().sum(-1) == 0
    some = bool(frames_BT[0, : int(prepared.lengths_B[0])].any()) or not objective.alteration.time_share
    return some and (not objective.alteration.alters_channels or bool(prepared.channels_BO.any()))


def _add_clusters(run: Path, recipe: PretrainRecipe, model: SpeechModel, corpus: Corpus) -> None:
    assert isinstance(recipe.objective, MaskedPredictionConfig)
    if not reads_stored_features(model, corpus):
        return  # there is no spectrogram of a waveform model's own
    labels = corpus.labels(read_json(run / "run.json")["labels"]["name"])
    index, seed = choose_utterance(corpus), recipe.training.seed
    save_example(run, make_example(model, recipe.objective, corpus, labels, index=index, seed=seed))


def _add_restoration(run: Path, recipe: PretrainRecipe, model: SpeechModel, corpus: Corpus) -> None:
    assert isinstance(recipe.objective, ReconstructionConfig)
    index, seed = choose_utterance(corpus), recipe.training.seed
    save_restoration(run, make_restoration(model, recipe.objective, corpus, index=index, seed=seed))


EXAMPLES: dict[str, Any] = {"masked_prediction": _add_clusters, "reconstruction": _add_restoration}
"""By the objective's kind; one that is missing has no example."""


def add_example(run: Path, recipe: PretrainRecipe, corpus_folder: Path) -> None:
    """Writes an example of a finished run into its folder, for ``sslim report``.

    Args:
        run: Its folder, with ``run.json`` and ``model/``.
        recipe: What was trained.
        corpus_folder: On what.
    """
    if recipe.objective.kind in EXAMPLES:
        EXAMPLES[recipe.objective.kind](run, recipe, load_model(run / "model"), Corpus.open(corpus_folder))
