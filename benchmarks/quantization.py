"""Speed of int8 linear maps and quantised models against float32, one thread, random weights of MelHuBERT's size.

The maps: float32 against ``Int8Linear`` in its kernel, in its portable form, and with int8 weights alone. The models: float32,
the same under bf16 autocast, quantised, low-rank, and low-rank quantised. All take turns; processor time counts, not waiting.

    python benchmarks/quantization.py [--frames 500] [--repetitions 15]
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import statistics
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor, nn

from sslim.compress.low_rank import LowRank, factorize
from sslim.compress.quantize import Quantization, quantize
from sslim.models import PRESETS, SpeechModel, build_model
from sslim.nn.quantized import Int8Linear, has_int8_kernel
from sslim.profiling.turns import times_in_turns

SIZES = ((768, 3072), (3072, 768), (768, 768), (768, 192))


def medians(calls: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    times = times_in_turns(calls, device="cpu", repeats=repetitions, clock=time.thread_time)
    return {name: round(statistics.median(of_name), 3) for name, of_name in times.items()}


def maps(in_dim: int, out_dim: int, num_frames: int, repetitions: int) -> dict[str, float]:
    whole, x = nn.Linear(in_dim, out_dim).eval(), torch.randn(1, num_frames, in_dim)
    dynamic, weights = (Int8Linear.from_linear(whole, dynamic=dynamic) for dynamic in (True, False))

    def portable() -> Tensor:
        with patch("sslim.nn.quantized.has_int8_kernel", lambda: False):
            return dynamic(x)

    calls = {
        "fp32": lambda: whole(x),
        "int8-dynamic": lambda: dynamic(x),
        "portable": portable,
        "int8-weights": lambda: weights(x),
    }
    return medians(calls, repetitions)


def models(num_frames: int, repetitions: int) -> dict[str, float]:
    model = build_model(PRESETS["melhubert-20ms"](), torch.Generator().manual_seed(0))
    thin = factorize(model, LowRank(ratio=0.25))
    x = torch.randn(1, num_frames, model.config.projection.feature_dim)
    nets: dict[str, SpeechModel] = {
        "fp32": model,
        "fp32, bf16 autocast": model,
        "int8-dynamic": quantize(model, Quantization(kind="int8-dynamic")),
        "int8-weights": quantize(model, Quantization(kind="int8-weights")),
        "low-rank 0.25": thin,
        "low-rank 0.25, int8-dynamic": quantize(thin, Quantization(kind="int8-dynamic")),
    }

    def call(name: str, net: SpeechModel) -> Callable[[], object]:
        def run() -> object:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled="autocast" in name):
                return net.encode_features(x, keep_layers=False)

        return run

    return medians({name: call(name, net) for name, net in nets.items()}, repetitions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=500)
    parser.add_argument("--repetitions", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "frames": options.frames,
        "int8 kernel": has_int8_kernel(),
        "maps_ms": {f"{i} to {o}": maps(i, o, options.frames, options.repetitions) for i, o in SIZES},
        "models_ms": models(options.frames, options.repetitions),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
