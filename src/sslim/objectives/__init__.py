"""Training objectives: each owns its masking and its head, and calls the model in steps."""

from sslim.objectives.alteration import AlterationConfig
from sslim.objectives.autoregressive import Autoregressive, AutoregressiveConfig
from sslim.objectives.distillation import Distillation, DistillationConfig, heads_for, start_maps_as_identity
from sslim.objectives.logit_distillation import LogitDistillation, LogitDistillationConfig, logit_heads
from sslim.objectives.masked_prediction import MaskedPrediction, MaskedPredictionConfig
from sslim.objectives.masking import MaskingConfig, span_mask
from sslim.objectives.npc import Npc, NpcConfig
from sslim.objectives.reconstruction import Reconstruction, ReconstructionConfig
from sslim.objectives.teacher import TargetConfig, Teacher, model_digest

OBJECTIVES = {
    "masked_prediction": MaskedPrediction,
    "reconstruction": Reconstruction,
    "autoregressive": Autoregressive,
    "npc": Npc,
    "distillation": Distillation,
    "logit_distillation": LogitDistillation,
}

__all__ = [
    "OBJECTIVES",
    "AlterationConfig",
    "Autoregressive",
    "AutoregressiveConfig",
    "Distillation",
    "DistillationConfig",
    "LogitDistillation",
    "LogitDistillationConfig",
    "MaskedPrediction",
    "MaskedPredictionConfig",
    "MaskingConfig",
    "Npc",
    "NpcConfig",
    "Reconstruction",
    "ReconstructionConfig",
    "TargetConfig",
    "Teacher",
    "heads_for",
    "logit_heads",
    "model_digest",
    "span_mask",
    "start_maps_as_identity",
]
