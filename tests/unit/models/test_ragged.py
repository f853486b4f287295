"""Batches of unequal rows run in groups on the CPU."""

from dataclasses import replace

import pytest
import torch

from sslim.frontends import HUBERT_CONV_LAYERS
from sslim.models import SpeechModel, build_model
from sslim.models.hubert import hubert
from sslim.models.melhubert import melhubert
from sslim.models.ragged import length_groups


def test_groups_hold_rows_of_similar_length_and_every_row_once() -> None:
    lengths = [100, 13, 95, 50, 91, 47, 12, 89]
    groups = length_groups(lengths)
    assert groups == [[0, 2, 4], [7], [3, 5], [1, 6]]
    assert sorted(row for group in groups for row in group) == list(range(8))


def small(pre_norm: bool) -> SpeechModel:
    config = melhubert(num_layers=2, dim=16, num_heads=2, feedforward_dim=32, conv_kernel_size=8, conv_groups=2, dropout=0.0)
    if pre_norm:
        encoder = replace(config.encoder, norm_placement="pre", input_norm=False, final_norm=True)
        config = replace(config, encoder=encoder)
    model = build_model(config, torch.Generator().manual_seed(0))
    model.set_statistics(torch.zeros(40), torch.ones(40), source="test")
    return model


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("keep_layers", [False, True])
def test_groups_give_what_one_padded_batch_gives(pre_norm: bool, keep_layers: bool) -> None:
    model = small(pre_norm)
    features, lengths_B = torch.randn(4, 60, 80, generator=torch.Generator().manual_seed(1)), torch.tensor([60, 22, 57, 3])
    padded = model.encode_features(features, lengths_B, keep_layers=keep_layers)  # gradients are on: one batch
    assert padded.final.requires_grad
    with torch.no_grad():
        grouped = model.encode_features(features, lengths_B, keep_layers=keep_layers)
    assert grouped.lengths.tolist() == lengths_B.tolist()
    assert len(grouped.layers) == len(padded.layers)
    for ours, whole in zip(
        [grouped.final, grouped.embed, *grouped.layers], [padded.final, padded.embed, *padded.layers], strict=True
    ):
        torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)
    if keep_layers:
        assert torch.equal(grouped.final, grouped.layers[-1]) != pre_norm


def test_waveforms_in_groups_equal_waveforms_alone() -> None:
    model = build_model(
        hubert(
            num_layers=2,
            dim=16,
            num_heads=2,
            feedforward_dim=32,
            conv_layers=tuple(replace(layer, channels=8) for layer in HUBERT_CONV_LAYERS),
            conv_kernel_size=8,
            conv_groups=2,
        ),
        torch.Generator().manual_seed(0),
    )
    waveform_BS, lengths_B = 0.1 * torch.randn(3, 8000), torch.tensor([3000, 8000, 401])
    with torch.no_grad():
        together = model.encode(waveform_BS, lengths_B)
        assert together.final.shape[1] == 24
        for row, length in enumerate(lengths_B.tolist()):
            alone = model.encode(waveform_BS[row : row + 1, :length])
            assert torch.equal(together.final[row, : alone.final.shape[1]], alone.final[0])
            assert not together.final[row, alone.final.shape[1] :].any()
