"""Time until the first batch of a run over 200,000 utterances (synthetic metadata), fresh and resumed at step 1,000,000.

The corpus has the real layout; its feature shards are sparse files. What is timed is what `sslim pretrain` does between its
imports and the first batch: open corpus and labels, read the splits, plan, build the trainer, restore the checkpoint, cut
and collate a batch.

    python benchmarks/startup.py [--utterances 200000] [--steps 1000000]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sslim.batch import Batch
from sslim.config import to_plain
from sslim.data.batching import BatchingConfig, BatchPlan, CorpusBatches, FrameFacts
from sslim.data.corpus import Corpus
from sslim.data.labels import LabelStore
from sslim.frontends import FilterbankConfig, SpectralFrontendConfig, build_frontend
from sslim.models import build_model
from sslim.models.melhubert import melhubert
from sslim.objectives import MaskedPrediction, MaskedPredictionConfig
from sslim.storage import save_tensors, write_json
from sslim.training import Trainer, TrainerConfig
from sslim.training.loading import Position
from sslim.training.state import TrainerState, write_checkpoint

FRONTEND = SpectralFrontendConfig(features=FilterbankConfig(num_mel_bins=40), stack=2)
TARGET_S = 2.0
NUM_CLUSTERS = 500
SHARD_ROWS = 3_000_000


def read_speech_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Frames of 10 ms as in read books: most of 12 s to 16 s, the rest of 1 s to 12 s; LibriSpeech's mean is 12.3 s."""
    rng = np.random.default_rng(seed)
    lengths = np.where(rng.random(count) < 0.68, rng.normal(1450, 100, count), rng.uniform(150, 1400, count))
    return lengths.clip(100, 3000).astype(np.int64)


