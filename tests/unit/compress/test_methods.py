"""The table of cutting methods: rounds reach what one cut reaches, and plans tell what cuts leave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sslim.batch import Padded
from sslim.compress.calibration import Calibration
from sslim.compress.methods import METHODS
from sslim.compress.weights import sparsity_of
from sslim.config import from_plain
from sslim.models import SpeechModel, build_model
from sslim.models.elastic import count_parameters
from sslim.models.melhubert import melhubert
from sslim.nn.encoder import BlockConfig


def model(*sizes: tuple[int, int]) -> SpeechModel:
    """Random, with heads and units of every layer."""
    config = melhubert(num_layers=2, dim=32, num_heads=4, feedforward_dim=64, conv_kernel_size=8, conv_groups=4)
    blocks = tuple(BlockConfig(num_heads=heads, head_dim=8, feedforward_dim=units) for heads, units in sizes)
    config = replace(config, encoder=replace(config.encoder, blocks=blocks, depth_map=tuple(range(len(sizes)))))
    return build_model(config, torch.Generator().manual_seed(0))


def calibration() -> Calibration:
    values = torch.randn(2, 15, 80, generator=torch.Generator().manual_seed(5))
    batch = Padded(values=values, lengths=torch.tensor([15, 9]))
    return Calibration(features=(batch,), losses=(lambda m: m.encode_features(values).final.square().mean(),))


def in_rounds(method: str, start: SpeechModel, values: dict[str, Any], rounds: int) -> list[SpeechModel]:
    chosen = METHODS[method]
    settings, models = from_plain(chosen.settings, values), [start]
    for done in range(1, rounds + 1):
        now = chosen.in_round(settings, start, models[-1], done / rounds)
        models.append(chosen.apply(models[-1], now, calibration()))
    return models


def sizes(made: SpeechModel) -> list[tuple[int, int]]:
    return [(block.num_heads, block.feedforward_dim) for block in made.config.encoder.blocks]


@pytest.mark.parametrize("rounds", [2, 3, 5])
@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("heads", {"keep": 0.5}),
        ("heads", {"keep": 0.3, "scope": "model"}),
        ("rows", {"keep": 0.3}),
        ("rows", {"keep": 0.3, "scope": "model"}),
        ("rows", {"keep": 0.26, "multiple": 8}),
        ("width", {"keep": 0.5}),
        ("width", {"keep": 0.4, "scope": "model"}),
        ("depth", {"keep": 0.5}),
        ("depth", {"keep": 0.25}),
    ],
)
def test_rounds_end_where_one_cut_does(method: str, values: dict[str, Any], rounds: int) -> None:
    start = model((4, 64), (4, 64), (4, 64), (4, 64))
    settings = from_plain(METHODS[method].settings, values)
    at_once = METHODS[method].apply(start, settings, calibration())
    models = in_rounds(method, start, values, rounds)
    scope = values.get("scope")
    totals = [[sum(part) for part in zip(*sizes(made), strict=True)] for made in (models[-1], at_once)]
    assert totals[0] == totals[1]
    assert scope == "model" or sizes(models[-1]) == sizes(at_once)
    counts = [count_parameters(made.config) for made in models]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 2 or method in ("heads", "depth")  # it goes down in steps


def test_equal_shares_of_a_rounded_number_would_not_arrive() -> None:
    """The control: of 2 heads, a third root of a half is 1.6 heads, which is 2, three times over."""
    start, method = model((2, 64), (2, 64)), METHODS["heads"]
    left = start
    for _ in range(3):
        left = method.apply(left, method.settings(keep=0.5 ** (1 / 3)), None)
    assert sizes(left) == [(2, 64)] * 2
    assert sizes(in_rounds("heads", start, {"keep": 0.5}, 3)[-1]) == [(1, 64)] * 2


def test_layers_that_cannot_shrink_do_not_make_the_others_shrink_more() -> None:
    start = model((1, 64), (1, 64), (8, 64))
    assert sizes(in_rounds("heads", start, {"keep": 0.25}, 3)[-1]) == [(1, 64), (1, 64), (2, 64)]


@pytest.mark.parametrize("rounds", [2, 3])
def test_ranks_go_down_to_the_share_of_all_parameters(rounds: int) -> None:
    start = model((4, 64), (4, 64))
    models = in_rounds("low-rank", start, {"params": 0.7}, rounds)
    whole = count_parameters(start.config, with_heads=False)
    left = [count_parameters(made.config, with_heads=False) / whole for made in models]
    assert 0.69 < left[-1] <= 0.7
    assert left == sorted(left, reverse=True)


def test_sparsity_begins_where_the_model_stands() -> None:
    whole = model((4, 64), (4, 64))
    start = in_rounds("weights", whole, {"sparsity": 0.5}, 1)[-1]
    reached = [sparsity_of(made, biases=False) for made in in_rounds("weights", start, {"sparsity": 0.875}, 2)]
    assert reached == pytest.approx([0.5, 0.75, 0.875], abs=1e-3)
    from_nothing = [sparsity_of(made, biases=False) for made in in_rounds("weights", whole, {"sparsity": 0.75}, 2)]
    assert from_nothing == pytest.approx([0.0, 0.5, 0.75], abs=1e-3)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("heads", {"keep": 1.0, "scope": "model"}),
        ("rows", {"keep": 1.0, "scope": "model", "score": "data"}),
        ("rows", {"keep": 1.0, "multiple": 8}),
        ("width", {"keep": 1.0, "score": "data"}),
        ("depth", {"keep": 1.0}),
        ("depth", {"keep": 1.0, "choose": "run"}),
        ("low-rank", {"params": 1.0}),
        ("low-rank", {"params": 1.0, "whiten": True}),
        ("low-rank", {"params": 1.0, "maps": ["up"]}),
    ],
)
def test_a_plan_tells_what_a_cut_leaves(method: str, values: dict[str, Any]) -> None:
    start, speech, chosen = model((4, 64), (3, 40), (4, 64)), calibration(), METHODS[method]
    settings = from_plain(chosen.settings, values)
    assert chosen.plan is not None
    assert chosen.strength is not None
    plan, least = chosen.plan(start, settings, speech), chosen.least(start.config, settings)
    descriptions = []
    for strength in (least, 0.5 * (1 + least), 0.9, 1.0):
        small = chosen.apply(start, replace(settings, **{chosen.strength: strength}), speech)
        assert plan(strength).encoder == small.config.encoder
        descriptions.append(small.config.encoder)
    assert descriptions[0] != descriptions[-1] == start.config.encoder  # the least is less than all


def test_scores_are_computed_once_for_all_shares() -> None:
    start, speech, calls = model((4, 64), (4, 64)), calibration(), [0]

    def counted(made: SpeechModel) -> torch.Tensor:
        calls[0] += 1
        return speech.losses[0](made)

    watched = replace(speech, losses=(counted,))
    method = METHODS["rows"]
    assert method.plan is not None
    plan = method.plan(start, method.settings(keep=1.0, score="data"), watched)
    assert len({tuple(block.feedforward_dim for block in plan(keep).encoder.blocks) for keep in (0.2, 0.4, 0.6)}) == 3
    assert calls[0] == 1
