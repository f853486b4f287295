"""MelHuBERT files at the edges: masks, weight norm names, pre-norm, lost pruning lists, contradictions, the key table."""

import collections
import copy
from pathlib import Path

import pytest
import torch

import sslim
from sslim.checkpoints import CheckpointError, read_pickle
from sslim.checkpoints.importers.melhubert import bake_masks
from sslim.checkpoints.importers.melhubert_names import foreign_name, native_name
from sslim.models import PRESETS, SpeechModel

ASSETS = Path(__file__).parents[2] / "parity" / "assets" / "melhubert_legacy"
SECTION = "melhubert"


@pytest.fixture(scope="module")
def pretrained():
    contents = read_pickle(ASSETS / "pretrain.ckpt", skip={"Optimizer"})
    return {key: contents[key] for key in ("model", "Upstream_Config", "Runner", "Step")} | {"Args": {"frame_period": 20}}


def load(contents, tmp_path):
    torch.save(contents, tmp_path / "file.ckpt")
    return sslim.load_model(tmp_path / "file.ckpt")


def changed(contents, *, settings=(), weights=(), drop=(), **top):
    """A deep copy with settings, weights and top-level keys replaced."""
    contents = copy.deepcopy(contents) | top
    contents["Upstream_Config"][SECTION] |= dict(settings)
    contents["model"] |= dict(weights)
    for name in drop:
        del contents["model"][name]
    return contents


def outputs(model):
    width = model.config.projection.feature_dim
    x = torch.randn(1, 12, width, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.encode_features(x)


@pytest.mark.parametrize(
    ("preset", "feature_dim", "count"), [("melhubert-20ms", 80, 90_231_424), ("melhubert-10ms", 40, 90_200_704)]
)
def test_published_models_have_the_documented_names_and_shapes(preset, feature_dim, count):
    """All 201 tensors of the specification's table, on the meta device."""
    with torch.device("meta"):
        model = SpeechModel(PRESETS[preset]())
    layer = {f"self_attn.{p}_proj.weight": (768, 768) for p in "kvq"} | {f"self_attn.{p}_proj.bias": (768,) for p in "kvq"}
    layer |= {"self_attn.out_proj.weight": (768, 768), "self_attn.out_proj.bias": (768,)}
    layer |= {f"{norm}_layer_norm.{part}": (768,) for norm in ("self_attn", "final") for part in ("weight", "bias")}
    layer |= {"fc1.weight": (3072, 768), "fc1.bias": (3072,), "fc2.weight": (768, 3072), "fc2.bias": (768,)}
    table = {f"encoder.layers.{i}.{name}": shape for i in range(12) for name, shape in layer.items()}
    table |= {"pre_extract_proj.weight": (768, feature_dim), "pre_extract_proj.bias": (768,)}
    table |= {"encoder.pos_conv.0.bias": (768,), "encoder.pos_conv.0.weight_g": (1, 1, 128)}
    table |= {
        "encoder.pos_conv.0.weight_v": (768, 48, 128),
        "encoder.layer_norm.weight": (768,),
        "encoder.layer_norm.bias": (768,),
    }
    table |= {"final_proj.weight": (512, 768), "final_proj.bias": (512,)}
    assert len(table) == 201
    state = model.state_dict()
    assert {foreign_name(name, final_norm=False): tuple(tensor.shape) for name, tensor in state.items()} == table
    assert {native_name(name, final_norm=False) for name in table} == set(state)
    assert model.num_parameters() == count


def test_names_outside_the_table_are_none():
    unknown = ("encoder.layers.x.fc1.weight", "encoder.layers.0.fc3.weight", "fc1.weight", "", "encoder.layers.0.1.fc1.weight")
    assert [native_name(name, final_norm=False) for name in unknown] == [None] * len(unknown)
    assert native_name("encoder.layer_norm.bias", final_norm=True) == "encoder.final_norm.bias"
    assert native_name("encoder.layers.11.fc2.bias", final_norm=False) == "encoder.blocks.11.feedforward.down.bias"


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.uint8])
def test_masks_hide_what_they_say(kind):
    original, mask = torch.tensor([1.0, float("nan"), -3.0]), torch.tensor([1, 0, 1]).to(kind)
    weights, masked = bake_masks({"a.weight_orig": original, "a.weight_mask": mask, "a.bias": original[:1]}, "f")
    assert weights["a.weight"].tolist() == [1.0, 0.0, -3.0]
    assert weights["a.bias"].tolist() == [1.0]
    assert masked == {"hidden": 1, "of": 3}
    assert weights["a.bias"].data_ptr() != original.data_ptr()
    for bad in ({"a.weight_orig": original}, {"a.weight_mask": mask}, {"a.weight_orig": original, "a.weight_mask": mask[:2]}):
        with pytest.raises(CheckpointError, match=r"a\.weight"):
            bake_masks(bad, "f")
    with pytest.raises(CheckpointError, match="zeros and ones"):
        bake_masks({"a.weight_orig": original, "a.weight_mask": torch.tensor([1.0, 0.5, 0.0])}, "f")
    with pytest.raises(CheckpointError, match="_orig and a _mask"):
        bake_masks({"a.weight_orig": original, "a.weight_mask": mask, "a.weight": original}, "f")


