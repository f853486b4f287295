"""LightHuBERT checkpoints: base, small and stage 1 (Wang et al., "LightHuBERT", arXiv 2203.15610).

Layout: ``cfg`` and ``model``, as fairseq writes them. The file holds a supernet; which subnets it was trained for, its search
space, is not in the tensors. It follows from ``cfg.model``: ``_name`` is ``student_hubert`` for stage 1 (the base space, but
only the largest subnet was trained), ``hubert_pruner`` for the others, where ``pruner_supernet`` names a file of training
settings that ends in ``base.yaml`` or ``small.yaml``. Where this does not decide, a subnet has to be spelt out: the reference
would take base, and features of the wrong space look plausible.

The head that estimates the teacher's last layer comes along as ``distillation``; what HuBERT's pre-training left is dropped.

The files do not say whether a net was trained with sliding windows; no release was. Who knows of one that was names them in the
subnet, as the reference takes them: ``slide_wsz`` gives the reference's own computation, faults included
(``sslim.nn.reference_windows``), because that is what the net was trained with. Windows for training on, or for a model of
one's own, are the key ``windows`` of ``sslim.models.search_space.Subnet``: the exact band.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sslim.checkpoints.importers import Imported
from sslim.checkpoints.importers.fairseq_names import native_state, tensors_of
from sslim.checkpoints.importers.hubert import encoder_of, frontend_of, padding_note
from sslim.checkpoints.importers.settings import Settings, plain, settings_of, short
from sslim.checkpoints.restricted_pickle import CheckpointError
from sslim.models import ModelConfig, ProjectionConfig
from sslim.models.lighthubert import HEAD, LIGHTHUBERT_STAGE1, MASK
from sslim.models.search_space import LIGHTHUBERT_BASE, LIGHTHUBERT_SMALL, SearchSpace
from sslim.nn.encoder import EncoderConfig
from sslim.nn.heads import HeadConfig, MaskEmbeddingConfig, RegressionHeadConfig

NAMES = ("hubert_pruner", "student_hubert")
LEFTOVERS = ("label_embs_concat", "final_proj.weight", "final_proj.bias")  # of HuBERT's pre-training
SPACES = {"base": LIGHTHUBERT_BASE, "small": LIGHTHUBERT_SMALL}
NUM_LAYERS, HEAD_DIM = 12, 64  # the reference accepts no others
_PREDICTION = "layer_pred_heads."
_DEFAULTS = {"extractor_mode": "layer_norm"}  # where LightHuBERTConfig differs from fairseq's HuBERT
_LAYER = re.compile(r"encoder\.layers\.(\d{1,4})\.")


def recognises(contents: Any) -> bool:
    """Whether a file's contents are a LightHuBERT checkpoint, by its prediction heads or its name."""
    weights = contents.get("model") if isinstance(contents, dict) else None
    if not isinstance(weights, dict) or not weights or not contents.get("cfg"):
        return False
    cfg = settings_of(contents["cfg"])
    model = cfg.get("model") if isinstance(cfg, dict) else None
    named = isinstance(model, dict) and model.get("_name") in NAMES
    return named or any(isinstance(name, str) and _PREDICTION in name for name in weights)


def convert(contents: Mapping[str, Any], source: str) -> Imported:
    """Translates a checkpoint; the result is the whole supernet with its search space.

    Args:
        contents: What ``read_pickle`` gives.
        source: The file's name, for errors.

    Raises:
        CheckpointError: A tensor nobody knows, or settings that are missing, unknown or beyond what sslim computes.
    """
    cfg = settings_of(contents["cfg"])
    model = cfg.get("model") if isinstance(cfg, dict) else None
    if not isinstance(model, dict):
        raise CheckpointError(f"{source} has no readable settings of its model (cfg.model)")
    task = cfg.get("task") if isinstance(cfg.get("task"), dict) else {}
    settings = Settings({**_DEFAULTS, **model}, source)
    weights = tensors_of(contents["model"], source, "model")
    notes: dict[str, Any] = {"settings": {"model": plain(model), "task": plain(task)}}
    space, undecided = space_of(model)
    config = _describe(weights, settings, Settings(task, source), space, notes)
    dropped = [name for name in LEFTOVERS if name in weights]
    if dropped:
        notes["dropped"] = dropped
    others = {
        "mask_emb": f"heads.{MASK}.embedding",
        f"{_PREDICTION}{NUM_LAYERS - 1}.weight": f"heads.{HEAD}.linear.weight",
    }
    state = native_state(
        weights, source, final_norm=config.transformer.final_norm, what="a LightHuBERT", others=others, dropped=dropped
    )
    return Imported(config=config, state=state, notes=notes, undecided_subnet=undecided)


