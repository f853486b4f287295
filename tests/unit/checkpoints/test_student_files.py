"""DistilHuBERT and DistilALHuBERT files at the edges: pickled schedules, leftovers, head variants, settings that do not fit."""

import argparse
import copy
import sys
import types

import pytest
import torch

import sslim
from reference_layouts import distilalhubert_file, distilhubert_file, output_layer_shapes, shapes, waves
from sslim.checkpoints import CheckpointError
from sslim.checkpoints.importers import distilalhubert, distilhubert
from sslim.models import SpeechModel
from sslim.nn.heads import SplitHeadConfig


def load(contents, tmp_path):
    torch.save(contents, tmp_path / "file.ckpt")
    return sslim.load_model(tmp_path / "file.ckpt")


def changed(contents, key, *, drop=(), **weights):
    contents = copy.deepcopy(contents)
    for name in drop:
        del contents[key][name]
    contents[key] |= {name.replace("__", "."): tensor for name, tensor in weights.items()}
    return contents


@pytest.mark.parametrize("module", ["optimizers", "src.optimizers", "s3prl.optimizers"])
def test_files_with_a_pickled_schedule_load_without_its_module(module, tmp_path, monkeypatch):
    schedule = type("WarmupLinearSchedule", (), {"__module__": module})
    parts = module.split(".")
    for name in (".".join(parts[: n + 1]) for n in range(len(parts))):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[module].WarmupLinearSchedule = schedule
    value = schedule()
    value.warmup, value.t_total = 0.07, 200_000
    contents = distilalhubert_file() | {
        "Optimizer": {"state": {}, "param_groups": [{"schedule": value, "lr": 2e-4}]},
        "Args": argparse.Namespace(upstream="alhubert"),
        "Runner": {"schedule": value},  # outside what is skipped: it has to come through as a placeholder
    }
    torch.save(contents, tmp_path / "file.ckpt")
    monkeypatch.undo()
    model = sslim.load_model(tmp_path / "file.ckpt")
    plain = load(distilalhubert_file(), tmp_path)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert model.provenance[0]["format"] == "DistilALHuBERT"
    assert model.provenance[0]["step"] == 99


@pytest.mark.parametrize(("num_layers", "repeats"), [(2, 6), (3, 4), (4, 3)])
def test_the_stack_runs_over_and_over(num_layers, repeats, tmp_path):
    model = load(distilalhubert_file(encoder_layers=num_layers, repeat_time=repeats), tmp_path)
    assert model.config.encoder.depth_map == tuple(range(num_layers)) * repeats
    assert len(model.encoder.blocks) == num_layers
    with torch.inference_mode():
        assert len(model.encode(*waves()).layers) == 13


def test_the_three_leftovers_are_dropped_by_name_and_nothing_else(tmp_path):
    leftovers = {
        "label_embs_concat": torch.ones(5, 8),
        "final_proj__weight": torch.ones(8, 48),
        "final_proj__bias": torch.ones(8),
    }
    model = load(changed(distilalhubert_file(), "alhubert", **leftovers), tmp_path)
    assert model.num_parameters() == 65_760
    assert sorted(model.provenance[0]["dropped"]) == ["final_proj.bias", "final_proj.weight", "label_embs_concat"]
    with pytest.raises(CheckpointError, match=r"'final_proj\.scale'.*no part of a DistilALHuBERT"):
        load(changed(distilalhubert_file(), "alhubert", final_proj__scale=torch.ones(1)), tmp_path)
    with pytest.raises(CheckpointError, match=r"'label_embs_concat'.*no part of a DistilHuBERT"):
        load(changed(distilhubert_file(), "Distiller", label_embs_concat=torch.ones(5, 8)), tmp_path)


def test_unknown_settings_are_ignored_and_the_training_normalisation_is_noted(tmp_path):
    model = load(distilalhubert_file(use_ce=True, mse_distil_start_step=3, normalize=True), tmp_path)
    plain = load(distilalhubert_file(), tmp_path)
    assert model.config == plain.config
    assert "zero mean" in model.provenance[0]["normalize"]
    assert "normalize" not in plain.provenance[0]
    assert model.provenance[0]["settings"]["alhubert"]["use_ce"] is True


def test_features_as_wide_as_the_model_need_no_projection(tmp_path):
    contents = distilalhubert_file(
        extractor_conv_feature_layers="[(48,10,5)] + [(48,3,2)] * 4 + [(48,2,2)] * 2", repeat_time=1, conv_pos_groups=16
    )
    table = shapes(channels=48, dim=48, units=96, num_layers=2, kernel=16)
    contents["alhubert"] = {name: torch.randn(shape) for name, shape in table.items()}
    model = load(contents, tmp_path)
    assert not model.config.projection.linear
    with torch.inference_mode():
        assert bool(model.encode(*waves()).final.isfinite().all())
    contents["alhubert"]["post_extract_proj.weight"] = torch.randn(48, 48)
    with pytest.raises(CheckpointError, match="projection"):
        load(contents, tmp_path)


