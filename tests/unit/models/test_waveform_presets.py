"""Presets of the waveform students and supernets have the published parameter counts; nothing is allocated."""

import pytest
import torch

from sslim.models import PRESETS, SpeechModel
from sslim.models.distilhubert import distilalhubert, distilhubert
from sslim.models.elastic import extract_model
from sslim.models.hubert import narrow_conv_layers
from sslim.models.lighthubert import lighthubert, reference_parameter_count
from sslim.models.search_space import LIGHTHUBERT_BASE, LIGHTHUBERT_SMALL, SearchSpace


def count(config, **options):
    with torch.device("meta"):
        return SpeechModel(config).num_parameters(**options)


@pytest.mark.parametrize(
    ("preset", "parameters", "depth_map"),
    [
        ("distilhubert", 27_034_752, (0, 1)),
        ("distilalhubert-small", 23_492_992, (0, 1) * 6),
        ("distilalhubert-middle", 30_580_864, (0, 1, 2) * 4),
        ("distilalhubert-large", 37_668_736, (0, 1, 2, 3) * 3),
        ("lighthubert-base", 94_967_680, tuple(range(12))),
        ("lighthubert-small", 94_967_680, tuple(range(12))),
    ],
)
def test_published_sizes(preset, parameters, depth_map):
    config = PRESETS[preset]()
    assert count(config) == parameters
    assert config.encoder.depth_map == depth_map


def test_variants():
    assert count(distilhubert(num_tasks=0)) == count(distilhubert(num_tasks=3), with_heads=False) == 23_491_200
    assert count(distilhubert(num_tasks=2)) == 25_853_568
    large = distilalhubert(dim=1024, num_heads=16, feedforward_dim=4096, conv_norm="layer")
    assert count(large) == 38_318_208
    with pytest.raises(ValueError, match="dim 768 is not divisible by num_heads 7"):
        distilhubert(num_heads=7)


@pytest.mark.parametrize(
    ("space", "subnets", "counts"),
    [
        (LIGHTHUBERT_BASE, 6_530_347_008, {"min": 41_249_536, "default": 66_897_664, "max": 94_377_728}),
        (LIGHTHUBERT_SMALL, 951_892_141_473, {"min": 11_449_088, "default": 26_879_744, "max": 44_398_336}),
    ],
)
def test_canonical_subnets_of_lighthubert(space, subnets, counts):
    config = lighthubert(space)
    assert {choice: reference_parameter_count(config, choice) for choice in counts} == counts
    assert space.num_subnets() == subnets


def test_the_reference_count_is_that_of_real_tensors():
    """All that an extracted model has, the mask embedding in full width, without head and gain."""
    space = SearchSpace(
        dims=(64, 128), num_heads=(1, 2), feedforward_ratios=(2.0,), num_layers=(2, 3), feedforward_rule="blocks"
    )
    sizes = {"num_layers": 3, "dim": 128, "num_heads": 2, "feedforward_dim": 256, "teacher_dim": 32}
    config = lighthubert(space, **sizes, conv_layers=narrow_conv_layers(16), conv_kernel_size=16)
    model = SpeechModel(config).initialize(torch.Generator().manual_seed(0))
    for choice in ("min", "max"):
        state = extract_model(model, choice).state_dict()
        counted = {
            name: t.numel() for name, t in state.items() if not name.startswith("heads.") and name != "encoder.positions.gain"
        }
        assert reference_parameter_count(config, choice) == sum(counted.values()) + 128
    with pytest.raises(ValueError, match="dim 256 of the subnet is more than the supernet's 128"):
        lighthubert(LIGHTHUBERT_SMALL, **{**sizes, "num_layers": 12})
