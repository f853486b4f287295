"""Training: one trainer that knows protocols only, and what it is made of."""

from sslim.training.config import TrainerConfig
from sslim.training.distributed import Processes, join_processes, pick_device
from sslim.training.engine import TrainingError
from sslim.training.metrics import WALL_CLOCK_FIELDS, read_metrics
from sslim.training.optimizers import OPTIMIZERS, OptimizerConfig, build_optimizer, load_optimizer_state
from sslim.training.protocols import BatchSource, Objective, Prepared, SaveModel, Sentinel
from sslim.training.schedules import SCHEDULES, ScheduleConfig, learning_rate_factor
from sslim.training.sentinels import SENTINELS, masked_prediction_sentinels
from sslim.training.state import TrainingResult
from sslim.training.trainer import Trainer

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "SENTINELS",
    "WALL_CLOCK_FIELDS",
    "BatchSource",
    "Objective",
    "OptimizerConfig",
    "Prepared",
    "Processes",
    "SaveModel",
    "ScheduleConfig",
    "Sentinel",
    "Trainer",
    "TrainerConfig",
    "TrainingError",
    "TrainingResult",
    "build_optimizer",
    "join_processes",
    "learning_rate_factor",
    "load_optimizer_state",
    "masked_prediction_sentinels",
    "pick_device",
    "read_metrics",
]
