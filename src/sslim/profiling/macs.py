"""Multiply-accumulates (MACs) of a described model, counted without building it.

Counted are convolutions, linear maps and the two products of attention, each multiplication with its addition as one MAC (two
FLOPs). Not counted, as is usual: biases, norms, activations, softmax, the folding of weight norm, and the few frames that the
chunks of the convolutional front-end share. That is half of what torch's ``FlopCounterMode`` counts (which leaves out the CPU's
fused attention), and agrees with LightHuBERT's ratio of complexities on the SUPERB leaderboard.

Attention grows with the square of the length, so "MACs of one second of audio" has no meaning without the utterance's length:
every count here is for a stated length, and :attr:`Macs.per_second` divides by it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from sslim.audio import centred_num_frames, kaldi_num_frames, num_conv_frames, num_stacked_frames, samples_of_ms
from sslim.frontends.config import (
    ConvFrontendConfig,
    FilterbankConfig,
    FrontendConfig,
    MfccConfig,
    SpectralFrontendConfig,
    SpectrogramConfig,
    StftConfig,
    StftMfccConfig,
    StoredFeaturesConfig,
    features_sample_rate,
)
from sslim.frontends.spectral import build_features
from sslim.models.speech import ModelConfig
from sslim.nn.conv_encoder import BLOCK_KERNEL, ConvEncoderConfig
from sslim.nn.encoder import BlockConfig, EncoderConfig
from sslim.nn.encoders import AnyEncoderConfig
from sslim.nn.heads import (
    ClusterHeadConfig,
    CodewordHeadConfig,
    HeadConfig,
    RegressionHeadConfig,
    SpectrogramHeadConfig,
    SplitHeadConfig,
)
from sslim.nn.positions import ConvPositionsConfig
from sslim.nn.quantizer import QuantizerConfig
from sslim.nn.recurrent import RecurrentEncoderConfig
from sslim.nn.reference_windows import reference_shape
from sslim.nn.relative_positions import GATE_UNITS
from sslim.nn.windows import chunks_are_faster, window_chunks

Pairs = Literal["computed", "visible"]

GROUPS = {
    "frontend": "front-end",
    "projection": "projection",
    "prenet": "pre-net",
    "positions": "positions",
    "attention": "attention maps",
    "products": "attention products",
    "feedforward": "feed-forward",
    "recurrence": "recurrent layers",
    "convolutions": "convolutions",
    "quantizer": "quantiser",
    "heads": "heads",
}


@dataclass(frozen=True, kw_only=True)
class Macs:
    """A count of multiply-accumulates.

    Attributes:
        parts: MACs of each part, in the order of computation: ``frontend.layers.0`` (from 0, as in the state), ``projection``,
            ``positions``, ``layers.1.attention`` (block applications from 1; query, key, value and output maps),
            ``layers.1.products`` (queries by keys, weights by values), ``layers.1.feedforward``, ``heads.NAME``. Of other
            encoders ``prenet``, ``layers.1.recurrence``, ``layers.1.convolutions`` and, after a layer, ``layers.1.quantizer``.
        num_frames: Frames T that enter the encoder.
        duration_s: Seconds of audio; None when only frames were given.
    """

    parts: dict[str, int]
    num_frames: int
    duration_s: float | None = None

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def per_second(self) -> float:
        """MACs of each second of audio at this length.

        Raises:
            ValueError: Only frames were given.
        """
        if not self.duration_s:
            raise ValueError("MACs per second need a length in seconds or samples, not in frames")
        return self.total / self.duration_s

    def groups(self) -> dict[str, int]:
        """Adds parts up by kind (the values of ``GROUPS``); kinds that cost nothing are left out."""
        sums: Counter[str] = Counter()
        for name, count in self.parts.items():
            words = name.split(".")
            sums[GROUPS[words[2] if words[0] == "layers" else words[0]]] += count
        return {group: sums[group] for group in GROUPS.values() if sums[group]}


def count_macs(
    config: ModelConfig,
    *,
    seconds: float | None = None,
    num_samples: int | None = None,
    num_frames: int | None = None,
    batch: int = 1,
    pairs: Pairs = "computed",
    with_heads: bool = False,
) -> Macs:
    """Counts the MACs of one forward pass over utterances of equal length.

    Args:
        config: The model; ``models.elastic.subnet_config`` describes a subnet of a supernet as one.
        seconds: Length of the audio; rounded to whole samples.
        num_samples: The same in samples at the front-end's rate.
        num_frames: Frames of features instead: the front-end then counts nothing. Exactly one of the three lengths.
        batch: Utterances B.
        pairs: Which pairs of frames the products of attention are counted for: those ``computed`` by sslim (all pairs, or for a
            window that is short against the utterance whole chunks around it), or those ``visible``, the least that windows
            and causality leave. With LightHuBERT's windows the layers' computed MACs include the frame that makes T even.
        with_heads: Whether the objectives' heads count; feature extraction does not run them.

    Returns:
        The count by part.

    Raises:
        ValueError: Not exactly one length, a length that gives no frame, or a model without front-end and no ``num_frames``.
    """
    if sum(length is not None for length in (seconds, num_samples, num_frames)) != 1:
        raise ValueError("give one length: seconds, num_samples or num_frames")
    parts: dict[str, int] = {}
    duration_s = None
    if num_frames is None:
        if config.frontend is None:
            raise ValueError(f"this {config.family} model has no front-end: give num_frames, not seconds or samples")
        rate = frontend_rate(config.frontend)
        samples = round(seconds * rate) if seconds is not None else num_samples
        assert samples is not None
        duration_s = samples / rate
        parts, num_frames = frontend_macs(config.frontend, samples)
        if num_frames < 1:
            raise ValueError(f"{duration_s:g} s of audio are shorter than one frame of this model")
    elif num_frames < config.projection.stack:
        raise ValueError(f"num_frames is {num_frames}; expected at least {config.projection.stack}")
    num_frames //= config.projection.stack
    encoder = config.encoder
    if config.projection.linear:
        parts["projection"] = num_frames * config.projection.stacked_dim * encoder.input_dim
    parts |= encoder_macs(encoder, num_frames, pairs)
    if with_heads:
        parts |= {f"heads.{name}": num_frames * head_macs(head, encoder.dim) for name, head in config.heads.items()}
    return Macs(parts={k: v * batch for k, v in parts.items()}, num_frames=num_frames, duration_s=duration_s)


def encoder_macs(config: AnyEncoderConfig, num_frames: int, pairs: Pairs = "computed") -> dict[str, int]:
    """Returns the MACs of an encoder over T frames by part, as :class:`Macs` names them."""
    if isinstance(config, RecurrentEncoderConfig):
        return {name: num_frames * count for name, count in _recurrent_macs(config).items()}
    if isinstance(config, ConvEncoderConfig):
        return {name: num_frames * count for name, count in _conv_macs(config).items()}
    parts: dict[str, int] = {}
    if isinstance(positions := config.positions, ConvPositionsConfig):
        parts["positions"] = num_frames * config.dim * (config.dim // positions.groups) * positions.kernel_size
    for depth, index in enumerate(config.depth_map, 1):
        for kind, count in block_macs(config, config.blocks[index], num_frames, pairs).items():
            parts[f"layers.{depth}.{kind}"] = count
    return parts


def _recurrent_macs(config: RecurrentEncoderConfig) -> dict[str, int]:
    """MACs of one frame: three gates, each of the input and of the state before."""
    widths = (config.input_dim, *config.prenet_dims)
    parts = {"prenet": sum(a * b for a, b in pairwise(widths))} if config.prenet_dims else {}
    for layer, (inputs, dim) in enumerate(pairwise(config.layer_dims), 1):
        parts[f"layers.{layer}.recurrence"] = 3 * dim * (inputs + dim)
        if config.quantizers and (quantizer := config.quantizers[layer - 1]) is not None:
            parts[f"layers.{layer}.quantizer"] = _quantizer_macs(quantizer)
    return parts


def _conv_macs(config: ConvEncoderConfig) -> dict[str, int]:
    """MACs of one frame; the hidden taps of masked convolutions are not computed."""
    parts = {}
    for block in range(config.num_blocks):
        inputs = config.dim if block else config.input_dim
        parts[f"layers.{2 * block + 1}.convolutions"] = (BLOCK_KERNEL * inputs + config.dim) * config.dim
        parts[f"layers.{2 * block + 2}.convolutions"] = 2 * config.num_taps(block) * config.dim**2
    if config.quantizer is not None:
        parts[f"layers.{config.num_layers}.quantizer"] = _quantizer_macs(config.quantizer)
    return parts


def _quantizer_macs(config: QuantizerConfig) -> int:
    """MACs of one frame's logits; the codes themselves are looked up."""
    return sum(codes * dim for codes, dim in zip(config.num_codes, config.code_dims, strict=True))


