"""Whatever writes a folder says so when a file has its name."""

from pathlib import Path

import pytest
import torch

from sslim.models import PRESETS, build_model
from sslim.recipes.compression_folder import claim
from sslim.recipes.distil import NamedTeacher
from sslim.training.run_folder import RunFolder


def locked(path: Path) -> None:
    with RunFolder(path).lock():
        pass


def claimed(path: Path) -> None:
    model = build_model(PRESETS["melhubert-tiny"](), torch.Generator().manual_seed(0))
    claim(path, "pipeline", {"steps": []}, NamedTeacher(model=model, name="x"), None)


@pytest.mark.parametrize("use", [locked, claimed])
def test_a_file_in_place_of_the_folder(use, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match="taken is a file; --output names a folder"):
        use(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
    use(tmp_path / "new")  # control
    assert (tmp_path / "new").is_dir()
