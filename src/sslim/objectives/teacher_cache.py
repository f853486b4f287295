"""A teacher's outputs on disk, so that later runs need not run it again.

=================  ==================================================================================================
``teacher.json``   format version, digests of teacher and corpus, which layers; written first, whole or not at all
``index.jsonl``    one line for each utterance: [corpus index, shard, first row, frames]; appended after its rows are synced
``shard-*.bin``    float16 rows of L * D numbers (of layers) or K (logits), one for each of the teacher's frames
=================  ==================================================================================================

Each utterance is whole: a teacher whose outputs are cached saw all of an utterance, where a run without a cache shows it the
same crop as the student. A killed run goes on with the first utterance that the index lacks; a later run that needs other
utterances of the same corpus adds them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sslim.batch import Batch, Padded
from sslim.config import read_json, to_plain
from sslim.data.batching import CorpusBatches, FrameFacts
from sslim.data.corpus import Corpus
from sslim.data.store import FLOAT16, FLOAT16_MAX, FeatureStore, ShardWriter, shard_path, to_float16
from sslim.models.encoding import corpus_inputs, length_batches, num_model_frames
from sslim.objectives.logit_distillation import LogitTeacher
from sslim.objectives.teacher import Teacher, model_digest
from sslim.storage import write_json

FORMAT_VERSION = 1
DESCRIPTION, INDEX = "teacher.json", "index.jsonl"
COMMIT_S = 5.0  # seconds of work that a kill may cost
POLL_S = 0.5  # while another process fills the cache


def _difference(key: str, found: Any, needed: Any) -> str:
    """What a cache holds that is not what a run needs."""
    if key == "teacher":
        return "of another teacher"
    if key == "corpus":
        return "for another corpus (or this one, prepared anew)"
    if key == "bf16":
        return f"of a teacher in {'bf16' if found else 'fp32'}, and this run's is in {'bf16' if needed else 'fp32'}"
    if key == "target" and isinstance(found, dict):
        part = next(part for part in needed if found.get(part) != needed[part])
        return f"for target {part} {found.get(part)}, and this run needs {needed[part]}"
    return f"for {key} {found}, and this run needs {needed}"


class TeacherCache:
    """Outputs of one teacher on utterances of one corpus.

    Args:
        folder: Where they are or will be.
        teacher: The teacher with the layers, or the logits, that are kept.
        corpus: Whose utterances.

    Raises:
        ValueError: The folder holds something else (another teacher, corpus, or choice of layers), or is not whole.
    """

    def __init__(self, folder: Path, teacher: Teacher | LogitTeacher, corpus: Corpus) -> None:
        self.folder, self.teacher, self.corpus = folder, teacher, corpus
        self.description = {
            "format_version": FORMAT_VERSION,
            "teacher": model_digest(teacher.model),
            "corpus": corpus.digest,
            "target": to_plain(teacher.config),
            "bf16": teacher.bf16,
            "dim": teacher.dim,
        }
        self._check()
        self._store = FeatureStore(folder, teacher.dim)
        self.rows = self._read_index()
        self._check_shards()

    def _check(self) -> None:
        path = self.folder / DESCRIPTION
        if not path.is_file():
            if self.folder.is_dir() and any(not file.name.startswith(f".{DESCRIPTION}.") for file in self.folder.iterdir()):
                raise ValueError(f"{self.folder} is not empty and holds no teacher outputs: name another folder")
            return
        found = read_json(path)
        for key, value in self.description.items():
            if found.get(key) != value:
                told = _difference(key, found.get(key), value)
                raise ValueError(f"{self.folder} holds outputs {told}: name another folder with --cache-teacher, or delete it")

    def _check_shards(self) -> None:
        """Whether every shard holds what the index says; what lies beyond was never committed."""
        ends: dict[int, int] = {}
        for shard, row, count in self.rows.values():
            ends[shard] = max(ends.get(shard, 0), row + count)
        for shard, end in ends.items():
            path, needed = shard_path(self.folder, shard), end * self.teacher.dim * FLOAT16.itemsize
            found = path.stat().st_size if path.is_file() else 0
            if found < needed:
                raise ValueError(f"{path} has {found} bytes, {needed} were written: delete {self.folder}, it is not whole")

    def _read_index(self) -> dict[int, tuple[int, int, int]]:
        """Utterance to (shard, first row, frames); a last line that a kill cut off does not count."""
        path = self.folder / INDEX
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        return {i: (shard, row, frames) for i, shard, row, frames in map(json.loads, whole.splitlines())}

    @property
    def digest(self) -> str:
        """Tells these outputs from all others."""
        return f"{self.description['teacher'][:16]} {self.description['target']} {self.description['bf16']}"

    def missing(self, utterances: np.ndarray) -> np.ndarray:
        """Returns those of the corpus indices that have no outputs yet, each once."""
        return np.array([i for i in np.unique(utterances).tolist() if i not in self.rows], dtype=np.int64)

    def frames(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns frames ``start`` to ``stop`` of utterance ``i``, (T', L * D) float16, without copying."""
        shard, row, count = self.rows[i]
        stop = count if stop is None else min(stop, count)
        return (
            self._store.rows(shard, row + start, row + max(start, stop)) if count else np.zeros((0, self.teacher.dim), FLOAT16)
        )

    def fill(self, utterances: np.ndarray, *, batch_s: float, say: Callable[[str], None]) -> None:
        """Runs the teacher on what is missing and says beforehand how much room it takes.

        Raises:
            ValueError: There is not enough room, another process is writing here, or float16 cannot hold the outputs.
        """
        missing = self.missing(utterances)
        if len(missing) == 0:
            return
        inputs = corpus_inputs(self.teacher.model, self.corpus, missing)
        num_frames = int(num_model_frames(self.teacher.model, inputs).sum())
        num_bytes = num_frames * self.teacher.dim * FLOAT16.itemsize
        self.folder.mkdir(parents=True, exist_ok=True)
        say(
            f"teacher outputs: {num_frames:,} frames of {len(missing):,} utterances, {self.teacher.dim} numbers each, "
            f"{num_bytes / 1e6:,.1f} MB in {self.folder}"
        )
        if num_bytes > (free := shutil.disk_usage(self.folder).free):
            raise ValueError(
                f"{self.folder} has room for {free / 1e6:,.0f} MB, the teacher's outputs need {num_bytes / 1e6:,.0f} MB"
            )
        if not (self.folder / DESCRIPTION).is_file():
            write_json(self.folder / DESCRIPTION, self.description)
        with self._writing() as commit:
            self._run(missing, inputs, batch_s, commit)

    def wait_for(self, utterances: np.ndarray) -> None:
        """Returns when another process has written what is missing here.

        A barrier of the processes would give up after some minutes, and a large corpus takes hours.
        """
        while len(self.missing(utterances)):
            time.sleep(POLL_S)
            self._check()
            self.rows = self._read_index()
        self._store = FeatureStore(self.folder, self.teacher.dim)

    def _run(self, missing: np.ndarray, inputs: Any, batch_s: float, commit: Callable[[list[list[int]]], None]) -> None:
        pending: list[list[int]] = []
        committed, device = time.monotonic(), next(self.teacher.model.parameters()).device
        for positions in length_batches(inputs.lengths, batch_s / inputs.unit_s):
            values = [inputs.read(position) for position in positions]
            lengths_B = torch.tensor([len(value) for value in values], device=device)
            padded = torch.nn.utils.rnn.pad_sequence(values, batch_first=True).to(device)
            for position, frames in zip(positions, self._frames(padded, lengths_B), strict=True):
                index, largest = int(missing[position]), float(np.abs(frames).max(initial=0.0))
                if not largest <= FLOAT16_MAX:  # or NaN
                    raise ValueError(
                        f"the teacher's outputs for utterance {self.corpus.utterance(index).id} reach {largest:.4g}, and "
                        f"float16 holds {FLOAT16_MAX:g} at most: leave --cache-teacher out"
                    )
                shard, row = self._writer.append(to_float16(frames))
                pending.append([index, shard, row, len(frames)])
            if time.monotonic() - committed >= COMMIT_S:
                commit(pending)
                pending, committed = [], time.monotonic()
        commit(pending)

    def _frames(self, padded: torch.Tensor, lengths_B: torch.Tensor) -> Iterator[np.ndarray]:
        output = self.teacher.frames(padded, lengths_B)
        for row, length in enumerate(output.lengths.tolist()):
            yield output.values[row, :length].cpu().numpy()

    @contextmanager
    def _writing(self) -> Iterator[Callable[[list[list[int]]], None]]:
        """Opens shards and index behind what is committed; gives a function that commits utterances."""
        with (self.folder / INDEX).open("a+b") as index:
            try:
                fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(f"another run is writing teacher outputs to {self.folder}: wait for it") from error
            self._check()  # another run may have written while this one was starting
            self.rows = self._read_index()
            index.truncate((self.folder / INDEX).read_bytes().rfind(b"\n") + 1)
            ends = [(shard, row + count) for shard, row, count in self.rows.values()]
            shard, row = max(ends, default=(0, 0))
            width = self.teacher.dim * FLOAT16.itemsize
            self._writer = ShardWriter(self.folder, self.teacher.dim, shard=shard, num_bytes=row * width)

            def commit(lines: Sequence[list[int]]) -> None:
                self._writer.sync()
                index.write("".join(json.dumps(line) + "\n" for line in lines).encode())
                index.flush()
                os.fsync(index.fileno())
                self.rows.update({i: (shard, row, count) for i, shard, row, count in lines})

            try:
                yield commit
            finally:
                self._writer.close()
                self._store = FeatureStore(self.folder, self.teacher.dim)


