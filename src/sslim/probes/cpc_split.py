"""The split of LibriSpeech's train-clean-100 that CPC's and S3PRL's probes have, and a rule that stands in for it.

The lists ``train_split.txt`` and ``test_split.txt`` come from their authors (Rivière et al., "Unsupervised pretraining
transfers well across languages", arXiv 2002.02848): 22,830 and 5,708 utterances. S3PRL shuffles the first with Python's
generator and takes 90 % of it to train and the rest as its dev part: 20,547 and 2,283, which depend on the seed (1337 unless
told otherwise).

Without the lists a rule divides any corpus alike: the first fifth of each speaker's utterances, ordered by the SHA-256 of their
names, tests; the others, in the order of their names, go the way of the train list.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sslim.data.text_files import read_lines

TRAIN_LIST, TEST_LIST = "train_split.txt", "test_split.txt"
TRAIN_SHARE = 0.9
TEST_SHARE = 0.2
SEED = 1337


def shuffled_train_and_dev(names: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Returns S3PRL's train and dev names: the list shuffled by Python's generator, its first 90 %, and the rest.

    Args:
        names: In the order of the file, which counts.
        seed: Of the shuffle.
    """
    shuffled = list(names)
    random.Random(seed).shuffle(shuffled)
    num_train = int(len(shuffled) * TRAIN_SHARE)
    return shuffled[:num_train], shuffled[num_train:]


def read_list(path: Path) -> list[str]:
    """Reads a list of utterance names, one on each line.

    Raises:
        ValueError: It cannot be read, is empty, or has a name twice.
    """
    try:
        names = " ".join(read_lines(path)).split()
    except ValueError as error:
        raise ValueError(f"the list {error}") from error
    if not names:
        raise ValueError(f"the list {path} is empty; it should have the name of an utterance on each line")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the list {path} has {twice!r} more than once")
    return names


def split_by_lists(ids: Sequence[str], folder: Path, seed: int) -> tuple[dict[str, np.ndarray], str]:
    """Divides utterances as the published lists do.

    Args:
        ids: Of the utterances; the part after the last ``/`` is what the lists name.
        folder: Where ``train_split.txt`` and ``test_split.txt`` lie.
        seed: Of the draw of the dev part.

    Returns:
        Positions of the train, dev and test part, and a description.

    Raises:
        ValueError: A list cannot be read, they share utterances, or name none of these.
    """
    train_list, test_list = read_list(folder / TRAIN_LIST), read_list(folder / TEST_LIST)
    if shared := set(train_list) & set(test_list):
        raise ValueError(f"the lists in {folder} share {len(shared):,} utterances, {min(shared)!r} for example")
    train, dev = shuffled_train_and_dev(train_list, seed)
    position: dict[str, int] = {}
    for place, utterance in enumerate(ids):
        name = utterance.rpartition("/")[2]
        if name in position:
            raise ValueError(f"{ids[position[name]]!r} and {utterance!r} are both {name!r} to the lists in {folder}")
        position[name] = place
    parts = {}
    for name, members in (("train", train), ("dev", dev), ("test", test_list)):
        found = [position[member] for member in members if member in position]
        if not found:
            raise ValueError(
                f"none of the {len(members):,} {name} utterances of the lists in {folder} is among these {len(ids):,}: "
                f"they have {members[0]!r}, for example, and these {ids[0]!r}"
            )
        parts[name] = np.sort(np.array(found, dtype=np.int64))
    used, listed = sum(map(len, parts.values())), len(train_list) + len(test_list)
    missing = "" if used == listed else f"; {listed - used:,} of the {listed:,} listed took no part"
    return parts, f"CPC's lists, dev a tenth of its train list (seed {seed}){missing}"


def split_by_rule(ids: Sequence[str], speakers: Sequence[str | None], seed: int) -> tuple[dict[str, np.ndarray], str]:
    """Divides utterances by the rule that stands in for the lists: who has three utterances or more is in the test part.

    Args:
        ids: Of the utterances.
        speakers: Of each; utterances without one count as one speaker's.
        seed: Of the draw of the dev part.

    Returns:
        Positions of the train, dev and test part, and a description.
    """
    names = [name.rpartition("/")[2] for name in ids]
    members: dict[str, list[int]] = {}
    for position, speaker in enumerate(speakers):
        members.setdefault(speaker or "", []).append(position)
    test: list[int] = []
    for positions in members.values():
        ordered = sorted(positions, key=lambda position: hashlib.sha256(names[position].encode()).hexdigest())
        test += ordered[: round(TEST_SHARE * len(ordered))]
    chosen = set(test)
    rest = sorted((position for position in range(len(ids)) if position not in chosen), key=names.__getitem__)
    order = {f"{names[position]} {position}": position for position in rest}
    train, dev = shuffled_train_and_dev(list(order), seed)
    parts = {
        "train": np.sort(np.array([order[name] for name in train], dtype=np.int64)),
        "dev": np.sort(np.array([order[name] for name in dev], dtype=np.int64)),
        "test": np.sort(np.array(test, dtype=np.int64)),
    }
    return parts, f"by rule in place of CPC's lists: a fifth of each speaker tests, dev a tenth of the rest (seed {seed})"
