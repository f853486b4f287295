"""HuBERT recipes: the published Base (Hsu et al. 2021, arXiv 2106.07447) and small ones for two CPU cores.

Two iterations, as commands (``sslim pretrain RECIPE CORPUS --iterations 2 --output RUN`` does the same)::

    sslim cluster CORPUS --mfcc --clusters 100
    sslim pretrain hubert-mini CORPUS --labels mfcc-kmeans100 --output first
    sslim cluster CORPUS --model first/model --layer 3 --clusters 100 --name second
    sslim pretrain hubert-mini CORPUS --labels second --output second
"""

from __future__ import annotations

from sslim.models import ModelConfig
from sslim.models.hubert import hubert, narrow_conv_layers
from sslim.objectives import MaskedPredictionConfig, MaskingConfig
from sslim.recipes.corpus_batches import DataConfig
from sslim.recipes.pretrain import PretrainRecipe, TargetsConfig
from sslim.recipes.small_runs import MINI_DATA, TINY_DATA, mini_training, tiny_training
from sslim.training import OptimizerConfig, ScheduleConfig, TrainerConfig


def hubert_base() -> PretrainRecipe:
    """HuBERT Base, section III-B and fairseq's ``hubert_base_librispeech``: 95 million parameters, two iterations on 960 hours.

    A step holds 32 micro-batches of at most 87.5 s; with N processes set ``training.accumulate`` to 32 / N. It was not trained
    here. Unlike fairseq, shorter utterances of a batch are padded, not all cut to the shortest, and no frame is unmasked again
    to make masks of a batch equally large (``same_count``): that would leave long utterances beside short ones almost unmasked.
    """
    return PretrainRecipe(
        name="hubert-base",
        about="arXiv 2106.07447, 960 h, 250,000 then 400,000 updates on 32 GPUs, about 9.5 hours for each 100,000; "
        "SUPERB PR 5.41 % PER, SID 81.42 %",
        model=hubert(),
        objective=MaskedPredictionConfig(
            masking=MaskingConfig(probability=0.8, span_length=10, edges="reference"),
            mask_at="projection",
            feature_penalty=10.0,
            input_dropout=0.1,
        ),
        training=TrainerConfig(
            total_steps=250_000,
            accumulate=32,
            max_grad_norm=10.0,
            save_every=5000,
            validate_every=5000,
            optimizer=OptimizerConfig(kind="adam", lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01),
            schedule=ScheduleConfig(kind="linear", warmup_share=0.08),
        ),
        data=DataConfig(batch_s=87.5, crop_s=15.62, min_s=2.0),
        targets=(
            TargetsConfig(num_clusters=100, steps=250_000),
            TargetsConfig(num_clusters=500, layer=6, steps=400_000),
        ),
    )


def _small(name: str, about: str, model: ModelConfig, training: TrainerConfig, data: DataConfig, layer: int) -> PretrainRecipe:
    """What differs from Base, because minutes on little data must do, as for ``melhubert-mini`` (LOG.md, 2026-11-21):

    spans of 5 frames that can hide every frame, frames that are not hidden count too (half as much), no dropout, all gradients
    reach the front-end.
    """
    return PretrainRecipe(
        name=name,
        about=about,
        model=model,
        objective=MaskedPredictionConfig(
            masking=MaskingConfig(probability=0.7, span_length=5),
            unmasked_weight=0.5,
            mask_at="projection",
            feature_penalty=1.0,
        ),
        training=training,
        data=data,
        targets=(TargetsConfig(num_clusters=100), TargetsConfig(num_clusters=100, layer=layer)),
    )


_NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "layer_drop": 0.0}


def hubert_mini() -> PretrainRecipe:
    """7 convolutions of 128 channels, 4 layers of width 192: minutes on two CPU cores."""
    return _small(
        "hubert-mini",
        "own; 4 layers of width 192 on 128 convolution channels, 2.2 million parameters; minutes on two CPU cores",
        hubert(
            num_layers=4,
            dim=192,
            num_heads=3,
            feedforward_dim=768,
            conv_layers=narrow_conv_layers(128),
            conv_kernel_size=32,
            conv_groups=8,
            num_clusters=100,
            codeword_dim=64,
            gradient_scale=1.0,
            **_NO_DROPOUT,  # type: ignore[arg-type]
        ),
        mini_training(),
        MINI_DATA,
        layer=3,
    )


def hubert_tiny() -> PretrainRecipe:
    """16 channels, 2 layers of width 32: seconds; for tests and for trying the commands."""
    return _small(
        "hubert-tiny",
        "own; a smoke test of seconds",
        hubert(
            num_layers=2,
            dim=32,
            num_heads=4,
            feedforward_dim=64,
            conv_layers=narrow_conv_layers(16),
            conv_kernel_size=16,
            conv_groups=4,
            num_clusters=20,
            codeword_dim=16,
            gradient_scale=1.0,
            **_NO_DROPOUT,  # type: ignore[arg-type]
        ),
        tiny_training(),
        TINY_DATA,
        layer=1,
    )


RECIPES = {"hubert-base": hubert_base, "hubert-mini": hubert_mini, "hubert-tiny": hubert_tiny}
