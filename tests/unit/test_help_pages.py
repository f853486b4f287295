"""Help without Python's None: what is taken out leaves the frames straight, and nothing else goes."""

import importlib
import re

import pytest

from sslim import cli

METHODS = {verb: getattr(importlib.import_module(module), "METHODS", {}) for verb, (module, _) in cli.VERBS.items()}
COMMANDS = [[verb, *rest] for verb, methods in METHODS.items() for rest in ([[name] for name in methods] or [[]])]
PAGE = """usage: sslim x [-h] [--a {None}|PATH] [--kind {None,one,two}]
╭─ options ──────────────────────────────────────╮
│ -n {None}|PATH, --name {None}|PATH             │
│                 A name. (default: None)        │
│ --kind {None,one,two}                          │
│                 Which, or neither. (default:   │
│                 None)                          │
│ --title STR     Heading. (default: '')         │
│ --layers {None}|{[INT [INT ...]]}              │
│ --least {None}|FLOAT  None of these. (default: │
│                 0.5)                           │
╰────────────────────────────────────────────────╯
"""
PLAIN = """usage: sslim x [-h] [--a PATH] [--kind {one,two}]
╭─ options ──────────────────────────────────────╮
│ -n PATH, --name PATH                           │
│                 A name.                        │
│ --kind {one,two}                               │
│                 Which, or neither.             │
│ --title STR     Heading.                       │
│ --layers {[INT [INT ...]]}                     │
│ --least FLOAT         None of these. (default: │
│                 0.5)                           │
╰────────────────────────────────────────────────╯
"""


def test_none_goes_and_the_frame_stays():
    assert [line.rstrip() for line in cli._plain_help(PAGE).splitlines()] == PLAIN.splitlines()


def test_in_colour_too():
    page = "│\x1b[0m \x1b[1m--a {None}|INT\x1b[0m  \x1b[2mB.\x1b[0m \x1b[36m(default:\x1b[0m\x1b[36m None)\x1b[0m │\n"
    plain = re.sub(r"\x1b\[\d*m", "", cli._plain_help(page))
    assert plain == re.sub(r"\x1b\[\d*m", "", page).replace("{None}|INT", "INT       ").replace("(default: None)", " " * 15)
    assert "\x1b[36m" in cli._plain_help(page)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_of_every_command(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main([*words, "--help"]) == 0
    page = capsys.readouterr().out
    assert "{None" not in page
    assert not re.search(r"\(default:[\s│]*(None)?\)", page)
    rows = [line for line in page.splitlines() if line[:1] in "│╭╰"]
    assert len({len(row) for row in rows[: len(rows)] if row}) <= 2  # arguments and options have a frame each
    name, module, _ = cli.find_command(words)
    for field in module.Options.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in page or field.upper().replace("_", "-") in page, f"{name}: {field}"
