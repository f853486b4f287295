"""S3PRL's containers of every era, their settings and front-ends; what contradicts itself is refused; export."""

import argparse
import copy
from dataclasses import replace

import pytest
import torch

import sslim
from sslim.checkpoints import CheckpointError
from sslim.checkpoints.exporters import export_s3prl
from sslim.commands import export
from sslim.frontends import FilterbankConfig, MfccConfig, NormalizationConfig, SpectralFrontendConfig, StftConfig
from sslim.models import build_model
from sslim.models.reconstruction import aalbert, filterbank_frontend, log_mel_frontend, mockingjay, reconstruction_model, tera
from sslim.nn.encoder import LinearRanks

DIM, UNITS = 16, 24
SIZES = {"dim": DIM, "num_heads": 2, "feedforward_dim": UNITS}
TRANSFORMER = {
    "hidden_size": DIM,
    "num_attention_heads": 2,
    "intermediate_size": UNITS,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": "1e-12",
}
ONLINE = {
    "target_level": -25,
    "win_ms": 25,
    "hop_ms": 10,
    "n_freq": 201,
    "n_mels": 80,
    "n_mfcc": 13,
    "input": {"feat_type": "mel", "channel": 0, "log": True, "delta": 0, "cmvn": True},
    "target": {"feat_type": "linear", "channel": 1, "log": True, "delta": 0, "cmvn": True},
}
KALDI = {
    "kaldi": {
        "feat_type": "fbank",
        "fbank": {"frame_length": 25.0, "frame_shift": 10.0, "num_mel_bins": 80, "use_log_fbank": True},
        "mfcc": {"frame_length": 25.0, "frame_shift": 10.0, "num_mel_bins": 80, "num_ceps": 13},
    },
    "delta": {"order": 2, "win_length": 5},
    "cmvn": {"use_cmvn": True},
}


