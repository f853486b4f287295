"""Masked reconstruction against loops over elements: what is scored, by how much, whatever it is batched with."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sslim.batch import Batch, Padded
from sslim.frontends import FilterbankConfig, NormalizationConfig, SpectralFrontendConfig, StftConfig, build_frontend
from sslim.models import ModelConfig, build_model
from sslim.models.hubert import hubert, narrow_conv_layers
from sslim.models.reconstruction import aalbert, log_mel_frontend, mockingjay, tera
from sslim.nn.heads import SpectrogramHeadConfig
from sslim.objectives import AlterationConfig, Reconstruction, ReconstructionConfig
from sslim.objectives.reconstruction import HEAD, needs_waveforms, reconstruction_head
from sslim.training.sentinels import reconstruction_sentinels

SIZES = {"num_layers": 2, "dim": 16, "num_heads": 2, "feedforward_dim": 32, "dropout": 0.0}
UTTERANCE = NormalizationConfig(kind="utterance", eps=1e-3)
FILTERBANK = SpectralFrontendConfig(features=FilterbankConfig(num_mel_bins=8), normalization=UTTERANCE)
LINEAR = SpectralFrontendConfig(features=StftConfig(num_mel_bins=0, num_bins=33, frame_length_ms=4.0), normalization=UTTERANCE)
LENGTHS = (41, 30, 17)
HARD = AlterationConfig(time_share=0.4, span_min=2, span_max=4, max_channels=3, noise_probability=0.5)


def objective_of(config: ModelConfig, alteration: AlterationConfig = HARD, **settings: object) -> Reconstruction:
    settings = ReconstructionConfig(alteration=alteration, **settings)  # type: ignore[arg-type, assignment]
    config = replace(config, heads={HEAD: reconstruction_head(config, settings, None)})  # type: ignore[arg-type]
    return Reconstruction(build_model(config, torch.Generator().manual_seed(0)), settings).eval()  # type: ignore[arg-type]


def feature_batch(dim: int, lengths: tuple[int, ...] = LENGTHS, *, padding: float = 0.0) -> Batch:
    rows = [torch.randn(n, dim, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(lengths)]
    inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
    return Batch(inputs=inputs, lengths=torch.tensor(lengths), ids=tuple(f"u{i}" for i in range(len(lengths))))


def waveform_batch(num_samples: tuple[int, ...] = (6000, 4100)) -> Batch:
    batch = feature_batch(1, num_samples)
    return replace(batch, inputs=0.1 * batch.inputs[..., 0])


OUTSIDE = tera(feature_dim=6, stack=3, **SIZES)
CASES = {
    "stack 1": lambda: (objective_of(tera(frontend=FILTERBANK, **SIZES)), feature_batch(8)),
    "stack 3": lambda: (objective_of(aalbert(frontend=FILTERBANK, **SIZES)), feature_batch(8)),
    "features from outside, stack 3": lambda: (objective_of(OUTSIDE), feature_batch(6)),
    "deltas to none": lambda: (
        objective_of(
            mockingjay(frontend=replace(FILTERBANK, deltas=1), **SIZES), replace(HARD, max_channels=0), target=FILTERBANK
        ),
        feature_batch(8),
    ),
    "linear spectrum": lambda: (
        objective_of(
            tera(frontend=log_mel_frontend(), stack=2, **SIZES), replace(HARD, max_channels=0), distance="mse", target=LINEAR
        ),
        waveform_batch(),
    ),
}


def scored_elements(objective: Reconstruction, batch: Batch, prepared) -> list[tuple[float, float]]:
    """By loops: (restored, wanted) of each scored element, from every utterance alone and its features computed anew."""
    model, stack = objective.model, objective.stack
    found = []
    for b, length in enumerate(batch.lengths.tolist()):
        alone = batch.inputs[b : b + 1, :length]
        if model.frontend is None:
            base_TF = alone[0]
        elif batch.is_waveform:
            base_TF = model.frontend.base_features(alone, torch.tensor([length])).values[0]
        else:
            base_TF = alone[0]
        if objective.config.target is not None:
            target = build_frontend(objective.config.target)
            kept = Padded(values=base_TF[None], lengths=torch.tensor([len(base_TF)]))
            wanted_TO = (target(alone, torch.tensor([length])) if batch.is_waveform else target.finish(kept)).values[0]
        elif model.frontend is None:
            wanted_TO = base_TF
        else:
            whole = build_frontend(replace(model.config.frontend, stack=1))
            wanted_TO = whole.finish(Padded(values=base_TF[None], lengths=torch.tensor([len(base_TF)]))).values[0]
        count = len(base_TF) // stack  # an incomplete stack is not scored
        seen = prepared.inputs.values[b : b + 1, : int(prepared.inputs.lengths[b])]
        states = model.encode_features(seen).final
        restored = model.heads[HEAD](states)[0].reshape(-1, wanted_TO.shape[1])
        width = wanted_TO.shape[1]
        found += [
            (restored[t, o].item(), wanted_TO[t, o].item())
            for t in range(count * stack)
            for o in range(width)
            if prepared.time_BT[b, t // stack] or prepared.channels_BO[b, (t % stack) * width + o]
        ]
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_mean_over_altered_elements(case: str) -> None:
    objective, batch = CASES[case]()
    prepared = objective.prepare(batch, torch.Generator().manual_seed(1))
    output = objective(prepared, prepared.weights)
    elements = torch.tensor(scored_elements(objective, batch, prepared))
    assert int(prepared.weights[HEAD]) == len(elements) > 0
    difference = elements[:, 0] - elements[:, 1]
    want = difference.abs().mean() if objective.config.distance == "l1" else difference.square().mean()
    torch.testing.assert_close(output.loss, want, atol=2e-5, rtol=1e-4)
    total, count = output.metrics["altered_loss"]
    torch.testing.assert_close(total / count, want, atol=2e-5, rtol=1e-4)
    rest = prepared.target_BTO.numel() - len(elements)
    assert 0 < int(output.metrics["unaltered_loss"][1]) <= rest


@pytest.mark.parametrize("case", CASES)
def test_nothing_depends_on_padding(case: str) -> None:
    """More padding, and padding with values in it, changes neither features, targets, weights nor the loss."""
    objective, batch = CASES[case]()
    prepared = objective.prepare(batch, torch.Generator().manual_seed(1))
    extra = (0, 600) if batch.is_waveform else (0, 0, 0, 6)
    longer = replace(batch, inputs=nn.functional.pad(batch.inputs, extra))
    if objective.model.frontend is None:
        longer = replace(longer, inputs=longer.inputs + 3.0 * (longer.inputs == 0))
    features, target, lengths = objective.features_and_target(longer)
    before = objective.features_and_target(batch)
    num_frames = before[1].shape[1]
    torch.testing.assert_close(features.values[:, :num_frames], before[0].values)
    torch.testing.assert_close(target[:, :num_frames], before[1])
    assert torch.equal(lengths, before[2])
    padded = {
        "inputs": Padded(
            values=nn.functional.pad(prepared.inputs.values, (0, 0, 0, 3 * objective.stack)), lengths=prepared.inputs.lengths
        ),
        "target_BTO": nn.functional.pad(prepared.target_BTO, (0, 0, 0, 3), value=9.0),
        "time_BT": nn.functional.pad(prepared.time_BT, (0, 3), value=True),
    }
    if objective.model.frontend is not None:
        padded["inputs"] = replace(padded["inputs"], values=nn.functional.pad(prepared.inputs.values, (0, 0, 0, 3)))
    same = replace(prepared, **padded)
    loss = objective(prepared, prepared.weights).loss
    torch.testing.assert_close(objective(same, prepared.weights).loss, loss, atol=1e-5, rtol=0)
    counted = replace(same, lengths_B=prepared.lengths_B + 3)  # the control: padding scored, as the reference may
    assert (objective(counted, prepared.weights).loss - loss).abs() > 1e-3


def rows_of(prepared, row: int):
    """One utterance of a prepared batch, alone."""
    length, stacked = int(prepared.inputs.lengths[row]), int(prepared.lengths_B[row])
    one = slice(row, row + 1)
    target, time = prepared.target_BTO[one], prepared.time_BT[one]
    frames = min(target.shape[1], length if target.shape[1] >= length else stacked)
    alone = replace(
        prepared,
        inputs=Padded(values=prepared.inputs.values[one, :length], lengths=prepared.inputs.lengths[one]),
        target_BTO=target[:, :frames],
        time_BT=time[:, :frames],
        lengths_B=prepared.lengths_B[one],
        channels_BO=prepared.channels_BO[one],
    )
    real = torch.arange(frames) < stacked
    scored = (alone.time_BT[0][:, None] | alone.channels_BO) & real[:, None]
    return replace(alone, weights={HEAD: scored.sum()})


@pytest.mark.parametrize("case", CASES)
def test_accumulation_weighs_elements_not_micro_batches(case: str) -> None:
    objective, batch = CASES[case]()
    prepared = objective.prepare(batch, torch.Generator().manual_seed(1))
    parts = [rows_of(prepared, row) for row in range(len(batch.lengths))]
    assert sum(int(part.weights[HEAD]) for part in parts) == int(prepared.weights[HEAD])
    whole = objective(prepared, prepared.weights).loss
    torch.testing.assert_close(sum(objective(part, prepared.weights).loss for part in parts), whole, atol=1e-5, rtol=0)
    mean_of_means = sum(objective(part, part.weights).loss for part in parts) / len(parts)
    assert (mean_of_means - whole).abs() > 1e-5  # the control: what averaging micro-batches gives


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_everything_real_is_scored_where_nothing_is_hidden(noise: float) -> None:
    nothing = AlterationConfig(time_share=0.0, noise_probability=noise)
    objective = objective_of(aalbert(frontend=replace(FILTERBANK, stack_tail="pad"), **SIZES), nothing)
    prepared = objective.prepare(feature_batch(8), torch.Generator().manual_seed(0))
    assert int(prepared.weights[HEAD]) == sum(n // 3 for n in LENGTHS) * 24
    assert int(objective(prepared, prepared.weights).metrics["unaltered_loss"][1]) == 0


def test_an_incomplete_stack_is_seen_but_not_scored() -> None:
    """MelHuBERT's front-end fills it with zeros, which are nothing to restore."""
    config = tera(frontend=FILTERBANK, stack=2, **SIZES)
    config = replace(config, frontend=replace(config.frontend, stack_tail="pad"))  # type: ignore[type-var]
    objective = objective_of(config, AlterationConfig(time_share=0.0))
    prepared = objective.prepare(feature_batch(8, (7, 4)), torch.Generator())
    assert prepared.inputs.lengths.tolist() == [4, 2]
    assert prepared.lengths_B.tolist() == [3, 2]
    assert int(prepared.weights[HEAD]) == 5 * 16


