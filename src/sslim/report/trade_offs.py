"""What probed models cost: result cards and profiles joined by model, one comparison for each task.

Models are joined by the digest of their tensors, or by their resolved path where a card does not say it. Models of equal
tensors but different descriptions (narrower windows, say) exist: where a digest stands for several, name or path must agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslim.report.cards import MODEL, Row, best_of_each, scale_of

if TYPE_CHECKING:
    from sslim.profiling import Conditions
    from sslim.profiling.profile import Profile, ProfiledModel

LOWER_IS_BETTER = ("error", "loss", "perplexity", "wer", "per", "cer", "eer")  # words of a metric's name
FEATURES = "features"


@dataclass(frozen=True, kw_only=True)
class Costed:
    """A probed model and its costs, as far as they are known.

    Attributes:
        name: Of the model.
        score: Mean over seeds, as it is shown.
        sd: Standard deviation over seeds, likewise; None for a single one.
        num_parameters: Without heads.
        macs: MACs for each second of speech, by the length of the utterances in seconds.
        latency_ms: Median latency, by number of the profile and conditions.
    """

    name: str
    score: float
    sd: float | None
    num_parameters: int | None = None
    macs: Mapping[float, float] = field(default_factory=dict)
    latency_ms: Mapping[tuple[int, Conditions], float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All models that were probed on one task in one way.

    Attributes:
        title: Task and corpus.
        metric: Unit of the scores.
        lower_is_better: Whether the metric is an error.
        places: Decimal places of scores.
        models: With their costs.
        references: Baselines without a cost, by name.
        notes: What was left out, and why; one sentence each.
    """

    title: str
    metric: str
    lower_is_better: bool
    places: int
    models: tuple[Costed, ...]
    references: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def seconds(self) -> float | None:
        """The length of utterances that MACs of most models are known for, the longest of several; None without any."""
        lengths = [length for model in self.models for length in model.macs]
        return max(set(lengths), key=lambda length: (lengths.count(length), length), default=None)

    def measurements(self) -> list[tuple[int, Conditions]]:
        """The profiles and conditions that two models or more were measured under, in order."""
        keys = [key for model in self.models for key in model.latency_ms]
        return sorted({key for key in keys if keys.count(key) > 1}, key=lambda key: (key[0], keys.index(key)))


def compare(cards: Sequence[tuple[Mapping[str, Any], Sequence[Row]]], profiles: Sequence[Profile]) -> list[Comparison]:
    """Joins cards and profiles.

    Args:
        cards: Values and rows of each, see ``sslim.report.cards.read_card``.
        profiles: Measurements.

    Returns:
        A comparison for each task, corpus and protocol of which two models or more were probed.
    """
    shared = _shared_digests([row for _, rows in cards for row in rows], profiles)
    groups: dict[str, list[tuple[Mapping[str, Any], Sequence[Row]]]] = {}
    for card, rows in cards:
        groups.setdefault(_way_of_probing(card), []).append((card, rows))
    found = [_comparison(group, profiles, shared) for group in groups.values()]
    return [comparison for comparison in found if len(comparison.models) > 1]


def _way_of_probing(card: Mapping[str, Any]) -> str:
    """What must be equal for scores to be comparable: task, metric, corpus, protocol."""
    corpus, protocol = card.get("corpus"), card.get("protocol")
    corpus = corpus.get("digest", corpus.get("name")) if isinstance(corpus, Mapping) else corpus
    return json.dumps([card.get("task"), card.get("metric"), corpus, protocol], sort_keys=True, default=str)


def _shared_digests(rows: Sequence[Row], profiles: Sequence[Profile]) -> set[str]:
    """Digests that stand for several models: of several names in cards, or of several models in one profile."""
    pairs = {(row.digest, row.name) for row in rows if row.digest}
    digests = [digest for digest, _ in pairs]
    shared = {digest for digest in digests if digests.count(digest) > 1}
    for profile in profiles:
        own = [model.digest for model in profile.models if model.digest]
        shared |= {digest for digest in own if own.count(digest) > 1}
    return shared


def is_same(row: Row, model: ProfiledModel, shared: set[str]) -> bool:
    """Whether a card's row and a profile's model are one and the same.

    Args:
        row: Of a card.
        model: Of a profile.
        shared: Digests that stand for several models.
    """
    same_place = bool(row.path and model.path) and Path(row.path).resolve() == Path(model.path).resolve()
    if not (row.digest and model.digest):
        return same_place
    if row.digest != model.digest:
        return False
    return row.digest not in shared or same_place or row.name == model.name


def _comparison(
    group: Sequence[tuple[Mapping[str, Any], Sequence[Row]]], profiles: Sequence[Profile], shared: set[str]
) -> Comparison:
    card = group[0][0]
    metric, factor, places = scale_of(card, [row for _, rows in group for row in rows])
    chosen: dict[tuple[str, str], Row] = {}
    references: dict[str, float] = {}
    notes = []
    for _, rows in sorted(group, key=lambda pair: str(pair[0].get("date", ""))):
        for row in best_of_each(rows):
            if row.kind == FEATURES:
                references[row.name] = factor * row.mean
            elif row.kind == MODEL:
                key = (row.digest or row.path, row.name)
                notes += [f"{row.full_name} was probed more than once: the newest result counts."] if key in chosen else []
                chosen[key] = row
    models = tuple(_costed(row, factor, profiles, shared) for row in chosen.values())
    corpus = card.get("corpus")
    corpus_name = corpus.get("name") if isinstance(corpus, Mapping) else corpus
    return Comparison(
        title=f"{card.get('task')} on {corpus_name or 'an unnamed corpus'}",
        metric=metric,
        lower_is_better=any(word in LOWER_IS_BETTER for word in metric.lower().replace("_", " ").split()),
        places=places,
        models=models,
        references=references,
        notes=tuple(dict.fromkeys(notes)),
    )


def _costed(row: Row, factor: float, profiles: Sequence[Profile], shared: set[str]) -> Costed:
    macs, latency_ms, num_parameters = {}, {}, row.num_parameters
    if row.macs_seconds is not None and row.macs_per_second is not None:
        macs[row.macs_seconds] = row.macs_per_second
    for number, profile in enumerate(profiles):
        for model in profile.models:
            if not is_same(row, model, shared):
                continue
            num_parameters = model.num_parameters if num_parameters is None else num_parameters
            for measured in profile.rows:
                if measured.model == model.name:
                    macs[measured.conditions.seconds] = measured.macs_per_second
                    latency_ms[number, measured.conditions] = measured.p50_ms
    return Costed(
        name=row.full_name,
        score=factor * row.mean,
        sd=None if row.sd is None else factor * row.sd,
        num_parameters=num_parameters,
        macs=macs,
        latency_ms=latency_ms,
    )
