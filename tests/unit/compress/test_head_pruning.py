"""Head pruning: the reference's own choices, planted heads, the choice over the model, original numbers, settings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sslim
from sslim.batch import Padded
from sslim.checkpoints.exporters import export_melhubert
from sslim.compress.calibration import Calibration
from sslim.compress.heads import HeadPruning, heads_config, prune_heads, surviving_heads
from sslim.compress.rows import RowPruning, prune_rows
from sslim.config import from_plain, to_plain
from sslim.models import SpeechModel, build_model
from sslim.models.elastic import count_parameters
from sslim.models.melhubert import melhubert
from sslim.nn.relative_positions import RelativePositionsConfig
from sslim.storage import write_json

ASSETS = Path(__file__).parents[2] / "parity" / "assets" / "melhubert_legacy"


def made(num_layers: int = 3, **encoder: Any) -> SpeechModel:
    config = melhubert(
        num_layers=num_layers, dim=16, num_heads=4, feedforward_dim=8, conv_kernel_size=4, conv_groups=2, num_clusters=3
    )
    model = build_model(replace(config, encoder=replace(config.encoder, **encoder)), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


SPEECH = Padded(values=torch.randn(2, 9, 80, generator=torch.Generator().manual_seed(2)), lengths=torch.tensor([9, 6]))


def loss(model: SpeechModel) -> Tensor:
    return model.encode_features(SPEECH.values, SPEECH.lengths).final.pow(3).sin().sum()


CALIBRATION = Calibration(features=(SPEECH,), losses=(loss,))


def silence_output(model: SpeechModel, block: int, head: int) -> None:
    """The head does nothing any more, though its query, key and value are what they were."""
    with torch.no_grad():
        model.encoder.blocks[block].attention.output.weight[:, 4 * head : 4 * head + 4] = 0


def test_the_reference_chose_the_same_heads() -> None:
    """Its two rounds of L1 pruning by layer, with a few updates at 1e-5 between them, from its own pre-trained model."""
    model = sslim.load_model(ASSETS / "pretrain.ckpt")
    by_reference = sslim.load_model(ASSETS / "head_pruned_l1.ckpt")
    rounds = prune_heads(prune_heads(model, HeadPruning(num_kept=3)), HeadPruning(num_kept=2))
    assert surviving_heads(rounds) == ((0, 1), (1, 2), (2, 3)) == surviving_heads(by_reference)
    assert surviving_heads(prune_heads(model, HeadPruning(num_kept=2))) == surviving_heads(rounds)
    query = rounds.encoder.blocks[1].attention.query.weight - by_reference.encoder.blocks[1].attention.query.weight
    assert query.abs().max() < 1e-2  # but for the updates these are its tensors


def test_a_head_without_effect_goes_first() -> None:
    """The data sees it, and so do the output columns; query, key and value alone do not."""
    model, silent = made(), [2, 0, 1]
    for block, head in enumerate(silent):
        silence_output(model, block, head)
    whole = model.encode_features(SPEECH.values, SPEECH.lengths).final
    for score in ("data", "l1-output"):
        small = prune_heads(model, HeadPruning(keep=0.75, score=score), CALIBRATION)
        assert small.provenance[-1]["removed_heads"] == [[head] for head in silent]
        torch.testing.assert_close(small.encode_features(SPEECH.values, SPEECH.lengths).final, whole, atol=1e-6, rtol=1e-6)
    blind = prune_heads(model, HeadPruning(keep=0.75))
    assert blind.provenance[-1]["removed_heads"] != [[head] for head in silent]
    assert (blind.encode_features(SPEECH.values, SPEECH.lengths).final - whole).abs().max() > 1e-2


def test_one_layer_of_large_scale_does_not_take_everything() -> None:
    """Raw sums compare layers of different scale; normalised by layer they do not. Every layer keeps a head in either case."""
    model = made()
    with torch.no_grad():
        for part in (model.encoder.blocks[1].attention.query, model.encoder.blocks[1].attention.key):
            part.weight *= 100
    raw = prune_heads(model, HeadPruning(num_kept=6, scope="model", normalize=None))
    normal = prune_heads(model, HeadPruning(num_kept=6, scope="model"))
    assert [block.num_heads for block in raw.config.encoder.blocks] == [1, 4, 1]
    assert [block.num_heads for block in normal.config.encoder.blocks] != [1, 4, 1]
    assert sum(block.num_heads for block in normal.config.encoder.blocks) == 6
    least = prune_heads(model, HeadPruning(keep=1e-6, scope="model", normalize=None))
    assert [block.num_heads for block in least.config.encoder.blocks] == [1, 1, 1]


def test_rounds_keep_original_numbers_and_survive_the_reference_layout(tmp_path: Path) -> None:
    """Heads, rows, heads: the last round starts from a model of uneven sizes, and says what is left of the first one."""
    model = made()
    once = prune_heads(model, HeadPruning(num_kept=9, scope="model"))
    twice = prune_rows(once, RowPruning(keep=0.5))
    thrice = prune_heads(twice, HeadPruning(num_kept=5, scope="model", score="data"), CALIBRATION)
    assert [len(heads) for heads in surviving_heads(once)] != [len(heads) for heads in surviving_heads(thrice)]
    for block, heads in enumerate(surviving_heads(thrice)):
        assert set(heads) < set(range(4))
        assert set(heads) <= set(surviving_heads(once)[block])
        rows = [4 * head + i for head in heads for i in range(4)]
        value = thrice.encoder.blocks[block].attention.value.weight
        assert torch.equal(value, model.encoder.blocks[block].attention.value.weight[rows])
    gone = [sorted(set(old) - set(new)) for old, new in zip(surviving_heads(once), surviving_heads(thrice), strict=True)]
    assert thrice.provenance[-1]["removed_heads"] == gone
    export_melhubert(thrice, tmp_path / "pruned.ckpt")
    assert surviving_heads(sslim.load_model(tmp_path / "pruned.ckpt")) == surviving_heads(thrice)


def test_an_imported_pruned_model_goes_on_with_its_own_numbers() -> None:
    model = sslim.load_model(ASSETS / "head_pruned_dd.ckpt")
    assert surviving_heads(model) == ((0, 1), (0, 3), (2, 3))
    small = prune_heads(model, HeadPruning(keep=0.5))
    pairs = zip(surviving_heads(model), surviving_heads(small), small.provenance[-1]["removed_heads"], strict=True)
    for before, after, removed in pairs:
        assert len(after) == 1
        assert {*after, *removed} == set(before)


def test_relative_positions_know_the_numbers_too() -> None:
    relative = RelativePositionsConfig(num_buckets=8, max_distance=10, num_heads=4)
    model = made(relative_positions=relative)
    small = prune_heads(prune_heads(model, HeadPruning(num_kept=3)), HeadPruning(num_kept=2))
    for block, heads in zip(small.config.encoder.blocks, surviving_heads(small), strict=True):
        assert (block.head_ids or (0, 1)) == heads
    assert any(block.head_ids for block in small.config.encoder.blocks)


@pytest.mark.parametrize("settings", [HeadPruning(keep=0.3), HeadPruning(num_kept=7, scope="model", score="data")])
def test_sizes_are_known_before(settings: HeadPruning) -> None:
    model = made()
    small = prune_heads(model, settings, CALIBRATION)
    expected = heads_config(model.config, settings)
    assert count_parameters(expected) == small.num_parameters() < model.num_parameters()
    if settings.scope == "layer":
        assert expected == small.config


def test_the_published_model_has_the_predicted_size() -> None:
    """12 of 144 heads: every layer keeps one, 11 * 4 * 64 * 769 - 11 * 64 parameters less each."""
    config = melhubert()
    small = heads_config(config, HeadPruning(num_kept=12, scope="model"))
    lost_in_a_layer = 11 * 64 * (3 * (768 + 1) + 768)
    assert count_parameters(config) - count_parameters(small) == 12 * lost_in_a_layer


def test_windows_that_tie_heads_together_are_refused() -> None:
    model = made()
    first, *rest = model.config.encoder.blocks
    tied = (replace(first, attention_window=2, window_rule="lighthubert"), *rest)
    model = made(blocks=tied)
    for pruned in (lambda s: prune_heads(model, s), lambda s: heads_config(model.config, s)):
        with pytest.raises(ValueError, match="block 0 has window_rule 'lighthubert', with which heads depend on one another"):
            pruned(HeadPruning(keep=0.5))
    assert prune_heads(model, HeadPruning(keep=1.0)).config == model.config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (HeadPruning(num_kept=5), "num_kept is 5, but the layer with most heads has 4 heads; expected 1 to 4"),
        (HeadPruning(num_kept=2, scope="model"), "num_kept is 2, but the model has 12 heads; expected 3 to 12"),
        (HeadPruning(num_kept=13, scope="model"), "num_kept is 13, but the model has 12 heads; expected 3 to 12"),
    ],
)
def test_numbers_that_the_model_cannot_keep_are_refused(settings: HeadPruning, message: str) -> None:
    model = made()
    for pruned in (lambda: prune_heads(model, settings), lambda: heads_config(model.config, settings)):
        with pytest.raises(ValueError, match=message):
            pruned()


def test_data_scores_need_data() -> None:
    with pytest.raises(ValueError, match="need calibration speech"):
        prune_heads(made(), HeadPruning(keep=1.0, score="data"))


def test_settings_are_plain_values_and_checked(tmp_path: Path) -> None:
    settings = HeadPruning(num_kept=7, scope="model", score="data", normalize=None)
    assert from_plain(HeadPruning, to_plain(settings)) == settings
    note = prune_heads(made(), HeadPruning(keep=0.5)).provenance[-1]
    assert note["step"] == "heads"
    assert (note["keep"], note["scope"], note["score"]) == (0.5, "layer", "l1")
    write_json(tmp_path / "note.json", note)
    for wrong in (0.5, float("nan")):
        with pytest.raises(ValueError, match="expected the p of a norm"):
            HeadPruning(keep=0.5, normalize=wrong)
    with pytest.raises(ValueError, match="expected one of them"):
        HeadPruning()
