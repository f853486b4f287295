"""HuBERT, wav2vec 2.0 and WavLM folders as Hugging Face transformers writes them.

A folder holds ``config.json``, the tensors (``model.safetensors`` or ``pytorch_model.bin``, whole or in parts with an index),
and usually ``preprocessor_config.json``, whose ``do_normalize`` says whether waveforms get zero mean and unit variance. Where
that file is absent the rule of transformers' documentation decides: models with layer norms in the front-end
(``feat_extract_norm`` ``layer``) take normalised waveforms, those with a group norm do not. The notes record which it was.
What is added to the variance is the feature extractor's 1e-7 where there is one, else fairseq's 1e-5.

transformers counts the frames of padded batches by convolution arithmetic and lets padding into the group norm;
``load_model(path, compat="reference")`` does so too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sslim.checkpoints.importers import Imported, wavlm_names
from sslim.checkpoints.importers.conv_layers import parse_conv_layers
from sslim.checkpoints.importers.fairseq_names import encoder_norm, rename, tensors_of, translate, with_parts
from sslim.checkpoints.importers.hubert import padding_note
from sslim.checkpoints.importers.settings import Settings, plain, short
from sslim.checkpoints.restricted_pickle import CheckpointError, read_pickle
from sslim.config import read_json
from sslim.frontends import HUBERT_CONV_LAYERS, ConvFrontendConfig
from sslim.models import ModelConfig, ProjectionConfig
from sslim.models.hubert import MASK
from sslim.nn.encoder import EncoderConfig, plain_blocks
from sslim.nn.heads import HeadConfig, MaskEmbeddingConfig
from sslim.nn.positions import ConvPositionsConfig
from sslim.storage import load_tensors

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_CONVOLUTIONS = {  # transformers leaves out settings that equal these
    "conv_dim": [layer.channels for layer in HUBERT_CONV_LAYERS],
    "conv_kernel": [layer.kernel for layer in HUBERT_CONV_LAYERS],
    "conv_stride": [layer.stride for layer in HUBERT_CONV_LAYERS],
}
FILES = ("model.safetensors", "pytorch_model.bin")
NAME = "Hugging Face"
MODEL_TYPES = {"hubert": "hubert", "wav2vec2": "wav2vec2", "wavlm": "wavlm"}
EXTRACTOR_EPS = 1e-7  # what transformers' feature extractor adds to the variance of waveforms
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "swish",
    "swish": "swish",
    "tanh": "tanh",
    "linear": "linear",
}
PAIRS = {  # transformers -> native, each with .weight and .bias; {i} is a layer counted from 0
    "feature_extractor.conv_layers.{i}.conv": "frontend.layers.{i}",
    "feature_extractor.conv_layers.{i}.layer_norm": "frontend.layers.{i}.norm",
    "feature_projection.layer_norm": "projection.norm",
    "feature_projection.projection": "projection.linear",
    "encoder.layers.{i}.attention.k_proj": "encoder.blocks.{i}.attention.key",
    "encoder.layers.{i}.attention.v_proj": "encoder.blocks.{i}.attention.value",
    "encoder.layers.{i}.attention.q_proj": "encoder.blocks.{i}.attention.query",
    "encoder.layers.{i}.attention.out_proj": "encoder.blocks.{i}.attention.output",
    "encoder.layers.{i}.layer_norm": "encoder.blocks.{i}.attention_norm",
    "encoder.layers.{i}.feed_forward.intermediate_dense": "encoder.blocks.{i}.feedforward.up",
    "encoder.layers.{i}.feed_forward.output_dense": "encoder.blocks.{i}.feedforward.down",
    "encoder.layers.{i}.final_layer_norm": "encoder.blocks.{i}.feedforward_norm",
}
SINGLE = {
    "masked_spec_embed": f"heads.{MASK}.embedding",
    "encoder.pos_conv_embed.conv.bias": "encoder.positions.bias",
    "encoder.pos_conv_embed.conv.parametrizations.weight.original0": "encoder.positions.gain",
    "encoder.pos_conv_embed.conv.parametrizations.weight.original1": "encoder.positions.direction",
}
_CLASSIC = {  # transformers before 4.35 and torch before 2.0
    "encoder.pos_conv_embed.conv.weight_g": "encoder.positions.gain",
    "encoder.pos_conv_embed.conv.weight_v": "encoder.positions.direction",
}
_HEADS = re.compile(  # of ForCTC, ForSequenceClassification, ForXVector and wav2vec 2.0's ForPreTraining
    r"(lm_head|projector|classifier|tdnn|objective|quantizer|project_q|project_hid)\..+|layer_weights"
)


def is_folder(folder: Path) -> bool:
    """Whether ``folder`` looks like one of transformers' (it has a config.json)."""
    return (folder / CONFIG).is_file()


