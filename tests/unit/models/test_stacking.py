"""Stacking of frames from outside, and the way back."""

from dataclasses import replace

import pytest
import torch

from sslim.batch import EncoderOutput, Padded
from sslim.compress.calibration import Calibration
from sslim.compress.depth import DepthPruning, prune_depth
from sslim.compress.low_rank import LowRank, factorize
from sslim.models import ProjectionConfig, SpeechModel, build_model
from sslim.models.encoding import Inputs, encode_utterances, num_model_frames
from sslim.models.reconstruction import log_mel_frontend, tera
from sslim.models.stacking import padded_to_stacks, repeat_frames, repeat_output, stack_given

SIZES = {"num_layers": 2, "dim": 16, "num_heads": 2, "feedforward_dim": 24}


def frames(*lengths, width=2):
    """(B, T, F) numbered from 1 in the first channel, NaN beyond each length."""
    values = torch.full((len(lengths), max(lengths), width), float("nan"))
    for row, length in enumerate(lengths):
        values[row, :length] = torch.arange(1.0, length + 1)[:, None] + 100 * row
    return Padded(values=values, lengths=torch.tensor(lengths))


def test_stacks_by_the_rule_of_the_reference():
    stacked = stack_given(frames(7, 4, 3, 0), 3)
    assert stacked.lengths.tolist() == [2, 2, 1, 0]  # frame 7 has no room; frame 4 begins a stack that has
    assert stacked.values[0, :, ::2].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert stacked.values[1, :, ::2].tolist() == [[101, 102, 103], [104, 0, 0]]
    assert not stacked.values[2, 1].any()
    assert stacked.values.isfinite().all()
    given = frames(7, 4)
    assert stack_given(given, 1) is given


@pytest.mark.parametrize("length", range(8))
def test_whole_stacks_do_not_depend_on_the_batch(length):
    alone = frames(length) if length else Padded(values=torch.zeros(1, 0, 2), lengths=torch.tensor([0]))
    together = Padded(values=torch.zeros(2, 10, 2), lengths=torch.tensor([10, length]))
    together.values[1, :length] = alone.values[0, :length]
    single = stack_given(replace(alone, values=padded_to_stacks(alone.values, 3)), 3)
    batched = stack_given(replace(together, values=padded_to_stacks(together.values, 3)), 3)
    assert int(single.lengths[0]) == int(batched.lengths[1]) == -(-length // 3)
    assert torch.equal(batched.values[1, : single.values.shape[1]], single.values[0])
    if length % 3:  # the control: as they are, the last frames are lost alone
        assert int(stack_given(alone, 3).lengths[0]) == int(batched.lengths[1]) - 1


@pytest.mark.parametrize(("length", "last"), [(6, [4, 4, 4]), (7, [4, 4, 4]), (8, [4, 4, 4])])
def test_repeating_gives_exactly_the_frames_there_were(length, last):
    stacked = Padded(values=torch.tensor([[[1.0], [4.0]]]), lengths=torch.tensor([2]))
    repeated = repeat_frames(stacked, 3, torch.tensor([length]))
    assert repeated.values[0, :, 0].tolist() == [1, 1, 1, *last, *[4] * (length - 6)]
    assert repeated.lengths.tolist() == [length]
    centred = repeat_frames(stacked, 3, torch.tensor([length]), centred=True)  # S3PRL: of the rest, half goes before
    before = (length - 6) // 2
    assert centred.values[0, :, 0].tolist() == [1] * (3 + before) + [4] * (length - 3 - before)


def test_repeating_keeps_rows_apart():
    stacked = Padded(values=torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]], [[0.0], [0.0]]]), lengths=torch.tensor([2, 1, 0]))
    repeated = repeat_frames(stacked, 2, torch.tensor([5, 2, 1]))
    assert repeated.lengths.tolist() == [5, 2, 0]
    assert repeated.values[..., 0].tolist() == [[1, 1, 2, 2, 2], [3, 3, 0, 0, 0], [0] * 5]
    states = stacked.values
    output = EncoderOutput(final=states, lengths=stacked.lengths, layers=(states + 1, states), embed=states + 2)
    whole = repeat_output(output, 2, torch.tensor([5, 2, 1]))
    assert whole.final is whole.layers[-1]
    assert torch.equal(whole.final, repeated.values)
    assert whole.embed is not None
    assert whole.embed[0, :, 0].tolist() == [3, 3, 4, 4, 4]


def stacked_and_plain():
    """A model that stacks, and one with the same tensors that takes what is stacked already."""
    model = build_model(tera(feature_dim=5, stack=3, **SIZES), torch.Generator().manual_seed(0))
    plain = SpeechModel(replace(model.config, projection=ProjectionConfig(feature_dim=15))).eval()
    plain.load_state_dict(model.state_dict())
    return model, plain


def test_the_model_stacks_what_it_is_given():
    model, plain = stacked_and_plain()
    given = Padded(values=torch.randn(2, 20, 5), lengths=torch.tensor([20, 13]))
    stacked = stack_given(given, 3)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            ours = model.encode_features(given.values, given.lengths)
            theirs = plain.encode_features(stacked.values, stacked.lengths)
        assert ours.lengths.tolist() == [6, 5]
        assert ours.embed is not None
        for a, b in zip((ours.embed, *ours.layers), (theirs.embed, *theirs.layers), strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"takes \(batch, frames, 5\)"):
        model.encode_features(stacked.values)


def test_utterances_get_what_they_get_alone():
    model, _ = stacked_and_plain()
    lengths = [20, 13, 18, 1]
    values = [torch.randn(length, 5) for length in lengths]
    inputs = Inputs(lengths=torch.tensor(lengths).numpy(), unit_s=0.01, read=values.__getitem__, is_waveform=False)
    assert num_model_frames(model, inputs).tolist() == [7, 5, 6, 1]
    together = {position: final for position, _, final in encode_utterances(model, inputs)}
    for position, value in enumerate(values):
        alone = model.encode_features(padded_to_stacks(value[None], 3), torch.tensor([len(value)])).final[0]
        torch.testing.assert_close(together[position], alone, rtol=0, atol=1e-5)


def test_calibration_counts_stacked_frames():
    model, plain = stacked_and_plain()
    given = Padded(values=torch.randn(2, 21, 5), lengths=torch.tensor([21, 13]))
    results = []
    for each, features in ((model, given), (plain, stack_given(given, 3))):
        calibration = Calibration(features=(features,), losses=())
        small = factorize(each, LowRank(ratio=0.4, whiten=True), calibration)
        results.append((small.state_dict(), prune_depth(each, DepthPruning(keep=0.5), calibration).config.encoder.depth_map))
    (ours, our_depths), (theirs, their_depths) = results
    assert our_depths == their_depths
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_only_one_part_may_stack():
    config = tera(feature_dim=80, stack=3, **SIZES)
    with pytest.raises(ValueError, match=r"projection\.stack is 3; a model with a front-end leaves stacking to it"):
        replace(config, frontend=log_mel_frontend())
    with pytest.raises(ValueError, match="stack is 3: frames can be stacked only where a linear map alone follows"):
        replace(config.projection, norm=True)
    with pytest.raises(ValueError, match="stack is 0"):
        replace(config.projection, stack=0)