def space_of(model: Mapping[str, Any]) -> tuple[SearchSpace, str]:
    """Infers which supernet a file holds.

    Args:
        model: ``cfg.model``.

    Returns:
        The space, and an empty text; or, where the file does not say, a space that only tells how a subnet's layers and units
        are found, and what is missing.
    """
    if model.get("_name") == "student_hubert":
        return LIGHTHUBERT_STAGE1, ""
    path = model.get("pruner_supernet")
    by_path = next((name for name in SPACES if isinstance(path, str) and path.lower().endswith(f"{name}.yaml")), None)
    by_type = model.get("supernet_type") if model.get("supernet_type") in SPACES else None
    if by_path != by_type and by_path is not None and by_type is not None:
        why = f"pruner_supernet is {short(path)} and supernet_type {by_type!r}"
    elif by_path is None and by_type is None:
        why = f"_name is {short(model.get('_name'))} and pruner_supernet {short(path)}"
    else:
        return SPACES[str(by_path or by_type)], ""
    whole = SearchSpace(
        dims=(768,),
        num_heads=(12,),
        feedforward_ratios=(4.0,),
        num_layers=(NUM_LAYERS,),
        kept_layers=LIGHTHUBERT_BASE.kept_layers,
        feedforward_rule="blocks",
    )
    return whole, f"does not say which LightHuBERT it is, base, small or stage 1 (its {why})"


def _describe(
    weights: Mapping[str, Tensor], settings: Settings, task: Settings, space: SearchSpace, notes: dict[str, Any]
) -> ModelConfig:
    source = settings.source
    found = {int(match[1]) for name in weights if (match := _LAYER.match(name))}
    if (stated := settings.count("encoder_layers", NUM_LAYERS)) != NUM_LAYERS or found != set(range(NUM_LAYERS)):
        raise CheckpointError(
            f"{source}: its setting encoder_layers is {stated} and its tensors have {len(found)} layers; "
            f"a LightHuBERT has {NUM_LAYERS}"
        )
    encoder = encoder_of(settings)
    if (head_dim := encoder.blocks[0].head_dim) != HEAD_DIM:
        raise CheckpointError(f"{source} has heads of width {head_dim}; LightHuBERT's have {HEAD_DIM}")
    normalize = task.boolean("normalize", True)
    if "normalize" not in task.values:
        notes["normalize"] = (
            "waveforms get zero mean and unit variance, as all released LightHuBERTs take them; the file does not say"
        )
    frontend = frontend_of(settings, normalize=normalize)
    width = frontend.layers[-1].channels
    if width == encoder.dim:
        raise CheckpointError(
            f"{source} is as wide as its features, {width}, so it has no projection to cut: it is no supernet"
        )
    notes["padding"] = padding_note(frontend)
    return ModelConfig(
        family="lighthubert",
        frontend=frontend,
        projection=ProjectionConfig(feature_dim=width, norm=True),
        encoder=encoder,
        heads=_heads(settings, encoder),
        search_space=space,
    )


def _heads(settings: Settings, encoder: EncoderConfig) -> dict[str, HeadConfig]:
    """Mask embedding, and the one prediction head that releases have, after the last layer."""
    heads: dict[str, HeadConfig] = {MASK: MaskEmbeddingConfig(dim=encoder.dim)}
    last = ",".join(["0"] * (NUM_LAYERS - 1) + ["1"])
    stated = settings.values.get("layer_pred_num", last)
    numbers = [number.strip() for number in stated.split(",")] if isinstance(stated, str) else None
    if numbers == last.split(","):
        heads[HEAD] = RegressionHeadConfig(output_dim=settings.count("teacher_embed_dim", 768), bias=False)
    elif numbers != ["0"] * NUM_LAYERS:
        raise CheckpointError(
            f"{settings.source}: its setting layer_pred_num is {short(stated)}, expected one prediction head, "
            "after the last layer, or none"
        )
    return heads
