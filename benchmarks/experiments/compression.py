"""Every compression method at a half and a quarter of the parameters, on real speech: accuracy, size, MACs, measured latency.

Starts from the teacher that ``students.py`` makes (a small MelHuBERT). Every method gets the same minutes of training after (or
while) it cuts, for three seeds; all results are probed on digits of speakers that the probe never heard, and timed against the
teacher in turns. Every step is a command of ``sslim`` and is printed; interrupted runs go on. Usage, from the project's root:
``python benchmarks/experiments/compression.py runs/students --output runs/compression``. With ``--supernet FOLDER`` there is a
row of the best subnet that a search of this supernet finds within each size, distilled for as many steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from students import SEARCH
from timed_runs import sslim

HALF, QUARTER = 0.5, 0.25
QUANTIZED = ("int8-dynamic", "int8-weights", "bf16")

# Name -> arguments of `sslim compress`, with {params} for the budget in parameters, {speech} for the corpus, {steps} for the
# updates and {student} for a recipe of that size (write_student). What cannot reach a size is left out: heads alone leave four
# fifths of this model, rows alone two fifths.
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
        "distil": "distil {student} {teacher} {speech} --steps {steps}",
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
        "distil": "distil {student} {teacher} {speech} --steps {steps}",
    },
}
SUPERNET = "distil {subnet} {teacher} {speech} --loss dp-hubert --steps {steps}"


def sizes(model: Path) -> tuple[int, int]:
    """Parameters of a model without heads, and those of its encoder's matrices."""
    from sslim.checkpoints import load_model
    from sslim.compress.weights import prunable_weights

    loaded = load_model(model)
    matrices = sum(tensor.numel() for tensor in prunable_weights(loaded, biases=False).values())
    return loaded.num_parameters(with_heads=False), matrices


def write_student(path: Path, teacher: Path, params: int) -> None:
    """Writes the recipe distil-plain-mini with as many layers as the parameters allow.

    All but the last are the teacher's own to start with. The last one is as wide as what is left, and starts at random.
    """
    from sslim.checkpoints import load_model
    from sslim.config import to_plain
    from sslim.models.elastic import count_parameters
    from sslim.recipes.distil_losses import LayerChoice, with_layers
    from sslim.recipes.distil_recipes import distil_plain_mini

    recipe, whole = distil_plain_mini(), load_model(teacher / "model").config
    for depth in range(whole.transformer.num_layers, 0, -1):
        *others, last = whole.transformer.blocks[:depth]
        encoder = replace(whole.transformer, blocks=(*others, last), depth_map=tuple(range(depth)))
        over = count_parameters(replace(recipe.model, encoder=encoder), with_heads=False) - params
        width = last.feedforward_dim - max(0, -(-over // (2 * encoder.dim + 1)))
        if width >= encoder.dim:
            break
    encoder = replace(encoder, blocks=(*others, replace(last, feedforward_dim=width)))
    layers = tuple(range(1, depth + 1))
    apart = whole.transformer.num_layers // depth
    model = replace(recipe.model, encoder=encoder)
    pairs = LayerChoice(student=layers, teacher=tuple(layer * apart for layer in layers))
    starts = tuple((layer - 1) * apart + 1 for layer in layers[:-1])
    student = replace(
        recipe,
        name=path.stem,
        model=model,
        objective=with_layers(recipe.objective, pairs, model, whole),
        init=replace(recipe.init, layers=(*starts, 0)),  # type: ignore[type-var]
    )
    path.write_text(json.dumps(to_plain(student)))


def subnet_within(root: Path, students: Path, supernet: Path, params: int, times: int) -> Path:
    """Returns the model folder of the best subnet of that many parameters at most, searched for once."""
    folder = root / f"search-{times}x"
    budget = ("--budget", f"params={params}", "--extract", "1")
    search = ("compress", "search", supernet, students / "teacher", students / "speech", "--output", folder)
    sslim(*search, *budget, *SEARCH, done=folder / "front-1")
    return folder / "front-1"


def probe(run: Path, digits: Path) -> None:
    """Digits of unseen speakers; one seed of the probe for each seed of the compression."""
    card, settings = run / "digits.json", ("--corpus", digits, "--folds", "speaker", "--seeds", "1", "--no-baselines")
    sslim("probe", "label", run / "model", *settings, "--output", card, done=card)


def run_methods(root: Path, students: Path, supernet: Path | None, seed: int, steps: int) -> None:
    """Compresses with every method, to both sizes, and probes."""
    teacher = students / "teacher"
    total, matrices = sizes(teacher / "model")
    root.mkdir(parents=True, exist_ok=True)
    for share, methods in METHODS.items():
        times, params = round(1 / share), round(total * share)
        student, lines = root / f"student-{times}x.json", dict(methods)
        write_student(student, teacher, params)
        if supernet is not None:
            lines["supernet"] = SUPERNET
        facts = {
            "teacher": teacher,
            "student": student,
            "subnet": "" if supernet is None else subnet_within(root, students, supernet, params, times),
            "speech": students / "speech",
            "params": params,
            "sparsity": f"{total * (1 - share) / matrices:.4f}",
            "steps": steps,
            "half_steps": steps // 2,
        }
        for name, line in lines.items():
            run = root / f"{name}-{times}x-seed{seed}"
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
    from sslim.checkpoints import load_model
    from sslim.profiling import Conditions
    from sslim.recipes.compression_table import row_of

    method = name.removesuffix("-seed0")
    cards = [
        json.loads(card.read_text())["rows"][0] for card in sorted(root.glob(f"{method}*/digits.json")) if is_of(card, method)
    ]
    scores = [100 * score for card in cards for score in card["scores"]]
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    bought = row_of(name, load_model(root / name / "model"), Conditions())
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
    parser.add_argument("--supernet", type=Path, help="run of `sslim compress supernet`, or its model folder")
    parser.add_argument("--steps", type=int, default=300, help="of training for each method and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument(
        "--unfinished", action="store_true", help="leave the table to another process, which has the other seeds"
    )
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for seed in options.seeds:
        run_methods(options.output, options.students, options.supernet, seed, options.steps)
    if not options.unfinished:
        finish(options.output, options.students)


if __name__ == "__main__":
    main()
