"""What masked reconstruction alters: the reference's statistics against a literal oracle, and what the exact mode promises."""

import random
from dataclasses import replace

import pytest
import torch

from sslim.batch import Padded, valid_mask
from sslim.objectives.alteration import AlterationConfig, _last_span, _Spans, altered_features, draw_alteration

ROWS = 4_000


def draw(length: int, *, rows: int = ROWS, num_frames: int | None = None, channels: int = 6, seed: int = 0, **settings):
    config = AlterationConfig(**settings)
    generator = torch.Generator().manual_seed(seed)
    return draw_alteration(torch.full((rows,), length), num_frames or length, channels, config, generator)


def oracle(
    length: int, rows: int, *, p: float, c: int, overlap: bool = True, ratio: float = 1.2, widest: int = 0, dim: int = 6
):
    """The reference's rules in their own order, one utterance after the other: (label in time, zeroed channels, dice)."""
    rng, torch_rng = random.Random(1), torch.Generator().manual_seed(1)
    times, channels, dices = torch.zeros(rows, length, dtype=torch.bool), torch.zeros(rows, dim, dtype=torch.bool), []
    for b in range(rows):
        last = max(length - c - 1, 0)
        count = round(length * p / c)
        if overlap:
            starts = torch.randperm(last + 1, generator=torch_rng)[:count].tolist()
        else:
            bucket = round(c * ratio)
            first = rng.randint(0, min(c, last))
            possible = list(range(first, last + 1, bucket))
            starts = [possible[i] for i in torch.randperm(len(possible), generator=torch_rng)[:count].tolist()]
        for start in starts:
            times[b, start : start + c] = True
        dices.append(rng.random())
        if widest:
            width = rng.randint(0, widest)
            first = int(torch.randperm(dim - width, generator=torch_rng)[0])
            channels[b, first : first + width] = True
    return times, channels, torch.tensor(dices)


@pytest.mark.parametrize(
    ("length", "c", "overlap", "p"),
    [(400, 7, True, 0.15), (300, 1, True, 0.15), (30, 7, True, 0.15), (200, 7, False, 0.15), (60, 5, False, 0.9)],
)
def test_reference_time_statistics_are_the_oracles(length: int, c: int, overlap: bool, p: float) -> None:
    rows = 1_000
    want, _, _ = oracle(length, rows, p=p, c=c, overlap=overlap)
    settings = {"time_share": p, "span_min": c, "span_max": c, "overlap": overlap, "mode": "reference"}
    got = draw(length, rows=rows, **settings).time_BT
    assert got.float().mean().item() == pytest.approx(want.float().mean().item(), rel=0.01)
    # every frame's own probability: within four standard deviations of the difference of two estimates, all frames at once
    share_T = want.float().mean(0)
    spread_T = (2 * share_T * (1 - share_T) / rows).sqrt() + 1e-3
    assert ((got.float().mean(0) - share_T).abs() < 5 * spread_T).all()
    per_row = got.sum(1).float(), want.sum(1).float()
    assert per_row[0].std().item() == pytest.approx(per_row[1].std().item(), rel=0.15, abs=0.05)
    assert not got[:, -1].any()  # never the last frame
    assert not want[:, -1].any()


def test_the_figures_that_were_measured_on_the_reference() -> None:
    """spec/s3prl.md 1.3: 13.84 % of 1,000 frames with spans of 7 at 15 %; the first frames are under-altered."""
    time_BT = draw(1000, rows=2_000, time_share=0.15, mode="reference").time_BT
    assert 100 * time_BT.float().mean().item() == pytest.approx(13.84, abs=0.03)
    assert time_BT[:, 0].float().mean() < 0.04 < time_BT[:, 500].float().mean()
    exact = draw(1000, rows=1_000, time_share=0.15).time_BT.float()  # the control
    assert exact[:, 0].mean() > 0.11
    assert exact[:, -1].mean() > 0.11


def test_reference_leaves_utterances_alone_whose_spans_round_to_none() -> None:
    """len * p / c = 0.49 at 23 frames, 0.51 at 24; the exact mode alters some of them as often as it should."""
    assert not draw(23, time_share=0.15, mode="reference").time_BT.any()
    assert draw(24, time_share=0.15, mode="reference").time_BT.any(1).all()
    exact = draw(23, time_share=0.15).time_BT
    assert exact.any(1).float().mean().item() == pytest.approx(23 * 0.15 / 7, abs=0.05)