def names(*, final_norm: bool) -> dict[str, str]:
    """Returns transformers' names and the native ones, as transformers writes them today; {i} stands for a layer."""
    return with_parts(PAIRS | encoder_norm(final_norm=final_norm)) | SINGLE


def convert_folder(folder: Path) -> Imported:
    """Translates a folder.

    Args:
        folder: It has a config.json.

    Raises:
        CheckpointError: Another kind of model, a setting that sslim cannot express, missing or unknown tensors.
        sslim.config.ConfigError: A file that is not JSON.
    """
    source = str(folder)
    values = read_json(folder / CONFIG)
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in MODEL_TYPES:
        raise CheckpointError(
            f"{folder / CONFIG}: its model_type is {short(kind)}, only {', '.join(MODEL_TYPES)} load"
            + ("" if kind else " (a model folder of sslim has a model.json)")
        )
    settings = Settings(values, str(folder / CONFIG))
    _refuse_variants(settings)
    weights, dropped = _without_heads(_read_weights(folder), kind)
    notes: dict[str, Any] = {"settings": plain(values)}
    normalize, waveform_eps = _normalization(folder, settings, notes)
    config = describe(settings, weights, normalize=normalize, waveform_eps=waveform_eps, kind=kind)
    assert isinstance(config.frontend, ConvFrontendConfig)
    notes["padding"] = padding_note(config.frontend)
    if dropped:
        notes["dropped"] = dropped
    table = names(final_norm=config.transformer.final_norm) | _CLASSIC | (wavlm_names.NAMES if kind == "wavlm" else {})
    state = rename(weights, source, lambda name: translate(name, table), what=f"a {kind} model")
    return Imported(config=config, state=wavlm_names.flat_constants(state), notes=notes)


def describe(
    settings: Settings, weights: Mapping[str, Tensor], *, normalize: bool, waveform_eps: float, kind: str
) -> ModelConfig:
    """Returns the description that a config.json gives; the tensors only say whether there is a mask embedding."""
    source = settings.source
    widths = [settings.values.get(name, default) for name, default in _CONVOLUTIONS.items()]
    if not all(isinstance(row, list) for row in widths) or len({len(row) for row in widths if isinstance(row, list)}) != 1:
        raise CheckpointError(f"{source}: conv_dim, conv_kernel and conv_stride must be lists of equal length")
    layers = parse_conv_layers(list(zip(*widths, strict=True)), source)
    norm = settings.choice("feat_extract_norm", "group", {"group": "group", "layer": "layer"})
    projection_norm = settings.boolean("feat_proj_layer_norm", True) if kind == "hubert" else True
    encoder = _encoder(settings)
    if kind == "wavlm":
        relative = wavlm_names.relative_positions(settings, encoder.blocks[0].num_heads)
        encoder = replace(encoder, relative_positions=relative)
    if projection_norm and encoder.layer_norm_eps != 1e-5:
        raise CheckpointError(
            f"{source}: its layer_norm_eps is {encoder.layer_norm_eps:g}, the norm before the projection has 1e-05 in sslim"
        )
    heads: dict[str, HeadConfig] = {}
    if "masked_spec_embed" in weights:
        heads[MASK] = MaskEmbeddingConfig(dim=encoder.dim)
    return ModelConfig(
        family=MODEL_TYPES[kind],
        frontend=ConvFrontendConfig(
            layers=layers,
            norm=norm,
            bias=settings.boolean("conv_bias", False),
            normalize_waveform=normalize,
            waveform_eps=waveform_eps,
            reference_mask="exact",
        ),
        projection=ProjectionConfig(feature_dim=layers[-1].channels, norm=projection_norm),
        encoder=encoder,
        heads=heads,
    )


