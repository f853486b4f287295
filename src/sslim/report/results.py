"""Result files: cards and profiles, read once, joined, and drawn for paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sslim.report.cards import read_card
from sslim.report.fronts import panels, save_picture
from sslim.report.profiles import is_profile, save_speedups
from sslim.report.runs import is_card
from sslim.report.trade_offs import Comparison, compare

if TYPE_CHECKING:
    from sslim.profiling.profile import Profile


def results_in(path: Path) -> list[Path]:
    """Returns a result card or profile itself, or those that lie in a folder."""
    files = sorted([*path.glob("*.json"), *path.glob("cards/*.json")]) if path.is_dir() else [path]
    return [file for file in files if is_card(file) or is_profile(file)]


@dataclass(frozen=True, kw_only=True)
class Results:
    """What was probed and profiled.

    Attributes:
        cards: Files of result cards.
        profiles: Profiles by their file.
        comparisons: Both joined, for each task of which two models or more were probed.
    """

    cards: list[Path]
    profiles: dict[Path, Profile]
    comparisons: list[Comparison]

    @classmethod
    def read(cls, files: Sequence[Path]) -> Results:
        """Reads cards and profiles, each once.

        Raises:
            ValueError: One cannot be read.
        """
        places = list(dict.fromkeys(file.resolve() for file in files))
        cards = [file for file in places if is_card(file)]
        profiles = read_profiles([file for file in places if is_profile(file)])
        comparisons = compare([read_card(file) for file in cards], list(profiles.values()))
        return cls(cards=cards, profiles=profiles, comparisons=comparisons)


def read_profiles(files: Sequence[Path]) -> dict[Path, Profile]:
    """Reads profiles; torch is imported only where there are any."""
    if not files:
        return {}
    from sslim.profiling.profile import Profile

    return {file: Profile.load(file) for file in files}


def save_pictures(results: Results, folder: Path) -> list[Path]:
    """Writes fronts (``front-1.png``, …) and speed-ups (``speedup-1.png``, …) for paper; returns the files.

    Args:
        results: What to draw.
        folder: Where to; it is made.
    """
    profiles = list(results.profiles.values())
    drawn = [panel for comparison in results.comparisons for panel in panels(comparison, profiles)]
    files = [folder / f"front-{number}.png" for number in range(1, len(drawn) + 1)]
    for panel, file in zip(drawn, files, strict=True):
        save_picture(panel, file)
    for number, profile in enumerate((p for p in profiles if len(p.models) > 1), 1):
        files.append(folder / f"speedup-{number}.png")
        save_speedups(profile, files[-1])
    return files
