"""The contract of objectives, for every kind of distillation; and the teacher stays as it is."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from sslim.batch import Batch, Padded, valid_mask
from sslim.models import ModelConfig, SpeechModel, build_model
from sslim.models.hubert import hubert, narrow_conv_layers
from sslim.models.melhubert import melhubert
from sslim.models.search_space import SearchSpace
from sslim.nn.heads import ClusterHeadConfig, CodewordHeadConfig, HeadConfig
from sslim.objectives import (
    Distillation,
    LogitDistillation,
    LogitDistillationConfig,
    MaskingConfig,
    heads_for,
    logit_heads,
    start_maps_as_identity,
)
from sslim.objectives.model_inputs import features_of
from sslim.objectives.once_for_all import OnceForAll, OnceForAllConfig
from sslim.objectives.teacher import normalize_instances
from sslim.recipes.distil_losses import LayerChoice, loss_for

NO_DROPOUT: Any = {"dropout": 0.0}
SMALL: Any = {"num_heads": 2, "feedforward_dim": 32, "conv_kernel_size": 8, "conv_groups": 2}


def mel_model(num_layers: int, dim: int, **settings: Any) -> ModelConfig:
    config = melhubert(num_layers=num_layers, dim=dim, **SMALL, **NO_DROPOUT, **settings)
    return replace(config, heads={})


def wave_model(num_layers: int, dim: int) -> ModelConfig:
    return hubert(
        num_layers=num_layers, dim=dim, conv_layers=narrow_conv_layers(8), num_clusters=None, gradient_scale=1.0,
        layer_drop=0.0, attention_dropout=0.0, **SMALL, **NO_DROPOUT,
    )  # fmt: skip


def built(config: ModelConfig, seed: int) -> SpeechModel:
    model = build_model(config, torch.Generator().manual_seed(seed))
    if model.frontend is not None and config.frontend is not None and config.frontend.kind == "spectral":
        model.set_statistics(torch.zeros(40), torch.ones(40), source="test")
    return model


def distillation(loss: str, student: ModelConfig, teacher: ModelConfig, **changes: Any) -> Distillation:
    config = replace(loss_for(loss, student, teacher, changes.pop("layers", None)), **changes)
    heads = heads_for(config, student.encoder.dim, student.projection.feature_dim, teacher.encoder.dim)
    model = built(replace(student, heads=heads), 1)
    start_maps_as_identity(model, config)
    return Distillation(model, built(teacher, 2), config)


def logits(student: ModelConfig, teacher: ModelConfig, head: HeadConfig | None = None, **settings: Any) -> LogitDistillation:
    """From a teacher that is sure of its clusters."""
    config = LogitDistillationConfig(**settings)
    teacher = replace(teacher, heads={"masked_prediction": head or ClusterHeadConfig(num_clusters=6)})
    student = replace(student, heads=logit_heads(config, student, teacher))
    model = built(teacher, 2)
    for parameter in model.heads["masked_prediction"].parameters():
        parameter.data *= 20.0
    return LogitDistillation(built(student, 1), model, config)


def supernet() -> OnceForAll:
    inner = distillation("data2vec", mel_model(2, 16), mel_model(3, 16), masking=MASKS)
    space = SearchSpace(dims=(8, 16), num_heads=(1, 2), feedforward_ratios=(1.0, 2.0), num_layers=(1, 2))
    inner.student.config = replace(inner.student.config, search_space=space)
    objective = OnceForAll(inner, OnceForAllConfig())
    objective.begin_step(0, torch.Generator().manual_seed(3))
    return objective


MASKS = MaskingConfig(probability=0.5, span_length=3)
CODEWORDS = CodewordHeadConfig(num_clusters=6, codeword_dim=8)
OBJECTIVES: dict[str, Callable[[], nn.Module]] = {
    "heads": lambda: distillation("distil-hubert", mel_model(1, 16), mel_model(3, 16)),
    "heads, wider teacher": lambda: distillation("distil-hubert", mel_model(1, 16), mel_model(3, 32)),
    "layers": lambda: distillation("distil-alhubert", mel_model(2, 16), mel_model(4, 16)),
    "layers, wider teacher": lambda: distillation("distil-alhubert", mel_model(2, 16), mel_model(4, 32)),
    "layers and projection, shared maps": lambda: distillation("dp-hubert", mel_model(3, 16), mel_model(3, 16)),
    "average, hidden frames": lambda: distillation("data2vec", mel_model(2, 16), mel_model(3, 16), masking=MASKS),
    "average, hidden features": lambda: distillation(
        "data2vec", mel_model(2, 16), mel_model(3, 16), masking=MASKS, mask_at="features"
    ),
    "teacher twice as fast": lambda: distillation("distil-hubert", mel_model(1, 16), mel_model(2, 16, frame_period_ms=10)),
    "once for all": supernet,
    "logits": lambda: logits(mel_model(1, 16), mel_model(3, 16), temperature=2.0),
    "logits, hidden frames": lambda: logits(mel_model(1, 16), mel_model(3, 16), masking=MASKS),
    "logits, teacher twice as fast": lambda: logits(
        mel_model(1, 16), mel_model(2, 32, frame_period_ms=10), masking=MASKS, mask_at="projection", scale_by_temperature=True
    ),
    "waveform student": lambda: distillation("distil-hubert", wave_model(1, 16), mel_model(2, 16), feature_penalty=1.0),
    "waveform teacher": lambda: distillation("distil-alhubert", mel_model(1, 16), wave_model(2, 16)),
    "waveform both": lambda: distillation("dp-hubert", wave_model(1, 16), wave_model(2, 16)),
    "waveform both, logits": lambda: logits(
        wave_model(1, 16), wave_model(2, 16), CODEWORDS, masking=MASKS, mask_at="projection"
    ),
}
WAVEFORMS = [name for name in OBJECTIVES if name.startswith("waveform")]


def batch(name: str, seed: int = 0, frames: tuple[int, ...] = (60, 41, 23)) -> Batch:
    """Noise in bands that change, as base features of 10 ms; or the same lengths of tones in noise."""
    generator = torch.Generator().manual_seed(seed)
    ids = tuple(f"utt{i}" for i in range(len(frames)))
    if name in WAVEFORMS:
        lengths = torch.tensor([160 * count + 400 for count in frames])
        pitch = torch.rand(len(frames), max(frames) // 10 + 4, generator=generator).repeat_interleave(1600, dim=1)
        inputs = 0.3 * torch.sin((0.02 + 0.3 * pitch[:, : int(lengths.max())]).cumsum(1))
        inputs += 0.02 * torch.randn(inputs.shape, generator=generator)
    else:
        lengths = torch.tensor(frames)
        loud = torch.randint(0, 6, (len(frames), max(frames) // 10 + 1), generator=generator).repeat_interleave(10, dim=1)
        inputs = 0.3 * torch.randn(len(frames), max(frames), 40, generator=generator)
        inputs += 3.0 * nn.functional.one_hot(loud[:, : max(frames)] * 6, 40)
    real = torch.arange(inputs.shape[1])[None] < lengths[:, None]
    inputs = inputs * (real if inputs.dim() == 2 else real[..., None])
    return Batch(inputs=inputs, lengths=lengths, ids=ids)


def step(objective: nn.Module, data: Batch, seed: int = 0) -> torch.Tensor:
    prepared = objective.prepare(data, torch.Generator().manual_seed(seed))
    return objective(prepared, prepared.weights).loss


def student_of(objective: nn.Module) -> SpeechModel:
    return getattr(objective, "objective", objective).student


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_falls(name: str) -> None:
    objective = OBJECTIVES[name]().train()
    optimizer = torch.optim.Adam(objective.parameters(), lr=5e-3)
    losses = []
    for i in range(40):
        loss = step(objective, batch(name, i % 4), seed=i)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first, last = sum(losses[:4]) / 4, sum(losses[-4:]) / 4
    assert last < first - 0.1 * abs(first)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_changes_nothing(name: str) -> None:
    objective = OBJECTIVES[name]().eval()
    data = batch(name)
    more = (0, 3200) if data.is_waveform else (0, 0, 0, 20)
    padded = replace(data, inputs=nn.functional.pad(data.inputs, more, value=5.0))
    prepared = objective.prepare(data, torch.Generator().manual_seed(0))
    longer = objective.prepare(padded, torch.Generator().manual_seed(0))
    assert longer.weights == prepared.weights
    if prepared.mask_BT is not None:  # the same frames hidden
        extra = longer.mask_BT.shape[1] - prepared.mask_BT.shape[1]
        mask = nn.functional.pad(prepared.mask_BT, (0, extra))
        counted = nn.functional.pad(prepared.counted_BT, (0, extra))
        longer = replace(longer, mask_BT=mask, counted_BT=counted)
    a, b = objective(prepared, prepared.weights), objective(longer, prepared.weights)
    torch.testing.assert_close(a.loss, b.loss, atol=1e-5, rtol=0)
    # The controls: padding heard as speech, and padding in the mean, as the references have it.
    values, extra = longer.inputs.values, 3200 if longer.inputs.values.dim() == 2 else 10
    real = valid_mask(longer.inputs.lengths, values.shape[1]).view(*values.shape[:2], *(1,) * (values.dim() - 2))
    heard = Padded(values=values.masked_fill(~real, 5.0), lengths=longer.inputs.lengths + extra)
    assert (objective(replace(longer, inputs=heard), prepared.weights).loss - a.loss).abs() > 1e-3
    everywhere = torch.ones_like(longer.counted_BT)
    diluted = {**prepared.weights, "frames": everywhere.sum()}
    assert (objective(replace(longer, counted_BT=everywhere), diluted).loss - a.loss).abs() > 0.05


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equal_seed_gives_equal_loss(name: str) -> None:
    objective = OBJECTIVES[name]().eval()
    data = batch(name)
    assert step(objective, data, 1) == step(objective, data, 1)
    masked = getattr(objective, "objective", objective).config.masking is not None
    assert bool(step(objective, data, 1) != step(objective, data, 2)) is masked  # nothing else is random


@pytest.mark.parametrize("name", OBJECTIVES)
def test_accumulation_weighs_frames_not_micro_batches(name: str) -> None:
    objective = OBJECTIVES[name]().eval()
    data = batch(name, frames=(60, 24))
    prepared = objective.prepare(data, torch.Generator().manual_seed(0))
    whole = objective(prepared, prepared.weights).loss
    parts = []
    for row in (0, 1):
        rows, units = slice(row, row + 1), int(data.lengths[row])
        one = objective.prepare(
            replace(data, inputs=data.inputs[rows, :units], lengths=data.lengths[rows], ids=data.ids[rows]), torch.Generator()
        )
        count = one.counted_BT.shape[1]
        mask = None if prepared.mask_BT is None else prepared.mask_BT[rows, :count]
        counted = prepared.counted_BT[rows, :count]
        part = replace(one, mask_BT=mask, counted_BT=counted, weights={**one.weights, "frames": counted.sum()})
        if hasattr(part, "targets_BTK"):  # what the teacher said with the mask they had together
            part = replace(part, targets_BTK=prepared.targets_BTK[rows, :count])
        parts.append(part)
    split = sum(objective(part, prepared.weights).loss for part in parts)
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=0)
    mean_of_means = sum(objective(part, part.weights).loss for part in parts) / 2
    assert (mean_of_means - whole).abs() > 1e-5  # the control


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_teacher_is_left_alone(name: str) -> None:
    objective = OBJECTIVES[name]()
    inner = getattr(objective, "objective", objective)
    teacher = inner.teacher.model
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    objective.train()
    assert not any(module.training for module in teacher.modules())
    assert student_of(objective).training
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    step(objective, batch(name)).backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key
    teachers = {id(parameter) for parameter in teacher.parameters()}
    assert not teachers & {id(parameter) for parameter in objective.parameters()}
    assert not any("teacher" in key for key in objective.state_dict())  # not saved with the student
    objective.to(torch.float64)
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float64}  # but moved along


def test_a_teacher_in_training_mode_would_give_other_targets() -> None:
    """What the reference does: its runner puts the teacher's dropout on (spec/distilalhubert.md 6.C no. 22)."""
    config = mel_model(2, 16)
    noisy = replace(config, encoder=replace(config.encoder, dropout=0.3))
    objective = distillation("distil-hubert", mel_model(1, 16), noisy).train()
    data = batch("heads")
    first, second = (objective.teacher.frames(data.inputs, data.lengths).values for _ in range(2))
    assert torch.equal(first, second)
    objective.teacher.model.train()  # the control
    with pytest.raises(AssertionError):
        objective.teacher.frames(data.inputs, data.lengths)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["heads", "average, hidden frames", "waveform both"])
