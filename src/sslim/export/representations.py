"""Hidden states of audio or a corpus, written for other programs: safetensors, npz, Kaldi archives.

A folder of features holds ``settings.json`` (what was asked, so that nothing else is ever mixed in), one file for each
utterance (or for Kaldi one archive for each layer), ``quarantine.jsonl`` (what could not be read, and why) and, when all is
done, ``index.json``. Every file appears only when it is whole, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open
from torch import Tensor

from sslim.config import read_json
from sslim.data.ark import write_ark_scp
from sslim.export.audio_inputs import Utterances, open_audio, safe_id
from sslim.models.encoding import DEFAULT_BATCH_S, encode_utterances
from sslim.models.speech import SpeechModel
from sslim.storage import load_tensors, save_tensors, sync, write_json, write_text_atomically

FORMAT_VERSION = 1
SETTINGS, INDEX, QUARANTINE, STAGING = "settings.json", "index.json", "quarantine.jsonl", ".staging"
FINAL, ALL = "final", "all"


class TooManyBadError(ValueError):
    """More utterances than allowed could not be read; the rest was written."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What is written.

    Attributes:
        layers: ``all``, ``final`` (after the last norm), or numbers and ``final`` with commas; 0 enters the first block.
        format: ``safetensors`` or ``npz``, one file for each utterance; ``ark``, one Kaldi archive and list for each layer.
        batch_s: Seconds of padded audio in a batch.
        bf16: Whether the model runs under bf16 autocast; files are float32 all the same.
        max_bad: Share of the utterances that may be unreadable.
    """

    layers: str = ALL
    format: Literal["safetensors", "npz", "ark"] = "safetensors"
    batch_s: float = DEFAULT_BATCH_S
    bf16: bool = False
    max_bad: float = 0.01


def parse_layers(text: str, num_layers: int) -> tuple[str, ...]:
    """Returns the keys of the layers that ``text`` names: ``layer_00`` (enters the first block), ``layer_01``, ..., ``final``.

    Args:
        text: ``all``, ``final``, or numbers and ``final`` with commas.
        num_layers: N; layers go from 0 to N.

    Raises:
        ValueError: A layer that the model does not have.
    """
    if text == ALL:
        return tuple(f"layer_{k:02d}" for k in range(num_layers + 1))
    keys = []
    for part in (part.strip() for part in text.split(",")):
        if part == FINAL:
            keys.append(FINAL)
        elif part.isdecimal() and int(part) <= num_layers:
            keys.append(f"layer_{int(part):02d}")
        else:
            raise ValueError(f"there is no layer {part!r}; accepted are 0 to {num_layers}, {FINAL!r} and {ALL!r}")
    return tuple(dict.fromkeys(keys))


def _write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_tensors(path, tensors)


def _write_npz(path: Path, tensors: dict[str, Tensor]) -> None:
    with path.open("wb") as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]


def _safetensors_frames(path: Path) -> int:
    with safe_open(path, framework="numpy") as file:
        return int(file.get_slice(next(iter(file.keys()))).get_shape()[0])


def _npz_frames(path: Path) -> int:
    with np.load(path, allow_pickle=False) as arrays:
        return len(arrays[arrays.files[0]])


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """How one utterance becomes one file.

    Attributes:
        suffix: Of the file.
        write: Writes tensors to a path.
        num_frames: Reads how many frames a file holds.
    """

    suffix: str
    write: Callable[[Path, dict[str, Tensor]], None]
    num_frames: Callable[[Path], int]


_SAFETENSORS = FileFormat(suffix=".safetensors", write=_write_safetensors, num_frames=_safetensors_frames)
FORMATS: dict[str, FileFormat] = {
    "safetensors": _SAFETENSORS,
    "npz": FileFormat(suffix=".npz", write=_write_npz, num_frames=_npz_frames),
    "ark": _SAFETENSORS,  # staged file by file, so that one run of the model serves the archives of all layers
}


def _write_whole(path: Path, tensors: dict[str, Tensor], write: Callable[[Path, dict[str, Tensor]], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary, tensors)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def extract(
    model: SpeechModel,
    arguments: Sequence[Path],
    output: Path,
    config: ExtractConfig,
    *,
    origin: dict[str, str] | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Writes hidden states of ``arguments`` to the folder ``output``.

    Args:
        model: In eval mode.
        arguments: Audio files, folders, or one corpus.
        output: New or empty, or left by an earlier run of the same; a finished one is left as it is.
        config: What is written.
        origin: Path and digest of the model, kept in the index.
        tell: Called with utterances done and in all.

    Returns:
        What ``index.json`` says.

    Raises:
        ValueError: Nothing to read, unknown layer, or ``output`` holds something else.
        TooManyBadError: More than ``max_bad`` of the utterances could not be read; the others are written.
    """
    keys = parse_layers(config.layers, model.num_layers)
    utterances = open_audio(arguments, model)
    names = [safe_id(name) for name in utterances.ids]
    repeated = [name for name, count in Counter(names).items() if count > 1 or not name]
    if repeated:
        raise ValueError(f"two utterances would both be written as {repeated[0]!r}; rename one of them")
    settings = {
        "format_version": FORMAT_VERSION,
        "model": origin or {},
        "layers": list(keys),
        "format": config.format,
        "bf16": config.bf16,
        "utterances_sha256": hashlib.sha256(json.dumps([utterances.ids, utterances.paths]).encode()).hexdigest(),
    }
    _claim(output, settings)
    if (output / INDEX).is_file():
        index = read_json(output / INDEX)
    else:
        folder = output / STAGING if config.format == "ark" else output
        files = [folder / f"{name}{FORMATS[config.format].suffix}" for name in names]
        bad = _write_missing(model, utterances, files, keys, config, tell)
        index = _finish(model, utterances, names, files, bad, output, settings, keys)
    _check_bad(index, output, config.max_bad)
    return index


