"""Training objectives: each owns its masking and its head, and calls the model in steps."""

from sslim.objectives.masked_prediction import MaskedPrediction, MaskedPredictionConfig
from sslim.objectives.masking import MaskingConfig, span_mask

OBJECTIVES = {"masked_prediction": MaskedPrediction}

__all__ = ["OBJECTIVES", "MaskedPrediction", "MaskedPredictionConfig", "MaskingConfig", "span_mask"]