def block_macs(config: EncoderConfig, block: BlockConfig, num_frames: int, pairs: Pairs = "computed") -> dict[str, int]:
    """Returns the MACs of one application of a block over T frames: ``attention``, ``products``, ``feedforward``."""
    dim, inner, ranks = config.dim, block.num_heads * block.head_dim, block.ranks
    counts, zero_keys = {}, 0
    if config.has_reference_windows and pairs == "computed":
        num_frames, before = reference_shape(num_frames, block.attention_window or 1)
        zero_keys = before * block.has_reference_windows
    if block.num_heads:
        maps = sum(linear_macs(dim, inner, rank) for rank in (ranks.query, ranks.key, ranks.value))
        maps += linear_macs(inner, dim, ranks.output)
        if config.relative_positions is not None:
            maps += inner * GATE_UNITS
        counts["attention"] = num_frames * maps
        count = computed_pairs if pairs == "computed" else visible_pairs
        window = None if block.has_reference_windows and pairs == "computed" else block.attention_window
        seen = count(num_frames, window, causal=config.causal) + num_frames * zero_keys
        counts["products"] = 2 * inner * seen
    if block.feedforward_dim:
        hidden = block.feedforward_dim
        counts["feedforward"] = num_frames * (linear_macs(dim, hidden, ranks.up) + linear_macs(hidden, dim, ranks.down))
    return counts


