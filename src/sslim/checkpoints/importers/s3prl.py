"""Mockingjay, TERA and AALBERT checkpoints of S3PRL, of all its eras (arXiv 1910.12638, 2007.06028, 2005.08575).

Tensors are under ``Transformer`` (``Mockingjay`` before v0.1) and ``SpecHead``; the settings are in one of three places:

- up to v0.1: ``Settings.Config``, sections ``transformer`` (``mockingjay``) and, where features are of waveforms, ``online``;
- the transition: ``Config``, sections ``transformer``, ``task``, ``audio``;
- later: ``Upstream_Config``, the same sections, while ``Config`` is the runner's.

A file without ``online`` or ``audio`` was trained on features made beforehand, and does not say which: the model then has no
front-end and takes features. Frames are stacked (``downsample_rate``) by the front-end, or by the model where there is none.

AALBERT's files hold its one layer N times, pre-norm models hold some norms twice: the copies must be equal and one is kept. A
pre-norm file also has a norm for each state that it returns; only the last one, the final norm, is part of what the model
computes, and the others are dropped by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sslim.checkpoints.importers import Imported
from sslim.checkpoints.importers.fairseq_names import rename, tensors_of
from sslim.checkpoints.importers.s3prl_frontends import frontend_of
from sslim.checkpoints.importers.s3prl_names import ALIASES, STATE_NORM, modern_name, native_name
from sslim.checkpoints.importers.settings import Settings, plain, state_of
from sslim.checkpoints.restricted_pickle import CheckpointError
from sslim.frontends import SpectralFrontendConfig, build_frontend
from sslim.models import ModelConfig, ProjectionConfig
from sslim.models.chunking import ChunkingConfig
from sslim.models.reconstruction import HEAD, LAYER_NORM_EPS
from sslim.nn.encoder import BlockConfig, EncoderConfig
from sslim.nn.heads import HeadConfig, SpectrogramHeadConfig
from sslim.nn.positions import SinusoidPositionsConfig

WEIGHTS, HEAD_WEIGHTS = ("Transformer", "Mockingjay"), "SpecHead"
SECTIONS = ("transformer", "mockingjay")
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "swish": "swish"}
UPSTREAMS = {"mockingjay": "mockingjay", "tera": "tera", "aalbert": "audio_albert"}  # family -> S3PRL's name for it, in Args
WHAT = "a Mockingjay, TERA or AALBERT"
_LAYER = re.compile(r"encoder\.layer\.(\d{1,4})\.(.+)")


@dataclass(frozen=True, kw_only=True)
class _Container:
    """Where a file keeps its settings.

    Attributes:
        era: For people.
        config: Its settings by section.
        section: Which section is the model's.
        audio: Which section is the front-end's.
    """

    era: str
    config: Mapping[str, Any]
    section: str
    audio: str


def _container(contents: Any) -> _Container | None:
    if not isinstance(contents, dict):
        return None
    old = contents.get("Settings")
    places = (
        ("v0.1 or earlier", old.get("Config") if isinstance(old, dict) else None, "online"),
        ("transition", contents.get("Config"), "audio"),
        ("later", contents.get("Upstream_Config"), "audio"),
    )
    for era, config, audio in places:
        for section in SECTIONS:
            if isinstance(config, dict) and isinstance(config.get(section), dict):
                return _Container(era=era, config=config, section=section, audio=audio)
    return None


def recognises(contents: Any) -> bool:
    """Whether a file's contents are a checkpoint of this family."""
    return _container(contents) is not None and any(isinstance(contents.get(key), dict) for key in WEIGHTS)


