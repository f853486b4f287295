"""Which utterances are trained on: never those of a development or test set, whatever the corpus calls it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from sslim.data.audio_sources import folder_split
from sslim.data.corpus import Corpus
from sslim.data.sources import split_role
from sslim.recipes.corpus_batches import DataConfig, split_utterances


def corpus(*splits: str | None) -> Corpus:
    lengths = np.full(len(splits), 1600)
    made = SimpleNamespace(
        name="c", column=lambda name: list(splits), num_samples=lengths, num_frames=lengths, sample_rate=16000, base_dim=0
    )
    made.base_frame_shift_s = 0.0
    return cast(Corpus, made)


def chosen(splits: tuple[str | None, ...], **data: object) -> tuple[list[str | None], list[str | None]]:
    train, valid = split_utterances(corpus(*splits), DataConfig(**data), seed=0)  # type: ignore[arg-type]
    return [splits[i] for i in train], [splits[i] for i in valid]


def test_librispeechs_sets() -> None:
    splits = ("train-clean-100", "train-other-500", "dev-other", "dev-clean", "test-clean", "test-other", None)
    train, valid = chosen(splits)
    assert train == ["train-clean-100", "train-other-500", None]
    assert valid == ["dev-clean"]


def test_plain_names_come_first_and_others_are_trained_on() -> None:
    train, valid = chosen(("train", "dev-x", "valid", "latest", "test", "testing"))
    assert train == ["train", "latest", "testing"]
    assert valid == ["valid"]


def test_named_splits_win() -> None:
    train, valid = chosen(("a", "b", "dev"), valid_split="b")
    assert (train, valid) == (["a"], ["b"])
    train, valid = chosen(("a", "b", "dev-clean"), train_splits=("dev-clean",), valid_split="a")
    assert (train, valid) == (["dev-clean"], ["a"])


@pytest.mark.parametrize(
    ("name", "role", "split"),
    [
        ("train", "train", "train"),
        ("Valid", "dev", "dev"),
        ("val", "dev", "dev"),
        ("train-clean-100", "train", "train-clean-100"),
        ("dev_other", "dev", "dev_other"),
        ("test.final", "test", "test.final"),
        ("training", None, None),
        ("latest", None, None),
    ],
)
def test_roles_of_names(name: str, role: str | None, split: str | None) -> None:
    assert split_role(name) == role
    assert folder_split(name) == split
