"""What is in a corpus: its size, what was set aside, and how good its targets are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslim.report.markup import Markup, details, element, facts, join, table

if TYPE_CHECKING:
    from sslim.data.corpus import Corpus

CORPUS = "corpus.json"
MAX_BAD = 30


def is_corpus(path: Path) -> bool:
    """Whether a folder was made by ``sslim prepare``."""
    return (path / CORPUS).is_file()


def corpus_section(path: Path) -> Markup:
    """Returns the part of the page for one corpus.

    Raises:
        ValueError: The folder is not a whole corpus.
    """
    from sslim.data.corpus import Corpus

    corpus = Corpus.open(path)
    origin = "none" if corpus.statistics is None else corpus.statistics[2]
    statistics = element("p", f"Mean and standard deviation of the features: {origin}.", class_="muted")
    parts = [
        element("h2", f"Corpus {corpus.name}"),
        facts(corpus_facts(corpus)),
        statistics,
        quality(corpus),
        quarantine(corpus),
    ]
    return join(parts)


def corpus_facts(corpus: Corpus) -> list[tuple[str, Any]]:
    """Utterances, hours, speakers, classes, and what was set aside."""
    import numpy as np

    found: list[tuple[str, Any]] = [("utterances", len(corpus)), ("hours", round(float(np.sum(corpus.duration_s())) / 3600, 2))]
    for label, column in (("speakers", "speaker"), ("classes", "label"), ("splits", "split")):
        distinct = {value for value in corpus.column(column) if value is not None}
        found += [(label, len(distinct))] if distinct else []
    found.append(("quarantined", corpus.num_quarantined))
    return found


def quality(corpus: Corpus) -> Markup | None:
    """One row for each set of targets."""
    names = corpus.label_names()
    if not names:
        return None
    stores = {name: corpus.labels(name) for name in names}
    measures = list(dict.fromkeys(k for s in stores.values() for k, v in s.quality.items() if isinstance(v, int | float | str)))
    rows = []
    for name, store in stores.items():
        origin = ", ".join(
            f"{key} {value}" for key, value in store.origin.items() if isinstance(value, int | str) and value != ""
        )
        cells = [store.quality.get(measure, "") for measure in measures]
        rows.append([name, store.num_clusters, round(store.frame_period_s * 1000, 3), *cells, origin])
    header = ["targets", "clusters", "period (ms)", *(measure.replace("_", " ") for measure in measures), "from"]
    return join([element("h3", "Targets"), table(header, rows)])


def quarantine(corpus: Corpus) -> Markup | None:
    """Why files were set aside, and the first of them."""
    bad = corpus.quarantine()
    if not bad:
        return None
    reasons = Counter(str(entry.get("reason", "")) for entry in bad)
    rows = [[str(entry.get("path", "")), str(entry.get("reason", ""))] for entry in bad[:MAX_BAD]]
    caption = f"The first {MAX_BAD} of {len(bad)}." if len(bad) > MAX_BAD else ""
    files = "1 file was" if len(bad) == 1 else f"{len(bad)} files were"
    summary = f"{files} set aside, for {len(reasons)} {'reason' if len(reasons) == 1 else 'reasons'}"
    return details(summary, table(["file", "reason"], rows, caption=caption))