def test_pruned_weights_are_zero_and_counted():
    model = sslim.load_model(ASSETS / "weight_pruned.ckpt")
    masked = model.provenance[0]["masked_weights"]
    zeros = sum(int((p == 0).sum()) for p in model.encoder.blocks.parameters())
    assert masked["hidden"] <= zeros < masked["hidden"] * 1.02
    assert masked["hidden"] / masked["of"] == pytest.approx(0.8, abs=1e-3)
    raw = read_pickle(ASSETS / "weight_pruned.ckpt")["model"]
    name = "encoder.layers.0.fc1.weight"
    assert bool((raw[f"{name}_orig"][~raw[f"{name}_mask"]] != 0).any())  # the control: the originals would be wrong


def test_modern_weight_norm_names(pretrained, tmp_path):
    old, new = "encoder.pos_conv.0.weight_", "encoder.pos_conv.0.parametrizations.weight.original"
    weights = {f"{new}0": pretrained["model"][f"{old}g"], f"{new}1": pretrained["model"][f"{old}v"]}
    model = load(changed(pretrained, weights=weights, drop=[f"{old}g", f"{old}v"]), tmp_path)
    assert torch.equal(outputs(model).final, outputs(load(pretrained, tmp_path)).final)
    with pytest.raises(CheckpointError, match="twice"):
        load(changed(pretrained, weights=weights), tmp_path)


def test_data_parallel_prefix_and_half_precision(pretrained, tmp_path):
    prefixed = {f"module.{name}": tensor for name, tensor in pretrained["model"].items()}
    model = load({**pretrained, "model": prefixed}, tmp_path)
    assert torch.equal(outputs(model).final, outputs(load(pretrained, tmp_path)).final)
    half = load({**pretrained, "model": {name: tensor.half() for name, tensor in pretrained["model"].items()}}, tmp_path)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert (outputs(half).final - outputs(model).final).abs().max() < 0.02


def test_pre_norm_uses_the_same_norm_at_the_end(pretrained, tmp_path):
    model = load(changed(pretrained, settings={"layer_norm_first": True}), tmp_path)
    assert model.config.encoder.norm_placement == "pre"
    assert torch.equal(model.encoder.final_norm.weight, pretrained["model"]["encoder.layer_norm.weight"])
    out = outputs(model)
    with torch.inference_mode():
        normed = torch.nn.functional.layer_norm(out.layers[-1], (32,), *model.encoder.final_norm.parameters())
    assert torch.allclose(out.final, normed)
    assert not torch.allclose(out.final, out.layers[-1])


def test_mask_embedding_activation_and_absent_parts(pretrained, tmp_path):
    embedding = torch.arange(80.0)
    settings = {"learnable_mask_emb": True, "activation_fn": "gelu_accurate", "encoder_layerdrop": "0.05"}
    model = load(changed(pretrained, settings=settings, weights={"mask_emb": embedding}), tmp_path)
    assert torch.equal(model.heads["mask"].embedding, embedding)
    assert model.config.encoder.activation == "gelu_tanh"
    assert model.config.encoder.layer_drop == 0.05
    conv = [name for name in pretrained["model"] if "pos_conv" in name]
    assert load(changed(pretrained, drop=conv), tmp_path).config.encoder.positions is None
    headless = load(changed(pretrained, drop=["final_proj.weight", "final_proj.bias"]), tmp_path)
    assert headless.config.heads == {}
    other = {"final_proj.weight": torch.zeros(40, 32), "final_proj.bias": torch.zeros(40)}
    assert load(changed(pretrained, weights=other), tmp_path).config.heads["masked_prediction"].num_clusters == 40


