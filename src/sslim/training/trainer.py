"""The training loop and its run folder. It knows protocols only: what is learnt, from what, and into which model is its
parts' business.

Order at the end of a step: train record, validation, checkpoint. A checkpoint holds the size of the log, so what a killed
run wrote after it is cut off and written again by the next session.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sslim.batch import Batch
from sslim.config import to_plain
from sslim.training.config import TrainerConfig
from sslim.training.distributed import Processes, pick_device
from sslim.training.engine import Engine, StepOutcome, TrainingError, suspects
from sslim.training.loading import StepKeys, micro_batches
from sslim.training.metrics import MetricsLog, Stopwatch, Sums, means, read_metrics
from sslim.training.optimizers import load_optimizer_state
from sslim.training.progress import ProgressLine
from sslim.training.protocols import BatchCheck, BatchSource, Record, SaveModel, Sentinel
from sslim.training.run_folder import RunFolder, find_checkpoint
from sslim.training.schedules import learning_rate_factor
from sslim.training.signals import StopSignals
from sslim.training.state import TrainerState, TrainingResult, read_checkpoint, write_checkpoint

HISTORY = 16  # train records that sentinels see


class Trainer:
    """Trains an objective in a run folder; running the same command again goes on where it stopped.

    Args:
        objective: An ``nn.Module`` with the ``Objective`` protocol, on any device; parameters initialised.
        batches: Training micro-batches.
        config: Settings.
        folder: Run folder; on a file system that all processes see.
        save_model: Writes the native model folder.
        validation: Validation micro-batches; always their epoch 0.
        description: Resolved configuration for ``run.json``, by default only the trainer's; see ``RunFolder.describe``.
        may_change: Dotted keys of it that may differ when a run resumes.
        sentinels: Warnings by name.
        batch_check: Looks at the first micro-batch of every session and raises ValueError if it is unfit.
        init_optimizer_from: Run or checkpoint folder whose moments a fresh run starts with.
        processes: From ``join_processes``.
    """

    def __init__(
        self,
        objective: nn.Module,
        batches: BatchSource,
        config: TrainerConfig,
        folder: str | Path,
        *,
        save_model: SaveModel,
        validation: BatchSource | None = None,
        description: Mapping[str, Any] | None = None,
        may_change: Collection[str] = (),
        sentinels: Mapping[str, Sentinel] | None = None,
        batch_check: BatchCheck | None = None,
        init_optimizer_from: str | Path | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes()
        self.device = pick_device(config.device, self.processes)
        self.objective, self.batches, self.validation, self.config = objective.to(self.device), batches, validation, config
        self.engine = Engine(self.objective, config, self.device, self.processes)
        self.folder, self.save_model = RunFolder(folder), save_model
        self.description = description or {"format_version": 1, "trainer": to_plain(config)}
        self.may_change = may_change
        self.sentinels, self.batch_check, self.init_optimizer_from = dict(sentinels or {}), batch_check, init_optimizer_from
        self.micro_batches_per_step = config.accumulate * self.processes.world_size
        steps_per_epoch = math.ceil(batches.num_batches / self.micro_batches_per_step)
        self.total_steps = config.total_steps if config.epochs is None else config.epochs * steps_per_epoch
        epochs = config.save_every_epochs
        self.save_every = config.save_every if epochs is None else epochs * steps_per_epoch
        self.state = TrainerState(data_digest=batches.digest, micro_batches_per_step=self.micro_batches_per_step)
        self.window, self.watch = Sums(self.device), Stopwatch()
        self.history: deque[Record] = deque(maxlen=HISTORY)
        self.last_validation: Record = {}
        self.saved_step = -1

    def run(self) -> TrainingResult:
        """Trains to the end, to a signal or to the time limit.

        Raises:
            ValueError: The folder or a batch is unfit.
            TrainingError: Too many steps in a row were not finite, or memory is short.
        """
        with ExitStack() as stack:
            self.signals = stack.enter_context(StopSignals())
            self.line = ProgressLine(self.total_steps, shown=self.processes.is_main)
            if self.processes.is_main:
                stack.enter_context(self.folder.lock())
                self.folder.describe(self.description, self.may_change)
            self._resume()
            self.log = self._open_log()
            stack.callback(self.log.close)
            self.engine.begin()
            self.line.begin(self.state.step)
            if self.engine.advice:
                self.line.say(self.engine.advice)
            stack.callback(self.line.end)
            signal = self._loop()
            self._finish(interrupted=bool(signal))
        return TrainingResult(
            step=self.state.step,
            finished=not signal,
            exit_code=128 + signal if signal else 0,
            skipped_steps=self.state.skipped_steps,
            validation=self.last_validation,
        )

    def _resume(self) -> None:
        """Restores the newest whole checkpoint; a fresh run takes the initial optimiser state, if any."""
        path = self.folder.newest_checkpoint(self.line.say) if self.processes.is_main else None
        path = self.processes.from_main(path)
        if path is None:
            if self.init_optimizer_from is not None:
                new = load_optimizer_state(find_checkpoint(self.init_optimizer_from), self.engine.optimizer, self.objective)
                self.line.say(f"optimiser state from {self.init_optimizer_from}; {len(new)} parameters start without")
            return
        self.state = state = read_checkpoint(path, self.objective, self.engine.optimizer)
        if state.data_digest != self.batches.digest:
            raise ValueError(
                f"the training data are not those that {path} was trained on; use another --output, or the same data"
            )
        if state.micro_batches_per_step != self.micro_batches_per_step:
            before, state.micro_batches_per_step = state.micro_batches_per_step, self.micro_batches_per_step
            self.line.say(f"a step now has {self.micro_batches_per_step} micro-batches, until here it had {before}")
        self.window = Sums(self.device, state.window if self.processes.is_main else {})
        self.saved_step = state.step

    def _open_log(self) -> MetricsLog:
        if not self.processes.is_main:
            return MetricsLog(None)
        tensorboard = self.folder.path / "tensorboard" if self.config.tensorboard else None
        path, state = self.folder.metrics_path, self.state
        log = MetricsLog(path, position=state.log_bytes, tensorboard=tensorboard, step=state.step)
        for record in read_metrics(path):
            if record["kind"] == "train":
                self.history.append(record)
            elif record["kind"] == "valid":
                self.last_validation = record
        facts = {"step": state.step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "device": str(self.device)}
        self.folder.note_session({**facts, "world_size": self.processes.world_size, "torch": torch.__version__})
        return log

    def _loop(self) -> int:
        """Steps until the run is over or a signal came; returns the signal's number, or 0."""
        state = self.state
        if self._validation_due() and state.validated_step != state.step:
            self._validate()  # a signal had cut it short
        began, before_s = time.monotonic(), state.elapsed_s
        signal, over = self._ending()
        stream = iter(()) if signal or over else self._stream()
        self.watch.restart()
        while not signal and not over:
            batches = [self._next(stream) for _ in range(self.config.accumulate)]
            self._account(batches, self.engine.train_step(batches, state.step, self._learning_rate(state.step)))
            state.elapsed_s = before_s + time.monotonic() - began
            self.line.step(state.step)
            if state.step % self.config.log_every == 0:
                self._record()
            if self._validation_due():
                self._validate()
            signal, over = self._ending()
            if state.step % self.save_every == 0 and not over:
                self._save()
        return signal

    def _ending(self) -> tuple[int, bool]:
        limit_s = math.inf if self.config.max_minutes is None else 60.0 * self.config.max_minutes
        signal, late = self.processes.maximum([self.signals.received, self.state.elapsed_s >= limit_s], self.device)
        return int(signal), bool(late) or (self.total_steps is not None and self.state.step >= self.total_steps)

    def _stream(self) -> Iterator[Batch]:
        keys = StepKeys(
            start=self.state.position,
            num_steps=2**60 if self.total_steps is None else self.total_steps - self.state.step,
            accumulate=self.config.accumulate,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            num_batches=self.batches.num_batches,
        )
        pin = self.device.type == "cuda"
        return micro_batches(self.batches, keys, num_workers=self.config.num_workers, pin_memory=pin)

    def _next(self, stream: Iterator[Batch]) -> Batch:
        with self.watch.waiting():
            batch = next(stream)
        self.watch.audio_s += batch.duration_s
        if self.batch_check is not None:
            self.batch_check(batch)
            self.batch_check = None
        return batch

    def _learning_rate(self, step: int) -> float:
        return self.config.optimizer.lr * learning_rate_factor(self.config.schedule, step, self.total_steps)

    def _account(self, batches: list[Batch], outcome: StepOutcome) -> None:
        """Moves the state past a step; a skipped one is counted and told, and leaves the metrics alone."""
        state = self.state
        if outcome.updated:
            state.bad_in_a_row = 0
            self.window.merge(outcome.sums)
        else:
            state.skipped_steps += 1
            state.bad_in_a_row += 1
            self._tell_skipped(batches, outcome)
        state.step += 1
        state.position = state.position.after(self.micro_batches_per_step, self.batches.num_batches)
        self.watch.steps += 1

    def _tell_skipped(self, batches: list[Batch], outcome: StepOutcome) -> None:
        names = suspects(batches, outcome, self.processes)
        told = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        in_a_row = self.state.bad_in_a_row
        fault = f"its loss or gradient is not finite (gradient norm {outcome.gradient_norm})"
        if not outcome.scored:
            fault = "nothing in it is scored, so there is nothing to learn from"
        sentence = f"step {self.state.step} is skipped: {fault}, utterances {told}"
        self._event("non_finite" if outcome.scored else "unscored", sentence, utterances=names[:16])
        if in_a_row >= min(self.config.max_bad_steps, self.total_steps or self.config.max_bad_steps):
            raise TrainingError(f"training stops after {in_a_row} skipped steps in a row; the last: {sentence}")

    def _event(self, name: str, sentence: str, **facts: Any) -> None:
        self.log.write({"step": self.state.step, "kind": "event", "event": name, "message": sentence, **facts})
        self.line.say(sentence)

    def _record(self) -> None:
        """Writes a train record of the steps since the last one, and lets the sentinels look at it."""
        state, sums = self.state, self.window.gathered(self.processes)
        self.window = Sums(self.device)
        epoch = round(state.position.epoch + state.position.index / self.batches.num_batches, 4)
        record = {"step": state.step, "kind": "train", "epoch": epoch, **means(sums), "lr": self._learning_rate(state.step - 1)}
        record |= {
            "skipped_steps": state.skipped_steps,
            **self.watch.figures(self.processes),
            "elapsed_s": round(state.elapsed_s, 3),
        }
        self.log.write(record)
        self.line.record(record)
        self.history.append(record)
        for name, sentinel in self.sentinels.items():
            if name not in state.warned and (sentence := sentinel(list(self.history))) is not None:
                state.warned.append(name)
                self._event("warning", sentence, sentinel=name)

    def _validation_due(self) -> bool:
        every = self.config.validate_every
        return self.validation is not None and every is not None and self.state.step > 0 and self.state.step % every == 0

    def _validate(self) -> None:
        assert self.validation is not None
        with self.watch.paused():
            figures = self.engine.evaluate(self.validation, lambda: bool(self.signals.received))
        if figures is not None:
            self.state.validated_step = self.state.step
            self.last_validation = {"step": self.state.step, "kind": "valid", **figures}
            self.log.write(self.last_validation)
            self.line.record(self.last_validation)

    def _save(self) -> None:
        """Saves a checkpoint, once a step; all processes come here together."""
        state = self.state
        if self.saved_step == state.step:
            return
        with self.watch.paused():
            state.window = self.window.gathered(self.processes)
            self.window = Sums(self.device, state.window if self.processes.is_main else {})
            state.log_bytes = self.log.position()
            if self.processes.is_main:
                self.folder.save_checkpoint(state.step, self._write, self.config.keep_checkpoints)
            self.processes.wait()
        self.saved_step = state.step

    def _write(self, folder: Path) -> None:
        write_checkpoint(folder, self.state, self.objective, self.engine.optimizer)
        self.save_model(folder / "model")

    def _finish(self, *, interrupted: bool) -> None:
        if not interrupted and self.validation is not None and self.state.validated_step != self.state.step:
            self._validate()
        self._save()
        if self.processes.is_main and not interrupted:
            self.save_model(self.folder.model_path)
        self.processes.wait()