def write_corpus(folder: Path, lengths: np.ndarray, *, noise: bool = False) -> None:
    """Writes a corpus folder with labels ``synthetic``; features are noise, or zeros in sparse files that take no space."""
    (folder / "features").mkdir(parents=True)
    total = np.cumsum(lengths)
    shards = (total - 1) // SHARD_ROWS
    first = np.concatenate([[0], np.flatnonzero(np.diff(shards)) + 1])
    before = np.repeat(np.concatenate([[0], total])[first], np.diff(np.append(first, len(lengths))))
    lines = [
        json.dumps({"id": f"synthetic-{i:06d}", "speaker": f"s{i % 2000}", "split": "dev" if i % 100 == 0 else "train"}) + "\n"
        for i in range(len(lengths))
    ]
    columns = {
        "num_frames": lengths.astype(np.int32),
        "num_samples": 160 * lengths + 240,
        "shard": shards.astype(np.int32),
        "row": total - lengths - before,
        "offset": np.concatenate([[0], np.cumsum([len(line) for line in lines])]),
    }
    (folder / "manifest.jsonl").write_text("".join(lines))
    (folder / "quarantine.jsonl").touch()
    save_tensors(folder / "index.safetensors", {name: torch.from_numpy(values) for name, values in columns.items()})
    rng = np.random.default_rng(1)
    for shard, rows in enumerate(np.bincount(shards, weights=lengths).astype(int).tolist()):
        with (folder / "features" / f"shard-{shard:05d}.bin").open("wb") as file:
            if noise:
                file.write(rng.standard_normal((rows, 40), dtype=np.float32).astype("<f2").tobytes())
            file.truncate(rows * 80)
    description = {
        "format_version": 1,
        "name": "synthetic",
        "num_utterances": len(lengths),
        "num_quarantined": 0,
        "sample_rate": 16000,
        "base_dim": 40,
        "base_frame_shift_s": 0.01,
        "frontend": to_plain(FRONTEND),
        "statistics": None,
    }
    write_json(folder / "corpus.json", description)
    labels = (rng.integers(0, NUM_CLUSTERS, (n + 1) // 2, dtype=np.int16) for n in lengths.tolist())
    facts = {"frame_period_s": 0.02, "num_clusters": NUM_CLUSTERS, "origin": {"kind": "random"}, "quality": {}}
    LabelStore.write(folder / "labels" / "synthetic", labels, corpus_digest=Corpus.open(folder).digest, **facts)  # type: ignore[arg-type]


def speech_batches(folder: Path, *, with_split: bool = True) -> CorpusBatches:
    """Opens the corpus and plans micro-batches of 32 times 15 s."""
    corpus = Corpus.open(folder)
    labels = corpus.labels("synthetic")
    utterances = np.arange(len(corpus))
    if with_split:
        utterances = np.array([i for i, split in enumerate(corpus.column("split")) if split == "train"])
    config = BatchingConfig(max_frames_per_batch=32 * 1500, max_length=1500, crop_multiple=2)
    plan = BatchPlan(corpus.num_frames[utterances], config, seed=0)
    facts = FrameFacts.of_features(build_frontend(FRONTEND))
    return CorpusBatches(corpus, plan, facts, labels=labels, utterances=utterances)


class FirstBatchError(Exception):
    """Raised when the first batch has come, to end the run there."""


def first_batch(corpus: Path, run: Path, total_steps: int) -> dict[str, float]:
    """Returns the seconds spent until the trainer has its first batch."""
    began = time.perf_counter()
    batches = speech_batches(corpus)
    planned_s = time.perf_counter() - began
    trainer = make_trainer(batches, run, total_steps)

    def arrived(batch: Batch) -> None:
        raise FirstBatchError

    trainer.batch_check = arrived
    try:
        trainer.run()
    except FirstBatchError:
        return {"data_s": round(planned_s, 3), "first_batch_s": round(time.perf_counter() - began, 3)}
    raise AssertionError("no batch came")


def make_trainer(batches: CorpusBatches, run: Path, total_steps: int) -> Trainer:
    description = melhubert(
        num_layers=2, dim=128, num_heads=2, feedforward_dim=512, conv_kernel_size=64, num_clusters=NUM_CLUSTERS
    )
    description = replace(description, frontend=FRONTEND)
    objective = MaskedPrediction(build_model(description, torch.Generator().manual_seed(0)), MaskedPredictionConfig())
    config = TrainerConfig(total_steps=total_steps, device="cpu")
    return Trainer(objective, batches, config, run, save_model=lambda folder: folder.mkdir())


def write_late_checkpoint(batches: CorpusBatches, run: Path, step: int) -> None:
    """Writes the checkpoint that a run would have after ``step`` steps."""
    trainer = make_trainer(batches, run, 2 * step)
    for parameter in trainer.objective.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.engine.optimizer.step()
    position = Position(epoch=step // batches.num_batches, index=step % batches.num_batches)
    state = TrainerState(step=step, position=position, data_digest=batches.digest)
    run.mkdir()
    trainer.folder.describe(trainer.description)
    trainer.folder.save_checkpoint(
        step, lambda folder: write_checkpoint(folder, state, trainer.objective, trainer.engine.optimizer), 1
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--utterances", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        lengths = read_speech_lengths(arguments.utterances)
        write_corpus(root / "corpus", lengths)
        write_late_checkpoint(speech_batches(root / "corpus"), root / "late", arguments.steps)
        rows = {}
        for kind in ("fresh", "resumed"):
            runs = [root / (f"fresh{i}" if kind == "fresh" else "late") for i in range(arguments.repetitions)]
            times = [first_batch(root / "corpus", run, 2 * arguments.steps) for run in runs]
            rows[kind] = sorted(times, key=lambda figures: figures["first_batch_s"])[len(times) // 2]
    hours = lengths.sum() / 360_000
    print(f"{arguments.utterances:,} utterances, {hours:,.0f} hours; median of {arguments.repetitions}; imports not counted")
    print(f"{'start':<34}{'data s':>8}{'first batch s':>15}{'target':>9}")
    for kind, label in (("fresh", "fresh"), ("resumed", f"resumed at step {arguments.steps:,}")):
        print(f"{label:<34}{rows[kind]['data_s']:>8.2f}{rows[kind]['first_batch_s']:>15.2f}{f'< {TARGET_S:.0f}':>9}")
    print(json.dumps({"benchmark": "startup", "utterances": arguments.utterances, "steps": arguments.steps, **rows}))


if __name__ == "__main__":
    main()
