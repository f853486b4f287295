import numpy as np
import pytest
import torch

from sslim.probes.features import Representation, choose_utterances, frame_features, pooled_features


class Names:
    def utterance(self, i):
        return type("Named", (), {"id": f"u{i}"})


def representation(frames, announced=None):
    lengths = np.array([len(x) for x in frames])

    def layers_of(indices):
        for position in reversed(range(len(indices))):  # any order
            x_TD = frames[indices[position]]
            yield position, torch.stack([x_TD, -x_TD])

    announced = lengths if announced is None else announced
    return Representation(
        name="r",
        kind="model",
        num_layers=2,
        frame_shift_s=0.01,
        num_parameters=0,
        num_frames=lambda i: announced[i],
        layers_of=layers_of,
    )


@pytest.fixture
def frames():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, 4, generator=generator) for length in (3, 1, 7, 2)]


@pytest.mark.parametrize("in_memory_bytes", [2**30, 0])
def test_frames_lie_end_to_end(frames, in_memory_bytes, monkeypatch):
    monkeypatch.setattr("sslim.probes.features.IN_MEMORY_BYTES", in_memory_bytes)
    indices = np.array([2, 0, 3])
    x_LND, offsets = frame_features(representation(frames), Names(), indices)
    assert offsets.tolist() == [0, 7, 10, 12]
    expected = torch.cat([frames[i] for i in indices])
    torch.testing.assert_close(x_LND[0].float(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(x_LND[1], -x_LND[0])


def test_what_cannot_be_stored_is_refused(frames):
    frames[2][5, 1] = 1e5
    with pytest.raises(ValueError, match="features beyond the range of float16 for utterance u2"):
        frame_features(representation(frames), Names(), np.array([0, 2]))
    frames[2][5, 1] = float("nan")
    with pytest.raises(ValueError, match="non-finite features for utterance u2"):
        pooled_features(representation(frames), Names(), np.array([0, 2]), "mean")
    with pytest.raises(ValueError, match="u0: r gives 3 frames, 4 were expected"):
        frame_features(representation(frames, np.array([4, 1, 7, 2])), Names(), np.array([0]))


def test_pooling_is_over_frames(frames):
    pooled = pooled_features(representation(frames), Names(), np.array([2, 1]), "mean-std")
    torch.testing.assert_close(pooled[0, 0], torch.cat([frames[2].mean(0), frames[2].std(0, correction=0)]))
    assert pooled[0, 1, 4:].eq(0).all()  # one frame: no deviation, and no NaN


def test_cap_takes_whole_utterances_by_seed():
    lengths = np.full(100, 10)
    chosen = choose_utterances(lengths, 255, seed=0)
    assert len(chosen) == 25
    assert np.array_equal(chosen, np.unique(chosen))
    assert np.array_equal(chosen, choose_utterances(lengths, 255, seed=0))
    assert not np.array_equal(chosen, choose_utterances(lengths, 255, seed=1))
    assert len(choose_utterances(lengths, None, seed=0)) == 100
    assert len(choose_utterances(lengths, 3, seed=0)) == 1
