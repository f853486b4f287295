"""``sslim profile``: what models cost, and how much faster than a dense one they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from sslim.storage import check_file_target


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure models against a dense baseline: parameters, MACs, latency, real-time factor, peak memory, file size, speed-up.

    All are measured in turns in one process, so that they can be compared. Lengths, batches and threads are combined. Example:
    `sslim profile runs/half/model runs/third/model --baseline runs/dense --seconds 1 10 --threads 2 --output profile.json`.
    """

    models: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Model folders, run folders or foreign checkpoints."""
    baseline: Path | None = None
    """The dense model that speed-ups refer to, measured too; the first model when not given."""
    seconds: tuple[float, ...] = (10.0,)
    """Lengths of audio."""
    batch: tuple[int, ...] = (1,)
    """Utterances in a batch."""
    threads: tuple[int, ...] = (1,)
    """Threads of torch on a CPU."""
    device: str = "cpu"
    """Where models run: cpu, cuda, cuda:1."""
    repeats: int = 20
    """Rounds that are counted; p95 needs 20 to mean something."""
    memory: bool = True
    """Whether to measure peak memory, in a fresh process for every model and every combination."""
    check_macs: bool = False
    """Compare MACs with torch's own counter, module by module."""
    seed: int = 0
    """Decides the noise that is encoded and the orders of the rounds."""
    output: Path | None = None
    """Where to write the result (JSON); a picture of predicted and measured speed-up is written beside it (PNG)."""


def main(options: Options) -> None:
    """Profiles, prints the tables, writes the result and its picture."""
    import importlib.util

    from rich.console import Console

    from sslim.profiling.profile_table import WIDTH, profile_notes, profile_table
    from sslim.recipes.profile import ProfileRecipe, run_profile

    console = Console(stderr=True, highlight=False)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    recipe = ProfileRecipe(
        seconds=options.seconds,
        batches=options.batch,
        threads=options.threads,
        device=options.device,
        repeats=options.repeats,
        memory=options.memory,
        check_macs=options.check_macs,
        seed=options.seed,
    )
    if options.output is not None:
        check_file_target(options.output)
    profile = run_profile(options.models, options.baseline, recipe, say=say)
    printed = Console(highlight=False, markup=False, width=WIDTH)  # in a narrower terminal lines wrap, but no figure is cut
    for conditions in profile.conditions:
        printed.print(profile_table(profile, conditions))
    for note in profile_notes(profile):
        printed.print(note, soft_wrap=True)
    if options.output is None:
        return
    profile.save(options.output)
    say(f"result: {options.output}")
    if importlib.util.find_spec("matplotlib") is None:
        say('no picture: pip install "sslim[report]" brings matplotlib')
    elif len(profile.models) > 1:
        from sslim.report.profiles import save_speedups

        picture = options.output.with_suffix(".png")
        save_speedups(profile, picture)
        say(f"picture: {picture}")
