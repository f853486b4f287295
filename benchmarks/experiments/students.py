"""Teacher, students and baselines of one size on real speech, in one probe table: three hours on one CPU core.

A small MelHuBERT is pre-trained on two corpora, on clusters of MFCC, and a supernet on what that gives. Two students of about a
million parameters (two plain layers; two layers run twice) learn from the whole supernet, which is a better teacher than its
own; the third is the supernet's best subnet of that size, as it is. Each stands beside the same net pre-trained from scratch on
the first teacher's targets for as many minutes as the student, or the supernet, was trained. All are probed on digits of
speakers that the probe never heard.

Every step is a command of ``sslim`` and is printed; interrupted runs go on. How many steps fit into a run's minutes is found
out by a trial of half a minute, so that the learning rate has fallen to zero when the time is over. Usage, from the project's
root, with a folder of recordings for each corpus: ``python benchmarks/experiments/students.py SPEECH DIGITS --output runs/x``.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from timed_runs import minutes_of, sslim, train

SEEDS, LABELS = "3", "mfcc100"
SEARCH = ("--generations", "20", "--utterances", "200")


def write_scratch_recipe(path: Path, model_folder: Path) -> None:
    """Writes the teacher's pre-training recipe with the architecture of a student."""
    from sslim.checkpoints import load_model
    from sslim.config import to_plain
    from sslim.recipes.melhubert import melhubert_mini

    recipe, student = melhubert_mini(), load_model(model_folder).config
    model = replace(student, heads=recipe.model.heads, search_space=None)
    path.write_text(json.dumps(to_plain(replace(recipe, name=path.stem, about="a student's net from scratch", model=model))))


def train_teacher(root: Path, speech: Path, digits: Path, minutes: float) -> None:
    """Prepares both corpora and pre-trains on clusters of MFCC."""
    corpus = root / "speech"
    sslim("prepare", speech, corpus, "--also", digits, done=corpus / "manifest.jsonl")
    sslim("prepare", digits, root / "digits", done=root / "digits" / "manifest.jsonl")
    made = corpus / "labels" / LABELS / "digests.json"
    sslim("cluster", corpus, "--mfcc", "--clusters", "100", "--name", LABELS, done=made)
    train("pretrain", "melhubert-mini", corpus, "--labels", LABELS, output=root / "teacher", minutes=minutes)


def train_supernet(root: Path, minutes: float) -> None:
    """Trains a supernet on the teacher; its whole net and its best subnet of a million parameters become models."""
    supernet, whole, search = root / "supernet", root / "whole", root / "search"
    settings = ("supernet-mini", root / "teacher", root / "speech", "--stage", "2")
    train("compress", "supernet", *settings, output=supernet, minutes=minutes)
    sslim("compress", "extract", supernet, "--subnet", "max", "--output", whole, done=whole / "model.json")
    common = (supernet, root / "teacher", root / "speech", "--output", search)
    budget = ("--budget", "params=0.95M..1.05M", "--extract", "1")
    sslim("compress", "search", *common, *budget, *SEARCH, done=search / "front-1")


def train_students(root: Path, minutes: float, trainings: int) -> list[Path]:
    """Distils two students from the whole supernet, and trains all three nets from scratch for as long as their rivals."""
    corpus, made = root / "speech", []
    rivals = {"plain": root / "plain-0", "shared": root / "shared-0", "subnet": root / "search" / "front-1"}
    for seed in map(str, range(trainings)):
        for name, model in rivals.items():
            run, scratch, recipe = root / f"{name}-{seed}", root / f"scratch-{name}-{seed}", root / f"scratch-{name}.json"
            if name == "subnet":
                minutes_here, described = minutes_of(root / "supernet"), model
            else:
                settings = (f"distil-{name}-mini", root / "whole", corpus, "--seed", seed)
                train("compress", "distil", *settings, output=run, minutes=minutes)
                minutes_here, described = minutes_of(run), model / "model"
                made.append(run)
            write_scratch_recipe(recipe, described)
            settings = (recipe, corpus, "--labels", LABELS, "--seed", seed)
            train("pretrain", *settings, output=scratch, minutes=minutes_here)
            made.append(scratch)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speech", type=Path, help="recordings to pre-train on beside the digits")
    parser.add_argument("digits", type=Path, help="Free Spoken Digits")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--teacher-minutes", type=float, default=20.0)
    parser.add_argument("--minutes", type=float, default=6.0, help="of each student")
    parser.add_argument("--supernet-minutes", type=float, default=15.0)
    parser.add_argument("--trainings", type=int, default=2, help="of each student and of each net from scratch")
    options = parser.parse_args()
    root: Path = options.output
    root.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    train_teacher(root, options.speech, options.digits, options.teacher_minutes)
    train_supernet(root, options.supernet_minutes)
    students = train_students(root, options.minutes, options.trainings)
    probe, digits = ("--folds", "speaker", "--seeds", SEEDS, "--output"), ("--corpus", root / "digits")
    card = root / "students.json"
    models = [root / "teacher", root / "whole", root / "search" / "front-1", *students]
    sslim("probe", "label", *models, *digits, *probe, card, done=card)
    front, card = root / "front", root / "front.json"
    latency = ("--algorithm", "pareto", "--front", "latency_ms", "--extract", "6", "--threads", "1")
    common = (root / "supernet", root / "teacher", root / "speech", "--output", front)
    sslim("compress", "search", *common, *latency, *SEARCH, done=front / "front-6")
    models = [root / "teacher", *sorted(front.glob("front-*"))]
    sslim("probe", "label", *models, *digits, "--no-baselines", *probe, card, done=card)


if __name__ == "__main__":
    main()
