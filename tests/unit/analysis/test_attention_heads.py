"""Scores of heads on attention whose answers are known, ranks, ablation and phone relations."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sslim.analysis.ablation import ablate, counts_to_measure, distance_from_whole, heads_removed, random_orders
from sslim.analysis.attention import METRICS, attention_batches, head_scores, ordered, rank_heads, score_heads, uniform_scores
from sslim.analysis.phone_relations import RELATIONS, phone_relations, relation_masks
from sslim.data.alignment import frame_segments
from sslim.data.sources import Segment
from sslim.models import build_model
from sslim.models.elastic import slice_model
from sslim.models.encoding import Inputs, run_batch
from sslim.models.melhubert import melhubert
from sslim.nn.encoder import EncoderConfig
from sslim.nn.slicing import Units

SMALL = {"num_layers": 3, "dim": 24, "num_heads": 3, "feedforward_dim": 32, "conv_kernel_size": 8, "conv_groups": 4}


def made(encoder: dict | None = None, seed: int = 0):
    """A model over features alone, with layers that differ clearly."""
    config = melhubert(dropout=0.0, **SMALL)
    config = replace(config, frontend=None, heads={}, encoder=replace(config.encoder, **(encoder or {})))
    model = build_model(config, torch.Generator().manual_seed(seed))
    for parameter in model.encoder.blocks.parameters():
        parameter.data *= 4.0
    return model


def speech(lengths: tuple[int, ...], seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    dim = melhubert(**SMALL).projection.feature_dim
    values = [torch.randn(length, dim, generator=generator) for length in lengths]
    return Inputs(lengths=np.array(lengths), unit_s=0.02, read=values.__getitem__, is_waveform=False)


def known_weights(length: int, padded: int) -> torch.Tensor:
    """(1, 3, T, T): uniform, one key for all, the diagonal; rows of padding are junk."""
    weights = torch.full((1, 3, padded, padded), 7.0)
    weights[..., :length, :] = 0.0
    weights[0, 0, :length, :length] = 1 / length
    weights[0, 1, :length, 2] = 1.0
    weights[0, 2, :length, :length] = torch.eye(length)
    return weights


def test_uniform_stripe_and_diagonal_score_what_the_formulas_say():
    length = 20
    scores = {
        name: values[0].tolist() for name, values in head_scores(known_weights(length, 27), torch.tensor([length])).items()
    }
    stripe_distance = sum(abs(q - 2) for q in range(length)) / length
    assert scores["globalness"] == pytest.approx([math.log(length), 0.0, 0.0], abs=1e-5)
    assert scores["verticality"] == pytest.approx([-math.log(length), 0.0, -math.log(length)], abs=1e-5)
    distance = (length**2 - 1) / (3 * length)
    assert scores["mean_distance"] == pytest.approx([distance, stripe_distance, 0.0], abs=1e-5)
    assert scores["diagonality"] == pytest.approx([-distance / length, -stripe_distance / length, 0.0], abs=1e-6)
    assert {name: values[0] for name, values in scores.items()} == pytest.approx(uniform_scores([length]), abs=1e-5)
    _, categories = rank_heads({metric: scores[metric] for metric in METRICS})
    assert categories == ["global", "vertical", "diagonal"]


def test_equal_ranks_are_settled_by_how_far_a_head_stands_out():
    ranks, categories = rank_heads(
        {"globalness": [1.0, 0.9, 0.0], "verticality": [0.0, 0.0, -5.0], "diagonality": [9.0, 1.0, 0.0]}
    )
    assert [rank["globalness"] for rank in ranks] == [1, 2, 3]
    assert categories[0] == "diagonal"  # first in all three, farthest from the others there


def test_scores_do_not_depend_on_the_batch():
    model, inputs = made(), speech((31, 12, 50, 3, 22))
    together, alone = score_heads(model, inputs), score_heads(model, inputs, batch_s=0.01)
    for metric in METRICS:
        values = [[getattr(head, metric) for head in heads] for heads in (together, alone)]
        assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert len({round(head.globalness, 4) for head in together}) > 3  # the control: heads do differ


def test_a_shared_block_has_heads_at_every_depth():
    config = made().config.encoder
    model = made({"blocks": config.blocks[:1], "depth_map": (0, 0, 0)})
    heads = score_heads(model, speech((30, 40)))
    assert [head.place for head in heads] == [(layer, head) for layer in (1, 2, 3) for head in (1, 2, 3)]
    assert heads[0].globalness != pytest.approx(heads[3].globalness, abs=1e-6)
    inputs = speech((30,))
    whole = run_batch(model, [inputs.read(0)], is_waveform=False)
    with heads_removed(model, [(2, 1)]):
        changed = run_batch(model, [inputs.read(0)], is_waveform=False)
    assert torch.equal(whole.layers[1], changed.layers[1])  # the block's first application keeps its head
    assert not torch.allclose(whole.layers[2], changed.layers[2])
    assert torch.equal(run_batch(model, [inputs.read(0)], is_waveform=False).final, whole.final)  # and gets it back


def test_layers_without_attention_have_no_heads():
    blocks = list(made().config.encoder.blocks)
    blocks[1] = replace(blocks[1], num_heads=0)
    model = made({"blocks": tuple(blocks)})
    assert {head.layer for head in score_heads(model, speech((20,)))} == {1, 3}
    with pytest.raises(ValueError, match="no head 1 in layer 2: that layer has 0 heads"), heads_removed(model, [(2, 1)]):
        pass
    nothing = made({"blocks": tuple(replace(block, num_heads=0) for block in blocks)})
    with pytest.raises(ValueError, match="no layer of this model has attention"):
        next(attention_batches(nothing, speech((20,))))


def test_taking_heads_away_is_what_pruning_them_gives():
    model, inputs = made(), speech((25, 33))
    config: EncoderConfig = model.config.encoder
    cut = slice_model(model, Units.prefix(config, num_heads=[2, 3, 1], feedforward_dims=[32] * 3))
    values = [inputs.read(0), inputs.read(1)]
    with heads_removed(model, [(1, 3), (3, 2), (3, 3)]):
        masked = run_batch(model, values, is_waveform=False).final
    assert torch.allclose(masked, run_batch(cut, values, is_waveform=False).final, atol=1e-5)
    assert not torch.allclose(run_batch(model, values, is_waveform=False).final, masked, atol=1e-2)


def test_curves_begin_whole_and_all_end_without_heads():
    model, inputs = made(), speech((25, 33, 18))
    heads = score_heads(model, inputs)
    orders = {metric: ordered(heads, metric) for metric in METRICS} | random_orders([head.place for head in heads], 2, 0)
    assert orders["random 1"] != orders["random 2"]
    curves = ablate(model, orders, distance_from_whole(model, inputs), num_points=4)
    assert all(curve.removed == [0, 3, 6, 9] and curve.values[0] == 0.0 for curve in curves)
    assert len({curve.values[-1] for curve in curves}) == 1
    assert curves[0].values[-1] > 0.05
    assert len({curve.values[1] for curve in curves}) > 2  # the control: on the way orders differ
    assert counts_to_measure(5, 100) == [0, 1, 2, 3, 4, 5]


ALIGNMENT = (
    Segment(symbol="b", start_s=0.1, end_s=0.2),
    Segment(symbol="a", start_s=0.0, end_s=0.1),
    Segment(symbol="a", start_s=0.24, end_s=0.32),
)


def test_relations_tell_segments_of_one_phone_apart():
    segments_T = frame_segments(ALIGNMENT, 16, 0.02)
    own, before, after, same, other = relation_masks(segments_T, ALIGNMENT)
    assert own[0].nonzero()[0].tolist() == [0, 1, 2, 3, 4]
    assert after[0].nonzero()[0].tolist() == [5, 6, 7, 8, 9]
    assert same[0].nonzero()[0].tolist() == [12, 13, 14, 15]
    assert before[12].nonzero()[0].tolist() == [5, 6, 7, 8, 9]
    assert not other.any()
    gap = np.stack([own, before, after, same])[:, [10, 11]]
    assert not gap.any()  # frames between segments ask nothing


def test_uniform_attention_is_uniform_over_phones_and_a_diagonal_is_not(monkeypatch):
    def weights(kind: str):
        matrix = torch.full((16, 16), 1 / 16) if kind == "uniform" else torch.eye(16)
        part = matrix.expand(2, 3, 16, 16)
        monkeypatch.setattr(
            "sslim.analysis.phone_relations.attention_batches",
            lambda *_, **__: iter([([1, 0], (part, part, part), torch.tensor([16, 16]))]),
        )
        options = {"frame_shift_s": 0.02, "frame_length_s": 0.02}
        return phone_relations(made(), speech((16, 16)), [ALIGNMENT, ALIGNMENT[:2]], **options)

    flat, sharp = weights("uniform"), weights("diagonal")
    assert flat.phones == ["a", "b"]
    assert all(head.divergence == pytest.approx(0.0, abs=1e-6) for head in flat.heads)
    assert flat.log_ratio() == pytest.approx(np.zeros((2, 2)), abs=1e-5)
    assert flat.heads[0].relations == pytest.approx(flat.uniform, abs=1e-6)
    assert sum(flat.uniform.values()) == pytest.approx(1.0)
    assert sharp.heads[0].relations == pytest.approx(dict.fromkeys(RELATIONS, 0.0) | {"own segment": 1.0})
    assert sharp.maps_HCC[0, 0, 1] == 0.0 < sharp.maps_HCC[0, 0, 0]
    assert sharp.heads[0].divergence > 0.5


def test_alignments_of_other_recordings_are_said_to_be_so():
    late = [Segment(symbol="a", start_s=50.0, end_s=51.0)]
    with pytest.raises(ValueError, match="no frame of the utterances lies in a segment"):
        phone_relations(made(), speech((16,)), [late], frame_shift_s=0.02, frame_length_s=0.02)
