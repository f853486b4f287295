"""The compression suite's two YAML files, read as they are: weight, head and row pruning and distillation of MelHuBERTs.

Counterparts: Lin et al., arXiv 2211.09949, and its code Speech-SSL-Compression. The files do not say which of the four they are
for; their keys do. As with the pre-training files every key is known here (``warnup`` is spelt like that) and an unknown one is
an error, and so is what the reference could never run. Where the reference did something else than it meant, the methods here
do what was meant; what that is stands with each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from sslim.compress.heads import HeadPruning
from sslim.compress.rows import RowPruning
from sslim.compress.weight_schedule import PruningSchedule
from sslim.compress.weights import WeightChoice
from sslim.config import ConfigError, nearest
from sslim.models import ModelConfig
from sslim.models.melhubert import HEAD
from sslim.objectives import MaskedPredictionConfig, MaskingConfig
from sslim.objectives.teacher_init import TeacherInitConfig
from sslim.recipes.corpus_batches import DataConfig
from sslim.recipes.melhubert_yaml import (
    DATA_DEFAULTS,
    MODEL_DEFAULTS,
    OPTIMIZER_DEFAULTS,
    REQUIRED,
    RUNNER_DEFAULTS,
    as_number,
    data_of,
    model_of,
    model_section,
    objective_of,
    read_section,
    read_yaml,
    training_of,
)
from sslim.training import TrainerConfig

WEIGHTS, HEADS, ROWS, DISTILLATION = "weight-pruning", "head-pruning", "row-pruning", "distillation"
PRUNE_KEYS: dict[str, dict[str, Any]] = {
    WEIGHTS: {
        "sparsity": REQUIRED, "warnup": REQUIRED, "period": REQUIRED, "n_iters": REQUIRED, "pruning_condition": REQUIRED,
        "strategy": REQUIRED, "converge_loss_tolerance": 0.001, "average_length": 15_000, "smooth_factor": 0.999,
    },
    HEADS: {
        "target": REQUIRED, "metric": REQUIRED, "total_steps": REQUIRED, "interval": REQUIRED, "warm_up": REQUIRED,
        "num_heads_each_step": None, "data_ratio": 1.0, "normalize_by_layer": None, "test_reverse": False,
    },
    ROWS: {"total_steps": REQUIRED, "num_rows_each_step": REQUIRED, "interval": REQUIRED, "warm_up": REQUIRED},
}  # fmt: skip
STRATEGIES: dict[str, Literal["magnitude", "random"]] = {"L1Unstructured": "magnitude", "RandomUnstructured": "random"}
CONDITIONS: dict[str, Literal["converge", "normal"]] = {"converge": "converge", "normal": "normal"}
TARGETS: dict[str, Literal["layer", "model"]] = {"by_layer": "layer", "by_whole": "model"}
METRICS: dict[str, Literal["l1", "data"]] = {"l1": "l1", "data-driven": "data"}
OLD_RUNNER_KEYS = {"save_step": None, "max_keep": None}  # of December 2022
LOSS_KEYS = {"T": REQUIRED, "alpha": REQUIRED, "type": REQUIRED}
LOSS_FRAMES: dict[str, Literal["all", "masked"]] = {"nomasked": "all", "masked": "masked"}


@dataclass(frozen=True, kw_only=True)
class PruneRound:
    """One pruning of a run.

    Attributes:
        step: Updates done before it.
        amount: Sparsity afterwards, heads removed from the whole model, or feed-forward units removed from every layer.
    """

    step: int
    amount: float


@dataclass(frozen=True, kw_only=True)
class WeightRounds:
    """Weight pruning: what ``IterativeWeightPruning`` takes.

    Attributes:
        schedule: The list with its condition. (``max_extensions`` has no counterpart: the reference waits without end.)
        choice: Global, weights and biases, by magnitude or at random.
    """

    kind: Literal["weight-pruning"] = "weight-pruning"
    schedule: PruningSchedule
    choice: WeightChoice

    @property
    def rounds(self) -> tuple[PruneRound, ...]:
        """The prunings, if none is put off."""
        first, period = self.schedule.warm_up, self.schedule.period
        return tuple(PruneRound(step=first + k * period, amount=s) for k, s in enumerate(self.schedule.sparsities))


@dataclass(frozen=True, kw_only=True)
class HeadRounds:
    """Head pruning. The reference starts a new optimiser after every round.

    Attributes:
        rounds: When how many heads go.
        scope: ``layer``: the same number from every layer (``by_layer``); ``model``: the worst of all (``by_whole``), the best
            head of every layer excepted.
        score: ``l1``, or ``data`` (``data-driven``).
        data_share: Share of the training batches that the score looks at (``data_ratio``).
        normalize: Scores of a layer are divided by their norm of this order (``normalize_by_layer``); None leaves them. The
            reference does so to data scores only.
    """

    kind: Literal["head-pruning"] = "head-pruning"
    rounds: tuple[PruneRound, ...]
    scope: Literal["layer", "model"]
    score: Literal["l1", "data"]
    data_share: float = 1.0
    normalize: float | None = None

    def settings(self, config: ModelConfig, number: int) -> HeadPruning:
        """Returns the settings of a round, by its number from 0, for the model as it is then.

        Raises:
            ValueError: The same number is to go from every layer, and layers have different numbers of heads.
        """
        counts = [block.num_heads for block in config.transformer.blocks]
        amount = round(self.rounds[number].amount)
        left = sum(counts) - amount
        if self.scope == "layer":
            left = _equal(counts, "attention heads") - amount // len(counts)
        return HeadPruning(num_kept=left, scope=self.scope, score=self.score, normalize=self.normalize)


@dataclass(frozen=True, kw_only=True)
class RowRounds:
    """Row pruning: units of every layer, by L1 norm. The reference starts a new optimiser after every round.

    Attributes:
        rounds: When how many units of every layer go.
    """

    kind: Literal["row-pruning"] = "row-pruning"
    rounds: tuple[PruneRound, ...]

    def settings(self, config: ModelConfig, number: int) -> RowPruning:
        """Returns the settings of a round, by its number from 0, for the model as it is then.

        Raises:
            ValueError: Layers have different widths.
        """
        width = _equal([block.feedforward_dim for block in config.transformer.blocks], "feed-forward units")
        return RowPruning(num_kept=width - round(self.rounds[number].amount), scope="uniform", score="l1")


@dataclass(frozen=True, kw_only=True)
class LogitDistillation:
    """Distillation of the teacher's cluster probabilities: ``alpha * KL(teacher || student) + (1 - alpha) * CE(labels)``.

    Attributes:
        teacher: Architecture of the teacher; the model named at the command line counts.
        temperature: Both sets of logits are divided by it (``T``); the divergence is not multiplied by its square.
        alpha: Weight of the divergence (``alpha``).
        frames: ``all``: nothing is hidden, all real frames count (``nomasked``); ``masked``: teacher and student see the same
            hidden frames and these count (``type``).
        masking: How frames are hidden, by the teacher's settings; None hides none.
        mask_at: Where.
        init: What the student takes over (``initial_from_teacher``: positions and first layers); None starts it at random.
    """

    kind: Literal["distillation"] = "distillation"
    teacher: ModelConfig
    temperature: float
    alpha: float
    frames: Literal["all", "masked"]
    masking: MaskingConfig | None
    mask_at: Literal["features", "projection"] = "features"
    init: TeacherInitConfig | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0.0 or not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"T is {self.temperature} and alpha {self.alpha}; expected T above 0 and alpha from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class CompressionRecipe:
    """What the two files ask for.

    Attributes:
        name: Short name.
        about: Where it comes from.
        method: What is done; its ``kind`` is the reference's mode.
        model: Architecture before compression, or the student's. Pruning starts from a checkpoint; its own architecture counts.
        objective: What the model goes on learning; with distillation, what its labels are used for.
        training: Optimiser, schedule, updates of the whole run.
        data: Batches.
        sets: The CSV files that ``datarc.sets`` names.
    """

    name: str
    about: str
    method: WeightRounds | HeadRounds | RowRounds | LogitDistillation
    model: ModelConfig
    objective: MaskedPredictionConfig
    training: TrainerConfig
    data: DataConfig
    sets: tuple[str, ...]

    @property
    def segments(self) -> tuple[int, ...]:
        """Updates before the first pruning, between prunings and after the last one; empty for distillation."""
        if isinstance(self.method, LogitDistillation):
            return ()
        assert self.training.total_steps is not None
        ends = [0, *(each.step for each in self.method.rounds), self.training.total_steps]
        return tuple(b - a for a, b in pairwise(ends))


def read_compression_yaml(model_config: Path, runner_config: Path) -> CompressionRecipe:
    """Reads the reference's two files.

    Raises:
        ConfigError: Not YAML, an unknown or missing section or key, or a setting that the reference could never run.
    """
    model_path, runner_path = Path(model_config), Path(runner_config)
    model_file, runner_file = read_yaml(model_path), read_yaml(runner_path)
    mode, section = _mode(model_file, runner_file, runner_path), model_section(model_file)
    distils = mode == DISTILLATION
    _check_sections(model_file, {section, "task", *(("teacher", "loss_param") if distils else ())}, model_path)
    _check_sections(runner_file, {"runner", "optimizer", "datarc", *(() if distils else ("prune",))}, runner_path)
    own = {"initial_from_teacher": False} if distils else {}
    m = read_section(model_file, section, {**MODEL_DEFAULTS, **own}, model_path)
    task = read_section(model_file, "task", {"sequence_length": None}, model_path) if "task" in model_file else {}
    runner = read_section(runner_file, "runner", {**RUNNER_DEFAULTS, **OLD_RUNNER_KEYS}, runner_path)
    optimizer = read_section(runner_file, "optimizer", OPTIMIZER_DEFAULTS, runner_path)
    data = read_section(runner_file, "datarc", DATA_DEFAULTS, runner_path)
    model, training = model_of(m, model_path), training_of(runner, optimizer, int(data["num_workers"]))
    training = _saving(training, runner_file["runner"], runner_path)
    return CompressionRecipe(
        name=f"{mode}-yaml",
        about=f"{mode} as configured in {model_path.name} and {runner_path.name}",
        method=(
            _distillation(model_file, m, model, model_path)
            if distils
            else _pruning(mode, runner_file, training, model, runner_path)
        ),
        model=model,
        objective=objective_of(m),
        training=training,
        data=data_of(data, task, model.projection.feature_dim),
        sets=tuple(str(path) for path in data["sets"]),
    )


def _saving(training: TrainerConfig, runner: dict[str, Any], source: Path) -> TrainerConfig:
    """The pruning files leave out ``save_every_x_epochs``: checkpoints are then written by step."""
    if "save_every_x_epochs" in runner:
        return training
    training = replace(training, save_every_epochs=None)
    if "save_step" in runner:
        training = replace(training, save_every=_count(runner, "save_step", source))
    if "max_keep" in runner:
        training = replace(training, keep_checkpoints=_count(runner, "max_keep", source))
    return training


def _mode(model_file: dict[str, Any], runner_file: dict[str, Any], source: Path) -> str:
    """Tells the mode, which the reference is told at the command line."""
    if "teacher" in model_file or "loss_param" in model_file:
        return DISTILLATION
    prune = runner_file.get("prune")
    if not isinstance(prune, dict):
        raise ConfigError(f"{source} has no section 'prune', and the model file no teacher: they compress nothing")
    telling = {"sparsity": WEIGHTS, "metric": HEADS, "target": HEADS, "num_rows_each_step": ROWS}
    found = {mode for key, mode in telling.items() if key in prune}
    if len(found) != 1:
        raise ConfigError(
            f"{source}: the keys {', '.join(map(str, prune)) or 'none'} of section 'prune' are those of "
            f"{' and '.join(sorted(found)) or 'no method'}; expected one of {', '.join(PRUNE_KEYS)}"
        )
    return found.pop()


def _check_sections(values: dict[str, Any], known: set[str], source: Path) -> None:
    for name in values:
        if name not in known:
            raise ConfigError(f"{source} has the unknown section {name!r}{nearest(str(name), sorted(known))}")


def _chosen(values: dict[str, Any], key: str, names: dict[str, Any], source: Path) -> Any:
    found = values[key]
    if not isinstance(found, str) or found not in names:
        raise ConfigError(f"{source}: {key} is {found!r}, expected {' or '.join(names)}{nearest(str(found), names)}")
    return names[found]


def _count(values: dict[str, Any], key: str, source: Path) -> int:
    value = as_number(values[key], key)
    if value != int(value) or value < 1:
        raise ConfigError(f"{source}: {key} is {values[key]!r}, expected a whole number from 1")
    return int(value)


def _pruning(
    mode: str, runner_file: dict[str, Any], training: TrainerConfig, model: ModelConfig, source: Path
) -> WeightRounds | HeadRounds | RowRounds:
    prune = read_section(runner_file, "prune", PRUNE_KEYS[mode], source)
    if training.total_steps is None:
        raise ConfigError(f"{source}: n_epochs is {training.epochs}, but prunings are counted in updates: set total_steps")
    if mode == WEIGHTS:
        return _weight_rounds(prune, training.total_steps, source)
    steps = _prune_steps(prune, training.total_steps, source)
    return (_head_rounds if mode == HEADS else _row_rounds)(prune, steps, model, source)


def _weight_rounds(prune: dict[str, Any], total_steps: int, source: Path) -> WeightRounds:
    count, listed = _count(prune, "n_iters", source), prune["sparsity"]
    if not isinstance(listed, list):
        target = as_number(listed, "sparsity")
        listed = [target * (k + 1) / count for k in range(count)]
    if len(listed) != count:
        raise ConfigError(f"{source}: sparsity lists {len(listed)} values and n_iters is {count}; they must agree")
    warm_up, period = _count(prune, "warnup", source), _count(prune, "period", source)
    last = warm_up + (count - 1) * period
    _check_end(last, total_steps, source)
    settings: dict[str, Any] = {
        "sparsities": tuple(as_number(value, "sparsity") for value in listed),
        "warm_up": warm_up,
        "period": period,
        "condition": _chosen(prune, "pruning_condition", CONDITIONS, source),
        "tolerance": as_number(prune["converge_loss_tolerance"], "converge_loss_tolerance"),
        "average_length": _count(prune, "average_length", source),
        "smooth_factor": as_number(prune["smooth_factor"], "smooth_factor"),
        "recovery_steps": total_steps - last,
    }
    score = _chosen(prune, "strategy", STRATEGIES, source)
    try:
        schedule = PruningSchedule(**settings)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error
    return WeightRounds(schedule=schedule, choice=WeightChoice(scope="global", score=score, biases=True))


def _prune_steps(prune: dict[str, Any], total_steps: int, source: Path) -> tuple[int, ...]:
    count, warm_up, interval = _count(prune, "total_steps", source), _count(prune, "warm_up", source), prune["interval"]
    offsets = interval if isinstance(interval, list) else [k * _count(prune, "interval", source) for k in range(count)]
    if len(offsets) != count:
        raise ConfigError(f"{source}: interval lists {len(offsets)} prunings and total_steps is {count}; they must agree")
    steps = tuple(warm_up + int(as_number(offset, "interval")) for offset in offsets)
    if any(a >= b for a, b in pairwise(steps)) or steps[0] < warm_up:
        raise ConfigError(f"{source}: interval is {interval}, expected rising numbers from 0")
    _check_end(steps[-1], total_steps, source)
    return steps


def _check_end(last: int, total_steps: int, source: Path) -> None:
    if last > total_steps:
        raise ConfigError(f"{source}: the last pruning comes after update {last}, the run ends with {total_steps}")


def _head_rounds(prune: dict[str, Any], steps: tuple[int, ...], model: ModelConfig, source: Path) -> HeadRounds:
    scope, score = _chosen(prune, "target", TARGETS, source), _chosen(prune, "metric", METRICS, source)
    if prune["test_reverse"] is not False:
        raise ConfigError(f"{source}: test_reverse is {prune['test_reverse']!r}; only False, heads of little worth go first")
    blocks = model.transformer.blocks
    each = len(blocks)  # what the reference always takes with l1
    if score == "data":
        if prune["num_heads_each_step"] is None:
            raise ConfigError(f"{source}: metric data-driven lacks the key 'num_heads_each_step'")
        each = _count(prune, "num_heads_each_step", source)
    if scope == "layer" and each != len(blocks):
        raise ConfigError(f"{source}: num_heads_each_step is {each}; by_layer takes one of each of {len(blocks)} layers")
    heads, gone = sum(block.num_heads for block in blocks), each * len(steps)
    if gone > heads - len(blocks):
        raise ConfigError(f"{source}: {len(steps)} prunings of {each} leave {heads - gone} of {heads} heads; a layer needs one")
    share, normalize = as_number(prune["data_ratio"], "data_ratio"), prune["normalize_by_layer"]
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"{source}: data_ratio is {share:g}, expected a share above 0 up to 1")
    return HeadRounds(
        rounds=tuple(PruneRound(step=step, amount=each) for step in steps),
        scope=scope,
        score=score,
        data_share=share,
        normalize=None if normalize is None or score == "l1" else as_number(normalize, "normalize_by_layer"),
    )


def _row_rounds(prune: dict[str, Any], steps: tuple[int, ...], model: ModelConfig, source: Path) -> RowRounds:
    each, width = _count(prune, "num_rows_each_step", source), model.transformer.blocks[0].feedforward_dim
    if each * len(steps) >= width:
        raise ConfigError(f"{source}: {len(steps)} prunings of {each} rows leave none of {width}")
    return RowRounds(rounds=tuple(PruneRound(step=step, amount=each) for step in steps))


def _distillation(model_file: dict[str, Any], student: dict[str, Any], model: ModelConfig, source: Path) -> LogitDistillation:
    t = read_section(model_file, "teacher", MODEL_DEFAULTS, source)
    loss = read_section(model_file, "loss_param", LOSS_KEYS, source)
    teacher, seen = model_of(t, source), objective_of(t)
    for what, ours, theirs in (
        ("feat_emb_dim", model.projection.feature_dim, teacher.projection.feature_dim),
        ("num_cluster", model.heads[HEAD], teacher.heads[HEAD]),
    ):
        if ours != theirs:
            raise ConfigError(f"{source}: {what} of student ({student[what]}) and teacher ({t[what]}) differ; they must agree")
    frames, depth = _chosen(loss, "type", LOSS_FRAMES, source), len(model.transformer.blocks)
    takes_over = student["initial_from_teacher"]
    if not isinstance(takes_over, bool):
        raise ConfigError(f"{source}: initial_from_teacher is {takes_over!r}, expected True or False")
    if takes_over and depth > len(teacher.transformer.blocks):
        found = len(teacher.transformer.blocks)
        raise ConfigError(f"{source}: the student has {depth} layers, its teacher {found} to start from")
    temperature, alpha = as_number(loss["T"], "T"), as_number(loss["alpha"], "alpha")
    try:
        return LogitDistillation(
            teacher=teacher,
            temperature=temperature,
            alpha=alpha,
            frames=frames,
            masking=seen.masking if frames == "masked" else None,
            mask_at=seen.mask_at,
            init=TeacherInitConfig(layers=tuple(range(1, depth + 1)), projection=False) if takes_over else None,
        )
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error


def _equal(counts: list[int], what: str) -> int:
    if len(set(counts)) != 1:
        raise ValueError(f"layers have {counts} {what}; the same number from every layer needs layers that are alike")
    return counts[0]
