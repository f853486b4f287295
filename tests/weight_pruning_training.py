"""Iterative weight pruning of a tiny model on toy batches; as a script, one process of a run under torchrun."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sslim.checkpoints import save_model
from sslim.compress.weight_schedule import PruningSchedule
from sslim.compress.weights import IterativeWeightPruning, WeightChoice
from sslim.models import ModelConfig, ProjectionConfig, SpeechModel, build_model
from sslim.nn.encoder import EncoderConfig, plain_blocks
from sslim.nn.heads import ClusterHeadConfig
from sslim.nn.positions import ConvPositionsConfig
from sslim.objectives import MaskedPrediction, MaskedPredictionConfig, MaskingConfig
from sslim.storage import save_tensors
from sslim.training import OptimizerConfig, Processes, Trainer, join_processes
from toy_training import NUM_CLASSES, WIDTH, ToyBatches, toy_config, toy_trainer

STEPS = 24
MODEL = ModelConfig(
    family="toy",
    frontend=None,
    projection=ProjectionConfig(feature_dim=WIDTH),
    encoder=EncoderConfig(dim=8, **plain_blocks(2, 2, 4, 12), positions=ConvPositionsConfig(kernel_size=4, groups=2)),
    heads={"masked_prediction": ClusterHeadConfig(num_clusters=NUM_CLASSES)},
)
SCHEDULE = PruningSchedule(
    sparsities=(0.3, 0.6, 0.8),
    warm_up=3,
    period=5,
    condition="converge",
    tolerance=0.05,
    average_length=2,
    smooth_factor=0.5,
    max_extensions=1,
)
BIASED = WeightChoice(biases=True)
OPTIMIZER = OptimizerConfig(kind="adamw", lr=1e-2, weight_decay=0.1)


def toy_model(seed: int = 0) -> SpeechModel:
    return build_model(MODEL, torch.Generator().manual_seed(seed))


def toy_prediction(model: SpeechModel) -> MaskedPrediction:
    masking = MaskingConfig(probability=0.5, span_length=2)
    return MaskedPrediction(model, MaskedPredictionConfig(masking=masking, unmasked_weight=0.5))


def pruning_objective(schedule: PruningSchedule | None = SCHEDULE, model: SpeechModel | None = None) -> IterativeWeightPruning:
    return IterativeWeightPruning(toy_prediction(toy_model() if model is None else model), schedule, BIASED)


def pruning_trainer(
    folder: Path,
    objective: IterativeWeightPruning,
    *,
    steps: int = STEPS,
    accumulate: int = 2,
    hook: Callable[[tuple[int, int]], None] | None = None,
    processes: Processes | None = None,
    **options: Any,
) -> Trainer:
    """A trainer whose model folder is that of the pruned model, not of the objective."""
    settings = {"total_steps": steps, "accumulate": accumulate, "save_every": 4, "log_every": 1, "optimizer": OPTIMIZER}
    options.setdefault("save_model", lambda place: save_model(objective.model, place))
    batches = options.pop("batches", None) or ToyBatches(hook=hook)
    return toy_trainer(folder, toy_config(**settings), batches, objective=objective, processes=processes, **options)


def main() -> int:
    """Trains, and writes what this process holds at the end beside the run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with join_processes("cpu") as processes:
        objective = pruning_objective()
        result = pruning_trainer(arguments.folder, objective, accumulate=1, processes=processes).run()
        save_tensors(arguments.folder / f"rank-{processes.rank}.safetensors", objective.state_dict())
        return result.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