class CachedBatches:
    """Micro-batches with a teacher's stored frames; a crop gets the frames from its start on, as many as it has by itself.

    Args:
        batches: What the student reads; crops start on the teacher's frames.
        cache: Filled for all its utterances.
        facts: Of the teacher's front-end, in the units that ``batches`` reads.

    Raises:
        ValueError: Crops may start between two frames of the teacher.
    """

    def __init__(self, batches: CorpusBatches, cache: TeacherCache, facts: FrameFacts) -> None:
        if batches.plan.config.max_length is not None and batches.plan.config.crop_multiple % facts.hop:
            raise ValueError(
                f"crops start at multiples of {batches.plan.config.crop_multiple} stored units, "
                f"which are no whole number of the teacher's frames of {facts.hop}"
            )
        self.batches, self.facts, self._digest = batches, facts, cache.digest
        self.rows, self.dim, self._store = cache.rows, cache.teacher.dim, FeatureStore(cache.folder, cache.teacher.dim)

    @property
    def num_batches(self) -> int:
        return self.batches.num_batches

    @property
    def digest(self) -> str:
        """Tells these batches from all others."""
        return f"{self.batches.digest} {self._digest}"

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        batch, planned = self.batches[key], self.batches.plan.batch(*key)
        pieces: list[np.ndarray] = []
        utterances = self.batches.utterances[planned.indices].tolist()
        for i, start, length in zip(utterances, planned.starts.tolist(), planned.lengths.tolist(), strict=True):
            shard, row, count = self.rows[i]
            first = start // self.facts.hop
            stop = min(first + self.facts.num_frames(length), count)
            pieces.append(
                self._store.rows(shard, row + first, row + max(first, stop)) if stop > first else np.zeros((0, self.dim))
            )
        values_BTD = torch.zeros(len(pieces), max(map(len, pieces)), self.dim, dtype=torch.float16)
        rows = values_BTD.numpy()
        for place, piece in enumerate(pieces):
            if len(piece):
                rows[place, : len(piece)] = piece
        lengths_B = torch.tensor([len(piece) for piece in pieces])
        return replace(batch, teacher=Padded(values=values_BTD, lengths=lengths_B))
