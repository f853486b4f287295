"""APC, VQ-APC and NPC recipes: the published settings, and small ones for two CPU cores."""

from __future__ import annotations

from dataclasses import replace

from sslim.models import PRESETS, ModelConfig
from sslim.models.predictive import APC_CODES, apc, npc
from sslim.nn.encoder import EncoderConfig
from sslim.objectives import AutoregressiveConfig, NpcConfig
from sslim.recipes.corpus_batches import DataConfig
from sslim.recipes.pretrain import PretrainRecipe
from sslim.recipes.small_runs import MINI_DATA, TINY_DATA, mini_training, tiny_training
from sslim.training import OptimizerConfig, ScheduleConfig, TrainerConfig

CROP_S = 15.0  # 1,500 frames


def _published(lr: float, accumulate: int) -> TrainerConfig:
    """100 epochs of Adam at a constant rate, clip 5, 32 utterances a step."""
    return TrainerConfig(
        epochs=100,
        accumulate=accumulate,
        max_grad_norm=5.0,
        save_every_epochs=1,
        optimizer=OptimizerConfig(kind="adam", lr=lr),
        schedule=ScheduleConfig(kind="constant"),
    )


def apc_960() -> PretrainRecipe:
    """APC as S3PRL trains it; its v0.1 had shift 3, rate 1e-3, clip 1 and 500,000 updates on 100 hours."""
    return PretrainRecipe(
        name="apc",
        about="arXiv 1904.03240 with S3PRL's settings, 960 h, 100 epochs on one GPU; not trained here",
        model=apc(),
        objective=AutoregressiveConfig(shift=5),
        training=_published(1e-4, accumulate=4),
        data=DataConfig(batch_s=None, max_utterances=8, crop_s=CROP_S, min_s=2.0),
    )


def vq_apc_960() -> PretrainRecipe:
    """VQ-APC as S3PRL trains it: 512 codes after the last layer, temperature 0.5."""
    return PretrainRecipe(
        name="vq-apc",
        about="arXiv 2005.08392 with S3PRL's settings, 960 h, 100 epochs on one GPU; not trained here",
        model=apc(codes=APC_CODES),
        objective=AutoregressiveConfig(shift=5),
        training=_published(1e-4, accumulate=1),
        data=DataConfig(batch_s=None, max_utterances=32, crop_s=CROP_S),
    )


def npc_960() -> PretrainRecipe:
    """NPC as S3PRL trains it: 4 blocks, 4 groups of 64 codes."""
    return PretrainRecipe(
        name="npc",
        about="arXiv 2011.00406 with S3PRL's settings, 960 h, 100 epochs on one GPU; not trained here",
        model=npc(),
        objective=NpcConfig(),
        training=_published(1e-3, accumulate=1),
        data=DataConfig(batch_s=None, max_utterances=32, crop_s=CROP_S),
    )


def _without_dropout(name: str) -> ModelConfig:
    """As in the other small recipes, which see too little data in minutes to need it."""
    config = PRESETS[name]()
    assert not isinstance(config.encoder, EncoderConfig)
    return replace(config, encoder=replace(config.encoder, dropout=0.0))


def apc_mini() -> PretrainRecipe:
    """As many parameters as melhubert-mini in three recurrent layers, on the same frames, optimiser and batches.

    The features have the corpus's mean and variance: normalised for each utterance, they would know its future.
    """
    return PretrainRecipe(
        name="apc-mini",
        about="own; 20 ms, 3 layers of 352 units, 2 million parameters; 60 ms ahead; 21 minutes on one CPU core in bf16",
        model=_without_dropout("apc-mini"),
        objective=AutoregressiveConfig(shift=3),
        training=mini_training(),
        data=MINI_DATA,
    )


def _tiny(name: str, objective: AutoregressiveConfig | NpcConfig) -> PretrainRecipe:
    return PretrainRecipe(
        name=name,
        about="own; a smoke test of seconds",
        model=_without_dropout(name),
        objective=objective,
        training=tiny_training(5e-3),
        data=TINY_DATA,
    )


RECIPES = {
    "apc": apc_960,
    "vq-apc": vq_apc_960,
    "npc": npc_960,
    "apc-mini": apc_mini,
    "apc-tiny": lambda: _tiny("apc-tiny", AutoregressiveConfig(shift=2)),
    "vq-apc-tiny": lambda: _tiny("vq-apc-tiny", AutoregressiveConfig(shift=2)),
    "npc-tiny": lambda: _tiny("npc-tiny", NpcConfig()),
}
