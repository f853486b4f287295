"""Nine frames end to end: against torch's unfold over replicated edges, and for what they are good for."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import pad

from sslim.probes import ProbeConfig, probe
from sslim.probes.classifiers import ClassifierConfig, Examples, ProbeClassifier, neighbours, train_paths
from sslim.probes.fine_tuning import frames_with_context

LENGTHS = (7, 1, 12, 3)


@pytest.fixture
def frames():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, 5, generator=generator) for length in LENGTHS]


def unfolded(x_LTD, context):
    """(L, T, (2 context + 1) D) by replicated edges and unfold, an utterance at a time."""
    num_layers, length, dim = x_LTD.shape
    padded = pad(x_LTD.transpose(1, 2), (context, context), mode="replicate").transpose(1, 2)
    return padded.unfold(1, 2 * context + 1, 1).transpose(2, 3).reshape(num_layers, length, (2 * context + 1) * dim)


def store(frames, context):
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    rows = torch.arange(sum(LENGTHS))
    return Examples(x_LNP=torch.cat(frames, 1), y_N=rows % 3, rows=rows, offsets=offsets, context=context)


@pytest.mark.parametrize("context", [0, 1, 4])
def test_frames_and_their_neighbours_equal_unfold(frames, context):
    examples = store(frames, context)
    x_LNP, _ = examples.batch(torch.arange(len(examples)))
    expected = torch.cat([unfolded(x, context) for x in frames], 1)
    assert torch.equal(x_LNP, expected)
    assert x_LNP.shape[-1] == examples.width
    assert torch.equal(examples.batch(torch.tensor([20, 3]))[0], expected[:, [20, 3]])
    assert torch.equal(torch.cat([x for x, _ in examples.batches(7)], 1), expected)
    padded = torch.nn.utils.rnn.pad_sequence([x.transpose(0, 1) for x in frames], batch_first=True).permute(2, 0, 1, 3)
    padded = padded.clone()
    for row, length in enumerate(LENGTHS):
        padded[:, row, length:] = float("nan")  # padding is never looked at
    assert torch.equal(frames_with_context(padded, torch.tensor(LENGTHS), context), expected)


def test_neighbours_stay_in_their_utterance():
    around = neighbours(torch.tensor([0, 7, 8]), torch.tensor([0, 7, 8, 20]), 2)
    assert around.tolist() == [[0, 0, 0, 1, 2], [7, 7, 7, 7, 7], [8, 8, 8, 9, 10]]


def test_latest_first_is_the_same_classifier_in_another_order(frames):
    """S3PRL's slots run from t+4 to t-4: turning the weights' slots round gives equal logits."""
    x_LNP, _ = store(frames, 4).batch(torch.arange(23))
    ours = ProbeClassifier(torch.zeros(2, 45), torch.ones(2, 45), 3).initialize(torch.Generator().manual_seed(0))
    theirs = ProbeClassifier(torch.zeros(2, 45), torch.ones(2, 45), 3)
    theirs.load_state_dict(ours.state_dict())
    turned = x_LNP.unflatten(2, (9, 5)).flip(2).flatten(2)
    assert not torch.allclose(ours(x_LNP), theirs(turned), atol=1e-6)  # control
    with torch.no_grad():
        theirs.output.weight.copy_(ours.output.weight.unflatten(1, (9, 5)).flip(1).flatten(1))
    torch.testing.assert_close(ours(x_LNP), theirs(turned))


def test_utterances_are_found_again_where_frames_are_left_out(frames):
    examples = store(frames, 0)
    kept = replace(examples, rows=torch.tensor([0, 2, 8, 9, 22]), num_frames_U=torch.tensor(LENGTHS))
    groups, num_frames = kept.by_utterance()
    assert [group.tolist() for group in groups] == [[0, 1], [2, 3], [4]]
    assert num_frames == [7, 12, 3]  # the second has none left
    gap = replace(kept, rows=torch.tensor([0, 2, 22]))
    assert [group.tolist() for group in gap.by_utterance()[0]] == [[0, 1], [2]]
    assert gap.by_utterance()[1] == [7, 3]


def test_large_examples_are_not_put_in_one_batch(frames, monkeypatch):
    examples = store(frames, 4)
    config = ClassifierConfig(max_epochs=1, learning_rates=(1e-3,))
    (path,) = train_paths(examples, num_classes=3, config=config, seed=0)
    assert next(path)[0][0] == "weight_decay"
    monkeypatch.setattr("sslim.probes.classifiers.FULL_BATCH_BYTES", 4 * len(examples) * 2 * 45 - 1)
    (path,) = train_paths(examples, num_classes=3, config=config, seed=0)
    assert next(path)[0][0] == "learning_rate"


def test_neighbours_tell_what_a_frame_alone_does_not(late_phones):
    """Features that come 40 ms after their phones: the answer is four frames later."""
    scores = {}
    for context in (0, 4):
        config = ProbeConfig(task="phones", context=context, num_seeds=1, max_frames=None)
        (row,) = probe(late_phones, [], config)["rows"]
        scores[context] = row["mean"]
    assert scores[4] > 0.8  # of the last four frames of an utterance nothing is told
    assert scores[0] < scores[4] - 0.1
    with pytest.raises(ValueError, match="classifies whole utterances, and a context of 4 is for frames"):
        probe(late_phones, [], ProbeConfig(task="label", context=4))