def test_reference_marks_an_utterance_shorter_than_a_span_but_not_its_padding() -> None:
    alteration = draw(5, num_frames=9, rows=10, time_share=1.0, mode="reference")
    assert alteration.time_BT[:, :5].all()  # one span from frame 0 on
    assert not alteration.time_BT[:, 5:].any()  # where the reference would mark frames 5 and 6


@pytest.mark.parametrize("dice", ["utterance", "span"])
@pytest.mark.parametrize("mode", ["reference", "exact"])
def test_the_dice_falls_80_10_10(mode: str, dice: str) -> None:
    if mode == "reference" and dice == "span":
        with pytest.raises(ValueError, match="the reference throws one for an utterance"):
            AlterationConfig(mode="reference", dice="span")
        return
    length, c = 60, 3
    drawn = draw(length, rows=20_000, time_share=0.1, span_min=c, span_max=c, overlap=False, dice=dice, mode=mode)
    frame_T = torch.arange(length)
    moved_BT = drawn.source_BT != frame_T
    zero, moved, covered = drawn.zero_BT.sum(), moved_BT.sum(), drawn.time_BT.sum()
    assert (zero / covered).item() == pytest.approx(0.8, abs=0.02)
    # a few replaced frames take their own values by chance: 1 in about 55
    assert (moved / covered).item() == pytest.approx(0.1 * (1 - 1 / 57), abs=0.01)
    several = drawn.time_BT.sum(1) > c
    mixed = (drawn.zero_BT & several[:, None]).any(1) & ((drawn.time_BT & ~drawn.zero_BT) & several[:, None]).any(1)
    assert bool(mixed.any()) == (dice == "span")


def test_what_replaces_a_span_lies_in_the_same_utterance() -> None:
    length, c = 40, 5
    drawn = draw(length, time_share=0.1, span_min=c, span_max=c, zero_share=0.0, replace_share=1.0, mode="reference", rows=500)
    shift_BT = drawn.source_BT - torch.arange(length)
    assert (drawn.source_BT >= 0).all()
    assert (drawn.source_BT < length).all()
    assert (shift_BT[~drawn.time_BT] == 0).all()
    for time_T, shift_T in zip(drawn.time_BT, shift_BT, strict=True):  # one span each, moved as a whole
        assert int(time_T.sum()) == c
        assert len(shift_T[time_T].unique()) == 1
    assert len(shift_BT[drawn.time_BT].unique()) > 30


@pytest.mark.parametrize("mode", ["exact", "reference"])
def test_an_utterance_shorter_than_a_span_takes_nothing_from_its_padding(mode: str) -> None:
    settings = {"time_share": 1.0, "span_min": 4, "span_max": 4, "zero_share": 0.0, "replace_share": 1.0}
    drawn = draw(3, num_frames=12, rows=500, mode=mode, **settings)
    assert drawn.time_BT[:, :3].any()
    assert (drawn.source_BT[:, :3] < 3).all()
    assert (drawn.source_BT >= 0).all()


def test_the_last_drawn_span_wins_where_two_meet() -> None:
    lengths, width = torch.tensor([20, 9]), torch.tensor([4, 2])
    starts = torch.tensor([[3, 5, -2, 18, 4], [0, 7, 8, 8, 1]])
    active = torch.tensor([[True, True, True, True, False], [True, True, True, False, True]])
    spans = _Spans(starts_BN=starts, sources_BN=torch.zeros_like(starts), active_BN=active, width_B=width)
    want = torch.full((2, 22), -1)
    for b in range(2):
        for n in range(5):
            for t in range(int(starts[b, n]), int(starts[b, n] + width[b])):
                if active[b, n] and 0 <= t < lengths[b]:
                    want[b, t] = n
    assert torch.equal(_last_span(spans, lengths, 22, 4), want)
    assert (want == 1).any()
    assert (want[0, 3:5] == 0).all()


