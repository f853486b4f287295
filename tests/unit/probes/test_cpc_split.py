import random

import numpy as np
import pytest

from sslim.probes.cpc_split import shuffled_train_and_dev, split_by_lists, split_by_rule
from sslim.probes.protocol import SplitConfig, divide

NUM_TRAIN, NUM_TEST = 22_830, 5_708  # of the published lists


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpc_phone")
    names = [f"{speaker}-{number // 100}-{number % 100:04d}" for speaker in range(251) for number in range(114)]
    random.Random(0).shuffle(names)
    (folder / "train_split.txt").write_text("\n".join(names[:NUM_TRAIN]) + "\n")
    (folder / "test_split.txt").write_text("\n".join(names[NUM_TRAIN : NUM_TRAIN + NUM_TEST]) + "\n")
    return folder, names[: NUM_TRAIN + NUM_TEST]


def test_sizes_and_members_are_those_of_s3prl(lists):
    folder, names = lists
    ids = [f"train-clean-100/{name}" for name in sorted(names)]
    config = SplitConfig(source="cpc", seed=1337, lists=str(folder))
    parts = divide(None, [None] * len(ids), [None] * len(ids), config, ids)
    assert [len(part) for part in (parts.train, parts.dev, parts.test)] == [20_547, 2_283, 5_708]
    # what S3PRL does: the module's own generator, seeded, over the list in the file's order
    expected = (folder / "train_split.txt").read_text().split()
    state = random.getstate()
    random.seed(1337)
    random.shuffle(expected)
    random.setstate(state)
    assert {ids[p].rpartition("/")[2] for p in parts.dev} == set(expected[int(NUM_TRAIN * 0.9) :])
    assert {ids[p].rpartition("/")[2] for p in parts.train} == set(expected[: int(NUM_TRAIN * 0.9)])
    other = shuffled_train_and_dev((folder / "train_split.txt").read_text().split(), 0)[1]
    assert set(other) != set(expected[int(NUM_TRAIN * 0.9) :])  # control: another seed, another dev part
    assert "took no part" not in parts.description


def test_utterances_that_are_missing_are_counted_and_wrong_lists_refused(lists, tmp_path):
    folder, names = lists
    some = sorted(names)[::3]
    parts, description = split_by_lists(some, folder, 1337)
    used = sum(map(len, parts.values()))
    assert used == len(some)
    assert f"{len(names) - used:,} of the {len(names):,} listed took no part" in description
    with pytest.raises(ValueError, match="none of the 20,547 train utterances"):
        split_by_lists(["x-1"], folder, 1337)
    with pytest.raises(ValueError, match=r"train_split\.txt cannot be read"):
        split_by_lists(some, tmp_path, 1337)
    (tmp_path / "train_split.txt").write_text("a b b")
    with pytest.raises(ValueError, match="'b' more than once"):
        split_by_lists(some, tmp_path, 1337)
    (tmp_path / "train_split.txt").write_text("a b")
    (tmp_path / "test_split.txt").write_text("b c")
    with pytest.raises(ValueError, match="share 1 utterances, 'b'"):
        split_by_lists(some, tmp_path, 1337)
    with pytest.raises(ValueError, match="for the split 'cpc', and 'random' was asked for"):
        SplitConfig(source="random", lists=str(tmp_path))


def test_the_rule_divides_every_speaker_and_does_not_depend_on_order():
    ids = [f"s{i % 7}-{i}" for i in range(350)]
    speakers = [name.partition("-")[0] for name in ids]
    parts, description = split_by_rule(ids, speakers, 1337)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(350))
    assert [len(parts[name]) for name in ("train", "dev", "test")] == [252, 28, 70]
    assert all(sum(speakers[p] == f"s{s}" for p in parts["test"]) == 10 for s in range(7))
    assert "in place of CPC's lists" in description
    order = np.random.default_rng(0).permutation(350)
    again, _ = split_by_rule([ids[i] for i in order], [speakers[i] for i in order], 1337)
    for name in parts:
        assert {ids[p] for p in parts[name]} == {ids[order[p]] for p in again[name]}
    assert {ids[p] for p in split_by_rule(ids, speakers, 0)[0]["dev"]} != {ids[p] for p in parts["dev"]}
