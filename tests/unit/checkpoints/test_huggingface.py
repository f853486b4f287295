"""Hugging Face folders: every layout that transformers writes loads, and what is exported computes the same in transformers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sslim
from sslim.checkpoints import CheckpointError
from sslim.checkpoints.exporters import export_huggingface
from sslim.commands import export
from sslim.frontends import ConvLayerConfig
from sslim.models import PRESETS, build_model
from sslim.models.hubert import hubert, narrow_conv_layers
from sslim.models.search_space import SearchSpace
from sslim.nn.encoder import BlockConfig
from sslim.nn.slicing import fold_positions

ASSETS = Path(__file__).parents[2] / "parity" / "assets" / "hubert"
WAVEFORM = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(ASSETS / "hf_base", tmp_path / "hf")
    return tmp_path / "hf"


def final(model, waveform=WAVEFORM):
    with torch.inference_mode():
        return model.encode(waveform).final


def edit(folder, **values):
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def put(folder, tensors):
    save_file(tensors, folder / "model.safetensors")


def build(config):
    model = build_model(config, torch.Generator().manual_seed(1))
    with torch.no_grad():  # norms of one and zero would hide an exchange
        for parameter in filter(torch.is_floating_point, model.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


TINY = PRESETS["hubert-tiny"]()


def shared():
    encoder = replace(TINY.encoder, depth_map=(0, 1) * 3)
    return replace(TINY, encoder=encoder)


EXPORTED = {
    "post-norm": lambda: TINY,
    "pre-norm": lambda: hubert(
        num_layers=2,
        dim=32,
        num_heads=4,
        feedforward_dim=64,
        conv_layers=(ConvLayerConfig(channels=12, kernel=10, stride=5), *narrow_conv_layers(20)[1:]),
        conv_norm="layer",
        conv_bias=True,
        normalize_waveform=True,
        norm_placement="pre",
        conv_kernel_size=15,
        conv_groups=4,
        num_clusters=None,
    ),
    "shared layers": shared,
    "no projection norm": lambda: replace(TINY, projection=replace(TINY.projection, norm=False), heads={}),
    "tanh gelu": lambda: replace(TINY, encoder=replace(TINY.encoder, activation="gelu_tanh")),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_transformers_computes_the_same_from_an_export(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build(EXPORTED[name]())
    export_huggingface(model, tmp_path / "out")
    theirs, report = transformers.HubertModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    values = extractor(list(WAVEFORM.numpy()), sampling_rate=16000, return_tensors="pt")["input_values"]
    with torch.inference_mode():
        output = theirs.eval()(values, output_hidden_states=True)
        ours = model.encode(WAVEFORM)
    torch.testing.assert_close(output.last_hidden_state, ours.final, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.hidden_states[1], ours.layers[1], atol=1e-4, rtol=1e-4)
    again = sslim.load_model(tmp_path / "out")
    torch.testing.assert_close(final(again), ours.final, atol=1e-4, rtol=1e-4)
    assert again.num_layers == model.num_layers
    assert len(again.config.encoder.blocks) == model.num_layers
    assert set(again.heads) == set(model.heads) & {"mask"}


def test_folded_positions_are_exported(tmp_path):
    model = build(TINY)
    state = {name.removeprefix("encoder."): t for name, t in model.state_dict().items() if name.startswith("encoder.")}
    encoder, folded = fold_positions(TINY.encoder, state)
    flat = build_model(replace(TINY, encoder=encoder))
    flat.load_state_dict(
        {name: t for name, t in model.state_dict().items() if not name.startswith("encoder.")}
        | {f"encoder.{name}": t for name, t in folded.items()}
    )
    export_huggingface(flat, tmp_path / "out")
    torch.testing.assert_close(final(sslim.load_model(tmp_path / "out")), final(model), atol=1e-5, rtol=1e-5)


def with_blocks(**changes):
    block = replace(TINY.encoder.blocks[1], **changes)
    return replace(TINY, encoder=replace(TINY.encoder, blocks=(TINY.encoder.blocks[0], block)))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (lambda: with_blocks(num_heads=3), "layer 2 has 3 heads of width 8, which do not make up width 32"),
        (lambda: with_blocks(num_heads=2, head_dim=16), "layers 1 and 2 have 4 and 2 heads"),
        (lambda: with_blocks(feedforward_dim=48), "64 and 48 feed-forward units"),
        (lambda: with_blocks(attention_window=5), "layer 2 attends to a window"),
        (lambda: with_blocks(num_heads=0), "layer 2 lacks attention or feed-forward"),
        (lambda: PRESETS["melhubert-tiny"](), "not convolutions over the waveform"),
        (lambda: replace(TINY, frontend=replace(TINY.frontend, channel_scale=True)), "scales channels"),
        (lambda: replace(TINY, frontend=replace(TINY.frontend, sample_rate=8000)), "8000 Hz"),
        (lambda: replace(TINY, encoder=replace(TINY.encoder, positions=None)), "positions are not a convolution"),
        (lambda: replace(TINY, encoder=replace(TINY.encoder, final_norm=True)), "neither its post-norm nor its pre-norm"),
        (lambda: replace(TINY, encoder=replace(TINY.encoder, layer_norm_eps=1e-6)), "layer_norm_eps is 1e-06"),
        (lambda: replace(TINY, encoder=replace(TINY.encoder, depth_map=())), "no layers"),
        (lambda: replace(TINY, storage="int8-dynamic"), "stored as int8-dynamic"),
        (
            lambda: replace(
                TINY,
                encoder=replace(TINY.encoder, causal=True, positions=replace(TINY.encoder.positions, causal=True)),
            ),
            "causal",
        ),
    ],
)
def test_what_hubert_model_cannot_hold_is_refused_with_the_reason(config, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        export_huggingface(build(config()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_else_is_overwritten(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("text")
    with pytest.raises(ValueError, match="no Hugging Face folder"):
        export_huggingface(build(TINY), tmp_path / "notes")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["mine.txt"]


def test_the_command_says_how_large_the_export_is(tmp_path, capsys):
    """Shared layers are stored once here and once for each layer there; a subnet of a supernet is named on the way."""
    transformers = pytest.importorskip("transformers")
    model = build(shared())
    sslim.save_model(model, tmp_path / "model")
    export.main(export.Options(model=tmp_path / "model", output=tmp_path / "out", format="huggingface"))
    said = capsys.readouterr().out
    theirs = transformers.HubertModel.from_pretrained(tmp_path / "out")
    assert f"{sum(parameter.numel() for parameter in theirs.parameters()):,} parameters" in said
    assert f"2 shared blocks unrolled to 6 layers, of {model.num_parameters():,} parameters" in said
    space = SearchSpace(dims=(16, 32), num_heads=(2, 4), feedforward_ratios=(1.0, 2.0), num_layers=(2,))
    sslim.save_model(build(replace(TINY, search_space=space)), tmp_path / "supernet")
    supernet = export.Options(model=tmp_path / "supernet", output=tmp_path / "small", format="huggingface")
    with pytest.raises(ValueError, match="it is a supernet: export one of its subnets"):
        export.main(supernet)
    export.main(replace(supernet, subnet="min"))
    small, expected = sslim.load_model(tmp_path / "small"), sslim.load_model(tmp_path / "supernet", subnet="min")
    assert f"{small.num_parameters():,} parameters" in capsys.readouterr().out
    torch.testing.assert_close(final(small), final(expected), atol=1e-5, rtol=1e-5)


def test_the_command(tmp_path, capsys):
    sslim.save_model(build(TINY), tmp_path / "model")
    for _ in range(2):  # an old export is replaced
        export.main(export.Options(model=tmp_path / "model", output=tmp_path / "out", format="huggingface"))
    assert "not in it: the heads masked_prediction" in capsys.readouterr().out
    torch.testing.assert_close(final(sslim.load_model(tmp_path / "out")), final(build(TINY)), atol=1e-5, rtol=1e-5)


def test_every_layout_of_the_tensors(folder):
    expected = final(sslim.load_model(folder))
    tensors = load_file(folder / "model.safetensors")
    stem = "encoder.pos_conv_embed.conv."
    gain, direction = (tensors.pop(f"{stem}parametrizations.weight.original{i}") for i in (0, 1))
    tensors |= {f"{stem}weight_g": gain, f"{stem}weight_v": direction}
    put(folder, tensors)
    assert torch.equal(final(sslim.load_model(folder)), expected)
    around = {f"hubert.{name}": tensor for name, tensor in tensors.items()} | {"lm_head.weight": torch.zeros(32, 64)}
    put(folder, around)
    model = sslim.load_model(folder)
    assert torch.equal(final(model), expected)
    assert model.provenance[0]["dropped"] == ["lm_head.weight"]
    (folder / "model.safetensors").unlink()
    for options in ({}, {"_use_new_zipfile_serialization": False}):  # the second as torch wrote before 1.6
        torch.save(tensors, folder / "pytorch_model.bin", **options)
        assert torch.equal(final(sslim.load_model(folder)), expected)
    (folder / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    places = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for part in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == part}, folder / part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert torch.equal(final(sslim.load_model(folder)), expected)
    index.write_text(json.dumps({"weight_map": {**places, names[0]: "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="no file of tensors beside it"):
        sslim.load_model(folder)
    index.write_text(json.dumps({"weight_map": {**places, "more": places[names[0]]}}))
    with pytest.raises(CheckpointError, match="lacks more"):
        sslim.load_model(folder)


class Harmful:
    """An object that would make a file when it is unpickled as Python does it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_pickle_is_executed(folder, tmp_path):
    """The .bin of a folder goes through the restricted reader; the control shows that it would do harm."""
    tensors, mark = load_file(folder / "model.safetensors"), tmp_path / "executed"
    (folder / "model.safetensors").unlink()
    for contents in ({**tensors, "more": Harmful(mark)}, Harmful(mark)):
        torch.save(contents, folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin") as caught:
            sslim.load_model(folder)
        assert "\n" not in str(caught.value)
        assert not mark.exists()
    function, arguments = Harmful(mark).__reduce__()
    function(*arguments)  # what Python's unpickler would do
    assert mark.exists()


def test_whether_waveforms_are_normalised(folder):
    bare = sslim.load_model(folder)
    assert not bare.config.frontend.normalize_waveform
    assert "documented rule" in bare.provenance[0]["normalization"]
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True, "sampling_rate": 16000}))
    stated = sslim.load_model(folder)
    assert stated.config.frontend.normalize_waveform
    assert stated.config.frontend.waveform_eps == 1e-7
    assert "do_normalize" in stated.provenance[0]["normalization"]
    torch.testing.assert_close(final(stated, WAVEFORM * 3 + 0.2), final(stated), atol=1e-4, rtol=1e-4)
    assert sslim.load_model(ASSETS / "hf_large").config.frontend.normalize_waveform
    (folder / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 8000}))
    with pytest.raises(CheckpointError, match="sampling_rate is 8000"):
        sslim.load_model(folder)


