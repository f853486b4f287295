"""One body over every objective: loss falls, padding changes nothing, equal seed equal loss, accumulation by frames."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from sslim.batch import IGNORED_LABEL, Batch
from sslim.models import build_model
from sslim.models.melhubert import melhubert
from sslim.nn.heads import ClusterHeadConfig
from sslim.objectives import MaskedPrediction, MaskedPredictionConfig, MaskingConfig

TINY = melhubert(
    num_layers=2, dim=16, num_heads=2, feedforward_dim=32, conv_kernel_size=8, conv_groups=2, num_clusters=6, dropout=0.0
)


def masked_prediction(**settings: object) -> MaskedPrediction:
    config = MaskedPredictionConfig(**settings)  # type: ignore[arg-type]
    model = build_model(TINY, torch.Generator().manual_seed(0))
    model.set_statistics(torch.zeros(40), torch.ones(40), source="test")
    return MaskedPrediction(model, config)


def learnable_mask() -> MaskedPrediction:
    heads = {"masked_prediction": ClusterHeadConfig(num_clusters=6, mask_embedding_dim=16)}
    model = build_model(replace(TINY, heads=heads), torch.Generator().manual_seed(0))
    model.set_statistics(torch.zeros(40), torch.ones(40), source="test")
    return MaskedPrediction(model, MaskedPredictionConfig(mask_at="projection"))


OBJECTIVES: dict[str, Callable[[], nn.Module]] = {
    "masked prediction": masked_prediction,
    "masked prediction, reference masks": lambda: masked_prediction(masking=MaskingConfig(edges="reference")),
    "masked prediction, both terms": lambda: masked_prediction(masked_weight=0.7, unmasked_weight=0.3),
    "masked prediction, learnable mask after projection": learnable_mask,
}


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
    for i in range(120):
        loss = step(objective, batch(i), seed=i)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_changes_nothing(name: str) -> None:
    objective = OBJECTIVES[name]().eval()
    data = batch()
    prepared = objective.prepare(data, torch.Generator().manual_seed(0))
    padded = Batch(
        inputs=nn.functional.pad(data.inputs, (0, 0, 0, 20), value=5.0),
        lengths=data.lengths,
        ids=data.ids,
        labels=nn.functional.pad(data.labels, (0, 10), value=IGNORED_LABEL),
    )
    longer = objective.prepare(padded, torch.Generator().manual_seed(0))
    same = replace(longer, mask_BT=nn.functional.pad(prepared.mask_BT, (0, 10)), weights=prepared.weights)
    a, b = objective(prepared, prepared.weights), objective(same, prepared.weights)
    torch.testing.assert_close(a.loss, b.loss, atol=1e-5, rtol=0)
    wrong = replace(same, features=replace(same.features, lengths=same.features.lengths + 10))  # the control: padding as speech
    assert (objective(wrong, prepared.weights).loss - a.loss).abs() > 1e-4


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equal_seed_gives_equal_loss(name: str) -> None:
    objective = OBJECTIVES[name]().eval()
    assert step(objective, batch(), 1) == step(objective, batch(), 1)
    assert step(objective, batch(), 1) != step(objective, batch(), 2)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_accumulation_weighs_frames_not_micro_batches(name: str) -> None:
    objective = OBJECTIVES[name]().eval()
    data = batch(lengths=(60, 22))
    prepared = objective.prepare(data, torch.Generator().manual_seed(0))
    whole = objective(prepared, prepared.weights).loss
    parts = []
    for row, length in enumerate((30, 11)):  # the same two utterances, alone, with the masks they had together
        one = objective.prepare(
            Batch(inputs=data.inputs[row : row + 1, : 2 * length], lengths=data.lengths[row : row + 1], ids=data.ids[:1],
                  labels=data.labels[row : row + 1, :length]),
            torch.Generator(),
        )  # fmt: skip
        mask = prepared.mask_BT[row : row + 1, :length]
        parts.append(replace(one, mask_BT=mask, weights={"masked": mask.sum(), "unmasked": (~mask).sum()}))
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
    logits = objective.logits(prepared.features, prepared.mask_BT)
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
    heads = {"masked_prediction": ClusterHeadConfig(num_clusters=6, mask_embedding_dim=16)}
    with pytest.raises(ValueError, match="has width 16, masking at the features needs 80"):
        MaskedPrediction(build_model(replace(TINY, heads=heads)), MaskedPredictionConfig())
