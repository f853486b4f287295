"""HuBERT checkpoints of fairseq, and of S3PRL's converter (Hsu et al., "HuBERT", arXiv 2106.07447).

Layout of the files:

- fairseq: ``cfg`` (``model`` and ``task``; a dictionary, or omegaconf objects) or the older ``args`` (one flat namespace),
  ``model`` with the tensors, ``task_state.dictionaries`` with the clusters' symbols;
- S3PRL: ``task_cfg``, ``model_cfg``, ``model_weight``, ``dictionaries_symbols``;
- fine-tuned with CTC (fairseq): tensors under ``w2v_encoder.w2v_model.``, the settings of the pre-trained model under
  ``cfg.model.w2v_args``. The encoder is loaded, the CTC layer ``w2v_encoder.proj`` is not.

The description comes from the settings; tensors that do not fit it are errors. fairseq counts the frames of padded batches
coarsely and lets padding into the group norm; ``load_model(path, compat="reference")`` does so too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sslim.checkpoints.importers import Imported
from sslim.checkpoints.importers.conv_layers import parse_conv_layers
from sslim.checkpoints.importers.fairseq_names import native_state, tensors_of
from sslim.checkpoints.importers.settings import ACTIVATIONS, Settings, plain, settings_of, short
from sslim.checkpoints.pickle_values import Placeholder
from sslim.checkpoints.restricted_pickle import CheckpointError
from sslim.frontends import ConvFrontendConfig
from sslim.models import ModelConfig, ProjectionConfig
from sslim.models.hubert import HEAD, MASK
from sslim.nn.encoder import EncoderConfig, plain_blocks
from sslim.nn.heads import CodewordHeadConfig, HeadConfig, MaskEmbeddingConfig
from sslim.nn.positions import ConvPositionsConfig

S3PRL_KEYS = ("task_cfg", "model_cfg", "model_weight")
CONV_LAYERS = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
NORMS = {"default": "group", "layer_norm": "layer"}
CODEWORDS = ("final_proj.weight", "final_proj.bias", "label_embs_concat")
SPECIAL_SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>"]
_OTHERS = {
    "mask_emb": f"heads.{MASK}.embedding",
    "final_proj.weight": f"heads.{HEAD}.projection.weight",
    "final_proj.bias": f"heads.{HEAD}.projection.bias",
    "label_embs_concat": f"heads.{HEAD}.codewords",
}
_CTC_PREFIX, _CTC_LAYER = "w2v_encoder.w2v_model.", "w2v_encoder.proj."
_RELATIVES, _RELATIVE_PARTS = ("hubert_pruner", "student_hubert"), ("layer_pred_heads.",)  # LightHuBERT


def recognises(contents: Any) -> bool:
    """Whether a file's contents are a HuBERT checkpoint of fairseq or of S3PRL's converter."""
    if not isinstance(contents, dict):
        return False
    if all(isinstance(contents.get(key), dict | Placeholder) for key in S3PRL_KEYS):
        return True
    weights = contents.get("model")
    if not isinstance(weights, dict) or not (contents.get("cfg") or contents.get("args")):
        return False
    cfg = settings_of(contents.get("cfg"))
    name = _name_of(cfg.get("model")) if isinstance(cfg, dict) else None
    if name in _RELATIVES or any(isinstance(key, str) and key.startswith(_RELATIVE_PARTS) for key in weights):
        return False
    names = weights.keys()
    front = ("feature_extractor.conv_layers.0.0.weight", f"{_CTC_PREFIX}feature_extractor.conv_layers.0.0.weight")
    return any(f"{prefix}{name}" in names for name in front for prefix in ("", "module."))


def convert(contents: Mapping[str, Any], source: str) -> Imported:
    """Translates a checkpoint.

    Args:
        contents: What ``read_pickle`` gives.
        source: The file's name, for errors.

    Raises:
        CheckpointError: A tensor nobody knows, settings that are missing, unknown or beyond what sslim computes.
    """
    if S3PRL_KEYS[0] in contents:
        model, task = settings_of(contents["model_cfg"]), settings_of(contents["task_cfg"])
        weights = tensors_of(contents["model_weight"], source, "model_weight")
        symbols = settings_of(contents.get("dictionaries_symbols"))
    else:
        model, task = _fairseq_settings(contents, source)
        weights = tensors_of(contents["model"], source, "model")
        symbols = _symbols(contents.get("task_state"))
    if not isinstance(model, dict) or not isinstance(task, dict):
        raise CheckpointError(f"{source} has no readable settings of its model and task")
    name = _name_of(model)
    if name is not None and not name.startswith("hubert"):
        raise CheckpointError(f"{source} is a fairseq model {name[:40]!r}, only hubert and hubert_ctc load")
    notes: dict[str, Any] = {"settings": {"model": plain(model), "task": plain(task)}}
    weights, model, task = _without_ctc(weights, model, task, notes, source)
    config, dropped = _describe(weights, Settings(model, source), Settings(task, source), symbols, notes)
    pre_norm = config.transformer.final_norm
    state = native_state(weights, source, final_norm=pre_norm, others=_OTHERS, dropped=dropped)
    return Imported(config=config, state=state, notes=notes)


def frontend_of(model: Settings, *, normalize: bool, sample_rate: int = 16000) -> ConvFrontendConfig:
    """Returns the front-end that fairseq's model settings describe; its padded frames are counted coarsely."""
    return ConvFrontendConfig(
        sample_rate=sample_rate,
        layers=parse_conv_layers(model.values.get("conv_feature_layers", CONV_LAYERS), model.source),
        norm=model.choice("extractor_mode", "default", NORMS),
        bias=model.boolean("conv_bias", False),
        normalize_waveform=normalize,
        gradient_scale=max(0.0, model.number("feature_grad_mult", 1.0, low=float("-inf"))),
        reference_mask="coarse",
    )


