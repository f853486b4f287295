"""The native folder: exact round trip, strict both ways, and one sentence for every broken folder."""

import json
from dataclasses import replace

import pytest
import torch

import sslim
from sslim.checkpoints import CheckpointError
from sslim.checkpoints.native import assemble
from sslim.compress.quantize import Quantization, quantize
from sslim.models import PRESETS, ModelConfig, ProjectionConfig, build_model, slice_model
from sslim.nn.encoder import BlockConfig, EncoderConfig, LinearRanks
from sslim.nn.heads import ClusterHeadConfig, MaskEmbeddingConfig
from sslim.nn.positions import ConvPositionsConfig, SinusoidPositionsConfig
from sslim.nn.slicing import Units
from sslim.storage import DIGESTS, TornFolderError, atomic_folder, file_digest, save_tensors, write_json

TINY = BlockConfig(num_heads=2, head_dim=4, feedforward_dim=12)


def generator():
    return torch.Generator().manual_seed(0)


def tiny():
    return build_model(PRESETS["melhubert-tiny"](), generator())


def other_kinds():
    """Descriptions of other families: shared blocks, low rank, sinusoids, no front-end, causal, pruned."""
    common = {"family": "test", "frontend": None, "projection": ProjectionConfig(feature_dim=7, norm=True)}
    low_rank = replace(TINY, ranks=LinearRanks(query=2, down=3), attention_window=5)
    pre = {"norm_placement": "pre", "input_norm": False, "final_norm": True}
    causal = ConvPositionsConfig(kernel_size=4, groups=2, causal=True, weight_norm=False)
    encoders = {
        "shared": EncoderConfig(dim=8, blocks=(TINY, TINY), depth_map=(0, 1) * 3, positions=SinusoidPositionsConfig(), **pre),
        "low_rank": EncoderConfig(dim=8, blocks=(low_rank,), depth_map=(0,), positions=None, activation="swish"),
        "causal": EncoderConfig(dim=8, blocks=(TINY,), depth_map=(0,), positions=causal, causal=True),
    }
    models = {name: build_model(ModelConfig(encoder=encoder, **common), generator()) for name, encoder in encoders.items()}
    head = {"masked_prediction": ClusterHeadConfig(num_clusters=3), "mask": MaskEmbeddingConfig(dim=7)}
    models["head"] = build_model(ModelConfig(encoder=encoders["shared"], heads=head, **common), generator())
    whole = tiny()
    full = Units.full(whole.config.encoder)
    models["sliced"] = slice_model(whole, replace(full, heads=((0, 2), (3,)), feedforward=((1,), tuple(range(9)))))
    return models


@pytest.mark.parametrize("name", ["shared", "low_rank", "causal", "head", "sliced"])
def test_every_kind_of_model_round_trips(name, tmp_path):
    model = other_kinds()[name]
    sslim.save_model(model, tmp_path / "m")
    again = sslim.load_model(tmp_path / "m")
    assert again.config == model.config
    x = torch.randn(2, 9, model.config.projection.feature_dim, generator=generator())
    with torch.inference_mode():
        want, got = (m.encode_features(x, torch.tensor([9, 6])).final for m in (model, again))
    assert torch.equal(got, want)
    with torch.no_grad():
        again.encoder.blocks[0].feedforward_norm.weight.mul_(2)
    with torch.inference_mode():
        assert not torch.equal(again.encode_features(x, torch.tensor([9, 6])).final, want)


def test_statistics_and_provenance_travel_with_the_model(tmp_path):
    model = tiny()
    mean, std = torch.arange(40.0), torch.linspace(1, 2, 40)
    model.set_statistics(mean, std, source="mine")
    model.provenance.append({"action": "test", "numbers": [1, 2.5], "name": "ä"})
    sslim.save_model(model, tmp_path / "m")
    again = sslim.load_model(tmp_path / "m")
    assert torch.equal(again.frontend.mean, mean)
    assert torch.equal(again.frontend.std, std)
    assert again.frontend.statistics_source == "mine"
    assert again.config.frontend == again.frontend.config == model.config.frontend
    assert again.provenance == model.provenance
    waveform = torch.randn(1, 8000, generator=generator()) * 0.1
    with torch.inference_mode():
        assert torch.equal(again.encode(waveform).final, model.encode(waveform).final)


