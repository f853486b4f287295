"""A model on disk, without loading it: where a run keeps it, what people call it, its tensors' files, digest and size."""

from __future__ import annotations

from pathlib import Path

from sslim.checkpoints.importers.huggingface import CONFIG
from sslim.checkpoints.native import DESCRIPTION
from sslim.storage import file_digest

MODEL = "model"  # where a run, or a compression, keeps what it made
RUN = "run.json"


def model_path(path: Path) -> Path:
    """Returns ``path``, or the model inside it where it is the folder of a run or of a compression.

    Raises:
        ValueError: A run that has no model yet, or a folder without a model.
        FileNotFoundError: There is nothing at ``path``.
    """
    if not path.exists():
        raise FileNotFoundError(2, "there is no such model folder, run folder or checkpoint", str(path))
    if path.is_file() or (path / DESCRIPTION).is_file() or (path / CONFIG).is_file():
        return path
    if (path / MODEL / DESCRIPTION).is_file():
        return path / MODEL
    if (path / RUN).is_file():
        raise ValueError(f"the run in {path} is not finished: it has no {MODEL}/ folder yet")
    raise ValueError(f"{path} holds no model: it has neither {DESCRIPTION} nor a folder {MODEL}/ with one")


def model_name(path: Path) -> str:
    """Returns the name of a model's folder or file, or of the run that ``RUN/model`` belongs to."""
    whole = path.resolve()
    return whole.parent.name if whole.name == MODEL else whole.name


def tensor_files(path: Path) -> list[Path]:
    """Returns the files that hold a model's tensors: a checkpoint itself, or the one file of a folder, or its several parts."""
    if path.is_file():
        return [path]
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    if not files:
        raise ValueError(f"{path} holds no tensors: it has no .safetensors or .bin file")
    return files


def tensors_digest(path: Path) -> str:
    """Returns the SHA-256 of a model's tensor files (several: all of them, with blanks between), to tell it from another.

    Models that differ in their description alone have equal digests: the same tensors with narrower attention windows.
    """
    return " ".join(file_digest(file) for file in tensor_files(path))


def tensors_bytes(path: Path) -> int:
    """Returns the size of a model's tensor files; that of a foreign checkpoint includes whatever else is in it."""
    return sum(file.stat().st_size for file in tensor_files(path))
