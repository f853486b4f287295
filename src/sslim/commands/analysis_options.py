"""What the commands of all analyses of speech share: which utterances, and how progress and results are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from sslim.recipes.analyzed_speech import AnalyzedSpeech

WIDTH = 120  # of printed tables, at least


@dataclass(frozen=True, kw_only=True)
class AnalysisOptions:
    """Options of every analysis of speech."""

    corpus: Path
    """Folder made by `sslim prepare`."""
    output: Path
    """Folder for results (JSON) and pictures (PNG)."""
    utterances: int = 50
    """Utterances that are looked at, drawn by the seed."""
    split: str | None = None
    """Only utterances of this split of the manifest."""
    seed: int = 0
    """Decides everything random."""
    statistics: str | None = None
    """Mean and standard deviation for models without: libri-100, libri-360, libri-960, a .npy or a .safetensors file."""
    device: str = "cpu"
    """Where models run: cpu, cuda, cuda:1."""

    def speech(self, *models: Path, aligned: bool = False) -> AnalyzedSpeech:
        """Loads models and draws utterances, those with an alignment alone if ``aligned``."""
        from sslim.recipes.analyzed_speech import SpeechConfig, open_speech

        config = SpeechConfig(
            num_utterances=self.utterances,
            split=self.split,
            seed=self.seed,
            statistics=self.statistics,
            device=self.device,
        )
        return open_speech(models, self.corpus, config, aligned=aligned)


def say(text: str) -> None:
    """Prints a line to standard error, as it is."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)


def show(table: Table) -> None:
    """Prints a table, in a narrow terminal with wrapped lines rather than cut figures."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    Console(highlight=False, markup=False, width=max(WIDTH, console.width)).print(table)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what is told the numbers done and in all, and shows a bar on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
