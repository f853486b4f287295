"""Checks of a corpus and its targets before hours are spent on them.

Every check yields :class:`Problem` values: what is wrong, in one sentence with the offending utterance. ``sslim doctor`` looks
at everything; a training run looks at a sample in its first seconds. A fatal problem stops a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sslim.data.corpus import Corpus
from sslim.data.labels import LabelStore, align_labels

DEAD_SHARE_WARNED = 0.05  # of the clusters; k-means on real speech leaves fewer than this unused
DEAD_SHARE_REFUSED = 0.5
MIN_CONSTANT_FRAMES = 50  # half a second of 10 ms labels with one and the same value is no speech
SILENT_SPREAD = 1e-3  # log-Mel of digital silence is constant; the quietest real recordings vary by more than 0.1

ALIGNMENT_SLACK_S = 0.05  # half a window, and what alignments in steps of 10 ms round up
LEAST_ALIGNED_SHARE = 0.5  # silence at the end may have no segment

NumFrames = Callable[[int], int]  # utterance to frames of the model


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something wrong.

    Attributes:
        sentence: What, with the utterance and the numbers.
        fatal: Whether training on it would be wasted.
    """

    sentence: str
    fatal: bool = True


def check_waveforms(corpus: Corpus, indices: Sequence[int], num_frames: NumFrames) -> Iterator[Problem]:
    """Checks the sound of the chosen utterances, for models that read it: unreadable, cut short, silent."""
    for i in indices:
        name, num_samples = corpus.utterance(i).id, int(corpus.num_samples[i])
        try:
            waveform_S = corpus.waveform(i)
        except (ValueError, OSError) as error:
            yield Problem(sentence=f"utterance {name} cannot be read: {error}")
            continue
        if len(waveform_S) < num_samples:
            yield Problem(
                sentence=f"utterance {name} has {len(waveform_S)} samples now, {num_samples} when the corpus was prepared"
            )
        elif float(np.abs(waveform_S).max(initial=0.0)) == 0.0:
            yield Problem(sentence=f"utterance {name} is silent: its {len(waveform_S)} samples are all zero")
        elif num_frames(i) < 1:
            yield Problem(sentence=f"utterance {name} has {num_samples} samples, too few for a frame", fatal=False)


def check_corpus(corpus: Corpus, indices: Sequence[int]) -> Iterator[Problem]:
    """Checks features and statistics of the chosen utterances: empty, silent, constant or non-finite."""
    if len(corpus) == 0:
        yield Problem(sentence=f"corpus {corpus.name} holds no utterances")
        return
    if corpus.statistics is not None:
        mean, std, source = corpus.statistics
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
            yield Problem(
                sentence=f"the mean and standard deviation of corpus {corpus.name} ({source}) are not finite and positive"
            )
    for i in indices:
        if corpus.num_frames[i] == 0:
            yield Problem(sentence=f"utterance {corpus.utterance(i).id} has no frames")
            continue
        features = np.asarray(corpus.features(i), dtype=np.float32)
        if not np.isfinite(features).all():
            frame = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            yield Problem(sentence=f"utterance {corpus.utterance(i).id} has a non-finite feature at frame {frame}")
        elif len(features) > 1 and float(features.std(axis=0).max()) < SILENT_SPREAD:
            yield Problem(sentence=f"utterance {corpus.utterance(i).id} is silent: its {len(features)} frames are all the same")


def check_alignments(corpus: Corpus) -> Iterator[Problem]:
    """Compares alignments with the sound: malformed ones, and those that end after it or before half of it, counted together.

    Features without sound are as long as their frames say, so a few hundredths of a second are no difference.
    """
    malformed, late, early = [], [], []
    num_aligned = 0
    for i in range(len(corpus)):
        utterance = corpus.utterance(i)
        if utterance.misaligned is not None:
            malformed.append(utterance.misaligned)
        if not utterance.alignment:
            continue
        num_aligned += 1
        end_s = max(segment.end_s for segment in utterance.alignment)
        said = f"{utterance.id} is {utterance.duration_s:.2f} s long and aligned until {end_s:.2f} s"
        if end_s > utterance.duration_s + ALIGNMENT_SLACK_S:
            late.append(said)
        elif end_s < utterance.duration_s * LEAST_ALIGNED_SHARE:
            early.append(said)
    if malformed:
        count = f"{len(malformed):,} alignments were malformed and left out (mend them and prepare another folder)"
        yield Problem(sentence=f"{count}: {malformed[0]}", fatal=False)
    for found, what in ((late, "end after the sound"), (early, "end before half of the sound")):
        if found:
            sentence = f"{len(found):,} of {num_aligned:,} alignments {what} (are they of these recordings?): {found[0]}"
            yield Problem(sentence=sentence, fatal=False)


