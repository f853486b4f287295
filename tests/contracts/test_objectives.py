"""One body over every objective: loss falls, padding changes nothing, equal seed equal loss, accumulation by frames."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from sslim.batch import IGNORED_LABEL, Batch
from sslim.models import build_model
from sslim.models.hubert import hubert, narrow_conv_layers
from sslim.models.melhubert import melhubert
from sslim.models.search_space import SearchSpace
from sslim.nn.heads import ClusterHeadConfig, CodewordHeadConfig, MaskEmbeddingConfig, build_head
from sslim.objectives import MaskedPrediction, MaskedPredictionConfig, MaskingConfig
from sslim.objectives.model_inputs import features_of
from sslim.objectives.once_for_all import OnceForAll, OnceForAllConfig

TINY = melhubert(
    num_layers=2, dim=16, num_heads=2, feedforward_dim=32, conv_kernel_size=8, conv_groups=2, num_clusters=6, dropout=0.0
)


def masked_prediction(**settings: object) -> MaskedPrediction:
    config = MaskedPredictionConfig(**settings)  # type: ignore[arg-type]
    model = build_model(TINY, torch.Generator().manual_seed(0))
    model.set_statistics(torch.zeros(40), torch.ones(40), source="test")
    return MaskedPrediction(model, config)


def learnable_mask() -> MaskedPrediction:
    heads = {"masked_prediction": ClusterHeadConfig(num_clusters=6), "mask": MaskEmbeddingConfig(dim=16)}
    model = build_model(replace(TINY, heads=heads), torch.Generator().manual_seed(0))
    model.set_statistics(torch.zeros(40), torch.ones(40), source="test")
    return MaskedPrediction(model, MaskedPredictionConfig(mask_at="projection"))


def once_for_all() -> OnceForAll:
    """On a supernet: training runs one subnet here, evaluation the largest and the smallest."""
    space = SearchSpace(dims=(8, 16), num_heads=(1, 2), feedforward_ratios=(1.0, 2.0), num_layers=(1, 2))
    inner = masked_prediction()
    inner.model.config = replace(inner.model.config, search_space=space)
    objective = OnceForAll(inner, OnceForAllConfig())
    objective.begin_step(0, torch.Generator().manual_seed(3))
    return objective


def waveform(head: str = "codewords", norm: str = "group", **settings: object) -> MaskedPrediction:
    """HuBERT in small: convolutions over samples, a vector in place of hidden frames after the projection."""
    config = hubert(
        num_layers=1, dim=16, num_heads=2, feedforward_dim=32, conv_layers=narrow_conv_layers(8), conv_norm=norm,  # type: ignore[arg-type]
        conv_kernel_size=8, conv_groups=2, num_clusters=6, codeword_dim=8, gradient_scale=1.0, dropout=0.0,
        attention_dropout=0.0, layer_drop=0.0,
    )  # fmt: skip
    if head == "clusters":
        config = replace(config, heads={**config.heads, "masked_prediction": ClusterHeadConfig(num_clusters=6)})
    model = build_model(config, torch.Generator().manual_seed(0))
    return MaskedPrediction(model, MaskedPredictionConfig(mask_at="projection", **settings))  # type: ignore[arg-type]


WAVEFORM_OBJECTIVES: dict[str, Callable[[], MaskedPrediction]] = {
    "waveforms, codewords": waveform,
    "waveforms, clusters": lambda: waveform("clusters", unmasked_weight=0.5),
    "waveforms, feature penalty": lambda: waveform(feature_penalty=10.0),
    "waveforms, layer norm": lambda: waveform(norm="layer", feature_penalty=1.0),
}

OBJECTIVES: dict[str, Callable[[], nn.Module]] = {
    **WAVEFORM_OBJECTIVES,
    "masked prediction": masked_prediction,
    "masked prediction, reference masks": lambda: masked_prediction(masking=MaskingConfig(edges="reference")),
    "masked prediction, both terms": lambda: masked_prediction(masked_weight=0.7, unmasked_weight=0.3),
    "masked prediction, learnable mask after projection": learnable_mask,
    "once for all": once_for_all,
}


HOP = 320  # samples of a frame


def samples(num_frames: int) -> int:
    """Samples that give so many frames of the convolutions, and a few that give none."""
    return HOP * num_frames + 100


def waveform_batch(seed: int = 0, lengths: tuple[int, ...] = (30, 21, 11)) -> Batch:
    """Tones whose pitch tells the cluster, in noise; lengths are frames."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    clusters = torch.randint(0, 6, (len(lengths), longest // 10 + 1), generator=generator).repeat_interleave(10, dim=1)
    clusters = clusters[:, :longest]
    labels = torch.full((len(lengths), longest), IGNORED_LABEL)
    frequency_hz = 300.0 * 1.6 ** clusters.repeat_interleave(HOP, dim=1)
    inputs = torch.zeros(len(lengths), samples(longest))
    inputs[:, : HOP * longest] = 0.3 * torch.sin(2 * torch.pi * (frequency_hz / 16000).cumsum(1))
    inputs += 0.02 * torch.randn(inputs.shape, generator=generator)
    for row, length in enumerate(lengths):
        inputs[row, samples(length) :] = 0
        labels[row, :length] = clusters[row, :length]
    return Batch(
        inputs=inputs,
        lengths=torch.tensor([samples(length) for length in lengths]),
        ids=tuple(f"utt{i}" for i in range(len(lengths))),
        labels=labels,
    )


