"""Vectors of a model's layers: the same whatever the batch, from features or audio, in one piece or several."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sslim.batch import Padded
from sslim.models import PRESETS, build_model, with_head
from sslim.nn.heads import ClusterHeadConfig
from sslim.targets import make_vectors, model_digest


def everything(vectors) -> dict[int, torch.Tensor]:
    batches = vectors.batches(np.arange(len(vectors.corpus)))
    found = {i: x for batch in batches for i, x in zip(batch, vectors.read(batch), strict=True)}
    assert sorted(found) == list(range(len(vectors.corpus)))
    return found


def alone(corpus, model, i: int, layer: int) -> torch.Tensor:
    base = torch.from_numpy(corpus.features(i).astype(np.float32))[None]
    features = model.frontend.finish(Padded(values=base, lengths=torch.tensor([base.shape[1]])))
    with torch.no_grad():
        return model.encode_features(features.values).layers[layer][0]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_is_what_the_model_gives_each_utterance_alone(corpus, model, layer):
    vectors = make_vectors(corpus, model, layer)
    assert len(vectors.batches(np.arange(len(corpus)))) < len(corpus)  # they are batched
    for i, x in everything(vectors).items():
        assert len(x) == vectors.num_frames[i]
        torch.testing.assert_close(x, alone(corpus, model, i, layer), atol=1e-5, rtol=0)
    difference = (vectors.read([0])[0] - alone(corpus, model, 0, (layer + 1) % 3)).abs().max()
    assert difference > 1e-2  # the control: another layer


def test_audio_gives_what_stored_features_give(corpus, waveforms, model):
    stored, computed = (everything(make_vectors(c, model, 2)) for c in (corpus, waveforms))
    for i, x in stored.items():
        assert x.shape == computed[i].shape
        assert float((x - computed[i]).abs().mean()) < 1e-2  # what is stored was rounded to float16


def test_long_utterances_go_in_pieces(corpus, model, monkeypatch):
    whole = everything(make_vectors(corpus, model, 2))
    monkeypatch.setattr("sslim.targets.vectors.MAX_PIECE_S", 0.3)
    vectors = make_vectors(corpus, model, 2)
    assert (vectors.num_frames > 15).any()
    assert (vectors.num_frames <= 15).sum() < len(corpus)
    longest = int(vectors.num_frames.argmax())
    pieces = everything(vectors)
    assert {i: len(x) for i, x in pieces.items()} == {i: len(x) for i, x in whole.items()}
    base = torch.from_numpy(corpus.features(longest).astype(np.float32))[None]
    features = model.frontend.finish(Padded(values=base, lengths=torch.tensor([base.shape[1]]))).values
    number = -(-features.shape[1] // 15)
    with torch.no_grad():
        expected = torch.cat([model.encode_features(part).layers[2][0] for part in features.tensor_split(number, dim=1)])
    torch.testing.assert_close(pieces[longest], expected, atol=1e-5, rtol=0)
    assert float((pieces[longest] - whole[longest]).abs().max()) > 1e-3  # the control: they do lack context


def test_the_digest_is_of_what_layers_depend_on(model):
    before = model_digest(model)
    other_head = with_head(model, "masked_prediction", ClusterHeadConfig(num_clusters=7))
    assert model_digest(other_head) == before
    model.frontend.mean[0] += 1e-3
    assert model_digest(model) != before


def test_layers_and_periods_that_are_not_there(corpus, waveforms, model):
    with pytest.raises(ValueError, match="layer is 3; this model has layers 1 to 2"):
        make_vectors(corpus, model, 3)
    with pytest.raises(ValueError, match="every 20 ms, so its layers cannot be clustered every 10 ms"):
        make_vectors(corpus, model, 1, frame_period_s=0.01)
    with pytest.raises(ValueError, match="a layer, but no model"):
        make_vectors(corpus, None, 1)
    bare = build_model(PRESETS["melhubert-tiny"](), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="libri-960"):
        make_vectors(corpus, bare, 1)


def test_a_non_finite_value_names_the_utterance(corpus, model):
    with torch.no_grad():
        next(model.projection.parameters())[0] = torch.nan
    with pytest.raises(ValueError, match="utterance u03 gives a non-finite value"):
        make_vectors(corpus, model, 1).read([3])
