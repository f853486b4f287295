"""DistilHuBERT checkpoints as S3PRL's pre-training writes them (Chang, Yang and Lee, "DistilHuBERT", arXiv 2110.01900).

Layout: ``Distiller`` with the tensors, ``Config.distiller`` with the settings. The student is a HuBERT of few layers without a
norm before its projection. Its prediction heads (``output_layer``), one for each estimated teacher layer, come along as the
head ``distillation``; which teacher layers they estimate is in the notes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from sslim.checkpoints.importers import Imported
from sslim.checkpoints.importers.fairseq_names import native_state, tensors_of
from sslim.checkpoints.importers.hubert import encoder_of, frontend_of, padding_note
from sslim.checkpoints.importers.settings import Settings, plain, settings_of, short
from sslim.checkpoints.restricted_pickle import CheckpointError
from sslim.models import ModelConfig, ProjectionConfig
from sslim.models.distilhubert import HEAD
from sslim.nn.heads import HeadConfig, SplitHeadConfig

WEIGHTS, SECTION = "Distiller", "distiller"
_DEFAULTS = {"encoder_layers": 1, "activation_dropout": 0.1}  # where DistillerConfig differs from fairseq's HuBERT
_OUTPUT = {
    "output_layer.0.weight": f"heads.{HEAD}.inner.weight",
    "output_layer.0.bias": f"heads.{HEAD}.inner.bias",
    "output_layer.2.weight": f"heads.{HEAD}.weight",
    "output_layer.2.bias": f"heads.{HEAD}.bias",
}
_SINGLE_OUTPUT = {"output_layer.2.layer.weight": "output_layer.2.weight", "output_layer.2.layer.bias": "output_layer.2.bias"}
_LAYER = re.compile(r"encoder\.layers\.(\d{1,4})\.")


def recognises(contents: Any) -> bool:
    """Whether a file's contents are a DistilHuBERT checkpoint."""
    return has_section(contents, WEIGHTS, SECTION)


def convert(contents: Mapping[str, Any], source: str) -> Imported:
    """Translates a checkpoint.

    Args:
        contents: What ``read_pickle`` gives.
        source: The file's name, for errors.

    Raises:
        CheckpointError: A tensor nobody knows, or settings that are unknown or beyond what sslim computes.
    """
    weights = tensors_of(contents[WEIGHTS], source, WEIGHTS)
    settings = student_settings(contents, SECTION, source, _DEFAULTS)
    for name, accepted in {
        "attention_type": "original",
        "task_emb_type": "expand-last",
        "out_layer_type": "expand-last",
    }.items():
        settings.choice(name, accepted, {accepted: accepted})
    notes = student_notes(contents)
    weights, heads = _output_layer(weights, settings, notes)
    config = student_config(weights, settings, family="distilhubert", normalize=False, projection_norm=False, heads=heads)
    notes["padding"] = padding_note(config.frontend)  # type: ignore[arg-type]
    final_norm = config.transformer.final_norm
    state = native_state(weights, source, final_norm=final_norm, what="a DistilHuBERT", others=_OUTPUT)
    return Imported(config=config, state=state, notes=notes)


def has_section(contents: Any, weights: str, section: str) -> bool:
    """Whether a student's tensors are under ``weights`` and its settings under ``Config`` and ``section``."""
    config = contents.get("Config") if isinstance(contents, dict) else None
    return isinstance(config, dict) and isinstance(config.get(section), dict) and isinstance(contents.get(weights), dict)


def student_settings(contents: Mapping[str, Any], section: str, source: str, defaults: Mapping[str, Any]) -> Settings:
    """A student's settings under fairseq's names, which differ in one: ``extractor_conv_feature_layers``."""
    values = {**defaults, **settings_of(contents["Config"][section])}
    if (layers := values.get("extractor_conv_feature_layers")) is not None:
        values["conv_feature_layers"] = layers
    return Settings(values, source)


def student_notes(contents: Mapping[str, Any]) -> dict[str, Any]:
    """Settings and step of a student's file, for its provenance."""
    step = plain(contents.get("Step"))
    return {"settings": plain(settings_of(contents["Config"])), **({} if step is None else {"step": step})}


def student_config(
    weights: Mapping[str, Tensor],
    settings: Settings,
    *,
    family: str,
    normalize: bool,
    projection_norm: bool,
    heads: dict[str, HeadConfig],
) -> ModelConfig:
    """Describes a student whose layers all run once; frames of padded batches are counted exactly, in the reference too.

    Raises:
        CheckpointError: Settings beyond what sslim computes, or another number of layers than the tensors have.
    """
    found = {int(match[1]) for name in weights if (match := _LAYER.match(name))}
    if (stated := settings.count("encoder_layers", 1, low=0)) != len(found) or not found:
        raise CheckpointError(
            f"{settings.source}: its setting encoder_layers is {stated}, its tensors have {len(found)} layers"
        )
    frontend = replace(frontend_of(settings, normalize=normalize), reference_mask="exact")
    encoder = encoder_of(settings)
    width = frontend.layers[-1].channels
    projection = ProjectionConfig(feature_dim=width, norm=projection_norm, linear=width != encoder.dim)
    return ModelConfig(family=family, frontend=frontend, projection=projection, encoder=encoder, heads=heads)


def _output_layer(
    weights: dict[str, Tensor], settings: Settings, notes: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, HeadConfig]]:
    """The prediction heads, with their tensors in the shapes of ``SplitHead``; none when the file has none."""
    if not any(name.startswith("output_layer.") for name in weights):
        return weights, {}
    dim = settings.count("encoder_embed_dim", 768)
    num_tasks = settings.count("n_tasks", 12)
    inner = int(settings.number("out_layer_inter_dim", -1, low=-1, high=1 << 20))
    head = SplitHeadConfig(
        num_tasks=num_tasks, hidden_dim=inner if inner > 0 else dim, output_dim=settings.count("final_dim", 768)
    )
    layers = settings.values.get("pred_layer_id", list(range(1, num_tasks + 1)))
    if not isinstance(layers, list) or len(layers) != num_tasks:
        raise CheckpointError(
            f"{settings.source}: its setting pred_layer_id is {short(layers)}, expected the layers of n_tasks {num_tasks}"
        )
    notes["estimated_teacher_layers"] = plain(layers)
    reshaped = dict(weights)
    for foreign, common in _SINGLE_OUTPUT.items():  # one task: an ordinary linear map, (out, in)
        if num_tasks == 1 and foreign in reshaped and common not in reshaped:
            tensor = reshaped.pop(foreign)
            reshaped[common] = tensor.t()[None] if tensor.dim() == 2 else tensor[None]
    bias = reshaped.get("output_layer.2.bias")
    if bias is not None and bias.dim() == 4 and bias.shape[:2] == (1, 1):
        reshaped["output_layer.2.bias"] = bias[0, 0]
    return reshaped, {HEAD: head}
