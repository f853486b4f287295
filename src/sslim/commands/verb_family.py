"""A verb that is a family of commands: its help, and the choice of one of them by the first argument."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

Methods = Mapping[str, tuple[str, str]]  # method -> module, what it does


def family_help(verb: str, methods: Methods, *, noun: str, usage: tuple[str, ...] = ()) -> str:
    """Returns what ``sslim VERB --help`` prints.

    Args:
        verb: Its name.
        methods: What can be chosen.
        noun: What one of them is called: ``method``.
        usage: Other ways to call it.
    """
    width = max(map(len, methods))
    return "\n".join(
        [
            f"usage: sslim {verb} {noun.upper()} [options]",
            *(f"       {line}" for line in usage),
            "",
            _plural(noun) + ":",
            *(f"  {method:<{width}}  {about}" for method, (_, about) in methods.items()),
            "",
            f"sslim {verb} {noun.upper()} --help   its arguments",
        ]
    )


def choose_method(arguments: list[str], methods: Methods, *, noun: str) -> tuple[str | None, list[str]]:
    """Returns the method that the first argument names, or None when help is asked for, and the arguments of the method.

    Args:
        arguments: Behind the verb.
        methods: What can be chosen.
        noun: What one of them is called.

    Raises:
        ValueError: No method, or an unknown one.
    """
    method, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if method in ("-h", "--help", "help"):
        return None, rest
    if method in methods:
        return method, rest
    close = difflib.get_close_matches(method, methods, n=1, cutoff=0.4)
    advice = f"did you mean {close[0]!r}?" if close else f"the {_plural(noun)} are {', '.join(methods)}"
    raise ValueError(f"there is no {noun} {method!r}; {advice}" if method else f"no {noun} given; {advice}")


def _plural(noun: str) -> str:
    return f"{noun[:-2]}es" if noun.endswith("is") else f"{noun}s"
