"""``sslim demo``: runs the commands of the demo one after the other and shows each as it would be typed."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from sslim.recipes.demo import DemoConfig, Step


@dataclass(frozen=True, kw_only=True)
class Options:
    """The whole story in minutes on two CPU cores: corpus, targets, pre-training, probes, report.

    Every step is an ordinary command, shown as you would type it. An interrupted demo goes on when it is run again.

    Attributes:
        data: Folder with your own audio (a CSV or TSV with columns path, speaker, label is used if it is there); without it a
            corpus is spoken by espeak-ng.
        output: Folder for everything; runs/demo, or runs/demo-NAME for a folder of that name.
        minutes: Minutes of pre-training; the rest takes about two more.
        utterances: Size of the spoken corpus; 1000 are about an hour of speech.
        seed: Decides everything random.
    """

    data: Path | None = None
    output: Path | None = None
    minutes: float = 6.0
    utterances: int = 1000
    seed: int = 0


def main(options: Options) -> None:
    """Runs what has not been run yet."""
    from rich.console import Console

    from sslim.recipes.demo import DemoConfig, claim, steps

    if options.data is not None and not options.data.is_dir():
        raise ValueError(f"{options.data} is not a folder: give one with audio files to --data")
    name = "demo" if options.data is None else f"demo-{options.data.resolve().name}"
    config = DemoConfig(
        data=options.data,
        output=options.output or Path("runs") / name,
        minutes=options.minutes,
        num_utterances=options.utterances,
        seed=options.seed,
    )
    claim(config)
    console, began = Console(highlight=False), time.monotonic()
    for number, step in enumerate(steps(config), 1):
        _run(step, number, config, console)
    _conclude(config, console, time.monotonic() - began)


def _run(step: Step, number: int, config: DemoConfig, console: Console) -> None:
    console.print(f"\n[bold]{number}.[/bold] {step.about}", soft_wrap=True)
    console.print(f"[bold cyan]$ {_escaped(step.line)}[/bold cyan]", soft_wrap=True)
    if step.is_done is not None and step.is_done():
        console.print("done before, skipped", style="dim")
        return
    verb, *arguments = step.command
    module = importlib.import_module(f"sslim.commands.{verb}")
    began = time.monotonic()
    module.main(tyro.cli(module.Options, prog=f"sslim {verb}", args=arguments))
    if step.is_done is not None and not step.is_done():
        raise RuntimeError(f"`{step.line}` ended before it was done; run the demo again to go on")
    console.print(f"{time.monotonic() - began:.0f} s", style="dim")


def _conclude(config: DemoConfig, console: Console, seconds: float) -> None:
    from sslim.probes import card_table
    from sslim.recipes.demo import scores

    cards = scores(config)
    console.print()
    for card in cards:
        console.print(card_table(card))
    if not cards:
        console.print(
            "No probe was run: the corpus has neither phone alignments, nor speakers, nor labels with at least four utterances "
            "each. A CSV beside the audio with the columns path, speaker, label gives it some.",
            soft_wrap=True,
        )
    console.print(
        f"\n{seconds / 60:.1f} minutes. The model is in {_escaped(str(config.run / 'model'))}, the report:", soft_wrap=True
    )
    print(config.output / "report.html")


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