def test_training_goes_on_from_a_loaded_model(tmp_path):
    sslim.save_model(tiny(), tmp_path / "m")
    model = sslim.load_model(tmp_path / "m")
    model.encode_features(torch.randn(1, 5, 80, generator=generator())).final.sum().backward()
    assert all(p.grad is not None for p in model.encoder.blocks.parameters())


def test_overwriting_is_atomic_and_spares_other_folders(tmp_path, monkeypatch):
    folder = tmp_path / "m"
    model = tiny()
    sslim.save_model(model, folder)
    before = file_digest(folder / "model.safetensors")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("sslim.checkpoints.native.save_tensors", fail)
    with torch.no_grad():
        model.projection.linear.bias.add_(1)
    with pytest.raises(OSError, match="disk full"):
        sslim.save_model(model, folder)
    assert file_digest(folder / "model.safetensors") == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    monkeypatch.undo()
    sslim.save_model(model, folder)
    assert file_digest(folder / "model.safetensors") != before
    assert torch.equal(sslim.load_model(folder).projection.linear.bias, model.projection.linear.bias)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not overwritten"):
        sslim.save_model(model, precious)
    assert (precious / "thesis.txt").exists()


def rewrite(folder, **changes):
    """Changes model.json and mends its digest, as a well-meaning editor would."""
    values = json.loads((folder / "model.json").read_text())
    values |= changes
    (folder / "model.json").write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    digests = json.loads((folder / DIGESTS).read_text())
    (folder / DIGESTS).write_text(json.dumps(digests | {"model.json": file_digest(folder / "model.json")}))


def test_broken_folders_get_one_sentence(tmp_path):
    model = tiny()

    def folder(name):
        sslim.save_model(model, tmp_path / name)
        return tmp_path / name

    def refused(path, match, error=CheckpointError):
        with pytest.raises(error, match=match) as caught:
            sslim.load_model(path)
        assert "\n" not in str(caught.value)

    newer = folder("newer")
    rewrite(newer, format_version=2)
    refused(newer, "newer sslim")
    for version in (..., "1", True, 0):
        rewrite(newer, format_version=version)
        refused(newer, "no format_version")
    config = json.loads((folder("x") / "model.json").read_text())["config"]
    rewrite(tmp_path / "x", config={**config, "familly": "x"})
    refused(tmp_path / "x", "did you mean 'family'", ValueError)
    rewrite(tmp_path / "x", config={**config, "encoder": {**config["encoder"], "dim": 48}})
    refused(tmp_path / "x", r"has shape \(32, 32\), its description asks for \(32, 48\)")
    rewrite(tmp_path / "x", config={**config, "encoder": {**config["encoder"], "depth_map": [0, 5]}})
    refused(tmp_path / "x", "depth_map names block 5", ValueError)
    rewrite(tmp_path / "x", config=config, unheard=1)
    refused(tmp_path / "x", "unknown key 'unheard'")
    (tmp_path / "x" / "model.json").write_text("{")
    refused(tmp_path / "x", "is not a JSON file", ValueError)
    torn = folder("torn")
    data = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(data[:-4] + b"\0\0\0\1")
    refused(torn, "does not match its digest", TornFolderError)
    (torn / "model.safetensors").unlink()
    refused(torn, "missing", TornFolderError)
    (torn / "model.json").unlink()
    refused(torn, r"no model\.json")
    undigested = folder("undigested")
    (undigested / DIGESTS).unlink()
    refused(undigested, "not written completely", TornFolderError)
    sslim.load_model(folder("whole"))  # the control


def test_assemble_is_strict_both_ways():
    model = tiny()
    state = model.state_dict()
    assemble(model.config, state, [], source="s")
    missing = {name: tensor for name, tensor in state.items() if "blocks.1" not in name}
    with pytest.raises(CheckpointError, match=r"s lacks encoder\.blocks\.1\..* and \d+ more"):
        assemble(model.config, missing, [], source="s")
    with pytest.raises(CheckpointError, match=r"has frontend\.mean"):
        assemble(model.config, {**state, "frontend.mean": torch.zeros(40)}, [], source="s")
    with pytest.raises(CheckpointError, match=r"torch\.int64"):
        assemble(model.config, {**state, "projection.linear.bias": torch.zeros(32).long()}, [], source="s")


