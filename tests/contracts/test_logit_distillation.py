"""What is particular to distillation of cluster probabilities; the contract of all distillation is in the file beside."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslim.batch import IGNORED_LABEL, Batch, Padded
from sslim.models import ModelConfig, SpeechModel, build_model
from sslim.models.hubert import hubert, narrow_conv_layers
from sslim.models.melhubert import melhubert
from sslim.nn.heads import ClusterHeadConfig, CodewordHeadConfig, MaskEmbeddingConfig
from sslim.objectives import (
    LogitDistillation,
    LogitDistillationConfig,
    MaskedPrediction,
    MaskedPredictionConfig,
    MaskingConfig,
    logit_heads,
    span_mask,
)
from sslim.objectives.frame_alignment import FrameAlignment
from sslim.objectives.masked_prediction import HEAD

CLUSTERS = 6
MASKS = MaskingConfig(probability=0.5, span_length=3)
SMALL: Any = {"dim": 16, "num_heads": 2, "feedforward_dim": 32, "conv_kernel_size": 8, "conv_groups": 2, "dropout": 0.0}


def model(num_layers: int, seed: int, *, sharp: float = 20.0, **settings: Any) -> SpeechModel:
    """A MelHuBERT whose head is sure of its clusters."""
    config = melhubert(num_layers=num_layers, **{**SMALL, "num_clusters": CLUSTERS, **settings})
    built = build_model(config, torch.Generator().manual_seed(seed))
    built.set_statistics(torch.zeros(40), torch.ones(40), source="test")
    for parameter in built.heads[HEAD].parameters():
        parameter.data *= sharp
    return built


def objective(teacher: SpeechModel | None = None, **settings: Any) -> LogitDistillation:
    return LogitDistillation(model(1, 1), teacher or model(2, 2), LogitDistillationConfig(**settings)).eval()


def batch(seed: int = 0, frames: tuple[int, ...] = (60, 41, 23), *, labelled: bool = True) -> Batch:
    """Noise as base features of 10 ms; labels at 20 ms, the first of every utterance missing."""
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.zeros(len(frames), max(frames), 40), torch.full((len(frames), (max(frames) + 1) // 2), IGNORED_LABEL)
    for row, count in enumerate(frames):
        inputs[row, :count] = torch.randn(count, 40, generator=generator)
        labels[row, 1 : (count + 1) // 2] = torch.randint(CLUSTERS, ((count + 1) // 2 - 1,), generator=generator)
    ids = tuple(f"utt{i}" for i in range(len(frames)))
    return Batch(inputs=inputs, lengths=torch.tensor(frames), ids=ids, labels=labels if labelled else None)


def step(distillation: nn.Module, data: Batch, seed: int = 0) -> Any:
    prepared = distillation.prepare(data, torch.Generator().manual_seed(seed))
    return distillation(prepared, prepared.weights)


def logits_of(speech_model: SpeechModel, data: Batch, row: int, hidden_T: Tensor | None = None) -> Tensor:
    """(T, K) of one utterance by itself, on the simplest way; hidden frames of the features are zeros."""
    count = int(data.lengths[row])
    features = speech_model.frontend.finish(
        Padded(values=data.inputs[row : row + 1, :count], lengths=data.lengths[row : row + 1])
    )
    values = features.values if hidden_T is None else features.values.masked_fill(hidden_T[None, :, None], 0.0)
    with torch.no_grad():
        return speech_model.heads[HEAD](speech_model.encode_features(values).final)[0]


def divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """(T,) from the definition, in float64."""
    p, q = ((x.double() / temperature).softmax(-1) for x in (teacher, student))
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_divergence_is_that_of_the_definition(temperature: float) -> None:
    distillation, data = objective(temperature=temperature), batch(labelled=False)
    output = step(distillation, data)
    pairs = [tuple(logits_of(net, data, row) for net in (distillation.teacher.model, distillation.student)) for row in range(3)]
    want = torch.cat([divergence(*pair, temperature) for pair in pairs]).mean()
    torch.testing.assert_close(output.loss.double(), want, atol=1e-5, rtol=1e-5)
    agree = torch.cat([teacher.argmax(-1) == student.argmax(-1) for teacher, student in pairs]).float()
    total, count = output.metrics["agreement"]
    assert (float(total), int(count)) == (float(agree.sum()), len(agree))
    backwards = torch.cat([divergence(*reversed(pair), temperature) for pair in pairs]).mean()  # the control
    assert (backwards - want).abs() > 1e-2


def test_the_square_of_the_temperature_is_a_factor_where_it_is_asked_for() -> None:
    plain, scaled = (step(objective(temperature=3.0, scale_by_temperature=on), batch()).loss for on in (False, True))
    torch.testing.assert_close(scaled, 9.0 * plain)
    norms = {}  # what it is for: gradients of one size at any temperature
    for on in (False, True):
        for temperature in (100.0, 200.0):
            distillation = objective(model(2, 2, sharp=1.0), temperature=temperature, scale_by_temperature=on)
            step(distillation, batch()).loss.backward()
            norms[on, temperature] = distillation.student.heads[HEAD].linear.weight.grad.norm()
    assert float(norms[True, 200.0] / norms[True, 100.0]) == pytest.approx(1.0, abs=0.1)
    assert float(norms[False, 200.0] / norms[False, 100.0]) == pytest.approx(0.25, abs=0.05)  # the control


@pytest.mark.parametrize("masking", [None, MASKS])
def test_without_weight_of_the_teacher_it_is_masked_prediction(masking: MaskingConfig | None) -> None:
    """With nothing hidden the cross-entropy of what masked prediction calls unmasked frames, else that of the masked ones."""
    distillation, data = objective(alpha=0.0, masking=masking), batch()
    hidden = MaskingConfig(probability=0.0) if masking is None else masking
    weights = {"masked_weight": 0.0, "unmasked_weight": 1.0} if masking is None else {}
    prediction = MaskedPrediction(distillation.student, MaskedPredictionConfig(masking=hidden, **weights)).eval()
    distillation.teacher.model = None  # type: ignore[assignment]  # it is not even run
    torch.testing.assert_close(step(distillation, data, 3).loss, step(prediction, data, 3).loss, atol=1e-6, rtol=0)
    assert (
        step(distillation, replace(data, labels=data.labels.clamp(max=2)), 3).loss - step(prediction, data, 3).loss
    ).abs() > 0.01


def test_the_two_terms_are_mixed_by_alpha() -> None:
    """Each a mean over frames of its own: those with a label, and all."""
    data = batch()
    parts = [step(objective(alpha=alpha), data).loss for alpha in (0.0, 1.0)]
    mixed = step(objective(alpha=0.3), data)
    torch.testing.assert_close(mixed.loss, 0.7 * parts[0] + 0.3 * parts[1])
    frames, labelled = int(mixed.metrics["divergence"][1]), int(mixed.metrics["label_loss"][1])
    assert (frames, labelled) == (30 + 21 + 12, 29 + 20 + 11)


def test_labels_are_asked_for_only_where_they_have_a_weight() -> None:
    assert step(objective(), batch(labelled=False)).loss > 0
    with pytest.raises(ValueError, match="needs labels"):
        step(objective(alpha=0.9), batch(labelled=False))
    with pytest.raises(ValueError, match="label 6 found, but the head has 6 clusters"):
        step(objective(alpha=0.9), replace(batch(), labels=torch.full((3, 30), 6)))


@pytest.mark.parametrize("sees_all", [False, True])
def test_hidden_frames_are_hidden_from_both_and_count_alone(sees_all: bool) -> None:
    distillation, data = objective(masking=MASKS, teacher_sees_all=sees_all), batch(labelled=False)
    mask_BT = span_mask(torch.tensor([30, 21, 12]), 30, MASKS, torch.Generator().manual_seed(5))
    losses: dict[bool, list[Tensor]] = {False: [], True: []}
    for row, count in enumerate((30, 21, 12)):
        hidden_T = mask_BT[row, :count]
        student = logits_of(distillation.student, data, row, hidden_T)
        for whole, kept in losses.items():
            teacher = logits_of(distillation.teacher.model, data, row, None if whole else hidden_T)
            kept.append(divergence(teacher, student, 1.0)[hidden_T])
    want = {whole: torch.cat(kept).mean() for whole, kept in losses.items()}
    torch.testing.assert_close(step(distillation, data, 5).loss.double(), want[sees_all], atol=1e-5, rtol=1e-5)
    assert (want[True] - want[False]).abs() > 1e-2  # the control


def test_a_faster_teachers_probabilities_are_averaged_and_hidden_with_the_students_frames() -> None:
    teacher = model(2, 2, frame_period_ms=10)
    distillation, data = LogitDistillation(model(1, 1), teacher, LogitDistillationConfig(masking=MASKS)).eval(), batch()
    prepared = distillation.prepare(data, torch.Generator().manual_seed(0))
    for row, count in enumerate((60, 41, 23)):
        hidden_T = prepared.mask_BT[row].repeat_interleave(2)[:count]
        p_TK = logits_of(teacher, data, row, hidden_T).softmax(-1)
        pairs = [p_TK[i : i + 2].mean(0) for i in range(0, count, 2)]
        torch.testing.assert_close(prepared.targets_BTK[row, : len(pairs)], torch.stack(pairs), atol=1e-5, rtol=0)
    open_TK = logits_of(teacher, data, 0).softmax(-1)  # the control: nothing hidden
    assert (prepared.targets_BTK[0, 0] - open_TK[:2].mean(0)).abs().max() > 1e-3


def test_a_mask_reaches_the_frames_of_a_slower_teacher() -> None:
    alignment = FrameAlignment(repeated=2, shift=-1)  # teacher frame 0 for the student's frame 0, frame 1 for 1 and 2, ...
    mask_BT = torch.tensor([[1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]]).bool()
    assert alignment.teacher_mask(mask_BT, 3).int().tolist() == [[1, 0, 1], [0, 0, 0]]
    assert alignment.teacher_mask(mask_BT, 4).int().tolist() == [[1, 0, 1, 0], [0, 0, 0, 1]]
    fine = FrameAlignment(averaged=2, shift=1)
    assert fine.teacher_mask(mask_BT[:1], 8).int().tolist() == [[0, 1, 1, 0, 0, 0, 0, 0]]


def test_stored_logits_take_the_teachers_place() -> None:
    distillation, data = objective(temperature=2.0), batch(labelled=False)
    frames = distillation.teacher.frames(data.inputs, data.lengths)
    stored = replace(data, teacher=Padded(values=frames.values.half(), lengths=frames.lengths))
    torch.testing.assert_close(step(distillation, stored).loss, step(distillation, data).loss, atol=2e-3, rtol=0)
    other = replace(data, teacher=Padded(values=-frames.values, lengths=frames.lengths))
    assert (step(distillation, other).loss - step(distillation, data).loss).abs() > 0.1


def test_a_teacher_in_training_mode_would_give_other_targets() -> None:
    """What the reference does: its runner puts the teacher's dropout on (spec/melhubert.md 6.2 no. 17)."""
    distillation, data = objective(model(2, 2, dropout=0.3)).train(), batch()
    first, second = (distillation.teacher.frames(data.inputs, data.lengths).values for _ in range(2))
    assert torch.equal(first, second)
    distillation.teacher.model.train()  # the control
    with pytest.raises(AssertionError):
        distillation.teacher.frames(data.inputs, data.lengths)


