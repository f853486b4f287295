"""The page: what ran, how it went, what came out."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from sslim.report import figures
from sslim.report.cards import card_section
from sslim.report.corpora import corpus_section, is_corpus
from sslim.report.fronts import front_section
from sslim.report.markup import Markup, details, element, facts, join, number, page, table
from sslim.report.profiles import profile_section
from sslim.report.restoration import restoration_section
from sslim.report.results import Results, results_in, save_pictures
from sslim.report.runs import Run, flatten, is_finite, is_run, read_run
from sslim.report.searches import is_search, search_section
from sslim.storage import write_text_atomically

MAX_EVENTS = 40
SPEED = ("per_s", "per_second", "speed")
Scale = Literal["free", "zero", "log"]
KINDS = {"train": "training", "valid": "validation (dashed)"}
PANELS: tuple[tuple[str, tuple[str, ...], Scale], ...] = (
    ("Loss", ("loss",), "free"),
    ("Accuracy", ("accuracy",), "zero"),
    ("Entropy and perplexity", ("entropy", "perplexity"), "free"),
    ("Learning rate", ("learning_rate", "lr"), "zero"),
    ("Gradient norm", ("gradient_norm", "grad_norm"), "log"),
    ("Throughput", SPEED, "zero"),
    ("Share of time waiting for data", ("wait",), "zero"),
)  # title, words in the metrics' names, vertical axis


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """What a page is about.

    Attributes:
        runs: Folders of training runs.
        corpora: Corpus folders.
        results: Result cards, and results of ``sslim profile``.
        searches: Folders of ``sslim compress search``.
    """

    runs: list[Path] = field(default_factory=list)
    corpora: list[Path] = field(default_factory=list)
    results: list[Path] = field(default_factory=list)
    searches: list[Path] = field(default_factory=list)


def sort_out(paths: Sequence[Path]) -> Subjects:
    """Tells runs, corpora, searches and result files apart by what they hold; the files that lie in a folder are results too.

    Raises:
        ValueError: One is none of these.
        FileNotFoundError: One does not exist.
    """
    subjects = Subjects()
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(2, "there is no such run, corpus or result file", str(path))
        if is_corpus(path):
            subjects.corpora.append(path)
            continue
        results = results_in(path)
        subjects.results.extend(results)
        if path.is_dir() and is_run(path):
            subjects.runs.append(path)
        elif is_search(path):
            subjects.searches.append(path)
        elif not results:
            raise ValueError(
                f"{path} is neither a run (metrics.jsonl), a corpus (corpus.json), a search (search.json), a result card or a "
                "profile (JSON of `sslim probe` or `sslim profile`), nor a folder with such results"
            )
    return subjects


def write_report(paths: Sequence[Path], output: Path, *, title: str = "", pictures: Path | None = None) -> None:
    """Writes one page about runs, corpora, searches, cards and profiles.

    Args:
        paths: Run, corpus and search folders, result cards, profiles, and folders of these files, in any order.
        output: HTML file.
        title: Of the page; by default the names of what it is about.
        pictures: Folder for fronts and speed-ups as pictures for paper (PNG); None for none.

    Raises:
        ValueError: A path is none of these, or what it holds cannot be read.
        FileNotFoundError: A path does not exist.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError('a report needs matplotlib: pip install "sslim[report]"', name="matplotlib")
    text = build_report(paths, title=title)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(output, text)
    if pictures is not None:
        save_pictures(Results.read(sort_out(paths).results), pictures)


def build_report(paths: Sequence[Path], *, title: str = "") -> str:
    """Returns the page that ``write_report`` writes."""
    subjects = sort_out(paths)
    runs = [read_run(path) for path in subjects.runs]
    results = Results.read(subjects.results)
    corpora = list(dict.fromkeys(p.resolve() for p in [*subjects.corpora, *(c for run in runs for c in corpora_of(run))]))
    names = ", ".join(path.resolve().stem for path in paths[:3]) + (" and others" if len(paths) > 3 else "")
    moment = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts: list[Markup | None] = [element("p", f"{moment} · sslim report", class_="muted")]
    parts += result_sections(results)
    if len(runs) > 1:
        parts.append(comparison(runs))
    parts += [search_section(path, name=f"search{i}") for i, path in enumerate(subjects.searches)]
    parts += [run_section(run, name=f"run{i}") for i, run in enumerate(runs)]
    parts += [corpus_section(path) for path in corpora]
    return page(title or f"sslim: {names}", *parts)


