"""The trainer in one process: weighting, bad steps, stopping, refusing."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from sslim.batch import IGNORED_LABEL, Batch
from sslim.storage import load_tensors
from sslim.training import OptimizerConfig, Processes, ScheduleConfig, TrainerConfig, TrainingError, read_metrics
from sslim.training.engine import Engine
from toy_training import ToyBatches, ToyObjective, toy_config, toy_trainer

CPU = torch.device("cpu")


class NoMask(ToyObjective):
    """Deterministic: no dropout, every second frame masked."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)

    def prepare(self, batch: Batch, generator: torch.Generator):
        prepared = super().prepare(batch, generator)
        mask_BT = (torch.arange(prepared.mask_BT.shape[1]) % 2 == 0).expand_as(prepared.mask_BT)
        real_BT = batch.labels != IGNORED_LABEL
        weights = {"masked": (mask_BT & real_BT).sum(), "unmasked": (~mask_BT & real_BT).sum()}
        return type(prepared)(batch=batch, mask_BT=mask_BT, weights=weights)


def joined(batches: list[Batch]) -> Batch:
    longest = max(b.inputs.shape[1] for b in batches)

    def pad(x: torch.Tensor, value: float) -> torch.Tensor:
        extra = (0, 0) * (x.dim() - 2) + (0, longest - x.shape[1])
        return torch.nn.functional.pad(x, extra, value=value)

    return Batch(
        inputs=torch.cat([pad(b.inputs, 0.0) for b in batches]),
        lengths=torch.cat([b.lengths for b in batches]),
        labels=torch.cat([pad(b.labels, IGNORED_LABEL) for b in batches]),  # type: ignore[arg-type]
        ids=tuple(i for b in batches for i in b.ids),
    )


def gradients_of(batches: list[Batch]) -> tuple[list[torch.Tensor], float]:
    objective = NoMask()
    engine = Engine(objective, toy_config(max_grad_norm=None), CPU, Processes())
    captured: list[torch.Tensor] = []
    engine.optimizer.step = lambda: captured.extend(p.grad.clone() for p in engine.parameters)  # type: ignore[method-assign,assignment]
    outcome = engine.train_step(batches, 0, 0.1)
    assert outcome.gradient_norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in captured)), rel=1e-5)
    return captured, sum(outcome.losses)


