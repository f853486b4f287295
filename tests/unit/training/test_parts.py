"""Seeds, order of micro-batches, metrics, sentinels."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest
import torch

from sslim.training import masked_prediction_sentinels, read_metrics
from sslim.training.loading import Position, StepKeys, micro_batches
from sslim.training.metrics import MetricsLog, Sums, means
from sslim.training.seeds import derive_seed
from toy_training import ToyBatches


def test_seeds_depend_on_every_part_and_never_change():
    seeds = {derive_seed(run, name, step, j) for run in range(3) for name in "ab" for step in range(5) for j in range(4)}
    assert len(seeds) == 3 * 2 * 5 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(0, "forward", 7, 1) == 115684854297378777  # a resumed run may use another version of sslim


def keys(
    rank: int = 0, world_size: int = 1, accumulate: int = 4, start: Position | None = None, num_steps: int = 6
) -> StepKeys:
    return StepKeys(
        start=start or Position(),
        num_steps=num_steps,
        accumulate=accumulate,
        rank=rank,
        world_size=world_size,
        num_batches=10,
    )


def test_processes_share_the_micro_batches_of_one():
    alone = list(keys())
    assert alone[8:13] == [(0, 8), (0, 9), (0, 0), (0, 1), (1, 0)]  # the epoch's last step is filled from its beginning
    first, second = list(keys(0, 2, 2)), list(keys(1, 2, 2))
    assert [key for pair in zip(first, second, strict=True) for key in pair] == alone


def test_the_rest_of_the_keys_follows_from_the_position():
    position = Position()
    for done in range(6):
        assert list(keys(start=position, num_steps=6 - done)) == list(keys())[4 * done :]
        position = position.after(4, 10)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where one core is all there is
@pytest.mark.parametrize("num_workers", [0, 2])
def test_micro_batches_come_in_order(num_workers: int):
    source = ToyBatches(10)
    wanted = [source[key].ids for key in keys()]
    assert [batch.ids for batch in micro_batches(source, keys(), num_workers=num_workers, pin_memory=False)] == wanted


def test_the_fetching_thread_passes_errors_on_and_ends():
    def fail(key: tuple[int, int]) -> None:
        if key == (0, 3):
            raise ValueError("unreadable")

    stream = micro_batches(ToyBatches(10, hook=fail), keys(), num_workers=0, pin_memory=False)
    for _ in range(3):
        next(stream)
    with pytest.raises(ValueError, match="unreadable"):
        next(stream)
    stream = micro_batches(ToyBatches(10), keys(), num_workers=0, pin_memory=False)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "sslim-batches"]


# ---- metrics ---------------------------------------------------------------------------------------------------------------


def test_sums_go_through_json_unchanged():
    sums = Sums(torch.device("cpu"))
    sums.add({"loss": (torch.tensor(0.1), torch.tensor(3)), "norm": (1 / 3, 1.0)})
    again = Sums(torch.device("cpu"), json.loads(json.dumps(sums.plain())))
    for part in (sums, again):
        part.add({"loss": (torch.tensor(0.7), 2.0)})
    assert again.plain() == sums.plain()
    assert means(sums.plain())["loss"] == pytest.approx(0.8 / 5)
    assert means({"empty": [0.0, 0.0], "endless": [math.inf, 1.0]}) == {"empty": None, "endless": None}


def test_the_log_is_cut_where_the_checkpoint_was_made(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write({"step": 1, "kind": "train", "loss": 1.0})
    position = log.position()
    log.write({"step": 2, "kind": "train", "loss": 2.0})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 3, "ki')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
    log = MetricsLog(path, position=position)
    log.write({"step": 2, "kind": "valid", "loss": 3.0})
    log.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 1.0), (2, 3.0)]
    assert [r["loss"] for r in read_metrics(path, kind="valid")] == [3.0]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricsLog(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "tensorboard")
    log.write({"step": 5, "kind": "train", "loss": 1.5, "accuracy": None})
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(5, 1.5)]


# ---- sentinels -------------------------------------------------------------------------------------------------------------

HEALTHY = {
    "masked_accuracy": 0.2,
    "unmasked_accuracy": 0.5,
    "mean_prediction_entropy": 4.0,
    "target_entropy": 4.2,
    "masked_loss": 3.0,
}


def warnings_of(changes: dict[str, float], steps: tuple[int, ...] = (600, 650, 700)) -> set[str]:
    records = [{"step": step, "kind": "train", **HEALTHY, **changes} for step in steps]
    return {name for name, sentinel in masked_prediction_sentinels(100).items() if sentinel(records)}


def test_each_sentinel_sees_its_own_trouble_and_nothing_else():
    assert warnings_of({}) == set()
    assert warnings_of({"unmasked_accuracy": 0.15}) == {"unmasked_not_above_masked"}
    assert warnings_of({"mean_prediction_entropy": 0.1}) == {"predictions_collapsed"}
    assert warnings_of({"target_entropy": math.log(3.0), "mean_prediction_entropy": 1.0}) == {"targets_poor"}
    assert warnings_of({"masked_loss": 4.7}) == {"loss_above_guessing"}  # ln(100) = 4.605


def test_sentinels_wait_for_steps_and_for_several_records():
    trouble = {"unmasked_accuracy": 0.15, "masked_loss": 9.0, "mean_prediction_entropy": 0.1}
    assert warnings_of(trouble, steps=(100, 150, 200)) == set()
    assert warnings_of(trouble, steps=(700,)) == set()
    missing: dict = {"masked_loss": None, "unmasked_accuracy": None, "mean_prediction_entropy": None}
    assert warnings_of(missing) == set()
    mixed = [{"step": s, **HEALTHY, "masked_loss": loss} for s, loss in ((600, 9.0), (650, 3.0), (700, 9.0))]
    assert not any(sentinel(mixed) for sentinel in masked_prediction_sentinels(100).values())
