"""Span masks: realised fractions of the reference, which frames can be reached, purity, and the options."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sslim.objectives.masking import MaskingConfig, span_mask


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference_mask(length: int, probability: float, span: int, rng: np.random.Generator) -> np.ndarray:
    """One utterance by the rules of spec/melhubert.md section 2, frame by frame: the oracle."""
    n = max(2, int(probability * length / span + rng.random()))
    shortest = span if length - span > n else length - n - 1
    starts = rng.choice(length - shortest, n, replace=False)
    mask = np.zeros(length, dtype=bool)
    for start in starts:
        mask[start : start + span] = True
    return mask


@pytest.mark.parametrize(("probability", "span", "stated"), [(0.7, 5, 0.53), (0.7, 10, 0.517), (0.8, 20, 0.558)])
def test_reference_mode_has_the_stated_fractions(probability: float, span: int, stated: float) -> None:
    """Stated in spec/melhubert.md section 2: 0.53, 0.517 and 0.558 at the published settings."""
    config = MaskingConfig(probability=probability, span_length=span, edges="reference")
    mask = span_mask(torch.full((300,), 750), 750, config, generator())
    assert abs(mask.float().mean().item() - stated) < 0.02


@pytest.mark.parametrize("length", [7, 12, 40, 120])
def test_reference_mode_masks_each_frame_as_often_as_the_oracle(length: int) -> None:
    config = MaskingConfig(probability=0.7, span_length=5, edges="reference")
    ours = span_mask(torch.full((8000,), length), length, config, generator()).float().mean(0).numpy()
    rng = np.random.default_rng(0)
    theirs = np.mean([reference_mask(length, 0.7, 5, rng) for _ in range(8000)], axis=0)
    assert np.abs(ours - theirs).max() < 0.035  # six standard errors of the difference of two means of 8,000
    if length > 12:
        assert ours[-1] == 0  # the reference never masks the last frame
    reachable = span_mask(torch.full((8000,), length), length, replace(config, edges="reachable"), generator())
    assert np.abs(reachable.float().mean(0).numpy() - theirs).max() > 0.1  # the control: the other mode is told apart


def test_reachable_mode_masks_every_frame_equally_often() -> None:
    mask = span_mask(torch.full((8000,), 60), 60, MaskingConfig(), generator()).float().mean(0)
    assert (mask - mask.mean()).abs().max() < 0.03
    reference = span_mask(torch.full((8000,), 60), 60, MaskingConfig(edges="reference"), generator()).float().mean(0)
    assert (reference - reference.mean()).abs().max() > 0.3


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("distribution", ["static", "uniform", "normal", "poisson"])
def test_padding_is_never_masked_and_the_mask_is_a_function_of_the_generator(distribution: str, overlap: bool) -> None:
    config = MaskingConfig(length_distribution=distribution, length_other=2.0, overlap=overlap)  # type: ignore[arg-type]
    lengths = torch.tensor([50, 31, 8, 2, 1])
    mask = span_mask(lengths, 55, config, generator())
    for row, length in enumerate(lengths.tolist()):
        assert not mask[row, length:].any()
    assert mask[:2].any(1).all()
    assert torch.equal(mask, span_mask(lengths, 55, config, generator()))
    assert not torch.equal(mask, span_mask(lengths, 55, config, generator(1)))


def test_spans_that_may_not_overlap_keep_their_length_and_distance() -> None:
    config = MaskingConfig(overlap=False, probability=0.5, span_length=4, min_space=2)

    def runs(row: torch.Tensor, value: bool) -> list[int]:
        found, count = [], 0
        for frame in [*row.tolist(), not value]:
            if frame == value:
                count += 1
            elif count:
                found, count = [*found, count], 0
        return found

    separate = span_mask(torch.full((200,), 60), 60, config, generator())
    assert {length for row in separate for length in runs(row, True)} == {4}
    assert min(length for row in separate for length in runs(row, False)[1:-1]) >= 2
    joined = span_mask(torch.full((200,), 60), 60, replace(config, overlap=True), generator())
    assert max(length for row in joined for length in runs(row, True)) > 4


def test_same_count_gives_every_utterance_as_many_masked_frames() -> None:
    lengths = torch.tensor([90, 60, 30])
    config = MaskingConfig(same_count=True)
    counts = span_mask(lengths, 90, config, generator()).sum(1)
    assert len(set(counts.tolist())) == 1
    assert counts[0] > 0
    assert len(set(span_mask(lengths, 90, MaskingConfig(), generator()).sum(1).tolist())) > 1


def test_probability_zero_masks_nothing() -> None:
    assert not span_mask(torch.tensor([50]), 50, MaskingConfig(probability=0.0), generator()).any()


@pytest.mark.parametrize(("settings", "message"), [({"probability": 1.5}, "1.5"), ({"span_length": 0}, "span_length 0")])
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskingConfig(**settings)