def test_the_callers_features_are_not_changed() -> None:
    """The reference alters them in place, so that features kept in memory are lost after one use."""
    for case in CASES:
        objective, batch = CASES[case]()
        before = batch.inputs.clone()
        objective.prepare(batch, torch.Generator())
        assert torch.equal(batch.inputs, before)


@pytest.mark.parametrize("case", CASES)
def test_equal_seeds_give_equal_losses_and_training_lowers_them(case: str) -> None:
    objective, batch = CASES[case]()

    def loss(seed: int) -> torch.Tensor:
        prepared = objective.prepare(batch, torch.Generator().manual_seed(seed))
        return objective(prepared, prepared.weights).loss

    assert loss(1) == loss(1)
    assert loss(1) != loss(2)
    before, optimizer = loss(1).item(), torch.optim.Adam(objective.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss(1).backward()
        optimizer.step()
    assert loss(1).item() < 0.9 * before


def test_gradients_are_those_of_finite_differences() -> None:
    objective, batch = CASES["stack 3"]()
    objective = objective.double()
    prepared = objective.prepare(batch, torch.Generator().manual_seed(1))
    prepared = replace(
        prepared,
        inputs=replace(prepared.inputs, values=prepared.inputs.values.double()),
        target_BTO=prepared.target_BTO.double(),
    )
    mse = Reconstruction(objective.model, replace(objective.config, distance="mse")).eval()
    mse(prepared, prepared.weights).loss.backward()
    for name, parameter in list(mse.named_parameters())[::5]:
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).double()
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-4 * direction
                losses.append(mse(prepared, prepared.weights).loss.item())
                parameter -= sign * 1e-4 * direction
        assert parameter.grad is not None
        assert (parameter.grad * direction).sum().item() == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-3, abs=1e-6), (
            name
        )


