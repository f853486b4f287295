"""MelHuBERT recipes: the published ones (arXiv 2211.09944 and its code's configurations) and small ones for two CPU cores."""

from __future__ import annotations

from sslim.models.melhubert import melhubert
from sslim.objectives import MaskedPredictionConfig, MaskingConfig
from sslim.recipes.corpus_batches import DataConfig
from sslim.recipes.pretrain import PretrainRecipe
from sslim.recipes.small_runs import MINI_DATA, TINY_DATA, mini_training, tiny_training
from sslim.training import OptimizerConfig, ScheduleConfig, TrainerConfig


def _published(frame_period_ms: int, span_length: int, epochs: int, about: str) -> PretrainRecipe:
    """Adam 1e-4 constant, batch 32 = 8 x 4 utterances of at most 15 s, clip 10, mask probability 0.7."""
    return PretrainRecipe(
        name=f"melhubert-{frame_period_ms}ms",
        about=about,
        model=melhubert(frame_period_ms=frame_period_ms),
        objective=MaskedPredictionConfig(masking=MaskingConfig(probability=0.7, span_length=span_length, edges="reference")),
        training=TrainerConfig(
            epochs=epochs,
            accumulate=8,
            max_grad_norm=10.0,
            save_every_epochs=1,
            optimizer=OptimizerConfig(kind="adam", lr=1e-4),
            schedule=ScheduleConfig(kind="constant"),
        ),
        data=DataConfig(batch_s=None, max_utterances=4, crop_s=15.0, min_s=3.2),
    )


def melhubert_20ms() -> PretrainRecipe:
    """MelHuBERT, 20 ms frames, first stage on 360 hours."""
    return _published(
        20, 5, 200, "arXiv 2211.09944, 360 h, 632,600 updates of 32 utterances on one GPU; SUPERB PR 12.96 % PER, SID 66.34 %"
    )


def melhubert_10ms() -> PretrainRecipe:
    """MelHuBERT, 10 ms frames, first stage on 360 hours (spans of 10 frames, as the published models used)."""
    return _published(
        10, 10, 200, "arXiv 2211.09944, 360 h, 632,600 updates of 32 utterances on one GPU; SUPERB PR 15.10 % PER, SID 64.75 %"
    )


def _small(
    name: str, about: str, model_settings: dict[str, float], training: TrainerConfig, data: DataConfig
) -> PretrainRecipe:
    """What differs from the published recipe, because minutes on little data must do (LOG.md, 2026-11-21):

    there is no dropout, frames that are not hidden count too (half as much), and every frame can be hidden. Targets should be
    clusters of MFCC (`sslim cluster --mfcc`). Features are normalised with the corpus's mean and variance, as published:
    normalising each utterance by itself costs 6 points on digits of unseen speakers (LOG.md, 2026-11-25).
    """
    return PretrainRecipe(
        name=name,
        about=about,
        model=melhubert(**model_settings, dropout=0.0),  # type: ignore[arg-type]
        objective=MaskedPredictionConfig(masking=MaskingConfig(probability=0.7, span_length=5), unmasked_weight=0.5),
        training=training,
        data=data,
    )


def melhubert_small() -> PretrainRecipe:
    """6 layers, 256 wide: one small GPU for an afternoon, or a night of two CPU cores."""
    return _small(
        "melhubert-small",
        "own; 20 ms, 6 layers of width 256, 5.7 million parameters with 100 clusters",
        {"num_layers": 6, "dim": 256, "num_heads": 4, "feedforward_dim": 1024, "conv_kernel_size": 64},
        TrainerConfig(
            total_steps=50_000,
            optimizer=OptimizerConfig(kind="adamw", lr=5e-4, betas=(0.9, 0.98), weight_decay=0.01),
            schedule=ScheduleConfig(kind="linear", warmup_share=0.08),
            max_grad_norm=5.0,
        ),
        DataConfig(batch_s=120.0),
    )


def melhubert_mini() -> PretrainRecipe:
    """4 layers, 192 wide: minutes on two CPU cores. See LOG.md for what it reaches."""
    return _small(
        "melhubert-mini",
        "own; 20 ms, 4 layers of width 192, 2 million parameters; 15 minutes on two CPU cores",
        {
            "num_layers": 4,
            "dim": 192,
            "num_heads": 3,
            "feedforward_dim": 768,
            "conv_kernel_size": 32,
            "conv_groups": 8,
        },
        mini_training(),
        MINI_DATA,
    )


def melhubert_tiny() -> PretrainRecipe:
    """2 layers, 32 wide: seconds; for tests and for trying the commands."""
    return _small(
        "melhubert-tiny",
        "own; a smoke test of seconds",
        {"num_layers": 2, "dim": 32, "num_heads": 4, "feedforward_dim": 64, "conv_kernel_size": 16, "conv_groups": 4},
        tiny_training(),
        TINY_DATA,
    )


RECIPES = {
    "melhubert-20ms": melhubert_20ms,
    "melhubert-10ms": melhubert_10ms,
    "melhubert-small": melhubert_small,
    "melhubert-mini": melhubert_mini,
    "melhubert-tiny": melhubert_tiny,
}
