"""Every project rule finds its breach and leaves the right form alone."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "check_rules.py"


@pytest.fixture(scope="module")
def check_rules():
    spec = importlib.util.spec_from_file_location("check_rules", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_rules"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["check_rules"]


def long_function(num_lines: int) -> str:
    return "def f():\n" + "    x = 1\n" * (num_lines - 1)


HOME = "/".join(["", "home", "ann", "corpus"])
LATER = "TO" + "DO"
CASES = {  # rule -> (file, what breaks it, the same file done right)
    "file-length": ("src/sslim/a.py", "x = 1\n" * 501, "x = 1\n" * 500),
    "function-length": ("src/sslim/a.py", long_function(61), long_function(60)),
    "vague-name": ("src/sslim/data/utils.py", "x = 1\n", None),
    "machine-path": ("src/sslim/a.py", f"x = '{HOME}'\n", "x = 'https://example.org/home/ann/corpus'\n"),
    "unfinished": ("src/sslim/a.py", "def f():\n    raise NotImplementedError('later')\n", "x = 'a method of mastodons'\n"),
    "unsafe-load": ("tests/a.py", "import torch\ntorch.load('x')\n", "import torch\ntorch.load('x', weights_only=True)\n"),
    "bare-pickle": ("src/sslim/a.py", "def f():\n    from pickle import loads\n", "from sslim.pickle_reader import loads\n"),
    "swallowed-error": (
        "src/sslim/a.py",
        "try:\n    x = 1\nexcept Exception:\n    pass\n",
        "try:\n    x = 1\nexcept Exception:\n    raise\n",
    ),
    "heavy-import": ("src/sslim/commands/a.py", "import torch.nn\n", "def main():\n    import torch\n"),
}


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("rule", CASES)
def test_each_rule_finds_its_breach_and_only_that(check_rules, tmp_path, rule):
    name, wrong, right = CASES[rule]
    write(tmp_path, name, wrong)
    found = check_rules.breaches(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(f"{name}:")
    assert f" {rule}: " in found[0]
    (tmp_path / name).unlink()
    write(tmp_path, name if right is not None else "src/sslim/data/shards.py", wrong if right is None else right)
    assert check_rules.breaches(tmp_path) == []


def test_every_rule_has_a_case(check_rules):
    assert set(CASES) == set(check_rules.RULES)


@pytest.mark.parametrize(
    ("name", "text", "number"),
    [
        ("README.md", f"put it into {HOME}\n", 1),
        ("src/sslim/a.py", f"# {LATER} later\n", 1),
        ("src/sslim/a.py", "import numpy as np\nnp.load('x', allow_pickle=True)\n", 1),
        ("src/sslim/a.py", "exec('x = 1')\n", 1),
        ("src/sslim/checkpoints/restricted_pickle.py", "import pickle\n", 0),
        ("tests/a.py", "import pickle\n", 0),
        ("src/sslim/nn/a.py", "import torch\n", 0),
    ],
)
def test_further_forms_and_exceptions(check_rules, tmp_path, name, text, number):
    write(tmp_path, name, text)
    assert len(check_rules.breaches(tmp_path)) == number


def test_the_exit_code_follows_the_breaches(check_rules, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_rules.py", str(tmp_path)])
    assert check_rules.main() == 0
    assert capsys.readouterr().out == ""
    write(tmp_path, "src/a.py", "exec('x = 1')\n")
    assert check_rules.main() == 1
    assert capsys.readouterr().out == "src/a.py:1: unsafe-load: exec runs text as code\n"
