"""APC, VQ-APC and NPC checkpoints of S3PRL (arXiv 1904.03240, 2005.08392, 2011.00406).

Two layouts:

- v0.1, and the authors' own APC: a bare dictionary of tensors (``rnns.0.…``, ``postnet.layer.…``, ``prenet.layers.…`` if it has
  one). It says neither which features it takes nor whether layers have residuals: the former come from outside, the latter are
  wherever input and output are equally wide, the default of the code;
- later: ``model`` beside ``config`` (or ``Upstream_Config``) with ``model.paras`` and ``data.audio``.

NPC's files also hold the masks of its convolutions, which have to be the ones that its settings describe, and a counter for
each batch norm, which decides nothing: both are dropped by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from sslim.checkpoints.importers import Imported
from sslim.checkpoints.importers.fairseq_names import rename, tensors_of, translate
from sslim.checkpoints.importers.predictive_names import (
    CODEBOOK,
    COUNTER,
    NPC,
    OLD_APC,
    apc_names,
    predictive_frontend_of,
)
from sslim.checkpoints.importers.settings import Settings, plain, short
from sslim.checkpoints.restricted_pickle import CheckpointError
from sslim.frontends import SpectralFrontendConfig
from sslim.models.predictive import APC_HEAD, NPC_HEAD, predictive_model
from sslim.nn.conv_encoder import ConvEncoderConfig
from sslim.nn.quantizer import QuantizerConfig
from sslim.nn.recurrent import RecurrentEncoderConfig

NAME = "APC, VQ-APC, NPC"
OLD_FIRST, APC_FIRST, NPC_FIRST = "rnns.0.weight_ih_l0", "rnn_layers.0.weight_ih_l0", "blocks.0.conv.weight"
SECTIONS = ("config", "Upstream_Config")
ACTIVATIONS = {"relu": "relu", "tanh": "tanh"}
C = TypeVar("C")
_NUMBER = re.compile(r"(?:rnns|rnn_layers|blocks|prenet\.layers|vq_layers)\.(\d{1,4})\.")


def recognises(contents: Any) -> bool:
    """Whether a file's contents are a checkpoint of this family."""
    if not isinstance(contents, dict):
        return False
    if isinstance(contents.get(OLD_FIRST), Tensor):
        return True
    weights = contents.get("model")
    if not isinstance(weights, dict) or _paras(contents) is None:
        return False
    return any(name in {str(key).removeprefix("module.") for key in weights} for name in (APC_FIRST, NPC_FIRST))


