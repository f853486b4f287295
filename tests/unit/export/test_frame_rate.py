"""Extraction at a shorter frame period: as many frames as Kaldi's alignments have, each with the state made from it."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import sslim
from sslim.export import ExtractConfig, extract
from sslim.export.frame_rate import Repetition, repeat_factor
from sslim.models import PRESETS, build_model
from sslim.models.stacking import repeat_output
from sslim.storage import load_tensors

S3PRL = Path(__file__).parents[2] / "parity" / "assets" / "s3prl"
NUM_SAMPLES = [400, 559, 560, 719, 720, 8000, 8161, 16319]


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("audio"), np.random.default_rng(0)
    for num_samples in NUM_SAMPLES:
        soundfile.write(folder / f"{num_samples}.wav", 0.1 * random.normal(size=num_samples), 16000, subtype="FLOAT")
    return folder


def tiny(name):
    model = build_model(PRESETS[name](), torch.Generator().manual_seed(0))
    if name.startswith("melhubert"):
        model.set_statistics(torch.full((40,), 8.0), torch.full((40,), 4.0), source="made up")
    return model


@pytest.mark.parametrize("name", ["melhubert-tiny", "hubert-tiny"])
def test_as_many_frames_as_kaldi_has_and_the_right_state_in_each(name, audio, tmp_path):
    model = tiny(name)
    extract(model, [audio], tmp_path / "own", ExtractConfig(layers="1,final"))
    index = extract(model, [audio], tmp_path / "kaldi", ExtractConfig(layers="1,final", frame_period_ms=10))
    assert index["frame_period_s"] == 0.01
    for num_samples in NUM_SAMPLES:
        own, repeated = (load_tensors(tmp_path / kind / f"{num_samples}.safetensors") for kind in ("own", "kaldi"))
        wanted = 1 + (num_samples - 400) // 160
        assert index["utterances"][str(num_samples)]["num_frames"] == wanted
        for key in ("layer_01", "final"):
            assert len(repeated[key]) == wanted
            last = len(own[key]) - 1
            assert all(torch.equal(repeated[key][t], own[key][min(t // 2, last)]) for t in range(wanted))


def test_aalbert_of_stored_features_has_the_frames_that_it_was_given(tmp_path, monkeypatch):
    """Stacks of three are undone; S3PRL's own repetition would be late by half of what is left over."""
    model = sslim.load_model(S3PRL / "aalbert_fbank.ckpt")
    features_TF = torch.randn(95, model.config.projection.feature_dim, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(features_TF, (0, 0, 0, 1))  # whole stacks, as extraction encodes it
    with torch.inference_mode():
        output = model.encode_features(padded[None], torch.tensor([95]))
    plain = repeat_output(output, 3, torch.tensor([95])).final[0]
    late = repeat_output(output, 3, torch.tensor([95]), centred=True).final[0]
    states = Repetition(factor=3, num_frames=np.array([95]))(0, output.final[0, : int(output.lengths[0])])
    torch.testing.assert_close(states, plain, rtol=0, atol=0)
    assert not torch.equal(states, late)  # control


def test_a_wrong_estimate_of_the_length_shifts_nothing():
    states_TD = torch.arange(4.0)[:, None]
    for estimate, expected in ((100, 9), (0, 7), (8, 8)):
        repeated = Repetition(factor=2, num_frames=np.array([estimate]))(0, states_TD)
        assert len(repeated) == expected
        assert repeated[:7, 0].tolist() == [0, 0, 1, 1, 2, 2, 3]


def test_periods(audio, tmp_path):
    assert [repeat_factor(period, 0.02) for period in (20, 10, 5, 20 / 3)] == [1, 2, 4, 3]
    for wrong in (15, 40, 0, -10):
        with pytest.raises(ValueError, match="the model has one every 20 ms; give that, divided by a whole number"):
            repeat_factor(wrong, 0.02)
    model, output = tiny("melhubert-tiny"), tmp_path / "features"
    with pytest.raises(ValueError, match="frames can only be repeated"):
        extract(model, [audio], output, ExtractConfig(frame_period_ms=15))
    assert not output.exists()  # so that the corrected command can use the name
    extract(model, [audio], output, ExtractConfig(frame_period_ms=10))
    for other in (20, None):
        with pytest.raises(ValueError, match="holds features of other frame_period_ms"):
            extract(model, [audio], output, ExtractConfig(frame_period_ms=other))
