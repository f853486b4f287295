from dataclasses import replace

import numpy as np
import pytest
import torch

from sslim.data.feature_presets import feature_preset
from sslim.frontends import NormalizationConfig, build_frontend
from sslim.probes import ProbeConfig, probe
from sslim.probes.baselines import named_representation, own_name


def frames_of(representation, index=2):
    ((_, x_LTD),) = representation.layers_of(np.array([index]))
    assert representation.num_frames(np.array([index])).tolist() == [x_LTD.shape[1]]
    return x_LTD[0]


@pytest.mark.parametrize("name", ["fbank80", "mfcc39", "fbank80-librosa"])
def test_named_features_are_those_of_their_front_end(name, tones):
    config = feature_preset(name)
    sound = torch.from_numpy(tones.waveform(2))[None]
    lengths = torch.tensor([sound.shape[1]])
    expected = build_frontend(config)(sound, lengths).values[0]
    assert torch.equal(frames_of(named_representation(tones, name, pooled=False)), expected)
    plain = build_frontend(replace(config, normalization=NormalizationConfig()))(sound, lengths).values[0]
    pooled = frames_of(named_representation(tones, name, pooled=True))
    assert torch.equal(pooled, plain)  # a mean over time of what has none would be zero
    assert expected.mean(0).abs().max() < 1e-4 < pooled.mean(0).abs().max()


def test_frames_are_stacked_to_the_model_s_where_that_is_whole(tones):
    assert named_representation(tones, "fbank80", pooled=False, frame_shift_s=0.02).frame_shift_s == pytest.approx(0.02)
    mel = named_representation(tones, "mel80-librosa", pooled=False, frame_shift_s=0.02)
    assert mel.frame_shift_s == pytest.approx(0.0125)


def test_stored_features_are_taken_where_they_are_the_same(spoken):
    frames = frames_of(named_representation(spoken, "melhubert", pooled=False), 5)
    assert torch.equal(frames, torch.from_numpy(spoken.features(5).astype(np.float32)))


def test_rows_and_refusals(tones, spoken):
    config = ProbeConfig(task="label", num_seeds=1, baselines=False, baseline_features=("fbank80", "mfcc39"))
    rows = probe(tones, [], config)["rows"]
    assert [(row["name"], row["kind"]) for row in rows] == [("fbank80", "features"), ("mfcc39", "features")]
    assert all(row["mean"] > 0.9 for row in rows)
    with pytest.raises(ValueError, match="there are no features 'fbank81'"):
        named_representation(tones, "fbank81", pooled=True)
    with pytest.raises(ValueError, match="waveform is no baseline"):
        named_representation(tones, "waveform", pooled=True)
    with pytest.raises(ValueError, match="fmllr40 cannot be computed from audio"):
        named_representation(spoken, "fmllr40", pooled=True)


@pytest.mark.parametrize(
    ("features", "row"),
    [
        ("melhubert", "log-Mel"),
        ("logmel80", "log-Mel"),
        ("fbank160-librosa", "log-Mel"),
        ("mfcc39", "mfcc39"),
        ("fmllr40", "fmllr40"),
    ],
)
def test_the_corpus_s_own_features_are_called_what_they_are(features, row):
    assert own_name(feature_preset(features)) == row