def test_pruned_heads_come_from_the_tensors(tmp_path):
    contents = read_pickle(ASSETS / "head_pruned_dd.ckpt", skip={"Optimizer"})
    contents = {key: value for key, value in contents.items() if key not in ("Args", "Optimizer")}
    whole = load(contents, tmp_path)
    assert [block.num_heads for block in whole.config.encoder.blocks] == [2, 2, 2]
    assert whole.config.encoder.blocks[0].head_dim == 8
    assert contents["Pruned_heads"] == [{0: [3], 2: [1, 0]}, {0: [2], 1: [2, 1]}]
    assert whole.provenance[0]["kept_heads"] == [[0, 1], [0, 3], [2, 3]]  # layer 0 lost 3, then 2; layer 2 lost 0 and 1
    lost = load({**contents, "Pruned_heads": None}, tmp_path)  # continued pruning loses or truncates the list
    assert torch.equal(outputs(lost).final, outputs(whole).final)
    assert "leaves [4, 4, 4] heads, the tensors have [2, 2, 2]" in lost.provenance[0]["pruned_heads"]
    for malformed in ({0: [1]}, [{7: [0]}], [3], [{0: 1}]):
        assert "pruned_heads" in load({**contents, "Pruned_heads": malformed}, tmp_path).provenance[0]


def test_heads_are_renumbered_step_by_step(tmp_path):
    contents = read_pickle(ASSETS / "head_pruned_l1.ckpt", skip={"Optimizer"})
    model = sslim.load_model(ASSETS / "head_pruned_l1.ckpt")
    kept = [list(range(4)) for _ in range(3)]
    for step in contents["Pruned_heads"]:
        for layer, heads in step.items():
            for head in sorted(heads, reverse=True):
                del kept[layer][head]
    assert model.provenance[0]["kept_heads"] == kept


def test_layers_may_have_their_own_widths(pretrained, tmp_path):
    narrow = {"fc1.weight": torch.ones(5, 32), "fc1.bias": torch.ones(5), "fc2.weight": torch.ones(32, 5)}
    contents = changed(pretrained, weights={f"encoder.layers.1.{name}": tensor for name, tensor in narrow.items()})
    model = load(contents, tmp_path)
    assert [block.feedforward_dim for block in model.config.encoder.blocks] == [64, 5, 64]
    assert model.provenance[0]["stated_feedforward_dim"] == 64
    assert outputs(model).final.isfinite().all()


def test_likely_statistics_are_a_hint_only(pretrained, tmp_path):
    def hint(*sets):
        runner = {"datarc": {"sets": list(sets)}}
        model = load({**pretrained, "Runner": runner}, tmp_path)
        assert model.frontend.statistics_source is None
        return model.provenance[0].get("likely_statistics")

    assert hint("/data/libri-960-stage2/libri960-stg2-20ms.csv") == "libri-960"
    assert hint("/x/train-clean-360.csv") == "libri-360"
    assert hint("libri-100.csv", "libri-360.csv") is None
    assert hint("data/pairs.csv") is None
    assert hint() is None


def test_legacy_settings_reach_the_provenance():
    notes = sslim.load_model(ASSETS / "synth_s3prl_2022.ckpt").provenance[0]
    assert notes["settings"]["hubert"]["num_cluster"] == 512
    assert notes["training_sets"] == ["data/d.csv"]
    assert (notes["format"], notes["file"], notes["step"]) == ("MelHuBERT", "synth_s3prl_2022.ckpt", 11)


