"""Every compression method at a half and a quarter of the parameters, on real speech: accuracy, size, MACs, measured latency.

Starts from the teacher that ``students.py`` makes (a small MelHuBERT). Every method gets the same minutes of training after (or
while) it cuts, for three seeds; all results are probed on digits of speakers that the probe never heard, and timed against the
teacher in turns. Every step is a command of ``sslim`` and is printed; interrupted runs go on. Usage, from the project's root:
``python benchmarks/experiments/compression.py runs/students --output runs/compression``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HALF, QUARTER = 0.5, 0.25
QUANTIZED = ("int8-dynamic", "int8-weights", "bf16")

# Name -> arguments of `sslim compress`, with {params} for the budget in parameters, {speech} for the corpus and {steps} for the
# updates. What cannot reach a size is left out: heads alone leave four fifths of this model, rows alone two fifths.
TRAIN = "--corpus {speech} --recover-steps {steps}"
ROUNDS = "--corpus {speech} --recover-steps {half_steps} --rounds 2"
METHODS: dict[float, dict[str, str]] = {
    HALF: {
        "weights": f"weights {{teacher}} --sparsity {{sparsity}} {ROUNDS}",
        "rows": f"rows {{teacher}} --budget params={{params}} --score data --scope model {TRAIN}",
        "width": f"width {{teacher}} --budget params={{params}} --score data --scope model {TRAIN}",
        "width-l1": f"width {{teacher}} --budget params={{params}} {TRAIN}",
        "low-rank": f"low-rank {{teacher}} --budget params={{params}} {TRAIN}",
        "low-rank-whitened": f"low-rank {{teacher}} --budget params={{params}} --whiten {TRAIN}",
        "depth": f"depth {{teacher}} --num-layers 2 {TRAIN}",
        "sharing": f"sharing {{teacher}} --num-blocks 2 {TRAIN}",
        "gates": "gates {teacher} {speech} --budget params={params} --steps {half_steps} --recover-steps {half_steps}",
    },
    QUARTER: {
        "weights": f"weights {{teacher}} --sparsity {{sparsity}} {ROUNDS}",
        "width": f"width {{teacher}} --budget params={{params}} --score data --scope model {TRAIN}",
        "width-l1": f"width {{teacher}} --budget params={{params}} {TRAIN}",
        "low-rank": f"low-rank {{teacher}} --budget params={{params}} {TRAIN}",
        "low-rank-whitened": f"low-rank {{teacher}} --budget params={{params}} --whiten {TRAIN}",
        "depth": f"depth {{teacher}} --num-layers 1 {TRAIN}",
        "sharing": f"sharing {{teacher}} --num-blocks 1 {TRAIN}",
        "gates": "gates {teacher} {speech} --budget params={params} --steps {half_steps} --recover-steps {half_steps}",
    },
}


def sslim(*arguments: str | Path, done: Path) -> None:
    """Runs one command unless what it makes is there."""
    if done.exists():
        return
    words = [str(word) for word in arguments]
    print("$ sslim", shlex.join(words), flush=True)
    subprocess.run([sys.executable, "-m", "sslim", *words], check=True)


def sizes(model: Path) -> tuple[int, int]:
    """Parameters of a model without heads, and those of its encoder's matrices."""
    from sslim.checkpoints import load_model
    from sslim.compress.weights import prunable_weights

    loaded = load_model(model)
    matrices = sum(tensor.numel() for tensor in prunable_weights(loaded, biases=False).values())
    return loaded.num_parameters(with_heads=False), matrices


def probe(run: Path, digits: Path) -> None:
    """Digits of unseen speakers; one seed of the probe for each seed of the compression."""
    card, settings = run / "digits.json", ("--corpus", digits, "--folds", "speaker", "--seeds", "1", "--no-baselines")
    sslim("probe", "label", run / "model", *settings, "--output", card, done=card)


def run_methods(root: Path, students: Path, seed: int, steps: int) -> None:
    """Compresses with every method, to both sizes, and probes."""
    teacher = students / "teacher"
    total, matrices = sizes(teacher / "model")
    for share, methods in METHODS.items():
        facts = {
            "teacher": teacher,
            "speech": students / "speech",
            "params": f"{total * share:.0f}",
            "sparsity": f"{total * (1 - share) / matrices:.4f}",
            "steps": steps,
            "half_steps": steps // 2,
        }
        for name, line in methods.items():
            run = root / f"{name}-{round(1 / share)}x-seed{seed}"
            settings = ("--seed", str(seed), "--threads", "1", "--learning-rate", "1e-3", "--precision", "bf16")
            sslim("compress", *line.format(**facts).split(), "--output", run, *settings, done=run / "model")
            probe(run, students / "digits")


def finish(root: Path, students: Path) -> None:
    """Quantises the teacher, times one model of every kind against it in turns, and prints the table."""
    for kind in QUANTIZED:
        run = root / kind
        sslim("compress", "quantize", students / "teacher", "--kind", kind, "--output", run, done=run / "model")
        probe(run, students / "digits")
    models = [*sorted(root.glob("*-seed0/model")), *(root / kind / "model" for kind in QUANTIZED)]
    profile, conditions = root / "profile.json", ("--seconds", "10", "--threads", "1", "--repeats", "15")
    sslim("profile", *models, "--baseline", students / "teacher", *conditions, "--output", profile, done=profile)
    rows = json.loads(profile.read_text())["rows"]
    times = {row["model"]: row for row in rows}
    print("| method | accuracy % | parameters M | not zero M | GMAC/s | speed-up predicted / measured | file MB |")
    print("|---|---|---|---|---|---|---|")
    for model in models:
        print(table_row(root, model.parent.name, times[model.parent.name]))


def table_row(root: Path, name: str, timed: dict[str, Any]) -> str:
    """One method: accuracy over all seeds, sizes and time of the first."""
    method = name.removesuffix("-seed0")
    cards = [
        json.loads(card.read_text())["rows"][0] for card in sorted(root.glob(f"{method}*/digits.json")) if is_of(card, method)
    ]
    scores = [100 * score for card in cards for score in card["scores"]]
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    bought = json.loads((root / name / "compression.json").read_text())["rows"][-1]
    sizes_of = [bought[key] / unit for key, unit in (("num_parameters", 1e6), ("num_nonzero", 1e6), ("macs_per_s", 1e9))]
    speed = f"{timed['predicted_speedup']:.2f} / {timed['measured_speedup']:.2f}"
    cells = [method, f"{statistics.mean(scores):.1f}{spread}", *(f"{size:.3f}" for size in sizes_of), speed]
    return "| " + " | ".join([*cells, f"{bought['num_bytes'] / 1e6:.2f}"]) + " |"


def is_of(card: Path, method: str) -> bool:
    """Whether a card's run is of a method: its name without the seed."""
    return card.parent.name.partition("-seed")[0] == method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", type=Path, help="folder of students.py: teacher, speech, digits")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300, help="of training for each method and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument(
        "--unfinished", action="store_true", help="leave the table to another process, which has the other seeds"
    )
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for seed in options.seeds:
        run_methods(options.output, options.students, seed, options.steps)
    if not options.unfinished:
        finish(options.output, options.students)


if __name__ == "__main__":
    main()
