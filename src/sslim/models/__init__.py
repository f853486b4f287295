"""Models: a front-end, an input projection and an encoder; one short file of presets for each family."""

from sslim.models.distilhubert import PRESETS as _DISTILHUBERT
from sslim.models.elastic import slice_model
from sslim.models.hubert import PRESETS as _HUBERT
from sslim.models.lighthubert import PRESETS as _LIGHTHUBERT
from sslim.models.melhubert import PRESETS as _MELHUBERT
from sslim.models.predictive import PRESETS as _PREDICTIVE
from sslim.models.reconstruction import PRESETS as _RECONSTRUCTION
from sslim.models.speech import ModelConfig, ProjectionConfig, SpeechModel, build_model, with_head

PRESETS = {**_DISTILHUBERT, **_HUBERT, **_LIGHTHUBERT, **_MELHUBERT, **_PREDICTIVE, **_RECONSTRUCTION}

__all__ = ["PRESETS", "ModelConfig", "ProjectionConfig", "SpeechModel", "build_model", "slice_model", "with_head"]
