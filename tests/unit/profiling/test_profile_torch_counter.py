"""sslim's MACs against torch's counter on the meta device, module by module, for every kind of part."""

from dataclasses import replace
from typing import Any

import pytest

from sslim.frontends import ConvFrontendConfig, FilterbankConfig, MfccConfig, NormalizationConfig, SpectralFrontendConfig
from sslim.frontends.config import ConvLayerConfig
from sslim.models import ModelConfig, ProjectionConfig
from sslim.models.hubert import PRESETS
from sslim.models.melhubert import melhubert
from sslim.nn.encoder import BlockConfig, EncoderConfig, LinearRanks, plain_blocks
from sslim.nn.heads import ClusterHeadConfig
from sslim.nn.positions import ConvPositionsConfig
from sslim.nn.relative_positions import RelativePositionsConfig
from sslim.profiling import torch_counter
from sslim.profiling.measure import macs_at
from sslim.profiling.torch_counter import check_macs, macs_by_module

LAYERS = (ConvLayerConfig(channels=6, kernel=10, stride=5), ConvLayerConfig(channels=8, kernel=3, stride=2))
WIDE = BlockConfig(num_heads=3, head_dim=8, feedforward_dim=40)
ENCODERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {**plain_blocks(2, 3, 8, 40), "depth_map": (0, 0, 1, 0)},
    "uneven": {
        "blocks": (replace(WIDE, num_heads=0), replace(WIDE, feedforward_dim=0), replace(WIDE, num_heads=1, head_dim=5)),
        "depth_map": (0, 1, 2),
    },
    "low rank": {"blocks": (replace(WIDE, ranks=LinearRanks(query=2, output=3, up=5)),), "depth_map": (0, 0)},
    "window": {"blocks": (replace(WIDE, attention_window=4),), "depth_map": (0,)},
    "lighthubert's window": {
        "blocks": (replace(WIDE, attention_window=4, window_rule="lighthubert"), WIDE),
        "depth_map": (0, 1),
    },
    "relative": {"relative_positions": RelativePositionsConfig(num_heads=3)},
    "no convolution": {"positions": None},
}


def config(norm: str = "layer", **encoder: Any) -> ModelConfig:
    settings: dict[str, Any] = {"dim": 24, "positions": ConvPositionsConfig(kernel_size=16, groups=4)}
    return ModelConfig(
        family="test",
        frontend=ConvFrontendConfig(layers=LAYERS, norm=norm),
        projection=ProjectionConfig(feature_dim=8, norm=True),
        encoder=EncoderConfig(**settings | plain_blocks(2, 3, 8, 40) | encoder),
        heads={"it": ClusterHeadConfig(num_clusters=7)},
    )


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_both_count_the_same_in_every_module(name: str, norm: str) -> None:
    described = config(norm, **ENCODERS[name])
    counts = check_macs(described, 0.31, batch=2)
    assert sum(counts.values()) == macs_at(described, 0.31, 2).total
    assert {"frontend.layers.0", "frontend.layers.1", "projection"} <= set(counts)


def test_a_shared_block_is_one_module_with_all_its_applications() -> None:
    counts = check_macs(config(**ENCODERS["shared"]), 0.31)
    assert counts["blocks.0.feedforward"] == 3 * counts["blocks.1.feedforward"]


@pytest.mark.parametrize(
    "frontend",
    [
        SpectralFrontendConfig(features=FilterbankConfig(num_mel_bins=8), stack=2),
        SpectralFrontendConfig(features=MfccConfig(), deltas=1),
        SpectralFrontendConfig(
            features=FilterbankConfig(num_mel_bins=10), cepstra=8, normalization=NormalizationConfig(kind="global")
        ),
    ],
)
def test_spectral_front_ends_agree_but_for_the_transform(frontend: SpectralFrontendConfig) -> None:
    width = {"filterbank": 16, "mfcc": 26}[frontend.features.kind] if not frontend.cepstra else 8
    described = replace(config(), frontend=frontend, projection=ProjectionConfig(feature_dim=width))
    macs = macs_at(described, 0.5)
    assert sum(check_macs(described, 0.5).values()) == macs.total - macs.parts["frontend.transform"]


@pytest.mark.parametrize("described", [melhubert(), PRESETS["hubert-base"]()])
def test_full_size_models_are_checked_without_drawing_a_weight(described: ModelConfig) -> None:
    assert sum(check_macs(described, 10.0).values()) > 4e10


def test_features_without_a_front_end() -> None:
    assert "projection" in check_macs(replace(config(), frontend=None), 0.5)


def test_a_wrong_count_is_found_and_its_module_named(monkeypatch) -> None:
    def wrong(described: ModelConfig, macs: Any) -> dict[str, int]:
        counts = macs_by_module(described, macs)
        return {**counts, "blocks.1.attention": counts["blocks.1.attention"] - 1}

    monkeypatch.setattr(torch_counter, "macs_by_module", wrong)
    with pytest.raises(RuntimeError, match=r"^blocks\.1\.attention has [\d,]+ MACs by sslim's count, [\d,]+ by torch's$"):
        check_macs(config(), 0.31)
