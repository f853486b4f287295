"""Which utterances train, which choose, which test.

Either three parts, from the manifest or drawn at random, or groups of speakers that are left out in turn. The draw depends on
its own seed, not on the seeds of the classifiers, so that all rows of a table and all seeds see the same utterances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from sslim.config import OMIT_DEFAULT
from sslim.probes.cpc_split import split_by_lists, split_by_rule

DEV_SHARE = TEST_SHARE = 0.1
# A split's name is recognised by how it starts: ``train-clean-100``, ``dev-other``, ``validation``, ``testing``.
PART_PREFIXES = {"train": "train", "dev": "dev", "val": "dev", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How utterances are divided.

    Attributes:
        source: ``manifest`` uses its split column, ``random`` draws 80/10/10, ``auto`` takes the manifest's where it has train
            and test parts and every class of the test part can be learnt from the train part; ``cpc`` is that of CPC's lists
            (see ``sslim.probes.cpc_split``).
        folds: ``speaker`` leaves each speaker out in turn; None divides once.
        num_folds: At most so many groups; more speakers than that share groups.
        speaker_disjoint: For random parts: no speaker in two of them.
        seed: Of the draw.
        lists: For ``cpc``: the folder of its lists; None for the rule that stands in for them.
    """

    source: Literal["auto", "manifest", "random", "cpc"] = "auto"
    folds: Literal["speaker"] | None = None
    num_folds: int = 10
    speaker_disjoint: bool = False
    seed: int = 0
    lists: str | None = field(default=None, metadata={OMIT_DEFAULT: True})

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"the seed of a split is {self.seed}; expected at least 0")
        if self.lists is not None and (self.source != "cpc" or self.folds is not None):
            raise ValueError(f"the lists {self.lists} are for the split 'cpc', and {self.folds or self.source!r} was asked for")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Positions of the utterances of each part.

    Attributes:
        train: To fit.
        dev: To choose.
        test: To score, once.
        description: For the result card.
    """

    train: np.ndarray
    dev: np.ndarray
    test: np.ndarray
    description: str


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Positions of the utterances of each group that is left out in turn.

    Attributes:
        members: One array for each group.
        names: Of the groups: their speakers.
        description: For the result card.
    """

    members: tuple[np.ndarray, ...]
    names: tuple[str, ...]
    description: str


def divide(
    classes_N: np.ndarray | None,
    splits: Sequence[str | None],
    speakers: Sequence[str | None],
    config: SplitConfig,
    ids: Sequence[str] = (),
) -> Parts | Groups:
    """Divides N utterances.

    Args:
        classes_N: (N,) int64 class of each utterance, for stratified draws; None when classes belong to frames.
        splits: The manifest's split of each.
        speakers: The manifest's speaker of each.
        config: How.
        ids: Names of the utterances, for CPC's split.

    Raises:
        ValueError: The manifest lacks what ``config`` asks for, or there is too little of it.
    """
    if config.folds == "speaker":
        return _speaker_groups(classes_N, speakers, config)
    if config.source == "cpc":
        return _cpc_parts(ids, speakers, config)
    if config.source != "random":
        parts = [_part_of(split) for split in splits]
        reason = _unusable(parts, classes_N)
        if not reason:
            return _manifest_parts(parts, classes_N, config)
        if config.source == "manifest":
            raise ValueError(f"the manifest's split cannot be used: {reason}; a random split is made with --split random")
    return _random_parts(classes_N, speakers, len(splits), config)


def _cpc_parts(ids: Sequence[str], speakers: Sequence[str | None], config: SplitConfig) -> Parts:
    if config.lists is None:
        parts, description = split_by_rule(ids, speakers, config.seed)
    else:
        parts, description = split_by_lists(ids, Path(config.lists), config.seed)
    return Parts(**parts, description=description)


def _part_of(split: str | None) -> str | None:
    name = (split or "").lower()
    return next((part for prefix, part in PART_PREFIXES.items() if name.startswith(prefix)), None)


def _unusable(parts: Sequence[str | None], classes_N: np.ndarray | None) -> str:
    for name in ("train", "test"):
        if name not in parts:
            return f"no utterance is marked {name}"
    if classes_N is not None:
        where = np.array([part or "" for part in parts])
        unseen = set(classes_N[where == "test"].tolist()) - set(classes_N[where == "train"].tolist())
        if unseen:
            return f"{len(unseen)} classes of its test part never occur in its train part"
    return ""


