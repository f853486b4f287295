"""Which segment a frame belongs to."""

from __future__ import annotations

import numpy as np
import pytest

from sslim.data.alignment import NO_SEGMENT, frame_length_s, frame_segments, frame_symbols
from sslim.data.sources import Segment
from sslim.frontends import FilterbankConfig, MfccConfig, SpectralFrontendConfig


def segments(*parts: tuple[str, float, float]) -> tuple[Segment, ...]:
    return tuple(Segment(symbol=symbol, start_s=start, end_s=end) for symbol, start, end in parts)


def test_a_frame_belongs_to_the_segment_at_its_centre():
    alignment = segments(("a", 0.0, 0.014), ("b", 0.014, 0.03), ("c", 0.04, 0.06))
    # centres 5, 15, 25, 35, 45, 55, 65 ms
    assert frame_symbols(alignment, 7, 0.01) == ["a", "b", "b", None, "c", "c", None]
    # frames of 25 ms have their centres at 12.5, 22.5, 32.5, 42.5, ... ms
    assert frame_symbols(alignment, 6, 0.01, 0.025) == ["a", "b", None, "c", "c", None]


def test_a_boundary_at_a_centre_belongs_to_what_begins_there():
    for start in range(1, 200):  # decimal fractions are not exact, so this needs care
        alignment = segments(("a", 0.0, start * 0.01 + 0.005), ("b", start * 0.01 + 0.005, 3.0))
        assert frame_symbols(alignment, start + 1, 0.01)[start - 1 :] == ["a", "b"]


def test_order_does_not_matter_and_the_later_of_overlapping_ones_counts():
    parts = [("a", 0.0, 0.05), ("b", 0.02, 0.04), ("c", 0.06, 0.08)]
    expected = ["a", "a", "b", "b", None, None, "c", "c"]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        alignment = segments(*[parts[i] for i in order])
        assert frame_symbols(alignment, 8, 0.01) == expected
        indices = frame_segments(alignment, 8, 0.01)
        assert [None if i == NO_SEGMENT else alignment[i].symbol for i in indices] == expected


def test_nothing_aligned_and_no_frames():
    assert frame_symbols((), 2, 0.01) == [None, None]
    assert frame_symbols(segments(("a", 0, 1)), 0, 0.01) == []
    np.testing.assert_array_equal(frame_segments((), 2, 0.01), [NO_SEGMENT, NO_SEGMENT])


def test_a_segment_that_ends_before_it_starts_is_an_error():
    with pytest.raises(ValueError, match="'a' ends at 1 s, before its start at 2 s"):
        frame_symbols(segments(("a", 2, 1)), 3, 0.01)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SpectralFrontendConfig(features=FilterbankConfig()), 0.025),
        (SpectralFrontendConfig(features=FilterbankConfig(), stack=2), 0.035),
        (SpectralFrontendConfig(features=FilterbankConfig(snip_edges=False), stack=2), 0.02),
        (SpectralFrontendConfig(features=MfccConfig()), 0.025),
    ],
)
def test_how_much_a_frame_sees(config, expected):
    assert frame_length_s(config) == pytest.approx(expected)
