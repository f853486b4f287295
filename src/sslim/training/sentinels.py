"""Early signs that a run goes wrong: plain functions from the train records so far to one sentence, or None.

They look at deterministic fields only, so a resumed run warns exactly where the uninterrupted one does. Each warns once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from sslim.training.protocols import Record, Sentinel

RECENT = 3  # records that must agree


def _recent(records: Sequence[Record], names: tuple[str, ...], after_step: int) -> list[list[float]] | None:
    """Returns the last values of each name, or None while it is too early or one is missing."""
    last = records[-RECENT:]
    if len(last) < RECENT or last[0]["step"] < after_step:
        return None
    columns = [[record.get(name) for record in last] for name in names]
    if any(value is None for column in columns for value in column):
        return None
    return columns  # type: ignore[return-value]


def unmasked_not_above_masked(records: Sequence[Record], *, after_step: int) -> str | None:
    """A model that sees a frame should name its cluster better than one that must guess it."""
    recent = _recent(records, ("masked_accuracy", "unmasked_accuracy"), after_step)
    if recent is None or any(unmasked > masked for masked, unmasked in zip(*recent, strict=True)):
        return None
    return (
        f"after {records[-1]['step']} steps frames the model sees are predicted no better ({recent[1][-1]:.1%}) than "
        f"hidden ones ({recent[0][-1]:.1%}): labels and features may not belong together, or the learning rate may be too high"
    )


def predictions_collapsed(records: Sequence[Record], *, after_step: int) -> str | None:
    """The average prediction should be about as varied as the targets."""
    recent = _recent(records, ("mean_prediction_entropy", "target_entropy"), after_step)
    if recent is None or any(predicted > 0.1 * target for predicted, target in zip(*recent, strict=True)):
        return None
    return (
        f"after {records[-1]['step']} steps all predictions fall on about {math.exp(recent[0][-1]):.1f} clusters "
        f"while the targets use {math.exp(recent[1][-1]):.0f}: the model has collapsed, "
        "try a lower learning rate or a longer warm-up"
    )


def targets_poor(records: Sequence[Record], *, num_clusters: int) -> str | None:
    """Targets that use few clusters teach little."""
    recent = _recent(records, ("target_entropy",), 0)
    floor = max(2.0, 0.05 * num_clusters)
    if recent is None or any(math.exp(entropy) >= floor for entropy in recent[0]):
        return None
    return (
        f"the targets of a step use about {math.exp(recent[0][-1]):.1f} of {num_clusters} clusters: look at the labels with "
        "`sslim doctor`, or cluster again with fewer"
    )


def loss_above_guessing(records: Sequence[Record], *, num_clusters: int, after_step: int) -> str | None:
    """A guess that knows nothing has a cross-entropy of ln(K)."""
    recent = _recent(records, ("masked_loss",), after_step)
    if recent is None or any(loss <= math.log(num_clusters) for loss in recent[0]):
        return None
    return (
        f"after {records[-1]['step']} steps the loss {recent[0][-1]:.2f} is still above that of a blind guess "
        f"among {num_clusters} clusters, {math.log(num_clusters):.2f}: lower the learning rate, or "
        "check the labels with `sslim doctor`"
    )


def masked_prediction_sentinels(num_clusters: int, *, after_step: int = 500) -> dict[str, Sentinel]:
    """Returns the sentinels for masked prediction of cluster ids.

    Args:
        num_clusters: K.
        after_step: Steps that a healthy run may need before it is judged.
    """
    return {
        "unmasked_not_above_masked": partial(unmasked_not_above_masked, after_step=after_step),
        "predictions_collapsed": partial(predictions_collapsed, after_step=after_step),
        "targets_poor": partial(targets_poor, num_clusters=num_clusters),
        "loss_above_guessing": partial(loss_above_guessing, num_clusters=num_clusters, after_step=after_step),
    }


def restores_only_the_mean(records: Sequence[Record], *, after_step: int) -> str | None:
    """A model that has learnt anything restores frames better than the mean frame of their utterance would."""
    recent = _recent(records, ("altered_loss", "mean_frame_loss"), after_step)
    if recent is None or any(loss < 0.98 * mean for loss, mean in zip(*recent, strict=True)):
        return None
    return (
        f"after {records[-1]['step']} steps what was altered is restored no better (loss {recent[0][-1]:.3f}) than by the mean "
        f"frame of each utterance ({recent[1][-1]:.3f}): try a lower learning rate or a longer warm-up"
    )


def reconstruction_sentinels(*, after_step: int = 500) -> dict[str, Sentinel]:
    """Returns the sentinels for masked reconstruction.

    Args:
        after_step: Steps that a healthy run may need before it is judged.
    """
    return {"restores_only_the_mean": partial(restores_only_the_mean, after_step=after_step)}


def predicts_like_a_guess(records: Sequence[Record], *, guesses: Sequence[str], after_step: int) -> str | None:
    """A model that has learnt anything predicts frames better than a frame that is at hand."""
    for name in guesses:
        recent = _recent(records, ("predicted_loss", f"{name.replace(' ', '_')}_loss"), after_step)
        if recent is not None and all(loss >= 0.98 * guess for loss, guess in zip(*recent, strict=True)):
            return (
                f"after {records[-1]['step']} steps frames are predicted no better (loss {recent[0][-1]:.3f}) than by the "
                f"{name} ({recent[1][-1]:.3f}): try a lower learning rate or a longer warm-up"
            )
    return None


def feature_prediction_sentinels(*guesses: str, after_step: int = 500) -> dict[str, Sentinel]:
    """Returns the sentinels for prediction of features.

    Args:
        *guesses: What predictions are compared with, in words: ``mean frame``, ``same frame``.
        after_step: Steps that a healthy run may need before it is judged.
    """
    return {"predicts_like_a_guess": partial(predicts_like_a_guess, guesses=guesses, after_step=after_step)}


SENTINELS: dict[str, Callable[..., dict[str, Sentinel]]] = {
    "masked_prediction": masked_prediction_sentinels,
    "reconstruction": reconstruction_sentinels,
    "autoregressive": partial(feature_prediction_sentinels, "mean frame", "same frame"),
    "npc": partial(feature_prediction_sentinels, "mean frame"),
}
"""By kind of objective."""
