"""What analyses look at: models with their names and digests, utterances drawn from a corpus, and the files they leave."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sslim import __version__
from sslim.checkpoints import load_model
from sslim.checkpoints.model_files import model_name, model_path, tensors_digest
from sslim.config import to_plain
from sslim.data.alignment import frame_length_s
from sslim.data.corpus import Corpus
from sslim.models.encoding import Inputs, corpus_inputs, give_features, num_model_frames
from sslim.probes.evaluate import NamedModel
from sslim.profiling.latency import check_device
from sslim.report.palette import printed
from sslim.storage import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT_VERSION = 1
MIN_FRAMES = 2  # shorter utterances have no attention to speak of
Tell = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class SpeechConfig:
    """Which utterances are looked at.

    Attributes:
        num_utterances: So many, drawn by the seed; fewer where the corpus has fewer.
        split: Of this split alone; None is the whole corpus.
        seed: Of the draw.
        statistics: Mean and standard deviation for models without (``load_model``).
        device: Where models run.
    """

    num_utterances: int = 50
    split: str | None = None
    seed: int = 0
    statistics: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.num_utterances < 1:
            raise ValueError(f"num_utterances is {self.num_utterances}; an analysis needs at least 1 utterance")


@dataclass(frozen=True, kw_only=True)
class AnalyzedSpeech:
    """Models and the utterances that they are run on.

    Attributes:
        config: How the utterances were chosen.
        corpus: Where from.
        indices: (n,) their corpus indices, rising.
        models: In eval mode.
    """

    config: SpeechConfig
    corpus: Corpus
    indices: np.ndarray
    models: tuple[NamedModel, ...]

    def inputs(self, model: int = 0, *, waveforms: bool = False) -> Inputs:
        """Returns how the utterances are read for a model."""
        return corpus_inputs(self.models[model].model, self.corpus, self.indices, waveforms=waveforms)

    @property
    def frame_shift_s(self) -> float:
        """Seconds from one frame of the first model to the next."""
        frontend = self.models[0].model.frontend
        assert frontend is not None  # open_speech gave it one
        return frontend.frame_shift_s

    @property
    def frame_length_s(self) -> float:
        """Seconds of sound that a frame of the first model sees, see ``sslim.data.alignment.frame_length_s``."""
        frontend = self.models[0].model.frontend
        assert frontend is not None
        return frame_length_s(frontend.config)

    @property
    def title(self) -> str:
        """What pictures say about where they come from."""
        return f"{' and '.join(named.name for named in self.models)} on {self.corpus.name}, {len(self.indices)} utterances"

    def describe(self) -> dict[str, Any]:
        """Returns models, corpus and utterances as plain values."""
        return {
            "models": [{"name": named.name, "path": named.path, "digest": named.digest} for named in self.models],
            "corpus": {"name": self.corpus.name, "path": str(self.corpus.path), "digest": self.corpus.digest},
            "speech": to_plain(self.config),
            "utterances": [self.corpus.utterance(i).id for i in self.indices.tolist()],
        }


def open_speech(models: Sequence[Path], corpus: Path, config: SpeechConfig, *, aligned: bool = False) -> AnalyzedSpeech:
    """Loads models and draws utterances of at least ``MIN_FRAMES`` frames of every model.

    Args:
        models: Model folders, run folders or checkpoints.
        corpus: Folder made by ``sslim prepare``.
        config: Which utterances.
        aligned: Whether only utterances with an alignment will do.

    Raises:
        ValueError: Nothing is left to look at, or a model cannot read the corpus.
        ModuleNotFoundError: Pictures cannot be drawn: it is said before anything is computed.
    """
    importlib.import_module("matplotlib")
    opened = Corpus.open(corpus)
    named = tuple(_load(path, config) for path in models)
    splits = opened.column("split")
    if config.split is not None and config.split not in splits:
        known = sorted({split for split in splits if split})
        raise ValueError(f"corpus {opened.name} has no split {config.split!r}; it has {', '.join(known) or 'none'}")
    chosen = np.array([i for i, split in enumerate(splits) if config.split in (None, split)], dtype=np.int64)
    for entry in named:
        give_features(entry.model, opened)
        chosen = chosen[num_model_frames(entry.model, corpus_inputs(entry.model, opened, chosen)) >= MIN_FRAMES]
    if aligned:
        chosen = np.array([i for i in chosen.tolist() if opened.utterance(i).alignment], dtype=np.int64)
    if not len(chosen):
        lacking = f"none of at least {MIN_FRAMES} frames{' that has an alignment' if aligned else ''}"
        raise ValueError(f"corpus {opened.name} has no utterance to look at: {lacking}")
    drawn = np.random.default_rng([config.seed, 7]).permutation(len(chosen))[: config.num_utterances]
    return AnalyzedSpeech(config=config, corpus=opened, indices=np.sort(chosen[drawn]), models=named)


def _load(path: Path, config: SpeechConfig) -> NamedModel:
    place = model_path(path)
    model = load_model(place, statistics=config.statistics).to(config.device)
    return NamedModel(name=model_name(place), model=model, path=str(place), digest=tensors_digest(place))


def write_result(folder: Path, name: str, described: dict[str, Any], settings: Any, result: Any) -> Path:
    """Writes ``NAME.json`` and returns its path.

    Args:
        folder: Made where it does not exist.
        name: Of the analysis.
        described: What was looked at.
        settings: Of the analysis, plain or a dataclass.
        result: Plain, or dataclasses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head = {"format_version": FORMAT_VERSION, "kind": f"analyze {name}", "sslim": __version__}
    path = folder / f"{name}.json"
    write_json(path, {**head, **described, "settings": to_plain(settings), "result": to_plain(result)})
    return path


@contextmanager
def picture(path: Path, size: tuple[float, float], say: Callable[[str], None]) -> Iterator[Figure]:
    """Yields an empty figure for paper, writes it and says where."""
    with printed(path, *size) as figure:
        yield figure
    say(f"picture: {path}")
