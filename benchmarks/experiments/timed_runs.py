"""Commands of ``sslim`` as steps of an experiment: printed, skipped where their result is there, trained for given minutes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path


def precision() -> str:
    """bf16 where the processor calculates with it, else fp32: without such instructions bf16 is the slower of the two."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8", errors="replace").split() if info.is_file() else []
    return "bf16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "fp32"


COMMON = ("--precision", precision(), "--threads", "1")


def sslim(*arguments: str | Path, done: Path | None = None) -> None:
    """Runs one command unless what it makes is there."""
    words = [str(word) for word in arguments]
    if done is not None and done.exists():
        return
    print("$ sslim", shlex.join(words), flush=True)
    subprocess.run([sys.executable, "-m", "sslim", *words], check=True)


def steps_within(minutes: float, *arguments: str | Path) -> int:
    """Returns how many steps of a training command fit into ``minutes``, from a trial of half a minute."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "trial"
        words = [str(word) for word in (*arguments, "--output", trial, "--steps", "100000", "--minutes", "0.5", *COMMON)]
        subprocess.run([sys.executable, "-m", "sslim", *words], check=False, capture_output=True)  # it ends before its steps
        if not (trial / "metrics.jsonl").exists():
            raise RuntimeError(f"the trial of `sslim {shlex.join(words)}` did not train: run it to see why")
        records = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
    last = max((record for record in records if record["kind"] == "train"), key=lambda record: record["step"])
    return round(last["step"] * 60 * minutes / last["elapsed_s"])


def train(*arguments: str | Path, output: Path, minutes: float) -> None:
    """Runs a training command for as many steps as fit into ``minutes``, so that its learning rate ends at zero then."""
    plan = output.with_suffix(".steps")
    if not plan.exists():
        plan.write_text(str(steps_within(minutes, *arguments)))
    sslim(*arguments, "--output", output, "--steps", plan.read_text(), *COMMON)


def minutes_of(run: Path) -> float:
    """Minutes that a run has trained."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return max(record.get("elapsed_s", 0.0) for record in records) / 60
