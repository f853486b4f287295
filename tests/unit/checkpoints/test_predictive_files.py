"""S3PRL's APC, VQ-APC and NPC files of every layout: outputs of the equations, refusals, front-ends, and the way back."""

import copy

import pytest
import torch

import sslim
from predictive_oracles import AUDIO, apc_file, npc_file, old_apc_file, run_apc, run_npc, run_old_apc
from sslim.checkpoints import CheckpointError
from sslim.checkpoints.exporters import export_s3prl
from sslim.commands import export
from sslim.frontends import FilterbankConfig, NormalizationConfig, SpectralFrontendConfig
from sslim.models import build_model, with_head
from sslim.models.predictive import apc, npc
from sslim.nn.heads import RegressionHeadConfig
from sslim.nn.quantizer import QuantizerConfig

CODES = ((5, 7), (8, 4))
FILES = {
    "apc": (apc_file, run_apc),
    "vq-apc": (lambda: apc_file(codes=CODES), run_apc),
    "npc": (npc_file, run_npc),
    "npc, bare": (lambda: npc_file(codes=None, batch_norm=False, num_blocks=2), run_npc),
}


def saved(contents, path):
    torch.save(contents, path)
    return path


def weights_of(contents):
    return contents.get("model", contents)


def frames(width, length=23):
    return torch.randn(length, width, generator=torch.Generator().manual_seed(1))


def compare(model, states, estimate, x_TF, first=1):
    with torch.inference_mode():
        output = model.encode_features(x_TF[None])
        (head,) = model.heads.values()
        torch.testing.assert_close(head(output.final)[0], estimate, atol=1e-5, rtol=1e-5)
    assert len(output.layers) == len(states) + first
    for layer, state in zip(output.layers[first:], states, strict=True):
        torch.testing.assert_close(layer[0], state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FILES)
def test_layers_and_estimates_are_those_of_the_equations(name, tmp_path):
    make, run = FILES[name]
    contents = make()
    model = sslim.load_model(saved(contents, tmp_path / "file.ckpt"))
    x_TF = frames(80)
    compare(model, *run(contents["model"], x_TF), x_TF)
    assert torch.equal(model.encode_features(x_TF[None]).layers[0][0], x_TF)
    assert model.config.family == name.removesuffix(", bare")
    quantised = "vq" in contents["config"]["model"]["paras"]
    with torch.inference_mode():
        output = model.encode_features(x_TF[None])
    assert torch.equal(output.final, output.layers[-1]) != quantised


@pytest.mark.parametrize("prenet", [(), (12,), (20, 12)])
def test_old_files_take_features_from_outside(prenet, tmp_path):
    contents = old_apc_file(prenet=prenet)
    model = sslim.load_model(saved(contents, tmp_path / "apc.pt"))
    x_TF = frames(40)
    compare(model, *run_old_apc(contents, x_TF), x_TF, first=0 if prenet else 1)
    assert model.config.encoder.prenet_dims == prenet
    assert {"frontend", "residual", "dropout"} <= model.provenance[0].keys()
    with pytest.raises(ValueError, match="takes features, not waveforms"):
        model.encode(torch.zeros(1, 16000))


def test_the_first_layer_has_a_residual_in_old_files_alone(tmp_path):
    contents = old_apc_file(width=12)
    x_TF = frames(12)
    compare(sslim.load_model(saved(contents, tmp_path / "old.pt")), *run_old_apc(contents, x_TF), x_TF)
    new = apc_file(width=12, audio=AUDIO | {"feat_dim": 12})
    with pytest.raises(CheckpointError, match="first layer has no residual"):
        sslim.load_model(saved(new, tmp_path / "new.ckpt"))
    new["config"]["model"]["paras"]["residual"] = False
    model = sslim.load_model(saved(new, tmp_path / "plain.ckpt"))
    compare(model, *run_apc(new["model"], x_TF, residual=False), x_TF)


def test_upstream_config_holds_the_settings_too(tmp_path):
    contents = apc_file()
    renamed = {"Upstream_Config": contents["config"], "Config": {"runner": {}}, "Step": 7, "model": contents["model"]}
    model = sslim.load_model(saved(renamed, tmp_path / "states.ckpt"))
    assert model.config == sslim.load_model(saved(contents, tmp_path / "file.ckpt")).config
    assert model.provenance[0]["step"] == 7


