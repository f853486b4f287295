"""The protocol of S3PRL v0.1: its labels' clocks and its training against plain torch on padded batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sslim.data.phone_alignments import cpc_segments
from sslim.data.sources import Segment
from sslim.probes import ProbeConfig, PublishedConfig, SplitConfig, card_table, probe
from sslim.probes.classifiers import Examples
from sslim.probes.features import Representation
from sslim.probes.published import (
    LABEL_CLOCKS,
    _step_batches,
    at_clock,
    fit_published,
    new_classifier,
    utterance_batches,
    with_label_clock,
)
from sslim.probes.tasks import Task, segment_classes


def phones_of(segments, classes):
    return Task(
        name="phones",
        unit="frame",
        indices=np.array([0]),
        classes=classes,
        frame_classes=lambda index, count, shift_s, length_s: segment_classes(segments, classes, count, shift_s, length_s),
        segments_of=lambda index: segments,
        num_without=0,
    )


@pytest.mark.parametrize("num_labels", [1, 2, 98, 606])
def test_cpc_labels_come_back_and_the_longer_side_is_cut(num_labels):
    labels = np.random.default_rng(num_labels).integers(41, size=num_labels)
    classes = tuple(map(str, range(41)))
    task = phones_of(cpc_segments(labels), classes)
    by_order = with_label_clock(task, LABEL_CLOCKS["cpc"])
    more = by_order.frame_classes(0, num_labels + 3, 0.01, 0.0)
    assert more.tolist() == [*labels.tolist(), -1, -1, -1]
    assert by_order.frame_classes(0, max(num_labels - 1, 0), 0.01, 0.0).tolist() == labels[:-1].tolist()
    if num_labels > 90:  # control: by time, a frame centred on its moment has another label now and then
        by_time = task.frame_classes(0, num_labels, 0.01, 0.0)
        assert (by_time != labels).sum() > 0


def test_montreal_labels_are_those_of_preprocess_alignment():
    """Segments moved half a window of 800 samples to the front; multiples of 200 samples inside them are counted."""
    random = np.random.default_rng(0)
    edges = np.concatenate([[0], np.cumsum(random.integers(1, 30, size=60))]) * 160
    segments = tuple(
        Segment(symbol=f"p{i % 5}", start_s=a / 16000, end_s=b / 16000)
        for i, (a, b) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    )
    expected = []
    for i, segment in enumerate(segments):
        start, end = (max(round(x * 16000) - 400, 0) for x in (segment.start_s, segment.end_s))
        count = end // 200 - start // 200 + (start % 200 == 0) - (end % 200 == 0)
        expected += [i % 5] * count
    task = with_label_clock(phones_of(segments, tuple(f"p{i}" for i in range(5))), LABEL_CLOCKS["montreal"])
    found = task.frame_classes(0, len(expected) + 2, 0.0125, 0.0)
    assert found.tolist() == [*expected, -1, -1]


def frames_every(shift_s):
    return Representation(
        name="frames",
        kind="model",
        num_layers=1,
        frame_shift_s=shift_s,
        num_parameters=0,
        num_frames=lambda indices: np.full(len(indices), 3),
        layers_of=lambda indices: ((p, torch.arange(3.0).view(1, 3, 1)) for p in range(len(indices))),
    )


def test_coarser_frames_are_repeated_and_others_refused():
    twice = at_clock(frames_every(0.02), LABEL_CLOCKS["cpc"])
    ((_, x_LTD),) = twice.layers_of(np.array([0]))
    assert x_LTD.flatten().tolist() == [0, 0, 1, 1, 2, 2]
    assert twice.num_frames(np.array([0])).tolist() == [6]
    assert twice.frame_shift_s == 0.01
    with pytest.raises(ValueError, match=r"a frame every 12\.5 ms and the labels come every 10 ms"):
        at_clock(frames_every(0.0125), LABEL_CLOCKS["cpc"])


def test_no_utterance_is_lost_and_long_batches_are_halved():
    lengths = [3500, 10, 40, 30, 20, 5, 3100, 50, 60, 70, 80, 90, 1]
    batches = utterance_batches(lengths, PublishedConfig(), torch.Generator().manual_seed(0))
    assert sorted(member for batch in batches for member in batch) == list(range(13))
    assert [len(batch) for batch in batches] == [3, 3, 6, 1]
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)


def rows_of(lengths, seed=0, unknown=True):
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    y_N = torch.randint(4, (count,), generator=generator)
    x_LNP = torch.randn(1, count, 6, generator=generator) + nn.functional.one_hot(y_N, 6)
    rows = torch.arange(count)
    if unknown:
        rows = rows[rows % 5 != 0]
    offsets = torch.tensor([0, *np.cumsum(lengths).tolist()])
    return Examples(x_LNP=x_LNP, y_N=y_N, rows=rows, offsets=offsets, num_frames_U=torch.tensor(lengths))


@pytest.mark.parametrize("hidden_dim", [None, 8])
def test_training_equals_plain_torch_on_padded_batches(hidden_dim):
    """One batch holds all six utterances, so that its order is no matter; padding is ignored by its label of -100."""
    lengths = (9, 4, 7, 2, 5, 3)
    train = rows_of(lengths)
    config = PublishedConfig(num_steps=5, dev_steps=5)
    fitted = fit_published(train, train, num_classes=4, config=config, hidden_dim=hidden_dim, seed=1)
    start = new_classifier(train, 4, hidden_dim, torch.Generator().manual_seed(1))
    layers = [start.output] if hidden_dim is None else [start.hidden, nn.ReLU(), start.output]
    head = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(head.parameters(), lr=4e-3)
    labels = torch.where(torch.isin(torch.arange(sum(lengths)), train.rows), train.y_N, -100)
    x_BTD, y_BT = (
        nn.utils.rnn.pad_sequence(values.split(lengths), batch_first=True, padding_value=padding)
        for values, padding in ((train.x_LNP[0], 3.0), (labels, -100))
    )
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x_BTD).flatten(0, 1), y_BT.flatten(), ignore_index=-100).backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(fitted.classifier.output.weight, head[-1].weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(fitted.classifier.output.bias, head[-1].bias, rtol=0, atol=1e-6)
    fresh = new_classifier(train, 4, hidden_dim, torch.Generator().manual_seed(1))
    assert (fresh.output.weight - head[-1].weight).abs().max() > 1e-3  # control: it did train
    assert fitted.chosen == {"step": 5}


def test_pooled_utterances_are_put_in_batches_by_their_frames():
    """One example each, as speakers have: what counts is how long the utterance is."""
    num_frames = torch.tensor([5, 400, 3500, 20, 300, 3400, 10, 200])
    examples = replace(rows_of([1] * 8, unknown=False), num_frames_U=num_frames)
    steps = _step_batches(examples, PublishedConfig(batch_size=4), torch.Generator().manual_seed(0))
    batches = {frozenset(num_frames[next(steps)].tolist()) for _ in range(3)}
    assert batches == {frozenset((3500, 3400)), frozenset((400, 300)), frozenset((200, 20, 10, 5))}


def test_rows_of_features_are_standardised():
    train = rows_of((9, 4, 7))
    loud = replace(train, x_LNP=1000 + 50 * train.x_LNP)
    options = {"num_classes": 4, "config": PublishedConfig(num_steps=5, dev_steps=5), "hidden_dim": None, "seed": 1}
    one, other = (fit_published(part, part, standardise=True, **options).classifier for part in (train, loud))
    torch.testing.assert_close(one.output.weight, other.output.weight, rtol=0, atol=1e-3)
    raw = fit_published(loud, loud, **options).classifier
    assert (raw.output.weight - one.output.weight).abs().max() > 5e-3  # control


def test_dev_chooses_the_step():
    """Dev labels that only an early classifier gets right: the first look is kept, although training goes on."""
    train, dev = rows_of((9, 4, 7, 2, 5, 3, 8)), rows_of((30,), seed=1, unknown=False)
    told = []
    options = {"num_classes": 4, "hidden_dim": None, "seed": 0}
    whole = fit_published(train, dev, config=PublishedConfig(num_steps=40, dev_steps=10), tell=told.append, **options)
    best = max(float(line.split(": ")[1].split(" ")[0]) for line in told)
    assert len(told) == 4
    assert whole.dev_accuracy == pytest.approx(best / 100, abs=1e-3)
    again = fit_published(train, dev, config=PublishedConfig(num_steps=whole.setting[1], dev_steps=10), **options)
    assert torch.equal(again.classifier.output.weight, whole.classifier.output.weight)


def published(task, **changes):
    return ProbeConfig(
        task=task,
        published=PublishedConfig(num_steps=300, dev_steps=100),
        layer=changes.pop("layer", "last"),
        pooling="mean",
        num_seeds=1,
        max_frames=None,
        split=SplitConfig(source="cpc", seed=1337),
        **changes,
    )


def test_the_whole_protocol_and_what_its_card_says(spoken, tiny_model):
    card = probe(spoken, [tiny_model], published("phones", layer="mean"))
    assert [row["layer"] for row in card["rows"]] == ["-", "mean", "mean"]
    assert all(row["mean"] > 0.85 for row in card["rows"])
    assert "Adam at a constant 4e-3" in card["protocol"]["reproduces"]
    assert "best step taken on test" in card["protocol"]["not_reproduced"]
    assert "in place of CPC's lists" in card["protocol"]["split"]
    assert card["config"]["published"]["num_steps"] == 300
    assert "protocol of S3PRL v0.1" in card_table(card).caption
    (chance_row,) = probe(spoken, [tiny_model], published("phones", shuffle_labels=True, baselines=False))["rows"]
    assert chance_row["mean"] < 0.55
    (speaker,) = probe(spoken, [], published("speaker"))["rows"]
    assert speaker["mean"] > 0.8


def test_what_the_protocol_does_not_have_is_refused():
    with pytest.raises(ValueError, match="never trained its weighted sum"):
        published("phones", layer="mix")
    with pytest.raises(ValueError, match="needs a train, a dev and a test part"):
        ProbeConfig(task="label", layer="last", published=PublishedConfig(), split=SplitConfig(folds="speaker"))
    with pytest.raises(ValueError, match="num_steps 0"):
        PublishedConfig(num_steps=0)
