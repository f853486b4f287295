"""Teacher, students and baselines of one size on real speech, in one probe table: two hours on one CPU core.

A small MelHuBERT is pre-trained on two corpora in two stages. Three students of about a million parameters learn from it (two
plain layers; two layers run twice; a subnet of a supernet), each beside the same architecture pre-trained from scratch for the
same time on the targets that the teacher's first stage had. All are probed on digits of speakers that the probe never heard.

Every step is a command of ``sslim`` and is printed; interrupted runs go on. How many steps fit into a run's minutes is found
out by a trial of half a minute, so that the learning rate has fallen to zero when the time is over. Usage, from the project's
root, with a folder of recordings for each corpus: ``python benchmarks/experiments/students.py SPEECH DIGITS --output runs/x``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

SEEDS = "3"
SEARCH = ("--generations", "20", "--utterances", "200")


def sslim(*arguments: str | Path, done: Path | None = None) -> None:
    """Runs one command unless what it makes is there."""
    words = [str(word) for word in arguments]
    if done is not None and done.exists():
        return
    print("$ sslim", shlex.join(words), flush=True)
    subprocess.run([sys.executable, "-m", "sslim", *words], check=True)


def train(*arguments: str | Path, output: Path, minutes: float) -> None:
    """Runs a training command for as many steps as fit into ``minutes``."""
    common = ("--precision", "bf16", "--threads", "1")
    plan = output.with_suffix(".steps")
    if not plan.exists():
        with tempfile.TemporaryDirectory() as folder:
            trial = Path(folder) / "trial"
            trial_settings = ("--steps", "100000", "--minutes", "0.5", *common)
            subprocess.run(
                [sys.executable, "-m", "sslim", *map(str, (*arguments, "--output", trial, *trial_settings))],
                check=False,  # it ends before its steps are done
                capture_output=True,
            )
            records = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
            steps = max(record["step"] for record in records)
        plan.write_text(str(round(2 * steps * minutes)))
    sslim(*arguments, "--output", output, "--steps", plan.read_text(), *common)


def minutes_of(run: Path) -> float:
    """Minutes that a run has trained."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return max(record.get("elapsed_s", 0.0) for record in records) / 60


def write_scratch_recipe(path: Path, model_folder: Path) -> None:
    """Writes the teacher's pre-training recipe with the architecture of a student."""
    from sslim.checkpoints import load_model
    from sslim.config import to_plain
    from sslim.recipes.melhubert import melhubert_mini

    recipe, student = melhubert_mini(), load_model(model_folder).config
    model = replace(student, heads=recipe.model.heads, search_space=None)
    path.write_text(json.dumps(to_plain(replace(recipe, name=path.stem, about="a student's net from scratch", model=model))))


def train_teacher(root: Path, speech: Path, digits: Path, minutes: Sequence[float]) -> None:
    """Prepares both corpora and pre-trains in two stages: on clusters of MFCC, then of the first stage's layer 3."""
    corpus, mfcc, layer3 = root / "speech", "mfcc100", "stage1-l3"
    sslim("prepare", speech, corpus, "--also", digits, done=corpus / "manifest.jsonl")
    sslim("prepare", digits, root / "digits", done=root / "digits" / "manifest.jsonl")
    labels = corpus / "labels"
    sslim("cluster", corpus, "--mfcc", "--clusters", "100", "--name", mfcc, done=labels / mfcc / "digests.json")
    train("pretrain", "melhubert-mini", corpus, "--labels", mfcc, output=root / "stage1", minutes=minutes[0])
    stage1 = ("--model", root / "stage1" / "model", "--layer", "3")
    sslim("cluster", corpus, *stage1, "--name", layer3, done=labels / layer3 / "digests.json")
    start = ("--init-from", root / "stage1")
    train("pretrain", "melhubert-mini", corpus, "--labels", layer3, *start, output=root / "teacher", minutes=minutes[1])


def train_students(root: Path, minutes: float, supernet_minutes: float) -> None:
    """Distils two students and a supernet, takes a subnet of their size out of it, and trains all three nets from scratch."""
    teacher, corpus = root / "teacher", root / "speech"
    for name, recipe in {"plain": "distil-plain-mini", "shared": "distil-shared-mini"}.items():
        train("compress", "distil", recipe, teacher, corpus, output=root / name, minutes=minutes)
    supernet = root / "supernet"
    settings = ("supernet-mini", teacher, corpus, "--stage", "2")
    train("compress", "supernet", *settings, output=supernet, minutes=supernet_minutes)
    search, budget = root / "search", ("--budget", "params=0.95M..1.05M", "--extract", "1")
    sslim("compress", "search", supernet, teacher, corpus, "--output", search, *budget, *SEARCH, done=search / "front-1")
    if not (root / "subnet").exists():
        shutil.copytree(search / "front-1", root / "subnet")
    for name, model, run in (
        ("plain", "plain/model", "plain"),
        ("shared", "shared/model", "shared"),
        ("subnet", "subnet", "supernet"),
    ):
        recipe_file, scratch = root / f"scratch-{name}.json", root / f"scratch-{name}"
        write_scratch_recipe(recipe_file, root / model)
        train("pretrain", recipe_file, corpus, "--labels", "mfcc100", output=scratch, minutes=minutes_of(root / run))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speech", type=Path, help="recordings to pre-train on beside the digits")
    parser.add_argument("digits", type=Path, help="Free Spoken Digits")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stage-minutes", type=float, nargs=2, default=(6.5, 8.5), help="the teacher's two stages")
    parser.add_argument("--minutes", type=float, default=6.0, help="of each student")
    parser.add_argument("--supernet-minutes", type=float, default=15.0)
    options = parser.parse_args()
    root: Path = options.output
    root.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    train_teacher(root, options.speech, options.digits, options.stage_minutes)
    train_students(root, options.minutes, options.supernet_minutes)
    names = ("teacher", "plain", "shared", "subnet", "scratch-plain", "scratch-shared", "scratch-subnet")
    probe, digits = ("--folds", "speaker", "--seeds", SEEDS, "--output"), ("--corpus", root / "digits")
    card = root / "students.json"
    sslim("probe", "label", *(root / name for name in names), *digits, *probe, card, done=card)
    front, card = root / "front", root / "front.json"
    latency = ("--algorithm", "pareto", "--front", "latency_ms", "--extract", "6", "--threads", "1")
    sslim(
        "compress",
        "search",
        root / "supernet",
        root / "teacher",
        root / "speech",
        "--output",
        front,
        *latency,
        *SEARCH,
        done=front / "front-6",
    )
    models = [root / "teacher", *sorted(front.glob("front-*"))]
    sslim("probe", "label", *models, *digits, "--no-baselines", *probe, card, done=card)


if __name__ == "__main__":
    main()
