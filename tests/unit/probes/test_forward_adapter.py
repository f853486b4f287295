import numpy as np
import pytest
import torch

from sslim.models import PRESETS, build_model
from sslim.probes import FineTuningConfig, ForwardAdapter, NamedModel, ProbeConfig, probe


@pytest.fixture(scope="module")
def model():
    built = build_model(PRESETS["melhubert-tiny"](), torch.Generator().manual_seed(3))
    built.set_statistics(torch.full((40,), 5.0), torch.full((40,), 5.0), source="made up")
    return built


class Alone(torch.nn.Module):
    """sslim's own model as a stranger would wrap his: one output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, waveform_BS):
        return self.model.encode(waveform_BS).layers[-1]


class Batched(Alone):
    def forward(self, waveform_BS, lengths_B):
        output = self.model.encode(waveform_BS, lengths_B)
        return list(output.layers), output.lengths


def adapter(forward, **changes):
    return ForwardAdapter(**{"name": "mine", "forward": forward, "output_dim": 32, "frame_shift_s": 0.02, **changes})


def config_for(layer="last", **changes):
    return ProbeConfig(**{"task": "label", "num_seeds": 1, "layer": layer, "baselines": False, **changes})


def test_a_wrapped_model_scores_as_the_model_itself(tones, model):
    (own,) = probe(tones, [NamedModel(name="own", model=model)], config_for())["rows"]
    (alone,) = probe(tones, [adapter(Alone(model))], config_for())["rows"]
    assert (alone["scores"], alone["chosen"]) == (own["scores"], own["chosen"])
    assert alone["kind"] == "model"
    assert alone["model"] is None
    assert alone["num_parameters"] == model.num_parameters()
    (mixed,) = probe(tones, [adapter(Batched(model), num_layers=3, batched=True)], config_for("mix"))["rows"]
    (own,) = probe(tones, [NamedModel(name="own", model=model)], config_for("mix"))["rows"]
    assert mixed["scores"] == own["scores"]
    assert mixed["layer_weights"] == pytest.approx(own["layer_weights"], abs=1e-3)


def test_batches_give_what_single_utterances_give(tones, model):
    indices = np.array([3, 0, 9])
    together = adapter(Batched(model), num_layers=3, batched=True).representation(tones, 1e6)
    single = adapter(Alone(model)).representation(tones, 1e6)
    assert together.num_frames(indices).tolist() == single.num_frames(indices).tolist()
    rows, others = (dict(representation.layers_of(indices)) for representation in (together, single))
    for position in range(3):
        torch.testing.assert_close(rows[position][-1], others[position][0], rtol=0, atol=1e-5)


def test_a_plain_function_will_do(tones):
    def energies(waveform_BS):
        spectrum = torch.stft(waveform_BS, 400, 160, window=torch.hann_window(400), center=False, return_complex=True)
        return spectrum.abs().clamp_min(1e-5).log().transpose(1, 2)

    foreign = adapter(energies, output_dim=201, frame_shift_s=0.01, frame_length_s=0.025)
    rows = probe(tones, [foreign], config_for(baselines=True))["rows"]
    assert [row["name"] for row in rows] == ["log-Mel", "mine"]  # nothing is redrawn: there is no description to redraw
    assert rows[1]["mean"] > 0.9
    assert rows[1]["num_parameters"] == 0


def test_what_is_not_as_was_said_is_refused(tones, model):
    with pytest.raises(ValueError, match=r"gives shape \(1, \d+, 32\); expected \(1, frames, 31\)"):
        probe(tones, [adapter(Alone(model), output_dim=31)], config_for())
    with pytest.raises(ValueError, match="expected 2 of one shape"):
        probe(tones, [adapter(Alone(model), num_layers=2)], config_for())
    with pytest.raises(ValueError, match="gives NoneType"):
        probe(tones, [adapter(lambda waveform_BS: [None])], config_for())
    with pytest.raises(ValueError, match="must all be above 0"):
        adapter(Alone(model), frame_shift_s=0.0)
    with pytest.raises(ValueError, match="cannot be fine-tuned here"):
        probe(tones, [adapter(Alone(model))], config_for(fine_tuning=FineTuningConfig()))


def test_a_wrong_period_is_noticed(tones, model):
    representation = adapter(Alone(model), frame_shift_s=0.01).representation(tones, 1e6)
    with pytest.raises(ValueError, match=r"one every 20\.?\d* ms, not every 10 \(frame_shift_s\)"):
        representation.num_frames(np.array([0]))


def test_the_module_of_a_bound_method_is_put_into_eval_mode(tones):
    class Noisy(torch.nn.Module):
        def forward(self, waveform_BS):
            frames = waveform_BS[:, : waveform_BS.shape[1] // 320 * 320].unflatten(1, (-1, 320))
            return torch.nn.functional.dropout(frames, 0.5, self.training)

    noisy = Noisy().train()
    representation = adapter(noisy.forward, output_dim=320).representation(tones, 1e6)
    one, other = (dict(representation.layers_of(np.array([0])))[0] for _ in range(2))
    assert torch.equal(one, other)
    assert one.abs().sum() > 0


def test_what_is_no_tensor_is_named(tones):
    with pytest.raises(ValueError, match="mine gives NoneType; expected a tensor"):
        adapter(lambda waveform_BS: None).representation(tones, 1e6).num_frames(np.array([0]))
