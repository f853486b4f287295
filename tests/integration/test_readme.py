"""The README does not drift: its file tree is the package's, and its commands are ones that sslim understands."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from sslim import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands(text: str) -> list[list[str]]:
    """The sslim commands in the shell blocks of a text, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "sslim"]


def parse(words: list[str]) -> object:
    name, module, arguments = cli.find_command(words)
    assert module is not None
    return cli.parse_options(name, module, arguments)


def test_the_file_tree_is_the_packages():
    file_tree = load("file_tree")
    tree = file_tree.tree(ROOT / "src" / "sslim")
    assert file_tree.with_tree(README, tree) == README, "run: python tools/file_tree.py --write"


def test_the_tree_lists_every_file_once_and_nothing_else(tmp_path):
    file_tree = load("file_tree")
    package = tmp_path / "thing"
    (package / "inner" / "__pycache__").mkdir(parents=True)
    (package / "__init__.py").write_text('"""The thing. More about it."""\n', encoding="utf-8")
    (package / "inner" / "__init__.py").write_text('"""Inside."""\n', encoding="utf-8")
    (package / "inner" / "__pycache__" / "part.pyc").write_bytes(b"")
    (package / "inner" / "part.py").write_text('"""A part,\nin two lines.\n"""\n', encoding="utf-8")
    lines = [" ".join(line.split()) for line in file_tree.tree(package).splitlines()]
    assert lines == ["src/thing/ The thing", "inner/ Inside", "part.py A part, in two lines"]
    (package / "bare.py").write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bare\.py has no docstring"):
        file_tree.tree(package)


@pytest.mark.parametrize("words", commands(README), ids=" ".join)
def test_every_command_is_understood(words):
    assert parse(words) is not None


def test_control_a_wrong_command_is_noticed():
    assert commands("```bash\nmake demo\nsslim report \\\n  run  # comment\n```\n`sslim x`") == [["report", "run"]]
    with pytest.raises(cli.UsageError):
        parse(["report", "run", "--no-such-option"])


def test_every_verb_is_in_the_table():
    assert all(f"`sslim {verb}" in README for verb in cli.VERBS)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"\bmake (\w+)", README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert {"demo", "test", "check", "bench"} <= targets
    assert named & {"demo", "test", "check", "bench", "clean"} <= targets
