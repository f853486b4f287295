"""The command line: what a user sees, and with which exit code, in every way a command can end."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from sslim import cli


@dataclass(frozen=True, kw_only=True)
class Options:
    """A verb for these tests.

    Attributes:
        num_clusters: Number of clusters.
        how: Either way.
    """

    num_clusters: int = 3
    how: str = "fine"


@pytest.fixture
def verb(monkeypatch):
    """A function that installs ``main`` as the verb ``cluster``."""

    def install(main):
        monkeypatch.delenv(cli.TRACEBACK, raising=False)
        monkeypatch.setitem(sys.modules, cli.VERBS["cluster"][0], SimpleNamespace(Options=Options, main=main))

    return install


def raising(error: BaseException):
    def main(options: Options) -> None:
        raise error

    return main


def test_options_reach_the_command(verb):
    seen = []
    verb(seen.append)
    assert cli.main(["cluster", "--num-clusters", "7"]) == 0
    assert seen == [Options(num_clusters=7)]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("the corpus is empty; give it audio"), 2, "sslim cluster: the corpus is empty; give it audio\n"),
        (
            FileNotFoundError(2, "No such file or directory", "corpus/x"),
            2,
            "sslim cluster: corpus/x: No such file or directory\n",
        ),
        (PermissionError(13, "Permission denied", "/x"), 2, "sslim cluster: /x: Permission denied\n"),
        (RuntimeError("loss is not finite"), 1, "sslim cluster: loss is not finite (SSLIM_TRACEBACK=1 shows where)\n"),
        (KeyError("weight"), 1, "sslim cluster: KeyError: 'weight' (SSLIM_TRACEBACK=1 shows where)\n"),
        (
            ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.pyplot"),
            1,
            'sslim cluster: this needs matplotlib, which is not installed: pip install "sslim[report]"\n',
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(143), 143, ""),
        (SystemExit("gave up"), 1, "gave up\n"),
    ],
)
def test_errors_are_one_sentence_with_their_exit_code(verb, capsys, error, code, said):
    verb(raising(error))
    assert cli.main(["cluster"]) == code
    captured = capsys.readouterr()
    assert captured.err == said
    assert captured.out == ""


def test_traceback_on_request_keeps_the_code(verb, capsys, monkeypatch):
    verb(raising(ValueError("bad")))
    monkeypatch.setenv(cli.TRACEBACK, "1")
    assert cli.main(["cluster"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv(cli.TRACEBACK, "0")  # control: off again
    assert cli.main(["cluster"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretain"], ["no verb 'pretain'", "'pretrain'"]),
        (["zzzzzzz"], ["no verb 'zzzzzzz'", "doctor"]),
        (["--cluster"], ["no option '--cluster'", "'cluster'"]),
        (["cluster", "--num-cluster", "3"], ["--num-cluster, 3", "did you mean --num-clusters?", "sslim cluster --help"]),
        (["cluster", "--num-clusters", "many"], ["--num-clusters", "many"]),
        (["cluster", "stray"], ["stray"]),
    ],
)
def test_unreadable_arguments_exit_2_in_one_line(verb, capsys, arguments, words):
    verb(raising(AssertionError("the command must not run")))
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert not any(character in message for character in "│╭╰─")
    for word in words:
        assert word in message


def test_help_lists_every_verb_and_no_verb_is_bad_input(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown and about in shown for verb, (_, about) in cli.VERBS.items())
    assert cli.main([]) == 2
    assert capsys.readouterr().err == shown


def test_help_of_a_verb(verb, capsys):
    verb(raising(AssertionError("the command must not run")))
    assert cli.main(["cluster", "--help"]) == 0
    shown = capsys.readouterr()
    assert "--num-clusters INT" in shown.out
    assert shown.err == ""


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sslim 0.")


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_every_verb_exists_and_explains_every_option(name, capsys):
    module = importlib.import_module(cli.VERBS[name][0])
    assert is_dataclass(module.Options)
    assert callable(module.main)
    assert cli.main([name, "--help"]) == 0
    shown = capsys.readouterr().out.lower()
    for field in fields(module.Options):
        assert field.name.replace("_", "-") in shown or field.name in shown


def test_sigterm_unwinds_with_143_and_the_handler_is_put_back(verb, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []

    def main(options: Options) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)

    verb(main)
    assert cli.main(["cluster"]) == 143
    assert cleaned == [True]
    assert signal.getsignal(signal.SIGTERM) == before


def run(code: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, **options)


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'numpy', 'tyro', 'scipy', 'soundfile', 'matplotlib', 'rich', 'cattrs'}"
    code = f"import sys; from sslim.cli import main; main(['--help']); print(sorted({heavy} & set(sys.modules)))"
    assert run(code).stdout.splitlines()[-1] == "[]"


def test_help_of_every_verb_imports_no_torch():
    code = (
        "import sys, contextlib, io\nfrom sslim.cli import main, VERBS\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n    codes = [main([v, '--help']) for v in VERBS]\n"
        "print(codes, sorted({'torch', 'numpy', 'scipy', 'soundfile', 'matplotlib'} & set(sys.modules)))"
    )
    result = run(code)
    assert result.stdout == f"{[0] * len(cli.VERBS)} []\n", result.stderr


def test_a_closed_pipe_is_quiet(tmp_path: Path):
    code = (
        "import sys, types\nfrom sslim import cli\n"
        "class O: pass\n"
        "def main(options):\n    [print('x' * 1000) for _ in range(10000)]\n"
        "cli.parse_options = lambda *a: None\n"
        "sys.modules['sslim.commands.cluster'] = types.SimpleNamespace(main=main)\n"
        "sys.exit(cli.main(['cluster']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 141
