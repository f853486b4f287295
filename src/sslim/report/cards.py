"""Result cards of probes: tables and bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslim.config import read_json
from sslim.report import figures
from sslim.report.markup import Markup, details, element, join, number, table

MIXES = ("mix", "mean", "-", "None", "")
MODEL = "model"  # the kind of a row that is no baseline


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a card.

    Attributes:
        name: Which features.
        kind: ``model``, or what sort of baseline: ``features``, ``random``.
        layer: A number, ``mix`` for a learned mix, ``-`` for features without layers.
        scores: One for each seed.
        mean: Of the scores.
        sd: Their standard deviation; None for a single score.
        dev: Mean score on dev; None when the card has none.
        num_parameters: Of the model; None when the card does not say.
        path: Where the model was read; empty for baselines.
        digest: SHA-256 of its tensors' file; empty when the card does not say.
        macs_per_second: MACs for each second of speech; None when the card does not say.
        macs_seconds: Length of the utterances that this holds for.
    """

    name: str
    kind: str
    layer: str
    scores: tuple[float, ...]
    mean: float
    sd: float | None
    dev: float | None
    num_parameters: int | None
    path: str = ""
    digest: str = ""
    macs_per_second: float | None = None
    macs_seconds: float | None = None

    @property
    def is_mix(self) -> bool:
        """Whether it stands for the whole model rather than for one of its layers."""
        return self.layer in MIXES

    @property
    def full_name(self) -> str:
        """Name and layer in a few words."""
        return self.name if self.is_mix else f"{self.name}, layer {self.layer}"


def read_card(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Reads a result card.

    Returns:
        Its plain values without the rows, and the rows.

    Raises:
        ValueError: It is not a card.
    """
    card = read_json(path)
    if not isinstance(card, dict) or not isinstance(card.get("rows"), list):
        raise ValueError(f"{path} is not a result card: it has no list of rows")
    rows = []
    for index, row in enumerate(card["rows"]):
        try:
            rows.append(_row(row))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: row {index} is not one of a result card ({error!r})") from error
    return {key: value for key, value in card.items() if key != "rows"}, rows


def _row(row: Mapping[str, Any]) -> Row:
    scores = tuple(map(float, row["scores"]))
    dev = tuple(map(float, row.get("dev_scores", ())))
    parameters, macs, seconds = (row.get(key) for key in ("num_parameters", "macs_per_second", "macs_seconds"))
    return Row(
        name=str(row.get("name") or row["model"]),
        kind=str(row.get("kind", MODEL)),
        layer=str(row.get("layer", "")),
        scores=scores,
        mean=float(row["mean"]),
        sd=float(row["sd"]) if len(scores) > 1 else None,
        dev=sum(dev) / len(dev) if dev else None,
        num_parameters=None if parameters is None else int(parameters),
        path=str(row.get("model") or ""),
        digest=str(row.get("model_digest") or ""),
        macs_per_second=None if macs is None or seconds is None else float(macs),
        macs_seconds=None if macs is None or seconds is None else float(seconds),
    )


def card_section(path: Path, *, name: str) -> Markup:
    """Returns the part of the page for one card: sentence, bars, layers, table.

    Args:
        path: The card's file.
        name: Unique on the page.
    """
    card, rows = read_card(path)
    corpus, protocol = card.get("corpus"), card.get("protocol")
    corpus_name = corpus.get("name") if isinstance(corpus, dict) else corpus
    parts = [element("h3", f"{card.get('task', path.stem)} on {corpus_name or 'an unnamed corpus'}")]
    if isinstance(protocol, dict):
        said = [f"{key}: {value}" for key, value in protocol.items() if isinstance(value, str)]
        parts.append(element("p", "; ".join(said) + ".", class_="muted"))
    if not rows:
        return join([*parts, element("p", "The card has no rows.", class_="muted")])
    metric, factor, places = scale_of(card, rows)
    caption = f"Test {metric}; whiskers are one standard deviation over {_counts(rows)}. Baselines are pale."
    if isinstance(card.get("chance"), int | float):
        caption += f" The most frequent class alone gives {figures.score(factor * card['chance'], None, places)}."
    picture = figures.bars([_bar(row, factor) for row in best_of_each(rows)], unit=metric, places=places, name=name)
    parts.append(_figure(picture, caption))
    if layered := _layers(rows, factor):
        picture = figures.curves(layered, title=f"{metric} by layer", x_label="layer", name=f"{name}-layers")
        whose = f" All layers are of {layered[0].name}." if len(layered) == 1 else ""
        parts.append(_figure(picture, f"Layer 0 is what enters the first block.{whose}"))
    return join([*parts, _table(rows, metric, factor, places), details("About this card", _about(card, path))])


def scale_of(card: Mapping[str, Any], rows: Sequence[Row]) -> tuple[str, float, int]:
    """Returns how scores are shown: the metric's name, what to multiply by, decimal places."""
    metric = str(card.get("metric", "score"))
    if metric == "accuracy" and all(abs(score) <= 1 for row in rows for score in row.scores):
        return "accuracy in %", 100.0, 1
    return metric, 1.0, 3


def _bar(row: Row, factor: float) -> figures.Bar:
    sd = None if row.sd is None else factor * row.sd
    return figures.Bar(name=row.full_name, value=factor * row.mean, sd=sd, is_baseline=row.kind != MODEL)


def _figure(picture: Markup, caption: str) -> Markup:
    return element("figure", picture, element("figcaption", caption))


def _counts(rows: list[Row]) -> str:
    counts = sorted({len(row.scores) for row in rows})
    return f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def best_of_each(rows: Sequence[Row]) -> list[Row]:
    """Returns the learned mix of each model where there is one, else its best layer on dev: one row for each."""
    chosen: dict[tuple[str, str], Row] = {}
    for row in rows:
        known = chosen.get((row.name, row.path))
        if known is None or (row.is_mix, row.dev or 0.0) > (known.is_mix, known.dev or 0.0):
            chosen[row.name, row.path] = row
    return list(chosen.values())


def _layers(rows: list[Row], factor: float) -> list[figures.Curve]:
    """A curve for each model that was probed at three layers or more."""
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.layer.isdecimal():
            points.setdefault(row.name, {})[int(row.layer)] = factor * row.mean
    many = {name: dict(sorted(p.items())) for name, p in points.items() if len(p) > 2}
    return [figures.Curve(name=name, x=list(p), y=list(p.values()), markers=True) for name, p in list(many.items())[:6]]


def _table(rows: list[Row], metric: str, factor: float, places: int) -> Markup:
    cells = []
    for row in rows:
        dev = "" if row.dev is None else figures.score(factor * row.dev, None, places)
        test = figures.score(factor * row.mean, None if row.sd is None else factor * row.sd, places)
        cells.append([row.name, row.num_parameters or "", row.layer, dev, test, len(row.scores)])
    best = max(range(len(rows)), key=lambda i: (rows[i].kind == MODEL, rows[i].mean))
    return table(["features", "parameters", "layer", f"dev {metric}", "test, mean ± sd", "seeds"], cells, best=best)


def _about(card: Mapping[str, Any], path: Path) -> Markup:
    from sslim.report.runs import flatten

    return table(["setting", "value"], [[key, number(value)] for key, value in [("file", path.name), *flatten(dict(card))]])
