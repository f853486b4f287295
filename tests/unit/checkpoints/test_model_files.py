"""Where a model lies on disk, and what it is called, without loading it."""

from pathlib import Path

import pytest
import torch

from sslim.checkpoints import save_model
from sslim.checkpoints.model_files import model_name, model_path, tensor_files, tensors_bytes, tensors_digest
from sslim.models import PRESETS, build_model
from sslim.storage import file_digest


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    model = build_model(PRESETS["melhubert-tiny"](), torch.Generator().manual_seed(0))
    save_model(model, folder / "model")
    (folder / "run.json").write_text("{}", encoding="utf-8")
    return folder


def test_a_run_stands_for_its_model(run: Path, monkeypatch) -> None:
    assert model_path(run) == model_path(run / "model") == run / "model"
    assert model_name(run / "model") == "first"
    monkeypatch.chdir(run)
    assert model_name(Path("model")) == "first"
    assert model_name(Path("some.ckpt")) == "some.ckpt"


def test_digest_and_size_are_those_of_the_tensors(run: Path, tmp_path: Path) -> None:
    file = run / "model" / "model.safetensors"
    assert tensor_files(run / "model") == [file]
    assert tensors_digest(run / "model") == file_digest(file) == tensors_digest(file)
    assert tensors_bytes(run / "model") == file.stat().st_size
    for number in (1, 2):
        (tmp_path / f"model-{number}.safetensors").write_bytes(bytes(10 * number))
    assert tensors_bytes(tmp_path) == 30
    assert len(tensors_digest(tmp_path).split()) == 2


def test_folders_without_a_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such model folder, run folder or checkpoint"):
        model_path(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no model: it has neither model.json nor a folder model/ with one"):
        model_path(tmp_path)
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is not finished: it has no model/ folder yet"):
        model_path(tmp_path)
    with pytest.raises(ValueError, match="holds no tensors"):
        tensors_bytes(tmp_path)