def refusals(contents):
    """What is wrong, and the word that the sentence must hold."""
    weights = contents["model"]
    fc = "encoder.layers.0.fc1.weight"
    attention = {f"encoder.layers.0.self_attn.{p}_proj.weight": torch.zeros(12, 32) for p in "qkv"}
    attention |= {f"encoder.layers.0.self_attn.{p}_proj.bias": torch.zeros(12) for p in "qkv"}
    attention |= {"encoder.layers.0.self_attn.out_proj.weight": torch.zeros(32, 12)}
    headless = {name: tensor[:0] if "out" not in name else tensor[:, :0] for name, tensor in attention.items()}
    uneven = {"encoder.layers.0.self_attn.k_proj.weight": torch.zeros(24, 32)}
    nan = {"final_proj.bias": torch.full((512,), float("nan"))}
    layer = [name for name in weights if name.startswith("encoder.layers.1.")]
    audio = {"hubert": contents["Upstream_Config"][SECTION], "data": {"audio": "x"}}
    return [
        (changed(contents, settings={"attention_type": "causal"}), "sees the future"),
        (changed(contents, settings={"attention_type": "sparse"}), "attention_type"),
        (changed(contents, settings={"activation_fn": "mish"}), "activation_fn is 'mish'"),
        (changed(contents, settings={"layer_norm_first": "False"}), "layer_norm_first is 'False'"),
        (changed(contents, settings={"dropout": 1.5}), "dropout is 1.5"),
        (changed(contents, settings={"dropout": [0.1]}), "dropout"),
        (changed(contents, settings={"encoder_layers": 0}), "no encoder layers"),
        (changed(contents, settings={"encoder_layers": 12}), "encoder_layers is 12, its tensors say 3"),
        (changed(contents, settings={"encoder_embed_dim": 768}), "its tensors say 32"),
        (changed(contents, settings={"encoder_attention_heads": 5}), "5 heads do not divide 32"),
        (changed(contents, settings={"encoder_attention_heads": 4.5}), "whole number"),
        (changed(contents, settings={"feat_emb_dim": 40}), "feat_emb_dim is 40, its tensors say 80"),
        (changed(contents, settings={"conv_pos": 128}), "conv_pos is 128"),
        (changed(contents, settings={"conv_pos_groups": 16}), "conv_pos_groups is 16"),
        (changed(contents, settings={"pos_conv_depth": 2}), "pos_conv_depth is 2"),
        (changed(contents, Args={"frame_period": 10}), "frames of 10 ms, 80 features mean frames of 20 ms"),
        (changed(contents, weights=attention), "no multiple of head width 8"),
        (changed(contents, weights=headless), "no attention heads left"),
        (changed(contents, weights=uneven), "has shape"),
        (changed(contents, weights=nan), "NaN"),
        (changed(contents, weights={fc: "text"}), "not a tensor"),
        (changed(contents, weights={fc: weights[fc].long()}), "int64"),
        (changed(contents, weights={fc: weights[fc][0]}), "has shape"),
        (changed(contents, weights={5: weights[fc]}), "'5'"),
        (changed(contents, drop=layer), "encoder_layers is 3, its tensors say 2"),
        (changed(contents, settings={"encoder_layers": 2}, drop=layer), "not numbered in a row"),
        (changed(contents, drop=["encoder.layer_norm.weight"]), "lacks"),
        (changed(contents, drop=["encoder.pos_conv.0.weight_v"]), "positional convolution"),
        ({**contents, "model": {}}, "without weights"),
        ({**contents, "model": [1]}, "without weights"),
        ({"Upstream_Config": audio}, "without weights"),
    ]


@pytest.mark.parametrize("case", range(31))
def test_contradictions_get_one_sentence(case, pretrained, tmp_path):
    cases = refusals(pretrained)
    assert len(cases) == 31
    contents, match = cases[case]
    with pytest.raises(CheckpointError) as caught:
        load(contents, tmp_path)
    assert match in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "file.ckpt"))


def test_other_front_ends_are_left_out_with_a_note(pretrained, tmp_path):
    contents = changed(pretrained)
    contents["Upstream_Config"]["data"] = {"audio": {"feat_type": "mfcc", "feat_dim": 40}}
    model = load(contents, tmp_path)
    assert model.frontend is None
    assert "mfcc" in model.provenance[0]["frontend"]
    with pytest.raises(ValueError, match="without global statistics"):
        sslim.load_model(tmp_path / "file.ckpt", statistics="libri-960")
    wide = changed(pretrained, settings={"feat_emb_dim": 60}, weights={"pre_extract_proj.weight": torch.ones(32, 60)})
    model = load(wide, tmp_path)
    assert model.frontend is None
    assert outputs(model).final.isfinite().all()


def test_ordered_dictionaries_and_plain_ones_are_alike(pretrained, tmp_path):
    ordered = load({**pretrained, "model": collections.OrderedDict(pretrained["model"])}, tmp_path)
    assert torch.equal(outputs(ordered).final, outputs(load(pretrained, tmp_path)).final)
