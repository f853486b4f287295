"""MelHuBERT, Mockingjay, TERA, AALBERT and APC of one size, trained for the same minutes, in one probe table.

All train on the same corpus from the same stored features, one after the other on one core, each for as many steps as fit into
its minutes, and are probed on digits of speakers that the probe never heard, on speakers, and on the phones of frames of a
spoken corpus whose phone boundaries are exact, beside log-Mel features and random weights. Every step is a command of ``sslim``
and is printed; interrupted runs go on. Usage, from the project's root, with a folder of recordings for each corpus:
``python benchmarks/experiments/families.py SPEECH DIGITS --output runs/families``.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from timed_runs import minutes_of, sslim, train

LABELS = "mfcc100"
# Name of a row -> arguments of `sslim pretrain`. All have features with the corpus's mean and variance: causal models need
# them, since those of an utterance would tell its future, and objectives can be told apart only under one normalisation.
RUNS = {
    "melhubert": ("melhubert-mini", "--labels", LABELS),
    "mockingjay": ("mockingjay-mini",),
    "tera": ("tera-mini",),
    "aalbert": ("aalbert-mini",),
    "apc": ("apc-mini",),
    "apc-melhubert": ("apc-melhubert-mini",),
}
# Name of a table -> task, corpus, and how the corpus is divided.
PROBES = {
    "digits": ("label", "digits", ("--folds", "speaker")),
    "speakers": ("speaker", "digits", ()),
    "phones": ("phones", "phones", ()),
}


def prepare(root: Path, speech: Path, digits: Path, num_spoken: int) -> None:
    """Prepares the corpus to train on with its targets, and the two to probe on."""
    corpus = root / "speech"
    sslim("prepare", speech, corpus, "--also", digits, done=corpus / "manifest.jsonl")
    sslim("prepare", digits, root / "digits", done=root / "digits" / "manifest.jsonl")
    sslim("prepare", "--synthetic", str(num_spoken), root / "phones", done=root / "phones" / "manifest.jsonl")
    made = corpus / "labels" / LABELS / "digests.json"
    sslim("cluster", corpus, "--mfcc", "--clusters", "100", "--name", LABELS, done=made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speech", type=Path, help="recordings to pre-train on beside the digits")
    parser.add_argument("digits", type=Path, help="Free Spoken Digits")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6.0, help="of training for each model")
    parser.add_argument("--spoken", type=int, default=300, help="utterances of the corpus with exact phones")
    parser.add_argument("--seeds", type=int, default=3, help="of the probes")
    parser.add_argument("--runs", nargs="+", default=tuple(RUNS), choices=tuple(RUNS))
    options = parser.parse_args()
    root: Path = options.output
    root.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    prepare(root, options.speech, options.digits, options.spoken)
    for name in options.runs:
        recipe, *settings = RUNS[name]
        train("pretrain", recipe, root / "speech", *settings, output=root / name, minutes=options.minutes)
        print(f"{name}: {minutes_of(root / name):.1f} minutes", flush=True)
    models = [root / name for name in options.runs]
    for name, (task, corpus, split) in PROBES.items():
        card = root / f"{name}.json"
        settings = ("--corpus", root / corpus, *split, "--seeds", str(options.seeds), "--output", card)
        sslim("probe", task, *models, *settings, done=card)
    print_table(root)


def print_table(root: Path) -> None:
    """Prints the accuracy on test, in per cent, of every row and task."""
    cards = {name: json.loads((root / f"{name}.json").read_text()) for name in PROBES}
    scores = {name: {row["name"]: row for row in card["rows"]} for name, card in cards.items()}
    print("| model | " + " | ".join(PROBES) + " |\n|---|" + "---|" * len(PROBES))
    for model in scores["digits"]:
        cells = []
        for name in PROBES:
            row = scores[name][model]
            cells.append(f"{100 * row['mean']:.1f} ± {100 * row['sd']:.1f}")
        print(f"| {model} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
