"""HuBERT files: convolution text, settings in every container, heads, fine-tuned files, malformed ones; parameter counts."""

import argparse
import sys
import types
from pathlib import Path

import pytest
import torch

import sslim
from sslim.checkpoints import CheckpointError, read_pickle
from sslim.checkpoints.importers.conv_layers import parse_conv_layers
from sslim.frontends import HUBERT_CONV_LAYERS
from sslim.models import PRESETS, SpeechModel

ASSETS = Path(__file__).parents[2] / "parity" / "assets" / "hubert"
FILE = ASSETS / "base_fairseq.pt"
WAVEFORM = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.fixture(scope="module")
def contents():
    return {key: value for key, value in read_pickle(FILE).items() if key != "last_optimizer_state"}


def load(contents, folder, **options):
    torch.save(contents, folder / "hubert.pt")
    return sslim.load_model(folder / "hubert.pt", **options)


def changed(contents, *, model=None, task=None, weights=None, drop=(), **others):
    cfg = {
        **contents["cfg"],
        "model": {**contents["cfg"]["model"], **(model or {})},
        "task": {**contents["cfg"]["task"], **(task or {})},
    }
    tensors = {name: tensor for name, tensor in contents["model"].items() if name not in drop} | (weights or {})
    return {**contents, "cfg": cfg, "model": tensors, **others}


def final(model):
    with torch.inference_mode():
        return model.encode(WAVEFORM).final


def test_parameter_counts_of_the_published_models():
    counts = {}
    for name in ("hubert-base", "hubert-large"):
        with torch.device("meta"):
            model = SpeechModel(PRESETS[name]())
        counts[name] = (model.num_parameters(), model.num_parameters(with_heads=False))
    assert counts["hubert-base"] == (94_697_600, 94_371_456 - 512)  # DPHuBERT's dense count has 512 channel scales more
    assert counts["hubert-large"][0] == 316_609_408


def test_conv_layers_are_parsed_and_never_run():
    assert parse_conv_layers("[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2") == HUBERT_CONV_LAYERS
    assert parse_conv_layers(" [(512, 10, 5)] + 4 * [(512,3,2)] + [(512,2,2)]*2 ") == HUBERT_CONV_LAYERS
    assert parse_conv_layers([[c.channels, c.kernel, c.stride] for c in HUBERT_CONV_LAYERS]) == HUBERT_CONV_LAYERS


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "",
        None,
        7,
        "[(512,10)]",
        "[(512,10,5.0)]",
        "[(512,-10,5)]",
        "[(512,True,5)]",
        "[(512,0,5)]",
        "[(8,2,2)] * 1000000000",
        "[(8,2,2)] * -1",
        "[(8,2,2)] - [(8,2,2)]",
        "__import__('os').system('true')",
        "[(x,2,2)]",
        "(" * 900 + ")" * 900,
        "[(8,2,2)] + " * 400 + "[(8,2,2)]",
    ],
)
def test_other_text_for_conv_layers_gets_one_sentence(text):
    with pytest.raises(CheckpointError, match="convolution layers") as caught:
        parse_conv_layers(text, "FILE")
    assert "FILE" in str(caught.value)
    assert "\n" not in str(caught.value)


class Pickled:
    """An object that pickles as one of a class that is not installed."""

    def __init__(self, **state):
        self.__dict__.update(state)


def foreign_class(monkeypatch, module, name):
    kind = type(name, (Pickled,), {"__module__": module, "__qualname__": name})
    for depth in range(1, module.count(".") + 2):
        path = ".".join(module.split(".")[:depth])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    monkeypatch.setattr(sys.modules[module], name, kind, raising=False)
    return kind


def test_settings_in_omegaconf_objects_and_dictionaries_of_fairseq(contents, tmp_path, monkeypatch):
    node = foreign_class(monkeypatch, "omegaconf.nodes", "AnyNode")
    container = foreign_class(monkeypatch, "omegaconf.dictconfig", "DictConfig")
    dictionary = foreign_class(monkeypatch, "fairseq.data.dictionary", "Dictionary")

    def wrap(value, parent=None):
        if not isinstance(value, dict):
            return node(_val=value, _parent=parent, _metadata={})
        whole = container(_parent=parent, _metadata={})
        whole._content = {key: wrap(item, whole) for key, item in value.items()}  # parents and children refer to each other
        return whole

    symbols = ["<s>", "<pad>", "</s>", "<unk>", *map(str, range(20))]
    file = {**contents, "cfg": wrap(contents["cfg"]), "task_state": {"dictionaries": [dictionary(symbols=symbols, count=[])]}}
    model = load(file, tmp_path)
    assert model.config == sslim.load_model(FILE).config
    assert torch.equal(final(model), final(sslim.load_model(FILE)))
    assert model.provenance[0]["special_symbols"] == 4
    two = {**contents, "task_state": {"dictionaries": [dictionary(symbols=symbols[:12]), dictionary(symbols=symbols[12:])]}}
    model = load(two, tmp_path)
    assert set(model.config.heads) == {"mask"}
    assert "2 dictionaries" in model.provenance[0]["codewords"]
    assert "label_embs_concat" in model.provenance[0]["dropped"]
    short = {**contents, "task_state": {"dictionaries": [dictionary(symbols=symbols[:-1])]}}
    with pytest.raises(CheckpointError, match="23 symbols in its dictionary, 24 codewords"):
        load(short, tmp_path)