@pytest.mark.parametrize("stable", [False, True])
def test_wav2vec2_as_transformers_writes_it(stable, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        do_stable_layer_norm=stable,
        feat_extract_norm="layer" if stable else "group",
    )
    torch.manual_seed(0)
    theirs = transformers.Wav2Vec2Model(config).eval()
    theirs.save_pretrained(tmp_path / "w")
    (tmp_path / "w" / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    model = sslim.load_model(tmp_path / "w")
    assert model.config.family == "wav2vec2"
    with torch.inference_mode():
        torch.testing.assert_close(theirs(WAVEFORM).last_hidden_state, final(model), atol=1e-4, rtol=1e-4)


def test_settings_that_transformers_leaves_out_have_its_defaults(tmp_path):
    config = {"model_type": "hubert", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    whole = hubert(num_layers=1, dim=32, num_heads=4, feedforward_dim=64, num_clusters=None)
    export_huggingface(build_model(whole), tmp_path / "out")
    shutil.copy(tmp_path / "out" / "model.safetensors", tmp_path / "model.safetensors")
    encoder = sslim.load_model(tmp_path).config.encoder
    assert encoder.blocks == (BlockConfig(num_heads=4, head_dim=8, feedforward_dim=64),)
    assert (encoder.positions.kernel_size, encoder.positions.groups) == (128, 16)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"model_type": "data2vec-audio"}, "model_type is .data2vec-audio., only hubert, wav2vec2"),
        ({"model_type": "absent"}, "model.json"),
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ({"feat_extract_activation": "relu"}, "feat_extract_activation is 'relu'"),
        ({"conv_pos_batch_norm": True}, "batch norm"),
        ({"add_adapter": True}, "add_adapter"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06"),
        ({"num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 64"),
        ({"conv_dim": [32] * 6}, "lists of equal length"),
        ({"conv_dim": "absent"}, "has shape"),
        ({"conv_kernel": [10, 3, 3, 3, 3, 2, "2"]}, "convolution layers"),
        ({"num_hidden_layers": 4}, "lacks encoder.blocks.3"),
        ({"do_stable_layer_norm": 3}, "do_stable_layer_norm is 3"),
        ({"feat_proj_layer_norm": False}, "no place for"),
    ],
)
def test_settings_that_do_not_fit_get_one_sentence(values, match, folder):
    edit(folder, **values)
    with pytest.raises(CheckpointError, match=match) as caught:
        sslim.load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asset", ["hf_base", "hf_large"])
def test_tensors_are_used_once_each(asset, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(ASSETS / asset, folder)
    tensors = load_file(folder / "model.safetensors")
    for missing in tensors:
        put(folder, {name: tensor for name, tensor in tensors.items() if name != missing})
        if missing == "masked_spec_embed":  # models that were fine-tuned without masking lack it
            assert set(sslim.load_model(folder).heads) == set()
            continue
        with pytest.raises(CheckpointError, match="lacks "):
            sslim.load_model(folder)
    put(folder, {**tensors, "encoder.extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"encoder\.extra"):
        sslim.load_model(folder)
    put(folder, tensors)  # the control: it is not the rewriting that fails
    assert torch.equal(final(sslim.load_model(folder)), final(sslim.load_model(ASSETS / asset)))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no tensors"):
        sslim.load_model(folder)