def linear_macs(in_dim: int, out_dim: int, rank: int | None = None) -> int:
    """MACs of a linear map of one frame, whole or as two factors of ``rank``."""
    return in_dim * out_dim if rank is None else rank * (in_dim + out_dim)


def computed_pairs(num_frames: int, window: int | None, *, causal: bool) -> int:
    """Pairs of query and key that sslim's kernels multiply: all of them, or the chunks that cover a short window."""
    if window is None or not chunks_are_faster(num_frames, causal=causal, window=window):
        return num_frames**2
    chunks = window_chunks(1, None, num_frames, causal=causal, window=window, device=torch.device("meta"))
    return len(chunks.mask) * chunks.size * chunks.num_keys


def visible_pairs(num_frames: int, window: int | None, *, causal: bool) -> int:
    """Pairs of query and key that a window (frames on each side) and causality leave, over T frames."""
    reach = num_frames - 1 if window is None else min(window, num_frames - 1)
    before = reach * num_frames - reach * (reach + 1) // 2  # sum over queries of min(position, reach)
    return num_frames + before * (1 if causal else 2)


def head_macs(head: HeadConfig, dim: int) -> int:
    """MACs of a head for one frame of a model of width D; a mask embedding costs none."""
    if isinstance(head, ClusterHeadConfig):
        return dim * head.num_clusters
    if isinstance(head, CodewordHeadConfig):
        return dim * head.codeword_dim + head.codeword_dim * head.num_clusters
    if isinstance(head, RegressionHeadConfig):
        return dim * head.output_dim
    if isinstance(head, SplitHeadConfig):
        return head.num_tasks * head.hidden_dim * (dim + head.output_dim)
    if isinstance(head, SpectrogramHeadConfig):
        return head.hidden_dim * (dim + head.output_dim)
    return 0


