"""Seeds as a pure function of what they are for, so that no random state is ever saved."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """Returns a seed below 2**63 that depends on every part, for example ``(run seed, "mask", step, micro-batch)``."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_device(seed: int, device: torch.device) -> None:
    """Seeds what dropout on ``device`` draws from.

    ``torch.manual_seed`` would do the same, but on a machine without a GPU it formats a stack trace at each call (1.5 ms).
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