def encoder_of(model: Settings) -> EncoderConfig:
    """Returns the encoder that fairseq's model settings describe, with fairseq's defaults for those that are absent.

    Raises:
        CheckpointError: Settings that sslim has no encoder for: conformer layers, relative or deep positions.
    """
    for name, accepted in {"layer_type": "transformer", "pos_enc_type": "abs"}.items():
        model.choice(name, accepted, {accepted: accepted})
    if model.values.get("attn_type"):
        raise CheckpointError(f"{model.source}: its setting attn_type is {short(model.values['attn_type'])}, expected none")
    model.number("pos_conv_depth", 1, low=1, high=1)
    if model.boolean("conv_pos_batch_norm", False):
        raise CheckpointError(f"{model.source} has conv_pos_batch_norm, positions with batch norm, which sslim does not have")
    dim, num_heads = model.count("encoder_embed_dim", 768), model.count("encoder_attention_heads", 12)
    if dim % num_heads:
        raise CheckpointError(f"{model.source}: its {num_heads} heads do not divide its width {dim}")
    blocks = plain_blocks(
        model.count("encoder_layers", 12), num_heads, dim // num_heads, model.count("encoder_ffn_embed_dim", 3072)
    )
    pre_norm = model.boolean("layer_norm_first", False)
    groups = model.count("conv_pos_groups", 16)
    if dim % groups:
        raise CheckpointError(f"{model.source}: its conv_pos_groups {groups} do not divide its width {dim}")
    return EncoderConfig(
        dim=dim,
        **blocks,
        positions=ConvPositionsConfig(kernel_size=model.count("conv_pos", 128), groups=groups),
        norm_placement="pre" if pre_norm else "post",
        input_norm=not pre_norm,
        final_norm=pre_norm,
        activation=model.choice("activation_fn", "gelu", ACTIVATIONS),
        dropout=model.number("dropout", 0.1, high=1.0),
        attention_dropout=model.number("attention_dropout", 0.1, high=1.0),
        activation_dropout=model.number("activation_dropout", 0.0, high=1.0),
        layer_drop=model.number("encoder_layerdrop", 0.0, high=1.0),
    )


def padding_note(frontend: ConvFrontendConfig) -> str:
    """Says, for the notes of a waveform model, what ``compat="reference"`` would change."""
    counted = "frames counted by fairseq's coarse rule" if frontend.reference_mask == "coarse" else "frames counted exactly"
    group = "group-norm statistics over padding too, and " if frontend.norm == "group" else ""
    return f"padded batches: features do not depend on padding; compat='reference' has {group}{counted}"


def _name_of(model: Any) -> str | None:
    """Which fairseq model it is: ``hubert``, ``hubert_ctc``, ``wav2vec2`` ..."""
    name = model.get("_name") or model.get("arch") if isinstance(model, dict) else None
    return name if isinstance(name, str) else None


def _fairseq_settings(contents: Mapping[str, Any], source: str) -> tuple[Any, Any]:
    """The model's and the task's settings: ``cfg``, or the one namespace ``args`` of older files."""
    cfg = settings_of(contents.get("cfg"))
    if isinstance(cfg, dict) and cfg.get("model"):
        model, task = cfg["model"], cfg.get("task")
    else:
        model = task = settings_of(contents.get("args"))
    if not isinstance(model, dict) or not isinstance(task, dict):
        raise CheckpointError(
            f"{source} has the tensors of a HuBERT but no readable settings (cfg.model and cfg.task, or args)"
        )
    return model, task