@pytest.mark.parametrize("num_tasks", [1, 2, 3])
def test_prediction_heads(num_tasks, tmp_path):
    """Each task's output is its own two-layer map, written out with the foreign tensors."""
    contents = distilhubert_file(num_tasks, pred_layer_id=[4, 8, 12][-num_tasks:])
    model = load(contents, tmp_path)
    assert model.config.heads == {"distillation": SplitHeadConfig(num_tasks=num_tasks, hidden_dim=48, output_dim=48)}
    assert model.provenance[0]["estimated_teacher_layers"] == [4, 8, 12][-num_tasks:]
    assert not model.config.projection.norm
    weights, x_BTD = contents["Distiller"], torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        got_BNTO = model.heads["distillation"](x_BTD)
        hidden = torch.nn.functional.gelu(x_BTD @ weights["output_layer.0.weight"].T + weights["output_layer.0.bias"])
        for task in range(num_tasks):
            own = hidden[..., 48 * task : 48 * (task + 1)]
            if num_tasks == 1:
                want = own @ weights["output_layer.2.layer.weight"].T + weights["output_layer.2.layer.bias"]
            else:
                want = own @ weights["output_layer.2.weight"][task] + weights["output_layer.2.bias"][0, 0, task]
            torch.testing.assert_close(got_BNTO[:, task], want, rtol=0, atol=1e-5)


def test_a_file_whose_heads_were_taken_off_loads_without_them(tmp_path):
    heads = list(output_layer_shapes(3))
    assert load(changed(distilhubert_file(), "Distiller", drop=heads), tmp_path).config.heads == {}
    for missing in heads:
        with pytest.raises(CheckpointError, match=r"heads\.distillation"):
            load(changed(distilhubert_file(), "Distiller", drop=[missing]), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_emb_type": "concat"}, r"task_emb_type is 'concat', expected one of expand-last"),
        ({"attention_type": "sparse"}, r"attention_type is 'sparse', expected one of original"),
        ({"out_layer_type": "self-hidden"}, r"out_layer_type is 'self-hidden', expected one of expand-last"),
        ({"pred_layer_id": [4, 12]}, r"pred_layer_id is \[4, 12\], expected the layers of n_tasks 3"),
        ({"encoder_attention_heads": 5}, r"5 heads do not divide its width 48"),
        ({"extractor_conv_feature_layers": "__import__('os')"}, r"convolution layers are"),
        ({"extractor_mode": "batch"}, r"extractor_mode is 'batch', expected one of default, layer_norm"),
        ({"final_dim": 47}, r"heads\.distillation\.bias has shape"),
    ],
)
def test_what_does_not_fit_is_one_sentence(settings, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as error:
        load(distilhubert_file(**settings), tmp_path)
    assert "\n" not in str(error.value)


def test_more_layers_in_the_settings_than_in_the_tensors(tmp_path):
    contents = distilhubert_file()
    contents["Config"]["distiller"]["encoder_layers"] = 3
    with pytest.raises(CheckpointError, match="encoder_layers is 3, its tensors have 2 layers"):
        load(contents, tmp_path)


FULL = {"extractor_mode": "default", "conv_pos": 128, "conv_pos_groups": 16}
HEADS = [(0, 23_491_200, 48), (2, 25_853_568, 52), (3, 27_034_752, 52)]


@pytest.mark.parametrize(("num_tasks", "count", "tensors"), HEADS)
def test_full_size_distilhubert_names_and_shapes(num_tasks, count, tensors):
    """The specification's table, on the meta device."""
    table = shapes(num_layers=2, norm=False, mask=False) | (output_layer_shapes(num_tasks) if num_tasks else {})
    assert len(table) == tensors
    settings = FULL | {"encoder_layers": 2, "n_tasks": num_tasks or 12, "pred_layer_id": [4, 8, 12][-num_tasks:]}
    check_full_size(distilhubert, {"Config": {"distiller": settings}, "Distiller": table}, "Distiller", count)


@pytest.mark.parametrize(
    ("sizes", "count", "tensors"),
    [
        ({"encoder_layers": 2}, 23_492_992, 51),
        ({"encoder_layers": 3}, 30_580_864, 67),
        ({"encoder_layers": 4}, 37_668_736, 83),
        ({"encoder_layers": 2, "extractor_mode": "layer_norm", "encoder_embed_dim": 1024}, 38_318_208, 63),
    ],
)
def test_full_size_distilalhubert_names_and_shapes(sizes, count, tensors):
    dim = sizes.get("encoder_embed_dim", 768)
    settings = (
        FULL | {"encoder_ffn_embed_dim": 4 * dim, "encoder_attention_heads": dim // 64, "layer_norm_first": False} | sizes
    )
    table = shapes(num_layers=settings["encoder_layers"], dim=dim, units=4 * dim, conv_norm=settings["extractor_mode"])
    assert len(table) == tensors
    check_full_size(distilalhubert, {"Config": {"alhubert": settings}, "alhubert": table}, "alhubert", count)


def check_full_size(importer, contents, key, count):
    """A file of these names and shapes converts to a description whose model has just these tensors."""
    weights = {name: torch.zeros((), dtype=torch.float32).expand(shape) for name, shape in contents[key].items()}
    imported = importer.convert({**contents, key: weights}, "file")
    with torch.device("meta"):
        model = SpeechModel(imported.config)
    assert {name: tensor.shape for name, tensor in imported.state.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    assert model.num_parameters() == count
