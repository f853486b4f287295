"""Schedules against their formulas."""

from __future__ import annotations

import math

import pytest

from sslim.training import SCHEDULES, ScheduleConfig, learning_rate_factor


def curve(config: ScheduleConfig, total: int) -> list[float]:
    return [learning_rate_factor(config, step, total) for step in range(total)]


def test_linear_is_fairseqs_polynomial_decay_shifted_by_one_update():
    """fairseq: n / W while warming up, then 1 - (n - W) / (total - W), for n updates done before the step."""
    ours = curve(ScheduleConfig(kind="linear", warmup_steps=10), 100)
    fairseq = [n / 10 if n <= 10 else 1 - (n - 10) / 90 for n in range(101)]
    assert ours[:10] == pytest.approx(fairseq[1:11])
    assert ours[10:] == pytest.approx(fairseq[10:100])
    assert ours[-1] == pytest.approx(1 / 90)


def test_cosine_and_tri_stage():
    cosine = curve(ScheduleConfig(kind="cosine", warmup_share=0.1, final_factor=0.1), 110)
    assert cosine[11] == 1.0
    assert cosine[11 + 33] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 33 / 99)))
    tri = curve(ScheduleConfig(kind="tri-stage", warmup_share=0.1, hold_share=0.4, initial_factor=0.01, final_factor=0.01), 100)
    assert tri[0] == pytest.approx(0.01 + 0.99 / 10)
    assert tri[9:51] == [1.0] * 42
    assert tri[75] == pytest.approx(math.exp(math.log(0.01) * 25 / 50))
    assert tri[99] > 0.01


@pytest.mark.parametrize("kind", sorted(SCHEDULES))
def test_every_schedule_warms_up_peaks_at_one_and_never_rises_again(kind: str):
    config = ScheduleConfig(kind=kind, warmup_steps=5, final_factor=0.01)  # type: ignore[arg-type]
    factors = curve(config, 50)
    assert all(0 < f <= 1 for f in factors)
    assert max(factors) == 1.0
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[0] == (1.0 if kind == "constant" else pytest.approx(0.2))


def test_what_needs_the_total_says_so():
    assert learning_rate_factor(ScheduleConfig(kind="warmup", warmup_steps=4), 1, None) == 0.5
    with pytest.raises(ValueError, match="'cosine' schedule needs total_steps or epochs"):
        learning_rate_factor(ScheduleConfig(kind="cosine"), 1, None)
    with pytest.raises(ValueError, match="both given"):
        ScheduleConfig(warmup_steps=3, warmup_share=0.1)
