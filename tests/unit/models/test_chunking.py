"""Long inputs in chunks, as S3PRL encodes them, against encoding the pieces of ``torch.chunk`` one by one."""

import math
from dataclasses import replace

import pytest
import torch

from sslim.models import SpeechModel, build_model
from sslim.models.chunking import ChunkingConfig, chunk_spans
from sslim.models.reconstruction import tera


def model_with(compat=None, max_frames=50, **options):
    sizes = {"num_layers": 2, "dim": 16, "num_heads": 2, "feedforward_dim": 24}
    config = tera(feature_dim=5, **sizes, **options)
    model = build_model(config, torch.Generator().manual_seed(0))
    twin = SpeechModel(replace(config, chunking=ChunkingConfig(max_frames=max_frames, compat=compat))).eval()
    twin.load_state_dict(model.state_dict())
    return model, twin


@pytest.mark.parametrize("num_frames", [0, 1, 49, 50, 51, 99, 100, 101, 120, 149, 1501])
def test_spans_are_torchs_chunks(num_frames):
    pieces = torch.arange(num_frames).chunk(max(1, math.ceil(num_frames / 50)))
    spans = [(int(piece[0]), int(piece[-1]) + 1) for piece in pieces if len(piece)] or [(0, 0)]
    assert chunk_spans(num_frames, 50) == spans


@pytest.mark.parametrize("norm_placement", ["post", "pre"])
def test_chunks_know_nothing_of_each_other(norm_placement):
    model, twin = model_with("reference", norm_placement=norm_placement)
    features, lengths = torch.randn(3, 120, 5), torch.tensor([120, 70, 30])
    with torch.no_grad():
        output = twin.encode_features(features, lengths)
        whole = model.encode_features(features, lengths)
        pieces = [model.encode_features(piece) for piece in features[:1].chunk(3, dim=1)]
        second = model.encode_features(features[1:2, 40:70])
    assert output.lengths.tolist() == lengths.tolist()
    for index in range(3):
        expected = torch.cat([piece.layers[index] for piece in pieces], dim=1)
        torch.testing.assert_close(output.layers[index][:1], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.final[1:2, 40:70], second.final, rtol=0, atol=1e-5)
    assert not output.final[1, 70:].any()
    assert not output.final[2, 30:].any()
    assert torch.equal(output.final, output.layers[-1]) == (norm_placement == "post")
    assert (output.final[0] - whole.final[0]).abs().mean() > 0.1  # the control


def test_short_inputs_and_models_without_compat_are_encoded_whole():
    model, twin = model_with("reference")
    features, lengths = torch.randn(2, 50, 5), torch.tensor([50, 30])
    with torch.no_grad():
        torch.testing.assert_close(
            twin.encode_features(features, lengths).final, model.encode_features(features, lengths).final
        )
        _, plain = model_with(None)
        long = torch.randn(1, 120, 5)
        assert torch.equal(plain.encode_features(long).final, model.encode_features(long).final)


def test_attention_is_zero_between_chunks():
    model, twin = model_with("reference")
    features = torch.randn(1, 60, 5)
    with torch.no_grad():
        output = twin.encode_features(features, need_weights=True)
        first = model.encode_features(features[:, :30], need_weights=True)
    assert len(output.attentions) == 2
    assert output.attentions[0].shape == (1, 2, 60, 60)
    assert not output.attentions[0][..., :30, 30:].any()
    torch.testing.assert_close(output.attentions[1][..., :30, :30], first.attentions[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(1, 2, 60))


def test_nothing_is_no_limit():
    with pytest.raises(ValueError, match="max_frames is 0"):
        ChunkingConfig(max_frames=0)