def test_every_frame_weighs_the_same_however_the_step_is_cut():
    """The references take the mean of micro-batch means, so frames of short micro-batches weigh more."""
    batches = [ToyBatches()[0, i] for i in range(3)]
    together, loss = gradients_of([joined(batches)])
    apart, other_loss = gradients_of(batches)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for a, b in zip(together, apart, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    mean_of_means = sum(gradients_of([batch])[1] for batch in batches) / 3
    assert abs(mean_of_means - loss) > 1e-3  # control: with these sizes the difference is there


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_names_its_utterances(tmp_path: Path, poison: float):
    batches = ToyBatches(num_batches=100)
    batches.poison[0, 3] = poison  # the second micro-batch of step 1
    trainer = toy_trainer(tmp_path / "run", toy_config(total_steps=2, log_every=1), batches)
    engine, seen = trainer.engine, []
    before_step = engine.train_step

    def watched(*arguments):
        state = copy.deepcopy((trainer.objective.state_dict(), engine.optimizer.state_dict()["state"]))
        outcome = before_step(*arguments)
        seen.append((outcome, state, copy.deepcopy((trainer.objective.state_dict(), engine.optimizer.state_dict()["state"]))))
        return outcome

    engine.train_step = watched  # type: ignore[method-assign]
    result = trainer.run()
    assert [outcome.updated for outcome, _, _ in seen] == [True, False]
    (_, before, after), (_, good_before, good_after) = seen[1], seen[0]
    assert all(before[0][k].equal(after[0][k]) for k in before[0])
    assert all(before[1][i][f].equal(after[1][i][f]) for i in before[1] for f in before[1][i])
    assert not all(good_before[0][k].equal(good_after[0][k]) for k in good_before[0])
    assert result.skipped_steps == 1
    assert result.step == 2
    (event,) = read_metrics(tmp_path / "run", kind="event")
    assert event["event"] == "non_finite"
    assert event["step"] == 1
    told = batches[0, 3].ids if math.isnan(poison) else batches[0, 2].ids + batches[0, 3].ids  # infinity keeps the loss finite
    assert event["utterances"] == list(told)
    records = read_metrics(tmp_path / "run", kind="train")
    assert [r["skipped_steps"] for r in records] == [0, 1]
    assert "loss" not in records[1]  # nothing was learnt in that window


def test_an_infinite_gradient_with_a_finite_loss_is_skipped_too():
    """In the references infinity passes the NaN test and Adam writes NaN (spec/melhubert.md, trap 22)."""
    objective = NoMask()
    objective.head.weight.register_hook(lambda gradient: gradient * math.inf)
    engine = Engine(objective, toy_config(), CPU, Processes())
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    outcome = engine.train_step([ToyBatches()[0, 0]], 0, 0.1)
    assert not outcome.updated
    assert math.isfinite(outcome.losses[0])
    assert all(before[k].equal(v) for k, v in objective.state_dict().items())


def test_too_many_bad_steps_end_the_run_with_a_sentence(tmp_path: Path):
    batches = ToyBatches(num_batches=100)
    batches.poison.update({(0, i): math.nan for i in (1, 4, 6, 8)})  # steps 0, 2, 3, 4 (two micro-batches each)
    with pytest.raises(TrainingError, match=r"after 3 skipped steps in a row; the last: step 4 .* not finite .* e0b8u0"):
        toy_trainer(tmp_path / "run", toy_config(max_bad_steps=3), batches).run()
    toy_trainer(tmp_path / "other", toy_config(max_bad_steps=4, total_steps=8), batches).run()


def test_the_loss_falls(tmp_path: Path):
    config = toy_config(total_steps=200, log_every=20, optimizer=OptimizerConfig(lr=2e-2), save_every=1000, validate_every=200)
    toy_trainer(tmp_path / "run", config, objective=ToyObjective(dropout=0.0)).run()
    losses = [r["loss"] for r in read_metrics(tmp_path / "run", kind="train")]
    assert losses[-1] < 0.8 * losses[0]


def test_records_are_means_over_real_frames_of_the_window(tmp_path: Path):
    """Against the same steps logged one by one; WALL-clock fields exist and are sane."""
    for name, every in (("one", 1), ("three", 3)):
        toy_trainer(tmp_path / name, toy_config(total_steps=3, log_every=every)).run()
    single, (window,) = read_metrics(tmp_path / "one", kind="train"), read_metrics(tmp_path / "three", kind="train")
    assert window["loss"] == pytest.approx(sum(r["loss"] for r in single) / 3)
    assert window["gradient_norm"] == pytest.approx(sum(r["gradient_norm"] for r in single) / 3)
    counts = []
    for step in range(3):
        objective = ToyObjective()
        engine = Engine(objective, toy_config(), CPU, Processes())
        batches = [ToyBatches()[key] for key in ([(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4), (0, 5)])[step]]
        counts.append(sum(int(engine._prepare(b, step, j).weights["masked"]) for j, b in enumerate(batches)))
    weighted = sum(r["masked_loss"] * n for r, n in zip(single, counts, strict=True)) / sum(counts)
    assert window["masked_loss"] == pytest.approx(weighted, rel=1e-6)
    assert 0 <= window["data_wait_share"] <= 1
    assert window["audio_seconds_per_second"] > 0


def test_validation_is_the_same_every_time_and_leaves_no_trace(tmp_path: Path):
    seen = []
    for validate_every in (2, 24):
        folder = tmp_path / str(validate_every)
        trainer = toy_trainer(folder, toy_config(validate_every=validate_every))
        seen.append(trainer.run().validation["loss"])
    assert seen[0] == seen[1]
    name = "model/model.safetensors"
    assert (tmp_path / "2" / name).read_bytes() == (tmp_path / "24" / name).read_bytes()
    # One micro-batch or three: the mean over all validation frames.
    engine = Engine(NoMask(), toy_config(), CPU, Processes())
    source = ToyBatches(3)

    class One(ToyBatches):
        def __getitem__(self, key: tuple[int, int]) -> Batch:
            return joined([source[0, i] for i in range(3)])

    other = Engine(NoMask(), toy_config(), CPU, Processes())
    three, one = engine.evaluate(source, lambda: False), other.evaluate(One(1), lambda: False)
    assert three == pytest.approx(one, rel=1e-6)


def test_a_time_limit_ends_the_run_properly(tmp_path: Path):
    config = toy_config(total_steps=None, max_minutes=0.005, schedule=ScheduleConfig(), save_every=10_000, validate_every=None)
    result = toy_trainer(tmp_path / "run", config).run()
    assert result.finished
    assert result.step > 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    again = toy_trainer(tmp_path / "run", config).run()
    assert again.step == result.step  # the time is over for all sessions together


def test_epochs_count_whole_passes(tmp_path: Path):
    batches = ToyBatches(num_batches=5)
    result = toy_trainer(tmp_path / "run", toy_config(total_steps=None, epochs=3, save_every_epochs=1), batches).run()
    assert result.step == 9  # five micro-batches, two in a step: three steps
    assert {key for key in batches.asked if key[0] == 1} == {(1, i) for i in range(5)}
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step-00000006", "step-00000009"]


def test_a_finished_run_can_be_lengthened(tmp_path: Path):
    constant = ScheduleConfig()
    for total in (6, 10):
        toy_trainer(tmp_path / "a", toy_config(total_steps=total, schedule=constant)).run()
    toy_trainer(tmp_path / "b", toy_config(total_steps=10, schedule=constant)).run()
    name = "model/model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_does_not_belong_together_is_refused(tmp_path: Path):
    run = tmp_path / "run"
    toy_trainer(run, toy_config(total_steps=5), description={"recipe": {"training": {"seed": 1, "log_every": 3}}}).run()

    def refused(match: str, folder: Path = run, batches: ToyBatches | None = None, **options) -> None:
        description = options.pop("description", {"recipe": {"training": {"seed": 1, "log_every": 7}}})
        with pytest.raises(ValueError, match=match):
            toy_trainer(folder, toy_config(total_steps=7), batches, description=description, **options).run()

    different = {"recipe": {"training": {"seed": 2, "log_every": 3}}}
    refused(r"holds a run with recipe\.training\.seed = 1, this command asks for 2", description=different)
    refused("the training data are not those", batches=ToyBatches(digest="others"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").touch()
    refused("is not empty and has no run.json", folder=tmp_path / "photos")

    trainer = toy_trainer(run, toy_config(total_steps=5))
    with trainer.folder.lock():
        refused("another process is training in")
    options = {"description": {"recipe": {"training": {"seed": 1, "log_every": 7}}}}  # log_every may change
    assert toy_trainer(run, toy_config(total_steps=7), **options).run().step == 7


def test_another_objective_is_refused_by_name(tmp_path: Path):
    toy_trainer(tmp_path / "run", toy_config(total_steps=5)).run()
    larger = ToyObjective(rare=True)
    larger.head = torch.nn.Linear(8, 6)
    with pytest.raises(ValueError, match=r"'head\.bias' has shape \(5,\), the objective \(6,\)"):
        toy_trainer(tmp_path / "run", toy_config(total_steps=6), objective=larger).run()
    extended = ToyObjective(rare=True)
    extended.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'extra\.bias' is only in the objective"):
        toy_trainer(tmp_path / "run", toy_config(total_steps=6), objective=extended).run()


def test_a_signal_during_validation_is_made_up_for(tmp_path: Path):
    def interrupt(key: tuple[int, int]) -> None:
        if interrupt.armed and key == (0, 1):  # type: ignore[attr-defined]
            interrupt.armed = False  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGTERM)

    interrupt.armed = False  # type: ignore[attr-defined]
    validation = ToyBatches(3, "toy validation", hook=interrupt)
    trainer = toy_trainer(tmp_path / "run", toy_config(), validation=validation)
    trainer.engine.evaluate, whole = _arming(trainer.engine, interrupt), trainer.engine.evaluate  # type: ignore[method-assign]
    result = trainer.run()
    assert (result.step, result.finished, result.exit_code) == (6, False, 143)
    assert read_metrics(tmp_path / "run", kind="valid") == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    toy_trainer(tmp_path / "run", toy_config()).run()
    toy_trainer(tmp_path / "other", toy_config()).run()
    kinds = [[(r["step"], r["kind"], r.get("loss")) for r in read_metrics(tmp_path / name)] for name in ("run", "other")]
    assert kinds[0] == kinds[1]
    assert whole is not None


def _arming(engine: Engine, interrupt):
    evaluate = engine.evaluate

    def armed(source, stopped):
        engine.evaluate = evaluate  # type: ignore[method-assign]
        interrupt.armed = True
        return evaluate(source, stopped)

    return armed


def test_sentinels_warn_once_also_after_resuming(tmp_path: Path):
    def late(records) -> str | None:
        return f"loss {records[-1]['loss']:.1f}, {len(records)} records" if len(records) >= 2 else None

    for total in (9, 24):
        toy_trainer(tmp_path / "run", toy_config(total_steps=total), sentinels={"late": late}).run()
    (event,) = read_metrics(tmp_path / "run", kind="event")
    assert (event["step"], event["event"], event["sentinel"]) == (6, "warning", "late")


def test_the_first_batch_is_checked(tmp_path: Path):
    def check(batch: Batch) -> None:
        raise ValueError(f"utterance {batch.ids[0]} is silent")

    with pytest.raises(ValueError, match="utterance e0b0u0 is silent"):
        toy_trainer(tmp_path / "run", toy_config(), batch_check=check).run()


def test_moments_of_another_run_are_taken_over_without_its_learning_rate(tmp_path: Path):
    toy_trainer(tmp_path / "first", toy_config(total_steps=10)).run()
    config = toy_config(total_steps=1, optimizer=OptimizerConfig(kind="adamw", lr=1e-9), schedule=ScheduleConfig())
    trainer = toy_trainer(tmp_path / "second", config, init_optimizer_from=tmp_path / "first")
    before = {k: v.clone() for k, v in trainer.objective.state_dict().items()}
    trainer.run()
    stored = load_tensors(tmp_path / "second" / "checkpoints" / "step-00000001" / "optimizer.safetensors")
    assert float(stored["head.weight/step"]) == 11
    moved = max(float((before[k] - v).abs().max()) for k, v in trainer.objective.state_dict().items())
    assert 0 < moved < 1e-7


class Framewise(torch.nn.Module):
    """In place of the GRU, which torch.compile does not trace."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 8)

    def forward(self, x_BTF: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.linear(x_BTF), None


def test_compiled_and_workers_give_the_same_run(tmp_path: Path):
    plain = toy_config(total_steps=4, save_every=100, validate_every=None)
    compiled = toy_config(
        total_steps=4, save_every=100, validate_every=None, compile=True, compile_backend="eager", num_workers=1
    )
    for name, config in (("plain", plain), ("compiled", compiled)):
        objective = ToyObjective()
        objective.encoder = Framewise()  # type: ignore[assignment]
        torch.nn.init.ones_(objective.encoder.linear.weight)
        toy_trainer(tmp_path / name, config, validation=None, objective=objective).run()
    losses = [[r["loss"] for r in read_metrics(tmp_path / name, kind="train")] for name in ("plain", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_bf16_stays_near_fp32_and_keeps_fp32_parameters(tmp_path: Path):
    losses = {}
    for precision in ("fp32", "bf16"):
        config = toy_config(total_steps=6, precision=precision)
        trainer = toy_trainer(tmp_path / precision, config, objective=NoMask())
        trainer.run()
        assert {p.dtype for p in trainer.objective.parameters()} == {torch.float32}
        losses[precision] = [r["loss"] for r in read_metrics(tmp_path / precision, kind="train")]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]


def test_settings_are_checked():
    for settings, sentence in (
        ({}, "nothing says when to stop"),
        ({"total_steps": 5, "epochs": 2}, "both given"),
        ({"total_steps": 0}, "total_steps is 0; it must be above 0"),
        ({"max_minutes": 1.0, "schedule": ScheduleConfig(kind="linear")}, "max_minutes alone does not give the steps"),
    ):
        with pytest.raises(ValueError, match=sentence):
            TrainerConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ToyObjective has no gradient checkpointing"):
        Engine(ToyObjective(), toy_config(gradient_checkpointing=True), CPU, Processes())


def test_gradient_checkpointing_is_switched_on_where_the_objective_has_it():
    class Thrifty(ToyObjective):
        enabled = False

        def set_gradient_checkpointing(self, enabled: bool) -> None:
            self.enabled = enabled

    for wanted in (True, False):
        objective = Thrifty()
        Engine(objective, toy_config(gradient_checkpointing=wanted), CPU, Processes())
        assert objective.enabled is wanted


def test_run_json_is_complete_json(tmp_path: Path):
    toy_trainer(tmp_path / "run", toy_config(total_steps=1)).run()
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["trainer"]["optimizer"]["lr"] == 1e-2