def test_altered_features_by_hand() -> None:
    """Zeroed, replaced and kept frames, a zeroed channel, and padding, against a loop over elements."""
    lengths = torch.tensor([40, 17])
    config = AlterationConfig(
        time_share=0.5, span_min=2, span_max=5, dice="span", zero_share=0.4, replace_share=0.4, max_channels=4
    )
    drawn = draw_alteration(lengths, 40, 6, config, torch.Generator().manual_seed(3))
    values = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(4))
    before = values.clone()
    got = altered_features(Padded(values=values, lengths=lengths), drawn).values
    want = torch.zeros_like(values)
    for b, length in enumerate(lengths.tolist()):
        for t in range(length):
            for f in range(6):
                if not drawn.zero_BT[b, t] and not drawn.channels_BF[b, f]:
                    want[b, t, f] = values[b, drawn.source_BT[b, t], f]
    assert torch.equal(got, want)
    assert torch.equal(values, before)  # the reference alters the caller's tensor
    kinds = [
        drawn.zero_BT,
        drawn.time_BT & ~drawn.zero_BT & (drawn.source_BT == torch.arange(40)),
        drawn.source_BT != torch.arange(40),
    ]
    assert all(kind.any() for kind in kinds)
    assert drawn.channels_BF.any()


def test_reference_channels_are_the_oracles() -> None:
    """P(no band) = 1 / (W + 1), and the uppermost channel is never zero."""
    dim, widest = 40, 8
    _, want, _ = oracle(10, 1_000, p=0.15, c=7, widest=widest, dim=dim)
    got = draw(10, channels=dim, time_share=0.0, max_channels=widest, mode="reference").channels_BF
    assert got.any(1).logical_not().float().mean().item() == pytest.approx(1 / 9, abs=0.02)
    assert not got[:, -1].any()
    assert not want[:, -1].any()
    torch.testing.assert_close(got.float().mean(0), want.float().mean(0), atol=0.05, rtol=0)
    share = draw(10, channels=dim, time_share=0.0, max_channel_share=0.2, mode="reference").channels_BF
    assert torch.equal(share, got)  # int(40 * 0.2) = 8
    with pytest.raises(ValueError, match="of 40 channels 39 can be"):
        draw(10, channels=dim, max_channels=40, mode="reference")


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("length", [3, 11, 60])
def test_in_exact_mode_every_frame_is_equally_likely(length: int, overlap: bool) -> None:
    settings = {"time_share": 0.3, "span_min": 4, "span_max": 6, "overlap": overlap}
    share_T = draw(length, num_frames=length + 5, rows=20_000, **settings).time_BT.float().mean(0)
    assert (share_T[length:] == 0).all()
    mean = share_T[:length].mean()
    assert share_T[:length].min() > 0.88 * mean  # where spans may not overlap, the draw is uniform to within 8 %
    assert share_T[:length].max() < 1.14 * mean
    if overlap:
        torch.testing.assert_close(share_T[:length], share_T[:length].mean().expand(length), atol=0.02, rtol=0)
    reference = draw(length, rows=2_000, mode="reference", **settings).time_BT.float().mean(0)  # the control
    assert length < 5 or reference.min() == 0


def test_in_exact_mode_every_channel_is_equally_likely() -> None:
    got = draw(3, channels=10, rows=20_000, time_share=0.0, max_channels=10).channels_BF
    share_F = got.float().mean(0)
    torch.testing.assert_close(share_F, share_F.mean().expand(10), atol=0.02, rtol=0)
    assert got.any(1).logical_not().float().mean().item() == pytest.approx(1 / 11, abs=0.01)
    assert (got.int().diff(dim=1).clamp(min=0).sum(1) + got[:, 0] <= 1).all()  # one band


def test_stacked_frames_lose_the_same_band() -> None:
    config = AlterationConfig(time_share=0.0, max_channels=4)
    drawn = draw_alteration(torch.tensor([5] * 50), 5, 30, config, torch.Generator().manual_seed(0), stack=3).channels_BF
    assert torch.equal(drawn[:, :10], drawn[:, 10:20])
    assert torch.equal(drawn[:, :10], drawn[:, 20:])
    assert drawn.sum(1).max() == 12
    reference = replace(config, mode="reference")  # takes the channels of a whole stack for neighbours
    drawn = draw_alteration(torch.tensor([5] * 500), 5, 30, reference, torch.Generator().manual_seed(0), stack=3).channels_BF
    assert drawn.sum(1).max() == 4
    assert (drawn.int().diff(dim=1).clamp(min=0).sum(1) + drawn[:, 0] <= 1).all()  # one band in all of them
    assert (drawn[:, 9] & drawn[:, 10]).any()