def test_the_teacher_computes_in_bf16_where_that_is_asked_for(name: str, bf16: bool) -> None:
    """Its blocks alone: log-Mel features, norms and the targets that come out are float32."""
    plain = OBJECTIVES[name]()
    objective = Distillation(plain.student, plain.teacher.model, plain.config, bf16=bf16)
    teacher, data, seen = objective.teacher.model, batch(name), []
    hook = teacher.encoder.blocks[-1].feedforward.up.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    targets = objective.prepare(data, torch.Generator().manual_seed(0)).targets_BTLD
    hook.remove()
    assert set(seen) == {torch.bfloat16 if bf16 else torch.float32}
    assert targets.dtype == torch.float32
    want = plain.prepare(data, torch.Generator().manual_seed(0)).targets_BTLD
    assert torch.equal(targets, want) is not bf16
    assert (targets - want).abs().mean() < 0.02 * want.abs().mean()
    if not data.is_waveform:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            assert objective.teacher.features(data.inputs, data.lengths).values.dtype == torch.float32


def test_targets_are_the_teachers_layers() -> None:
    objective = distillation("dp-hubert", mel_model(3, 16), mel_model(3, 16), layers=LayerChoice(teacher=(0, 2, 3)))
    data = batch("layers")
    features = objective.teacher.features(data.inputs, data.lengths)
    with torch.no_grad():
        output = objective.teacher.model.encode_features(features.values, features.lengths)
    prepared = objective.prepare(data, torch.Generator())
    for index, want in enumerate((output.embed, output.layers[2], output.final)):
        torch.testing.assert_close(prepared.targets_BTLD[:, :, index], want, atol=1e-6, rtol=0)
    assert objective.config.map_groups == ((0,), (2, 3))