def frontend_rate(config: FrontendConfig) -> int:
    """Sample rate in Hz of the waveforms that a front-end takes."""
    if isinstance(config, ConvFrontendConfig):
        return config.sample_rate
    return features_sample_rate(config.features)


def frontend_macs(config: FrontendConfig, num_samples: int) -> tuple[dict[str, int], int]:
    """Returns the MACs of a front-end by part, and the frames that it gives.

    Convolutions as such: the statistics of a folded group norm are norm, not counted. Of a spectral front-end the Fourier
    transform is nominal (P log2 P for a real input of P samples) and the Mel weights are the dense product that sslim runs.
    """
    if isinstance(config, SpectralFrontendConfig):
        return _spectral_macs(config, num_samples)
    parts, channels, length = {}, 1, num_samples
    for i, layer in enumerate(config.layers):
        length = num_conv_frames(length, layer.kernel, layer.stride)
        parts[f"frontend.layers.{i}"] = length * layer.channels * channels * layer.kernel
        channels = layer.channels
    return parts, length


def _spectral_macs(config: SpectralFrontendConfig, num_samples: int) -> tuple[dict[str, int], int]:
    features = config.features
    if isinstance(features, StoredFeaturesConfig):
        return {}, num_stacked_frames(build_features(features).num_frames(num_samples), config.stack, config.stack_tail)
    stft = isinstance(features, StftConfig | StftMfccConfig)
    parts, frames, dim = _stft_macs(features, num_samples) if stft else _kaldi_macs(features, num_samples)  # type: ignore[arg-type]
    if config.cepstra:
        parts["frontend.cepstra"] = parts.get("frontend.cepstra", 0) + frames * dim * config.cepstra
    return parts, num_stacked_frames(frames, config.stack, config.stack_tail)


def _stft_macs(config: StftConfig | StftMfccConfig, num_samples: int) -> tuple[dict[str, int], int, int]:
    """MACs by part, frames, features."""
    if isinstance(config, StftMfccConfig):
        parts, frames, dim = _stft_macs(config.spectrum, num_samples)
        return {**parts, "frontend.cepstra": frames * dim * config.num_coefficients}, frames, config.num_coefficients
    size = 2 * (config.num_bins - 1)
    frames = centred_num_frames(num_samples, size, samples_of_ms(config.frame_shift_ms, config.sample_rate))
    parts = {"frontend.transform": frames * round(size * math.log2(size))}
    if config.num_mel_bins:
        parts["frontend.mel"] = frames * config.num_bins * config.num_mel_bins
    return parts, frames, config.num_mel_bins or config.num_bins


def _kaldi_macs(config: FilterbankConfig | MfccConfig | SpectrogramConfig, num_samples: int) -> tuple[dict[str, int], int, int]:
    """MACs by part, frames, features."""
    filterbank = config if isinstance(config, FilterbankConfig) else config.filterbank
    frame_length = samples_of_ms(filterbank.frame_length_ms, filterbank.sample_rate)
    shift = samples_of_ms(filterbank.frame_shift_ms, filterbank.sample_rate)
    frames = kaldi_num_frames(num_samples, frame_length, shift, snip_edges=filterbank.snip_edges)
    size = 1 << (frame_length - 1).bit_length()
    bins = size // 2 + 1
    parts = {"frontend.transform": frames * round(size * math.log2(size))}
    dim = bins
    if config.kind != "spectrogram":
        dim = filterbank.num_mel_bins + int(filterbank.use_energy)
        parts["frontend.mel"] = frames * (2 * bins if filterbank.power else bins) * filterbank.num_mel_bins
    if isinstance(config, MfccConfig):
        parts["frontend.cepstra"] = frames * filterbank.num_mel_bins * config.num_coefficients
        dim = config.num_coefficients
    return parts, frames, dim
