"""One body over every foreign format: every tensor is used exactly once, nothing is executed, native files hold it all."""

import re
from pathlib import Path

import pytest
import torch

import sslim
from sslim.checkpoints import IMPORTERS, CheckpointError, read_pickle

ASSETS = Path(__file__).parents[1] / "parity" / "assets"
EXAMPLES = {  # importer -> (example files, the key their weights are under)
    "MelHuBERT": (
        [
            ("melhubert/melhubert_10ms.ckpt", "model"),
            ("melhubert_legacy/weight_pruned.ckpt", "model"),
            ("melhubert_legacy/head_pruned_dd.ckpt", "model"),
            ("melhubert_legacy/row_pruned.ckpt", "model"),
            ("melhubert_legacy/distilled.ckpt", "model"),
            ("melhubert_legacy/synth_standalone_2022_07_Model_key.ckpt", "Model"),
            ("melhubert_legacy/synth_s3prl_2022_weightpruned_floatmask_nobias.ckpt", "model"),
        ]
    ),
    "S3PRL": [
        ("s3prl/aalbert_fbank.ckpt", "Transformer"),
        ("s3prl/mockingjay_fbank.ckpt", "Transformer"),
        ("s3prl/tera_fmllr_new_format.ckpt", "Transformer"),
        ("s3prl/tera_fmllr_new_format.ckpt", "SpecHead"),
        ("s3prl/tera_prenorm.ckpt", "Transformer"),
    ],
    "APC, VQ-APC, NPC": [("predictive/vq_apc.ckpt", "model"), ("predictive/npc.ckpt", "model")],
    "HuBERT": [("hubert/base_fairseq.pt", "model"), ("hubert/large_s3prl_converted.pt", "model_weight")],
    "DPHuBERT": [("dphubert/dphubert.pth", "state_dict"), ("dphubert/dpwavlm.pth", "state_dict")],
    "LightHuBERT": [("lighthubert/synthetic.pt", "model")],
    "DistilHuBERT": [("distilhubert/synthetic.ckpt", "Distiller"), ("distilhubert/synthetic_one_task.ckpt", "Distiller")],
    "DistilALHuBERT": [
        ("distilalhubert/postnorm_2x6.ckpt", "alhubert"),
        ("distilalhubert/prenorm_2x2_layernorm.ckpt", "alhubert"),
    ],
}
OPTIONS = {"lighthubert/synthetic.pt": {"subnet": "whole"}}  # too small for the subnets of its space
CASES = [(importer, *example) for importer in IMPORTERS for example in EXAMPLES[importer.name]]


def random_input(model):
    width = model.config.projection.feature_dim
    return torch.randn(2, 20, width, generator=torch.Generator().manual_seed(0)), torch.tensor([20, 13])


def write(contents, path):
    """Writes plain contents with the optimiser and every placeholder left out."""
    plain = {key: value for key, value in contents.items() if key not in ("Args", "Optimizer", "RandomState")}
    torch.save(plain, path)
    return path


def test_every_importer_has_examples():
    assert set(EXAMPLES) == {importer.name for importer in IMPORTERS}


@pytest.mark.parametrize(("importer", "file", "key"), CASES)
def test_exactly_one_importer_recognises_it(importer, file, key):
    contents = read_pickle(ASSETS / file)
    assert [other.name for other in IMPORTERS if other.recognises(contents)] == [importer.name]
    for foreign in ({}, [], None, "text", {"model": {}}, {key: {}}, 3):
        assert not importer.recognises(foreign)


@pytest.mark.parametrize(("importer", "file", "key"), CASES)
def test_every_tensor_is_needed_and_none_is_ignored(importer, file, key, tmp_path):
    contents, options = read_pickle(ASSETS / file), OPTIONS.get(file, {})
    for number, name in enumerate(contents[key]):
        if number % 23 and re.match(r"encoder\.layers?\.[1-9]", name):
            continue  # the same names in every layer; a few of them will do
        weights = {other: tensor for other, tensor in contents[key].items() if other != name}
        with pytest.raises(CheckpointError):
            sslim.load_model(write({**contents, key: weights}, tmp_path / "lacking.ckpt"), **options)
    extra = {**contents[key], "encoder.layers.0.extra.weight": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"extra\.weight"):
        sslim.load_model(write({**contents, key: extra}, tmp_path / "extra.ckpt"), **options)
    sslim.load_model(write(contents, tmp_path / "whole.ckpt"), **options)  # the control: it is not the rewriting that fails


@pytest.mark.parametrize(("importer", "file", "key"), CASES)
def test_native_round_trip_is_exact(importer, file, key, tmp_path):
    model = sslim.load_model(ASSETS / file, **OPTIONS.get(file, {}))
    sslim.save_model(model, tmp_path / "model")
    again = sslim.load_model(tmp_path / "model", **OPTIONS.get(file, {}))
    features, lengths = random_input(model)
    with torch.inference_mode():
        assert torch.equal(model.encode_features(features, lengths).final, again.encode_features(features, lengths).final)
    assert again.config == model.config
    assert again.provenance == model.provenance
    assert again.provenance[0]["format"] == importer.name


@pytest.mark.parametrize(("importer", "file", "key"), CASES)
def test_it_does_not_hold_on_to_the_file(importer, file, key, tmp_path):
    path = tmp_path / "copy.ckpt"
    path.write_bytes((ASSETS / file).read_bytes())
    model = sslim.load_model(path, **OPTIONS.get(file, {}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path.write_bytes(bytes(path.stat().st_size))  # same length, all zeros: a mapped tensor would change
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in model.parameters())


@pytest.mark.parametrize(("importer", "file", "key"), CASES)
def test_no_random_number_is_drawn(importer, file, key):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    sslim.load_model(ASSETS / file, **OPTIONS.get(file, {}))
    assert torch.equal(before, torch.get_rng_state())
