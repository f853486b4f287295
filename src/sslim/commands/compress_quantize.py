"""``sslim compress quantize``: stores a model's weights in 8 or 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    """Store the weights of MODEL in 8 or 16 bits. This comes last: what it gives can be neither cut nor trained.

    Example: `sslim compress quantize runs/small/model --kind int8-dynamic --output models/small-int8`.
    """

    model: tyro.conf.Positional[Path]
    """Model folder, run folder or foreign checkpoint."""
    output: Path
    """Folder for the table of what was bought and for model/."""
    kind: Literal["int8-dynamic", "int8-weights", "bf16", "fp16"] = "int8-dynamic"
    """int8-dynamic: the encoder's linear maps in int8, activations too while it runs; int8-weights: their weights alone;
    bf16 and fp16: half the bytes on disk, float32 in memory."""
    seconds: float = 10.0
    """Length of audio that MACs hold for."""


def main(options: Options) -> None:
    """Quantises and prints what was bought."""
    from sslim.commands.compression_options import run_pipeline
    from sslim.profiling import Conditions
    from sslim.recipes.pipeline import Pipeline, StepConfig

    step = StepConfig(method="quantize", settings={"kind": options.kind})
    pipeline = Pipeline(steps=(step,), conditions=Conditions(seconds=options.seconds))
    run_pipeline(pipeline, options.model, None, options.output)
