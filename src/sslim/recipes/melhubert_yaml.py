"""MelHuBERT's two YAML files, read as they are: the model file and the runner file become one :class:`PretrainRecipe`.

Counterparts and defaults are those of the reference (MelHuBERT and Speech-SSL-Compression); every key it reads is known here,
and an unknown one is an error, where the reference ignores it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sslim.config import ConfigError, nearest
from sslim.data.prepare import load_source, merge_sources, prepare
from sslim.data.sources import Source
from sslim.models import ModelConfig, ProjectionConfig
from sslim.models.melhubert import melhubert, melhubert_frontend
from sslim.nn.encoder import EncoderConfig, plain_blocks
from sslim.nn.heads import ClusterHeadConfig, HeadConfig, MaskEmbeddingConfig
from sslim.nn.positions import ConvPositionsConfig
from sslim.objectives import MaskedPredictionConfig, MaskingConfig
from sslim.recipes.corpus_batches import DataConfig
from sslim.recipes.pretrain import PretrainRecipe
from sslim.training import OptimizerConfig, ScheduleConfig, TrainerConfig

ACTIVATIONS = {"gelu": "gelu", "gelu_accurate": "gelu_tanh", "relu": "relu", "tanh": "tanh", "linear": "linear"}

MODEL_DEFAULTS: dict[str, Any] = {
    "feat_emb_dim": 40, "pos_emb_type": "conv", "pos_conv_depth": 1, "conv_pos": 128, "conv_pos_groups": 16,
    "encoder_layers": 1, "encoder_embed_dim": 768, "encoder_ffn_embed_dim": 3072, "encoder_attention_heads": 12,
    "activation_fn": "gelu", "layer_norm_first": False, "attention_type": "original", "num_cluster": 512, "final_dim": 40,
    "pred_masked_weight": 1.0, "pred_nomask_weight": 0.0, "mask_prob": 0.8, "mask_length": 10, "mask_selection": "static",
    "mask_other": 0.0, "no_mask_overlap": False, "mask_min_space": 1, "skip_masked": False, "skip_nomask": True,
    "learnable_mask_emb": False, "mask_before_proj": True, "dropout": 0.1, "attention_dropout": 0.1,
    "activation_dropout": 0.1, "encoder_layerdrop": 0.0,
}  # fmt: skip
RUNNER_DEFAULTS: dict[str, Any] = {
    "n_epochs": -1, "total_steps": -1, "gradient_clipping": 10.0, "gradient_accumulate_steps": 1, "log_step": 1000,
    "save_every_x_epochs": 1, "fp16": False,
}  # fmt: skip
OPTIMIZER_DEFAULTS: dict[str, Any] = {
    "lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "name": "TorchOptim", "torch_optim_name": "Adam",
}  # fmt: skip
DATA_DEFAULTS: dict[str, Any] = {
    "num_workers": 0, "train_batch_size": 4, "max_timestep": 0, "sets": [], "sequence_length": None,
}  # fmt: skip
REQUIRED = object()  # in place of a default
COMPRESSION_SECTIONS = ("prune", "teacher", "loss_param")


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the sections of a YAML file."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a YAML file ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no sections; expected a MelHuBERT configuration")
    return values


def read_section(values: dict[str, Any], name: str, defaults: dict[str, Any], source: Path) -> dict[str, Any]:
    """Returns a section with the defaults of what it leaves out; ``REQUIRED`` stands for none.

    Raises:
        ConfigError: There is no such section, it has an unknown key, or lacks one without a default.
    """
    section = values.get(name)
    if not isinstance(section, dict):
        raise ConfigError(f"{source} has no section {name!r}{nearest(name, values)}")
    for key in section:
        if key not in defaults:
            raise ConfigError(f"{source}: section {name!r} has no key {key!r}{nearest(key, defaults)}")
    for key, default in defaults.items():
        if default is REQUIRED and key not in section:
            raise ConfigError(f"{source}: section {name!r} lacks the key {key!r}")
    return {**defaults, **section}


def as_number(value: Any, key: str) -> float:
    """YAML reads ``1e-4`` as a string; the reference casts with ``float``."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{key} is {value!r}, expected a number") from None