def _symbols(task_state: Any) -> list[Any] | None:
    """Each dictionary's symbols in ``task_state``, from pickled fairseq ``Dictionary`` objects; None when there are none."""
    dictionaries = task_state.get("dictionaries") if isinstance(task_state, dict) else None
    if not isinstance(dictionaries, list | tuple) or not dictionaries:
        return None
    found = [item.state.get("symbols") if isinstance(getattr(item, "state", None), dict) else item for item in dictionaries]
    return found if all(isinstance(symbols, list) for symbols in found) else None


def _without_ctc(
    weights: dict[str, Tensor], model: dict[str, Any], task: dict[str, Any], notes: dict[str, Any], source: str
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors and settings of the encoder inside a fine-tuned model; others as they are."""
    if not any(name.startswith(_CTC_PREFIX) for name in weights):
        return weights, model, task
    inner = model.get("w2v_args")
    inner = inner.get("cfg", inner) if isinstance(inner, dict) else None
    inner_model = inner.get("model", inner) if isinstance(inner, dict) else None
    inner_task = inner.get("task", inner) if isinstance(inner, dict) else None
    if not isinstance(inner_model, dict) or not isinstance(inner_task, dict):
        raise CheckpointError(
            f"{source} is fine-tuned with CTC and lacks its HuBERT's settings (cfg.model.w2v_args): give the pre-trained file"
        )
    dropped = sorted(name for name in weights if name.startswith(_CTC_LAYER))
    notes["dropped"] = dropped
    kept = {name.removeprefix(_CTC_PREFIX): tensor for name, tensor in weights.items() if name not in dropped}
    return kept, inner_model, {**inner_task, "normalize": model.get("normalize", inner_task.get("normalize", False))}


def _describe(
    weights: Mapping[str, Tensor], model: Settings, task: Settings, symbols: Sequence[Any] | None, notes: dict[str, Any]
) -> tuple[ModelConfig, list[str]]:
    """The model's description, and the names of tensors that have no place in it."""
    frontend = frontend_of(model, normalize=task.boolean("normalize", False), sample_rate=task.count("sample_rate", 16000))
    encoder = encoder_of(model)
    notes["padding"] = padding_note(frontend)
    heads: dict[str, HeadConfig] = {MASK: MaskEmbeddingConfig(dim=encoder.dim)}  # every HuBERT of fairseq has one
    head, dropped = _codewords(weights, model, symbols, notes)
    if head is not None:
        heads[HEAD] = head
    if dropped:
        notes["dropped"] = [*notes.get("dropped", []), *dropped]
    width = frontend.layers[-1].channels
    config = ModelConfig(
        family="hubert",
        frontend=frontend,
        projection=ProjectionConfig(feature_dim=width, norm=True, linear=width != encoder.dim),
        encoder=encoder,
        heads=heads,
    )
    return config, dropped


def _codewords(
    weights: Mapping[str, Tensor], model: Settings, symbols: Sequence[Any] | None, notes: dict[str, Any]
) -> tuple[CodewordHeadConfig | None, list[str]]:
    """The pre-training head, or the names of its tensors where they are dropped (and why, in the notes)."""
    found = [name for name in CODEWORDS if name in weights]
    if "dropped" in notes or not found:  # fine-tuned models keep the codewords and lose the map to them
        return None, found
    codewords, projection = (weights.get(name) for name in ("label_embs_concat", "final_proj.weight"))
    if codewords is None or projection is None or codewords.dim() != 2 or projection.dim() != 2 or not codewords.numel():
        raise CheckpointError(
            f"{model.source} has {', '.join(found)}, expected matrices final_proj.weight and label_embs_concat"
        )
    glu = sorted(name for name in weights if name.startswith("target_glu."))
    num_dictionaries = len(symbols) if symbols else max(1, len(projection) // codewords.shape[1])
    if glu or num_dictionaries > 1:
        what = "target_glu" if glu else f"codewords for {num_dictionaries} dictionaries"
        notes["codewords"] = f"dropped: {what}, sslim has one set of codewords"
        return None, [*found, *glu]
    if symbols and isinstance(symbols[0], list):
        if len(symbols[0]) != len(codewords):
            sizes = f"{len(symbols[0])} symbols in its dictionary, {len(codewords)} codewords"
            raise CheckpointError(f"{model.source} contradicts itself: {sizes}")
        notes["special_symbols"] = 4 if [short(s) for s in symbols[0][:4]] == [short(s) for s in SPECIAL_SYMBOLS] else 0
    temperature = model.number("logit_temp", 0.1, low=1e-6)
    return CodewordHeadConfig(num_clusters=len(codewords), codeword_dim=codewords.shape[1], temperature=temperature), []
