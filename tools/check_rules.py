"""Checks the rules of this project that ruff, mypy and import-linter do not know.

Run as ``python tools/check_rules.py [FOLDER]``; prints one line for each breach and exits 1 when there is any.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
CODE_FOLDERS = ("src", "tests", "tools", "benchmarks")
VAGUE_NAMES = {"utils", "helpers", "common", "misc"}
PICKLE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLE_READER = "src/sslim/checkpoints/restricted_pickle.py"
HEAVY_MODULES = {"torch", "numpy", "scipy", "soundfile", "soxr", "matplotlib", "transformers", "sklearn", "kaldiio", "rich"}
LIGHT_FILES = ("src/sslim/__init__.py", "src/sslim/__main__.py", "src/sslim/cli.py", "src/sslim/commands/")
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:" + "|".join(["work", "home", "root", "Users", "mnt", "scratch", "opt"]) + r")/\w")
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file to check.

    Attributes:
        path: Relative to the project's folder, with forward slashes.
        text: Its whole text.
        tree: Its syntax tree; None unless it is Python.
    """

    path: str
    text: str
    tree: ast.Module | None


Breaches = Iterator[tuple[int, str]]  # line number, sentence


def _nodes(file: SourceFile) -> Iterator[ast.AST]:
    return ast.walk(file.tree) if file.tree is not None else iter(())


def _dotted(node: ast.AST) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id])) if isinstance(node, ast.Name) else ""


def _imports(nodes: Iterator[ast.AST]) -> Iterator[tuple[int, str]]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module


def file_length(file: SourceFile) -> Breaches:
    """Files of code stay short enough to read in one sitting."""
    num_lines = file.text.count("\n")
    if file.tree is not None and num_lines > MAX_FILE_LINES:
        yield 1, f"has {num_lines} lines; at most {MAX_FILE_LINES}"


def function_length(file: SourceFile) -> Breaches:
    """Functions stay short; decorators do not count, the docstring does."""
    for node in _nodes(file):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                yield node.lineno, f"function {node.name} has {num_lines} lines; at most {MAX_FUNCTION_LINES}"


def vague_name(file: SourceFile) -> Breaches:
    """A module says what it holds."""
    for part in Path(file.path).with_suffix("").parts:
        if part in VAGUE_NAMES and file.tree is not None:
            yield 1, f"the name {part!r} says nothing about what is inside"


def machine_path(file: SourceFile) -> Breaches:
    """Nothing depends on one machine's folders."""
    for number, line in enumerate(file.text.splitlines(), 1):
        if found := MACHINE_PATH.search(line):
            yield number, f"holds a path of one machine ({found.group()}...)"


def unfinished(file: SourceFile) -> Breaches:
    """Nothing is left for later without an issue."""
    for number, line in enumerate(file.text.splitlines(), 1):
        if found := UNFINISHED.search(line):
            yield number, f"says {found.group()}: do it or open an issue"
    for node in _nodes(file):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if _dotted(raised) == "NotImplementedError":
                yield node.lineno, "raises NotImplementedError: a stub"


def unsafe_load(file: SourceFile) -> Breaches:
    """Foreign files never run code."""
    for node in _nodes(file):
        if not isinstance(node, ast.Call):
            continue
        name = _dotted(node.func)
        keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if name == "torch.load" and keywords.get("weights_only") is not True:
            yield node.lineno, "torch.load without weights_only=True"
        if name in ("np.load", "numpy.load") and keywords.get("allow_pickle") is True:
            yield node.lineno, "numpy.load with allow_pickle=True"
        if name in ("eval", "exec", "builtins.eval", "builtins.exec"):
            yield node.lineno, f"{name} runs text as code"


def bare_pickle(file: SourceFile) -> Breaches:
    """Only the restricted reader knows pickle; tests may, to make hostile files."""
    if file.path == PICKLE_READER or file.path.startswith("tests/"):
        return
    for number, module in _imports(_nodes(file)):
        if module.split(".")[0] in PICKLE_MODULES:
            yield number, f"imports {module}; only {PICKLE_READER} may"


def swallowed_error(file: SourceFile) -> Breaches:
    """An error is handled or reported, never dropped."""
    for node in _nodes(file):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or _dotted(node.type) in ("Exception", "BaseException")
            empty = all(isinstance(s, ast.Pass | ast.Continue) for s in node.body)
            if broad and empty:
                yield node.lineno, "drops every error in silence"


def heavy_import(file: SourceFile) -> Breaches:
    """What runs before the verb is known, and each verb's --help, imports nothing slow."""
    if file.tree is None or not file.path.startswith(LIGHT_FILES):
        return
    for number, module in _imports(iter(file.tree.body)):
        if module.split(".")[0] in HEAVY_MODULES:
            yield number, f"imports {module} at module level; import it inside the function"


RULES: dict[str, Callable[[SourceFile], Breaches]] = {
    "file-length": file_length,
    "function-length": function_length,
    "vague-name": vague_name,
    "machine-path": machine_path,
    "unfinished": unfinished,
    "unsafe-load": unsafe_load,
    "bare-pickle": bare_pickle,
    "swallowed-error": swallowed_error,
    "heavy-import": heavy_import,
}


def files(root: Path) -> Iterator[SourceFile]:
    """Yields the project's code, and its texts at the top."""
    paths = [p for folder in CODE_FOLDERS for p in sorted((root / folder).rglob("*.py"))]
    paths += [p for pattern in ("*.md", "*.toml", "*.txt", "Makefile", ".ci/run") for p in sorted(root.glob(pattern))]
    for path in paths:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text, filename=str(path)) if path.suffix == ".py" else None
        yield SourceFile(path=path.relative_to(root).as_posix(), text=text, tree=tree)


def breaches(root: Path) -> list[str]:
    """Returns one line for each breach: file, line, rule, sentence."""
    found = []
    for file in files(root):
        for name, rule in RULES.items():
            found += [f"{file.path}:{number}: {name}: {sentence}" for number, sentence in rule(file)]
    return found


def main() -> int:
    """Prints the breaches; returns the exit code."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    found = breaches(root)
    print(*found, sep="\n" if found else "", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
