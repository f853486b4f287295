"""One utterance for the report: what went in, what was hidden, what the model said, and what was really spoken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sslim.batch import IGNORED_LABEL, Padded
from sslim.data.alignment import frame_symbols, overhang_s
from sslim.data.corpus import Corpus
from sslim.data.labels import LabelStore, align_labels
from sslim.models import SpeechModel
from sslim.objectives import MaskedPrediction, MaskedPredictionConfig, span_mask
from sslim.report import Example, save_example
from sslim.report.example import NO_PHONE

SHOWN_S = 4.0  # what fits on a page with its phones still readable
HELD_OUT_SPLITS = ("dev", "valid", "validation", "test")


def choose_utterance(corpus: Corpus) -> int:
    """Returns an utterance that was not trained on, where there is one, and that is long enough to fill the picture."""
    splits = corpus.column("split")
    held_out = [i for i, split in enumerate(splits) if split in HELD_OUT_SPLITS] or list(range(len(corpus)))
    duration_s = corpus.num_frames * corpus.base_frame_shift_s
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
        symbols = list(frame_symbols(utterance.alignment, num_frames, period_s, period_s + overhang_s(corpus)))
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


def add_example(
    run: Path, model: SpeechModel, objective: MaskedPredictionConfig, corpus: Corpus, labels: LabelStore, *, seed: int
) -> None:
    """Writes an example of a trained model into its run folder, for ``sslim report``."""
    save_example(run, make_example(model, objective, corpus, labels, index=choose_utterance(corpus), seed=seed))
