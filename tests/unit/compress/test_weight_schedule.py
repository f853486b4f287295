"""The schedule of iterative pruning: its rule by hand and by a formula, and what it promises whatever the loss does."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sslim.compress import weight_schedule
from sslim.compress.weight_schedule import Action, Progress, PruningSchedule, advance
from sslim.config import from_plain, to_plain

HAND = PruningSchedule(
    sparsities=(0.2, 0.4, 0.6),
    warm_up=4,
    period=6,
    condition="converge",
    tolerance=0.1,
    average_length=2,
    smooth_factor=0.5,
    max_extensions=2,
    recovery_steps=5,
)


def run(schedule: PruningSchedule, losses: list[float], skipped: tuple[int, ...] = ()) -> list[tuple[int, Action]]:
    """What is done, after which update; the state goes through a tensor each time, as in a checkpoint."""
    progress, done = schedule.start(), []
    for completed, loss in enumerate(losses, 1):
        if completed in skipped:
            continue
        progress, action = advance(schedule, progress, completed, loss)
        stored = torch.tensor(progress.to_numbers(), dtype=torch.float64)
        progress = Progress.from_numbers(stored.tolist())
        if action != "train":
            done.append((completed, action))
    return done


def mean_since(losses: list[float], start: int, end: int, factor: float) -> float:
    """Weighted mean of the losses of updates ``start + 1`` to ``end``, the last one the heaviest."""
    weights = [factor ** (end - update) for update in range(start + 1, end + 1)]
    return sum(w * losses[update - 1] for w, update in zip(weights, range(start + 1, end + 1), strict=True)) / sum(weights)


def test_by_hand() -> None:
    losses = [9.0] * 4 + [4.0] * 6 + [6.0, 5.0, 4.0, 3.0, 2.0, 1.0] + [1.0] * 6
    # 4: the warm-up is over. 10: 4 and 4. 16: 120/63 after 56/15, still falling. 22: 1.014 after 1.057, at rest.
    assert run(HAND, losses) == [(4, "prune"), (10, "prune"), (16, "wait"), (22, "prune")]
    progress = HAND.start()
    for completed, loss in enumerate(losses[:15], 1):
        progress, _ = advance(HAND, progress, completed, loss)
    assert progress.earlier == pytest.approx(56 / 15, abs=1e-12)
    progress = replace(progress, average=0.5 * progress.average + 0.5 * 1.0, num_losses=6)
    assert progress.smoothed(HAND) == pytest.approx(120 / 63, abs=1e-12)


def test_control_without_the_correction_a_constant_loss_seems_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = replace(HAND, smooth_factor=0.9)
    assert run(slow, [4.0] * 10) == [(4, "prune"), (10, "prune")]
    monkeypatch.setattr(weight_schedule.Progress, "smoothed", lambda progress, _: progress.average)
    assert run(slow, [4.0] * 10) == [(4, "prune"), (10, "wait")]


@pytest.mark.parametrize(("at_cap", "end"), [("prune", [(28, "prune")]), ("stop", [(28, "stop")])])
@pytest.mark.parametrize("slope", [0.5, -0.5])
def test_a_loss_that_rises_or_falls_is_waited_for_but_not_without_end(at_cap: Any, end: list, slope: float) -> None:
    losses = [3.0] * 10 + [20.0 + slope * i for i in range(18)]
    expected: list[tuple[int, Action]] = [(4, "prune"), (10, "prune"), (16, "wait"), (22, "wait"), *end]
    assert run(replace(HAND, at_cap=at_cap), losses) == expected
    assert run(replace(HAND, condition="normal"), losses) == [(4, "prune"), (10, "prune"), (16, "prune")]  # the control


@settings(max_examples=60, deadline=None)
@given(
    warm_up=st.integers(1, 12),
    average_length=st.integers(1, 5),
    factor=st.floats(0.0, 0.95),
    tail=st.lists(st.floats(-3.0, 3.0), min_size=30, max_size=30),
)
def test_the_rule_is_that_of_the_formula_whatever_the_warm_up(
    warm_up: int, average_length: int, factor: float, tail: list[float]
) -> None:
    """Decisions after the first pruning depend on the losses after it alone; each compares the two means of the definition."""
    schedule = replace(HAND, warm_up=warm_up, average_length=average_length, smooth_factor=factor, max_extensions=100)
    losses = [50.0] * warm_up + tail
    expected: list[tuple[int, Action]] = [(warm_up, "prune")]
    start, check, left = warm_up, warm_up + 6, 2
    while check <= len(losses) and left:
        now, before = (mean_since(losses, start, end, factor) for end in (check, check - average_length))
        if math.isclose(abs(now - before), schedule.tolerance, rel_tol=1e-9):
            return
        rests = abs(now - before) <= schedule.tolerance
        expected.append((check, "prune" if rests else "wait"))
        start, left = (check, left - 1) if rests else (start, left)
        check += 6
    assert run(schedule, losses) == expected


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(st.floats(-3.0, 3.0), min_size=120, max_size=120),
    max_extensions=st.integers(0, 3),
    latest=st.none() | st.integers(16, 60),
)
def test_the_list_is_done_in_time_whatever_the_loss_does(losses: list[float], max_extensions: int, latest: int | None) -> None:
    schedule = replace(HAND, max_extensions=max_extensions, latest_pruning=latest)
    done = run(schedule, losses)
    prunings = [completed for completed, action in done if action == "prune"]
    longest = HAND.last_check + 2 * max_extensions * HAND.period  # the first one never waits
    assert len(prunings) == 3
    assert prunings[-1] <= min(longest, latest or longest)
    assert [completed for completed, _ in done] == list(range(4, prunings[-1] + 1, 6))


def test_control_without_a_latest_update_a_falling_loss_takes_longer() -> None:
    falling = [100.0 - completed for completed in range(120)]
    latest = HAND.last_check + HAND.period
    assert run(replace(HAND, latest_pruning=latest), falling)[-1] == (latest, "prune")
    assert run(HAND, falling)[-1] == (HAND.last_check + 4 * HAND.period, "prune")


def test_steps_needed_grow_by_what_is_put_off() -> None:
    progress = HAND.start()
    needed = [progress.steps_needed(HAND)]
    for completed, loss in enumerate([4.0] * 10 + [20.0 - i for i in range(30)], 1):
        progress, _ = advance(HAND, progress, completed, loss)
        needed.append(progress.steps_needed(HAND))
    assert HAND.planned_steps == 4 + 2 * 6 + 5
    assert sorted(set(needed)) == [21, 27, 33]
    assert needed == sorted(needed)
    assert progress.is_over(HAND)
    assert progress.last_step + HAND.recovery_steps == needed[-1]


def test_a_check_that_a_skipped_update_hides_comes_with_the_next_one() -> None:
    normal = replace(HAND, condition="normal")
    assert run(normal, [1.0] * 16, skipped=(4, 5, 10)) == [(6, "prune"), (11, "prune"), (16, "prune")]
    assert run(HAND, [1.0] * 16, skipped=(8,)) == [(4, "prune"), (10, "prune"), (16, "prune")]  # 8: the earlier loss


def test_linear_and_above() -> None:
    schedule = PruningSchedule.linear(0.8, 4, warm_up=1, period=2)
    assert schedule.sparsities == pytest.approx((0.2, 0.4, 0.6, 0.8))
    assert schedule.above(0.4).sparsities == pytest.approx((0.6, 0.8))
    assert schedule.above(0.0) == schedule
    with pytest.raises(ValueError, match=r"sparsity 0\.8 already, the schedule ends at 0\.8"):
        schedule.above(0.8)
    assert from_plain(PruningSchedule, to_plain(HAND)) == HAND


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sparsities": ()}, "sparsities are"),
        ({"sparsities": (0.4, 0.4)}, "rising"),
        ({"sparsities": (0.4, 1.0)}, "below 1"),
        ({"warm_up": 0}, "warm_up is 0"),
        ({"period": 0}, "period is 0"),
        ({"average_length": 6}, "less than the period"),
        ({"smooth_factor": 1.0}, r"smooth_factor is 1\.0"),
        ({"tolerance": -1.0}, r"tolerance -1\.0"),
        ({"max_extensions": -1}, "max_extensions is -1"),
        ({"latest_pruning": 15}, "3 prunings last until update 16"),
    ],
)
def test_mistakes(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(HAND, **changes)
