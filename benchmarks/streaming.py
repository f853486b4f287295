"""Streaming against recomputing: time for each chunk of a waveform that arrives bit by bit, one thread, random weights.

The stream takes every chunk. Its rival is what one does without a stream, ``model.encode`` on all that has arrived so far; it
runs after some of the chunks, evenly spread over the waveform, in turns with the stream. Both give the same frames. Processor
time counts, not waiting. ``rtf`` is the mean time of a chunk by its length: below 1 the model keeps up.

    python benchmarks/streaming.py [--seconds 10] [--chunks-ms 20 40 80 160 320] [--window FRAMES]
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sslim.batch import EncoderOutput
from sslim.models import PRESETS, SpeechModel, build_model
from sslim.models.storage import stored_as
from sslim.models.streaming import StreamingEncoder

SAMPLE_RATE = 16000
MODELS = {
    "melhubert-causal-20ms": ("melhubert-causal-20ms", None),
    "melhubert-causal-20ms, int8": ("melhubert-causal-20ms", "int8-dynamic"),
    "melhubert-causal-mini": ("melhubert-causal-mini", None),
}


def made(preset: str, storage: Any, window: int | None) -> SpeechModel:
    config = PRESETS[preset]()
    blocks = tuple(replace(block, attention_window=window) for block in config.transformer.blocks)
    config = replace(config, encoder=replace(config.transformer, blocks=blocks), heads={})
    model = build_model(config, torch.Generator().manual_seed(0))
    model.set_statistics(torch.full((40,), 8.0), torch.full((40,), 4.0), source="made up")
    return model if storage is None else stored_as(model, storage)


def timed(times_ms: list[float], function: Callable[[], EncoderOutput]) -> EncoderOutput:
    began = time.thread_time()
    output = function()
    times_ms.append(1000 * (time.thread_time() - began))
    return output


def summary(times_ms: list[float], chunk_ms: float) -> dict[str, float]:
    p50, p95 = (round(torch.tensor(times_ms).quantile(q).item(), 2) for q in (0.5, 0.95))
    return {"p50_ms": p50, "p95_ms": p95, "rtf": round(statistics.mean(times_ms) / chunk_ms, 4)}


def measured(streaming: StreamingEncoder, waveform_S: Tensor, chunk_ms: float, num_recomputed: int) -> dict[str, Any]:
    """Both ways over the same waveform, and the largest difference between their frames."""
    chunk = streaming.num_samples(chunk_ms / 1000)
    stops = range(chunk, len(waveform_S) + 1, chunk)
    places = {stops[round((i + 0.5) * len(stops) / num_recomputed - 0.5)] for i in range(num_recomputed)}
    stream, frames, difference = streaming.open(keep_layers=False), [], 0.0
    streamed_ms: list[float] = []
    recomputed_ms: list[float] = []
    for stop in stops:
        frames.append(timed(streamed_ms, lambda stop=stop: stream.push(waveform_S[stop - chunk : stop])).final)  # type: ignore[misc]
        if stop in places:
            prefix_1S = waveform_S[None, :stop]
            whole = timed(recomputed_ms, lambda prefix_1S=prefix_1S: streaming.model.encode(prefix_1S, keep_layers=False)).final  # type: ignore[misc]
            ours = torch.cat(frames, dim=1)
            difference = max(difference, (ours - whole[:, : ours.shape[1]]).abs().max().item())
    return {
        "latency_ms": round(1000 * streaming.latency_s(chunk_ms / 1000), 3),
        "stream": summary(streamed_ms[1:], chunk_ms),  # the first chunk makes room
        "recompute": summary(recomputed_ms, chunk_ms),
        "largest_difference": difference,
        "stream_mb": round(stream.num_bytes / 1e6, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--chunks-ms", type=float, nargs="+", default=[20, 40, 80, 160, 320])
    parser.add_argument("--window", type=int, default=None, help="frames that attention sees before each; all when left out")
    parser.add_argument("--recomputed", type=int, default=8, help="chunks after which the whole is recomputed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    waveform_S = 0.1 * torch.randn(round(options.seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(1))
    result: dict[str, Any] = {"seconds": options.seconds, "window": options.window, "threads": 1}
    with torch.inference_mode():
        for name, (preset, storage) in MODELS.items():
            streaming = StreamingEncoder(made(preset, storage, options.window))
            measured(streaming, waveform_S[:SAMPLE_RATE], 80.0, 1)  # to warm up
            result[name] = {
                f"{chunk_ms:g} ms": measured(streaming, waveform_S, chunk_ms, options.recomputed)
                for chunk_ms in options.chunks_ms
            }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
