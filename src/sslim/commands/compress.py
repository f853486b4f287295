"""``sslim compress``: smaller models, one method each; a table from method to command module."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

METHODS: dict[str, tuple[str, str]] = {
    "distil": ("sslim.commands.compress_distil", "train a small student on a teacher's layers"),
    "supernet": ("sslim.commands.compress_supernet", "train one net whose parts are all usable models"),
    "search": ("sslim.commands.compress_search", "find the best parts of a supernet for a budget"),
    "extract": ("sslim.commands.compress_extract", "cut a part of a supernet out as an ordinary model"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Nothing: every method has its own."""


def help_text() -> str:
    """Returns what ``sslim compress --help`` prints."""
    width = max(map(len, METHODS))
    lines = [f"  {method:<{width}}  {about}" for method, (_, about) in METHODS.items()]
    return "\n".join(
        ["usage: sslim compress METHOD [options]", "", "methods:", *lines, "", "sslim compress METHOD --help   its arguments"]
    )


def choose(arguments: list[str]) -> str | None:
    """Returns the method that the first argument names, or None when help is asked for.

    Raises:
        ValueError: No method, or an unknown one.
    """
    method = arguments[0] if arguments else ""
    if method in ("-h", "--help", "help"):
        return None
    if method in METHODS:
        return method
    close = difflib.get_close_matches(method, METHODS, n=1, cutoff=0.4)
    advice = f"did you mean {close[0]!r}?" if close else f"the methods are {', '.join(METHODS)}"
    raise ValueError(f"there is no method {method!r}; {advice}" if method else f"no method given; {advice}")


def main(options: Options) -> None:
    """Prints the methods: ``sslim.cli`` goes straight to the one that is named."""
    print(help_text())
