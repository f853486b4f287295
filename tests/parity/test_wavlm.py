"""WavLM folders of transformers compute what transformers computes: 2e-5 on real frames, alone and in a padded batch."""

import json

import pytest
import torch
from transformers import WavLMConfig, WavLMModel

import sslim
from sslim.checkpoints import CheckpointError
from sslim.nn.relative_positions import distance_buckets

TOLERANCE = 2e-5
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_buckets": 12,
    "max_bucket_distance": 20,
}
VARIANTS = {
    "base": {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False},
    "large": {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    torch.manual_seed(11)
    theirs = WavLMModel(WavLMConfig(**SIZES, **VARIANTS[request.param])).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "rel_attn_embed" in name or "gru_rel_pos" in name:
                parameter.normal_(0.0, 1.0)
            elif "attention" in name:
                parameter.mul_(4.0)
    folder = tmp_path_factory.mktemp(f"wavlm_{request.param}")
    theirs.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "sampling_rate": 16000}))
    return theirs, folder


def waveforms():
    return torch.randn(2, 16000, generator=torch.Generator().manual_seed(5)) * 0.2


def test_alone(pair):
    theirs, folder = pair
    ours = sslim.load_model(folder)
    wave = waveforms()[:1]
    with torch.inference_mode():
        want, got = theirs(wave, output_hidden_states=True), ours.encode(wave)
    for mine, hidden in zip(got.layers[:-1], want.hidden_states[:-1], strict=True):
        torch.testing.assert_close(mine, hidden, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(got.final, want.last_hidden_state, atol=TOLERANCE, rtol=0)
    assert ours.config.family == "wavlm"
    assert ours.num_parameters() == theirs.num_parameters()


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")  # theirs
def test_padded(pair):
    theirs, folder = pair
    ours = sslim.load_model(folder, compat="reference")
    wave, lengths = waveforms(), torch.tensor([16000, 9000])
    valid = torch.arange(16000)[None] < lengths[:, None]
    with torch.inference_mode():
        want = theirs(wave * valid, attention_mask=valid.long()).last_hidden_state
        got = ours.encode(wave, lengths)
    for row, length in enumerate(got.lengths.tolist()):
        torch.testing.assert_close(got.final[row, :length], want[row, :length], atol=TOLERANCE, rtol=0)
    assert got.lengths.tolist() == [49, 27]


def test_the_bias_matters(pair):
    """The control: without its relative positions the model computes something else."""
    theirs, folder = pair
    ours = sslim.load_model(folder)
    with torch.no_grad():
        ours.encoder.relative_positions.table.zero_()
        difference = ours.encode(waveforms()).final - theirs(waveforms()).last_hidden_state
    assert difference.abs().max() > 1e-2


def test_buckets_equal_theirs(pair):
    theirs, _ = pair
    distance = torch.arange(-900, 901)
    attention = theirs.encoder.layers[0].attention
    for attention.num_buckets, attention.max_distance in ((12, 20), (320, 800)):
        want = attention._relative_positions_bucket(distance)
        assert torch.equal(distance_buckets(distance, attention.num_buckets, attention.max_distance), want)
    attention.num_buckets, attention.max_distance = 12, 20


def test_buckets_that_cannot_be_are_one_sentence(pair, tmp_path):
    _, folder = pair
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_buckets": 7}))
    with pytest.raises(CheckpointError, match="num_buckets is 7, expected an even number"):
        sslim.load_model(tmp_path)
