"""torch's own count of a described model, module by module, to check ``sslim.profiling.macs`` with.

``FlopCounterMode`` counts two FLOPs for each MAC. It knows no Fourier transform, and on a CPU it leaves out fused attention; so
the encoder runs on the meta device, where nothing is computed and nothing is left out. LightHuBERT's windows ask for lengths,
which the meta device has none of: they run on a CPU with attention as plain products. So do recurrent and convolutional
encoders, parts of which leave autocast, which the meta device does not know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sslim.frontends import ConvFrontend, ConvFrontendConfig, SpectralFrontend
from sslim.models.speech import ModelConfig, SpeechModel
from sslim.nn.conv_encoder import ConvEncoderConfig
from sslim.nn.encoder import EncoderConfig
from sslim.nn.recurrent import RecurrentEncoderConfig
from sslim.profiling.macs import Macs, frontend_rate
from sslim.profiling.measure import macs_at

ENCODER = "Encoder."  # what the counter calls the encoder's modules


def check_macs(config: ModelConfig, seconds: float, batch: int = 1) -> dict[str, int]:
    """Compares sslim's count with torch's, module by module.

    Args:
        config: The model.
        seconds: Length of audio.
        batch: Utterances B.

    Returns:
        MACs by module: front-end, projection, positions, attention and feed-forward of each block, all applications together;
        of other encoders by the parts of :class:`Macs`.

    Raises:
        RuntimeError: A module for which the counts differ.
    """
    macs = macs_at(config, seconds, batch)
    ours, theirs = macs_by_module(config, macs), torch_macs(config, macs.num_frames, seconds, batch)
    for name in sorted({*ours, *theirs}):
        if ours.get(name, 0) != theirs.get(name, 0):
            raise RuntimeError(f"{name} has {ours.get(name, 0):,} MACs by sslim's count, {theirs.get(name, 0):,} by torch's")
    return ours


def macs_by_module(config: ModelConfig, macs: Macs) -> dict[str, int]:
    """Adds the parts of a count up by the module that computes them; the Fourier transform, unknown to torch, is left out."""
    sums: Counter[str] = Counter()
    for part, count in macs.parts.items():
        words = part.split(".")
        if words[0] == "layers" and isinstance(config.encoder, EncoderConfig):
            kind = "attention" if words[2] == "products" else words[2]
            sums[f"blocks.{config.encoder.depth_map[int(words[1]) - 1]}.{kind}"] += count
        elif words[0] == "layers":
            sums[part] += count
        elif part != "frontend.transform":
            sums[words[0] if words[0] != "frontend" or words[1] != "layers" else part] += count
    return {name: count for name, count in sums.items() if count}


def torch_macs(config: ModelConfig, num_frames: int, seconds: float, batch: int = 1) -> dict[str, int]:
    """Returns half of torch's FLOPs by the names of :func:`macs_by_module`; weights are never drawn.

    Args:
        config: The model; its heads are not run.
        num_frames: Frames T that enter the encoder.
        seconds: Length of audio for the front-end.
        batch: Utterances B.
    """
    config = replace(config, heads={}, search_space=None, storage=None)  # how weights are stored changes no count
    is_plain = isinstance(config.encoder, EncoderConfig) and not config.encoder.has_reference_windows
    device = "meta" if is_plain else "cpu"
    with torch.device(device):
        model = SpeechModel(replace(config, frontend=None)).eval().requires_grad_(False)  # the counter follows no gradient
    counts = {} if config.frontend is None else _frontend_counts(config, seconds, batch)
    features = torch.zeros(batch, num_frames, config.projection.stacked_dim, device=device)
    backend: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
    with backend:
        counts["projection"], _ = _counted(lambda: model.projection(features))
        entered = torch.zeros(batch, num_frames, config.encoder.input_dim, device=device)
        _, by_module = _counted(lambda: model.encoder(entered))
    if not isinstance(config.encoder, EncoderConfig):
        counts |= _other_parts(by_module, config.encoder)
    for name, count in by_module.items():
        words = name.removeprefix(ENCODER).split(".")
        if name.startswith(ENCODER) and len(words) == (3 if words[0] == "blocks" else 1):
            counts[".".join(words)] = count
    return {name: count for name, count in counts.items() if count}


def _other_parts(by_module: Mapping[str, int], config: RecurrentEncoderConfig | ConvEncoderConfig) -> dict[str, int]:
    """What the counter says of a recurrent or convolutional encoder, by the parts of :class:`Macs`."""
    sums: Counter[str] = Counter()
    for name, count in by_module.items():
        kind, _, number = name.partition(".")[2].partition(".")
        if kind == "quantizer" and not number:
            sums[f"layers.{config.num_layers}.quantizer"] += count
        elif kind == "prenet" and number.isdecimal():
            sums[kind] += count
        elif number.isdecimal():
            i = int(number)
            layer, part = {
                "layers": (i + 1, "recurrence"),
                "quantizers": (i + 1, "quantizer"),
                "blocks": (2 * i + 1, "convolutions"),
                "masked": (2 * i + 2, "convolutions"),
            }[kind]
            sums[f"layers.{layer}.{part}"] += count
    return dict(sums)


def _frontend_counts(config: ModelConfig, seconds: float, batch: int) -> dict[str, int]:
    assert config.frontend is not None
    num_samples = round(seconds * frontend_rate(config.frontend))
    if isinstance(config.frontend, ConvFrontendConfig):
        with torch.device("meta"):
            layers = ConvFrontend(config.frontend).requires_grad_(False).layers
        counts, x_BTC = {}, torch.zeros(batch, num_samples, 1, device="meta")
        for i, layer in enumerate(layers):
            counter = FlopCounterMode(display=False)
            with counter:
                x_BTC = layer(x_BTC, layer.matrices(layer.weight), layer.bias)  # type: ignore[operator]
            counts[f"frontend.layers.{i}"] = counter.get_total_flops() // 2
        return counts
    normalization = replace(config.frontend.normalization, kind="none", statistics=None)
    frontend = SpectralFrontend(replace(config.frontend, normalization=normalization))  # computed tables are not for meta
    lengths_B = torch.full((batch,), num_samples)
    return {"frontend": _counted(lambda: frontend(torch.zeros(batch, num_samples), lengths_B))[0]}


def _counted(run: Callable[[], object]) -> tuple[int, dict[str, int]]:
    """MACs of a call: all of them, and by module."""
    with FlopCounterMode(display=False) as counter:
        run()
    by_module = {name: sum(counts.values()) // 2 for name, counts in counter.get_flop_counts().items()}
    return counter.get_total_flops() // 2, by_module
