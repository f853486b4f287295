"""DPHuBERT and DPWavLM files: pruned by the published rules, they compute what the soft-masked whole model computes.

The whole models are transformers' HuBERT and WavLM with random weights; gates are applied to them with hooks and by scaling
columns, and files are made from them by slicing. No file of the authors is here.
"""

import re
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import HubertConfig, HubertModel, WavLMConfig, WavLMModel

import sslim
from sslim.checkpoints import CheckpointError
from sslim.frontends import ConvLayerConfig
from sslim.models import SpeechModel, slice_model
from sslim.models.dphubert import FRONTEND, dphubert
from sslim.nn.relative_positions import RelativePositionsConfig
from sslim.nn.slicing import Units

DIM, HEADS, HEAD_DIM, UNITS, LAYERS, CHANNELS = 24, 4, 6, 20, 3, 10
GEOMETRY = [(10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)]
TOLERANCE = 2e-5
KINDS = {  # WavLM?, layer norms and pre-norm?
    "hubert": (False, False),
    "hubert_large": (False, True),
    "wavlm": (True, False),
    "wavlm_large": (True, True),
}


def whole_model(kind):
    wavlm, large = KINDS[kind]
    sizes = {
        "hidden_size": DIM,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": UNITS,
        "conv_dim": [CHANNELS] * 7,
        "conv_kernel": [kernel for kernel, _ in GEOMETRY],
        "conv_stride": [stride for _, stride in GEOMETRY],
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
        "feat_extract_norm": "layer" if large else "group",
        "do_stable_layer_norm": large,
        "conv_bias": large,
    }
    torch.manual_seed(4)
    if wavlm:
        model = WavLMModel(WavLMConfig(**sizes, num_buckets=12, max_bucket_distance=20))
    else:
        model = HubertModel(HubertConfig(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gru_rel_pos" in name or "rel_attn_embed" in name:
                parameter.normal_(0.0, 1.0)
            elif "parametrizations" not in name:
                parameter.add_(0.15 * torch.randn(parameter.shape))
    return model.eval()


def settings_of(kind):
    wavlm, large = KINDS[kind]
    settings = {
        "extractor_mode": "layer_norm" if large else "group_norm",
        "extractor_conv_layer_config": [(CHANNELS, kernel, stride) for kernel, stride in GEOMETRY],
        "extractor_conv_bias": large,
        "encoder_embed_dim": DIM,
        "encoder_projection_dropout": 0.1,
        "encoder_pos_conv_kernel": 8,
        "encoder_pos_conv_groups": 4,
        "encoder_num_layers": LAYERS,
        "encoder_use_attention": [True] * LAYERS,
        "encoder_use_feed_forward": [True] * LAYERS,
        "encoder_attention_dropout": 0.1,
        "encoder_ff_interm_features": [UNITS] * LAYERS,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.1,
        "encoder_layer_norm_first": large,
        "encoder_layer_drop": 0.05,
        "aux_num_out": None,
        "normalize_waveform": large,
        "extractor_prune_conv_channels": False,
        "encoder_prune_attention_heads": False,
    }
    if wavlm:
        total = {"encoder_total_num_heads": [HEADS] * LAYERS, "encoder_remaining_heads": [list(range(HEADS))] * LAYERS}
        return settings | total | {"encoder_num_buckets": 12, "encoder_max_distance": 20}
    return settings | {"encoder_num_heads": [HEADS] * LAYERS, "encoder_head_dim": HEAD_DIM}


def whole_file(kind):
    """Contents of a file of the unpruned student, with torchaudio's names."""
    state = OrderedDict({"feature_extractor.dummy_weight": torch.ones(CHANNELS)})
    for name, tensor in whole_model(kind).state_dict().items():
        if name == "masked_spec_embed":
            continue
        name = name.replace("parametrizations.weight.original0", "weight_g")
        name = name.replace("parametrizations.weight.original1", "weight_v")
        name = re.sub("^encoder", "encoder.transformer", name)
        state[re.sub("^feature_projection", "encoder.feature_projection", name)] = tensor.clone()
    return {"state_dict": state, "config": settings_of(kind)}


def gates(*, last_conv, removed=True):
    """Soft masks of channels, heads and units; where ``removed``, layer 2 loses its attention and layer 3 its units."""
    generator = torch.Generator().manual_seed(9)

    def mask(size, zeros):
        values = 0.3 + 0.7 * torch.rand(size, generator=generator)
        values[torch.randperm(size, generator=generator)[:zeros]] = 0.0
        return values

    convs = [mask(CHANNELS, 2 + index % 3) for index in range(7)]
    if not last_conv:
        convs[-1] = torch.ones(CHANNELS)
    heads, units = [mask(HEADS, 1 + layer % 2) for layer in range(LAYERS)], [mask(UNITS, 5 + layer) for layer in range(LAYERS)]
    if removed:
        heads[1], units[2] = torch.zeros(HEADS), torch.zeros(UNITS)
    return convs, heads, units


def masked_outputs(kind, masks, wave):
    """Layers of transformers' model under soft masks; the norm after the convolutions sees kept channels only."""
    convs, heads, units = masks
    model = whole_model(kind)
    layer_norm_front = KINDS[kind][1]
    for index, (layer, mask) in enumerate(zip(model.feature_extractor.conv_layers, convs, strict=True)):
        kept = mask > 0
        if layer_norm_front:  # every norm over channels counts the kept ones only
            layer.layer_norm.forward = norm_over(layer.layer_norm, kept)
        layer.register_forward_hook(lambda _, __, output, mask=mask: output * mask[:, None])
        if index == 6:
            norm = model.feature_projection.layer_norm
            norm.forward = norm_over(norm, kept)
    for layer, head_mask, unit_mask in zip(model.encoder.layers, heads, units, strict=True):
        with torch.no_grad():
            layer.attention.out_proj.weight.mul_(head_mask.repeat_interleave(HEAD_DIM))
            layer.feed_forward.output_dense.weight.mul_(unit_mask)
            if not head_mask.any():  # a removed part takes its bias along
                layer.attention.out_proj.bias.zero_()
            if not unit_mask.any():
                layer.feed_forward.output_dense.bias.zero_()
    if layer_norm_front:
        wave = F.layer_norm(wave, wave.shape[-1:])
    with torch.inference_mode():
        outputs = model(wave, output_hidden_states=True)
    return [*outputs.hidden_states[:-1], outputs.last_hidden_state]


def norm_over(norm, kept):
    def forward(x):
        output = torch.zeros_like(x)
        output[..., kept] = F.layer_norm(x[..., kept], (int(kept.sum()),), norm.weight[kept], norm.bias[kept], norm.eps)
        return output

    return forward


def pruned_file(kind, masks):
    """The published rules of physical pruning: multiply soft masks into what follows, slice, drop empty parts."""
    contents = whole_file(kind)
    state, settings = contents["state_dict"], contents["config"]
    convs, heads, units = masks
    for index, mask in enumerate(convs):
        kept = mask > 0
        for name in [name for name in state if name.startswith(f"feature_extractor.conv_layers.{index}.")]:
            state[name] = state[name][kept]
        if index < 6:
            after = f"feature_extractor.conv_layers.{index + 1}.conv.weight"
            state[after] = (state[after] * mask[:, None])[:, kept]
        else:
            state["feature_extractor.dummy_weight"] = (state["feature_extractor.dummy_weight"] * mask)[kept]
            for part in ("weight", "bias"):
                norm = f"encoder.feature_projection.layer_norm.{part}"
                state[norm] = state[norm][kept]
            state["encoder.feature_projection.projection.weight"] = state["encoder.feature_projection.projection.weight"][
                :, kept
            ]
    for number, (head_mask, unit_mask) in enumerate(zip(heads, units, strict=True)):
        layer = f"encoder.transformer.layers.{number}"
        prune_pair(
            state, f"{layer}.attention", ("q_proj", "k_proj", "v_proj"), "out_proj", head_mask.repeat_interleave(HEAD_DIM)
        )
        prune_pair(state, f"{layer}.feed_forward", ("intermediate_dense",), "output_dense", unit_mask)
    settings["extractor_conv_layer_config"] = [
        (int((mask > 0).sum()), kernel, stride) for mask, (kernel, stride) in zip(convs, GEOMETRY, strict=True)
    ]
    settings["encoder_use_attention"] = [bool(mask.any()) for mask in heads]
    settings["encoder_use_feed_forward"] = [bool(mask.any()) for mask in units]
    settings["encoder_ff_interm_features"] = [int((mask > 0).sum()) for mask in units]
    if KINDS[kind][0]:
        settings["encoder_remaining_heads"] = [mask.nonzero()[:, 0].tolist() for mask in heads]
    else:
        settings["encoder_num_heads"] = [int((mask > 0).sum()) for mask in heads]
    return contents


def prune_pair(state, part, first, second, mask):
    kept = mask > 0
    for name in first:
        state[f"{part}.{name}.weight"] = state[f"{part}.{name}.weight"][kept]
        state[f"{part}.{name}.bias"] = state[f"{part}.{name}.bias"][kept]
    state[f"{part}.{second}.weight"] = (state[f"{part}.{second}.weight"] * mask)[:, kept]
    if not kept.any():
        for name in [name for name in state if name.startswith(f"{part}.")]:
            del state[name]


def load(contents, tmp_path):
    torch.save(contents, tmp_path / "model.pth")
    return sslim.load_model(tmp_path / "model.pth")


def wave():
    return torch.randn(1, 9000, generator=torch.Generator().manual_seed(6)) * 0.3


def largest(model, want):
    with torch.inference_mode():
        got = model.encode(wave())
    got = [*got.layers[:-1], got.final]
    return max(float((ours - theirs).abs().max()) for ours, theirs in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_unpruned_file(kind, tmp_path):
    everything = ([torch.ones(CHANNELS)] * 7, [torch.ones(HEADS)] * LAYERS, [torch.ones(UNITS)] * LAYERS)
    contents = whole_file(kind)
    want = masked_outputs(kind, everything, wave())
    model = load(contents, tmp_path)
    assert largest(model, want) < TOLERANCE
    assert model.num_parameters() == sum(tensor.numel() for tensor in contents["state_dict"].values())
    state = contents["state_dict"]  # the same under the other names of weight norm, and without the factors
    prefix = "encoder.transformer.pos_conv_embed.conv"
    state[f"{prefix}.parametrizations.weight.original0"] = state.pop(f"{prefix}.weight_g")
    state[f"{prefix}.parametrizations.weight.original1"] = state.pop(f"{prefix}.weight_v")
    del state["feature_extractor.dummy_weight"]
    assert largest(load(contents, tmp_path), want) < TOLERANCE


@pytest.mark.parametrize("last_conv", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_pruned_file_is_the_masked_model(kind, last_conv, tmp_path):
    masks = gates(last_conv=last_conv)
    contents = pruned_file(kind, masks)
    model, want = load(contents, tmp_path), masked_outputs(kind, masks, wave())
    assert largest(model, want) < TOLERANCE
    assert [block.num_heads for block in model.config.encoder.blocks] == [int((mask > 0).sum()) for mask in masks[1]]
    held = sum(tensor.numel() for tensor in contents["state_dict"].values())
    unused = 4 * DIM if KINDS[kind][1] else 0  # pre-norm: the norms of two parts that are gone
    assert model.num_parameters() == held - unused
    dropped = model.provenance[0].get("dropped", [])
    assert len(dropped) == (4 if KINDS[kind][1] else 0)
    assert ("group-norm statistics over padding" in model.provenance[0]["padding"]) == (not KINDS[kind][1])
    with torch.no_grad():  # the control: the factors of the last convolution matter, also where nothing else is soft
        model.frontend.scale.mul_(torch.linspace(0.5, 1.5, model.frontend.scale.numel()))
    assert largest(model, want) > 1e-3


@pytest.mark.parametrize("kind", ["hubert", "wavlm_large"])
def test_features_do_not_depend_on_the_batch(kind, tmp_path):
    model = load(pruned_file(kind, gates(last_conv=True)), tmp_path)
    lengths = torch.tensor([9000, 5000])
    padded = torch.cat([wave(), wave().flip(-1)])
    together = model.encode(padded, lengths)
    alone = model.encode(padded[1:, :5000])
    torch.testing.assert_close(together.final[1, : alone.final.shape[1]], alone.final[0], atol=TOLERANCE, rtol=0)


def test_a_pruned_wavlm_can_be_pruned_further(tmp_path):
    model = load(pruned_file("wavlm", gates(last_conv=True, removed=False)), tmp_path)
    full = Units.full(model.config.encoder)
    units = Units(channels=full.channels, heads=((1,), *full.heads[1:]), feedforward=full.feedforward, depths=full.depths)
    first = model.config.encoder.blocks[0]
    assert first.head_ids is not None
    small = slice_model(model, units)
    assert small.config.encoder.blocks[0].head_ids == (first.head_ids[1],)
    with torch.no_grad():
        for head in set(range(first.num_heads)) - {1}:
            model.encoder.blocks[0].attention.output.weight[:, head * HEAD_DIM : (head + 1) * HEAD_DIM] = 0
        torch.testing.assert_close(small.encode(wave()).final, model.encode(wave()).final, atol=TOLERANCE, rtol=0)


def test_a_wavlm_without_attention_in_its_first_layer_has_no_bias(tmp_path):
    convs, heads, units = gates(last_conv=False, removed=False)
    contents = pruned_file("wavlm", (convs, [torch.zeros(HEADS), *heads[1:]], units))
    model = load(contents, tmp_path)
    assert model.config.encoder.relative_positions is None
    assert all("gru_rel_pos" in name for name in model.provenance[0]["dropped"])
    assert len(model.provenance[0]["dropped"]) == 3 * (LAYERS - 1)
    assert model.encode(wave()).final.isfinite().all()


def test_maps_to_the_teacher_become_heads(tmp_path):
    contents = whole_file("hubert")
    first, shared = torch.randn(2, DIM, DIM)
    maps = {"0.weight": first, "0.bias": torch.zeros(DIM)}
    for number in "123":
        maps |= {f"{number}.weight": shared, f"{number}.bias": torch.ones(DIM)}
    model = load({**contents, "distill_linear_projs": OrderedDict(maps)}, tmp_path)
    assert list(model.heads) == ["distillation_0", "distillation_1", "distillation_2", "distillation_3"]
    assert torch.equal(model.heads["distillation_0"].linear.weight, first)
    assert torch.equal(model.heads["distillation_3"].linear.weight, shared)
    assert model.provenance[0]["equal_maps"] == [1, 2, 3]
    sslim.save_model(model, tmp_path / "native")
    again = sslim.load_model(tmp_path / "native")
    assert again.config == model.config
    assert torch.equal(again.encode(wave()).final, model.encode(wave()).final)
    odd = load({**contents, "distill_linear_projs": {"0.0.weight": first}}, tmp_path)  # heads on the last layer
    assert not odd.heads
    assert "left out: 0.0.weight" in odd.provenance[0]["distill_linear_projs"]


def test_an_unfinished_pruning_is_refused(tmp_path):
    contents = whole_file("hubert")
    contents["state_dict"]["encoder.transformer.layers.0.attention.hard_concrete_for_heads.log_alpha"] = torch.zeros(HEADS)
    with pytest.raises(CheckpointError, match=r"holds gates .*log_alpha.* from the middle of DPHuBERT's pruning"):
        load(contents, tmp_path)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("hubert", {"encoder_num_heads": [4, 4]}, r"encoder_num_heads is \[4, 4\], expected 3 of whole numbers"),
        ("hubert", {"encoder_use_attention": [1, 1, 1]}, "encoder_use_attention .* expected 3 of true or false"),
        ("hubert", {"encoder_num_heads": [4, 4, 3]}, r"blocks\.2\.attention\.\w+\.\w+ has shape"),
        ("hubert", {"extractor_mode": "instance"}, "extractor_mode is 'instance', expected one of group_norm, layer_norm"),
        ("hubert", {"encoder_pos_conv_groups": 5}, "dim 24 is not divisible by the 5 groups"),
        ("hubert", {"extractor_conv_layer_config": "open('x')"}, "convolution layers are"),
        ("hubert", {"encoder_num_layers": 10**6}, "encoder_num_layers"),
        ("wavlm", {"encoder_remaining_heads": [[0, 4], [0], [1]]}, "3 lists of heads from 0 to 3"),
        ("wavlm", {"encoder_remaining_heads": [[0, 0], [0], [1]]}, "head_ids of block 0 are"),
        ("wavlm", {"encoder_total_num_heads": [4, 4, 2]}, "expected one number that divides 24"),
        ("wavlm", {"encoder_num_buckets": 13}, "num_buckets is 13"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(kind, change, message, tmp_path):
    contents = whole_file(kind)
    contents["config"] |= change
    with pytest.raises(CheckpointError, match=message) as caught:
        load(contents, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_pruned_file_needs_its_factors(tmp_path):
    contents = pruned_file("hubert", gates(last_conv=True))
    del contents["state_dict"]["feature_extractor.dummy_weight"]
    with pytest.raises(CheckpointError, match=r"lacks frontend\.scale"):
        load(contents, tmp_path)


def count(config):
    with torch.device("meta"):
        return SpeechModel(config).num_parameters()


def test_counts():
    """Unpruned students: HuBERT Base with the factors, WavLM Base with 10,224 numbers of relative positions more."""
    assert count(dphubert()) == 94_371_456
    assert count(dphubert(relative_positions=RelativePositionsConfig())) == 94_371_456 + 10_224


def test_count_of_any_widths_follows_from_them():
    """The sum over layers written out: what is left of channels, heads and units decides."""
    channels, heads, units = [30, 41, 52, 60, 48, 37, 55], [3, 0, 12, 5], [100, 2048, 0, 7]
    layers = tuple(ConvLayerConfig(channels=c, kernel=k, stride=s) for c, (k, s) in zip(channels, GEOMETRY, strict=True))
    want = sum(o * i * k for o, i, (k, _) in zip(channels, [1, *channels[:-1]], GEOMETRY, strict=True))
    want += 2 * channels[0] + channels[-1]  # group norm; factors
    want += 2 * channels[-1] + channels[-1] * 768 + 768  # projection
    want += 768 * 48 * 128 + 128 + 768 + 2 * 768  # positions and their norm
    for h, f in zip(heads, units, strict=True):
        want += 4 * 768  # both norms, whatever is left between them
        want += (3 * (768 * 64 * h + 64 * h) + 64 * h * 768 + 768 if h else 0) + (2 * 768 * f + f + 768 if f else 0)
    frontend = replace(FRONTEND, layers=layers)
    assert count(dphubert(frontend=frontend, num_heads=heads, feedforward_dims=units)) == want
    relative = RelativePositionsConfig()
    ids = [tuple(range(h))[::-1] or None for h in heads]
    wavlm = dphubert(frontend=frontend, num_heads=heads, feedforward_dims=units, head_ids=ids, relative_positions=relative)
    gates_of_a_layer = 8 * 64 + 8 + 12
    assert count(wavlm) == want + 320 * 12 + 3 * gates_of_a_layer
    with pytest.raises(ValueError, match="4 layers have heads, 3 feed-forward"):
        dphubert(num_heads=heads, feedforward_dims=units[:3])