def test_waveforms_are_needed_only_where_the_stored_features_do_not_do() -> None:
    config = mockingjay(frontend=replace(FILTERBANK, deltas=1), **SIZES)
    assert not needs_waveforms(config, ReconstructionConfig())
    assert not needs_waveforms(config, ReconstructionConfig(target=FILTERBANK))
    assert needs_waveforms(config, ReconstructionConfig(target=LINEAR))
    objective, _ = CASES["linear spectrum"]()
    with pytest.raises(ValueError, match="made of other features than those in the batch: give it waveforms"):
        objective.prepare(feature_batch(80), torch.Generator())


@pytest.mark.parametrize(
    ("config", "settings", "sentence"),
    [
        (OUTSIDE, {"target": FILTERBANK}, "takes features from outside, beside which no target"),
        (tera(frontend=FILTERBANK, **SIZES), {"target": replace(FILTERBANK, stack=2)}, "target.stack is 2"),
        (
            tera(frontend=FILTERBANK, **SIZES),
            {"target": replace(FILTERBANK, normalization=NormalizationConfig(kind="global"))},
            "target.normalization is 'global'",
        ),
        (
            tera(frontend=FILTERBANK, **SIZES),
            {"target": replace(FILTERBANK, normalization=NormalizationConfig(kind="speaker"))},
            "target.normalization is 'speaker'",
        ),
        (tera(frontend=FILTERBANK, **SIZES), {"target": LINEAR}, "has other frames than the model's features"),
        (
            tera(frontend=log_mel_frontend(), **SIZES),
            {"target": LINEAR},
            "other channels than the features whose channels are zero",
        ),
        (tera(frontend=FILTERBANK, **SIZES), {"alteration": AlterationConfig(max_channels=9)}, "of 8 channels 8 can be"),
        (hubert(conv_layers=narrow_conv_layers(8), num_layers=1), {}, "front-end of this hubert model is learnt"),
    ],
)
def test_what_does_not_fit_is_refused(config: ModelConfig, settings: dict, sentence: str) -> None:
    settings = {"alteration": HARD, **settings}
    with pytest.raises(ValueError, match=sentence):
        objective_of(config, **settings)


