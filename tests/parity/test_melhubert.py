"""MelHuBERT files of every generation compute what the reference computed: 1e-5 on real frames."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sslim
from sslim.batch import Padded

ASSETS = Path(__file__).parent / "assets"
LEGACY = {
    "pretrain": "pretrain",
    "weight_pruned": "weight_pruned",
    "head_pruned_l1": "head_pruned_l1",
    "head_pruned_dd": "head_pruned_dd",
    "row_pruned": "row_pruned",
    "distilled": "distilled",
    "synth_s3prl_2022": "pretrain",
    "synth_standalone_2022_07_Model_key": "pretrain",
    "synth_s3prl_2022_weightpruned_floatmask_nobias": "weight_pruned",
}
GOLDEN = [
    *("melhubert_10ms", "melhubert_20ms", "melhubert_20ms_old_config_key"),
    *("weight_pruned", "head_pruned_l1", "head_pruned_data_driven", "row_pruned", "distilled"),
]
TOLERANCE = 1e-5


def largest(got, want, valid=None):
    difference = (got - torch.as_tensor(want)).abs()
    return float(difference.max() if valid is None else difference[valid].max())


def legacy_differences(model, expected):
    """Largest difference of every stored output, by name."""
    inputs = {name: torch.from_numpy(array) for name, array in np.load(ASSETS / "melhubert_legacy" / "input.npz").items()}
    real = inputs["pad_mask"].bool()
    features = Padded(values=inputs["feat"], lengths=real.sum(1))
    head = model.heads["masked_prediction"]
    hidden = inputs["mask"] & real
    with torch.inference_mode():
        out = model.encode_features(features.values, features.lengths)
        masked = model.encode_features(features.values.masked_fill(inputs["mask"][..., None], 0.0), features.lengths)
        logits = head(masked.final)[hidden]
        differences = {"logits_unmasked": largest(head(out.final), expected["logits_unmasked"], real)}
    for k, state in enumerate(expected["hidden_states"]):
        differences[f"hidden_states[{k}]"] = largest(out.layers[k] if k else out.embed, state, real)
    differences["last"] = largest(out.final, expected["last"], real)
    differences["masked_last"] = largest(masked.final, expected["masked_last"], real)
    differences["masked_logits"] = largest(logits, expected["masked_logits"])
    differences["masked_loss"] = largest(
        torch.nn.functional.cross_entropy(logits, inputs["label"][hidden]), expected["masked_loss"]
    )
    return differences


@pytest.mark.parametrize("name", LEGACY)
def test_legacy_layouts_compute_the_same(name):
    expected = np.load(ASSETS / "melhubert_legacy" / f"{LEGACY[name]}.npz")
    model = sslim.load_model(ASSETS / "melhubert_legacy" / f"{name}.ckpt")
    differences = legacy_differences(model, expected)
    assert len(differences) == len(expected["hidden_states"]) + 5
    assert max(differences.values()) <= TOLERANCE, differences


def test_a_perturbed_weight_is_noticed():
    expected = np.load(ASSETS / "melhubert_legacy" / "pretrain.npz")
    for name in ("projection.linear.weight", "encoder.blocks.2.feedforward.down.bias", "encoder.positions.gain"):
        model = sslim.load_model(ASSETS / "melhubert_legacy" / "pretrain.ckpt")
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] += 1e-3
        assert max(legacy_differences(model, expected).values()) > TOLERANCE, name


def compare_stored(model, gold, prefix):
    real = gold[f"{prefix}.pad_mask"].bool()
    with torch.inference_mode():
        out = model.encode_features(gold[f"{prefix}.feat"], real.sum(1))
    differences = {
        "embed": largest(out.embed, gold[f"{prefix}.projected"], real),
        "final": largest(out.final, gold[f"{prefix}.last"], real),
    }
    for k in range(1, len(out.layers)):
        differences[f"layers[{k}]"] = largest(out.layers[k], gold[f"{prefix}.hidden{k - 1}"], real)
    assert f"{prefix}.hidden{len(out.layers) - 1}" not in gold
    if f"{prefix}.logits" in gold:
        with torch.inference_mode():
            differences["logits"] = largest(model.heads["masked_prediction"](out.final), gold[f"{prefix}.logits"], real)
    return differences


def test_10_ms_model_computes_the_same():
    gold = load_file(ASSETS / "melhubert" / "melhubert_10ms.safetensors")
    model = sslim.load_model(ASSETS / "melhubert" / "melhubert_10ms.ckpt")
    differences = compare_stored(model, gold, "single")
    assert "logits" in differences
    assert max(differences.values()) <= TOLERANCE, differences
    assert model.frontend.frame_shift_s == pytest.approx(0.01)


def test_waveform_to_representation_with_supplied_statistics(tmp_path):
    """The whole path, front-end included, from the same waveform that the reference was given."""
    gold = load_file(ASSETS / "melhubert" / "melhubert_10ms.safetensors")
    np.save(tmp_path / "mean-std.npy", torch.stack([gold["mean"], gold["std"]]).double().numpy())
    model = sslim.load_model(ASSETS / "melhubert" / "melhubert_10ms.ckpt", statistics=tmp_path / "mean-std.npy")
    with torch.inference_mode():
        out = model.encode(gold["wav0"][None])
    assert out.final.shape == gold["single.last"].shape
    assert largest(out.final, gold["single.last"]) < 1e-3
    wrong = sslim.load_model(ASSETS / "melhubert" / "melhubert_10ms.ckpt", statistics="libri-960")
    with torch.inference_mode():
        assert largest(wrong.encode(gold["wav0"][None]).final, gold["single.last"]) > 1e-2


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_compute_the_same(name, shared_golden):
    gold = load_file(shared_golden / "melhubert" / f"{name.replace('_old_config_key', '')}.safetensors")
    model = sslim.load_model(shared_golden / "melhubert" / f"{name}.ckpt")
    for prefix in ("single", "batch"):
        differences = compare_stored(model, gold, prefix)
        assert max(differences.values()) <= TOLERANCE, differences


def test_every_golden_file_is_in_the_list(shared_golden):
    assert sorted(path.stem for path in (shared_golden / "melhubert").glob("*.ckpt")) == sorted(GOLDEN)
    assert sorted(path.stem for path in (shared_golden / "melhubert_legacy").glob("*.ckpt")) == sorted(LEGACY)
