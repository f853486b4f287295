"""Peak memory of a model in a process of its own: ``python -m sslim.recipes.peak_memory REQUEST`` prints the bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from sslim.config import from_plain, to_plain
from sslim.profiling import Conditions


def peak_memory_bytes(folder: Path, conditions: Conditions) -> int:
    """Returns the peak memory of loading a model and encoding noise with it once, measured in a fresh process.

    What it includes: ``sslim.profiling.memory.includes``.

    Args:
        folder: A native model folder; a foreign checkpoint would be measured with all that translating it takes.
        conditions: Length, batch, threads, device.

    Raises:
        RuntimeError: The process failed, for example because memory ran out.
    """
    request = json.dumps({"folder": str(folder), "conditions": to_plain(conditions)})
    command = [sys.executable, "-m", "sslim.recipes.peak_memory", request]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it was ended from outside, perhaps for want of memory"])[-1]
        raise RuntimeError(f"the process that measures the peak memory of {folder.name} ended with {done.returncode}: {said}")
    return int(done.stdout)


def measured_bytes(request: dict[str, Any]) -> int:
    """Loads and encodes as ``request`` says; returns the bytes added at the peak."""
    import torch

    from sslim.checkpoints import load_model
    from sslim.profiling.latency import with_some_statistics
    from sslim.profiling.measure import encode_once
    from sslim.profiling.memory import added_peak_bytes
    from sslim.profiling.turns import using_threads

    conditions = from_plain(Conditions, request["conditions"], "conditions")

    def run() -> None:
        model = with_some_statistics(load_model(request["folder"])).to(conditions.device)
        encode = encode_once(model, conditions, torch.Generator().manual_seed(0))
        with torch.inference_mode(), using_threads(conditions.threads):
            encode()

    return added_peak_bytes(run, conditions.device)


if __name__ == "__main__":
    print(measured_bytes(json.loads(sys.argv[1])))
