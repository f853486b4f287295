"""The native format: a folder of ``model.json`` (description, provenance), ``model.safetensors`` and ``digests.json``.

The front-end and its statistics are in it, so nothing is guessed when it is read. Reading is strict: every tensor that the
description asks for must be there with its shape, and none besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslim.checkpoints.restricted_pickle import CheckpointError
from sslim.config import from_plain, read_json, to_plain
from sslim.frontends import build_frontend
from sslim.models import ModelConfig, SpeechModel
from sslim.models.speech import restore_statistics
from sslim.models.storage import loaded_state, stored_state
from sslim.storage import atomic_folder, check_folder, load_tensors, save_tensors, write_json

FORMAT_VERSION = 1
DESCRIPTION, TENSORS = "model.json", "model.safetensors"
MAX_NAMES = 4  # tensor names spelt out in an error


def save_model(model: SpeechModel, folder: str | Path) -> None:
    """Writes a model; an existing folder of that name is replaced only when the new one is complete.

    Args:
        model: Any model; its heads, statistics and provenance are written too.
        folder: Where to.

    Raises:
        ValueError: ``folder`` exists and is no model folder, or a weight is too large for the model's storage.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / DESCRIPTION).is_file():
        raise ValueError(
            f"{folder} exists and is no model folder (no {DESCRIPTION}): it is not overwritten, choose another name"
        )
    assert model.frontend is None or model.config.frontend == model.frontend.config, "statistics set past SpeechModel"
    state = stored_state(model)
    values = {"format_version": FORMAT_VERSION, "config": to_plain(model.config), "provenance": model.provenance}
    with atomic_folder(folder) as temporary:
        write_json(temporary / DESCRIPTION, values)
        save_tensors(temporary / TENSORS, state)


def load_native(folder: str | Path) -> SpeechModel:
    """Reads a model folder; returns the model in eval mode on the CPU.

    Raises:
        CheckpointError: No model folder, a newer format, or tensors that do not fit the description.
        sslim.storage.TornFolderError: A file is missing or does not match its digest.
        sslim.config.ConfigError: The description has an unknown key or a value of the wrong type.
    """
    folder = Path(folder)
    description = folder / DESCRIPTION
    if not description.is_file():
        raise CheckpointError(f"{folder} has no {DESCRIPTION}: it is not a model folder")
    values = read_json(description)
    version = values.get("format_version") if isinstance(values, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{description} has no format_version: it is not the description of a model")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{folder} has format {version}, this sslim reads up to {FORMAT_VERSION}: use a newer sslim")
    check_folder(folder)
    for name in sorted(set(values) ^ {"format_version", "config", "provenance"}):
        raise CheckpointError(f"{description} {'has the unknown key' if name in values else 'lacks the key'} {name!r}")
    if not (folder / TENSORS).is_file():
        raise CheckpointError(f"{folder} has no {TENSORS}")
    state = _separate_mask_embedding(values["config"], load_tensors(folder / TENSORS))
    config = from_plain(ModelConfig, values["config"], f"{description}: config")
    return assemble(config, loaded_state(state, config.storage), values["provenance"], source=str(folder))


def _separate_mask_embedding(config: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives a mask embedding that older files hold inside the cluster head its own head, in the description and the tensors."""
    heads = config.get("heads") if isinstance(config, dict) else None
    old = heads.get("masked_prediction") if isinstance(heads, dict) else None
    if not isinstance(old, dict) or "mask_embedding_dim" not in old:
        return state
    if (dim := old.pop("mask_embedding_dim")) is not None:
        heads["mask"] = {"kind": "mask", "dim": dim}  # type: ignore[index]
    return {name.replace("heads.masked_prediction.mask_embedding", "heads.mask.embedding"): t for name, t in state.items()}


def assemble(config: ModelConfig, state: Mapping[str, Tensor], provenance: list[dict[str, Any]], *, source: str) -> SpeechModel:
    """Puts a description and a dictionary of tensors together, strictly.

    Args:
        config: Description.
        state: Every tensor by its native name, front-end statistics too if any; the model keeps these very tensors.
        provenance: Where they come from.
        source: What to call the whole in an error.

    Returns:
        The model in eval mode. No random number is drawn.

    Raises:
        CheckpointError: A tensor is missing, of another shape or no floating-point tensor, or there is one too many.
    """
    try:
        with torch.device("meta"):
            model = SpeechModel(config, provenance)
        if config.frontend is not None:
            model.frontend = build_frontend(config.frontend)  # its tables are computed, so they cannot stay on meta
    except ValueError as error:
        raise CheckpointError(f"{source} describes a model that cannot be: {error}") from error
    if "frontend.mean" in state and "frontend.std" in state:
        restore_statistics(model, state)
    _check_tensors(model.state_dict(), state, source)
    model.load_state_dict(dict(state), strict=True, assign=True)
    return model.eval()


def _check_tensors(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    if missing := sorted(expected.keys() - state.keys()):
        raise CheckpointError(f"{source} lacks {_some(missing)}, which its description asks for")
    if unexpected := sorted(state.keys() - expected.keys()):
        raise CheckpointError(f"{source} has {_some(unexpected)}, which its description has no place for")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, its description asks for {tuple(expected[name].shape)}"
            raise CheckpointError(f"{source}: {name} has shape {shapes}")
        dtype = expected[name].dtype
        if tensor.is_floating_point() != dtype.is_floating_point or not (tensor.is_floating_point() or tensor.dtype is dtype):
            wanted = "floating-point numbers" if dtype.is_floating_point else dtype
            raise CheckpointError(f"{source}: {name} holds {tensor.dtype}, expected {wanted}")


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + rest