@pytest.mark.parametrize(
    "make", [apc_file, lambda: apc_file(codes=CODES), npc_file, old_apc_file, lambda: old_apc_file(prenet=(9,))]
)
def test_every_tensor_is_needed_and_none_is_ignored(make, tmp_path):
    contents = make()
    names = list(weights_of(contents))
    for name in names:
        lacking = copy.deepcopy(contents)
        del weights_of(lacking)[name]
        with pytest.raises(CheckpointError):
            sslim.load_model(saved(lacking, tmp_path / "lacking.ckpt"))
    weights_of(contents)["rnns.extra"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match=r"'rnns\.extra'"):
        sslim.load_model(saved(contents, tmp_path / "extra.ckpt"))


def changed(contents, value, *keys):
    changed = copy.deepcopy(contents)
    inner = changed
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return changed


PARAS = ("config", "model", "paras")
REFUSED = {
    "units": (apc_file, 99, (*PARAS, "hidden_size"), "hidden_size is 99, its tensors say 12"),
    "layers": (apc_file, 2, (*PARAS, "num_layers"), "num_layers is 2, its tensors say 3"),
    "features": (apc_file, 40, ("config", "data", "audio", "feat_dim"), "make 40 features, its tensors take 80"),
    "codes": (apc_file, {"codebook_size": [4], "code_dim": [9]}, (*PARAS, "vq"), r"code_dims \(9,\) add up to 9"),
    "no codes": (apc_file, {"codebook_size": 4}, (*PARAS, "vq"), "expected codebook_size and code_dim as lists"),
    "missing codes": (
        apc_file, {"codebook_size": [4], "code_dim": [12], "gumbel_temperature": 1}, (*PARAS, "vq"), "lacks .*codes",
    ),
    "codes without settings": (
        lambda: apc_file(codes=CODES), None, (*PARAS, "vq"), "has .*groups.*, which its description has no place",
    ),
    "blocks": (npc_file, 3, (*PARAS, "n_blocks"), "n_blocks is 3, its tensors say 4"),
    "taps": (npc_file, 13, (*PARAS, "kernel_size"), r"kernel 13 and mask 5 must be odd, and kernel larger than .* 13"),
    "mask": (npc_file, 3, (*PARAS, "mask_size"), r"conv_mask does not hide the 5 middle taps of 15"),
    "another mask": (
        npc_file, torch.ones(12, 12, 15), ("model", "masked_convs.1.conv_mask"), "masked_convs.1.conv_mask does not hide",
    ),
    "no cross layers": (npc_file, True, (*PARAS, "disable_cross_layer"), "disable_cross_layer is true"),
    "bottleneck": (npc_file, 16, (*PARAS, "dim_bottleneck"), "dim_bottleneck is 16"),
    "activation": (npc_file, "gelu", (*PARAS, "activate"), "activate is 'gelu', expected one of relu, tanh"),
    "NaN": (npc_file, torch.full((80,), float("nan")), ("model", "postnet.bias"), "postnet.bias holds NaN"),
    "wide postnet": (old_apc_file, torch.zeros(40, 12, 3), ("postnet.layer.weight",), "has 3 taps, expected 1"),
    "gap": (old_apc_file, torch.zeros(3), ("rnns.7.bias_ih_l0",), r"has rnns \[0, 1, 2, 7\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_itself_is_refused_in_one_sentence(case, tmp_path):
    make, value, keys, sentence = REFUSED[case]
    with pytest.raises(CheckpointError, match=sentence):
        sslim.load_model(saved(changed(make(), value, *keys), tmp_path / "file.ckpt"))


def frontend_of(audio, tmp_path):
    model = sslim.load_model(saved(apc_file(audio=audio), tmp_path / "file.ckpt"))
    return model.config.frontend, model.provenance[0]["frontend"]


def test_the_front_end_is_that_of_the_settings(tmp_path):
    utterance = NormalizationConfig(kind="utterance", unbiased=True, eps=1e-10)
    whole = SpectralFrontendConfig(features=FilterbankConfig(num_mel_bins=80, window="hamming"), normalization=utterance)
    assert frontend_of(AUDIO, tmp_path)[0] == whole
    frontend, note = frontend_of({"frame_length": 25, "frame_shift": 10}, tmp_path)  # S3PRL took the others out of it
    assert frontend == whole
    assert "feat_type and feat_dim are not in them" in note
    plain, _ = frontend_of(AUDIO | {"cmvn": False, "frame_shift": 5, "use_log_fbank": False}, tmp_path)
    assert plain.normalization.kind == "none"
    assert (plain.features.frame_shift_ms, plain.features.log) == (5, False)


@pytest.mark.parametrize(
    ("audio", "reason"),
    [
        (None, "no data.audio"),
        (AUDIO | {"feat_type": "mfcc"}, "feat_type 'mfcc'"),
        (AUDIO | {"decode_wav": True, "cmvn": False}, "decode_wav"),
        (AUDIO | {"dither": 1.0}, "dither"),
        (AUDIO | {"window_type": "povey"}, "window_type"),
        (AUDIO | {"vtln_warp": 1.1}, "vtln_warp"),
    ],
)
def test_settings_of_other_features_leave_a_model_without_front_end(audio, reason, tmp_path):
    frontend, note = frontend_of(audio, tmp_path)
    assert frontend is None
    assert reason in note


@pytest.mark.parametrize("name", FILES)
def test_a_file_comes_back_as_it_was(name, tmp_path):
    contents = FILES[name][0]()
    model = sslim.load_model(saved(contents, tmp_path / "file.ckpt"))
    export_s3prl(model, tmp_path / "back.ckpt")
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)
    assert back["config"] == contents["config"]
    assert back["model"].keys() == contents["model"].keys()
    for key, tensor in contents["model"].items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(back["model"][key], tensor), key
    again = sslim.load_model(tmp_path / "back.ckpt")
    assert again.config == model.config


def test_the_presets_are_exported_with_as_many_tensors_as_the_reference_has(tmp_path):
    export_s3prl(build_model(npc(dim=16, codes=QuantizerConfig(num_codes=(4,) * 4, code_dims=(4,) * 4))), tmp_path / "npc.ckpt")
    assert len(torch.load(tmp_path / "npc.ckpt", weights_only=True)["model"]) == 82
    export_s3prl(build_model(apc(dims=(16,) * 3)), tmp_path / "apc.ckpt")
    assert len(torch.load(tmp_path / "apc.ckpt", weights_only=True)["model"]) == 14


UNSAYABLE = {
    "sizes": (lambda: apc(dims=(16, 12)), "its layers have 16, 12 units"),
    "pre-net": (lambda: apc(dims=(16, 16), prenet_dims=(16,)), "it has a pre-net"),
    "outside": (lambda: apc(dims=(16,), feature_dim=40), "it has no front-end"),
    "residual": (lambda: apc(dims=(80,)), "its first layer has a residual"),
    "povey": (
        lambda: apc(dims=(16,), frontend=SpectralFrontendConfig(features=FilterbankConfig())),
        "its front-end is not Kaldi's filterbank with a Hamming",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSAYABLE)
def test_what_the_layout_cannot_say_is_refused(case, tmp_path):
    make, reason = UNSAYABLE[case]
    with pytest.raises(ValueError, match=f"cannot express this model: {reason}"):
        export_s3prl(build_model(make()), tmp_path / "file.ckpt")
    assert not list(tmp_path.iterdir())


def test_another_head_is_refused_and_the_command_writes_what_can_be_said(tmp_path, capsys):
    model = build_model(apc(dims=(16,)))
    crowded = with_head(model, "other", RegressionHeadConfig(output_dim=3))
    with pytest.raises(ValueError, match=r"and no other, it has autoregressive \(regression\), other"):
        export_s3prl(crowded, tmp_path / "file.ckpt")
    sslim.save_model(model, tmp_path / "model")
    export.main(export.Options(model=tmp_path / "model", output=tmp_path / "file.ckpt", format="s3prl"))
    assert "s3prl, 6,064 parameters" in capsys.readouterr().out
    assert sslim.load_model(tmp_path / "file.ckpt").config == model.config
    for other in ("huggingface", "melhubert"):
        with pytest.raises(ValueError, match=r"cannot (hold|express) this model|needs a Transformer"):
            export.main(export.Options(model=tmp_path / "model", output=tmp_path / "other", format=other))