def test_the_teacher_computes_in_bf16_where_that_is_asked_for() -> None:
    teacher, data, seen = model(2, 2), batch(), []
    teacher.encoder.blocks[-1].feedforward.up.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    frames = [
        LogitDistillation(model(1, 1), teacher, LogitDistillationConfig(), bf16=bf16).teacher.frames(data.inputs, data.lengths)
        for bf16 in (False, True)
    ]
    assert seen == [torch.float32, torch.bfloat16]
    assert frames[1].values.dtype == torch.float32
    difference = (frames[1].values - frames[0].values).abs().mean()
    assert 0 < difference < 0.05 * frames[0].values.abs().mean()


def test_the_student_gets_the_heads_it_needs() -> None:
    student, teacher = melhubert(num_layers=1, **SMALL), melhubert(num_layers=2, **SMALL, num_clusters=CLUSTERS)
    config = LogitDistillationConfig(masking=MASKS)
    assert logit_heads(config, replace(student, heads={}), teacher) == teacher.heads
    assert logit_heads(config, student, teacher)[HEAD] == ClusterHeadConfig(num_clusters=CLUSTERS)  # 512 do not fit
    codewords = CodewordHeadConfig(num_clusters=CLUSTERS, codeword_dim=4)
    own: ModelConfig = replace(student, heads={HEAD: codewords})
    assert logit_heads(config, own, teacher) == {HEAD: codewords}  # of another kind, but over the same clusters
    masked = replace(teacher, heads={**teacher.heads, "mask": MaskEmbeddingConfig(dim=80)})
    assert logit_heads(config, own, masked)["mask"] == MaskEmbeddingConfig(dim=80)
    assert logit_heads(replace(config, mask_at="projection"), own, masked)["mask"] == MaskEmbeddingConfig(dim=16)
    assert "mask" not in logit_heads(LogitDistillationConfig(), own, masked)
    with pytest.raises(ValueError, match="the teacher has no head 'masked_prediction'"):
        logit_heads(config, own, replace(teacher, heads={}))


