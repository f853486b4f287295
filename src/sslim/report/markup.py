"""HTML that cannot be broken by what it shows: every string is escaped unless it was built here."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

STYLE = """
:root { color-scheme: light dark;
  --paper: #fdfdfb; --panel: #f5f5f1; --ink: #1d1f21; --muted: #64696f; --line: #dcdcd4; --accent: #1f5fa8;
  --c1: #1f5fa8; --c2: #c8551b; --c3: #2c8a57; --c4: #8a4fa3; --c5: #9a7b16; --c6: #b03a5b; --warn: #a8341f; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #16181b; --panel: #1e2125; --ink: #e6e6e1; --muted: #9aa0a6; --line: #363a40; --accent: #7db4ec;
  --c1: #6fabe8; --c2: #f0935a; --c3: #67c592; --c4: #c795de; --c5: #d9b94a; --c6: #ea86a2; --warn: #f08a74; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "DejaVu Sans", sans-serif; font-size: 16px; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; margin: 3rem 0 .6rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .4rem; }
p { max-width: 46rem; margin: .4rem 0; overflow-wrap: anywhere; } .muted, figcaption, caption { color: var(--muted); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.fact { background: var(--panel); border-radius: .5rem; padding: .6rem .8rem; overflow-wrap: anywhere; }
.fact b { display: block; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.fact span { color: var(--muted); font-size: .85rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: 1rem 1.2rem; }
figure { margin: .6rem 0; } figcaption { font-size: .88rem; max-width: 46rem; margin-top: .2rem; }
svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93rem; margin: .6rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-size: .88rem; padding-bottom: .3rem; }
th, td { text-align: left; padding: .28rem .9rem .28rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
th { font-weight: 600; color: var(--muted); } td.number, th.number { text-align: right; white-space: nowrap; }
tr.best td { font-weight: 650; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--accent); }
code { font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; font-size: .88em; }
.warning { color: var(--warn); } ul { padding-left: 1.2rem; margin: .4rem 0; } li { overflow-wrap: anywhere; }
footer { margin-top: 3rem; color: var(--muted); font-size: .85rem; }
"""


class Markup(str):
    """Text that is HTML already, and is therefore not escaped again."""

    __slots__ = ()


def escape(value: Any) -> Markup:
    """Returns ``value`` as HTML text; control characters, which HTML cannot hold, become U+FFFD."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(CONTROL.sub("\ufffd", str(value)), quote=True))


def join(parts: Iterable[Any]) -> Markup:
    """Returns the parts one after the other, each escaped."""
    return Markup("".join(escape(part) for part in parts if part is not None))


def element(tag: str, *children: Any, **attributes: Any) -> Markup:
    """Returns one element.

    Args:
        tag: Its name.
        *children: Markup, or anything else, which is escaped; None is left out.
        **attributes: Values are escaped; a trailing underscore of a name is dropped (``class_``), None leaves it out.
    """
    written = "".join(f' {name.rstrip("_")}="{escape(value)}"' for name, value in attributes.items() if value is not None)
    return Markup(f"<{tag}{written}>{join(children)}</{tag}>")


def number(value: Any) -> str:
    """Returns a number as people read it: thousands grouped, four significant digits; other values as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) >= 1000):
        return f"{int(value):,}"
    if not math.isfinite(value):
        return str(value)
    text = f"{value:.4g}"
    return f"{value:,.0f}" if "e+" in text and abs(value) < 1e12 else text


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str = "", best: int | None = None) -> Markup:
    """Returns a table; cells that are numbers are set to the right.

    Args:
        header: Column names.
        rows: Cells.
        caption: Sentence above it.
        best: Index of the row to set in bold.
    """
    numeric = [bool(rows) and all(_is_number(row[i]) or row[i] in (None, "") for row in rows) for i in range(len(header))]
    kinds = ["number" if n else None for n in numeric]
    head = element("tr", *(element("th", name, class_=kind) for name, kind in zip(header, kinds, strict=True)))
    body = [
        element(
            "tr",
            *(element("td", _cell(cell), class_=kind) for cell, kind in zip(row, kinds, strict=True)),
            class_="best" if index == best else None,
        )
        for index, row in enumerate(rows)
    ]
    title = element("caption", caption) if caption else None
    return element("div", element("table", title, element("thead", head), element("tbody", *body)), class_="scroll")


def facts(values: Sequence[tuple[str, Any]]) -> Markup:
    """Returns the few figures that matter, large; pairs of (name, value)."""
    boxes = (element("div", element("b", number(value)), element("span", name), class_="fact") for name, value in values)
    return element("div", *boxes, class_="facts")


def details(summary: str, *children: Any) -> Markup:
    """Returns something that is folded until it is asked for."""
    return element("details", element("summary", summary), *children)


def page(title: str, *children: Any) -> str:
    """Returns a whole document that needs nothing from anywhere else."""
    head = join(
        [
            Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
            Markup('<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '),
            Markup("style-src 'unsafe-inline'; img-src data:\">"),
            element("title", title),
            element("style", Markup(STYLE)),
        ]
    )
    body = element("body", element("main", element("h1", title), *children))
    return "<!doctype html>\n" + element("html", element("head", head), body, lang="en") + "\n"


def _is_number(cell: Any) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def _cell(cell: Any) -> Any:
    if cell is None:
        return ""
    return cell if isinstance(cell, Markup) else number(cell)