def result_sections(results: Results) -> list[Markup | None]:
    """Fronts first, then what they were made from."""
    parts: list[Markup | None] = []
    profiles = list(results.profiles.values())
    fronts = [front_section(c, profiles, name=f"front{i}") for i, c in enumerate(results.comparisons)]
    if any(fronts):
        parts += [element("h2", "Scores and costs"), *fronts]
    if results.cards:
        sections = (card_section(path, name=f"card{i}") for i, path in enumerate(results.cards))
        parts += [element("h2", "Results"), *sections]
    if results.profiles:
        measured = (profile_section(p, path.name, name=f"profile{i}") for i, (path, p) in enumerate(results.profiles.items()))
        parts += [element("h2", "Speed and size"), *measured]
    return parts


def corpora_of(run: Run) -> list[Path]:
    """The corpus folders that a run's configuration names and that are still there."""
    named = [value for key, value in flatten(run.config) if "corpus" in key.lower() and isinstance(value, str)]
    found = [base / name for name in named for base in (Path(), run.path.parent) if is_corpus(base / name)]
    return found[:4]


def comparison(runs: Sequence[Run]) -> Markup:
    """Curves of several runs in the same panels."""
    panels = []
    for title, kind, metric in (
        ("Validation loss", "valid", "loss"),
        ("Training loss", "train", "loss"),
        ("Masked accuracy, validation", "valid", "masked_accuracy"),
    ):
        lines = [_curve(run.path.name, run.curves[kind, metric]) for run in runs if (kind, metric) in run.curves]
        if lines:
            panels.append(element("figure", figures.curves(lines[:6], title=title, name=f"compare-{kind}-{metric}")))
    return join([element("h2", "Runs compared"), element("div", *panels, class_="panels")])


def run_section(run: Run, *, name: str) -> Markup:
    """What one run was, its curves, its events, its example and its settings.

    Args:
        run: The run.
        name: Unique on the page.
    """
    parts: list[Markup | None] = [element("h2", f"Training run {run.path.resolve().name}"), facts(_run_facts(run))]
    if run.curves:
        panels = [_panel(run, title, words, scale, f"{name}-{i}") for i, (title, words, scale) in enumerate(PANELS)]
        known = [word for _, words, _ in PANELS for word in words]
        rest = [key for key in run.curves if not any(word in key[1] for word in known)]
        parts += [element("h3", "Curves"), element("div", *panels, class_="panels"), _rest(run, rest)]
    else:
        parts.append(element("p", "No metrics yet.", class_="muted"))
    parts += [_events(run)]
    if run.example is not None:
        parts += [element("h3", "One utterance"), _example(run, name)]
    if run.restoration is not None:
        parts += [element("h3", "One utterance"), restoration_section(run.restoration, name=f"{name}-restoration")]
    settings = flatten(run.config)
    if settings:
        shown = [[key, number(value)] for key, value in settings]
        parts.append(details(f"Resolved configuration ({len(settings)} settings)", table(["setting", "value"], shown)))
    return join(parts)


def _curve(name: str, points: dict[int, float], *, dashed: bool = False) -> figures.Curve:
    return figures.Curve(name=name, x=list(points), y=list(points.values()), markers=len(points) <= 30, dashed=dashed)