def test_models_saved_with_the_mask_embedding_inside_the_cluster_head_still_load(tmp_path):
    model = other_kinds()["head"]
    sslim.save_model(model, tmp_path / "m")
    values = json.loads((tmp_path / "m" / "model.json").read_text())
    del values["config"]["heads"]["mask"]
    values["config"]["heads"]["masked_prediction"]["mask_embedding_dim"] = 7
    old = {"heads.mask.embedding": "heads.masked_prediction.mask_embedding"}
    state = {old.get(name, name): tensor for name, tensor in model.state_dict().items()}
    with atomic_folder(tmp_path / "old") as folder:
        write_json(folder / "model.json", values)
        save_tensors(folder / "model.safetensors", state)
    again = sslim.load_model(tmp_path / "old")
    assert again.config == model.config
    assert torch.equal(again.heads["mask"].embedding, model.heads["mask"].embedding)


def bytes_of(folder):
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("kind", "share"), [("int8-dynamic", 0.26), ("int8-weights", 0.26), ("bf16", 0.51), ("fp16", 0.51)])
def test_quantised_models_round_trip_in_smaller_files(kind, share, tmp_path):
    wide = BlockConfig(num_heads=4, head_dim=64, feedforward_dim=1024)
    low_rank = replace(wide, num_heads=3, feedforward_dim=1000, ranks=LinearRanks(query=20, down=90))
    encoder = EncoderConfig(dim=256, blocks=(wide, low_rank), depth_map=(0, 1, 0), positions=None)
    config = ModelConfig(family="test", frontend=None, projection=ProjectionConfig(feature_dim=7), encoder=encoder)
    model = build_model(config, generator())
    small = quantize(model, Quantization(kind=kind))
    sslim.save_model(model, tmp_path / "whole")
    sslim.save_model(small, tmp_path / "small")
    assert bytes_of(tmp_path / "small") < share * bytes_of(tmp_path / "whole")
    again = sslim.load_model(tmp_path / "small")
    assert again.config == small.config
    assert again.provenance == small.provenance
    x = torch.randn(2, 9, 7, generator=generator())
    with torch.inference_mode():
        want, got, whole = (m.encode_features(x, torch.tensor([9, 6])) for m in (small, again, model))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got.layers, want.layers, strict=True))
    assert not torch.equal(got.final, whole.final)
    sslim.save_model(again, tmp_path / "again")
    assert file_digest(tmp_path / "again" / "model.safetensors") == file_digest(tmp_path / "small" / "model.safetensors")


def test_a_folder_without_storage_is_float32_and_storage_is_checked(tmp_path):
    model = tiny()
    sslim.save_model(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "model.json").read_text())["config"]
    assert "storage" not in config  # as in folders from before there was a choice
    assert sslim.load_model(tmp_path / "m").config.storage is None
    rewrite(tmp_path / "m", config={**config, "storage": "int8-dynamic"})
    with pytest.raises(CheckpointError, match=r"lacks encoder\.blocks\.0\.attention\.key\.scale"):
        sslim.load_model(tmp_path / "m")
    rewrite(tmp_path / "m", config={**config, "storage": "int4"})
    with pytest.raises(ValueError, match=r"config\.storage: int4"):
        sslim.load_model(tmp_path / "m")
    small = quantize(model, Quantization(kind="int8-weights"))
    state = small.state_dict()
    assemble(small.config, state, [], source="s")  # the control
    name = "encoder.blocks.0.attention.query.weight"
    with pytest.raises(CheckpointError, match=rf"s: {name} holds torch\.float32, expected torch\.int8"):
        assemble(small.config, {**state, name: state[name].float()}, [], source="s")
    with pytest.raises(CheckpointError, match=rf"s: {name} holds torch\.int32, expected torch\.int8"):
        assemble(small.config, {**state, name: state[name].int()}, [], source="s")
    with pytest.raises(CheckpointError, match=r"holds torch\.int8, expected floating-point numbers"):
        assemble(model.config, {**model.state_dict(), name: state[name]}, [], source="s")


def test_weights_that_outgrew_fp16_are_not_saved(tmp_path):
    small = quantize(tiny(), Quantization(kind="fp16"))
    sslim.save_model(small, tmp_path / "m")
    with torch.no_grad():
        small.projection.linear.bias[0] = 1e6
    with pytest.raises(ValueError, match=r"projection\.linear\.bias reaches 1e\+06, which fp16 cannot hold"):
        sslim.save_model(small, tmp_path / "m")
    assert sslim.load_model(tmp_path / "m").projection.linear.bias.abs().max() < 1