def test_spans_that_may_not_overlap_do_not() -> None:
    drawn = draw(100, time_share=0.4, span_min=5, span_max=5, overlap=False, mode="reference")
    sizes = drawn.time_BT.sum(1)
    assert (sizes == 5 * 8).all()  # round(100 * 0.4 / 5) spans, none cut
    steps = drawn.time_BT.int().diff(dim=1, prepend=torch.zeros(ROWS, 1, dtype=torch.int))
    assert ((steps == 1).sum(1) == 8).all()  # and a gap between any two: 8 begin


def test_each_utterance_draws_its_own_span_length() -> None:
    drawn = draw(400, time_share=0.005, span_min=2, span_max=4, rows=2_000)
    whole = drawn.time_BT[:, 10:-10].sum(1)
    assert set(whole[(whole > 0) & (drawn.time_BT.sum(1) == whole)].unique().tolist()) >= {2, 3, 4}


def test_noise_is_for_the_whole_batch_in_the_reference_and_for_an_utterance_else() -> None:
    settings = {"time_share": 0.3, "noise_probability": 0.4, "noise_deviation": 0.2}
    fires = []
    for seed in range(200):
        noise = draw(20, rows=8, seed=seed, mode="reference", **settings).noise_BTF
        loud = noise.abs().amax((1, 2)) > 0
        assert loud.all() or not loud.any()
        fires.append(bool(loud.any()))
    assert sum(fires) / 200 == pytest.approx(0.4, abs=0.12)
    exact = draw(20, **settings)
    loud = exact.noise_BTF.abs().amax((1, 2)) > 0
    assert loud.float().mean().item() == pytest.approx(0.4, abs=0.03)
    visible = exact.noise_BTF[loud][~exact.zero_BT[loud]]
    assert visible.std().item() == pytest.approx(0.2, abs=0.005)
    assert (exact.noise_BTF[exact.zero_BT] == 0).all()  # what is hidden stays zero
    banded = draw(20, max_channels=3, **{**settings, "noise_probability": 1.0})
    channels_BTF = banded.channels_BF[:, None].expand_as(banded.noise_BTF)
    assert channels_BTF.any()
    assert (banded.noise_BTF[channels_BTF] == 0).all()
    reference = draw(20, mode="reference", **{**settings, "noise_probability": 1.0})
    assert reference.noise_BTF[reference.zero_BT].std().item() == pytest.approx(0.2, abs=0.005)  # there it gets noise too


def test_nothing_is_altered_on_padding_and_equal_seeds_alter_alike() -> None:
    lengths = torch.tensor([30, 0, 7, 18])
    config = AlterationConfig(time_share=0.6, max_channels=3, noise_probability=1.0)
    drawn = [draw_alteration(lengths, 30, 6, config, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    padding = ~valid_mask(lengths, 30)
    assert not drawn[0].time_BT[padding].any()
    out = altered_features(Padded(values=torch.ones(4, 30, 6), lengths=lengths), drawn[0]).values
    assert (out[padding] == 0).all()
    assert all(torch.equal(getattr(drawn[0], name), getattr(drawn[1], name)) for name in ("time_BT", "source_BT", "noise_BTF"))
    assert not torch.equal(drawn[0].time_BT, drawn[2].time_BT)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"time_share": 1.2}, "time_share is 1.2"),
        ({"zero_share": 0.95}, "add up to more than 1"),
        ({"span_min": 8}, "spans of 8 to 7 frames"),
        ({"bucket_ratio": 0.5}, "spans would overlap"),
        ({"max_channels": 2, "max_channel_share": 0.1}, "are both given; give one"),
        ({"noise_deviation": -0.1}, "must not be negative"),
    ],
)
def test_contradictions_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        AlterationConfig(**settings)