def _paras(contents: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The settings of the whole, and of the model."""
    for key in SECTIONS:
        config = contents.get(key)
        model = config.get("model") if isinstance(config, dict) else None
        if isinstance(model, dict) and isinstance(model.get("paras"), dict):
            return config, model["paras"]  # type: ignore[return-value]
    return None


def convert(contents: Mapping[str, Any], source: str) -> Imported:
    """Translates a checkpoint.

    Args:
        contents: What ``read_pickle`` gives.
        source: The file's name, for errors.

    Raises:
        CheckpointError: A tensor nobody knows or one that is missing, settings that contradict the tensors or describe what
            sslim does not have.
    """
    if isinstance(contents.get(OLD_FIRST), Tensor):
        return _convert_old(tensors_of(contents, source, "the file"), source)
    found = _paras(contents)
    assert found is not None
    weights = tensors_of(contents["model"], source, "model")
    convert_one = _convert_apc if APC_FIRST in weights else _convert_npc
    notes: dict[str, Any] = {"era": "later", "settings": plain(found[0])}
    step = plain(contents.get("Step", contents.get("global_step")))
    notes |= {} if step is None else {"step": step}
    data = found[0].get("data")
    audio = data.get("audio") if isinstance(data, dict) else None
    return convert_one(weights, Settings(found[1], source), audio, notes)


def _convert_old(weights: dict[str, Tensor], source: str) -> Imported:
    count, prenet = _count(weights, "rnns", source), _count(weights, "prenet.layers", source)
    dims = tuple(_columns(weights, f"rnns.{i}.weight_hh_l0", source) for i in range(count))
    first = "prenet.layers.0.weight" if prenet else OLD_FIRST
    encoder = RecurrentEncoderConfig(
        input_dim=_columns(weights, first, source),
        dims=dims,
        prenet_dims=tuple(_rows(weights, f"prenet.layers.{i}.weight", source) for i in range(prenet)),
    )
    notes = {
        "era": "v0.1 or the authors' own",
        "frontend": "none: it takes features made beforehand; the file does not say which",
        "residual": "wherever a layer's input and output are equally wide, by default: the file does not say",
        "dropout": f"{encoder.dropout:g} by default: the file does not say",
    }
    state = _renamed(weights, OLD_APC, source, what="an APC", narrow=("postnet.layer.weight",))
    return Imported(config=predictive_model("apc", None, encoder, APC_HEAD), state=state, notes=notes)


def _convert_apc(weights: dict[str, Tensor], settings: Settings, audio: Any, notes: dict[str, Any]) -> Imported:
    source = settings.source
    count = _count(weights, "rnn_layers", source)
    dims = tuple(_columns(weights, f"rnn_layers.{i}.weight_hh_l0", source) for i in range(count))
    _agree(settings, "num_layers", count)
    for dim in dims:
        _agree(settings, "hidden_size", dim)
    width, codes, residual = _columns(weights, APC_FIRST, source), _codes(settings), settings.boolean("residual", True)
    if residual and width == dims[0]:
        raise CheckpointError(
            f"{source}: its features and hidden units are both {width}; S3PRL's first layer has no residual then, sslim's has"
        )
    encoder = _described(
        lambda: RecurrentEncoderConfig(
            input_dim=width,
            dims=dims,
            residual=residual,
            dropout=settings.number("dropout", 0.1, high=1.0),
            drop_last=True,
            quantizers=() if codes is None else (*(None,) * (count - 1), codes),
        ),
        source,
    )
    state = _renamed(weights, apc_names(count), source, what="an APC or VQ-APC")
    frontend = _frontend(audio, width, source, notes)
    family = "apc" if codes is None else "vq-apc"
    return Imported(config=predictive_model(family, frontend, encoder, APC_HEAD), state=state, notes=notes)


def _convert_npc(weights: dict[str, Tensor], settings: Settings, audio: Any, notes: dict[str, Any]) -> Imported:
    source, values = settings.source, settings.values
    if settings.boolean("disable_cross_layer", False):
        raise CheckpointError(
            f"{source}: its setting disable_cross_layer is true; sslim has NPC with a masked convolution a block"
        )
    if values.get("dim_bottleneck") is not None:
        raise CheckpointError(
            f"{source}: its setting dim_bottleneck is {short(values['dim_bottleneck'])}; sslim has no bottleneck"
        )
    count, dim = _count(weights, "blocks", source), _rows(weights, "blocks.0.linear.weight", source, axes=3)
    _agree(settings, "n_blocks", count)
    _agree(settings, "hidden_size", dim)
    encoder = _described(
        lambda: ConvEncoderConfig(
            input_dim=_columns(weights, NPC_FIRST, source, axes=3),
            dim=dim,
            num_blocks=count,
            kernel=settings.count("kernel_size", 15),
            mask=settings.count("mask_size", 5),
            batch_norm=settings.boolean("batch_norm", True),
            residual=settings.boolean("residual", True),
            activation=settings.choice("activate", "relu", ACTIVATIONS),
            dropout=settings.number("dropout", 0.1, high=1.0),
            quantizer=_codes(settings),
        ),
        source,
    )
    dropped = _fixed_tensors(weights, encoder, source)
    notes["dropped"] = dropped
    narrow = tuple(f"blocks.{i}.linear.weight" for i in range(count))
    state = _renamed(weights, NPC, source, what="an NPC", narrow=narrow, dropped=dropped)
    frontend = _frontend(audio, encoder.input_dim, source, notes)
    return Imported(config=predictive_model("npc", frontend, encoder, NPC_HEAD), state=state, notes=notes)


def _frontend(audio: Any, width: int, source: str, notes: dict[str, Any]) -> SpectralFrontendConfig | None:
    """The front-end of the settings; None, with a note, where they describe none or one that sslim has not."""
    if not isinstance(audio, dict) or not audio:
        notes["frontend"] = f"none: it takes {width} features made beforehand; its settings have no data.audio"
        return None
    frontend, notes["frontend"] = predictive_frontend_of(audio, width, source)
    stated = Settings(audio, source).count("feat_dim", width)
    if stated != width:
        raise CheckpointError(f"{source}: its settings data.audio make {stated} features, its tensors take {width}")
    return frontend


def _codes(settings: Settings) -> QuantizerConfig | None:
    vq = settings.values.get("vq")
    if vq is None:
        return None
    sizes = [vq.get(name) if isinstance(vq, dict) else None for name in ("codebook_size", "code_dim")]
    if not all(isinstance(size, list | tuple) and all(type(n) is int for n in size) for size in sizes):
        raise CheckpointError(
            f"{settings.source}: its setting vq is {short(vq)}, expected codebook_size and code_dim as lists of whole numbers"
        )
    temperature = Settings(vq, settings.source).number("gumbel_temperature", 1.0)
    num_codes, code_dims = (tuple(size) for size in sizes)  # type: ignore[arg-type]
    return _described(
        lambda: QuantizerConfig(num_codes=num_codes, code_dims=code_dims, temperature=temperature), settings.source
    )


def _described(make: Callable[[], C], source: str) -> C:
    """Makes a description; what its own checks find is said of the file."""
    try:
        return make()
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{source}: its settings describe no model: {error}") from error


def _count(weights: Mapping[str, Tensor], stem: str, source: str) -> int:
    """How many numbered parts of a name there are, counted from 0 without gaps."""
    prefix = f"{stem}."
    found = {int(match[1]) for name in weights if name.startswith(prefix) and (match := _NUMBER.match(name))}
    if found != set(range(len(found))):
        raise CheckpointError(f"{source} has {stem} {sorted(found)}, which are not counted from 0 without gaps")
    return len(found)


def _rows(weights: Mapping[str, Tensor], name: str, source: str, *, axes: int = 2) -> int:
    return _shape(weights, name, source, axes)[0]


def _columns(weights: Mapping[str, Tensor], name: str, source: str, *, axes: int = 2) -> int:
    return _shape(weights, name, source, axes)[1]


def _shape(weights: Mapping[str, Tensor], name: str, source: str, axes: int) -> tuple[int, ...]:
    tensor = weights.get(name)
    if tensor is None or tensor.dim() != axes or not tensor.numel():
        found = "is not there" if tensor is None else f"has shape {tuple(tensor.shape)}"
        raise CheckpointError(f"{source}: {name} should have {axes} axes, it {found}")
    return tuple(tensor.shape)


def _agree(settings: Settings, name: str, found: int) -> None:
    if (stated := settings.count(name, found)) != found:
        raise CheckpointError(f"{settings.source}: its setting {name} is {stated}, its tensors say {found}")


def _fixed_tensors(weights: Mapping[str, Tensor], encoder: ConvEncoderConfig, source: str) -> list[str]:
    """The names of what is computed here or decides nothing, after a look at whether it is what it should be."""
    names = []
    for block in range(encoder.num_blocks):
        name, taps = f"masked_convs.{block}.conv_mask", encoder.num_taps(block)
        _shape(weights, name, source, 3)
        expected = torch.ones(encoder.dim, encoder.dim, encoder.kernel)
        expected[..., taps : encoder.kernel - taps] = 0
        if not torch.equal(weights[name].float(), expected):
            hidden = f"the {encoder.kernel - 2 * taps} middle taps of {encoder.kernel}"
            raise CheckpointError(f"{source}: {name} does not hide {hidden}, as its settings say")
        counters = [f"blocks.{block}.bn{norm}.{COUNTER}" for norm in (1, 2)] if encoder.batch_norm else []
        for counter in counters:
            if counter not in weights:
                raise CheckpointError(f"{source} lacks {counter}, which every batch norm of torch has")
        names += [name, *counters]
    return names


def _renamed(
    weights: Mapping[str, Tensor],
    table: Mapping[str, str],
    source: str,
    *,
    what: str,
    narrow: tuple[str, ...] = (),
    dropped: list[str] | None = None,
) -> dict[str, Tensor]:
    """Native tensors: codebooks turned, convolutions of one tap (``narrow``) as the matrices that they are."""
    turned = {}
    for name, tensor in weights.items():
        if name in narrow:
            if _shape(weights, name, source, 3)[2] != 1:
                raise CheckpointError(f"{source}: {name} has {tensor.shape[2]} taps, expected 1")
            tensor = tensor.squeeze(-1)
        elif name.endswith(CODEBOOK):
            _shape(weights, name, source, 2)
            tensor = tensor.T
        turned[name] = tensor
    return rename(turned, source, lambda name: translate(name, table), what=what, dropped=dropped or ())
