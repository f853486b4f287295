"""The compression suite's YAML files: what the shipped settings mean here, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sslim.compress.heads import HeadPruning
from sslim.compress.rows import RowPruning
from sslim.config import ConfigError, from_plain, to_plain
from sslim.models.elastic import count_parameters
from sslim.models.melhubert import melhubert, melhubert_frontend
from sslim.objectives.teacher_init import TeacherInitConfig
from sslim.recipes.compression_yaml import (
    CompressionRecipe,
    HeadRounds,
    LogitDistillation,
    PruneRound,
    RowRounds,
    WeightRounds,
    read_compression_yaml,
)
from sslim.recipes.melhubert_yaml import read_melhubert_yaml

ARCHITECTURE = """
  feat_emb_dim: 80
  pos_emb_type: conv
  pos_conv_depth: 1
  conv_pos: 128
  conv_pos_groups: 16
  encoder_layers: {layers}
  encoder_embed_dim: 768
  encoder_ffn_embed_dim: 3072
  encoder_attention_heads: 12
  activation_fn: gelu
  layer_norm_first: False
  attention_type: original
  num_cluster: 512
  skip_masked: False
  skip_nomask: {skip_nomask}
  mask_prob: 0.70
  mask_length: 5
  mask_selection: 'static'
  mask_other: 0.0
  no_mask_overlap: False
  mask_min_space: 1
  learnable_mask_emb: False
  mask_before_proj: True
  dropout: 0.1
  attention_dropout: 0.1
  activation_dropout: 0.1
  encoder_layerdrop: 0.0
"""
MODEL = f"""
melhubert:{ARCHITECTURE.format(layers=12, skip_nomask=True)}
  pred_masked_weight: 1.0
  pred_nomask_weight: 0.0
task:
  sequence_length: 750
"""
DISTILLATION_MODEL = f"""
melhubert:
  initial_from_teacher: False{ARCHITECTURE.format(layers=6, skip_nomask=False)}
teacher:{ARCHITECTURE.format(layers=12, skip_nomask=False)}
task:
  sequence_length: 750
loss_param:
  T: 1
  alpha: 1
  type: nomasked
"""
RUNNER = """
runner:
  n_epochs: {epochs}
  total_steps: {steps}
  gradient_clipping: 10.0
  gradient_accumulate_steps: {accumulate}
  log_step: 500
{extra}
optimizer:
  lr: {lr}
  betas: [0.9, 0.999]
  eps: 1.e-8
  weight_decay: 0
datarc:
  num_workers: 8
  train_batch_size: 4
  max_timestep: -320
  sets: ['csv/libri-960-stage2.csv']
"""
WEIGHTS = """
prune:
  sparsity: [.2,.3,.4,.5,.55,.6,.65,.675,.7,.71,.72,.73,.74,.75,.76,.77,.78,.79,.8,.81,.82,.83,.84,.85,.86,.87,.88,.89,.9,
    .91,.915,.92,.925,.93,.935,.94,.945,.95]
  warnup: 25000
  period: 25000
  n_iters: 38
  pruning_condition: "converge"
  converge_loss_tolerance: 0.001
  average_length: 15000
  smooth_factor: 0.9998
  strategy: "L1Unstructured"
"""
HEADS = """
prune:
  target: {target}
  metric: {metric}
  total_steps: 11
  num_heads_each_step: 12
  interval: [0, 25000, 50000, 75000, 100000, 125000, 165000, 205000, 245000, 285000, 325000]
  warm_up: 1000
  data_ratio: 0.25
  normalize_by_layer: 2
"""
ROWS = """
prune:
  total_steps: 20
  num_rows_each_step: 128
  interval: 25000
  warm_up: 1000
