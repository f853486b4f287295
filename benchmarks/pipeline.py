"""Seconds of audio per second and core from the feature store through `CorpusBatches`: reading, cutting, labels, padding.

One thread, one process, no prefetching. The corpora are synthetic with the real layout, features are noise in real files;
each is read once before. Two kinds: read sentences (about 12 s) and single words (about 1 s), where the cost of an utterance
weighs twelve times as much.

    python benchmarks/pipeline.py [--hours 5]
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from startup import read_speech_lengths, speech_batches, write_corpus

TARGET = 20_000


def measure(folder: Path) -> tuple[dict[str, float], float]:
    """Returns the figures of the second epoch and the plan's efficiency."""
    batches = speech_batches(folder, with_split=False)
    for index in range(batches.num_batches):
        batches[0, index]
    audio_s, num_utterances, began, began_cpu = 0.0, 0, time.perf_counter(), time.process_time()
    for index in range(batches.num_batches):
        batch = batches[1, index]
        audio_s += batch.duration_s
        num_utterances += len(batch.ids)
    took_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    figures = {
        "audio_s_per_s": round(audio_s / took_s),
        "audio_s_per_cpu_s": round(audio_s / cpu_s),
        "us_per_utterance": round(1e6 * cpu_s / num_utterances, 1),
        "efficiency": round(batches.plan.efficiency, 4),
    }
    return figures, audio_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=5.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    frames = int(arguments.hours * 360_000)
    kinds = {
        "sentences": read_speech_lengths(frames // 1230),
        "words": np.random.default_rng(0).integers(50, 150, frames // 100),
    }
    rows = {}
    print(f"{'corpus':<12}{'audio s/s':>12}{'per CPU s':>12}{'us/utterance':>14}{'efficiency':>12}{'target':>10}")
    with tempfile.TemporaryDirectory() as name:
        for kind, lengths in kinds.items():
            write_corpus(Path(name) / kind, lengths, noise=True)
            rows[kind], _ = measure(Path(name) / kind)
            row = rows[kind]
            print(
                f"{kind:<12}{row['audio_s_per_s']:>12,}{row['audio_s_per_cpu_s']:>12,}{row['us_per_utterance']:>14}"
                f"{row['efficiency']:>12.1%}{f'>= {TARGET:,}':>10}"
            )
    print(json.dumps({"benchmark": "pipeline", "hours": arguments.hours, **rows}))


if __name__ == "__main__":
    main()
