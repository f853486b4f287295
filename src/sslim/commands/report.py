"""``sslim report``: runs, corpora and result cards on one HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write one HTML page about training runs, corpora and probe results. It needs no network and no other file.

    A run's page includes the result cards in its folder and the corpus it was trained on.

    Attributes:
        paths: Run folders, corpus folders and result cards (JSON), in any order.
        output: HTML file to write.
        title: Heading of the page; by default the names of what it is about.
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    output: Path = Path("report.html")
    title: str = ""


def main(options: Options) -> None:
    """Writes the page."""
    from sslim.report import write_report

    if not options.paths:
        raise ValueError("nothing to report: give run folders, corpus folders or result cards")
    write_report(options.paths, options.output, title=options.title)
    print(options.output)