def model_of(m: dict[str, Any], source: Path) -> ModelConfig:
    """Returns the architecture that a model section describes.

    Raises:
        ConfigError: A setting that the reference could never run.
    """
    if m["pos_emb_type"] != "conv" or int(m["pos_conv_depth"]) != 1:
        raise ConfigError(f"{source}: positions {m['pos_emb_type']!r} of depth {m['pos_conv_depth']} never ran; use 'conv', 1")
    if m["attention_type"] != "original":
        raise ConfigError(f"{source}: attention_type {m['attention_type']!r} was not causal in the reference; use 'original'")
    if m["activation_fn"] not in ACTIVATIONS:
        raise ConfigError(f"{source}: unknown activation_fn {m['activation_fn']!r}{nearest(m['activation_fn'], ACTIVATIONS)}")
    if m["feat_emb_dim"] not in (40, 80):
        raise ConfigError(f"{source}: feat_emb_dim is {m['feat_emb_dim']!r}; it is 40 for 10 ms frames and 80 for 20 ms")
    dim, num_heads, pre = int(m["encoder_embed_dim"]), int(m["encoder_attention_heads"]), bool(m["layer_norm_first"])
    feature_dim = int(m["feat_emb_dim"])
    heads: dict[str, HeadConfig] = {"masked_prediction": ClusterHeadConfig(num_clusters=int(m["num_cluster"]))}
    if m["learnable_mask_emb"]:
        heads["mask"] = MaskEmbeddingConfig(dim=feature_dim if m["mask_before_proj"] else dim)
    return replace(
        melhubert(),
        frontend=melhubert_frontend(10 * feature_dim // 40),
        projection=ProjectionConfig(feature_dim=feature_dim, linear=feature_dim != dim),
        encoder=EncoderConfig(
            dim=dim,
            **plain_blocks(int(m["encoder_layers"]), num_heads, dim // num_heads, int(m["encoder_ffn_embed_dim"])),
            positions=ConvPositionsConfig(kernel_size=int(m["conv_pos"]), groups=int(m["conv_pos_groups"])),
            norm_placement="pre" if pre else "post",
            input_norm=not pre,
            final_norm=pre,
            activation=ACTIVATIONS[m["activation_fn"]],  # type: ignore[arg-type]
            dropout=as_number(m["dropout"], "dropout"),
            attention_dropout=as_number(m["attention_dropout"], "attention_dropout"),
            activation_dropout=as_number(m["activation_dropout"], "activation_dropout"),
            layer_drop=as_number(m["encoder_layerdrop"], "encoder_layerdrop"),
        ),
        heads=heads,
    )


def objective_of(m: dict[str, Any]) -> MaskedPredictionConfig:
    """Returns the masks and weights that a model section describes."""
    return MaskedPredictionConfig(
        masking=MaskingConfig(
            probability=as_number(m["mask_prob"], "mask_prob"),
            span_length=int(m["mask_length"]),
            length_distribution=m["mask_selection"],
            length_other=as_number(m["mask_other"], "mask_other"),
            overlap=not m["no_mask_overlap"],
            min_space=int(m["mask_min_space"]),
            edges="reference",
        ),
        masked_weight=0.0 if m["skip_masked"] else as_number(m["pred_masked_weight"], "pred_masked_weight"),
        unmasked_weight=0.0 if m["skip_nomask"] else as_number(m["pred_nomask_weight"], "pred_nomask_weight"),
        mask_at="features" if m["mask_before_proj"] else "projection",
    )


def training_of(runner: dict[str, Any], optimizer: dict[str, Any], num_workers: int) -> TrainerConfig:
    """Returns the training that the sections ``runner`` and ``optimizer`` describe.

    Raises:
        ConfigError: Another optimiser, or no length.
    """
    if optimizer["torch_optim_name"] not in ("Adam", "AdamW"):
        raise ConfigError(f"optimizer {optimizer['torch_optim_name']!r} is not known; the reference uses 'Adam'")
    epochs, steps = int(runner["n_epochs"]), int(runner["total_steps"])
    if epochs <= 0 and steps <= 0:
        raise ConfigError("neither n_epochs nor total_steps of the runner is positive")
    return TrainerConfig(
        total_steps=None if epochs > 0 else steps,
        epochs=epochs if epochs > 0 else None,
        accumulate=int(runner["gradient_accumulate_steps"]),
        max_grad_norm=as_number(runner["gradient_clipping"], "gradient_clipping"),
        log_every=int(runner["log_step"]),
        save_every_epochs=int(runner["save_every_x_epochs"]),
        num_workers=num_workers,
        optimizer=OptimizerConfig(
            kind=optimizer["torch_optim_name"].lower(),
            lr=as_number(optimizer["lr"], "lr"),
            betas=tuple(as_number(beta, "betas") for beta in optimizer["betas"]),  # type: ignore[arg-type]
            eps=as_number(optimizer["eps"], "eps"),
            weight_decay=as_number(optimizer["weight_decay"], "weight_decay"),
        ),
        schedule=ScheduleConfig(kind="constant"),
    )


def data_of(data: dict[str, Any], task: dict[str, Any], feature_dim: int) -> DataConfig:
    """Returns the batches that the sections ``datarc`` and ``task`` describe.

    ``max_timestep`` counts frames of the CSV's own labels; at 10 ms (libri-360) -320 keeps what is longer than 3.2 s.
    """
    sequence_length, limit = int(data["sequence_length"] or task.get("sequence_length") or 0), int(data["max_timestep"])
    return DataConfig(
        batch_s=None,
        max_utterances=int(data["train_batch_size"]),
        crop_s=sequence_length * (0.01 * feature_dim / 40) if sequence_length > 0 else None,
        min_s=0.01 * -limit if limit < 0 else 0.0,
        max_s=0.01 * limit if limit > 0 else None,
    )


def model_section(values: dict[str, Any]) -> str:
    """Returns the name of a model file's section: ``melhubert``, or ``hubert`` before December 2022."""
    return "hubert" if "hubert" in values and "melhubert" not in values else "melhubert"


def read_melhubert_yaml(model_config: Path, runner_config: Path) -> tuple[PretrainRecipe, tuple[str, ...]]:
    """Reads the reference's two files.

    Returns:
        The recipe, and the CSV files that ``datarc.sets`` names.

    Raises:
        ConfigError: Not YAML, a missing section, an unknown key, or a setting that the reference could never run.
    """
    model_file, runner_file = read_yaml(Path(model_config)), read_yaml(Path(runner_config))
    for name in COMPRESSION_SECTIONS:
        if name in model_file or name in runner_file:
            raise ConfigError(f"section {name!r} belongs to compression, not to pre-training")
    m = read_section(model_file, model_section(model_file), MODEL_DEFAULTS, Path(model_config))
    runner = read_section(runner_file, "runner", RUNNER_DEFAULTS, Path(runner_config))
    optimizer = read_section(runner_file, "optimizer", OPTIMIZER_DEFAULTS, Path(runner_config))
    data = read_section(runner_file, "datarc", DATA_DEFAULTS, Path(runner_config))
    model = model_of(m, Path(model_config))
    recipe = PretrainRecipe(
        name="melhubert-yaml",
        about=f"MelHuBERT as configured in {Path(model_config).name} and {Path(runner_config).name}",
        model=model,
        objective=objective_of(m),
        training=training_of(runner, optimizer, int(data["num_workers"])),
        data=data_of(data, model_file.get("task") or {}, model.projection.feature_dim),
    )
    return recipe, tuple(str(path) for path in data["sets"])


def corpus_of_sets(sets: Sequence[str], output: Path, say: Callable[[str], None]) -> Path:
    """Prepares the CSV files that a runner names as a corpus beside a run's folder, unless that is done; returns its folder.

    Raises:
        ValueError: There are none, or they cannot be prepared.
    """
    if not sets:
        raise ValueError("no corpus given: name a folder made by `sslim prepare`")
    folder = output.with_name(f"{output.name}-corpus")
    say(f"preparing {', '.join(sets)} as {folder}")
    return prepare_sets([Path(path) for path in sets], folder)


def prepare_sets(sets: list[Path], folder: Path) -> Path:
    """Prepares the reference's CSV files (features and labels as npy) as one corpus; returns its folder.

    Raises:
        ValueError: A CSV file is missing or malformed, or too many of its files cannot be read.
    """
    origin = {"kind": "numpy", "sets": [str(path) for path in sets]}

    def sources() -> Source:
        first, *others = [load_source(path, "numpy") for path in sets]
        return merge_sources(first, others) if others else first

    prepare(sources, folder, origin=origin)
    return folder
