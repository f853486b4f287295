"""Choosing a classifier: every choice is made on dev examples, test examples are scored by the caller, once, afterwards.

Two ways. With a train and a dev part, settings compete on dev and the winner is kept as it was trained. With groups (speakers)
that are left out in turn, the settings for a test group are compared by leaving out each of the other groups, and the winner is
trained again on all of them: one speaker alone is too noisy a judge (log-Mel digits, one of six speakers unseen: 53 % with one
dev speaker, 56 % with all five).
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from functools import reduce

import torch

from sslim.probes.classifiers import ClassifierConfig, Examples, ProbeClassifier, Setting, score, train_paths

MAX_INNER_GROUPS = 5  # groups that are asked about each test group's settings


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A classifier and how it was chosen.

    Attributes:
        classifier: In eval mode.
        setting: What dev chose.
        dev_accuracy: What it reached there; a mean over dev groups where there are several, before the last training.
    """

    classifier: ProbeClassifier
    setting: Setting
    dev_accuracy: float

    @property
    def chosen(self) -> dict[str, float | int]:
        """The setting as the result card tells it."""
        name, value, epochs = self.setting
        return {name: value} | ({"epochs": epochs} if epochs else {})


def check_parts(**parts: Sized) -> None:
    """Raises ValueError for a part without examples."""
    for name, examples in parts.items():
        if not len(examples):
            raise ValueError(f"there are no {name} examples: the split leaves that part empty")


def fit(train: Examples, dev: Examples, *, num_classes: int, config: ClassifierConfig, seed: int) -> Fitted:
    """Trains on ``train`` and keeps the setting that is best on ``dev``: by accuracy, then by loss, then the first tried.

    Args:
        train: Training examples.
        dev: Examples of the choice.
        num_classes: V.
        config: What to try.
        seed: Of the initial weights and the order of batches.

    Raises:
        ValueError: Train or dev is empty.
    """
    check_parts(training=train, dev=dev)
    best, kept = (-1.0, 0.0), None
    for path in train_paths(train, num_classes=num_classes, config=config, seed=seed):
        path_best, stale = -1.0, 0
        for setting, classifier in path:
            accuracy, loss = score(classifier, dev)
            if (accuracy, -loss) > best:
                best, kept = (accuracy, -loss), (setting, {k: v.detach().clone() for k, v in classifier.state_dict().items()})
            stale = 0 if accuracy > path_best else stale + 1
            path_best = max(path_best, accuracy)
            if setting[2] and stale >= config.patience:
                break
    assert kept is not None
    classifier.load_state_dict(kept[1])
    return Fitted(classifier=classifier, setting=kept[0], dev_accuracy=best[0])


def fit_leaving_out(groups: Sequence[Examples], *, num_classes: int, config: ClassifierConfig, seed: int) -> list[Fitted]:
    """Returns, for each group, a classifier chosen and trained on the other groups alone.

    Training without groups a and b serves twice: judged on b it is a vote for the settings of test group a, and the other way
    round. Votes of a test group never count for itself.

    Args:
        groups: At least three, over the same store.
        num_classes: V.
        config: What to try.
        seed: Of the initial weights and the order of batches.

    Raises:
        ValueError: Fewer than three groups, or an empty one.
    """
    if len(groups) < 3:
        raise ValueError(
            f"leaving one group out needs at least 3 of them (one to test, one to choose, one to train), not {len(groups)}"
        )
    check_parts(**{f"group {number}": group for number, group in enumerate(groups, 1)})
    count, num_examples = len(groups), sum(map(len, groups))
    inner = min(MAX_INNER_GROUPS, count - 1)
    judges = [[(test + step) % count for step in range(1, inner + 1)] for test in range(count)]
    votes: dict[tuple[int, int], dict[Setting, float]] = {}  # (test group, its judge) -> accuracies
    for first, second in sorted({(min(a, b), max(a, b)) for a in range(count) for b in judges[a]}):
        train = _joined([group for index, group in enumerate(groups) if index not in (first, second)])
        tables = _accuracies(train, [groups[first], groups[second]], num_classes, config, seed, num_examples)
        votes[second, first], votes[first, second] = tables
    return [
        _refit(groups, test, [votes[test, judge] for judge in judges[test]], num_classes, config, seed, num_examples)
        for test in range(count)
    ]


def _joined(parts: Sequence[Examples]) -> Examples:
    return reduce(lambda one, other: replace(one, rows=torch.cat([one.rows, other.rows])), parts)


def _accuracies(
    train: Examples, devs: Sequence[Examples], num_classes: int, config: ClassifierConfig, seed: int, sized_as: int
) -> list[dict[Setting, float]]:
    """Each dev part's accuracy for every setting, as far as it would have gone on alone: parts do not stop one another."""
    tables: list[dict[Setting, float]] = [{} for _ in devs]
    for path in train_paths(train, num_classes=num_classes, config=config, seed=seed, sized_as=sized_as):
        best, stale = [-1.0] * len(devs), [0] * len(devs)
        for setting, classifier in path:
            for index, dev in enumerate(devs):
                if setting[2] and stale[index] >= config.patience:
                    continue
                accuracy = tables[index][setting] = score(classifier, dev)[0]
                stale[index] = 0 if accuracy > best[index] else stale[index] + 1
                best[index] = max(best[index], accuracy)
            if setting[2] and min(stale) >= config.patience:
                break
    return tables


def _refit(
    groups: Sequence[Examples],
    test: int,
    votes: Sequence[dict[Setting, float]],
    num_classes: int,
    config: ClassifierConfig,
    seed: int,
    sized_as: int,
) -> Fitted:
    """Trains on all groups but ``test`` with the setting of the best mean accuracy; the first tried of equals."""
    means = {s: sum(vote[s] for vote in votes) / len(votes) for s in votes[0] if all(s in vote for vote in votes)}
    setting = max(means, key=means.__getitem__)
    name, value, epochs = setting
    narrowed = (
        replace(config, weight_decays=tuple(decay for decay in config.weight_decays if decay >= value))
        if name == "weight_decay"
        else replace(config, learning_rates=(value,), max_epochs=epochs)
    )
    train = _joined([group for index, group in enumerate(groups) if index != test])
    classifier: ProbeClassifier | None = None
    for path in train_paths(train, num_classes=num_classes, config=narrowed, seed=seed, sized_as=sized_as):
        for reached in path:
            classifier = reached[1]
    assert classifier is not None
    return Fitted(classifier=classifier, setting=setting, dev_accuracy=means[setting])
