"""Presets of Mockingjay, TERA and AALBERT have the parameter counts that the reference code gives (and the papers)."""

import pytest
import torch

from sslim.models import PRESETS, SpeechModel
from sslim.models.elastic import count_parameters
from sslim.models.reconstruction import aalbert, filterbank_frontend, log_mel_frontend, mockingjay, tera


def counts(config):
    """Of the encoder with its projection, and of the head."""
    with torch.device("meta"):
        model = SpeechModel(config)
    encoder = model.num_parameters(with_heads=False)
    assert count_parameters(config, with_heads=False) == encoder
    assert count_parameters(config) == model.num_parameters()
    return encoder, model.num_parameters() - encoder


@pytest.mark.parametrize(
    ("preset", "encoder", "head"),
    [
        ("mockingjay-base", 21_388_800, 715_168),
        ("mockingjay-large", 85_425_408, 961_248),
        ("tera-base", 21_327_360, 653_648),
        ("tera-fmllr-base", 21_296_640, 622_888),
        ("tera-fmllr-medium", 42_560_256, 622_888),
        ("tera-fmllr-large", 85_087_488, 622_888),
        ("aalbert-3l", 7_274_496, 776_688),
        ("aalbert-6l", 7_274_496, 776_688),
    ],
)
def test_published_sizes(preset, encoder, head):
    assert counts(PRESETS[preset]()) == (encoder, head)


def test_variants():
    assert counts(mockingjay(num_layers=12, stack=3, target_dim=1025)) == (85_425_408, 2_956_803)
    assert counts(tera(feature_dim=24)) == (21_284_352, 610_584)
    assert aalbert(num_layers=6).encoder.depth_map == (0,) * 6
    assert len(aalbert(num_layers=6).encoder.blocks) == 1
    assert mockingjay(frontend=filterbank_frontend(deltas=2)).projection.feature_dim == 240


def test_a_front_end_stacks_and_without_one_the_model_does():
    large = mockingjay(stack=3)
    assert (large.frontend.stack, large.frontend.stack_tail) == (3, "drop")
    assert (large.projection.feature_dim, large.projection.stack) == (480, 1)
    outside = tera(feature_dim=40, stack=3)
    assert outside.frontend is None
    assert (outside.projection.feature_dim, outside.projection.stack) == (40, 3)
    assert counts(outside)[0] == counts(tera(feature_dim=120))[0]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: tera(num_heads=7), "dim 768 is not divisible by num_heads 7"),
        (lambda: mockingjay(feature_dim=80), "feature_dim is 80; the front-end gives 160"),
        (lambda: tera(frontend=log_mel_frontend(stack=3)), "the front-end stacks 3 frames"),
    ],
)
def test_contradictions_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