def check_label_set(corpus: Corpus, labels: LabelStore, *, frame_period_s: float) -> Iterator[Problem]:
    """Checks what holds for the whole label set: where it comes from, its rate, its clusters."""
    if labels.corpus_digest != corpus.digest:
        yield Problem(
            sentence=f"labels {labels.name} were made for another corpus than {corpus.name} "
            f"(digest {labels.corpus_digest[:12]}, not {corpus.digest[:12]}): run `sslim cluster` on this one"
        )
    ratio = frame_period_s / labels.frame_period_s
    if ratio < 0.999 or abs(ratio - round(ratio)) > 1e-3:
        yield Problem(
            sentence=f"labels {labels.name} last {1000 * labels.frame_period_s:g} ms and the model's frames "
            f"{1000 * frame_period_s:g} ms: labels must have the same rate or a whole multiple of it"
        )


def check_labels(
    corpus: Corpus, labels: LabelStore, indices: Sequence[int], *, frame_period_s: float, num_frames: NumFrames
) -> Iterator[Problem]:
    """Checks labels of the chosen utterances against their features: missing, of another length, constant, out of range."""
    used, num_labels = np.zeros(labels.num_clusters, dtype=bool), 0
    for i in indices:
        name = corpus.utterance(i).id
        try:
            values = labels.get(i)
        except ValueError:
            yield Problem(sentence=f"utterance {name} has no labels in {labels.name}")
            continue
        try:
            align_labels(values, label_period_s=labels.frame_period_s, frame_period_s=frame_period_s, num_frames=num_frames(i))
        except ValueError as error:
            yield Problem(sentence=f"utterance {name}: {error}")
            continue
        if len(values) and (int(values.min()) < 0 or int(values.max()) >= labels.num_clusters):
            yield Problem(
                sentence=f"utterance {name} has label {int(values.max())}, the clusters of {labels.name} "
                f"are 0 to {labels.num_clusters - 1}"
            )
            continue
        if len(values) >= MIN_CONSTANT_FRAMES and (values == values[0]).all():
            yield Problem(sentence=f"utterance {name}: all its {len(values)} labels are {int(values[0])}")
        used[values] = True
        num_labels += len(values)
    yield from _dead_clusters(labels, used, num_labels)


def _dead_clusters(labels: LabelStore, used: np.ndarray, num_labels: int) -> Iterator[Problem]:
    """Judged only where there are enough labels to have met every cluster (20 for each)."""
    dead = np.flatnonzero(~used)
    if num_labels < 20 * labels.num_clusters or len(dead) <= DEAD_SHARE_WARNED * labels.num_clusters:
        return
    yield Problem(
        sentence=f"{len(dead)} of the {labels.num_clusters} clusters of {labels.name} are dead: no frame has them "
        f"(for example {dead[0]}); cluster again with fewer",
        fatal=len(dead) > DEAD_SHARE_REFUSED * labels.num_clusters,
    )


def examine(
    corpus: Corpus,
    labels: LabelStore | None,
    *,
    frame_period_s: float,
    stack: int = 1,
    waveform_frames: Callable[[int], int] | None = None,
    max_seconds: float | None = None,
    seed: int = 0,
) -> list[Problem]:
    """Runs every check.

    Args:
        corpus: What is trained on.
        labels: Its targets, if any.
        frame_period_s: Seconds between the model's frames.
        stack: Stored frames in one frame of the model.
        waveform_frames: For models that read waveforms: samples to frames. Then the sound is looked at, not the features.
        max_seconds: Look at a random sample for at most this long; None looks at everything.
        seed: Chooses the sample.
    """
    order = np.arange(len(corpus)) if max_seconds is None else np.random.default_rng(seed).permutation(len(corpus))
    problems = [] if labels is None else list(check_label_set(corpus, labels, frame_period_s=frame_period_s))
    started, block, seen = time.monotonic(), 256 if waveform_frames is None else 16, []
    if len(corpus) == 0:
        return list(check_corpus(corpus, []))

    def num_frames(i: int) -> int:
        if waveform_frames is not None:
            return waveform_frames(int(corpus.num_samples[i]))
        return -(-int(corpus.num_frames[i]) // stack)

    for first in range(0, len(order), block):
        part = order[first : first + block].tolist()
        problems += check_corpus(corpus, part) if waveform_frames is None else check_waveforms(corpus, part, num_frames)
        seen += part
        if max_seconds is not None and time.monotonic() - started > max_seconds / 2:
            break
    if labels is not None and not any(problem.fatal for problem in problems):
        problems += check_labels(corpus, labels, seen, frame_period_s=frame_period_s, num_frames=num_frames)
    return problems