def convert(contents: Mapping[str, Any], source: str) -> Imported:
    """Translates a checkpoint.

    Args:
        contents: What ``read_pickle`` gives.
        source: The file's name, for errors.

    Raises:
        CheckpointError: A tensor nobody knows or one that is missing, copies that differ, settings that contradict the tensors.
    """
    container = _container(contents)
    assert container is not None
    settings = Settings(container.config[container.section], source)
    notes: dict[str, Any] = {"era": container.era, "settings": plain(container.config)}
    step = plain(contents.get("Global_step", contents.get("Step")))
    notes |= {} if step is None else {"step": step}
    key = next(key for key in WEIGHTS if isinstance(contents.get(key), dict))
    weights = _modern(tensors_of(contents[key], source, key), source)
    head = _modern(tensors_of(contents[HEAD_WEIGHTS], source, HEAD_WEIGHTS), source) if HEAD_WEIGHTS in contents else {}
    pre_norm = settings.boolean("pre_layer_norm", False)
    last_norm = None
    if pre_norm:
        weights, last_norm = _without_aliases(weights, source, notes)
    found = _num_layers(weights, settings)
    shared = _is_shared(weights, found, settings, notes)
    if shared:
        weights = {name: t for name, t in weights.items() if not (match := _LAYER.fullmatch(name)) or match[1] == "0"}
    state = rename(weights, source, lambda name: native_name(name, head=False, last_norm=last_norm), what=WHAT)
    state |= rename(head, source, lambda name: native_name(name, head=True), what="its spectrogram head")
    family = "aalbert" if shared else _family(contents, container, notes)
    config = replace(_describe(state, found, shared, container, settings, notes), family=family)
    return Imported(config=config, state=state, notes=notes)


