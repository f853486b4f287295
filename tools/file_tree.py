"""Writes the annotated file tree of the README from the first docstring line of every module.

``python tools/file_tree.py`` prints it, ``--write`` puts it into README.md between its two markers.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

BEGIN, END = "<!-- file tree: python tools/file_tree.py --write -->", "<!-- end of file tree -->"
COLUMN = 32  # where annotations start
WIDTH = 150
NOT_PYTHON = {
    "py.typed": "marks the package as typed",
    "frontends/statistics.json": "published LibriSpeech means and standard deviations",
}


def annotation(path: Path, package: Path) -> str:
    """Returns the first sentence of a module's docstring, without its full stop.

    Raises:
        ValueError: The file has none, or is not Python and is not described in ``NOT_PYTHON``.
    """
    name = path.relative_to(package).as_posix()
    if path.suffix != ".py":
        if name not in NOT_PYTHON:
            raise ValueError(f"{name} is not described: add it to NOT_PYTHON in tools/file_tree.py")
        return NOT_PYTHON[name]
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{name} has no docstring")
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = paragraph.split(". ")[0].rstrip(".:")
    room = WIDTH - COLUMN
    return sentence if len(sentence) <= room else sentence[:room].rsplit(" ", 1)[0].rstrip(" ,;:") + " …"


def tree(package: Path) -> str:
    """Returns the tree of a package: files before folders, a folder's line stands for its ``__init__.py``."""
    lines: list[str] = []

    def add(folder: Path, depth: int) -> None:
        shown = f"src/{folder.name}/" if depth == 0 else "  " * depth + folder.name + "/"
        lines.append(f"{shown:<{COLUMN}}{annotation(folder / '__init__.py', package)}")
        entries = [p for p in sorted(folder.iterdir()) if p.name not in ("__pycache__", "__init__.py") and p.name[0] != "."]
        files = [p for p in entries if p.is_file()]
        indent = "  " * (depth + 1)
        lines.extend(f"{indent + p.name:<{COLUMN}}{annotation(p, package)}" for p in files)
        for path in entries:
            if path.is_dir():
                add(path, depth + 1)

    add(package, 0)
    return "\n".join(lines)


def with_tree(readme: str, text: str) -> str:
    """Returns the README's text with the tree between its markers.

    Raises:
        ValueError: A marker is missing.
    """
    for marker in (BEGIN, END):
        if readme.count(marker) != 1:
            raise ValueError(f"README.md has {readme.count(marker)} times the line {marker!r}, expected one")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n```\n{text}\n```\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Prints or writes the tree."""
    root = Path(__file__).resolve().parents[1]
    text = tree(root / "src" / "sslim")
    if "--write" in sys.argv[1:]:
        readme = root / "README.md"
        readme.write_text(with_tree(readme.read_text(encoding="utf-8"), text), encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
