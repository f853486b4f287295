import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslim.probes.protocol import Groups, Parts, SplitConfig, divide


def everything_once(pieces, total):
    return sorted(np.concatenate(pieces).tolist()) == list(range(total))


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(3, 40), min_size=2, max_size=6), seed=st.integers(0, 5))
def test_random_parts_are_disjoint_complete_and_stratified(counts, seed):
    classes_N = np.repeat(np.arange(len(counts)), counts)
    total = len(classes_N)
    parts = divide(classes_N, [None] * total, [None] * total, SplitConfig(seed=seed))
    assert isinstance(parts, Parts)
    assert everything_once([parts.train, parts.dev, parts.test], total)
    for number, count in enumerate(counts):
        in_test = int((classes_N[parts.test] == number).sum())
        assert in_test == max(round(0.1 * count), 1)
        assert (classes_N[parts.train] == number).any()
    again = divide(classes_N, [None] * total, [None] * total, SplitConfig(seed=seed))
    assert np.array_equal(parts.test, again.test)


def test_another_seed_draws_another_test_part():
    classes_N = np.zeros(200, dtype=np.int64)
    one, two = (divide(classes_N, [None] * 200, [None] * 200, SplitConfig(seed=s)).test for s in (0, 1))
    assert not np.array_equal(one, two)


def test_manifest_is_used_where_it_can_be_learnt_from():
    splits = ["train-clean"] * 6 + ["dev-other"] * 2 + ["test"] * 2
    classes_N = np.array([0, 1] * 5)
    parts = divide(classes_N, splits, [None] * 10, SplitConfig())
    assert parts.train.tolist() == list(range(6))
    assert parts.dev.tolist() == [6, 7]
    assert parts.test.tolist() == [8, 9]
    # a class that only the test part has (speakers of LibriSpeech): auto draws at random, manifest says why not
    classes_N[9] = 2
    drawn = divide(classes_N, splits, [None] * 10, SplitConfig())
    assert "random" in drawn.description
    with pytest.raises(ValueError, match="1 classes of its test part never occur"):
        divide(classes_N, splits, [None] * 10, SplitConfig(source="manifest"))
    with pytest.raises(ValueError, match="no utterance is marked test"):
        divide(classes_N, ["train"] * 10, [None] * 10, SplitConfig(source="manifest"))


def test_missing_dev_is_taken_from_train_alone():
    splits = ["train"] * 40 + ["test"] * 20
    classes_N = np.arange(60) % 2
    parts = divide(classes_N, splits, [None] * 60, SplitConfig())
    assert parts.test.tolist() == list(range(40, 60))
    assert len(parts.dev) == 4
    assert parts.dev.max() < 40
    assert everything_once([parts.train, parts.dev, parts.test], 60)


@pytest.mark.parametrize("num_speakers", [3, 4, 7, 30])
def test_disjoint_parts_share_no_speaker(num_speakers):
    speakers = [f"s{i % num_speakers}" for i in range(120)]
    parts = divide(np.zeros(120, dtype=np.int64), [None] * 120, speakers, SplitConfig(speaker_disjoint=True))
    sets = [{speakers[i] for i in part} for part in (parts.train, parts.dev, parts.test)]
    assert all(sets)
    assert len(set.union(*sets)) == sum(map(len, sets))
    assert everything_once([parts.train, parts.dev, parts.test], 120)
    # control: without the option they do share
    loose = divide(np.zeros(120, dtype=np.int64), [None] * 120, speakers, SplitConfig())
    assert {speakers[i] for i in loose.train} & {speakers[i] for i in loose.test}


def test_speaker_folds():
    speakers = ["b", "a", "c", "a", "b", "c"]
    groups = divide(np.array([0, 0, 0, 1, 1, 1]), [None] * 6, speakers, SplitConfig(folds="speaker"))
    assert isinstance(groups, Groups)
    assert groups.names == ("a", "b", "c")
    assert [m.tolist() for m in groups.members] == [[1, 3], [0, 4], [2, 5]]
    many = [f"s{i:02d}" for i in range(25)]
    shared = divide(np.zeros(25, dtype=np.int64), [None] * 25, many, SplitConfig(folds="speaker", num_folds=4))
    assert len(shared.members) == 4
    assert everything_once(shared.members, 25)


def test_speaker_folds_need_speakers_and_a_task_they_can_learn():
    config = SplitConfig(folds="speaker")
    with pytest.raises(ValueError, match="1 of 3 utterances have no speaker"):
        divide(np.zeros(3, dtype=np.int64), [None] * 3, ["a", None, "b"], config)
    with pytest.raises(ValueError, match="2 speakers"):
        divide(np.zeros(3, dtype=np.int64), [None] * 3, ["a", "a", "b"], config)
    with pytest.raises(ValueError, match="no class of a left-out speaker"):
        divide(np.arange(3), [None] * 3, ["a", "b", "c"], config)
    with pytest.raises(ValueError, match="2 folds are too few"):
        divide(np.zeros(3, dtype=np.int64), [None] * 3, ["a", "b", "c"], SplitConfig(folds="speaker", num_folds=2))
