"""Models: a front-end, an input projection and an encoder; one short file of presets for each family."""

from sslim.models.melhubert import PRESETS as _MELHUBERT
from sslim.models.speech import ModelConfig, ProjectionConfig, SpeechModel, build_model, slice_model, with_head

PRESETS = {**_MELHUBERT}

__all__ = ["PRESETS", "ModelConfig", "ProjectionConfig", "SpeechModel", "build_model", "slice_model", "with_head"]
