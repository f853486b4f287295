"""Width pruning: heads and units by scores of one and the same model, in one cut with one note."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sslim.batch import Padded
from sslim.compress.calibration import Calibration
from sslim.compress.heads import HeadPruning, prune_heads
from sslim.compress.rows import RowPruning, prune_rows
from sslim.compress.width import WidthPruning, prune_width, width_kept
from sslim.models import SpeechModel, build_model
from sslim.models.elastic import slice_model_config
from sslim.models.melhubert import melhubert


def model() -> SpeechModel:
    config = melhubert(num_layers=3, dim=32, num_heads=4, feedforward_dim=48, conv_kernel_size=8, conv_groups=4)
    made = build_model(config, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made


def calibration() -> Calibration:
    generator = torch.Generator().manual_seed(5)
    values, target = torch.randn(2, 15, 80, generator=generator), torch.randn(2, 15, 32, generator=generator)
    batch = Padded(values=values, lengths=torch.tensor([15, 15]))
    return Calibration(features=(batch,), losses=(lambda m: (m.encode_features(values).final - target).square().mean(),))


@pytest.mark.parametrize("score", ["l1", "data"])
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_both_are_scored_on_the_model_as_it_comes(score: str, scope: str) -> None:
    whole, speech = model(), calibration()
    rows_scope = "uniform" if scope == "layer" else "model"
    heads = prune_heads(whole, HeadPruning(keep=0.5, scope=scope, score=score), speech)  # type: ignore[arg-type]
    rows = prune_rows(whole, RowPruning(keep=0.5, scope=rows_scope, score=score), speech)  # type: ignore[arg-type]
    both = prune_width(whole, WidthPruning(keep=0.5, scope=scope, score=score), speech)  # type: ignore[arg-type]
    note = both.provenance[-1]
    assert note["kept_heads"] == heads.provenance[-1]["kept_heads"]
    assert note["removed_heads"] == heads.provenance[-1]["removed_heads"]
    assert note["kept_units"] == rows.provenance[-1]["kept_units"]
    assert [entry["step"] for entry in both.provenance] == ["width"]
    one_by_one = prune_rows(heads, RowPruning(keep=0.5, scope=rows_scope, score=score), speech)  # type: ignore[arg-type]
    assert (one_by_one.provenance[-1]["kept_units"] == note["kept_units"]) is (score == "l1")  # the control: order matters


def test_heads_may_have_a_share_of_their_own() -> None:
    small = prune_width(model(), WidthPruning(keep=0.25, keep_heads=0.75))
    assert [(block.num_heads, block.feedforward_dim) for block in small.config.encoder.blocks] == [(3, 12)] * 3
    with pytest.raises(ValueError, match=r"keep is 1\.5"):
        WidthPruning(keep=0.5, keep_heads=1.5)


def test_any_share_is_known_beforehand() -> None:
    whole, settings = model(), WidthPruning(keep=1.0, scope="model")
    kept = width_kept(whole, settings)
    for keep in (0.1, 0.4, 0.8, 1.0):
        small = prune_width(whole, replace(settings, keep=keep))
        assert slice_model_config(whole.config, kept(keep)).encoder == small.config.encoder


def test_heads_may_be_given_beside_the_units() -> None:
    whole = model()
    kept = width_kept(whole, WidthPruning(keep=1.0))
    for keep, heads in ((0.3, 0.8), (0.8, 0.3)):
        small = prune_width(whole, WidthPruning(keep=keep, keep_heads=heads))
        assert slice_model_config(whole.config, kept(keep, heads)).encoder == small.config.encoder
        assert slice_model_config(whole.config, kept(keep)).encoder != small.config.encoder
