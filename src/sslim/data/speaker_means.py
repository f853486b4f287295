"""The mean of each speaker's features, as Kaldi's ``compute-cmvn-stats --spk2utt`` and ``apply-cmvn`` take them away.

They are known only when everything has been read once, so a corpus whose features lack them is prepared in two passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from sslim.data.sources import SourceUtterance


@dataclass(frozen=True, kw_only=True)
class SpeakerMeans:
    """What is to be subtracted from features.

    Attributes:
        by_speaker: Speaker to the mean (F,) float64 of all frames of theirs.
    """

    by_speaker: Mapping[str, np.ndarray] = field(default_factory=dict)

    def without(self, features_TF: np.ndarray, utterance: SourceUtterance) -> np.ndarray:
        """Returns features (T, F) float32 without their speaker's mean.

        Features that are stored and have no speaker stay as they are: they are taken to lack the mean already.
        """
        mean_F = None if utterance.speaker is None else self.by_speaker.get(utterance.speaker)
        return features_TF if mean_F is None else (features_TF - mean_F).astype(np.float32)


def check_speakers(utterances: Iterable[SourceUtterance], name: str) -> None:
    """Checks that features which are to lack their speaker's mean have a speaker, unless they are stored.

    Raises:
        ValueError: An utterance with audio has no speaker.
    """
    for utterance in utterances:
        if utterance.speaker is None and utterance.read_features is None:
            raise ValueError(
                f"features normalised by speaker need the speakers, and utterance {utterance.id!r} of {name} has none: give "
                "them with utt2spk in a Kaldi directory or a column speaker in a metadata file"
            )


def measure_speaker_means(results: Iterable[tuple[SourceUtterance, np.ndarray | str]]) -> SpeakerMeans:
    """Measures the mean of every speaker.

    Args:
        results: Each utterance with its features (T, F), or the reason why it cannot be read.
    """
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for utterance, features_TF in results:
        if isinstance(features_TF, str) or utterance.speaker is None or not np.isfinite(features_TF).all():
            continue  # the second pass puts what cannot be used into quarantine, with the reason
        sums[utterance.speaker] = sums.get(utterance.speaker, 0.0) + features_TF.sum(axis=0, dtype=np.float64)
        counts[utterance.speaker] = counts.get(utterance.speaker, 0) + len(features_TF)
    return SpeakerMeans(by_speaker={speaker: total / counts[speaker] for speaker, total in sums.items()})
