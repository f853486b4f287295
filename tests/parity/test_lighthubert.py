"""LightHuBERT subnets compute what the reference computed: 2e-5 on valid frames, padded batches with ``compat="reference"``.

One golden subnet has sliding windows. Its utterance alone is held to the same tolerance. In its padded batch the reference
masks every row as the first, and makes NaN of windows of nothing but padding; there the states up to the first windowed layer
are compared, where the wrong mask does not reach.
"""

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
SAMPLES = [8000, 11123]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The golden supernet with only what two of its subnets use (zero elsewhere), these subnets and their outputs."""
    arrays = np.load(ASSETS / "supernet_default_subnets.npz")
    described = json.loads((ASSETS / "supernet_default_subnets.json").read_text())
    groups = {"model": {}, "gold": {}}
    for key, array in arrays.items():
        group, name = key.split("/", 1)
        groups[group][name] = torch.from_numpy(array)
    path = tmp_path_factory.mktemp("lighthubert") / "supernet.pt"
    torch.save({"cfg": described["cfg"], "model": groups["model"]}, path)
    return path, described["subnets"], groups["gold"]


def encoded(model, gold, prefix):
    """Our states, as the reference numbers them, and which frames it calls valid; both agree on how many these are."""
    valid = ~gold[f"{prefix}.padding_mask"]
    with torch.inference_mode():
        output = model.encode(gold[f"{prefix}.wav"], torch.tensor(SAMPLES[: len(valid)]))
    assert output.lengths.tolist() == valid.sum(1).tolist()
    return [output.embed, *output.layers[1:]], output.final, valid


def differences(model, gold, prefix):
    """Largest difference of embed, every layer and the final output."""
    states, final, valid = encoded(model, gold, prefix)
    assert f"{prefix}.hidden{model.num_layers + 1}" not in gold
    pairs = [(state, gold[f"{prefix}.hidden{index}"]) for index, state in enumerate(states)]
    return max(float((got - want).abs()[valid].max()) for got, want in [*pairs, (final, gold[f"{prefix}.last"])])


def is_windowed(subnet):
    return any(size != "global" for size in subnet["slide_wsz"])


def exact_band(subnet):
    """The same sizes and windows, read as exact bands: half of ``slide_wsz`` on each side."""
    return {
        "dim": subnet["embed_dim"],
        "num_heads": subnet["heads_num"],
        "feedforward_dims": subnet["ffn_embed"],
        "windows": [None if size == "global" else size // 2 for size in subnet["slide_wsz"]],
    }


def check(path, entry, gold, name):
    """One subnet of a file: its size, its utterance alone, its padded batch."""
    subnet, whole = entry["subnet"], sslim.load_model(path, subnet="whole")
    assert reference_parameter_count(whole.config, subnet) == entry["params"]
    model, reference = (sslim.load_model(path, subnet=subnet, compat=compat) for compat in (None, "reference"))
    assert differences(model, gold, f"{name}.single") <= TOLERANCE
    if not is_windowed(subnet):
        assert differences(reference, gold, f"{name}.batch") <= TOLERANCE
        return
    band = sslim.load_model(path, subnet=exact_band(subnet))  # the control
    assert 1e-4 < differences(band, gold, f"{name}.single") < 1e-2
    first = next(layer for layer, size in enumerate(subnet["slide_wsz"], 1) if size != "global")
    reach = subnet["slide_wsz"][first - 1] // 2
    states, _, valid = encoded(reference, gold, f"{name}.batch")
    padded, full = valid.sum(1).tolist()
    comparable = {0: padded, 1: padded - reach}  # the full row is masked as the padded one is: what no window of it reaches
    for index in range(first + 1):
        want = gold[f"{name}.batch.hidden{index}"]
        for row, length in comparable.items():
            assert (states[index][row] - want[row])[:length].abs().max() <= TOLERANCE
    assert want[1, padded + reach : full].isnan().all()  # windows of nothing but what is masked
    assert all(state.isfinite().all() for state in states)


@pytest.mark.parametrize("name", ["subnet1", "subnet3"])
def test_stored_subnets_compute_the_same(name, stored):
    path, subnets, gold = stored
    check(path, subnets[name], gold, name)
    model = sslim.load_model(path, subnet=subnets[name]["subnet"])
    assert (model.num_layers, model.config.encoder.dim) == (subnets[name]["subnet"]["layer_num"], 64)
    assert model.config.search_space is None
    assert is_windowed(subnets[name]["subnet"]) == (name == "subnet3")


def test_other_units_or_layers_would_be_noticed(stored):
    """The controls: first feed-forward units instead of LightHuBERT's, the first ten layers instead of those it keeps."""
    path, subnets, gold = stored
    subnet, whole = subnets["subnet1"]["subnet"], sslim.load_model(path, subnet="whole")
    space = whole.config.search_space
    for change in ({"feedforward_rule": "prefix"}, {"kept_layers": None}, {}):
        whole.config = replace(whole.config, search_space=replace(space, **change))
        difference = differences(extract_model(whole, subnet).eval(), gold, "subnet1.single")
        assert difference > 1e-3 if change else difference <= TOLERANCE


def test_padded_batches_differ_without_compat(stored):
    path, subnets, gold = stored
    with torch.inference_mode():
        ours = sslim.load_model(path, subnet=subnets["subnet1"]["subnet"]).encode(
            gold["subnet1.batch.wav"], torch.tensor(SAMPLES)
        )
    assert ours.lengths.tolist() == [24, 34]  # the reference counts 25 in the first
    valid = ~gold["subnet1.batch.padding_mask"]
    valid[0, 24] = False
    assert (ours.final - gold["subnet1.batch.last"]).abs()[valid].max() > 1e-2


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_supernets_compute_the_same(name, shared_golden):
    folder = shared_golden / "lighthubert"
    gold, subnets = load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())
    assert [is_windowed(entry["subnet"]) for entry in subnets] == [False, False, False, True]
    for index, entry in enumerate(subnets):
        check(folder / f"{name}.pt", entry, gold, f"subnet{index}")


def test_every_golden_file_is_in_the_list(shared_golden):
    assert sorted(path.stem for path in (shared_golden / "lighthubert").glob("*.pt")) == GOLDEN
