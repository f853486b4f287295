"""What a person sees of a run: one live line on a terminal, one line per record elsewhere. On stderr, by the main process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def summary(record: Mapping[str, Any]) -> str:
    """Returns the few numbers of a record that fit on a line."""
    parts = []
    for name, text in (
        ("loss", "loss {:.3f}"),
        ("masked_accuracy", "masked {:.1%}"),
        ("unmasked_accuracy", "seen {:.1%}"),
        ("audio_seconds_per_second", "{:,.0f} s audio/s"),
        ("data_wait_share", "waiting {:.0%}"),
    ):
        if record.get(name) is not None:
            parts.append(text.format(record[name]))
    return ", ".join(parts)


class ProgressLine:
    """Shows how far a run is.

    Args:
        total_steps: Steps of the run; None when only a time limit is known.
        shown: False for all but the main process.
    """

    def __init__(self, total_steps: int | None, *, shown: bool = True) -> None:
        self._console = Console(stderr=True, quiet=not shown, highlight=False, soft_wrap=True)
        self._total = total_steps
        self._live: Progress | None = None
        if shown and self._console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._live = Progress(*columns, console=self._console)
            self._task = self._live.add_task("training", total=total_steps, text="")

    def begin(self, step: int) -> None:
        """Shows the line."""
        if self._live is not None:
            self._live.start()
            self._live.update(self._task, completed=step)

    def step(self, step: int) -> None:
        """Moves the bar."""
        if self._live is not None:
            self._live.update(self._task, completed=step)

    def record(self, record: Mapping[str, Any]) -> None:
        """Shows a train or valid record."""
        if self._live is not None and record["kind"] == "train":
            self._live.update(self._task, text=summary(record))
        else:
            self.say(f"step {record['step']}{f'/{self._total}' if self._total else ''} {record['kind']}: {summary(record)}")

    def say(self, sentence: str) -> None:
        """Prints one sentence above the line."""
        self._console.print(sentence, markup=False)

    def end(self) -> None:
        """Takes the live line away."""
        if self._live is not None:
            self._live.stop()
