"""The command line: a table from verb to command module, and what a user sees when something goes wrong.

Nothing heavy is imported before the verb is known, and ``sslim VERB --help`` imports only that verb's ``Options``.

Exit codes: 0 done, 1 a failure, 2 bad input (an unknown verb or option, ``ValueError``, ``OSError``), 130 interrupted by
Ctrl-C, 141 the reader of our output went away, 143 terminated. Errors are one sentence on standard error;
``SSLIM_TRACEBACK=1`` shows the traceback instead.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType, ModuleType
from typing import Any

VERBS: dict[str, tuple[str, str]] = {
    "demo": ("sslim.commands.demo", "the whole story in minutes on a laptop: corpus, targets, pre-training, probes, report"),
    "prepare": (
        "sslim.commands.prepare",
        "audio, Kaldi folder or known corpus to a corpus folder with features and statistics",
    ),
    "cluster": ("sslim.commands.cluster", "k-means targets from features or from a layer of a model, with their quality"),
    "pretrain": ("sslim.commands.pretrain", "pre-train a model; the same command resumes"),
    "compress": ("sslim.commands.compress", "smaller models: pruning, low rank, gates, distillation, supernets, pipelines"),
    "probe": ("sslim.commands.probe", "evaluate a model's layers against baselines; writes a result card"),
    "analyze": ("sslim.commands.analyze", "noise by layer, attention heads, similarity of layers: tables and pictures"),
    "profile": ("sslim.commands.profile", "parameters, MACs, latency, memory and speed-up against a dense baseline"),
    "extract": ("sslim.commands.extract", "hidden states of audio files or a corpus to safetensors, npz or Kaldi ark"),
    "import": ("sslim.commands.import_", "a foreign checkpoint to a native model folder"),
    "export": ("sslim.commands.export", "a model to the file layout of another toolkit"),
    "report": ("sslim.commands.report", "runs, corpora, result cards, profiles and Pareto fronts on one HTML page"),
    "doctor": ("sslim.commands.doctor", "check a corpus and its labels before hours are spent"),
}

EXTRAS = {
    "matplotlib": "report",
    "kaldiio": "data",
    "praatio": "data",
    "espeakng_loader": "demo",
    "tensorboard": "track",
    "sklearn": "eval",
    "transformers": "hf",
}  # a module that is missing -> the extra that brings it

TRACEBACK = "SSLIM_TRACEBACK"
FAILURE, BAD_INPUT, INTERRUPTED, BROKEN_PIPE, TERMINATED = 1, 2, 130, 141, 143
FRAME, RULE, TOP_CORNER = "│╰╯ ", "─━-", "╭"  # what tyro draws around its messages; without Unicode only rules of minus signs


class UsageError(ValueError):
    """Arguments that cannot be read; the message is one sentence."""


def help_text() -> str:
    """Returns what ``sslim --help`` prints."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {about}" for verb, (_, about) in VERBS.items()]
    return "\n".join(
        [
            "usage: sslim VERB [options]",
            "",
            "Small self-supervised speech models: pre-train, compress, probe and ship them.",
            "",
            "verbs:",
            *lines,
            "",
            "sslim VERB --help   its arguments and options",
            "sslim --version     the version",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code; nothing but a failure of the interpreter gets past it.

    Args:
        arguments: Without the program's name; None takes them from ``sys.argv``.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verb = arguments[0] if arguments and arguments[0] in VERBS else ""
    with _sigterm_exits():
        try:
            code = _run(arguments)
            sys.stdout.flush()
            return code
        except SystemExit as stop:
            return _exit_code(stop)
        except KeyboardInterrupt:
            return _complain("interrupted", INTERRUPTED)
        except BrokenPipeError:
            with contextlib.suppress(OSError, ValueError):  # so that the interpreter's own last flush has somewhere to write
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        except Exception as error:
            if os.environ.get(TRACEBACK, "") not in ("", "0"):
                import traceback

                traceback.print_exc()
                return _code_for(error)
            prefix = f"sslim {verb}".strip()
            return _complain(f"{prefix}: {_sentence(error)}", _code_for(error))


def _run(arguments: list[str]) -> int:
    if not arguments:
        print(help_text(), file=sys.stderr)
        return BAD_INPUT
    verb = arguments[0]
    if verb in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if verb in ("-V", "--version"):
        from importlib.metadata import version

        print(f"sslim {version('sslim')}")
        return 0
    if verb not in VERBS:
        kind = "option" if verb.startswith("-") else "verb"
        close = difflib.get_close_matches(verb.lstrip("-"), VERBS, n=1, cutoff=0.4)
        advice = f"did you mean {close[0]!r}?" if close else f"the verbs are {', '.join(VERBS)}"
        raise UsageError(f"there is no {kind} {verb!r}; {advice}")
    name, module, rest = find_command(arguments)
    if module is None:
        print(importlib.import_module(VERBS[verb][0]).help_text())
        return 0
    module.main(parse_options(name, module, rest))
    return 0


def find_command(arguments: list[str]) -> tuple[str, ModuleType | None, list[str]]:
    """Returns a command's name, its module and the arguments that are left, for a verb that exists.

    A verb with ``METHODS`` is a family of commands, and the next argument chooses; where it asks for help, there is no module.
    """
    verb, rest = arguments[0], arguments[1:]
    module = importlib.import_module(VERBS[verb][0])
    if not hasattr(module, "METHODS"):
        return verb, module, rest
    method, rest = module.choose(rest)
    if method is None:
        return verb, None, rest
    return f"{verb} {method}", importlib.import_module(module.METHODS[method][0]), rest


def parse_options(verb: str, module: ModuleType, arguments: Sequence[str]) -> Any:
    """Reads a verb's arguments into its ``Options``.

    Raises:
        UsageError: They cannot be read.
        SystemExit: Help was asked for and printed.
    """
    import tyro

    messages, shown = io.StringIO(), _Shown()
    try:
        with contextlib.redirect_stderr(messages), contextlib.redirect_stdout(shown):
            config = (tyro.conf.PositionalMetavarFromFieldName,)
            return tyro.cli(module.Options, prog=f"sslim {verb}", args=list(arguments), config=config)
    except SystemExit as stop:
        if not stop.code:
            sys.stdout.write(_plain_help(shown.getvalue()))
            raise
        message = _unboxed(messages.getvalue()) or "these arguments cannot be read"
        raise UsageError(f"{message}{_nearest_option(message, module)}; see `sslim {verb} --help`") from None


class _Shown(io.StringIO):
    """Takes what is shown, drawn and coloured as for standard output."""

    encoding = ""  # io.StringIO has none, and tyro would draw its frames with minus signs

    def __init__(self) -> None:
        super().__init__()
        self.encoding, self.coloured = sys.stdout.encoding, sys.stdout.isatty()

    def isatty(self) -> bool:
        return self.coloured


def _plain_help(page: str) -> str:
    """A page of help without Python's None: ``{None}|PATH``, ``{None,a,b}`` and ``(default: None)``, as wide as before."""
    codes = r"(?:\x1b\[[\d;]*m|[\s│])*"  # colours, and the frame where the words lie on two lines

    def blank(match: re.Match[str]) -> str:
        return " " * len("(default:") + match[1] + " " * (len(match[2]) + 1)

    page = re.sub(rf"\(default:({codes})(None|''|)\)", blank, page)
    lines = []
    for line in page.splitlines():
        end, none = 0, r"\{None\}\|(?=[\w{])|(?<=\{)None,"
        for match in re.finditer(rf"(?:{none})(?:\{{[^}}]*\}}|[^\s\x1b]*)", line):
            end = match.end()
        saved = 0 if "usage:" in line else sum(map(len, re.findall(none, line)))
        line = re.sub(none, "", line[:end]) + " " * saved + line[end:]
        if "│" not in line or re.sub(codes, "", line):
            lines.append(line)
    return "\n".join(lines) + "\n"


def _unboxed(text: str) -> str:
    """The message that tyro printed, as one line without its frame, its title and the advice below the next rule."""
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        inner = line.strip(FRAME)
        if line.strip().startswith(TOP_CORNER):
            paragraphs = [[], []]  # the title is part of the frame
        elif inner and not inner.strip(RULE):
            paragraphs.append([])
        elif inner:
            paragraphs[-1].append(inner)
    message = " ".join(next(filter(None, paragraphs[1:]), [])).replace(" (required)", "").rstrip(".")
    message = re.sub(r"^Missing from sslim [\w -]+:", "missing argument", message)
    return message.replace("Unrecognized options:", "unrecognised arguments:")


def _nearest_option(message: str, module: ModuleType) -> str:
    """``; did you mean --x?`` for the first unknown option in ``message``."""
    from dataclasses import fields, is_dataclass

    unknown = [word.strip(",") for word in message.split() if word.startswith("--")]
    if not message.startswith("unrecognised") or not unknown or not is_dataclass(module.Options):
        return ""
    accepted = ["--" + field.name.replace("_", "-") for field in fields(module.Options)]
    close = difflib.get_close_matches(unknown[0], accepted, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _sentence(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in EXTRAS:
        name = (error.name or "").split(".")[0]
        return f'this needs {name}, which is not installed: pip install "sslim[{EXTRAS[name]}]"'
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError)):
        return text or type(error).__name__
    known = isinstance(error, (RuntimeError, ImportError))
    text = text if known and text else f"{type(error).__name__}: {text}".rstrip(": ")
    return f"{text} ({TRACEBACK}=1 shows where)"


def _code_for(error: BaseException) -> int:
    return BAD_INPUT if isinstance(error, (ValueError, OSError)) else FAILURE


def _exit_code(stop: SystemExit) -> int:
    if isinstance(stop.code, str):
        return _complain(stop.code, FAILURE)
    return stop.code or 0


def _complain(sentence: str, code: int) -> int:
    with contextlib.suppress(OSError):  # standard error itself may be gone
        print(sentence, file=sys.stderr, flush=True)
    return code


@contextlib.contextmanager
def _sigterm_exits() -> Iterator[None]:
    """SIGTERM unwinds the stack like Ctrl-C, so that half-written files are removed. Training puts its own handler on top."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread, where handlers cannot be set
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
