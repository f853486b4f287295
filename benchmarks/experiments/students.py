"""Teacher, students and baselines of one size on real speech, in one probe table: two hours on one CPU core.

A small MelHuBERT is pre-trained on two corpora in two stages. Three students of about a million parameters learn from it (two plain
layers; two layers run twice; a subnet of a supernet), each beside the same architecture pre-trained from scratch for the same
time on the targets that the teacher's first stage had. All are probed on digits of speakers that the probe never heard.

Every step is a command of ``sslim`` and is printed; interrupted runs go on. How many steps fit into a run's minutes is found out by
a trial of half a minute, so that the learning rate has fallen to zero when the time is over. Usage, from the project's root, with
recordings (a folder per corpus) at hand: ``python benchmarks/experiments/students.py SPEECH DIGITS --output runs/students``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

SEEDS = "3"


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


def write_scratch_recipe(path: Path, model_folder: Path) -> None:
    """Writes the teacher's pre-training recipe with the architecture of a student."""
    from sslim.checkpoints import load_model
    from sslim.config import to_plain
    from sslim.recipes.melhubert import melhubert_mini

    recipe, student = melhubert_mini(), load_model(model_folder).config
    model = replace(student, heads={}, family=recipe.model.family)
    path.write_text(json.dumps(to_plain(replace(recipe, name=path.stem, about="a student's net from scratch", model=model))))


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
    speech, digits, teacher = root / "speech", root / "digits", root / "teacher"
    first, second = options.stage_minutes
    sslim("prepare", options.speech, speech, "--also", options.digits, done=speech / "manifest.jsonl")
    sslim("prepare", options.digits, digits, done=digits / "manifest.jsonl")
    sslim("cluster", speech, "--mfcc", "--clusters", "100", "--name", "mfcc100", done=speech / "labels/mfcc100/digests.json")
    train("pretrain", "melhubert-mini", speech, "--labels", "mfcc100", output=root / "stage1", minutes=first)
    stage1 = root / "stage1" / "model"
    sslim(
        "cluster",
        speech,
        "--model",
        stage1,
        "--layer",
        "3",
        "--name",
        "stage1-l3",
        done=speech / "labels/stage1-l3/digests.json",
    )
    start = ("--init-from", root / "stage1")
    train("pretrain", "melhubert-mini", speech, "--labels", "stage1-l3", *start, output=teacher, minutes=second)

    students = {"plain": "distil-plain-mini", "shared": "distil-shared-mini"}
    for name, recipe in students.items():
        train("compress", "distil", recipe, teacher, speech, output=root / name, minutes=options.minutes)
    train(
        "compress", "supernet", "supernet-mini", teacher, speech, "--stage", "2",
        output=root / "supernet", minutes=options.supernet_minutes,
    )  # fmt: skip
    settings = ("--generations", "20", "--utterances", "200")
    sslim(
        "compress", "search", root / "supernet", teacher, speech, "--output", root / "front", "--algorithm", "pareto",
        "--front", "latency_ms", "--extract", "6", "--threads", "1", *settings, done=root / "front" / "front-6",
    )  # fmt: skip
    sslim(
        "compress", "search", root / "supernet", teacher, speech, "--output", root / "search", "--budget", "params=0.95M..1.05M",
        "--extract", "1", *settings, done=root / "search" / "front-1",
    )  # fmt: skip
    subnet = root / "search" / "front-1"
    for name, folder, minutes in (
        ("plain", root / "plain" / "model", options.minutes),
        ("shared", root / "shared" / "model", options.minutes),
        ("subnet", subnet, options.supernet_minutes),
    ):
        recipe_file, run = root / f"scratch-{name}.json", root / f"scratch-{name}"
        write_scratch_recipe(recipe_file, folder)
        train("pretrain", recipe_file, speech, "--labels", "mfcc100", output=run, minutes=minutes)
    models = [root / name for name in ("teacher", "plain", "shared")] + [subnet]
    models += [root / f"scratch-{name}" for name in ("plain", "shared", "subnet")]
    models += sorted((root / "front").glob("front-*"))
    sslim(
        "probe", "label", *models, "--corpus", digits, "--folds", "speaker", "--seeds", SEEDS, "--output", root / "digits.json"
    )


if __name__ == "__main__":
    main()
