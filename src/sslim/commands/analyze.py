"""``sslim analyze``: what happens inside models; a table from analysis to command module."""

from __future__ import annotations

from dataclasses import dataclass

from sslim.commands.verb_family import choose_method, family_help

METHODS: dict[str, tuple[str, str]] = {
    "lnsr": ("sslim.commands.analyze_lnsr", "how much of adversarial and of Gaussian noise arrives in each layer"),
    "attention": ("sslim.commands.analyze_attention", "heads that are global, vertical or diagonal, and their pictures"),
    "ablation": ("sslim.commands.analyze_ablation", "heads taken away one after another, in the order of their scores"),
    "phones": ("sslim.commands.analyze_phones", "which phones attend to which"),
    "similarity": ("sslim.commands.analyze_similarity", "CKA and CCA between the layers of one model, or of two"),
    "layer-weights": ("sslim.commands.analyze_layer_weights", "the layers that probes took their features from"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Nothing: every analysis has its own."""


def help_text() -> str:
    """Returns what ``sslim analyze --help`` prints."""
    return family_help("analyze", METHODS, noun="analysis")


def choose(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Returns the analysis that the first argument names, or None when help is asked for, and the arguments of the analysis.

    Raises:
        ValueError: No analysis, or an unknown one.
    """
    return choose_method(arguments, METHODS, noun="analysis")


def main(options: Options) -> None:
    """Prints the analyses: ``sslim.cli`` goes straight to the one that is named."""
    print(help_text())
