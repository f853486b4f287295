"""Row pruning: the reference's own choices, planted units, widths and multiples, settings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sslim
from sslim.batch import Padded
from sslim.compress.calibration import Calibration
from sslim.compress.importance import unit_weights
from sslim.compress.origins import origins
from sslim.compress.rows import RowPruning, prune_rows, rows_config
from sslim.config import from_plain, to_plain
from sslim.models import SpeechModel, build_model
from sslim.models.elastic import count_parameters
from sslim.models.melhubert import melhubert
from sslim.nn.encoder import BlockConfig

ASSETS = Path(__file__).parents[2] / "parity" / "assets" / "melhubert_legacy"
SPEECH = Padded(values=torch.randn(2, 9, 80, generator=torch.Generator().manual_seed(2)), lengths=torch.tensor([9, 6]))


def made(widths: tuple[int, ...] = (20, 20, 20), **block: Any) -> SpeechModel:
    config = melhubert(num_layers=1, dim=16, num_heads=4, conv_kernel_size=4, conv_groups=2, num_clusters=3)
    blocks = tuple(BlockConfig(num_heads=4, head_dim=4, feedforward_dim=width, **block) for width in widths)
    encoder = replace(config.encoder, blocks=blocks, depth_map=tuple(range(len(blocks))))
    model = build_model(replace(config, encoder=encoder), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def loss(model: SpeechModel) -> Tensor:
    return model.encode_features(SPEECH.values, SPEECH.lengths).final.pow(3).sin().sum()


CALIBRATION = Calibration(features=(SPEECH,), losses=(loss,))


def widths_of(model: SpeechModel) -> list[int]:
    return [block.feedforward_dim for block in model.config.encoder.blocks]


def final(model: SpeechModel) -> Tensor:
    with torch.no_grad():
        return model.encode_features(SPEECH.values, SPEECH.lengths).final


def test_the_reference_chose_the_same_units() -> None:
    """Its rounds from 64 to 32 units with updates between them: of 96 units one was decided otherwise, by scores 1 % apart."""
    model, by_reference = sslim.load_model(ASSETS / "pretrain.ckpt"), sslim.load_model(ASSETS / "row_pruned.ckpt")
    small = prune_rows(model, RowPruning(num_kept=32))
    assert widths_of(small) == widths_of(by_reference) == [32, 32, 32]
    swapped = 0
    for block in range(3):
        whole, theirs = (net.encoder.blocks[block].feedforward.up.weight.detach() for net in (model, by_reference))
        distances = torch.cdist(theirs, whole)
        assert distances.min(1).values.max() < 0.01 < distances.topk(2, largest=False).values[:, 1].min()
        scores = unit_weights(model)[block]
        different = set(distances.argmin(1).tolist()) ^ set(origins(small).units[block])
        swapped += len(different) // 2
        if different:
            ours = scores[list(different)]
            assert float(ours.max() / ours.min()) < 1.01
    assert swapped <= 1


def test_a_unit_without_effect_goes_first() -> None:
    """A unit that nothing reads has data score 0; its L1 norm still has the row that feeds it."""
    model, silent = made(), [3, 11, 0]
    with torch.no_grad():
        for block, unit in enumerate(silent):
            model.encoder.blocks[block].feedforward.down.weight[:, unit] = 0
            model.encoder.blocks[block].feedforward.up.weight[unit] *= 10
    by_data = prune_rows(model, RowPruning(num_kept=19, score="data"), CALIBRATION)
    by_weight = prune_rows(model, RowPruning(num_kept=19))
    for block, unit in enumerate(silent):
        assert unit not in origins(by_data).units[block]
        assert unit in origins(by_weight).units[block]
    torch.testing.assert_close(final(by_data), final(model), atol=1e-6, rtol=1e-6)
    assert (final(by_weight) - final(model)).abs().max() > 1e-3


def test_uniform_widths_and_multiples() -> None:
    model = made((20, 16, 5))
    assert widths_of(prune_rows(model, RowPruning(keep=0.5))) == [10, 8, 3]
    assert widths_of(prune_rows(model, RowPruning(keep=0.5, multiple=8))) == [8, 8, 5]
    assert widths_of(prune_rows(model, RowPruning(keep=0.9, multiple=8))) == [16, 8, 5]
    assert widths_of(prune_rows(model, RowPruning(num_kept=13, multiple=4))) == [12, 12, 5]
    assert widths_of(prune_rows(model, RowPruning(keep=1.0, multiple=8))) == [20, 16, 5]


def test_widths_over_the_model() -> None:
    """Units of a layer whose scores are all alike but for a few large ones: these few are kept, the even layer keeps more."""
    model = made((16, 16, 16))
    with torch.no_grad():
        model.encoder.blocks[1].feedforward.up.weight[:2] *= 50
    widths = widths_of(prune_rows(model, RowPruning(num_kept=24, scope="model", minimum=2)))
    assert widths[1] == 2 < min(widths[0], widths[2])
    assert sum(widths) == 24
    eights = widths_of(prune_rows(model, RowPruning(num_kept=30, scope="model", multiple=8)))
    assert sum(eights) == 24
    assert all(width % 8 == 0 for width in eights)
    floor = widths_of(prune_rows(model, RowPruning(keep=0.01, scope="model", minimum=3)))
    assert floor == [3, 3, 3]


def test_rounds_go_on_from_the_model_as_it_is() -> None:
    """Three rounds of the same settings: widths are read off the model, and what is left is part of what was left before."""
    model, settings = made((16, 16, 16)), RowPruning(keep=0.75, scope="model", score="data")
    before = origins(model)
    for total in (36, 27, 20):
        model = prune_rows(model, settings, CALIBRATION)
        assert sum(widths_of(model)) == total
        after = origins(model)
        assert all(set(new) <= set(old) for new, old in zip(after.units, before.units, strict=True))
        before = after
    assert count_parameters(model.config) == model.num_parameters()


def test_lighthubert_windows_do_not_matter_to_units() -> None:
    model = made((12, 12), attention_window=2, window_rule="lighthubert")
    small = prune_rows(model, RowPruning(keep=0.5))
    with torch.no_grad():
        for block, units in zip(model.encoder.blocks, origins(small).units, strict=True):
            block.feedforward.down.weight[:, [unit for unit in range(12) if unit not in units]] = 0
    torch.testing.assert_close(final(small), final(model), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "settings", [RowPruning(keep=0.3, multiple=4), RowPruning(num_kept=23, scope="model", score="data", multiple=4)]
)
def test_sizes_are_known_before(settings: RowPruning) -> None:
    model = made()
    small = prune_rows(model, settings, CALIBRATION)
    expected = rows_config(model.config, settings)
    assert count_parameters(expected) == small.num_parameters() < model.num_parameters()
    if settings.scope == "uniform":
        assert expected == small.config


def test_the_published_model_has_the_predicted_size() -> None:
    """3,072 to 512 units, the last round of the reference: 2,560 * (768 + 1 + 768) parameters less in each of twelve layers."""
    config = melhubert()
    small = rows_config(config, RowPruning(num_kept=512))
    assert count_parameters(config) - count_parameters(small) == 12 * 2560 * (768 + 1 + 768)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (RowPruning(num_kept=21), "num_kept is 21, but the widest layer has 20 feed-forward units; expected 1 to 20"),
        (
            RowPruning(num_kept=5, scope="model", minimum=2),
            "num_kept is 5, but the model has 60 feed-forward units; expected 6",
        ),
        (RowPruning(num_kept=23, scope="model", multiple=8), "num_kept is 23, .* expected 24 to 60"),
        (RowPruning(num_kept=61, scope="model"), "num_kept is 61, .* expected 3 to 60"),
    ],
)
def test_numbers_that_the_model_cannot_keep_are_refused(settings: RowPruning, message: str) -> None:
    model = made()
    for pruned in (lambda: prune_rows(model, settings), lambda: rows_config(model.config, settings)):
        with pytest.raises(ValueError, match=message):
            pruned()


def test_settings_are_plain_values_and_checked() -> None:
    settings = RowPruning(num_kept=7, scope="model", score="data", multiple=8, minimum=16, normalize=None)
    assert from_plain(RowPruning, to_plain(settings)) == settings
    note = prune_rows(made(), RowPruning(keep=0.5)).provenance[-1]
    assert (note["step"], note["keep"], note["scope"]) == ("rows", 0.5, "uniform")
    for name in ("multiple", "minimum"):
        with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
            RowPruning(keep=0.5, **{name: 0})
    with pytest.raises(ValueError, match="expected the p of a norm"):
        RowPruning(keep=0.5, normalize=0.0)
    with pytest.raises(ValueError, match="expected one of them"):
        RowPruning(keep=0.5, num_kept=3)
    with pytest.raises(ValueError, match="need calibration speech"):
        prune_rows(made(), RowPruning(keep=1.0, score="data"))