def test_hidden_frames_of_a_waveform_teacher_are_its_own_vector() -> None:
    wave = hubert(**{**SMALL, "attention_dropout": 0.0}, num_layers=1, conv_layers=narrow_conv_layers(8), num_clusters=CLUSTERS)  # type: ignore[arg-type]
    teacher = build_model(wave, torch.Generator().manual_seed(2))
    config = LogitDistillationConfig(masking=MASKS, teacher_mask_at="projection")
    distillation = LogitDistillation(model(1, 1), teacher, config).eval()
    data = Batch(
        inputs=0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(0)), lengths=torch.tensor([8000]), ids=("a",)
    )
    before = step(distillation, data).loss
    teacher.heads["mask"].embedding.data += 5.0
    assert (step(distillation, data).loss - before).abs() > 1e-3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; expected a number above 0"),
        ({"alpha": 1.5}, "alpha is 1.5; expected a weight from 0"),
    ],
)
def test_settings_out_of_range_get_one_sentence(change: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LogitDistillationConfig(**change)


def test_heads_that_do_not_fit_get_one_sentence() -> None:
    config = LogitDistillationConfig()
    with pytest.raises(ValueError, match="the student's head is over 6 clusters and the teacher's over 7"):
        LogitDistillation(model(1, 1), model(2, 2, num_clusters=7), config)
    for place, who in ((0, "student"), (1, "teacher")):
        pair = [model(1, 1), model(2, 2)]
        pair[place] = build_model(replace(pair[place].config, heads={}))
        with pytest.raises(ValueError, match=f"the {who} has no head 'masked_prediction'"):
            LogitDistillation(*pair, config)
    heads = {HEAD: ClusterHeadConfig(num_clusters=CLUSTERS), "mask": MaskEmbeddingConfig(dim=16)}
    wrong = build_model(replace(model(2, 2).config, heads=heads))
    with pytest.raises(ValueError, match="the teacher's mask embedding has width 16, masking at the features needs 80"):
        LogitDistillation(model(1, 1), wrong, LogitDistillationConfig(masking=MASKS))
    LogitDistillation(model(1, 1), wrong, LogitDistillationConfig(masking=MASKS, teacher_sees_all=True))