def batch_for(name: str, seed: int = 0, num_utterances: int = 3) -> Batch:
    frames = ((30, 21, 11), (30, 11))[num_utterances == 2]
    return waveform_batch(seed, frames) if name in WAVEFORM_OBJECTIVES else batch(seed, tuple(2 * n for n in frames))


def part_of(data: Batch, row: int, length: int) -> Batch:
    """One utterance of a batch, alone."""
    units = samples(length) if data.is_waveform else 2 * length
    assert data.labels is not None
    return Batch(inputs=data.inputs[row : row + 1, :units], lengths=data.lengths[row : row + 1], ids=data.ids[row : row + 1],
                 labels=data.labels[row : row + 1, :length])  # fmt: skip


def batch(seed: int = 0, lengths: tuple[int, ...] = (60, 41, 22)) -> Batch:
    """Base frames whose loudest band tells the cluster, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    clusters = torch.randint(0, 6, (len(lengths), longest // 20 + 1), generator=generator).repeat_interleave(20, dim=1)[
        :, :longest
    ]
    inputs = 0.3 * torch.randn(len(lengths), longest, 40, generator=generator)
    inputs += 3.0 * nn.functional.one_hot(clusters * 6, 40)
    labels = torch.full((len(lengths), (longest + 1) // 2), IGNORED_LABEL)
    for row, length in enumerate(lengths):
        inputs[row, length:] = 0
        labels[row, : (length + 1) // 2] = clusters[row, :length:2]
    return Batch(inputs=inputs, lengths=torch.tensor(lengths), ids=tuple(f"utt{i}" for i in range(len(lengths))), labels=labels)


def step(objective: nn.Module, data: Batch, seed: int = 0) -> torch.Tensor:
    prepared = objective.prepare(data, torch.Generator().manual_seed(seed))
    return objective(prepared, prepared.weights).loss


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_falls(name: str) -> None:
    objective = OBJECTIVES[name]().train()
    optimizer = torch.optim.Adam(objective.parameters(), lr=5e-3)
    losses = []
    for i in range(60 if name in WAVEFORM_OBJECTIVES else 120):
        loss = step(objective, batch_for(name, i), seed=i)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_changes_nothing(name: str) -> None:
    objective = OBJECTIVES[name]().eval()
    data = batch_for(name)
    prepared = objective.prepare(data, torch.Generator().manual_seed(0))
    more = (10 * HOP,) if data.is_waveform else (0, 0, 0, 20)
    padded = Batch(
        inputs=nn.functional.pad(data.inputs, more if len(more) > 1 else (0, *more), value=5.0),
        lengths=data.lengths,
        ids=data.ids,
        labels=nn.functional.pad(data.labels, (0, 10), value=IGNORED_LABEL),
    )
    longer = objective.prepare(padded, torch.Generator().manual_seed(0))
    same = replace(longer, mask_BT=nn.functional.pad(prepared.mask_BT, (0, 10)), weights=prepared.weights)
    a, b = objective(prepared, prepared.weights), objective(same, prepared.weights)
    torch.testing.assert_close(a.loss, b.loss, atol=1e-5, rtol=0)
    grown = same.inputs.lengths + (10 * HOP if data.is_waveform else 10)
    wrong = replace(same, inputs=replace(same.inputs, lengths=grown))  # the control: padding as speech
    assert (objective(wrong, prepared.weights).loss - a.loss).abs() > 1e-4


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equal_seed_gives_equal_loss(name: str) -> None:
    objective = OBJECTIVES[name]().eval()
    data = batch_for(name)
    assert step(objective, data, 1) == step(objective, data, 1)
    assert step(objective, data, 1) != step(objective, data, 2)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_accumulation_weighs_frames_not_micro_batches(name: str) -> None:
    objective = OBJECTIVES[name]().eval()
    data = batch_for(name, num_utterances=2)
    prepared = objective.prepare(data, torch.Generator().manual_seed(0))
    whole = objective(prepared, prepared.weights).loss
    parts = []
    for row, length in enumerate((30, 11)):  # the same two utterances, alone, with the masks they had together
        one = objective.prepare(part_of(data, row, length), torch.Generator())
        mask = prepared.mask_BT[row : row + 1, :length]
        parts.append(replace(one, mask_BT=mask, weights={**one.weights, "masked": mask.sum(), "unmasked": (~mask).sum()}))
    split = sum(objective(part, prepared.weights).loss for part in parts)
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=0)
    mean_of_means = sum(objective(part, part.weights).loss for part in parts) / 2
    assert (mean_of_means - whole).abs() > 1e-4  # the control: what the reference computes


def test_the_callers_tensors_are_not_changed() -> None:
    """The reference zeroes masked and padded frames in place (spec/melhubert.md 6.2 no. 28)."""
    data = batch()
    before = data.inputs.clone()
    step(masked_prediction(), data)
    assert torch.equal(data.inputs, before)


def test_metrics_count_what_they_say() -> None:
    objective = masked_prediction().eval()
    prepared = objective.prepare(batch(), torch.Generator().manual_seed(0))
    metrics = objective(prepared, prepared.weights).metrics
    logits = objective.logits(features_of(objective.model, prepared.inputs), prepared.mask_BT)
    for name, part in (("masked", prepared.mask_BT), ("unmasked", ~prepared.mask_BT)):
        part = part & (prepared.labels_BT != IGNORED_LABEL)
        want = (logits.argmax(-1) == prepared.labels_BT)[part].float().mean()
        total, count = metrics[f"{name}_accuracy"]
        torch.testing.assert_close(total / count, want)
        loss, count = metrics[f"{name}_loss"]
        torch.testing.assert_close(loss / count, nn.functional.cross_entropy(logits[part], prepared.labels_BT[part]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "sslim cluster"),
        ({"labels": torch.zeros(3, 12, dtype=torch.long)}, "12 frames, the features have 30"),
        ({"labels": torch.full((3, 30), 6)}, "label 6 found, but the head has 6 clusters"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step(masked_prediction(), replace(batch(), **change))


def test_a_mask_embedding_of_the_wrong_width_is_refused() -> None:
    heads = {"masked_prediction": ClusterHeadConfig(num_clusters=6), "mask": MaskEmbeddingConfig(dim=16)}
    with pytest.raises(ValueError, match="has width 16, masking at the features needs 80"):
        MaskedPrediction(build_model(replace(TINY, heads=heads)), MaskedPredictionConfig())


@pytest.mark.parametrize("head", ["codewords", "clusters"])
def test_gradients_of_the_heads_are_those_of_finite_differences(head: str) -> None:
    configs = {"codewords": CodewordHeadConfig(num_clusters=3, codeword_dim=4), "clusters": ClusterHeadConfig(num_clusters=3)}
    module = build_head(5, configs[head])
    module.initialize(torch.Generator().manual_seed(0))  # type: ignore[operator]
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(7) % 3
    nn.functional.cross_entropy(module(x), labels).backward()
    for name, parameter in module.named_parameters():
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        losses = []
        for sign in (1, -1):
            moved = {name: parameter.detach() + sign * 1e-2 * direction}
            logits = torch.func.functional_call(module, {**dict(module.named_parameters()), **moved}, (x,))
            losses.append(nn.functional.cross_entropy(logits.double(), labels).item())
        assert parameter.grad is not None
        expected = (losses[0] - losses[1]) / 2e-2
        assert (parameter.grad * direction).sum().item() == pytest.approx(expected, rel=2e-2, abs=2e-4), name


def test_codewords_are_compared_by_their_cosine_over_the_temperature() -> None:
    """Hsu et al. 2021, equation 3, by hand: A = identity, o = (3, 4), codewords along the axes and one the other way."""
    head = build_head(2, CodewordHeadConfig(num_clusters=3, codeword_dim=2))
    with torch.no_grad():
        head.projection.weight.copy_(torch.eye(2))  # type: ignore[union-attr, operator]
        head.projection.bias.zero_()  # type: ignore[union-attr, operator]
        head.codewords.copy_(torch.tensor([[2.0, 0.0], [0.0, 0.5], [-3.0, -4.0]]))  # type: ignore[operator]
    logits = head(torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(logits, torch.tensor([6.0, 8.0, -10.0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(torch.tensor([3.0, 4.0])).dtype == torch.float32


def test_the_feature_penalty_is_the_mean_square_of_real_frames_and_reaches_the_convolutions() -> None:
    data = waveform_batch()
    plain, penalised = waveform(), waveform(feature_penalty=10.0)
    prepared = penalised.prepare(data, torch.Generator().manual_seed(0))
    rows = [part_of(data, row, length) for row, length in enumerate((30, 21, 11))]
    alone = [penalised.model.frontend(row.inputs, row.lengths).values for row in rows]
    mean = torch.cat([values[0] for values in alone]).square().mean()
    difference = penalised(prepared, prepared.weights).loss - plain(prepared, prepared.weights).loss
    torch.testing.assert_close(difference, 10.0 * mean, atol=1e-4, rtol=1e-4)
    penalised(prepared, prepared.weights).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in penalised.model.frontend.parameters())


def test_what_waveform_objectives_refuse() -> None:
    with pytest.raises(ValueError, match="feature_penalty 10 needs a convolutional front-end"):
        masked_prediction(feature_penalty=10.0)
    with pytest.raises(ValueError, match="takes waveforms, and the batch holds stored features"):
        step(waveform(), batch())
    wrong = replace(TINY, heads={"masked_prediction": MaskEmbeddingConfig(dim=16)})
    with pytest.raises(ValueError, match="is of kind 'mask'; masked prediction needs 'clusters' or 'codewords'"):
        MaskedPrediction(build_model(wrong), MaskedPredictionConfig())
