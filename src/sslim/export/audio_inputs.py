"""What the user names on the command line, audio files, folders or a corpus, as inputs of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sslim.audio import AudioError, audio_info, num_resampled_samples, read_audio
from sslim.data.audio_sources import AUDIO_SUFFIXES, audio_files
from sslim.data.corpus import DESCRIPTION, Corpus
from sslim.models.encoding import Inputs, corpus_inputs, give_features
from sslim.models.speech import SpeechModel


@dataclass(frozen=True, kw_only=True)
class Utterances:
    """What is to be encoded.

    Attributes:
        ids: Unique names; a slash makes a folder.
        paths: Where each comes from, for messages.
        inputs: Given positions to keep, how to read them.
        frame_period_s: Seconds from one frame of the model to the next.
        durations_s: (n,) seconds of sound; 0 where that is unreadable.
        speakers: Name of each one's speaker, None where nobody knows.
        texts: Transcripts, None where there is none.
        bad: Position to reason of what is known to be unreadable.
    """

    ids: tuple[str, ...]
    paths: tuple[str, ...]
    inputs: Callable[[np.ndarray], Inputs]
    frame_period_s: float
    durations_s: np.ndarray
    speakers: tuple[str | None, ...]
    texts: tuple[str | None, ...]
    bad: dict[int, str] = field(default_factory=dict)


def unique_ids(paths: Sequence[Path], stems: Sequence[str]) -> list[str]:
    """Returns the shortest of stem, path without suffix, whole path that is unique for each."""
    choices = [list(stems), [_relative(path.with_suffix("")) for path in paths], [_relative(path) for path in paths]]
    counts = [Counter(choice) for choice in choices]
    ids = []
    for i, path in enumerate(paths):
        unique = (choice[i] for choice, count in zip(choices, counts, strict=True) if count[choice[i]] == 1)
        name = next(unique, None)
        if name is None:
            raise ValueError(f"{path} is named twice")
        ids.append(name)
    return ids


def _relative(path: Path) -> str:
    return "/".join(part for part in path.parts if part not in ("..", ".", path.anchor))


def safe_id(name: str) -> str:
    """Returns ``name`` as a path that stays inside its folder and is a Kaldi key: no white space, no ``..``, not absolute."""
    parts = ["_".join(part.split()) for part in name.replace("\\", "/").split("/")]
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def find_audio(arguments: Sequence[Path]) -> list[tuple[str, Path]]:
    """Returns (id, file) of audio files and of all audio files below folders, in order.

    Raises:
        ValueError: Something does not exist, a folder holds no audio, or a file is named twice.
    """
    stems, paths = [], []
    for argument in arguments:
        if argument.is_dir():
            found = sorted(audio_files(argument))
            if not found:
                raise ValueError(
                    f"{argument} holds no audio files ({', '.join(sorted(AUDIO_SUFFIXES))}) and is no corpus folder"
                )
            stems += [p.relative_to(argument).with_suffix("").as_posix() for p in found]
            paths += found
        elif argument.exists():
            stems.append(argument.stem)
            paths.append(argument)
        else:
            raise ValueError(f"there is no file or folder {argument}")
    return list(zip(unique_ids(paths, stems), paths, strict=True))


def open_audio(arguments: Sequence[Path], model: SpeechModel, *, waveforms: bool = False) -> Utterances:
    """Prepares audio files, folders of them, or one corpus folder (or its ``manifest.jsonl``) for ``model``.

    Args:
        arguments: What the user named.
        model: Whose front-end decides.
        waveforms: Read a corpus's waveforms even where it holds the model's features.

    Raises:
        ValueError: Nothing to read, or the model takes no waveforms.
    """
    corpora = [path for path in arguments if (_corpus_folder(path) / DESCRIPTION).is_file()]
    if corpora and len(arguments) > 1:
        raise ValueError(f"{corpora[0]} is a corpus: it is extracted alone, not together with other audio")
    if corpora:
        return _of_corpus(Corpus.open(_corpus_folder(corpora[0])), model, waveforms)
    if model.frontend is None:
        raise ValueError(f"this {model.config.family} model takes features, not waveforms: extract from a corpus folder")
    found = find_audio(arguments)
    paths = [path for _, path in found]
    rate = model.frontend.sample_rate
    lengths, bad = np.zeros(len(found), dtype=np.int64), {}
    for i, path in enumerate(paths):
        try:
            info = audio_info(path)
            lengths[i] = num_resampled_samples(info.num_samples, info.sample_rate, rate)
        except AudioError as error:
            bad[i] = error.reason

    def inputs(kept: np.ndarray) -> Inputs:
        def read(position: int) -> Tensor:
            return torch.from_numpy(read_audio(paths[int(kept[position])], sample_rate=rate))

        return Inputs(lengths=lengths[kept], unit_s=1.0 / rate, read=read, is_waveform=True)

    unknown = (None,) * len(found)
    return Utterances(
        ids=tuple(name for name, _ in found),
        paths=tuple(map(str, paths)),
        inputs=inputs,
        frame_period_s=model.frontend.frame_shift_s,
        durations_s=lengths / rate,
        speakers=unknown,
        texts=unknown,
        bad=bad,
    )


def _of_corpus(corpus: Corpus, model: SpeechModel, waveforms: bool) -> Utterances:
    give_features(model, corpus)
    assert model.frontend is not None
    ids = tuple(corpus.ids())
    return Utterances(
        ids=ids,
        paths=ids,
        inputs=lambda kept: corpus_inputs(model, corpus, kept, waveforms=waveforms),
        frame_period_s=model.frontend.frame_shift_s,
        durations_s=corpus.num_samples / corpus.sample_rate,
        speakers=tuple(corpus.column("speaker")),
        texts=tuple(corpus.column("text")),
    )


def _corpus_folder(path: Path) -> Path:
    return path.parent if path.name == "manifest.jsonl" else path
