"""Teacher, students and baselines of one size on real speech, in one probe table: three hours on one CPU core.

A small MelHuBERT is pre-trained on two corpora, on clusters of MFCC. Three students of about a million parameters learn from it
(two plain layers; two layers run twice; the best subnet of a supernet, trained on for as long), each beside the same net
pre-trained from scratch for the same time on the teacher's own targets, all with several seeds. All are probed on digits of
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
HIDDEN = ("--set", 'objective.masking={"probability":0.4,"span_length":5}')  # as in the recipes of the other two students


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


def train_supernet(root: Path, minutes: float) -> tuple[str, ...]:
    """Trains a supernet on the teacher, takes its best subnet of a million parameters, and returns how that is trained on."""
    supernet, search, budget = root / "supernet", root / "search", ("--budget", "params=0.95M..1.05M", "--extract", "1")
    settings = ("supernet-mini", root / "teacher", root / "speech", "--stage", "2")
    train("compress", "supernet", *settings, output=supernet, minutes=minutes)
    common = (supernet, root / "teacher", root / "speech", "--output", search)
    sslim("compress", "search", *common, *budget, *SEARCH, done=search / "front-1")
    depths = json.loads((search / "front-1" / "model.json").read_text())["config"]["encoder"]["depth_map"]
    return ("--loss", "distil-alhubert", "--layers", f"{len(depths)}:4", "--learning-rate", "1e-3", "--batch-s", "30", *HIDDEN)


def train_students(root: Path, minutes: float, supernet_minutes: float, trainings: int) -> list[Path]:
    """Distils two students and the best subnet of a supernet, and trains all three nets from scratch, each several times."""
    teacher, corpus, made = root / "teacher", root / "speech", []
    further = train_supernet(root, supernet_minutes)
    students = {
        "plain": ("distil-plain-mini",),
        "shared": ("distil-shared-mini",),
        "subnet": (root / "search" / "front-1", *further),
    }
    for seed in range(trainings):
        for name, (student, *settings) in students.items():
            run, scratch, recipe = root / f"{name}-{seed}", root / f"scratch-{name}-{seed}", root / f"scratch-{name}.json"
            same = ("--seed", str(seed))
            train("compress", "distil", student, teacher, corpus, *settings, *same, output=run, minutes=minutes)
            write_scratch_recipe(recipe, run / "model")
            train("pretrain", recipe, corpus, "--labels", LABELS, *same, output=scratch, minutes=minutes_of(run))
            made += [run, scratch]
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
    students = train_students(root, options.minutes, options.supernet_minutes, options.trainings)
    probe, digits = ("--folds", "speaker", "--seeds", SEEDS, "--output"), ("--corpus", root / "digits")
    card = root / "students.json"
    sslim("probe", "label", root / "teacher", root / "search" / "front-1", *students, *digits, *probe, card, done=card)
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