def _panel(run: Run, title: str, words: tuple[str, ...], scale: Scale, name: str) -> Markup | None:
    keys = [key for key in run.names(*words) if any(is_finite(v) for v in run.curves[key].values())]
    if not keys:
        return None
    several = {kind for kind, _ in keys} == {"train", "valid"}
    lines = [_curve(_label(metric), run.curves[kind, metric], dashed=several and kind == "valid") for kind, metric in keys]
    picture = figures.curves(lines, title=title, name=name, scale=scale)
    last = {kind: ", ".join(_label(m) + " " + number(run.last(k, m)) for k, m in keys if k == kind) for kind in KINDS}
    caption = "; ".join(f"{KINDS[kind]}: {said}" if several else said for kind, said in last.items() if said)
    return element("figure", picture, element("figcaption", f"Last values: {caption}."))


def _label(metric: str) -> str:
    return {"lr": "learning rate"}.get(metric, metric.replace("_", " "))


def _rest(run: Run, keys: Sequence[tuple[str, str]]) -> Markup | None:
    rows = []
    for kind, metric in keys:
        values = [v for v in run.curves[kind, metric].values() if is_finite(v)]
        if values:
            rows.append([metric.replace("_", " "), kind, values[0], min(values), max(values), values[-1]])
    return details("Other metrics", table(["metric", "kind", "first", "least", "most", "last"], rows)) if rows else None


def _run_facts(run: Run) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = [("steps", run.last_step)]
    for label, kind, metric in (
        ("validation loss", "valid", "loss"),
        ("training loss", "train", "loss"),
        ("masked accuracy, validation", "valid", "masked_accuracy"),
        ("unmasked accuracy, validation", "valid", "unmasked_accuracy"),
    ):
        if (value := run.last(kind, metric)) is not None:
            found.append((label, value))
    for _, metric in run.names(*SPEED)[:1]:
        values = [v for v in run.curves["train", metric].values() if is_finite(v)] if ("train", metric) in run.curves else []
        found += [(f"{metric.replace('_', ' ')}, median", sorted(values)[len(values) // 2])] if values else []
    for kind, metric in run.names("wait")[:1]:
        values = [v for v in run.curves[kind, metric].values() if is_finite(v)]
        found += [(f"{metric.replace('_', ' ')}, mean", sum(values) / len(values))] if values else []
    wanted = {"num_parameters": "parameters", "num_devices": "devices", "seed": "seed"}
    found += [(wanted[key.split(".")[-1]], value) for key, value in flatten(run.config) if key.split(".")[-1] in wanted]
    return found


def _events(run: Run) -> Markup | None:
    if not run.events:
        return None
    counts = Counter(str(event.get("event", event.get("name", "event"))) for event in run.events)
    rows = [
        [event["step"], event.get("event", event.get("name", "event")), _rest_of(event)] for event in run.events[-MAX_EVENTS:]
    ]
    summary = ", ".join(f"{name} {count}×" if count > 1 else name for name, count in counts.most_common())
    caption = f"The last {MAX_EVENTS} of {len(run.events)}." if len(run.events) > MAX_EVENTS else ""
    return join([element("h3", "Events"), element("p", summary), table(["step", "event", "about"], rows, caption=caption)])


def _rest_of(event: dict[str, Any]) -> str:
    skipped = ("step", "kind", "event", "name", "time")
    return ", ".join(str(v) if k == "message" else f"{k}: {number(v)}" for k, v in event.items() if k not in skipped)


def _example(run: Run, name: str) -> Markup:
    shown = run.example
    assert shown is not None
    sentences = ["Each colour is a cluster."]
    if shown.mask_T is not None:
        sentences.append("Pale stretches of the spectrogram, with an orange bar above, were hidden from the model.")
    if shown.predictions_T is not None and shown.mask_T is not None:
        real_T = shown.labels_T >= 0
        right_T = shown.predictions_T == shown.labels_T
        for label, part_T in (("hidden", real_T & shown.mask_T), ("visible", real_T & ~shown.mask_T)):
            if part_T.any():
                sentences.append(f"{int((right_T & part_T).sum())} of {int(part_T.sum())} {label} frames are predicted right.")
    picture = figures.example(shown, name=f"{name}-example")
    return element("figure", picture, element("figcaption", " ".join(sentences)))
