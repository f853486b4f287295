"""Export to the reference's layout: exact round trip, plain types, and a reason for everything it cannot express."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sslim
from sslim.checkpoints import read_pickle
from sslim.checkpoints.exporters import export_melhubert
from sslim.checkpoints.exporters.melhubert import melhubert_contents
from sslim.models import PRESETS, build_model, slice_model
from sslim.models.melhubert import HEAD, melhubert
from sslim.nn.encoder import LinearRanks
from sslim.nn.heads import ClusterHeadConfig, MaskEmbeddingConfig
from sslim.nn.positions import SinusoidPositionsConfig
from sslim.nn.slicing import Units, fold_positions

ASSETS = Path(__file__).parents[2] / "parity" / "assets" / "melhubert_legacy"


def build(config):
    return build_model(config, torch.Generator().manual_seed(0))


def tiny(**changes):
    config = PRESETS["melhubert-tiny"]()
    return replace(config, encoder=replace(config.encoder, **changes))


def final(model):
    x = torch.randn(1, 9, model.config.projection.feature_dim, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        return model.encode_features(x).final


def equal(one, two):
    a, b = one.state_dict(), two.state_dict()
    return one.config == two.config and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def with_mask(num_clusters, dim):
    return {HEAD: ClusterHeadConfig(num_clusters=num_clusters), "mask": MaskEmbeddingConfig(dim=dim)}


def expressible():
    """Models that the layout can hold."""
    ten = melhubert(frame_period_ms=10, num_layers=1, dim=32, num_heads=2, feedforward_dim=8, conv_kernel_size=5, conv_groups=2)
    embedded = PRESETS["melhubert-tiny"]()
    models = {
        "tiny": build(tiny()),
        "ten": build(ten),
        "pre_norm": build(tiny(norm_placement="pre", input_norm=False, final_norm=True, activation="relu", layer_drop=0.1)),
        "embedding": build(replace(embedded, heads=with_mask(7, 80))),
        "embedding_wide": build(replace(embedded, heads=with_mask(7, 32))),
    }
    full = Units.full(models["tiny"].config.encoder)
    models["heads"] = slice_model(models["tiny"], replace(full, heads=((1, 2), (0, 1, 3))))
    models["rows"] = slice_model(models["tiny"], replace(full, feedforward=(tuple(range(9)), tuple(range(3, 12)))))
    models["layers"] = slice_model(models["tiny"], replace(full, depths=(0,)))
    return models


@pytest.mark.parametrize("name", ["tiny", "ten", "pre_norm", "embedding", "embedding_wide", "heads", "rows", "layers"])
def test_round_trip_is_exact(name, tmp_path):
    model = expressible()[name]
    export_melhubert(model, tmp_path / "m.ckpt")
    assert equal(sslim.load_model(tmp_path / "m.ckpt"), model)
    with torch.no_grad():
        model.projection.linear.bias[0] += 1e-6
    assert not equal(sslim.load_model(tmp_path / "m.ckpt"), model)


@pytest.mark.parametrize("file", sorted(path.name for path in ASSETS.glob("*.ckpt")))
def test_reference_files_come_back_as_they_were(file, tmp_path):
    """Reference -> native -> reference layout: the effective tensors and what the reference reads of the settings."""
    model = sslim.load_model(ASSETS / file)
    export_melhubert(model, tmp_path / "m.ckpt")
    original, exported = read_pickle(ASSETS / file), torch.load(tmp_path / "m.ckpt", weights_only=True)
    section = original["Upstream_Config"].get("melhubert") or original["Upstream_Config"]["hubert"]
    weights = original.get("model") or original["Model"]
    written = exported["Upstream_Config"]["melhubert"]
    same = [key for key in written if key in section and not key.startswith(("mask_", "skip_", "pred_"))]
    assert len(same) > 15
    assert {key: written[key] for key in same} == {key: section[key] for key in same}
    assert exported["model"].keys() == {name.removesuffix("_mask").removesuffix("_orig") for name in weights}
    for name, tensor in exported["model"].items():
        expected = weights[name] if name in weights else weights[f"{name}_orig"] * weights[f"{name}_mask"].float()
        assert torch.equal(tensor, expected), name
    assert equal(sslim.load_model(tmp_path / "m.ckpt"), model)


def plain(value):
    kinds = (dict, list, tuple, str, int, float, bool, type(None), torch.Tensor)
    inner = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
    return type(value) in kinds and all(map(plain, inner))


def test_only_plain_types_are_written(tmp_path):
    contents = melhubert_contents(expressible()["heads"])
    assert plain(contents)
    assert not plain({"a": {1, 2}})
    assert {"model", "Upstream_Config", "Runner", "Step", "Args", "Optimizer", "Pruned_heads"} == set(contents)
    export_melhubert(expressible()["tiny"], tmp_path / "m.ckpt")
    loaded = torch.load(tmp_path / "m.ckpt", weights_only=True)
    assert "Pruned_heads" not in loaded
    assert loaded["Upstream_Config"]["melhubert"]["encoder_attention_heads"] == 4
    assert loaded["Upstream_Config"]["task"] == {"sequence_length": 750}


def test_pruned_heads_fit_the_reference_that_replays_them(tmp_path):
    """The reference builds a whole model, removes the listed heads, and only then loads: the counts must fit."""
    contents = melhubert_contents(expressible()["heads"])
    num_heads = contents["Upstream_Config"]["melhubert"]["encoder_attention_heads"]
    for layer in range(2):
        removed = sum(len(step.get(layer, [])) for step in contents["Pruned_heads"])
        assert (num_heads - removed) * 8 == len(contents["model"][f"encoder.layers.{layer}.self_attn.q_proj.weight"])
    imported = sslim.load_model(ASSETS / "head_pruned_dd.ckpt")
    kept = imported.provenance[0]["kept_heads"]
    (step,) = melhubert_contents(imported)["Pruned_heads"]
    assert [sorted({0, 1, 2, 3} - set(step[layer])) for layer in range(3)] == kept


def test_folded_positions_are_split_exactly(tmp_path):
    model = build(tiny())
    encoder = {
        name.removeprefix("encoder."): tensor for name, tensor in model.state_dict().items() if name.startswith("encoder.")
    }
    config, folded = fold_positions(model.config.encoder, encoder)
    flat = build(replace(model.config, encoder=config))
    folded["positions.weight"][..., 3] = 0.0  # a dead tap has no direction
    flat.encoder.load_state_dict(folded)
    export_melhubert(flat, tmp_path / "m.ckpt")
    again = sslim.load_model(tmp_path / "m.ckpt")
    assert torch.equal(again.encoder.positions.kernel(), folded["positions.weight"])


def inexpressible():
    """Descriptions and a word of the reason."""
    config = tiny()
    block = config.encoder.blocks[0]
    two = (block, replace(block, feedforward_dim=9))
    mel = config.frontend.features
    return [
        (tiny(depth_map=(0, 0)), "depth_map"),
        (tiny(depth_map=(1, 0)), "depth_map"),
        (tiny(positions=SinusoidPositionsConfig()), "positions"),
        (tiny(positions=None), "positions"),
        (tiny(causal=True, positions=replace(config.encoder.positions, causal=True)), "causal"),
        (tiny(layer_norm_eps=1e-12), "layer_norm_eps"),
        (tiny(activation="swish"), "swish"),
        (tiny(final_norm=True), "norms"),
        (tiny(blocks=two), "feed-forward units"),
        (tiny(blocks=(block, replace(block, ranks=LinearRanks(up=4)))), "low-rank"),
        (tiny(blocks=(block, replace(block, attention_window=3))), "window"),
        (tiny(blocks=(block, replace(block, num_heads=0))), "lacks attention"),
        (tiny(blocks=(block, replace(block, head_dim=4))), "heads of width 4"),
        (tiny(blocks=(replace(block, num_heads=5),) * 2), "5 heads"),
        (replace(config, heads={}), "head"),
        (replace(config, heads={**config.heads, "other": ClusterHeadConfig(num_clusters=2)}), "other"),
        (replace(config, heads=with_mask(2, 5)), "mask embedding"),
        (replace(config, projection=replace(config.projection, norm=True)), "norm before"),
        (replace(config, frontend=replace(config.frontend, features=replace(mel, window="povey"))), "front-end"),
        (melhubert(num_layers=1, dim=80, num_heads=2, feedforward_dim=8), "as wide as the model"),
    ]


@pytest.mark.parametrize("case", range(20))
def test_what_it_cannot_express_is_refused(case, tmp_path):
    cases = inexpressible()
    assert len(cases) == 20
    config, reason = cases[case]
    with pytest.raises(ValueError, match="the MelHuBERT layout cannot express this model") as caught:
        export_melhubert(build(config), tmp_path / "m.ckpt")
    assert reason in str(caught.value)
    assert list(tmp_path.iterdir()) == []
