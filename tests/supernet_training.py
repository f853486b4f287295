"""Once-for-all training of a tiny supernet on toy batches; as a script, one process of a run under torchrun."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from sslim.models import ModelConfig, ProjectionConfig, build_model
from sslim.models.search_space import SearchSpace
from sslim.nn.encoder import EncoderConfig, plain_blocks
from sslim.nn.heads import ClusterHeadConfig, MaskEmbeddingConfig
from sslim.nn.positions import ConvPositionsConfig
from sslim.objectives import MaskedPrediction, MaskedPredictionConfig, MaskingConfig
from sslim.objectives.once_for_all import OnceForAll, OnceForAllConfig
from sslim.training import Processes, Trainer, TrainerConfig, join_processes
from toy_training import NUM_CLASSES, WIDTH, ToyBatches, toy_config, toy_trainer

STEPS = 12
SPACE = SearchSpace(dims=(4, 8), num_heads=(1, 2), feedforward_ratios=(1.0, 2.0), num_layers=(1, 2, 3))
SUPERNET = ModelConfig(
    family="toy",
    frontend=None,
    projection=ProjectionConfig(feature_dim=WIDTH),
    encoder=EncoderConfig(dim=8, **plain_blocks(3, 2, 4, 16), positions=ConvPositionsConfig(kernel_size=4, groups=2)),
    heads={"masked_prediction": ClusterHeadConfig(num_clusters=NUM_CLASSES), "mask": MaskEmbeddingConfig(dim=8)},
    search_space=SPACE,
)


def supernet_objective(sandwich: int | None = None) -> OnceForAll:
    inner = MaskedPrediction(
        build_model(SUPERNET, torch.Generator().manual_seed(0)),
        MaskedPredictionConfig(
            masking=MaskingConfig(probability=0.5, span_length=2), unmasked_weight=0.5, mask_at="projection"
        ),
    )
    return OnceForAll(inner, OnceForAllConfig(sandwich=sandwich))


def supernet_config(accumulate: int = 2) -> TrainerConfig:
    return toy_config(total_steps=STEPS, accumulate=accumulate, save_every=4, validate_every=6)


def supernet_trainer(
    folder: Path,
    objective: OnceForAll,
    *,
    accumulate: int = 2,
    hook: Callable[[tuple[int, int]], None] | None = None,
    processes: Processes | None = None,
) -> Trainer:
    config = supernet_config(accumulate)
    return toy_trainer(folder, config, ToyBatches(hook=hook), objective=objective, processes=processes)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with join_processes("cpu") as processes:
        return supernet_trainer(arguments.folder, supernet_objective(), accumulate=1, processes=processes).run().exit_code


if __name__ == "__main__":
    raise SystemExit(main())
