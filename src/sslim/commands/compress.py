"""``sslim compress``: smaller models, one method each; a table from method to command module."""

from __future__ import annotations

from dataclasses import dataclass

from sslim.commands.verb_family import choose_method, family_help

METHODS: dict[str, tuple[str, str]] = {
    "heads": ("sslim.commands.compress_heads", "take attention heads out"),
    "rows": ("sslim.commands.compress_rows", "take feed-forward units out"),
    "width": ("sslim.commands.compress_width", "take the same share of heads and feed-forward units out"),
    "depth": ("sslim.commands.compress_depth", "leave out the layers that do least"),
    "sharing": ("sslim.commands.compress_sharing", "fold the layers into a few blocks that run again and again"),
    "low-rank": ("sslim.commands.compress_low_rank", "factorise the encoder's matrices"),
    "weights": ("sslim.commands.compress_weights", "set single weights to zero"),
    "gates": ("sslim.commands.compress_gates", "learn what can be cut while distilling, then cut it"),
    "quantize": ("sslim.commands.compress_quantize", "store weights in 8 or 16 bits"),
    "distil": ("sslim.commands.compress_distil", "train a small student on a teacher's layers"),
    "supernet": ("sslim.commands.compress_supernet", "train one net whose parts are all usable models"),
    "search": ("sslim.commands.compress_search", "find the best parts of a supernet for a budget"),
    "extract": ("sslim.commands.compress_extract", "cut a part of a supernet out as an ordinary model"),
    "yaml": ("sslim.commands.compress_yaml", "pruning or distillation from the MelHuBERT compression suite's two YAML files"),
    "pipeline": ("sslim.commands.compress_pipeline", "several methods with training between them, from a TOML file"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Nothing: every method has its own."""


def help_text() -> str:
    """Returns what ``sslim compress --help`` prints."""
    return family_help("compress", METHODS, noun="method", usage=("sslim compress PIPELINE.toml MODEL [options]",))


def choose(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Returns the method that the first argument names, or None when help is asked for, and the arguments of the method.

    A file whose name ends with ``.toml`` stands for the method ``pipeline``.

    Raises:
        ValueError: No method, or an unknown one.
    """
    if arguments and arguments[0].endswith(".toml"):
        return "pipeline", arguments
    return choose_method(arguments, METHODS, noun="method")


def main(options: Options) -> None:
    """Prints the methods: ``sslim.cli`` goes straight to the one that is named."""
    print(help_text())
