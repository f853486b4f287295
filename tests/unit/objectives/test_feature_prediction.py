"""Prediction of features: which frames are scored, against which targets, and which models can learn it at all."""

from dataclasses import replace

import pytest
import torch

from sslim.batch import Batch
from sslim.frontends import SpectralFrontendConfig
from sslim.models import ModelConfig, build_model
from sslim.models.hubert import hubert, narrow_conv_layers
from sslim.models.melhubert import melhubert, melhubert_frontend
from sslim.models.predictive import apc, npc
from sslim.nn.heads import RegressionHeadConfig, SpectrogramHeadConfig
from sslim.nn.quantizer import QuantizerConfig
from sslim.objectives import Autoregressive, AutoregressiveConfig, Npc, NpcConfig
from sslim.objectives.feature_prediction import feature_head

HALVES = QuantizerConfig(num_codes=(5, 5), code_dims=(8, 8))


def small_apc(**settings) -> ModelConfig:
    return apc(**{"feature_dim": 6, "dims": (16, 16), "dropout": 0.0, **settings})


def batch(lengths=(30, 17, 4), width=6, extra=0) -> Batch:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.zeros(len(lengths), max(lengths) + extra, width)
    for row, length in enumerate(lengths):
        inputs[row, :length] = torch.randn(length, width, generator=generator)
    return Batch(inputs=inputs, lengths=torch.tensor(lengths), ids=tuple(f"utt{i}" for i in range(len(lengths))))


def made(config, objective):
    model = build_model(config, torch.Generator().manual_seed(0))
    if isinstance(config.frontend, SpectralFrontendConfig) and config.frontend.normalization.kind == "global":
        model.set_statistics(torch.zeros(40), torch.ones(40), source="test")
    return (Npc if isinstance(objective, NpcConfig) else Autoregressive)(model, objective)


def loss_of(objective, data, seed=0):
    prepared = objective.prepare(data, torch.Generator().manual_seed(seed))
    return prepared, objective(prepared, prepared.weights)


@pytest.mark.parametrize("distance", ["l1", "mse"])
@pytest.mark.parametrize("shift", [1, 5])
def test_the_loss_is_the_mean_over_frames_that_have_a_real_target(shift, distance):
    objective = made(small_apc(), AutoregressiveConfig(shift=shift, distance=distance)).eval()
    data = batch()
    prepared, output = loss_of(objective, data)
    errors, copies = [], []
    for row, length in enumerate(data.lengths.tolist()):
        x_TF = data.inputs[row, :length]
        estimate = objective.model.heads["autoregressive"](objective.model.encode_features(x_TF[None]).final)[0]
        for guesses, guess in ((errors, estimate), (copies, x_TF)):
            difference = guess[: max(length - shift, 0)] - x_TF[shift:]
            guesses.append(difference.abs() if distance == "l1" else difference.square())
    torch.testing.assert_close(output.loss, torch.cat(errors).mean())
    assert int(prepared.weights["frames"]) == sum(max(length - shift, 0) for length in (30, 17, 4))
    total, count = output.metrics["same_frame_loss"]
    torch.testing.assert_close(total / count, torch.cat(copies).mean())


def test_padding_is_never_scored_and_changes_nothing():
    for config, objective in ((small_apc(codes=None), AutoregressiveConfig()), (small_apc(codes=QuantizerConfig(
            num_codes=(5,), code_dims=(16,))), AutoregressiveConfig()), (npc(feature_dim=6, dim=16, codes=HALVES, dropout=0.0),
            NpcConfig())):  # fmt: skip
        trained = made(config, objective).train()
        whole, longer = (loss_of(trained, batch(extra=extra), seed=3)[1].loss for extra in (0, 9))
        torch.testing.assert_close(longer, whole)


def test_noise_follows_from_the_generator():
    config = small_apc(codes=QuantizerConfig(num_codes=(5,), code_dims=(16,)))
    objective = made(config, AutoregressiveConfig(shift=2)).train()
    first, again, other = (loss_of(objective, batch(), seed)[1].loss for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    objective.eval()
    assert torch.equal(loss_of(objective, batch(), 1)[1].loss, loss_of(objective, batch(), 2)[1].loss)


def test_npc_estimates_every_frame_from_others():
    objective = made(npc(feature_dim=6, dim=16, codes=None), NpcConfig()).eval()
    data = batch((30,))
    prepared, output = loss_of(objective, data)
    estimate = objective.model.heads["npc"](objective.model.encode_features(data.inputs).final)
    torch.testing.assert_close(output.loss, (estimate - data.inputs).abs().mean())
    assert int(prepared.weights["frames"]) == 30
    assert "same_frame_loss" not in output.metrics


def test_a_stack_that_the_utterance_does_not_fill_is_no_target():
    config = apc(frontend=melhubert_frontend(20), dims=(16,))
    objective = made(config, AutoregressiveConfig(shift=1)).eval()
    data = batch((21, 12), width=40)  # 10 and a half, and 6 stacks
    prepared, output = loss_of(objective, data)
    assert int(prepared.weights["frames"]) == 9 + 5
    changed = replace(data, inputs=data.inputs.clone())
    changed.inputs[0, 20] += 5.0
    assert torch.equal(loss_of(objective, changed)[1].loss, output.loss)
    changed.inputs[0, 19] += 5.0  # the control
    assert not torch.equal(loss_of(objective, changed)[1].loss, output.loss)


def test_models_that_stack_for_themselves_predict_stacks():
    config = small_apc(feature_dim=12)
    config = replace(config, projection=replace(config.projection, feature_dim=6, stack=2, linear=True), heads={})
    config = replace(config, heads={"autoregressive": feature_head(config, None)})
    objective = made(config, AutoregressiveConfig(shift=1)).eval()
    prepared, output = loss_of(objective, batch((21, 12)))
    assert prepared.features_BTF.shape == (2, 10, 12)
    assert int(prepared.weights["frames"]) == 9 + 5
    assert output.loss.isfinite()


def test_causal_transformers_learn_it_too():
    config = melhubert(num_layers=2, dim=16, num_heads=2, feedforward_dim=32, conv_kernel_size=8, conv_groups=2)
    positions = replace(config.encoder.positions, causal=True)
    causal = replace(config, encoder=replace(config.encoder, causal=True, positions=positions))
    causal = replace(causal, heads={"autoregressive": SpectrogramHeadConfig(hidden_dim=16, output_dim=80)})
    objective = made(causal, AutoregressiveConfig(shift=2)).train()
    _, output = loss_of(objective, batch(width=40))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())
    with pytest.raises(ValueError, match="needs a causal encoder, and the transformer encoder of this melhubert model"):
        made(replace(config, heads=causal.heads), AutoregressiveConfig())


