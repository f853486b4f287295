"""Counts of multiply-accumulates against torch's own counter and LightHuBERT's published shape of costs."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sslim.frontends import (
    ConvFrontendConfig,
    FilterbankConfig,
    MfccConfig,
    SpectralFrontendConfig,
    SpectrogramConfig,
    StftConfig,
)
from sslim.frontends.config import ConvLayerConfig, FeaturesConfig
from sslim.models import ModelConfig, ProjectionConfig, build_model
from sslim.models.elastic import subnet_config
from sslim.models.search_space import LIGHTHUBERT_BASE, LIGHTHUBERT_SMALL, SearchSpace
from sslim.nn.encoder import BlockConfig, EncoderConfig, LinearRanks, plain_blocks
from sslim.nn.heads import (
    ClusterHeadConfig,
    CodewordHeadConfig,
    MaskEmbeddingConfig,
    RegressionHeadConfig,
    SpectrogramHeadConfig,
    SplitHeadConfig,
)
from sslim.nn.positions import ConvPositionsConfig, SinusoidPositionsConfig
from sslim.nn.relative_positions import RelativePositionsConfig
from sslim.profiling import Macs, count_macs
from sslim.profiling.macs import visible_pairs

CONV = ConvFrontendConfig(
    norm="layer",
    layers=(
        ConvLayerConfig(channels=6, kernel=10, stride=5),
        ConvLayerConfig(channels=8, kernel=3, stride=2),
        ConvLayerConfig(channels=7, kernel=2, stride=2),
    ),
)
POSITIONS = ConvPositionsConfig(kernel_size=16, groups=4)


def config(**encoder: Any) -> ModelConfig:
    settings: dict[str, Any] = {"dim": 24, "positions": POSITIONS, **plain_blocks(2, 3, 8, 40), **encoder}
    return ModelConfig(
        family="test", frontend=CONV, projection=ProjectionConfig(feature_dim=7, norm=True), encoder=EncoderConfig(**settings)
    )


def counted(described: ModelConfig, num_samples: int, batch: int = 1) -> float:
    """Half of torch's FLOPs of a forward pass.

    The counter does not know the CPU's fused attention, so attention runs as plain products; with gradients the front-end runs
    whole, without the overlap of its chunks.
    """
    model = build_model(described)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.encode(0.1 * torch.randn(batch, num_samples), keep_layers=False)
    return counter.get_total_flops() / 2


ENCODERS = {
    "plain": {},
    "sinusoids": {"positions": SinusoidPositionsConfig()},
    "shared": {**plain_blocks(2, 3, 8, 40), "depth_map": (0, 0, 1, 0)},
    "uneven": {
        "blocks": (
            BlockConfig(num_heads=1, head_dim=8, feedforward_dim=12),
            BlockConfig(num_heads=0, head_dim=8, feedforward_dim=20),
            BlockConfig(num_heads=2, head_dim=5, feedforward_dim=0),
        ),
        "depth_map": (0, 1, 2),
    },
    "low rank": {
        "blocks": (
            BlockConfig(num_heads=3, head_dim=8, feedforward_dim=40, ranks=LinearRanks(query=2, output=3, up=5, down=4)),
        ),
        "depth_map": (0, 0),
    },
    "window": {"blocks": (BlockConfig(num_heads=3, head_dim=8, feedforward_dim=40, attention_window=4),), "depth_map": (0,)},
    "lighthubert's windows": {
        "blocks": (
            BlockConfig(num_heads=3, head_dim=8, feedforward_dim=40, attention_window=4, window_rule="lighthubert"),
            BlockConfig(num_heads=3, head_dim=8, feedforward_dim=40),
            BlockConfig(num_heads=3, head_dim=8, feedforward_dim=40, attention_window=1, window_rule="lighthubert"),
        ),
        "depth_map": (0, 1, 2),
    },
    "relative": {"positions": POSITIONS, "relative_positions": RelativePositionsConfig(num_heads=3)},
}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize(("num_samples", "batch"), [(1234, 1), (8000, 3)])
def test_it_counts_what_torch_counts(name: str, num_samples: int, batch: int) -> None:
    described = config(**ENCODERS[name])
    assert count_macs(described, num_samples=num_samples, batch=batch).total == counted(described, num_samples, batch)


def test_chunks_of_a_window_are_counted_as_they_run() -> None:
    described = config(**ENCODERS["window"])
    near, whole = (count_macs(net, num_samples=16000).parts["layers.1.products"] for net in (described, config()))
    assert near < whole / 4  # 799 frames, 9 of them seen
    assert count_macs(described, num_samples=16000).total == counted(described, 16000)


@pytest.mark.parametrize(
    "features",
    [
        FilterbankConfig(),
        FilterbankConfig(power=False, log=False, num_mel_bins=20, frame_shift_ms=20.0),
        SpectrogramConfig(),
        MfccConfig(),
    ],
)
@pytest.mark.parametrize("stack", [1, 2])
def test_spectral_features_are_counted_but_for_their_transform(features: FeaturesConfig, stack: int) -> None:
    width = {"filterbank": getattr(features, "num_mel_bins", 0), "spectrogram": 257, "mfcc": 13}[features.kind]
    described = replace(
        config(),
        frontend=SpectralFrontendConfig(features=features, stack=stack),
        projection=ProjectionConfig(feature_dim=width * stack),
    )
    macs = count_macs(described, seconds=0.7)
    transform = macs.parts["frontend.transform"]
    base_frames = 1 + (11200 - 400) // (320 if getattr(features, "frame_shift_ms", 10.0) == 20.0 else 160)
    assert transform == base_frames * 512 * 9
    assert macs.total - transform == counted(described, 11200)


def test_centred_transforms_are_counted_by_bins_and_channels() -> None:
    described = replace(
        config(),
        frontend=SpectralFrontendConfig(features=StftConfig(num_mel_bins=80), stack=3, stack_tail="drop"),
        projection=ProjectionConfig(feature_dim=240),
    )
    macs = count_macs(described, seconds=0.7)
    assert macs.num_frames == 71 // 3
    assert macs.parts["frontend.transform"] == 71 * round(400 * math.log2(400))
    assert macs.total - macs.parts["frontend.transform"] == counted(described, 11200)


def test_frames_that_the_model_stacks_enter_fewer() -> None:
    described = replace(config(), frontend=None, projection=ProjectionConfig(feature_dim=5, stack=3))
    macs = count_macs(described, num_frames=32)
    assert macs.num_frames == 10
    assert macs.parts["projection"] == 10 * 15 * 24
    assert macs.parts["layers.1.products"] == count_macs(config(), num_frames=10).parts["layers.1.products"]
    with pytest.raises(ValueError, match="num_frames is 2; expected at least 3"):
        count_macs(described, num_frames=2)


HEADS = {
    "clusters": ClusterHeadConfig(num_clusters=11),
    "codewords": CodewordHeadConfig(num_clusters=11, codeword_dim=9),
    "regression": RegressionHeadConfig(output_dim=10),
    "split": SplitHeadConfig(num_tasks=2, hidden_dim=6, output_dim=10),
    "spectrogram": SpectrogramHeadConfig(hidden_dim=6, output_dim=10),
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_count_when_asked(kind: str) -> None:
    described = replace(config(), heads={"mask": MaskEmbeddingConfig(dim=24), "it": HEADS[kind]})
    macs = count_macs(described, num_frames=33, with_heads=True)
    model = build_model(described)
    with FlopCounterMode(display=False) as counter:
        model.heads["it"](torch.randn(1, 33, 24))
    assert macs.parts["heads.it"] == counter.get_total_flops() / 2
    assert macs.total == count_macs(described, num_frames=33).total + macs.parts["heads.it"]


@pytest.mark.parametrize(("window", "causal"), [(None, False), (None, True), (0, False), (3, False), (3, True), (50, False)])
def test_visible_pairs_are_those_of_the_mask(window: int | None, causal: bool) -> None:
    t = torch.arange(20)
    distance = t[:, None] - t[None, :]
    seen = torch.ones(20, 20, dtype=torch.bool) if window is None else distance.abs() <= window
    assert visible_pairs(20, window, causal=causal) == int((seen & ((distance >= 0) | (not causal))).sum())


def lighthubert(space: SearchSpace) -> ModelConfig:
    return ModelConfig(
        family="lighthubert",
        frontend=ConvFrontendConfig(norm="layer"),
        projection=ProjectionConfig(feature_dim=512, norm=True),
        encoder=EncoderConfig(dim=768, **plain_blocks(12, 12, 64, 3072)),
        search_space=space,
    )


@pytest.mark.parametrize(
    ("space", "choice", "gmacs"),
    [
        (LIGHTHUBERT_BASE, "min", 46.0),
        (LIGHTHUBERT_BASE, "default", 59.6),
        (LIGHTHUBERT_BASE, "max", 74.1),
        (LIGHTHUBERT_SMALL, "min", 29.4),
        (LIGHTHUBERT_SMALL, "default", 38.1),
        (LIGHTHUBERT_SMALL, "max", 47.6),
    ],
)
def test_lighthubert_costs_what_its_specification_says(space: SearchSpace, choice: str, gmacs: float) -> None:
    macs = count_macs(subnet_config(lighthubert(space), choice), seconds=10.0)
    assert macs.num_frames == 499
    assert round(macs.total / 1e9, 1) == gmacs
    assert round(macs.groups()["front-end"] / 1e9, 1) == 24.5
    assert macs.per_second == macs.total / 10.0


def test_groups_add_up_to_the_total() -> None:
    macs = count_macs(replace(config(), heads=HEADS), num_samples=3000, with_heads=True)  # type: ignore[arg-type]
    assert sum(macs.groups().values()) == macs.total
    assert set(macs.groups()) == {
        "front-end",
        "projection",
        "positions",
        "attention maps",
        "attention products",
        "feed-forward",
        "heads",
    }


def test_lengths_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="give one length"):
        count_macs(config())
    with pytest.raises(ValueError, match="give one length"):
        count_macs(config(), seconds=1.0, num_frames=3)
    with pytest.raises(ValueError, match=r"0.0005 s of audio are shorter than one frame"):
        count_macs(config(), num_samples=8)
    with pytest.raises(ValueError, match="has no front-end: give num_frames"):
        count_macs(replace(config(), frontend=None), seconds=1.0)
    with pytest.raises(ValueError, match="need a length in seconds"):
        _ = Macs(parts={}, num_frames=3).per_second