"""


def runner(steps: int) -> str:
    return RUNNER.format(epochs=-1, steps=steps, accumulate=1, lr="1.e-5", extra="")


DISTILLATION_RUNNER = RUNNER.format(
    epochs=200, steps=-1, accumulate=8, lr="1e-4", extra="  save_every_x_epochs: 10\n  fp16: false"
)


def read(
    folder: Path,
    runner_text: str,
    model_text: str = MODEL,
    *,
    model: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    drop: str | None = None,
) -> CompressionRecipe:
    """Reads two texts; ``model`` and ``run`` set dotted keys of them first, and ``drop`` takes one out of the runner."""
    paths = []
    for name, text, changes in (("config_model", model_text, model), ("config_runner", runner_text, run)):
        values = yaml.safe_load(text)
        for dotted, value in (changes or {}).items():
            section, _, key = dotted.partition(".")
            if key:
                values.setdefault(section, {})[key] = value
            else:
                values[section] = value
        if drop is not None and name == "config_runner":
            section, _, key = drop.partition(".")
            values.pop(section) if not key else values[section].pop(key)
        paths.append(folder / f"{name}.yaml")
        untouched = not changes and not (drop and name == "config_runner")
        paths[-1].write_text(text if untouched else yaml.safe_dump(values), encoding="utf-8")
    return read_compression_yaml(*paths)


def test_weight_pruning(tmp_path: Path) -> None:
    recipe = read(tmp_path, runner(1_000_000) + WEIGHTS)
    method = recipe.method
    assert isinstance(method, WeightRounds)
    schedule = method.schedule
    assert (schedule.warm_up, schedule.period, schedule.condition) == (25_000, 25_000, "converge")
    assert (schedule.tolerance, schedule.average_length, schedule.smooth_factor) == (0.001, 15_000, 0.9998)
    assert len(schedule.sparsities) == 38
    assert schedule.sparsities[:2] == (0.2, 0.3)
    assert schedule.sparsities[-1] == 0.95
    assert (method.choice.scope, method.choice.score, method.choice.biases) == ("global", "magnitude", True)
    assert method.rounds[0] == PruneRound(step=25_000, amount=0.2)
    assert method.rounds[-1] == PruneRound(step=950_000, amount=0.95)
    assert recipe.segments == (25_000,) * 38 + (50_000,)
    assert schedule.recovery_steps == 50_000
    assert schedule.planned_steps == recipe.training.total_steps == 1_000_000
    assert recipe.name == "weight-pruning-yaml"


def test_what_all_modes_share_is_what_the_pretraining_files_say(tmp_path: Path) -> None:
    """The pre-training reader sees the same files without their section ``prune``."""
    pruning = read(tmp_path, runner(1_000_000) + WEIGHTS)
    (tmp_path / "config_runner.yaml").write_text(runner(1_000_000), encoding="utf-8")
    pretraining, sets = read_melhubert_yaml(tmp_path / "config_model.yaml", tmp_path / "config_runner.yaml")
    assert (pruning.model, pruning.objective, pruning.data) == (pretraining.model, pretraining.objective, pretraining.data)
    assert pruning.sets == sets == ("csv/libri-960-stage2.csv",)
    assert pruning.model.encoder == melhubert().encoder
    assert pruning.model.frontend == melhubert_frontend(20)
    assert count_parameters(pruning.model) == 90_231_424
    training = pruning.training
    assert (training.optimizer.lr, training.accumulate, training.max_grad_norm, training.log_every) == (1e-5, 1, 10.0, 500)
    assert training.save_every_epochs is None
    assert (pruning.data.max_utterances, pruning.data.crop_s, pruning.data.min_s) == (4, 15.0, 3.2)


def test_one_sparsity_is_a_ladder_of_equal_steps(tmp_path: Path) -> None:
    recipe = read(tmp_path, runner(1_000_000) + WEIGHTS, run={"prune.sparsity": 0.8, "prune.n_iters": 4})
    assert [each.amount for each in recipe.method.rounds] == pytest.approx([0.2, 0.4, 0.6, 0.8])  # type: ignore[union-attr]
    random = read(tmp_path, runner(1_000_000) + WEIGHTS, run={"prune.strategy": "RandomUnstructured"})
    assert random.method.choice.score == "random"  # type: ignore[union-attr]


def test_head_pruning_by_l1(tmp_path: Path) -> None:
    recipe = read(tmp_path, runner(366_000) + HEADS.format(target="by_layer", metric="l1"))
    method = recipe.method
    assert isinstance(method, HeadRounds)
    assert (method.scope, method.score, method.normalize) == ("layer", "l1", None)
    steps = [1_000, 26_000, 51_000, 76_000, 101_000, 126_000, 166_000, 206_000, 246_000, 286_000, 326_000]
    assert method.rounds == tuple(PruneRound(step=step, amount=12) for step in steps)
    assert recipe.segments == (1_000, *[25_000] * 5, *[40_000] * 6)
    assert method.settings(melhubert(), 0) == HeadPruning(num_kept=11, scope="layer", score="l1", normalize=None)
    with pytest.raises(ValueError, match="layers have"):
        method.settings(uneven_heads(), 0)


def uneven_heads() -> Any:
    config = to_plain(melhubert(num_layers=2))
    config["encoder"]["blocks"][0]["num_heads"] = 5
    return from_plain(type(melhubert()), config)


def test_head_pruning_by_data(tmp_path: Path) -> None:
    text = runner(366_000) + HEADS.format(target="by_whole", metric="data-driven")
    method = read(tmp_path, text, run={"prune.num_heads_each_step": 9, "prune.test_reverse": False}).method
    assert isinstance(method, HeadRounds)
    assert (method.scope, method.score, method.normalize, method.data_share) == ("model", "data", 2.0, 0.25)
    assert {each.amount for each in method.rounds} == {9}
    assert method.settings(uneven_heads(), 3) == HeadPruning(num_kept=17 - 9, scope="model", score="data", normalize=2.0)
    by_size = read(tmp_path, text, run={"prune.num_heads_each_step": 9, "prune.metric": "l1"}).method
    assert {each.amount for each in by_size.rounds} == {12}  # type: ignore[union-attr]


def test_row_pruning(tmp_path: Path) -> None:
    recipe = read(tmp_path, runner(510_000) + ROWS)
    method = recipe.method
    assert isinstance(method, RowRounds)
    assert method.rounds == tuple(PruneRound(step=1_000 + 25_000 * k, amount=128) for k in range(20))
    assert recipe.segments == (1_000, *[25_000] * 19, 34_000)
    assert method.settings(melhubert(), 0) == RowPruning(num_kept=3072 - 128, scope="uniform", score="l1")
    assert method.settings(melhubert(feedforward_dim=640), 19).num_kept == 512
    listed = read(tmp_path, runner(510_000) + ROWS, run={"prune.interval": [25_000 * k for k in range(20)]})
    assert listed.method == method


def test_distillation(tmp_path: Path) -> None:
    recipe = read(tmp_path, DISTILLATION_RUNNER, DISTILLATION_MODEL)
    method = recipe.method
    assert isinstance(method, LogitDistillation)
    assert (method.temperature, method.alpha, method.frames, method.masking, method.init) == (1.0, 1.0, "all", None, None)
    assert count_parameters(recipe.model) == 47_704_192
    assert method.teacher.encoder == melhubert().encoder
    training = recipe.training
    assert (training.epochs, training.total_steps, training.accumulate, training.save_every_epochs) == (200, None, 8, 10)
    assert training.optimizer.lr == 1e-4
    assert recipe.segments == ()


def test_masked_distillation_from_the_first_layers_of_the_teacher(tmp_path: Path) -> None:
    changes = {
        "loss_param.type": "masked",
        "loss_param.T": 2,
        "loss_param.alpha": 0.5,
        "melhubert.initial_from_teacher": True,
        "melhubert.mask_length": 9,
        "teacher.mask_length": 7,
    }
    method = read(tmp_path, DISTILLATION_RUNNER, DISTILLATION_MODEL, model=changes).method
    assert isinstance(method, LogitDistillation)
    assert (method.temperature, method.alpha, method.frames) == (2.0, 0.5, "masked")
    assert method.masking is not None
    assert method.masking.span_length == 7  # the teacher draws
    assert method.init == TeacherInitConfig(layers=(1, 2, 3, 4, 5, 6), projection=False)


@pytest.mark.parametrize(
    ("runner_text", "model_text"),
    [
        (runner(1_000_000) + WEIGHTS, MODEL),
        (runner(366_000) + HEADS.format(target="by_whole", metric="data-driven"), MODEL),
        (runner(510_000) + ROWS, MODEL),
        (DISTILLATION_RUNNER, DISTILLATION_MODEL),
    ],
)
def test_a_recipe_survives_as_plain_values(tmp_path: Path, runner_text: str, model_text: str) -> None:
    recipe = read(tmp_path, runner_text, model_text)
    assert from_plain(CompressionRecipe, to_plain(recipe)) == recipe


def test_files_of_december_2022_save_by_step(tmp_path: Path) -> None:
    old = read(tmp_path, runner(1_000_000) + WEIGHTS, run={"runner.save_step": 5000, "runner.max_keep": 1})
    assert (old.training.save_every, old.training.keep_checkpoints) == (5000, 1)


WEIGHT_TEXT, ROW_TEXT = runner(1_000_000) + WEIGHTS, runner(510_000) + ROWS
HEAD_TEXT = runner(366_000) + HEADS.format(target="by_whole", metric="data-driven")


@pytest.mark.parametrize(
    ("text", "changes", "sentence"),
    [
        (WEIGHT_TEXT, {"prune.warmup": 3}, "no key 'warmup'; did you mean 'warnup'"),
        (WEIGHT_TEXT, {"prune.strategy": "L2Unstructured"}, "strategy is 'L2Unstructured', expected L1Unstructured or Random"),
        (WEIGHT_TEXT, {"prune.strategy": {"name": "L1Unstructured"}}, "strategy is"),
        (WEIGHT_TEXT, {"prune.pruning_condition": "convergence"}, "did you mean 'converge'"),
        (WEIGHT_TEXT, {"prune.n_iters": 37}, "sparsity lists 38 values and n_iters is 37"),
        (WEIGHT_TEXT, {"prune.sparsity": [0.5] * 38}, "rising"),
        (WEIGHT_TEXT, {"prune.average_length": 25_000}, "less than the period"),
        (WEIGHT_TEXT, {"prune.period": 2.5}, "period is 2.5, expected a whole number"),
        (WEIGHT_TEXT, {"runner.total_steps": 900_000}, "after update 950000, the run ends with 900000"),
        (WEIGHT_TEXT, {"runner.n_epochs": 10}, "prunings are counted in updates"),
        (WEIGHT_TEXT, {"prune.metric": "l1"}, "are those of head-pruning and weight-pruning"),
        (WEIGHT_TEXT, {"prune": {"period": 3}}, "are those of no method"),
        (WEIGHT_TEXT, {"extra": {}}, "unknown section 'extra'"),
        (WEIGHT_TEXT, {"runner.log_stp": 3}, "did you mean 'log_step'"),
        (HEAD_TEXT, {"prune.target": "by_head"}, "target is 'by_head'"),
        (HEAD_TEXT, {"prune.metric": "l2"}, "metric is 'l2'"),
        (HEAD_TEXT, {"prune.target": "by_layer", "prune.num_heads_each_step": 10}, "by_layer takes one of each of 12 layers"),
        (HEAD_TEXT, {"prune.num_heads_each_step": 13}, "11 prunings of 13 leave 1 of 144 heads"),
        (HEAD_TEXT, {"prune.interval": [0, 1, 2]}, "interval lists 3 prunings and total_steps is 11"),
        (HEAD_TEXT, {"prune.interval": [0, *range(10)]}, "expected rising numbers"),
        (HEAD_TEXT, {"prune.data_ratio": 0}, "data_ratio is 0"),
        (HEAD_TEXT, {"prune.test_reverse": True}, "test_reverse is True"),
        (HEAD_TEXT, {"runner.total_steps": 326_000 - 1}, "after update 326000"),
        (ROW_TEXT, {"prune.num_rows_each_step": 154}, "20 prunings of 154 rows leave none of 3072"),
        (ROW_TEXT, {"prune.interval": 0}, "interval is 0"),
    ],
)
def test_mistakes_in_the_runner_file(tmp_path: Path, text: str, changes: dict[str, Any], sentence: str) -> None:
    read(tmp_path, text)  # the control: as it stands it can be read
    with pytest.raises(ConfigError, match=sentence):
        read(tmp_path, text, run=changes)


@pytest.mark.parametrize(
    ("text", "drop", "sentence"),
    [
        (WEIGHT_TEXT, "prune.period", "lacks the key 'period'"),
        (HEAD_TEXT, "prune.num_heads_each_step", "lacks the key 'num_heads_each_step'"),
        (ROW_TEXT, "prune", "they compress nothing"),
        (ROW_TEXT, "datarc", "no section 'datarc'"),
    ],
)
def test_what_is_missing(tmp_path: Path, text: str, drop: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read(tmp_path, text, drop=drop)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"loss_param.type": "nomask"}, "type is 'nomask', expected nomasked or masked; did you mean 'nomasked'"),
        ({"loss_param.T": 0}, r"T is 0\.0"),
        ({"loss_param.alpha": 2}, r"alpha 2\.0"),
        ({"loss_param.beta": 2}, "no key 'beta'"),
        ({"teacher.num_cluster": 100}, r"num_cluster of student \(512\) and teacher \(100\) differ"),
        ({"teacher.feat_emb_dim": 40}, "feat_emb_dim of student"),
        ({"teacher.initial_from_teacher": False}, "section 'teacher' has no key 'initial_from_teacher'"),
        ({"melhubert.initial_from_teacher": "False"}, "initial_from_teacher is 'False'"),
        ({"melhubert.initial_from_teacher": True, "melhubert.encoder_layers": 13}, "13 layers, its teacher 12"),
        ({"task.length": 3}, "section 'task' has no key 'length'"),
    ],
)
def test_mistakes_in_a_distillation(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read(tmp_path, DISTILLATION_RUNNER, DISTILLATION_MODEL, model=changes)
    with pytest.raises(ConfigError, match="unknown section 'prune'"):
        read(tmp_path, DISTILLATION_RUNNER, DISTILLATION_MODEL, run={"prune": {"sparsity": 0.5}})
