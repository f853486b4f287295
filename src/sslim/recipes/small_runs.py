"""Training of the small recipes: the same for every objective, so that what they reach can be compared."""

from __future__ import annotations

from sslim.recipes.corpus_batches import DataConfig
from sslim.training import OptimizerConfig, ScheduleConfig, TrainerConfig

MINI_DATA = DataConfig(batch_s=30.0, crop_s=10.0)
TINY_DATA = DataConfig(batch_s=20.0, crop_s=5.0)


def mini_training(total_steps: int = 4_000, *, lr: float = 1e-3, warmup_share: float = 0.08) -> TrainerConfig:
    """Minutes on a CPU core: AdamW, a linear schedule to zero, clip 5."""
    return TrainerConfig(
        total_steps=total_steps,
        optimizer=OptimizerConfig(kind="adamw", lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
        schedule=ScheduleConfig(kind="linear", warmup_share=warmup_share),
        max_grad_norm=5.0,
        log_every=20,
        validate_every=200,
        save_every=500,
    )


def tiny_training(lr: float = 3e-3) -> TrainerConfig:
    """Seconds: for tests and for trying the commands."""
    return TrainerConfig(
        total_steps=60,
        optimizer=OptimizerConfig(kind="adamw", lr=lr),
        schedule=ScheduleConfig(kind="linear", warmup_share=0.1),
        log_every=10,
        validate_every=30,
        save_every=30,
    )