def test_older_files_have_one_namespace(contents, tmp_path):
    flat = argparse.Namespace(**{**contents["cfg"]["task"], **contents["cfg"]["model"]}, arch="hubert")
    model = load({**contents, "cfg": None, "args": flat}, tmp_path)
    assert model.config == sslim.load_model(FILE).config


def test_the_head_gives_the_cosines(contents):
    model = sslim.load_model(FILE)
    states = final(model)
    with torch.inference_mode():
        logits = model.heads["masked_prediction"](states)
        weights = contents["model"]
        projected = states @ weights["final_proj.weight"].T + weights["final_proj.bias"]
        cosines = torch.cosine_similarity(projected[..., None, :], weights["label_embs_concat"], dim=-1)
    torch.testing.assert_close(logits, cosines / 0.1, atol=1e-4, rtol=0)
    assert torch.equal(model.heads["mask"].embedding, weights["mask_emb"])


def test_the_encoder_of_a_fine_tuned_file(contents, tmp_path):
    inner = {f"w2v_encoder.w2v_model.{k}": v for k, v in contents["model"].items() if not k.startswith("final_proj")}
    tensors = {**inner, "w2v_encoder.proj.weight": torch.zeros(32, 64), "w2v_encoder.proj.bias": torch.zeros(32)}
    settings = {"_name": "hubert_ctc", "normalize": True, "w2v_args": contents["cfg"]}
    file = {**contents, "cfg": {"model": settings, "task": {"_name": "audio_finetuning", "normalize": True}}, "model": tensors}
    model = load(file, tmp_path)
    assert model.config.frontend.normalize_waveform
    assert set(model.config.heads) == {"mask"}
    assert {"w2v_encoder.proj.weight", "label_embs_concat"} <= set(model.provenance[0]["dropped"])
    same = load(changed(contents, task={"normalize": True}), tmp_path)
    assert torch.equal(final(model), final(same))
    settings["w2v_args"] = None
    with pytest.raises(CheckpointError, match="fine-tuned with CTC"):
        load(file, tmp_path)


def test_notes_say_which_padding_rule_applies():
    notes = sslim.load_model(FILE).provenance[0]
    assert "group-norm statistics over padding" in notes["padding"]
    assert "coarse" in notes["padding"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"drop": ["encoder.layers.1.fc1.weight"]}, "lacks encoder.blocks.1.feedforward.up.weight"),
        ({"drop": ["mask_emb"]}, "lacks heads.mask.embedding"),
        ({"drop": ["final_proj.weight"]}, "expected matrices final_proj.weight and label_embs_concat"),
        ({"weights": {"encoder.extra": torch.zeros(2)}}, "encoder.extra"),
        ({"weights": {"layer_norm.weight": torch.full((32,), float("nan"))}}, "NaN"),
        ({"weights": {"encoder.layers.0.fc1.bias": torch.zeros(128, dtype=torch.long)}}, "int64"),
        ({"weights": {"encoder.layers.0.fc1.bias": "text"}}, "not a tensor"),
        ({"model": {"conv_feature_layers": "[(32,10,5)] + open('x')"}}, "convolution layers"),
        (
            {"model": {"conv_feature_layers": "[(32,10,5)] + [(32,3,2)] * 3 + [(32,2,2)] * 2"}},
            "description has no place for|shape",
        ),
        ({"model": {"activation_fn": "gelu_new_one"}}, "activation_fn is 'gelu_new_one', expected one of gelu"),
        ({"model": {"extractor_mode": "layer_norm"}}, "lacks frontend.layers.1.norm"),
        ({"model": {"layer_type": "conformer"}}, "layer_type is 'conformer'"),
        ({"model": {"attn_type": "espnet"}}, "attn_type is 'espnet'"),
        ({"model": {"layer_norm_first": "yes"}}, "layer_norm_first is 'yes'"),
        ({"model": {"encoder_attention_heads": 5}}, "5 heads do not divide its width 64"),
        ({"model": {"conv_pos_groups": 7}}, "conv_pos_groups 7"),
        ({"model": {"encoder_layers": 2}}, "no place for"),
        ({"model": {"_name": "wav2vec2"}}, "fairseq model 'wav2vec2'"),
        ({"cfg": {"model": "text"}}, "no readable settings"),
    ],
)
def test_malformed_files_get_one_sentence(contents, change, match, tmp_path):
    own = {key: value for key, value in change.items() if key == "cfg"}
    file = changed(contents, **{key: value for key, value in change.items() if key != "cfg"}) | own
    with pytest.raises(CheckpointError, match=match) as caught:
        load(file, tmp_path)
    assert "\n" not in str(caught.value)


def test_untied_projections_of_several_dictionaries_are_dropped(contents, tmp_path):
    wide = {"final_proj.weight": torch.zeros(32, 64), "final_proj.bias": torch.zeros(32)}
    model = load(changed(contents, model={"untie_final_proj": True}, weights=wide), tmp_path)
    assert set(model.config.heads) == {"mask"}
    assert "2 dictionaries" in model.provenance[0]["codewords"]