def _modern(weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Puts norms' old names (gamma, beta) right."""
    modern = {modern_name(name): tensor for name, tensor in weights.items()}
    if len(modern) < len(weights):
        twice = next(name for name in weights if modern_name(name) != name and modern_name(name) in weights)
        raise CheckpointError(f"{source} has both {twice} and {modern_name(twice)}")
    return modern


def _num_layers(weights: Mapping[str, Tensor], settings: Settings) -> int:
    found = {int(match[1]) for name in weights if (match := _LAYER.fullmatch(name))}
    stated = settings.count("num_hidden_layers", len(found), low=0)
    if found != set(range(len(found))) or stated != len(found) or not found:
        raise CheckpointError(
            f"{settings.source}: its setting num_hidden_layers is {stated}, its tensors have layers {sorted(found)}"
        )
    return len(found)


def _without_aliases(weights: Mapping[str, Tensor], source: str, notes: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Takes out of a pre-norm file what it has twice and the norms of states but the last, whose number it returns."""
    kept, numbers = dict(weights), set()
    for name, tensor in weights.items():
        if match := re.fullmatch(re.escape(STATE_NORM) + r"(\d{1,4})\.(?:weight|bias)", name):
            numbers.add(int(match[1]))
        layer = _LAYER.fullmatch(name)
        stem, _, part = layer[2].rpartition(".") if layer else ("", "", "")
        if layer is None or stem not in ALIASES:
            continue
        other = f"encoder.layer.{layer[1]}.{ALIASES[stem]}.{part}"
        if other not in weights or not torch.equal(tensor, weights[other]):
            raise CheckpointError(f"{source}: {name} is the second name of {other}, and they are not the same")
        del kept[name]
    layers = {match[1] for name in weights if (match := _LAYER.fullmatch(name))}
    for layer_number in layers:
        for stem in ALIASES:
            for part in ("weight", "bias"):
                if (name := f"encoder.layer.{layer_number}.{stem}.{part}") not in weights:
                    raise CheckpointError(f"{source} lacks {name}, which every pre-norm model of S3PRL has")
    if numbers != set(range(len(numbers))) or len(numbers) - len(layers) not in (0, 1):
        raise CheckpointError(
            f"{source} has the norms {STATE_NORM}{sorted(numbers)}; {len(layers)} layers need as many, or one more"
        )
    dropped = [f"{STATE_NORM}{number}.{part}" for number in range(len(numbers) - 1) for part in ("weight", "bias")]
    for name in dropped:
        if name not in kept:
            raise CheckpointError(f"{source} lacks {name}, which every pre-norm model of S3PRL has")
        del kept[name]
    if dropped:
        notes["dropped"] = dropped
        fresh = all(
            torch.equal(weights[name], torch.full_like(weights[name], float(name.endswith("weight")))) for name in dropped
        )
        notes["state_norms"] = "ones and zeros, never trained" if fresh else "of intermediate states, which are returned raw"
    return kept, str(len(numbers) - 1)


def _is_shared(weights: Mapping[str, Tensor], num_layers: int, settings: Settings, notes: dict[str, Any]) -> bool:
    """Whether all layers are copies of the first one, and so one block that runs N times.

    Raises:
        CheckpointError: The settings say so, and the copies differ.
    """
    stated = settings.boolean("share_layer", False)
    layers: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]
    for name, tensor in weights.items():
        if match := _LAYER.fullmatch(name):
            layers[int(match[1])][match[2]] = tensor
    for number, layer in enumerate(layers):
        for name in layers[0].keys() | layer.keys():
            first, other = layers[0].get(name), layer.get(name)
            if first is not None and other is not None and torch.equal(first, other):
                continue
            if stated:
                names = f"encoder.layer.0.{name} and encoder.layer.{number}.{name}"
                raise CheckpointError(f"{settings.source} shares its layers, and {names} are not equal copies")
            return False
    if num_layers == 1 and not stated:
        return False
    notes["shared_layers"] = f"{num_layers} equal copies of one layer, kept once" + ("" if stated else "; it does not say so")
    return True


def _describe(
    state: Mapping[str, Tensor],
    num_layers: int,
    shared: bool,
    container: _Container,
    settings: Settings,
    notes: dict[str, Any],
) -> ModelConfig:
    width, dim = _shape(state, "projection.linear.weight", settings.source)[::-1]
    _agree(settings, "hidden_size", dim)
    stack = settings.count("downsample_rate", 1)
    if width % stack:
        raise CheckpointError(f"{settings.source}: its tensors take {width} features, no multiple of downsample_rate {stack}")
    frontend = _frontend(container, settings.source, stack, width, notes)
    if frontend is None:
        stated = int(settings.number("input_dim", -1, low=-1, high=1 << 20))
        if stated > 0 and stated * stack != width:
            raise CheckpointError(
                f"{settings.source}: its settings input_dim {stated} and downsample_rate {stack} make {stated * stack} "
                f"features, its tensors take {width}"
            )
        if stack > 1:
            notes["stacking"] = f"{stack} frames in one, by the model; a tail that the batch has no room for is dropped"
    heads: dict[str, HeadConfig] = {}
    if f"heads.{HEAD}.outer.weight" in state:
        heads[HEAD] = SpectrogramHeadConfig(
            hidden_dim=_shape(state, f"heads.{HEAD}.outer.weight", settings.source)[1],
            output_dim=_shape(state, f"heads.{HEAD}.outer.weight", settings.source)[0],
            activation=settings.choice("hidden_act", "gelu", ACTIVATIONS),
            layer_norm_eps=settings.number("layer_norm_eps", LAYER_NORM_EPS),
        )
    inside = stack if frontend is None else 1
    return ModelConfig(
        family="reconstruction",
        frontend=frontend,
        projection=ProjectionConfig(
            feature_dim=width // inside, stack=inside, init_deviation=settings.number("initializer_range", 0.02)
        ),
        encoder=_encoder(state, num_layers, shared, dim, settings),
        heads=heads,
        chunking=_chunking(container, settings, stack, notes),
    )


def _shape(state: Mapping[str, Tensor], name: str, source: str) -> tuple[int, int]:
    tensor = state.get(name)
    if tensor is None or tensor.dim() != 2 or not tensor.numel():
        found = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
        raise CheckpointError(f"{source}: {name} should be a matrix, it has {found}")
    return tensor.shape[0], tensor.shape[1]


def _agree(settings: Settings, name: str, found: int) -> None:
    if (stated := settings.count(name, found)) != found:
        raise CheckpointError(f"{settings.source}: its setting {name} is {stated}, its tensors say {found}")


def _encoder(state: Mapping[str, Tensor], num_layers: int, shared: bool, dim: int, settings: Settings) -> EncoderConfig:
    num_heads = settings.count("num_attention_heads", 12)
    if dim % num_heads:
        raise CheckpointError(f"{settings.source}: its setting num_attention_heads is {num_heads}, no divisor of {dim}")
    pre_norm = settings.boolean("pre_layer_norm", False)
    blocks = []
    for number in range(1 if shared else num_layers):
        inner = _shape(state, f"encoder.blocks.{number}.attention.query.weight", settings.source)[0]
        units = _shape(state, f"encoder.blocks.{number}.feedforward.up.weight", settings.source)[0]
        if inner % (dim // num_heads):
            raise CheckpointError(
                f"{settings.source}: layer {number + 1} has {inner} attention rows, no multiple of width {dim // num_heads}"
            )
        _agree(settings, "intermediate_size", units)
        blocks.append(BlockConfig(num_heads=inner * num_heads // dim, head_dim=dim // num_heads, feedforward_dim=units))
    return EncoderConfig(
        dim=dim,
        blocks=tuple(blocks),
        depth_map=(0,) * num_layers if shared else tuple(range(num_layers)),
        positions=SinusoidPositionsConfig(),
        norm_placement="pre" if pre_norm else "post",
        input_norm=True,
        final_norm=pre_norm,
        layer_norm_eps=settings.number("layer_norm_eps", LAYER_NORM_EPS),
        activation=settings.choice("hidden_act", "gelu", ACTIVATIONS),
        dropout=settings.number("hidden_dropout_prob", 0.1, high=1.0),
        attention_dropout=settings.number("attention_probs_dropout_prob", 0.1, high=1.0),
        activation_dropout=0.0,
    )


def _frontend(
    container: _Container, source: str, stack: int, width: int, notes: dict[str, Any]
) -> SpectralFrontendConfig | None:
    """The front-end that the settings describe; None, with a note, where they describe none or one that sslim has not."""
    audio = container.config.get(container.audio)
    if not isinstance(audio, dict) or not audio:
        loader = container.config.get("dataloader")
        path = loader.get("data_path") if isinstance(loader, dict) else None
        trained_on = f", trained on {path!r}" if isinstance(path, str) else ""
        notes["frontend"] = f"none: it takes {width // stack} features made beforehand{trained_on}; the file does not say which"
        return None
    frontend, notes["frontend"] = frontend_of(audio, source)
    if frontend is None:
        return None
    try:
        given = build_frontend(frontend).feature_dim
    except ValueError as error:
        raise CheckpointError(f"{source}: its settings {container.audio} describe no front-end: {error}") from error
    if given * stack != width:
        raise CheckpointError(
            f"{source}: its settings {container.audio} make {given * stack} features, its tensors take {width}"
        )
    return replace(frontend, stack=stack, stack_tail="drop")


def _chunking(container: _Container, settings: Settings, stack: int, notes: dict[str, Any]) -> ChunkingConfig | None:
    """The longest input that the reference encodes as a whole; None where it has no limit."""
    task = container.config.get("task")
    longest = settings.count("max_input_length", 0, low=0)
    if isinstance(task, dict):
        longest = Settings(task, settings.source).count("sequence_length", longest, low=0)
    if not longest:
        return None
    if stack > 1:
        notes["long_inputs"] = (
            f"encoded as a whole; the reference cuts them at {longest} frames, with wrong counts when stacked"
        )
        return None
    notes["long_inputs"] = f"encoded as a whole; the reference cuts them at {longest} frames, and so does compat='reference'"
    return ChunkingConfig(max_frames=longest)


def _family(contents: Mapping[str, Any], container: _Container, notes: dict[str, Any]) -> str:
    """Which of the three it is, which only its training tells: S3PRL's code is the same for all."""
    said = state_of(contents.get("Args")).get("upstream")
    if isinstance(said, str) and said in UPSTREAMS.values():
        return next(family for family, upstream in UPSTREAMS.items() if upstream == said)
    task = container.config.get("task")
    training = {**container.config[container.section], **(task if isinstance(task, dict) else {})}
    altered = [name for name in ("mask_frequency", "noise_proportion") if training.get(name) not in (None, 0, 0.0)]
    why = f"its training has {' and '.join(altered)}" if altered else "its training masks in time alone, as far as it says"
    notes["family"] = f"{'TERA' if altered else 'Mockingjay'}: {why}"
    return "tera" if altered else "mockingjay"
