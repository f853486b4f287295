"""Writes a waveform model as a folder that transformers' ``HubertModel.from_pretrained`` reads.

Shared layers are unrolled: layer L of transformers holds a copy of the block that runs at depth L, so a DistilALHuBERT of two
blocks becomes twelve layers (23.5 M parameters become 94 M). What HubertModel has no place for is refused with the reason;
heads other than the mask embedding are left out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sslim.checkpoints.importers.fairseq_names import translate
from sslim.checkpoints.importers.huggingface import ACTIVATIONS, CONFIG, FILES, PREPROCESSOR, names
from sslim.frontends import ConvFrontendConfig
from sslim.models import ModelConfig, SpeechModel
from sslim.models.elastic import count_parameters
from sslim.models.hubert import MASK
from sslim.models.storage import INT8
from sslim.nn.encoder import EncoderConfig, LinearRanks
from sslim.nn.positions import ConvPositionsConfig, split_weight_norm
from sslim.storage import atomic_folder, save_tensors, write_json


def export_huggingface(model: SpeechModel, folder: str | Path) -> None:
    """Writes ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``.

    transformers' feature extractor normalises waveforms with 1e-7 added to the variance, fairseq with 1e-5: a waveform of
    standard deviation 0.1 comes out 0.05 % larger there, one of 0.01 5 %.

    Args:
        model: A HuBERT, or a distilled, shared-layer or extracted model of its shape.
        folder: Where to; an old export there is replaced when the new one is complete.

    Raises:
        ValueError: HubertModel cannot hold the model, the sentence says why; or ``folder`` holds something else.
    """
    folder = Path(folder)
    if reason := _inexpressible(model.config):
        raise ValueError(f"transformers' HubertModel cannot hold this model: {reason}")
    if folder.exists() and (not (folder / CONFIG).is_file() or not (folder / FILES[0]).is_file()):
        raise ValueError(f"{folder} exists and is no Hugging Face folder: it is not overwritten, choose another name")
    with atomic_folder(folder) as temporary:
        write_json(temporary / CONFIG, _settings(model.config))
        write_json(temporary / PREPROCESSOR, _preprocessor(model.config))
        save_tensors(temporary / FILES[0], _foreign_state(model), {"format": "pt"})


def num_exported_parameters(config: ModelConfig) -> int:
    """Counts what the folder of a model holds: a block for every layer, and of the heads the mask embedding."""
    encoder = config.transformer
    blocks = tuple(encoder.blocks[index] for index in encoder.depth_map)
    positions = encoder.positions
    if isinstance(positions, ConvPositionsConfig):
        positions = replace(positions, weight_norm=True)
    encoder = replace(encoder, blocks=blocks, depth_map=tuple(range(len(blocks))), positions=positions)
    heads = {name: head for name, head in config.heads.items() if name == MASK}
    return count_parameters(replace(config, encoder=encoder, heads=heads))


def _inexpressible(config: ModelConfig) -> str | None:
    """Says what HubertModel has no words for, or None."""
    return _inexpressible_ends(config) or _inexpressible_encoder(config) or _inexpressible_blocks(config.transformer)


def _inexpressible_ends(config: ModelConfig) -> str | None:
    frontend = config.frontend
    if config.search_space is not None:
        return "it is a supernet: export one of its subnets"
    if config.storage in INT8:
        return f"its weights are stored as {config.storage}: export the model before that"
    if not isinstance(frontend, ConvFrontendConfig):
        return "its features are not convolutions over the waveform"
    if frontend.channel_scale:
        return "its front-end scales channels, each by a factor of its own"
    if frontend.sample_rate != 16000:
        return f"its waveforms have {frontend.sample_rate} Hz, not 16000"
    if not config.projection.linear:
        return "it has no linear projection between front-end and encoder"
    mask = config.heads.get(MASK)
    if mask is not None and getattr(mask, "dim", None) != config.transformer.dim:
        return "its mask embedding is as wide as the features, not as the model"
    return None


def _inexpressible_encoder(config: ModelConfig) -> str | None:
    encoder, positions = config.transformer, config.transformer.positions
    norms = (encoder.norm_placement, encoder.input_norm, encoder.final_norm)
    if encoder.causal or getattr(positions, "causal", False):
        return "it is causal"
    if not isinstance(positions, ConvPositionsConfig):
        return "its positions are not a convolution"
    if encoder.relative_positions is not None:
        return "its attention has relative positions"
    if norms not in (("post", True, False), ("pre", False, True)):
        return f"norms {norms} (placement, input, final) are neither its post-norm nor its pre-norm form"
    if config.projection.norm and encoder.layer_norm_eps != 1e-5:
        return (
            f"layer_norm_eps is {encoder.layer_norm_eps:g} in the encoder and 1e-05 before the projection, it has one for both"
        )
    if not encoder.depth_map:
        return "it has no layers"
    return None


def _inexpressible_blocks(encoder: EncoderConfig) -> str | None:
    first = encoder.blocks[encoder.depth_map[0]]
    for layer, index in enumerate(encoder.depth_map, start=1):
        block = encoder.blocks[index]
        if not block.num_heads or not block.feedforward_dim:
            return f"layer {layer} lacks attention or feed-forward"
        if block.attention_window is not None:
            return f"layer {layer} attends to a window"
        if block.ranks != LinearRanks():
            return f"layer {layer} has low-rank matrices"
        if block.num_heads * block.head_dim != encoder.dim:
            return (
                f"layer {layer} has {block.num_heads} heads of width {block.head_dim}, which do not make up width {encoder.dim}"
            )
        if block.num_heads != first.num_heads:
            return f"layers 1 and {layer} have {first.num_heads} and {block.num_heads} heads, it has one number for all"
        if block.feedforward_dim != first.feedforward_dim:
            widths = f"{first.feedforward_dim} and {block.feedforward_dim}"
            return f"layers 1 and {layer} have {widths} feed-forward units, it has one number for all"
    return None


def _settings(config: ModelConfig) -> dict[str, Any]:
    encoder, frontend = config.transformer, config.frontend
    positions, first = encoder.positions, encoder.blocks[encoder.depth_map[0]]
    assert isinstance(frontend, ConvFrontendConfig)
    assert isinstance(positions, ConvPositionsConfig)
    activations: dict[str, str] = {}
    for foreign, native in ACTIVATIONS.items():
        activations.setdefault(native, foreign)
    return {
        "architectures": ["HubertModel"],
        "model_type": "hubert",
        "dtype": "float32",
        "conv_dim": [layer.channels for layer in frontend.layers],
        "conv_kernel": [layer.kernel for layer in frontend.layers],
        "conv_stride": [layer.stride for layer in frontend.layers],
        "num_feat_extract_layers": len(frontend.layers),
        "conv_bias": frontend.bias,
        "feat_extract_norm": frontend.norm,
        "feat_extract_activation": "gelu",
        "feat_proj_layer_norm": config.projection.norm,
        "feat_proj_dropout": 0.0,
        "hidden_size": encoder.dim,
        "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": first.num_heads,
        "intermediate_size": first.feedforward_dim,
        "hidden_act": activations[encoder.activation],
        "layer_norm_eps": encoder.layer_norm_eps,
        "do_stable_layer_norm": encoder.norm_placement == "pre",
        "num_conv_pos_embeddings": positions.kernel_size,
        "num_conv_pos_embedding_groups": positions.groups,
        "conv_pos_batch_norm": False,
        "hidden_dropout": encoder.dropout,
        "attention_dropout": encoder.attention_dropout,
        "activation_dropout": encoder.activation_dropout,
        "layerdrop": encoder.layer_drop,
        "mask_time_prob": 0.05 if MASK in config.heads else 0.0,  # transformers has a mask embedding only where it may mask
        "mask_feature_prob": 0.0,
    }


def _preprocessor(config: ModelConfig) -> dict[str, Any]:
    """Settings of transformers' ``Wav2Vec2FeatureExtractor``; group-norm models are not to be given an attention mask."""
    frontend = config.frontend
    assert isinstance(frontend, ConvFrontendConfig)
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": frontend.normalize_waveform,
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": frontend.norm == "layer",
        "sampling_rate": frontend.sample_rate,
    }


def _foreign_state(model: SpeechModel) -> dict[str, Tensor]:
    """Tensors under transformers' names, blocks repeated for every depth that runs them."""
    config = model.config
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("encoder.blocks."):
            block, rest = name.removeprefix("encoder.blocks.").split(".", 1)
            for depth, index in enumerate(config.transformer.depth_map):
                if index == int(block):
                    state[f"encoder.blocks.{depth}.{rest}"] = tensor
        elif not name.startswith("heads.") or name.startswith(f"heads.{MASK}."):
            state[name] = tensor
    if "encoder.positions.weight" in state:
        gain, direction = split_weight_norm(state.pop("encoder.positions.weight"))
        state |= {"encoder.positions.gain": gain, "encoder.positions.direction": direction}
    table = {native: foreign for foreign, native in names(final_norm=config.transformer.final_norm).items()}
    foreign = {}
    for name, tensor in state.items():
        key = translate(name, table)
        assert key is not None, name
        foreign[key] = tensor.float()
    return foreign
