"""Peak memory of one process: of the process on a CPU, of torch's allocator on a GPU.

A process that was started by a large one inherits that one's ``ru_maxrss`` on Linux (exec keeps the larger of the two), so the
peak is read from ``/proc/self/status`` there, which belongs to the process alone and can be set back.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what sets VmHWM back to VmRSS, see proc_pid_clear_refs(5)
INCLUDES = {
    "cpu": "peak memory: most resident memory of a fresh process while it loads the model and encodes, less what it had with "
    "Python and torch before; weights, activations and torch's own buffers",
    "cuda": "peak memory: most memory that torch's allocator had given out on the GPU while a fresh process encodes; weights, "
    "activations and workspaces, not the CUDA context",
}


def includes(device: str) -> str:
    """Returns the sentence that says what a peak on ``device`` includes."""
    return INCLUDES["cuda" if device.startswith("cuda") else "cpu"]


def added_peak_bytes(run: Callable[[], object], device: str) -> int:
    """Returns how many bytes ``run`` needs at its peak beyond what the process holds already.

    Args:
        run: What loads a model and uses it. On a GPU everything that torch's allocator gives out counts.
        device: ``cpu`` or ``cuda``.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    before = _resident_after_reset()
    run()
    return max(0, peak_resident_bytes() - before)


def peak_resident_bytes() -> int:
    """Returns the most memory that this process has had resident."""
    if (peak := _status_bytes("VmHWM")) is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes there, kilobytes elsewhere


def _resident_after_reset() -> int:
    """What is resident now, with the peak set back to it; where that cannot be done, the peak so far."""
    try:
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
    except OSError:  # no Linux, or a sandbox
        return peak_resident_bytes()
    resident = _status_bytes("VmRSS")
    return peak_resident_bytes() if resident is None else resident


def _status_bytes(name: str) -> int | None:
    if not STATUS.is_file():
        return None
    for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return None