def _manifest_parts(parts: Sequence[str | None], classes_N: np.ndarray | None, config: SplitConfig) -> Parts:
    where = np.array([part or "" for part in parts])
    train, dev, test = (np.flatnonzero(where == name) for name in ("train", "dev", "test"))
    description = "train, dev and test of the manifest"
    if not len(dev):
        strata = np.zeros(len(where), dtype=np.int64) if classes_N is None else classes_N
        chosen = _draw(strata[train], DEV_SHARE, np.random.default_rng(config.seed))
        dev, train = train[chosen], np.delete(train, chosen)
        description = f"train and test of the manifest, dev a tenth of train (seed {config.seed})"
    return Parts(train=train, dev=dev, test=test, description=description)


def _draw(strata_N: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Positions of a share of each stratum; at least one of each that has three."""
    chosen = []
    for stratum in np.unique(strata_N):
        members = generator.permutation(np.flatnonzero(strata_N == stratum))
        count = round(share * len(members))
        chosen.append(members[: max(count, 1 if len(members) >= 3 else 0)])
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.int64)


def _random_parts(
    classes_N: np.ndarray | None, speakers: Sequence[str | None], num_utterances: int, config: SplitConfig
) -> Parts:
    generator = np.random.default_rng(config.seed)
    if config.speaker_disjoint:
        return _disjoint_parts(_speaker_numbers(speakers, 3), generator, config.seed)
    strata_N = np.zeros(num_utterances, dtype=np.int64) if classes_N is None else classes_N
    test = _draw(strata_N, TEST_SHARE, generator)
    rest = np.delete(np.arange(num_utterances), test)
    chosen = _draw(strata_N[rest], DEV_SHARE / (1 - TEST_SHARE), generator)
    description = (
        f"random 80/10/10 of the utterances{'' if classes_N is None else ', stratified by class'} (seed {config.seed})"
    )
    return Parts(train=np.delete(rest, chosen), dev=rest[chosen], test=test, description=description)


def _speaker_numbers(speakers: Sequence[str | None], at_least: int) -> np.ndarray:
    missing = sum(speaker is None for speaker in speakers)
    if missing:
        raise ValueError(
            f"{missing} of {len(speakers)} utterances have no speaker in the manifest, so speakers cannot be kept apart"
        )
    numbers = np.unique(np.array([str(s) for s in speakers]), return_inverse=True)[1]
    count = int(numbers.max()) + 1 if len(numbers) else 0
    if count < at_least:
        raise ValueError(
            f"the corpus has {count} speakers; keeping them apart in train, dev and test needs at least {at_least}"
        )
    return numbers


def _disjoint_parts(speakers_N: np.ndarray, generator: np.random.Generator, seed: int) -> Parts:
    order = generator.permutation(speakers_N.max() + 1)
    counts = np.bincount(speakers_N)[order]
    wanted = TEST_SHARE * len(speakers_N)
    ends = np.cumsum(counts)
    num_test = int(np.searchsorted(ends, wanted)) + 1
    num_dev = int(np.searchsorted(ends - ends[num_test - 1], wanted)) + 1 - num_test
    num_test, num_dev = min(num_test, len(order) - 2), max(num_dev, 1)
    num_dev = min(num_dev, len(order) - num_test - 1)
    test, dev, train = np.split(order, [num_test, num_test + num_dev])
    positions = [np.flatnonzero(np.isin(speakers_N, part)) for part in (train, dev, test)]
    description = f"random 80/10/10 with {len(train)}, {len(dev)} and {len(test)} speakers apart (seed {seed})"
    return Parts(train=positions[0], dev=positions[1], test=positions[2], description=description)


def _speaker_groups(classes_N: np.ndarray | None, speakers: Sequence[str | None], config: SplitConfig) -> Groups:
    if config.num_folds < 3:
        raise ValueError(f"{config.num_folds} folds are too few: one tests, one chooses, one trains; ask for at least 3")
    numbers = _speaker_numbers(speakers, 3)
    names = sorted({str(s) for s in speakers})
    count = min(config.num_folds, len(names))
    members = tuple(np.flatnonzero(numbers % count == group) for group in range(count))
    if classes_N is not None:
        for group in range(count):
            rest = np.concatenate([m for other, m in enumerate(members) if other != group])
            if not set(classes_N[members[group]].tolist()) & set(classes_N[rest].tolist()):
                raise ValueError(
                    "no class of a left-out speaker occurs in the others: this task cannot be learnt with speaker folds"
                )
    each = "each speaker" if count == len(names) else f"each of {count} groups of speakers"
    description = (
        f"{each} left out in turn ({len(names)} speakers); settings chosen by leaving out each of the others, "
        "then trained on all the others; mean over folds"
    )
    return Groups(members=members, names=tuple(", ".join(names[g::count]) for g in range(count)), description=description)