def tensors(width, *, num_layers=2, target=None, shared=False, pre_norm=0):
    """``Transformer`` and ``SpecHead`` by S3PRL's names; ``pre_norm`` is the number of norms of states."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    state = {"input_representations.spec_transform.weight": draw(DIM, width)}
    state |= {"input_representations.spec_transform.bias": draw(DIM)}
    norms = ["input_representations.LayerNorm"]
    for i in range(num_layers):
        layer = f"encoder.layer.{i}."
        maps = [(f"attention.self.{name}", DIM, DIM) for name in ("query", "key", "value")]
        maps += [("attention.output.dense", DIM, DIM), ("intermediate.dense", UNITS, DIM), ("output.dense", DIM, UNITS)]
        for name, out, inner in maps:
            state |= {f"{layer}{name}.weight": draw(out, inner), f"{layer}{name}.bias": draw(out)}
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
    norms += [f"encoder.LayerNorm.{j}" for j in range(pre_norm)]
    for name in norms:
        state |= {f"{name}.weight": draw(DIM), f"{name}.bias": draw(DIM)}
    for i in range(num_layers):
        for name in [name for name in state if name.startswith(f"encoder.layer.{i}.")]:
            if shared:
                state[name] = state[name.replace(f"layer.{i}", "layer.0")].clone()
            if pre_norm and "output.LayerNorm" in name:
                alias = name.replace("attention.output.LayerNorm", "attention.LayerNorm").replace(
                    ".output.LayerNorm", ".LayerNorm"
                )
                state[alias] = state[name]
    head = {"dense.weight": draw(DIM, DIM), "dense.bias": draw(DIM), "LayerNorm.weight": draw(DIM), "LayerNorm.bias": draw(DIM)}
    head |= {"output.weight": draw(target or width, DIM), "output.bias": draw(target or width)}
    return {"Transformer": state, "SpecHead": head}


def settings(num_layers=2, **changes):
    return {**TRANSFORMER, "num_hidden_layers": num_layers, **changes}


def v01(width=40, *, online=None, num_layers=2, shape=None, **changes):
    config = {"transformer": settings(num_layers, **changes), "dataloader": {"data_path": "data/libri_fmllr_cmvn"}}
    config |= {"online": online} if online is not None else {}
    contents = tensors(width, num_layers=num_layers, **(shape or {}))
    return {**contents, "Global_step": 7, "Settings": {"Config": config, "Paras": argparse.Namespace(seed=1)}}


def later(width=80, *, audio=None, task=None, num_layers=2, shape=None, upstream="tera", **changes):
    config = {"transformer": settings(num_layers, input_dim=-1, **changes), "task": task or {"sequence_length": 1500}}
    config |= {"audio": audio} if audio is not None else {}
    contents = tensors(width, num_layers=num_layers, **(shape or {}))
    arguments = argparse.Namespace(upstream=upstream)
    return {**contents, "Step": 6, "Args": arguments, "Config": {"runner": {}}, "Upstream_Config": config}


def load(contents, tmp_path, **options):
    torch.save(contents, tmp_path / "file.ckpt")
    return sslim.load_model(tmp_path / "file.ckpt", **options)


def same_tensors(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_three_eras_hold_the_same_model(tmp_path):
    model = load(v01(input_dim=40), tmp_path)
    assert model.config.encoder == tera(feature_dim=40, num_layers=2, **SIZES).encoder
    oldest = v01(input_dim=40)
    oldest["Mockingjay"] = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in oldest.pop("Transformer").items()
    }
    oldest["SpecHead"] = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in oldest["SpecHead"].items()
    }
    oldest["Settings"]["Config"]["mockingjay"] = oldest["Settings"]["Config"].pop("transformer")
    transition = later(40, task={"sequence_length": 0})
    transition["Config"], transition["Runner"] = transition.pop("Upstream_Config"), {"total_steps": 9}
    parallel = v01(input_dim=40)
    parallel["Transformer"] = {f"module.{name}": tensor for name, tensor in parallel["Transformer"].items()}
    for contents, era in ((oldest, "v0.1 or earlier"), (transition, "transition"), (later(40), "later"), (parallel, "v0.1")):
        other = load(contents, tmp_path)
        assert same_tensors(other, model)
        assert other.config.encoder == model.config.encoder
        assert other.provenance[0]["era"].startswith(era)
    assert model.provenance[0]["step"] == 7


def test_a_file_without_its_head_is_a_model_without_one(tmp_path):
    contents = v01()
    del contents["SpecHead"]
    model = load(contents, tmp_path)
    assert model.config.heads == {}
    assert model.encode_features(torch.zeros(1, 5, 40)).final.shape == (1, 5, DIM)


def test_features_from_outside_are_demanded_and_the_note_says_where_from(tmp_path):
    model = load(v01(120, downsample_rate=3, input_dim=40), tmp_path)
    assert model.config.frontend is None
    assert (model.config.projection.feature_dim, model.config.projection.stack) == (40, 3)
    assert "libri_fmllr_cmvn" in model.provenance[0]["frontend"]
    with pytest.raises(ValueError, match="takes features, not waveforms"):
        model.encode(torch.zeros(1, 16000))
    assert model.encode_features(torch.zeros(1, 16, 40)).final.shape == (1, 5, DIM)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, log_mel_frontend()),
        ({"input": {"feat_type": "linear", "log": True, "cmvn": True}}, log_mel_frontend(0)),
        (
            {"input": {"feat_type": "mel", "log": False, "delta": 2, "cmvn": False}, "n_mels": 40, "target_level": -20},
            SpectralFrontendConfig(
                features=StftConfig(num_mel_bins=40, log=False, level_db=-20.0), deltas=2, stack_tail="drop"
            ),
        ),
        (
            {"input": {"feat_type": "mfcc", "log": False, "delta": 1, "cmvn": True}},
            SpectralFrontendConfig(
                features=StftConfig(num_mel_bins=128, log_offset=1e-6, level_db=-25.0),
                cepstra=13,
                deltas=1,
                normalization=NormalizationConfig(kind="utterance", unbiased=True, eps=1e-10),
                stack_tail="drop",
            ),
        ),
    ],
)
def test_online_features(changes, expected, tmp_path):
    width = {0: 201, 40: 120, 80: 80, 128: 26}[expected.features.num_mel_bins]
    for contents in (v01(width, online={**ONLINE, **changes}), later(width, audio={**ONLINE, **changes})):
        model = load(contents, tmp_path)
        assert model.config.frontend == expected
        assert model.encode(0.1 * torch.randn(1, 16000)).final.shape == (1, 101, DIM)


def test_online_features_are_stacked_by_the_front_end(tmp_path):
    model = load(v01(240, online=ONLINE, downsample_rate=3), tmp_path)
    assert model.config.frontend == log_mel_frontend(stack=3)
    assert (model.config.projection.feature_dim, model.config.projection.stack) == (240, 1)
    assert model.encode(0.1 * torch.randn(1, 16000)).final.shape == (1, 33, DIM)


def test_defaults_that_the_file_does_not_state_are_noted(tmp_path):
    audio = {key: value for key, value in ONLINE.items() if key not in ("target_level", "n_mels")}
    model = load(later(40, audio=audio), tmp_path)
    assert model.config.frontend == log_mel_frontend(40)
    assert "target_level -25 by default, n_mels 40 by default" in model.provenance[0]["frontend"]


@pytest.mark.parametrize(
    ("changes", "width", "expected"),
    [
        ({}, 240, filterbank_frontend(deltas=2)),
        (
            {"delta": {"order": 1, "win_length": 9}, "cmvn": {"use_cmvn": False}},
            160,
            SpectralFrontendConfig(features=FilterbankConfig(num_mel_bins=80), deltas=1, delta_window=4, stack_tail="drop"),
        ),
        (
            {"kaldi": {**KALDI["kaldi"], "feat_type": "mfcc"}},
            39,
            SpectralFrontendConfig(
                features=MfccConfig(filterbank=FilterbankConfig(num_mel_bins=80)),
                deltas=2,
                normalization=NormalizationConfig(kind="utterance", unbiased=True, eps=1e-10),
                stack_tail="drop",
            ),
        ),
        (
            {"kaldi": {"fbank": {"window_type": "hanning", "snip_edges": False, "low_freq": 60, "high_freq": -400}}},
            69,
            filterbank_frontend(23, deltas=2),
        ),
    ],
)
def test_kaldi_features(changes, width, expected, tmp_path):
    model = load(later(width, audio={**KALDI, **changes}), tmp_path)
    if width == 69:
        features = FilterbankConfig(num_mel_bins=23, window="hann", snip_edges=False, low_freq_hz=60.0, high_freq_hz=-400.0)
        expected = SpectralFrontendConfig(features=features, deltas=2, normalization=expected.normalization, stack_tail="drop")
    assert model.config.frontend == expected
    assert model.encode(0.1 * torch.randn(1, 16000)).final.isfinite().all()


@pytest.mark.parametrize(
    ("audio", "named"),
    [
        ({**ONLINE, "input": {"feat_type": "phase"}}, "feat_type 'phase'"),
        ({**ONLINE, "input": {"feat_type": "mfcc", "log": True}}, "feat_type 'mfcc' with log"),
        ({**ONLINE, "input": {"feat_type": "mel", "power": 1}}, "'power'"),
        ({**ONLINE, "eps": 1e-6}, "'eps'"),
        ({"feat_type": "fbank"}, "no input"),
        ({**KALDI, "kaldi": {"feat_type": "spectrogram", "spectrogram": {}}}, "'spectrogram'"),
        ({**KALDI, "kaldi": {**KALDI["kaldi"], "feat_type": ["fbank"]}}, "fbank"),
        ({**KALDI, "kaldi": {"fbank": {"use_energy": True}}}, "use_energy True"),
        ({**KALDI, "kaldi": {"fbank": {"dither": 1.0}}}, "dither 1.0"),
        ({**KALDI, "kaldi": {"fbank": {"vtln_warp": 1.1}}}, "'vtln_warp'"),
        ({**KALDI, "cmvn": {}}, "use_cmvn"),
    ],
)
def test_features_that_sslim_does_not_compute_come_from_outside(audio, named, tmp_path):
    model = load(later(50, audio=audio), tmp_path)
    assert model.config.frontend is None
    assert model.config.projection.feature_dim == 50
    assert named in model.provenance[0]["frontend"]


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        (lambda: later(81, audio=ONLINE), "its settings audio make 80 features, its tensors take 81"),
        (lambda: later(80, audio={**ONLINE, "n_freq": 101}), "its settings audio describe no front-end"),
        (lambda: later(80, audio={**ONLINE, "hop_ms": "ten"}), "its setting hop_ms is 'ten'"),
        (
            lambda: later(80, audio={**ONLINE, "win_ms": 1e9}),
            "its setting win_ms is 1000000000.0, expected a number from 0 to 1000",
        ),
        (lambda: later(80, audio={**ONLINE, "n_freq": 10**6}), "its setting n_freq is 1000000"),
        (
            lambda: later(80, audio={**KALDI, "kaldi": {"fbank": {"frame_length": 1e12}}}),
            r"its setting frame_length is 1000000000000.0, expected a number from 0 to 1000",
        ),
        (
            lambda: later(80, audio={**KALDI, "kaldi": {"fbank": {"num_mel_bins": 10**6}}}),
            "its setting num_mel_bins is 1000000",
        ),
        (lambda: v01(41, downsample_rate=2), "no multiple of downsample_rate 2"),
        (lambda: v01(40, input_dim=80), "input_dim 80 and downsample_rate 1 make 80 features, its tensors take 40"),
        (lambda: v01(40, hidden_size=32), "hidden_size is 32, its tensors say 16"),
        (lambda: v01(40, intermediate_size=32), "intermediate_size is 32, its tensors say 24"),
        (lambda: v01(40, num_attention_heads=3), "num_attention_heads is 3"),
        (lambda: v01(40, hidden_act="tanh"), "hidden_act is 'tanh', expected one of gelu, relu, swish"),
        (lambda: v01(40, share_layer=True), "shares its layers, and encoder.layer.0.* are not equal copies"),
    ],
)
def test_contradictions_are_one_sentence(contents, sentence, tmp_path):
    with pytest.raises(CheckpointError, match=sentence) as error:
        load(contents(), tmp_path)
    assert "\n" not in str(error.value)


def test_layers_that_are_missing_or_too_many(tmp_path):
    contents = v01()
    contents["Settings"]["Config"]["transformer"]["num_hidden_layers"] = 3
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 3, its tensors have layers \[0, 1\]"):
        load(contents, tmp_path)
    both = v01()
    both["Transformer"]["input_representations.LayerNorm.gamma"] = torch.ones(DIM)
    with pytest.raises(CheckpointError, match="has both"):
        load(both, tmp_path)


def test_shared_layers_are_kept_once(tmp_path):
    contents = v01(240, num_layers=3, shape={"shared": True}, share_layer=True, downsample_rate=3)
    model = load(contents, tmp_path)
    assert model.config == aalbert_of_features(3)
    assert model.provenance[0]["shared_layers"].startswith("3 equal copies")
    contents["Settings"]["Config"]["transformer"]["share_layer"] = False  # the tensors tell
    unsaid = load(contents, tmp_path)
    assert same_tensors(unsaid, model)
    assert "does not say so" in unsaid.provenance[0]["shared_layers"]
    contents["Transformer"]["encoder.layer.2.output.dense.bias"][3] += 1e-3
    different = load(contents, tmp_path)
    assert different.config.encoder.depth_map == (0, 1, 2)
    contents["Settings"]["Config"]["transformer"]["share_layer"] = True
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.2\.output\.dense\.bias are not equal copies"):
        load(contents, tmp_path)


def aalbert_of_features(num_layers):
    return reconstruction_model("aalbert", None, feature_dim=80, stack=3, num_layers=num_layers, shared=True, **SIZES)


@pytest.mark.parametrize("num_norms", [2, 3])
def test_pre_norm_files_of_both_kinds(num_norms, tmp_path):
    contents = v01(40, shape={"pre_norm": num_norms}, pre_layer_norm=True)
    model = load(contents, tmp_path)
    assert model.config.encoder == tera(feature_dim=40, num_layers=2, norm_placement="pre", **SIZES).encoder
    last = contents["Transformer"][f"encoder.LayerNorm.{num_norms - 1}.weight"]
    assert torch.equal(model.encoder.final_norm.weight, last)
    assert len(model.provenance[0]["dropped"]) == 2 * (num_norms - 1)
    alias = copy.deepcopy(contents)
    alias["Transformer"]["encoder.layer.1.LayerNorm.bias"] = torch.zeros(DIM)
    with pytest.raises(CheckpointError, match=r"is the second name of encoder\.layer\.1\.output\.LayerNorm\.bias"):
        load(alias, tmp_path)
    contents["Transformer"]["encoder.LayerNorm.7.weight"] = torch.zeros(DIM)
    with pytest.raises(CheckpointError, match=r"has the norms encoder\.LayerNorm\."):
        load(contents, tmp_path)


def test_the_family_is_what_the_training_says(tmp_path):
    assert load(later(upstream="mockingjay"), tmp_path).config.family == "mockingjay"
    assert load(v01(mask_frequency=8), tmp_path).config.family == "tera"
    assert load(v01(mask_frequency=0, noise_proportion=0.15), tmp_path).config.family == "tera"
    model = load(v01(mask_frequency=0, noise_proportion=0.0), tmp_path)
    assert model.config.family == "mockingjay"
    assert "masks in time alone" in model.provenance[0]["family"]


def test_pruned_heads_are_read_off_the_tensors(tmp_path):
    contents = v01()
    state = contents["Transformer"]
    for name in ("query", "key", "value"):
        for part in ("weight", "bias"):
            state[f"encoder.layer.1.attention.self.{name}.{part}"] = state[f"encoder.layer.1.attention.self.{name}.{part}"][:8]
    weight = "encoder.layer.1.attention.output.dense.weight"
    state[weight] = state[weight][:, :8].clone()
    assert [block.num_heads for block in load(contents, tmp_path).config.encoder.blocks] == [2, 1]


def test_long_inputs_are_cut_under_compat_alone(tmp_path):
    contents = later(40, task={"sequence_length": 50})
    whole, reference = load(contents, tmp_path), load(contents, tmp_path, compat="reference")
    features = torch.randn(1, 120, 40)
    with torch.no_grad():
        expected = torch.cat([whole.encode_features(piece).final for piece in features.chunk(3, dim=1)], dim=1)
        torch.testing.assert_close(reference.encode_features(features).final, expected, rtol=0, atol=1e-5)
        assert (whole.encode_features(features).final - expected).abs().max() > 0.05
    sslim.save_model(whole, tmp_path / "native")  # the limit stays with the model
    again = sslim.load_model(tmp_path / "native", compat="reference")
    with torch.no_grad():
        torch.testing.assert_close(again.encode_features(features).final, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no limit on its inputs"):
        load(later(40, task={"sequence_length": 0}), tmp_path, compat="reference")


def test_limits_of_v01_and_of_stacked_frames(tmp_path):
    limited = load(v01(max_input_length=50), tmp_path)
    assert limited.config.chunking is not None
    assert limited.config.chunking.max_frames == 50
    stacked = load(v01(120, downsample_rate=3, max_input_length=50), tmp_path)
    assert stacked.config.chunking is None
    assert "wrong counts when stacked" in stacked.provenance[0]["long_inputs"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: mockingjay(num_layers=2, stack=3, **SIZES),
        lambda: mockingjay(num_layers=2, frontend=filterbank_frontend(13, deltas=2), **SIZES),
        lambda: tera(num_layers=2, **SIZES),
        lambda: tera(num_layers=2, target_dim=201, **SIZES),
        lambda: tera(num_layers=2, feature_dim=40, norm_placement="pre", **SIZES),
        lambda: aalbert(num_layers=4, **SIZES),
    ],
)
def test_export_and_back(make, tmp_path):
    model = build_model(make(), torch.Generator().manual_seed(0))
    export_s3prl(model, tmp_path / "exported.ckpt")
    again = sslim.load_model(tmp_path / "exported.ckpt")
    assert again.config == model.config
    assert same_tensors(again, model)
    contents = torch.load(tmp_path / "exported.ckpt", weights_only=True)
    assert {name.split(".")[2] for name in contents["Transformer"] if name.startswith("encoder.layer.")} == {
        str(depth) for depth in range(model.num_layers)
    }


def test_what_the_layout_cannot_say_is_refused(tmp_path):
    config = tera(feature_dim=40, num_layers=2, **SIZES)
    first, second = config.encoder.blocks
    encoders = {
        "windows, low-rank": replace(config.encoder, blocks=(first, replace(second, ranks=LinearRanks(up=3)))),
        "1 heads of width 8, not 16": replace(config.encoder, blocks=(replace(first, num_heads=1), second)),
        "differ in their sizes": replace(config.encoder, blocks=(first, replace(second, feedforward_dim=5))),
        "neither one block for each layer": replace(config.encoder, depth_map=(0, 1, 0)),
        "positions are not sinusoids": replace(config.encoder, positions=None),
        "neither its post-norm nor its pre-norm form": replace(config.encoder, final_norm=True),
    }
    broken = {sentence: replace(config, encoder=encoder) for sentence, encoder in encoders.items()}
    broken["may have the head 'reconstruction'"] = replace(config, heads={"other": config.heads["reconstruction"]})
    quiet = log_mel_frontend()
    quiet = replace(quiet, features=replace(quiet.features, level_db=None))
    broken["its front-end is neither"] = tera(frontend=quiet, num_layers=2, **SIZES)
    for sentence, described in broken.items():
        with pytest.raises(ValueError, match=sentence):
            export_s3prl(build_model(described), tmp_path / "no.ckpt")
    assert not list(tmp_path.iterdir())


def test_the_command_exports(tmp_path, capsys):
    sslim.save_model(build_model(tera(num_layers=2, **SIZES)), tmp_path / "model")
    export.main(export.Options(model=tmp_path / "model", output=tmp_path / "exported.ckpt", format="s3prl"))
    assert "s3prl" in capsys.readouterr().out
    assert sslim.load_model(tmp_path / "exported.ckpt").config.family == "tera"