def test_a_head_of_another_width_is_refused() -> None:
    config = tera(frontend=FILTERBANK, **SIZES)
    with pytest.raises(ValueError, match="a head 'reconstruction' for 7 features; there are 8 to restore"):
        Reconstruction(
            build_model(replace(config, heads={HEAD: SpectrogramHeadConfig(hidden_dim=4, output_dim=7)})),
            ReconstructionConfig(),
        )
    with pytest.raises(ValueError, match="no head 'reconstruction'; there are 8"):
        Reconstruction(build_model(replace(config, heads={})), ReconstructionConfig())


def test_the_sentinel_sees_a_model_that_has_learnt_nothing() -> None:
    sentinel = reconstruction_sentinels(after_step=100)["restores_only_the_mean"]
    bad = [{"step": step, "altered_loss": 0.80, "mean_frame_loss": 0.80} for step in (100, 120, 140)]
    assert "no better (loss 0.800)" in str(sentinel(bad))
    assert sentinel(bad[:2]) is None
    assert sentinel([*bad[:2], {**bad[2], "altered_loss": 0.5}]) is None


def test_a_batch_in_which_no_utterance_fills_a_stack_scores_nothing() -> None:
    objective = objective_of(OUTSIDE)
    prepared = objective.prepare(feature_batch(6, (2, 1)), torch.Generator().manual_seed(0))
    assert prepared.lengths_B.tolist() == [0, 0]
    assert prepared.weights[HEAD] == 0
    assert prepared.inputs.values.shape[0] == 2
