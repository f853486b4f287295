"""``sslim report``: runs, corpora, searches, result cards and profiles on one HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write one HTML page about training runs, corpora, searches, probe results and profiles. It needs no network.

    A run's page includes the results in its folder and the corpus it was trained on. Where two models or more were probed on
    one task, Pareto fronts show their scores against parameters, MACs and, with profiles of the same models, latency.

    Attributes:
        paths: Run, corpus and search folders, files of `sslim probe` and `sslim profile`, and folders of these, in any order.
        output: HTML file to write.
        title: Heading of the page; by default the names of what it is about.
        pictures: Folder to write fronts and speed-ups to as pictures for paper, too (PNG).
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    output: Path = Path("report.html")
    title: str = ""
    pictures: Path | None = None


def main(options: Options) -> None:
    """Writes the page."""
    from sslim.report import write_report

    if not options.paths:
        raise ValueError("nothing to report: give run, corpus or search folders, result cards or profiles")
    write_report(options.paths, options.output, title=options.title, pictures=options.pictures)
    print(options.output)
