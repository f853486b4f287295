"""LightHuBERT subnets compute what the reference computed: 2e-5 on valid frames, padded batches with ``compat="reference"``."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sslim
from sslim.models.elastic import extract_model
from sslim.models.lighthubert import reference_parameter_count

ASSETS = Path(__file__).parent / "assets" / "lighthubert"
GOLDEN = ["supernet_default", "supernet_layer_norm"]
TOLERANCE = 2e-5
WINDOWED = 3  # the subnet with sliding windows


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The golden supernet with only what its second subnet uses (zero elsewhere), that subnet and its outputs."""
    arrays = np.load(ASSETS / "supernet_default_subnet1.npz")
    described = json.loads((ASSETS / "supernet_default_subnet1.json").read_text())
    groups = {"model": {}, "gold": {}}
    for key, array in arrays.items():
        group, name = key.split("/", 1)
        groups[group][name] = torch.from_numpy(array)
    path = tmp_path_factory.mktemp("lighthubert") / "supernet.pt"
    torch.save({"cfg": described["cfg"], "model": groups["model"]}, path)
    return path, described, groups["gold"]


def differences(model, gold, prefix):
    """Largest difference of embed, every layer and the final output."""
    valid = ~gold[f"{prefix}.padding_mask"]
    lengths = torch.tensor([8000, 11123][: len(valid)])
    with torch.inference_mode():
        output = model.encode(gold[f"{prefix}.wav"], lengths)
    assert output.lengths.tolist() == valid.sum(1).tolist()
    assert f"{prefix}.hidden{model.num_layers + 1}" not in gold
    states = [output.embed, *output.layers[1:]]
    pairs = [(state, gold[f"{prefix}.hidden{index}"]) for index, state in enumerate(states)]
    return max(float((got - want).abs()[valid].max()) for got, want in [*pairs, (output.final, gold[f"{prefix}.last"])])


def test_stored_subnet_computes_the_same(stored):
    path, described, gold = stored
    model = sslim.load_model(path, subnet=described["subnet"])
    assert differences(model, gold, "subnet1.single") <= TOLERANCE
    assert (
        differences(sslim.load_model(path, subnet=described["subnet"], compat="reference"), gold, "subnet1.batch") <= TOLERANCE
    )
    assert model.num_layers == 10
    assert model.config.search_space is None
    whole = sslim.load_model(path, subnet="whole")
    assert reference_parameter_count(whole.config, described["subnet"]) == described["params"]


def test_other_units_or_layers_would_be_noticed(stored):
    """The controls: first feed-forward units instead of LightHuBERT's, the first ten layers instead of those it keeps."""
    path, described, gold = stored
    whole = sslim.load_model(path, subnet="whole")
    for change in ({"feedforward_rule": "prefix"}, {"kept_layers": None}):
        space = replace(whole.config.search_space, **change)
        whole.config = replace(whole.config, search_space=space)
        assert differences(extract_model(whole, described["subnet"]).eval(), gold, "subnet1.single") > 1e-3
        whole = sslim.load_model(path, subnet="whole")


def test_padded_batches_differ_without_compat(stored):
    path, described, gold = stored
    with torch.inference_mode():
        waveform, lengths = gold["subnet1.batch.wav"], torch.tensor([8000, 11123])
        ours = sslim.load_model(path, subnet=described["subnet"]).encode(waveform, lengths)
    assert ours.lengths.tolist() == [24, 34]  # the reference counts 25 in the first
    valid = ~gold["subnet1.batch.padding_mask"]
    valid[0, 24] = False
    assert (ours.final - gold["subnet1.batch.last"]).abs()[valid].max() > 1e-2


def misread_scores(model):
    """Makes the layers with windows compute their scores as the reference does when T is a multiple of the window.

    Its strided attention reads queries and keys, laid out (frame, head, channel), as if they were (head, frame, channel), so
    scores pair frames and heads at random; values and windows are right. Only its left-padding, for other T, makes the copy
    that would avoid it. No release uses windows; sslim does not reproduce this.
    """

    def misread(_module, _inputs, output_BTA):
        assert len(output_BTA) == 1
        return output_BTA.view(-1, output_BTA.shape[1], 64).transpose(0, 1).reshape(output_BTA.shape)

    for block, config in zip(model.encoder.blocks, model.config.encoder.blocks, strict=True):
        if config.attention_window is not None:
            block.attention.query.register_forward_hook(misread)
            block.attention.key.register_forward_hook(misread)
    return model


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_supernets_compute_the_same(name, shared_golden):
    folder = shared_golden / "lighthubert"
    gold, subnets = load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())
    whole = sslim.load_model(folder / f"{name}.pt", subnet="whole")
    for index, entry in enumerate(subnets):
        assert reference_parameter_count(whole.config, entry["subnet"]) == entry["params"]
        model = sslim.load_model(folder / f"{name}.pt", subnet=entry["subnet"])
        single = differences(model, gold, f"subnet{index}.single")
        if index == WINDOWED:
            assert 1e-4 < single < 1e-2
            assert differences(misread_scores(model), gold, f"subnet{index}.single") <= TOLERANCE
            continue
        assert single <= TOLERANCE
        reference = sslim.load_model(folder / f"{name}.pt", subnet=entry["subnet"], compat="reference")
        assert differences(reference, gold, f"subnet{index}.batch") <= TOLERANCE


def test_every_golden_file_is_in_the_list(shared_golden):
    assert sorted(path.stem for path in (shared_golden / "lighthubert").glob("*.pt")) == GOLDEN
