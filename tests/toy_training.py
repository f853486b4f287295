"""A tiny objective and source for trainer tests; as a script, one session of a run that tests kill at will."""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sslim.batch import IGNORED_LABEL, Batch, StepOutput, valid_mask
from sslim.storage import save_tensors
from sslim.training import OptimizerConfig, ScheduleConfig, Trainer, TrainerConfig, TrainingResult, join_processes

NUM_CLASSES, WIDTH = 5, 4


@dataclass(frozen=True, kw_only=True)
class ToyPrepared:
    batch: Batch
    mask_BT: Tensor
    weights: dict[str, Tensor]


class ToyObjective(nn.Module):
    """Names each frame's class; masked frames are zeroed. Dropout, masks and unequal frame counts on purpose."""

    def __init__(self, seed: int = 0, dropout: float = 0.2, *, rare: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.GRU(WIDTH, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, NUM_CLASSES)
        self.rare = nn.Parameter(torch.zeros(NUM_CLASSES)) if rare else None  # used by few micro-batches only

    def prepare(self, batch: Batch, generator: torch.Generator) -> ToyPrepared:
        assert batch.labels is not None
        mask_BT = torch.rand(batch.labels.shape, generator=generator) < 0.4
        real_BT = batch.labels != IGNORED_LABEL
        weights = {"masked": (mask_BT & real_BT).sum(), "unmasked": (~mask_BT & real_BT).sum()}
        return ToyPrepared(batch=batch, mask_BT=mask_BT, weights=weights)

    def forward(self, prepared: ToyPrepared, totals: dict[str, Tensor]) -> StepOutput:
        inputs, labels_BT = prepared.batch.inputs.float(), prepared.batch.labels
        hidden = torch.where(prepared.mask_BT[..., None], 0.0, inputs)
        logits = self.head(self.dropout(self.norm(self.encoder(hidden)[0]))).float()
        if self.rare is not None and logits.shape[1] in (8, 9, 10):
            logits = logits + self.rare
        loss_BT = nn.functional.cross_entropy(logits.transpose(1, 2), labels_BT, reduction="none", ignore_index=IGNORED_LABEL)
        masked, unmasked = (loss_BT * prepared.mask_BT).sum(), (loss_BT * ~prepared.mask_BT).sum()
        loss = masked / totals["masked"] + 0.5 * unmasked / totals["unmasked"]
        correct_BT = (logits.argmax(-1) == labels_BT) & prepared.mask_BT
        return StepOutput(
            loss=loss,
            metrics={
                "masked_loss": (masked.detach(), prepared.weights["masked"]),
                "masked_accuracy": (correct_BT.sum(), prepared.weights["masked"]),
            },
        )


class ToyBatches:
    """Random features whose class is the largest channel (or class 4); every micro-batch has another size.

    ``poison`` maps keys to a value put into the features of the first utterance. ``hook(key)`` runs before a micro-batch is
    made.
    """

    def __init__(
        self, num_batches: int = 7, digest: str = "toy", hook: Callable[[tuple[int, int]], None] | None = None
    ) -> None:
        self.num_batches, self.digest, self.hook = num_batches, digest, hook
        self.poison: dict[tuple[int, int], float] = {}
        self.asked: list[tuple[int, int]] = []

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        if self.hook is not None:
            self.hook(key)
        self.asked.append(key)
        rng = np.random.default_rng([*key, 99])
        size, num_frames = int(rng.integers(2, 5)), int(rng.integers(5, 20))
        inputs = torch.from_numpy(rng.standard_normal((size, num_frames, WIDTH)).astype(np.float32))
        lengths = torch.from_numpy(rng.integers(3, num_frames + 1, size))
        labels = torch.where(inputs.amax(-1) > 0.3, inputs.argmax(-1), NUM_CLASSES - 1)
        labels = labels.masked_fill(~valid_mask(lengths, num_frames), IGNORED_LABEL)
        if key in self.poison:
            inputs[0, :, 0] = self.poison[key]
        ids = tuple(f"e{key[0]}b{key[1]}u{i}" for i in range(size))
        return Batch(inputs=inputs, lengths=lengths, ids=ids, labels=labels, duration_s=0.02 * int(lengths.sum()))


def toy_config(**changes) -> TrainerConfig:
    defaults = {
        "total_steps": 24,
        "accumulate": 2,
        "log_every": 3,
        "validate_every": 6,
        "save_every": 5,
        "max_grad_norm": 1.0,
        "device": "cpu",
        "optimizer": OptimizerConfig(kind="adamw", lr=1e-2, weight_decay=0.01),
        "schedule": ScheduleConfig(kind="linear", warmup_steps=4),
    }
    return TrainerConfig(**{**defaults, **changes})  # type: ignore[arg-type]


def toy_trainer(folder: Path, config: TrainerConfig, batches: ToyBatches | None = None, **options) -> Trainer:
    objective = options.pop("objective", None) or ToyObjective(rare=True)

    def save_model(place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)
        save_tensors(place / "model.safetensors", objective.state_dict())

    options = {"save_model": save_model, "validation": ToyBatches(3, "toy validation"), **options}
    return Trainer(objective, batches or ToyBatches(), config, folder, **options)


def main() -> TrainingResult:
    """Runs one session. ``--kill-at-key E,I`` and ``--kill-in-save STEP`` end it as ``kill -9`` would."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-at-key")
    parser.add_argument("--kill-in-save", type=int)
    parser.add_argument("--slow-s", type=float, default=0.0)
    parser.add_argument("--accumulate", type=int, default=2)
    arguments = parser.parse_args()

    def hook(key: tuple[int, int]) -> None:
        time.sleep(arguments.slow_s)
        if arguments.kill_at_key == f"{key[0]},{key[1]}":
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    with join_processes("cpu") as processes:
        config = toy_config(accumulate=arguments.accumulate)
        trainer = toy_trainer(arguments.folder, config, ToyBatches(hook=hook), processes=processes)
        whole = trainer.save_model

        def save_model(place: Path) -> None:
            whole(place)
            if trainer.state.step == arguments.kill_in_save:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer.save_model = save_model
        return trainer.run()


def gloo_threads() -> list[str]:
    """Threads of a process group that is not gone; they can abort the interpreter when it ends."""
    tasks = Path("/proc/self/task")
    names = [(task / "comm").read_text().strip() for task in tasks.iterdir()] if tasks.is_dir() else []
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    result = main()
    if gloo_threads():
        raise SystemExit(f"left behind: {gloo_threads()}")
    raise SystemExit(result.exit_code)