def test_models_that_cannot_learn_it_are_refused():
    with pytest.raises(ValueError, match="needs a causal encoder, and the convolutional encoder of this npc model"):
        made(npc(feature_dim=6, dim=16, codes=HALVES), AutoregressiveConfig())
    with pytest.raises(ValueError, match="the recurrent encoder of this apc model sees the frame"):
        made(small_apc(), NpcConfig())
    with pytest.raises(ValueError, match=r"needs a head 'autoregressive' .* for 6 features, it has no such head"):
        made(replace(small_apc(), heads={}), AutoregressiveConfig())
    with pytest.raises(ValueError, match="it has one of kind 'regression' for 7 features"):
        made(replace(small_apc(), heads={"autoregressive": RegressionHeadConfig(output_dim=7)}), AutoregressiveConfig())
    with pytest.raises(ValueError, match="shift is 0"):
        AutoregressiveConfig(shift=0)
    sizes = {"num_layers": 1, "dim": 16, "num_heads": 2, "feedforward_dim": 32, "conv_kernel_size": 8, "conv_groups": 2}
    learnt = hubert(conv_layers=narrow_conv_layers(8), **sizes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="front-end of this hubert model is learnt"):
        feature_head(learnt, None)


def test_heads_follow_the_features():
    config = small_apc()
    assert feature_head(config, None) == RegressionHeadConfig(output_dim=6)
    old = SpectrogramHeadConfig(hidden_dim=9, output_dim=3, activation="relu")
    assert feature_head(config, old) == replace(old, output_dim=6)
    assert feature_head(config, RegressionHeadConfig(output_dim=3, bias=False)) == RegressionHeadConfig(
        output_dim=6, bias=False
    )


def test_gradient_checkpointing_is_for_transformers():
    with pytest.raises(ValueError, match="is for Transformers, and this encoder is recurrent: leave it off"):
        made(small_apc(), AutoregressiveConfig()).set_gradient_checkpointing(True)


OBJECTIVES = {
    "apc": (small_apc(), AutoregressiveConfig(shift=2)),
    "vq-apc": (
        small_apc(codes=QuantizerConfig(num_codes=(8,), code_dims=(16,), temperature=0.5)),
        AutoregressiveConfig(shift=2),
    ),
    "npc": (npc(feature_dim=6, dim=16, codes=None, dropout=0.0), NpcConfig()),
}


def smooth(seed: int) -> Batch:
    """Slow waves, so that neighbours tell a frame."""
    generator = torch.Generator().manual_seed(seed)
    phase = 6.3 * torch.rand(3, 1, 1, generator=generator) + torch.arange(6.0)
    waves = torch.sin(phase + 0.25 * torch.arange(40.0)[None, :, None])
    return replace(batch((40, 40, 40)), inputs=waves + 0.05 * torch.randn(3, 40, 6, generator=generator))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_falls_below_what_the_mean_frame_gives(name: str) -> None:
    objective = made(*OBJECTIVES[name]).train()
    optimizer = torch.optim.Adam(objective.parameters(), lr=5e-3)
    for i in range(150):
        _, output = loss_of(objective, smooth(i), seed=i)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    _, output = loss_of(objective.eval(), smooth(1000))
    guess, count = output.metrics["mean_frame_loss"]
    assert output.loss < 0.6 * guess / count


@pytest.mark.parametrize("name", OBJECTIVES)
def test_accumulation_weighs_frames_not_micro_batches(name: str) -> None:
    objective, data = made(*OBJECTIVES[name]).eval(), batch((30, 11))
    prepared, output = loss_of(objective, data)
    shares, means = [], []
    for row, length in enumerate((30, 11)):
        one = Batch(inputs=data.inputs[row : row + 1, :length], lengths=data.lengths[row : row + 1], ids=("utt",))
        part = objective.prepare(one, torch.Generator())
        shares.append(objective(part, prepared.weights).loss)
        means.append(objective(part, part.weights).loss)
    torch.testing.assert_close(sum(shares), output.loss)
    assert (sum(means) / 2 - output.loss).abs() > 1e-4  # the control