def _claim(output: Path, settings: dict[str, Any]) -> None:
    """Marks ``output`` as a folder of these settings.

    Raises:
        ValueError: It holds something else.
    """
    if output.is_file():
        raise ValueError(f"{output} is a file; --output names a folder")
    output.mkdir(parents=True, exist_ok=True)
    if (output / SETTINGS).is_file():
        old = read_json(output / SETTINGS)
        different = [key for key in settings if old.get(key) != settings[key]]
        if different:
            what = {"model": "another model", "utterances_sha256": "other audio"}.get(different[0], f"other {different[0]}")
            raise ValueError(f"{output} holds features of {what}; name another folder")
    elif any(output.iterdir()):
        raise ValueError(f"{output} is not empty and holds no features; name a new folder")
    else:
        write_json(output / SETTINGS, settings)


def _write_missing(
    model: SpeechModel,
    utterances: Utterances,
    files: Sequence[Path],
    keys: Sequence[str],
    config: ExtractConfig,
    tell: Callable[[int, int], None],
) -> dict[int, str]:
    """Encodes what has no file yet; returns position to reason of what cannot be read."""
    bad = dict(utterances.bad)
    missing = np.array([i for i, file in enumerate(files) if i not in bad and not file.exists()], dtype=np.int64)
    done = len(files) - len(missing)
    tell(done, len(files))

    def note(position: int, error: Exception) -> None:
        bad[int(missing[position])] = getattr(error, "reason", str(error))

    encoded = encode_utterances(model, utterances.inputs(missing), batch_s=config.batch_s, bf16=config.bf16, on_error=note)
    for position, layers, final in encoded if len(missing) else ():
        done += 1
        index = int(missing[position])
        if not len(final):
            bad[index] = "shorter than one frame"
            continue
        tensors = {key: final if key == FINAL else layers[int(key.removeprefix("layer_"))] for key in keys}
        _write_whole(files[index], tensors, FORMATS[config.format].write)
        tell(done, len(files))
    tell(len(files), len(files))
    return bad


def _finish(
    model: SpeechModel,
    utterances: Utterances,
    names: Sequence[str],
    files: Sequence[Path],
    bad: dict[int, str],
    output: Path,
    settings: dict[str, Any],
    keys: Sequence[str],
) -> dict[str, Any]:
    """Writes archives where they were asked for, the quarantine list, and last the index."""
    form = FORMATS[settings["format"]]
    listed: dict[str, dict[str, Any]] = {}
    for i in (i for i in range(len(names)) if i not in bad):
        listed[names[i]] = {"source": utterances.paths[i], "num_frames": form.num_frames(files[i])}
        if settings["format"] != "ark":
            listed[names[i]]["file"] = files[i].relative_to(output).as_posix()
    index = settings | {
        "dim": model.config.encoder.dim,
        "frame_period_s": utterances.frame_period_s,
        "num_utterances": len(listed),
        "num_quarantined": len(bad),
        "utterances": listed,
    }
    if settings["format"] == "ark":
        kept = {name: file for name, file in zip(names, files, strict=True) if name in listed}
        index["archives"] = {}
        for key in keys:
            archive = f"feats_{key.replace('_', '')}"
            write_ark_scp(output, ((name, load_tensors(file)[key].numpy()) for name, file in kept.items()), name=archive)
            index["archives"][key] = f"{archive}.scp"
    lines = [{"id": names[i], "path": utterances.paths[i], "reason": bad[i]} for i in sorted(bad)]
    write_text_atomically(output / QUARANTINE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_json(output / INDEX, index)
    shutil.rmtree(output / STAGING, ignore_errors=True)
    return index


def _check_bad(index: dict[str, Any], output: Path, max_bad: float) -> None:
    total = index["num_utterances"] + index["num_quarantined"]
    if index["num_quarantined"] > max_bad * total:
        with (output / QUARANTINE).open(encoding="utf-8") as file:
            first = json.loads(file.readline())
        raise TooManyBadError(
            f"{index['num_quarantined']} of {total} utterances could not be read, more than --max-bad {max_bad:g} allows "
            f"(the others are written; see {output / QUARANTINE}), the first is {first['path']}: {first['reason']}"
        )