def test_feed_forward_targets_are_taken_before_residual_and_norm() -> None:
    objective = distillation("data2vec", mel_model(1, 16), mel_model(3, 16), layers=LayerChoice(teacher=(3,)), masking=MASKS)
    teacher, data = objective.teacher.model, batch("heads")
    frames = objective.teacher.frames(data.inputs, data.lengths)
    features = objective.teacher.features(data.inputs, data.lengths)
    with torch.no_grad():
        before = teacher.encode_features(features.values, features.lengths).layers[2]
        block = teacher.encoder.blocks[2]
        row = before[:1]  # the longest, without padding
        attended = block.attention_norm(row + block.attention(row, None)[0])
        want = normalize_instances(block.feedforward(attended), features.lengths[:1])
    torch.testing.assert_close(frames.values[:1], want, atol=1e-5, rtol=0)


def test_instance_norm_is_over_real_frames() -> None:
    x = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0))
    normal = normalize_instances(x, torch.tensor([9, 4]))
    want = nn.functional.instance_norm(x[1:, :4].transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(normal[1:, :4], want)
    assert not normal[1, 4:].any()


def test_stored_outputs_take_the_teachers_place() -> None:
    objective = distillation("distil-alhubert", mel_model(2, 16), mel_model(4, 16)).eval()
    data = batch("layers")
    frames = objective.teacher.frames(data.inputs, data.lengths)
    stored = replace(data, teacher=Padded(values=frames.values.half(), lengths=frames.lengths))
    torch.testing.assert_close(step(objective, stored), step(objective, data), atol=1e-3, rtol=0)
    other = replace(data, teacher=Padded(values=frames.values + 1.0, lengths=frames.lengths))
    assert (step(objective, other) - step(objective, data)).abs() > 0.1


def test_figures_of_a_teacher_layer_cover_all_student_layers_that_learn_from_it() -> None:
    layers = LayerChoice(student=(0, 2), teacher=(3, 3))
    objective = distillation("distil-alhubert", mel_model(2, 16), mel_model(3, 16), layers=layers).eval()
    prepared = objective.prepare(batch("layers"), torch.Generator())
    metrics = objective(prepared, prepared.weights).metrics
    total, count = metrics["layer3_distance"]
    mean, frames = metrics["distance_loss"]
    assert count == 2 * frames
    torch.testing.assert_close(total / count, mean / frames)
    features = features_of(objective.student, prepared.inputs)
    first = objective.estimates(objective.student_outputs(features, None))[:, :, 0]
    distance_BT = (first - prepared.targets_BTLD[:, :, 0]).square().mean(-1)
    assert (distance_BT[prepared.counted_BT].sum() / frames - total / count).abs() > 0.01  # the control: the first one alone


def test_averaged_targets_leave_out_layers_without_a_feed_forward_part() -> None:
    whole, pruned = wave_model(3, 16), wave_model(3, 16)
    blocks = (*pruned.encoder.blocks[:2], replace(pruned.encoder.blocks[2], feedforward_dim=0))
    pruned = replace(pruned, encoder=replace(pruned.encoder, blocks=blocks))
    chosen = [loss_for("data2vec", mel_model(1, 16), teacher).target.layers for teacher in (whole, pruned)]
    assert chosen == [(2, 3), (2,)]
    distillation("data2vec", wave_model(1, 16), pruned, masking=MASKS)
    with pytest.raises(ValueError, match="teacher layer 3 has no feed-forward part"):
        distillation("data2vec", wave_model(1, 16), pruned, masking=MASKS, layers=LayerChoice(teacher=(2, 3)))


def test_maps_of_equal_width_start_as_identity_and_are_shared() -> None:
    objective = distillation("dp-hubert", mel_model(3, 16), mel_model(3, 16))
    assert sorted(objective.student.heads) == ["distillation_0", "distillation_1"]
    x = torch.randn(2, 16)
    assert torch.equal(objective.student.heads["distillation_1"](x), x)
    wider = distillation("dp-hubert", mel_model(3, 16), mel_model(3, 32))
    assert wider.student.heads["distillation_1"](x).shape == (2, 32)


@pytest.mark.parametrize(
    ("loss", "changes", "sentence"),
    [
        (
            "distil-hubert",
            {"layers": LayerChoice(teacher=(2, 9))},
            "teacher layer 9 is asked for, the teacher has layers 0 to 3",
        ),
        ("distil-alhubert", {"layers": LayerChoice(student=(5,), teacher=(3,))}, "the student has layers 0 to 2"),
        ("distil-alhubert", {"map_groups": ()}, "is 16 wide and the teacher 32: name it in map_groups"),
        ("distil-hubert", {"layers": LayerChoice(student=(1,), teacher=(3,))}, "name teacher layers only"),
        ("distil-hubert", {"loss_frames": "masked"}, "no masking is set"),
        ("distil-hubert", {"feature_penalty": 1.0}, "needs a convolutional front-end"),
        ("data2vec", {"layers": LayerChoice(teacher=(0,))}, "the teacher has layers 1 to 3"),
        ("distil-huber", {}, "did you mean 'distil-hubert'"),
    ],
)
def test_settings_that_do_not_fit_get_one_sentence(loss: str, changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        distillation(loss, mel_model(2, 16), mel_model(3, 32), **changes)


def test_a_student_without_the_head_is_refused() -> None:
    config = loss_for("distil-hubert", mel_model(2, 16), mel_model(3, 16))
    with pytest.raises(ValueError, match="no head 'distillation'"):
        Distillation(built(mel_model(2, 16), 0), built(mel_model(3, 16), 0), config)
