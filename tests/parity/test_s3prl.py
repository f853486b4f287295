"""Mockingjay, TERA and AALBERT compute what S3PRL computed: stored outputs of small checkpoints (1e-5)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sslim
from sslim.batch import Padded, valid_mask
from sslim.checkpoints import read_pickle
from sslim.checkpoints.exporters import export_s3prl
from sslim.models.stacking import repeat_frames, repeat_output
from sslim.nn.positions import sinusoids

ASSETS = Path(__file__).parent / "assets" / "s3prl"
STORED = ["aalbert_fbank", "aalbert_fbank_new_format", "mockingjay_fbank", "tera_fmllr_new_format", "tera_prenorm"]
GOLDEN = [*STORED, "tera_fmllr"]
TOLERANCE = 1e-5
LENGTHS = torch.tensor([100, 70])


def stored(folder, name):
    return load_file(folder / f"{name.removesuffix('_new_format')}.safetensors"), sslim.load_model(folder / f"{name}.ckpt")


def differences(model, gold):
    """Largest difference of every stored state, of one utterance and of the padded batch of two, on valid frames."""
    found = []
    for prefix, count in (("single", 1), ("batch", 2)):
        features, lengths = gold["feat"][:count], LENGTHS[:count]
        with torch.inference_mode():
            output = model.encode_features(features, lengths)
        mask = gold["batch.attn_mask"].bool()[:count]
        assert output.lengths.tolist() == mask.sum(1).tolist()
        if model.config.encoder.norm_placement == "post":  # a pre-norm reference puts each state through a norm of its own
            states = [gold[f"{prefix}.hidden{index}"] for index in range(model.num_layers)]
            found += [(ours - theirs)[mask] for ours, theirs in zip(output.layers[1:], states, strict=True)]
        whole = repeat_output(output, model.config.projection.stack, lengths, centred=True)
        assert whole.lengths.tolist() == lengths.tolist()
        found.append((whole.final - gold[f"{prefix}.last"])[valid_mask(lengths, 100)])
        if prefix == "single":
            with torch.inference_mode():
                estimate = Padded(values=model.heads["reconstruction"](output.final), lengths=output.lengths)
            estimate = repeat_frames(estimate, model.config.projection.stack, lengths, centred=True)
            found.append(estimate.values - gold["single.reconstruction"])
    return max(difference.abs().max().item() for difference in found)


@pytest.mark.parametrize("name", STORED)
def test_stored_outputs(name):
    gold, model = stored(ASSETS, name)
    assert differences(model, gold) <= TOLERANCE
    with torch.no_grad():
        model.get_parameter("encoder.blocks.0.feedforward.down.bias")[0] += 1e-3
    assert differences(model, gold) > TOLERANCE


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_compute_the_same(name, shared_golden):
    gold, model = stored(shared_golden / "s3prl", name)
    assert differences(model, gold) <= TOLERANCE


def test_every_golden_file_is_in_the_list(shared_golden):
    assert sorted(path.stem for path in (shared_golden / "s3prl").glob("*.ckpt")) == sorted(GOLDEN)


@pytest.mark.parametrize("name", ["aalbert_fbank", "tera_fmllr"])
def test_stored_position_codes(name):
    gold = load_file(ASSETS / f"{name}.safetensors")["pos_enc"]
    torch.testing.assert_close(sinusoids(len(gold), gold.shape[1]), gold, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", STORED)
def test_an_export_computes_the_same_and_holds_the_same_tensors(name, tmp_path):
    gold, model = stored(ASSETS, name)
    export_s3prl(model, tmp_path / "exported.ckpt")
    assert differences(sslim.load_model(tmp_path / "exported.ckpt"), gold) <= TOLERANCE
    before, after = read_pickle(ASSETS / f"{name}.ckpt"), torch.load(tmp_path / "exported.ckpt", weights_only=True)
    for key in ("Transformer", "SpecHead"):
        for tensor_name, tensor in before[key].items():
            if "encoder.LayerNorm" not in tensor_name:  # norms of returned states, which pre-norm files alone have
                assert torch.equal(after[key][tensor_name], tensor)
