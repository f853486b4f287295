"""Fixtures that every test may use: one thread, and the shared reference material where it is present."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared(name: str) -> Path:
    folder = Path(os.environ.get("SSLIM_SHARED", SHARED)) / name
    if not folder.is_dir():
        pytest.skip(f"the shared folder {name}/ is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real speech with licences (not in the repository)."""
    return _shared("data")


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """Checkpoints and outputs of the reference implementations."""
    return _shared("golden")