def _encoder(settings: Settings) -> EncoderConfig:
    dim, num_heads = settings.count("hidden_size", 768), settings.count("num_attention_heads", 12)
    groups = settings.count("num_conv_pos_embedding_groups", 16)
    for what, number in {"num_attention_heads": num_heads, "num_conv_pos_embedding_groups": groups}.items():
        if dim % number:
            raise CheckpointError(f"{settings.source}: its {what} {number} does not divide hidden_size {dim}")
    pre_norm = settings.boolean("do_stable_layer_norm", False)
    return EncoderConfig(
        dim=dim,
        **plain_blocks(
            settings.count("num_hidden_layers", 12), num_heads, dim // num_heads, settings.count("intermediate_size", 3072)
        ),
        positions=ConvPositionsConfig(kernel_size=settings.count("num_conv_pos_embeddings", 128), groups=groups),
        norm_placement="pre" if pre_norm else "post",
        input_norm=not pre_norm,
        final_norm=pre_norm,
        layer_norm_eps=settings.number("layer_norm_eps", 1e-5, low=1e-12, high=1.0),
        activation=settings.choice("hidden_act", "gelu", ACTIVATIONS),
        dropout=settings.number("hidden_dropout", 0.1, high=1.0),
        attention_dropout=settings.number("attention_dropout", 0.1, high=1.0),
        activation_dropout=settings.number("activation_dropout", 0.1, high=1.0),
        layer_drop=settings.number("layerdrop", 0.1, high=1.0),
    )


def _refuse_variants(settings: Settings) -> None:
    """Settings that change the computation in ways sslim does not have."""
    settings.choice("feat_extract_activation", "gelu", {"gelu": "gelu"})
    for name, what in {
        "conv_pos_batch_norm": "positions with batch norm",
        "add_adapter": "convolutions after the encoder",
        "adapter_attn_dim": "adapters in its attention",
    }.items():
        if settings.values.get(name):
            raise CheckpointError(f"{settings.source} has {name}, {what}, which sslim does not have")


def _normalization(folder: Path, settings: Settings, notes: dict[str, Any]) -> tuple[bool, float]:
    """Whether waveforms are normalised, and what is added to their variance; says in ``notes`` where that comes from."""
    path = folder / PREPROCESSOR
    if path.is_file():
        values = read_json(path)
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} is no dictionary of settings")
        preprocessor = Settings(values, str(path))
        if (rate := preprocessor.count("sampling_rate", 16000)) != 16000:
            raise CheckpointError(f"{path}: its sampling_rate is {rate}, HuBERT and wav2vec 2.0 models load with 16000")
        notes["normalization"] = f"do_normalize of {PREPROCESSOR}"
        return preprocessor.boolean("do_normalize", True), EXTRACTOR_EPS
    layer = settings.values.get("feat_extract_norm", "group") == "layer"
    rule = "layer: normalised as when HuBERT was trained" if layer else "group: not normalised"
    notes["normalization"] = f"no {PREPROCESSOR}; by the documented rule for feat_extract_norm ({rule})"
    return layer, ConvFrontendConfig().waveform_eps


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whole or in parts; safetensors before pickles, as transformers prefers."""
    for name in FILES:
        if (folder / name).is_file():
            return _read_part(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_parts(folder, index)
    raise CheckpointError(f"{folder} has a {CONFIG} but no tensors ({' or '.join(FILES)}, or their index)")


def _read_part(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_tensors(path)
    return tensors_of(read_pickle(path), str(path), "its top level")


def _read_parts(folder: Path, index: Path) -> dict[str, Tensor]:
    values = read_json(index)
    places = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(part, str) for part in places.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    weights: dict[str, Tensor] = {}
    for part in sorted(set(places.values())):
        if Path(part).name != part or Path(part).suffix not in (".safetensors", ".bin"):
            raise CheckpointError(f"{index} names {part[:80]!r}, which is no file of tensors beside it")
        if not (folder / part).is_file():
            raise CheckpointError(f"{folder} lacks {part}, which {index.name} names")
        for name, tensor in _read_part(folder / part).items():
            if places.get(name) != part:
                raise CheckpointError(f"{folder / part} has {name[:80]}, which {index.name} does not place there")
            weights[name] = tensor
    if missing := sorted(places.keys() - weights.keys()):
        raise CheckpointError(f"{folder} lacks {missing[0]}, which {index.name} places in {places[missing[0]]}")
    return weights


def _without_heads(weights: dict[str, Tensor], kind: str) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of the bare model without its prefix, and the names of those of task heads around it."""
    prefix = f"{kind}."
    if not any(name.startswith(prefix) for name in weights):
        return weights, []
    dropped = sorted(name for name in weights if _HEADS.fullmatch(name))
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name not in dropped}, dropped
