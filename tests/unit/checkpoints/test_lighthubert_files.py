"""LightHuBERT files at the edges: which supernet a file holds, subnets that do not fit, leftovers, settings nobody uses."""

import copy

import pytest
import torch

import sslim
from reference_layouts import lighthubert_file, shapes
from sslim.checkpoints import CheckpointError
from sslim.checkpoints.importers import lighthubert
from sslim.models import SpeechModel
from sslim.models.lighthubert import LIGHTHUBERT_STAGE1
from sslim.models.search_space import LIGHTHUBERT_BASE, LIGHTHUBERT_SMALL
from sslim.nn.heads import MaskEmbeddingConfig, RegressionHeadConfig

SUBNET = {"embed_dim": 48, "heads_num": [1] * 11, "ffn_embed": [32] * 11, "layer_num": 11, "slide_wsz": ["global"] * 11}


def load(contents, tmp_path, **options):
    torch.save(contents, tmp_path / "file.pt")
    return sslim.load_model(tmp_path / "file.pt", **options)


@pytest.mark.parametrize(
    ("settings", "space"),
    [
        ({"_name": "hubert_pruner", "pruner_supernet": "conf/Supernet-BASE.yaml"}, LIGHTHUBERT_BASE),
        ({"_name": "hubert_pruner", "pruner_supernet": "conf/supernet_small.yaml"}, LIGHTHUBERT_SMALL),
        ({"_name": "hubert_pruner", "supernet_type": "small"}, LIGHTHUBERT_SMALL),
        ({"_name": "hubert_pruner", "pruner_supernet": "a.yaml", "supernet_type": "base"}, LIGHTHUBERT_BASE),
        ({"_name": "student_hubert"}, LIGHTHUBERT_STAGE1),
        ({"_name": "student_hubert", "supernet_type": "small"}, LIGHTHUBERT_STAGE1),
    ],
)
def test_the_search_space_follows_from_the_settings(settings, space):
    assert lighthubert.space_of(settings) == (space, "")
    assert LIGHTHUBERT_STAGE1.default == LIGHTHUBERT_BASE.largest() != LIGHTHUBERT_BASE.default


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"pruner_supernet": None}, "pruner_supernet None"),
        ({"pruner_supernet": "conf/Supernet-Large.yaml"}, "Supernet-Large"),
        ({"pruner_supernet": "a/base.yaml", "supernet_type": "small"}, "supernet_type 'small'"),
    ],
)
def test_an_undecidable_file_loads_only_with_its_sizes_spelt_out(settings, named, tmp_path):
    contents = lighthubert_file(**settings)
    for subnet in (None, "default", "max", "min"):
        with pytest.raises(CheckpointError, match=rf"base, small or stage 1.*{named}.*subnet=\{{\.\.\.\}}, or subnet='whole'"):
            load(contents, tmp_path, subnet=subnet)
    model = load(contents, tmp_path, subnet=SUBNET)
    assert (model.config.encoder.dim, model.num_layers) == (48, 11)
    assert load(contents, tmp_path, subnet="whole").config.encoder.dim == 64
    decided = load(lighthubert_file(), tmp_path, subnet=SUBNET)
    assert all(torch.equal(tensor, decided.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_named_subnets_that_the_tensors_do_not_fit_fail_in_one_sentence(tmp_path):
    contents = lighthubert_file()
    for subnet, width in ((None, 640), ("default", 640), ("max", 768), ("min", 512)):
        with pytest.raises(ValueError, match=rf"dim {width} of the subnet is more than the supernet's 64.*subnet=") as error:
            load(contents, tmp_path, subnet=subnet)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="3 heads are asked for, the supernet has 1"):
        load(contents, tmp_path, subnet={**SUBNET, "heads_num": [3] * 11})
    with pytest.raises(ValueError, match="5 layers are asked for"):
        load(contents, tmp_path, subnet={"embed_dim": 48, "heads_num": [1] * 5, "ffn_embed": [32] * 5})


def test_leftovers_are_dropped_by_name_and_the_head_and_mask_come_along(tmp_path):
    model = load(lighthubert_file(), tmp_path, subnet="whole")
    assert sorted(model.provenance[0]["dropped"]) == ["final_proj.bias", "final_proj.weight", "label_embs_concat"]
    assert model.config.heads == {
        "distillation": RegressionHeadConfig(output_dim=24, bias=False),
        "mask": MaskEmbeddingConfig(dim=64),
    }
    assert model.config.search_space == LIGHTHUBERT_BASE
    assert model.config.frontend.normalize_waveform
    assert model.config.frontend.reference_mask == "coarse"
    small = load(lighthubert_file(), tmp_path, subnet=SUBNET)
    assert small.config.heads["mask"].dim == 48
    assert torch.equal(small.heads["distillation"].linear.weight, model.heads["distillation"].linear.weight[:, :48])
    contents = lighthubert_file()
    contents["model"]["layer_pred_heads.3.weight"] = torch.zeros(24, 64)
    with pytest.raises(CheckpointError, match=r"'layer_pred_heads\.3\.weight'.*no part of a LightHuBERT"):
        load(contents, tmp_path, subnet="whole")


def test_a_file_without_prediction_heads_says_so_in_its_settings(tmp_path):
    contents = lighthubert_file(layer_pred_num=",".join("0" * 12))
    del contents["model"]["layer_pred_heads.11.weight"]
    assert set(load(contents, tmp_path, subnet="whole").config.heads) == {"mask"}
    contents["cfg"]["model"].pop("layer_pred_num")
    with pytest.raises(CheckpointError, match=r"lacks heads\.distillation\.linear\.weight"):
        load(contents, tmp_path, subnet="whole")


def test_normalisation_is_what_the_task_says_or_noted(tmp_path):
    contents = lighthubert_file()
    contents["cfg"]["task"]["normalize"] = False
    assert not load(contents, tmp_path, subnet="whole").config.frontend.normalize_waveform
    contents["cfg"].pop("task")
    model = load(contents, tmp_path, subnet="whole")
    assert model.config.frontend.normalize_waveform
    assert "the file does not say" in model.provenance[0]["normalize"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pos_conv_depth": 5}, "pos_conv_depth is 5, expected a number from 1 to 1"),
        ({"layer_type": "conformer"}, "layer_type is 'conformer', expected one of transformer"),
        ({"encoder_layers": 6}, "encoder_layers is 6 and its tensors have 12 layers; a LightHuBERT has 12"),
        ({"encoder_attention_heads": 2}, "heads of width 32; LightHuBERT's have 64"),
        (
            {"layer_pred_num": "0,0,0,0,0,1,0,0,0,0,0,1"},
            "layer_pred_num is .*expected one prediction head, after the last layer",
        ),
        ({"conv_feature_layers": "[(64,10,5)]"}, "as wide as its features, 64"),
        ({"conv_pos_groups": 7}, "conv_pos_groups 7 do not divide its width 64"),
    ],
)
def test_what_does_not_fit_is_one_sentence(settings, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as error:
        load(lighthubert_file(**settings), tmp_path, subnet="whole")
    assert "\n" not in str(error.value)


def test_a_layer_too_few_is_noticed(tmp_path):
    contents = copy.deepcopy(lighthubert_file())
    for name in [name for name in contents["model"] if name.startswith("encoder.layers.7.")]:
        del contents["model"][name]
    with pytest.raises(CheckpointError, match="encoder_layers is 12 and its tensors have 11 layers"):
        load(contents, tmp_path, subnet="whole")


def test_full_size_names_and_shapes():
    """The specification's 224 tensors and three leftovers, on the meta device."""
    table = shapes(conv_norm="layer_norm") | {"layer_pred_heads.11.weight": (768, 768)}
    assert len(table) == 224
    table |= {"final_proj.weight": (256, 768), "final_proj.bias": (256,), "label_embs_concat": (504, 256)}
    weights = {name: torch.zeros(()).expand(shape) for name, shape in table.items()}
    cfg = {"model": {"_name": "hubert_pruner", "pruner_supernet": "Supernet-Small.yaml"}, "task": {"normalize": True}}
    imported = lighthubert.convert({"cfg": cfg, "model": weights}, "file")
    with torch.device("meta"):
        model = SpeechModel(imported.config)
    assert {name: tensor.shape for name, tensor in imported.state.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    assert model.num_parameters() == 94_967_680
    imported.config.search_space.check(imported.config.encoder)
