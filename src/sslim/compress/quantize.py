"""Quantisation: the encoder's linear maps in int8, or every weight stored in half precision. The last step of a compression.

Parameters and multiply-accumulates stay what they were; bytes shrink, and with int8 products so does time on a CPU that has an
instruction for them. Scales are found from the weights alone (and while running from the activations): there is no calibration
and no training with simulated rounding. The forms are those of ``sslim.nn.quantized`` and ``sslim.models.storage``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

from sslim.compress.calibration import Calibration
from sslim.config import nearest, to_plain
from sslim.models import ModelConfig, SpeechModel
from sslim.models.storage import Storage, stored_as


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Settings of quantisation.

    Attributes:
        kind: ``int8-dynamic``: weights and activations of the encoder's linear maps in int8, a quarter of their bytes and the
            fastest on CPUs with VNNI or AMX; ``int8-weights``: their weights alone, closer to the original and as slow;
            ``bf16`` and ``fp16``: half the bytes of everything in the file, float32 in memory.
    """

    kind: Storage = "int8-dynamic"

    def __post_init__(self) -> None:
        if self.kind not in (kinds := get_args(Storage)):
            raise ValueError(f"kind is {self.kind!r}{nearest(str(self.kind), kinds)}; expected one of {', '.join(kinds)}")


def quantize(model: SpeechModel, settings: Quantization, calibration: Calibration | None = None) -> SpeechModel:
    """Returns a quantised copy of a model; nothing can be cut from it or trained afterwards.

    Args:
        model: Any model but a supernet; it stays as it is.
        settings: What is quantised, and to what.
        calibration: Not needed.

    Returns:
        The model in eval mode. Saving and loading it gives the same outputs.

    Raises:
        ValueError: A supernet, a quantised model, or weights that are not finite or too large for fp16.
    """
    small = stored_as(model, settings.kind)
    small.provenance.append({"step": "quantize", **to_plain(settings)})
    return small


def quantize_config(config: ModelConfig, settings: Quantization) -> ModelConfig:
    """Returns the description of what :func:`quantize` gives, found without a model; it has as many parameters.

    Raises:
        ValueError: A supernet.
    """
    return replace(config, storage=settings.kind)
