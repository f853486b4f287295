"""Hidden states of audio or a corpus, written for other programs: safetensors, npz, Kaldi archives.

A folder of features holds ``settings.json`` (what was asked, so that nothing else is ever mixed in), one file for each
utterance (or one Kaldi data directory for each layer), ``quarantine.jsonl`` (what could not be read, and why) and, when all is
done, ``index.json``. Every file appears only when it is whole, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
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
from sslim.export.audio_inputs import Utterances, open_audio, safe_id
from sslim.export.frame_rate import repeat_factor, repetition_to
from sslim.export.kaldi_folders import SCP, FeatureUtterance, speakers_are_in_order, write_feature_folder
from sslim.models.encoding import DEFAULT_BATCH_S, encode_utterances
from sslim.models.speech import SpeechModel
from sslim.models.streaming import StreamingEncoder, stream_utterances
from sslim.storage import atomic_file, save_tensors, write_json, write_text_atomically

FORMAT_VERSIONS = {"safetensors": 1, "npz": 1, "ark": 2}  # ark: a data directory for each layer since 2
SETTINGS, INDEX, QUARANTINE, STAGING = "settings.json", "index.json", "quarantine.jsonl", ".staging"
FINAL, ALL = "final", "all"


class TooManyBadError(ValueError):
    """More utterances than allowed could not be read; the rest was written."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What is written.

    Attributes:
        layers: ``all``, ``final`` (after the last norm), or numbers and ``final`` with commas; 0 enters the first block.
        format: ``safetensors`` or ``npz``, one file for each utterance; ``ark``, one Kaldi data directory for each layer.
        batch_s: Seconds of padded audio in a batch.
        bf16: Whether the model runs under bf16 autocast; files are float32 all the same.
        max_bad: Share of the utterances that may be unreadable.
        frame_period_ms: Milliseconds from one frame to the next, for labels that have more frames than the model: frames are
            repeated (``frame_rate``). None leaves the model's.
        stream_chunk_ms: Run the model over waveforms that arrive in chunks of so many milliseconds, one utterance after the
            other (``sslim.models.streaming``); what is written stays the same. None encodes whole utterances in batches.
    """

    layers: str = ALL
    format: Literal["safetensors", "npz", "ark"] = "safetensors"
    batch_s: float = DEFAULT_BATCH_S
    bf16: bool = False
    max_bad: float = 0.01
    frame_period_ms: float | None = None
    stream_chunk_ms: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.batch_s < math.inf:
            raise ValueError(f"batch_s is {self.batch_s}; expected seconds of audio above 0")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad is {self.max_bad}; expected a share of the utterances, 0 to 1")


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


def _safetensors_key(path: Path, key: str) -> np.ndarray:
    with safe_open(path, framework="numpy") as file:
        return file.get_tensor(key)


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
    with atomic_file(path) as temporary:
        write(temporary, tensors)


def extract(
    model: SpeechModel,
    arguments: Sequence[Path],
    output: Path,
    config: ExtractConfig,
    *,
    origin: dict[str, str] | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
    note: Callable[[float], None] = lambda seconds: None,
) -> dict[str, Any]:
    """Writes hidden states of ``arguments`` to the folder ``output``.

    Args:
        model: In eval mode.
        arguments: Audio files, folders, or one corpus.
        output: New or empty, or left by an earlier run of the same; a finished one is left as it is.
        config: What is written.
        origin: Path and digest of the model, kept in the index.
        tell: Called with utterances done and in all.
        note: Called with the seconds that computing took for each whole chunk, where the model is streamed.

    Returns:
        What ``index.json`` says.

    Raises:
        ValueError: Nothing to read, unknown layer, a model that cannot be streamed where it is to be, a frame period that the
            model's does not divide, or a folder that holds something else.
        TooManyBadError: More than ``max_bad`` of the utterances could not be read; the others are written.
    """
    keys = parse_layers(config.layers, model.num_layers)
    if config.stream_chunk_ms is not None:
        StreamingEncoder(model).latency_s(config.stream_chunk_ms / 1000)  # refuses before anything is written
    utterances = open_audio(arguments, model, waveforms=config.stream_chunk_ms is not None)
    names = [safe_id(name) for name in utterances.ids]
    repeated = [name for name, count in Counter(names).items() if count > 1 or not name]
    if repeated:
        raise ValueError(f"two utterances would both be written as {repeated[0]!r}; rename one of them")
    settings = {
        "format_version": FORMAT_VERSIONS[config.format],
        "model": origin or {},
        "layers": list(keys),
        "format": config.format,
        "bf16": config.bf16,
        "utterances_sha256": hashlib.sha256(json.dumps([utterances.ids, utterances.paths]).encode()).hexdigest(),
    }
    if config.frame_period_ms is not None:
        repeat_factor(config.frame_period_ms, utterances.frame_period_s)
        settings["frame_period_ms"] = config.frame_period_ms
    _claim(output, settings)
    if (output / INDEX).is_file():
        index = read_json(output / INDEX)
        shutil.rmtree(output / STAGING, ignore_errors=True)  # left where a run was stopped between the index and this
    else:
        folder = output / STAGING if config.format == "ark" else output
        files = [folder / f"{name}{FORMATS[config.format].suffix}" for name in names]
        bad = _write_missing(model, utterances, files, keys, config, tell, note)
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
        different = [key for key in {**settings, **old} if _identity(old.get(key)) != _identity(settings.get(key))]
        if different:
            names = {"format_version": "another layout", "model": "another model", "utterances_sha256": "other audio"}
            what = names.get(different[0], f"other {different[0]}")
            raise ValueError(f"{output} holds features of {what}; name another folder")
    elif any(output.iterdir()):
        raise ValueError(f"{output} is not empty and holds no features; name a new folder")
    else:
        write_json(output / SETTINGS, settings)


def _identity(value: Any) -> Any:
    """A model is what its digest says, wherever it lies."""
    return value["sha256"] if isinstance(value, dict) and "sha256" in value else value


def _write_missing(
    model: SpeechModel,
    utterances: Utterances,
    files: Sequence[Path],
    keys: Sequence[str],
    config: ExtractConfig,
    tell: Callable[[int, int], None],
    note: Callable[[float], None],
) -> dict[int, str]:
    """Encodes what has no file yet; returns position to reason of what cannot be read."""
    bad = dict(utterances.bad)
    missing = np.array([i for i, file in enumerate(files) if i not in bad and not file.exists()], dtype=np.int64)
    done = len(files) - len(missing)
    tell(done, len(files))

    def quarantine(position: int, error: Exception) -> None:
        bad[int(missing[position])] = getattr(error, "reason", str(error))

    inputs = utterances.inputs(missing)
    period_ms = config.frame_period_ms
    repeat = None if period_ms is None else repetition_to(period_ms, model, inputs, utterances.frame_period_s)
    options: dict[str, Any] = {"bf16": config.bf16, "on_error": quarantine}
    if config.stream_chunk_ms is None:
        encoded = encode_utterances(model, inputs, batch_s=config.batch_s, **options)
    else:
        encoded = stream_utterances(model, inputs, config.stream_chunk_ms, note=note, **options)
    for position, layers, final in encoded if len(missing) else ():
        done += 1
        index = int(missing[position])
        if not len(final):
            bad[index] = "shorter than one frame"
            continue
        tensors = {key: final if key == FINAL else layers[int(key.removeprefix("layer_"))] for key in keys}
        if repeat is not None:
            tensors = {key: repeat(position, states_TD) for key, states_TD in tensors.items()}
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
        "frame_period_s": _frame_period_s(settings, utterances),
        "num_utterances": len(listed),
        "num_quarantined": len(bad),
        "utterances": listed,
    }
    if settings["format"] == "ark":
        staged = {name: file for name, file in zip(names, files, strict=True) if name in listed}
        index |= _write_kaldi_folders(utterances, names, staged, listed, output, keys, index["frame_period_s"])
    lines = [{"id": names[i], "path": utterances.paths[i], "reason": bad[i]} for i in sorted(bad)]
    write_text_atomically(output / QUARANTINE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_json(output / INDEX, index)
    shutil.rmtree(output / STAGING, ignore_errors=True)
    return index


def _frame_period_s(settings: dict[str, Any], utterances: Utterances) -> float:
    return settings["frame_period_ms"] / 1000.0 if "frame_period_ms" in settings else utterances.frame_period_s


def _write_kaldi_folders(
    utterances: Utterances,
    names: Sequence[str],
    staged: dict[str, Path],
    listed: dict[str, dict[str, Any]],
    output: Path,
    keys: Sequence[str],
    frame_period_s: float,
) -> dict[str, Any]:
    """Writes a data directory for each layer, ``output/layer_06`` for example; returns what the index says about them."""
    described = [
        FeatureUtterance(
            id=name,
            num_frames=listed[name]["num_frames"],
            duration_s=float(utterances.durations_s[i]),
            speaker=utterances.speakers[i],
            text=utterances.texts[i],
        )
        for i, name in enumerate(names)
        if name in listed
    ]
    for key in keys:

        def read(name: str, key: str = key) -> np.ndarray:
            return _safetensors_key(staged[name], key)

        write_feature_folder(output / key, described, frame_period_s, read)
    return {"archives": {key: f"{key}/{SCP}" for key in keys}, "speakers_in_order": speakers_are_in_order(described)}


def _check_bad(index: dict[str, Any], output: Path, max_bad: float) -> None:
    total = index["num_utterances"] + index["num_quarantined"]
    if index["num_quarantined"] > max_bad * total:
        with (output / QUARANTINE).open(encoding="utf-8") as file:
            first = json.loads(file.readline())
        raise TooManyBadError(
            f"{index['num_quarantined']} of {total} utterances could not be read, more than --max-bad {max_bad:g} allows "
            f"(the others are written; see {output / QUARANTINE}), the first is {first['path']}: {first['reason']}"
        )
