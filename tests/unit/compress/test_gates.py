"""Hard-concrete gates: formulas by hand, expected counts, and cut models against gated ones."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sslim.checkpoints import load_model, save_model
from sslim.compress.gate_costs import with_channels
from sslim.compress.gate_cut import cut_gates
from sslim.compress.gates import (
    SHIFT,
    GateConfig,
    Gates,
    gate_values,
    norm_over_open,
    open_probability,
    sample_gates,
    settled_gates,
)
from sslim.compress.origins import numbers
from sslim.frontends import ConvFrontendConfig
from sslim.models import ModelConfig, SpeechModel, build_model
from sslim.models.elastic import count_parameters
from sslim.models.hubert import hubert, narrow_conv_layers
from sslim.models.melhubert import melhubert
from sslim.nn.encoder import LinearRanks
from sslim.nn.heads import MaskEmbeddingConfig
from sslim.nn.relative_positions import RelativePositionsConfig

CHANNELS = 32  # over a handful a layer norm enlarges the rounding of float32 to 1e-5
SMALL: Any = {"dim": 16, "num_heads": 4, "feedforward_dim": 24, "conv_kernel_size": 8, "conv_groups": 2}
WAVE: Any = {**SMALL, "num_layers": 3, "conv_layers": narrow_conv_layers(CHANNELS), "num_clusters": None}


def mel(**encoder: Any) -> ModelConfig:
    config = melhubert(num_layers=3, **SMALL)
    return replace(config, heads={}, encoder=replace(config.encoder, **encoder))


def relative() -> ModelConfig:
    config = hubert(**WAVE)
    table = RelativePositionsConfig(num_buckets=32, max_distance=40, num_heads=4)
    return replace(config, encoder=replace(config.encoder, relative_positions=table))


def factored() -> ModelConfig:
    config = mel()
    ranks = LinearRanks(query=3, output=5, up=4, down=6)
    blocks = tuple(replace(block, ranks=ranks) for block in config.encoder.blocks)
    return replace(config, encoder=replace(config.encoder, blocks=blocks))


def uneven() -> ModelConfig:
    """Post-norm blocks without attention: one that keeps the norm of it, and one that does not."""
    config = mel()
    blocks = config.encoder.blocks
    blocks = (
        replace(blocks[0], num_heads=0, keep_norms=True),
        replace(blocks[1], num_heads=0),
        replace(blocks[2], num_heads=1),
    )
    return replace(config, encoder=replace(config.encoder, blocks=blocks))


def scaled() -> ModelConfig:
    config = hubert(**WAVE)
    assert isinstance(config.frontend, ConvFrontendConfig)
    return replace(config, frontend=replace(config.frontend, channel_scale=True, bias=True))


MODELS: dict[str, Callable[[], ModelConfig]] = {
    "waveform, group norm": lambda: hubert(**WAVE),
    "waveform, layer norms, pre-norm": lambda: hubert(
        **WAVE, conv_norm="layer", conv_bias=True, normalize_waveform=True, norm_placement="pre"
    ),
    "waveform, layer norms, post-norm": lambda: hubert(**WAVE, conv_norm="layer"),
    "waveform, channel scale": scaled,
    "waveform, relative positions": relative,
    "waveform, shared blocks": lambda: replace(
        c := hubert(**WAVE), encoder=replace(c.encoder, blocks=c.encoder.blocks[:2], depth_map=(0, 1, 0, 1))
    ),
    "log-Mel": mel,
    "log-Mel, pre-norm": lambda: mel(norm_placement="pre", input_norm=False, final_norm=True),
    "log-Mel, shared block": lambda: mel(blocks=mel().encoder.blocks[:1], depth_map=(0, 0, 0)),
    "log-Mel, factored": factored,
    "log-Mel, uneven": uneven,
}
WAVEFORM = [name for name in MODELS if name.startswith("waveform")]


def built(config: ModelConfig, seed: int = 0) -> SpeechModel:
    """A random net in which biases, norms and gates of positions say something, too."""
    model = build_model(config, torch.Generator().manual_seed(seed))
    if model.frontend is not None and not isinstance(config.frontend, ConvFrontendConfig):
        model.set_statistics(torch.zeros(40), torch.ones(40), source="test")
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def random_gates(config: ModelConfig, seed: int = 3, *, empty: bool = True) -> Gates:
    """Gates of all degrees, in eval mode; the first block loses its attention and the last its units, where they can."""
    gates = Gates(config, GateConfig(), torch.Generator().manual_seed(seed)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for log_alpha in gates.parameters():
            log_alpha.copy_(3 * torch.randn(log_alpha.shape, generator=generator) - 1)
        for kind, block in (("heads", 0), ("feedforward", len(config.encoder.blocks) - 1)):
            if empty and (log_alpha := gates.log_alpha(kind, block)) is not None:  # type: ignore[arg-type]
                log_alpha.fill_(-9.0)
    return gates


def outputs(model: SpeechModel, *, seed: int = 5) -> list[torch.Tensor]:
    """The projection's output and every layer, of a padded batch."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if isinstance(model.config.frontend, ConvFrontendConfig):
            waveform = 0.3 * torch.randn(3, 6000, generator=generator)
            out = model.encode(waveform, torch.tensor([6000, 4100, 2500]))
        else:
            out = model.encode_features(torch.randn(3, 30, 80, generator=generator), torch.tensor([30, 19, 7]))
    assert out.embed is not None
    return [out.embed, *out.layers, out.final]


def difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


# Formulas -------------------------------------------------------------------------------------------------------------------


def test_formulas_by_hand() -> None:
    """Numbers worked out with a pocket calculator from the formulas of Louizos et al. and of DPHuBERT's code."""
    assert pytest.approx(1.59860, abs=1e-5) == SHIFT
    log_alpha, noise = torch.tensor([0.0, 0.0, 1.0, 4.0, -4.0]), torch.tensor([0.5, 0.6, 0.4, 0.5, 0.5])
    # s = sigmoid((logit u + log alpha) / (2/3)), z = clamp(1.2 s - 0.1)
    by_hand = torch.tensor([0.5, 0.6 * 1.0774, 0.76112, 1.0, 0.0])
    by_hand[1] = 1.2 / (1 + math.exp(-1.5 * 0.405465)) - 0.1
    by_hand[2] = 1.2 / (1 + math.exp(-1.5 * (1 - 0.405465))) - 0.1
    torch.testing.assert_close(sample_gates(log_alpha, noise), by_hand, atol=1e-5, rtol=0)
    start = {0.01: 0.998, 0.5: 0.832}  # the values that DPHuBERT starts from
    for mean, kept in start.items():
        location = torch.tensor([math.log((1 - mean) / mean)])
        assert float(open_probability(location)) == pytest.approx(kept, abs=5e-4)
    # Expected L0 of (2, -2, -1, 3): 0.97340 + 0.40096 + 0.64530 + 0.99004 = 3.00970, so one closes: the second.
    location = torch.tensor([2.0, -2.0, -1.0, 3.0])
    assert float(open_probability(location).sum()) == pytest.approx(3.0097, abs=1e-4)
    soft = [1 / (1 + math.exp(-1.2 * value)) for value in (2.0, -2.0, -1.0, 3.0)]
    torch.testing.assert_close(settled_gates(location), torch.tensor([soft[0], 0.0, soft[2], soft[3]]))


def test_settled_gates_close_the_expected_number_and_the_first_among_equals() -> None:
    location = torch.full((10,), -SHIFT)  # half of them
    assert settled_gates(location).nonzero().flatten().tolist() == [5, 6, 7, 8, 9]
    assert settled_gates(torch.full((10,), -30.0)).count_nonzero() == 0
    assert settled_gates(torch.full((10,), -30.0), least=2).count_nonzero() == 2
    assert settled_gates(torch.full((10,), 60.0)).tolist() == [1.0] * 10


def test_sampled_gates_are_open_as_often_as_expected() -> None:
    gates = Gates(mel(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for log_alpha in gates.parameters():
            log_alpha.fill_(-1.0)
    torch.manual_seed(0)
    shares = []
    for _ in range(400):
        gates.sample()
        shares.append(float((gates.values("feedforward", 1) > 0).float().mean()))
    expected = 1 / (1 + math.exp(1.0 - SHIFT))
    assert sum(shares) / len(shares) == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / (400 * 24)))


def test_gates_start_as_in_dphubert_and_training_needs_a_sample() -> None:
    gates = Gates(hubert(**WAVE), generator=torch.Generator().manual_seed(0))
    for kind, start in (("heads", 4.59512), ("feedforward", 0.0), ("channels", 4.59512)):
        drawn = torch.cat([part.detach() for part in getattr(gates, kind).values()])
        assert float(drawn.mean()) == pytest.approx(start, abs=0.01)
        assert 0.005 < drawn.std() < 0.02
    with pytest.raises(RuntimeError, match="never sampled"):
        gates.values("heads", 0)
    with pytest.raises(ValueError, match=r"start of heads gates is 1\.5"):
        GateConfig(heads=1.5)
    with pytest.raises(ValueError, match="nothing that could be gated"):
        Gates(mel(), GateConfig(heads=None, feedforward=None))


# Counts ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_expected_count_is_exact_for_gates_that_are_certain(name: str) -> None:
    config = MODELS[name]()
    gates = random_gates(config)
    with torch.no_grad():
        for log_alpha in gates.parameters():
            log_alpha.fill_(60.0)
    assert gates.num_parameters == count_parameters(config, with_heads=False)
    assert gates.expected_parameters().item() == pytest.approx(count_parameters(config, with_heads=False), abs=1e-6)
    assert gates.expected_sparsity().item() == pytest.approx(0.0, abs=1e-12)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for log_alpha in gates.parameters():
            log_alpha.copy_(torch.where(torch.rand(log_alpha.shape, generator=generator) < 0.6, 60.0, -60.0))
            log_alpha[-1] = 60.0
        for kind, block in (("heads", 0), ("feedforward", len(config.encoder.blocks) - 1)):
            if gates.log_alpha(kind, block) is not None and gates._least[kind][block] == 0:  # type: ignore[index,arg-type]
                gates.log_alpha(kind, block).fill_(-60.0)  # type: ignore[arg-type,union-attr]
    small = cut_gates(built(config), gates)
    assert small.num_parameters() < 0.95 * count_parameters(config, with_heads=False)
    assert gates.expected_parameters().item() == pytest.approx(small.num_parameters(with_heads=False), abs=1e-6)
    assert count_parameters(small.config) == small.num_parameters()
    with torch.no_grad():
        for log_alpha in gates.parameters():
            log_alpha.fill_(-60.0)
    least = cut_gates(built(config), gates).num_parameters(with_heads=False)
    scale = len(gates.channels) * ("scale" not in name)  # a soft value of the last convolution's one channel
    assert 1 - gates.largest_sparsity() == pytest.approx((least - bool(scale)) / gates.num_parameters, abs=1e-9)


def test_expected_count_is_the_mean_over_all_outcomes_of_independent_gates() -> None:
    """Every combination of open gates of a tiny net, weighted by its probability."""
    encoder = replace(mel().encoder, blocks=mel().encoder.blocks[:1], depth_map=(0,), norm_placement="pre")
    encoder = replace(encoder, blocks=(replace(encoder.blocks[0], num_heads=2, feedforward_dim=3),))
    front = ConvFrontendConfig(layers=narrow_conv_layers(2)[:3], norm="layer", bias=True)
    config = replace(
        hubert(**WAVE), encoder=encoder, frontend=front, projection=replace(hubert(**WAVE).projection, feature_dim=2)
    )
    gates = random_gates(config, empty=False)
    kinds = ("heads", "feedforward", "channels")
    parts = [
        (kind, int(name), open_probability(log.detach().double()))
        for kind in kinds
        for name, log in getattr(gates, kind).items()
    ]
    mean = 0.0
    for outcome in itertools.product(*[itertools.product((0, 1), repeat=len(opened)) for _, _, opened in parts]):
        probability, sizes = 1.0, {}
        for (kind, index, opened), bits in zip(parts, outcome, strict=True):
            probability *= float(torch.where(torch.tensor(bits) > 0, opened, 1 - opened).prod())
            sizes[kind, index] = sum(bits)
        block = replace(encoder.blocks[0], num_heads=sizes["heads", 0], feedforward_dim=sizes["feedforward", 0])
        left = with_channels(config, [sizes["channels", index] for index in range(3)])
        mean += probability * count_parameters(replace(left, encoder=replace(encoder, blocks=(block,))), with_heads=False)
    assert gates.expected_parameters().item() == pytest.approx(mean, rel=1e-9)


def test_sparsity_at_the_start_is_that_of_dphubert() -> None:
    """10.2 % of HuBERT Base (measured with the reference at its starting values)."""
    gates = Gates(hubert(num_clusters=None), generator=torch.Generator().manual_seed(0))
    assert gates.expected_sparsity().item() == pytest.approx(0.102, abs=5e-4)


# Cut models -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_the_cut_model_computes_what_the_gated_one_does(name: str, seed: int) -> None:
    config = MODELS[name]()
    model, gates = built(config), random_gates(config, seed)
    before = outputs(model)
    gates.attach(model)
    gated = outputs(model)
    small = cut_gates(model, gates)  # with the gates on, which it must not take along
    assert difference(outputs(small), gated) < 1e-5
    assert difference(before, gated) > 1e-2  # and the gates do something
    assert small.num_parameters() < 0.9 * model.num_parameters()
    assert difference(outputs(model), gated) == 0.0  # two passes are the same
    gates.detach()
    assert difference(outputs(model), before) == 0.0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["waveform, group norm", "waveform, layer norms, pre-norm", "log-Mel"])
def test_whole_parts_can_go(name: str) -> None:
    config = MODELS[name]()
    gates = random_gates(config)
    small = cut_gates(built(config), gates)
    first, last = small.config.encoder.blocks[0], small.config.encoder.blocks[-1]
    assert first.num_heads == 0
    assert last.feedforward_dim == 0
    post = config.encoder.norm_placement == "post"
    assert first.keep_norms is last.keep_norms is post
    assert not small.config.encoder.blocks[1].keep_norms
    assert (small.encoder.blocks[0].attention_norm is not None) is post


def test_a_part_that_cannot_go_keeps_a_unit() -> None:
    """A post-norm block that lacks attention and its norm: without units it would be a norm that no description has."""
    config = uneven()
    gates = random_gates(config)
    with torch.no_grad():
        for log_alpha in gates.parameters():
            log_alpha.fill_(-9.0)
    assert [block.feedforward_dim for block in cut_gates(built(config), gates).config.encoder.blocks] == [0, 1, 0]


def test_the_soft_values_count() -> None:
    """The control of equality: the closed parts go, and the values of the open ones are forgotten."""
    for name in ("waveform, group norm", "log-Mel"):
        config = MODELS[name]()
        model, gates = built(config), random_gates(config)
        gates.attach(model)
        gated = outputs(model)
        hard = copy.deepcopy(gates)
        with torch.no_grad():
            for kind in ("heads", "feedforward", "channels"):
                for index, log_alpha in getattr(hard, kind).items():
                    log_alpha.copy_(torch.where(gates.settled(kind, int(index)) > 0, 60.0, -60.0))  # type: ignore[arg-type,operator]
        assert difference(outputs(cut_gates(model, hard)), gated) > 1e-2


@pytest.mark.parametrize("name", ["waveform, group norm", "waveform, layer norms, pre-norm"])
def test_norms_over_all_channels_would_part_gated_and_cut_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other control, what DPHuBERT does: norms of the gated model run over closed channels as well."""
    config = MODELS[name]()
    model, gates = built(config), random_gates(config)
    monkeypatch.setattr("sslim.compress.gates.norm_over_open", lambda norm, x, opened: norm.forward(x))
    gates.attach(model)
    parted = difference(outputs(cut_gates(model, gates)), outputs(model))
    assert parted > (0.05 if "layer" in name else 1e-3)


def test_norm_over_open_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    norm, x = nn.LayerNorm(6), torch.randn(2, 5, 6, generator=generator) + 3
    opened = torch.tensor([True, False, True, True, False, False])
    nn.init.normal_(norm.weight, generator=generator)
    narrow = torch.nn.functional.layer_norm(x[..., opened], (3,), norm.weight[opened], norm.bias[opened])
    torch.testing.assert_close(norm_over_open(norm, x, opened)[..., opened], narrow)
    torch.testing.assert_close(norm_over_open(norm, x, torch.ones(6, dtype=torch.bool)), norm(x))
    assert norm_over_open(norm, x, torch.zeros(6, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_open_gates_change_nothing(name: str) -> None:
    config = MODELS[name]()
    model, gates = built(config), random_gates(config)
    with torch.no_grad():
        for log_alpha in gates.parameters():
            log_alpha.fill_(60.0)
    before = outputs(model)
    gates.attach(model)
    assert difference(outputs(model), before) < 1e-5
    small = cut_gates(model, gates)
    assert small.config == model.config
    assert all(tensor.equal(small.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert small.provenance[-1]["step"] == "gates"


def test_the_note_names_what_is_left() -> None:
    config = MODELS["waveform, group norm"]()
    model, gates = built(config), random_gates(config)
    small = cut_gates(model, gates)
    note, frontend = small.provenance[-1], small.config.frontend
    assert isinstance(frontend, ConvFrontendConfig)
    for index, layer in enumerate(frontend.layers):
        kept = gates.settled("channels", index).nonzero().flatten().tolist()  # type: ignore[union-attr]
        assert list(numbers(note["kept_channels"][index])) == kept
        assert layer.channels == len(kept) < CHANNELS
    assert note["kept_heads"][1] == gates.settled("heads", 1).nonzero().flatten().tolist()  # type: ignore[union-attr]
    assert model.provenance == []
    assert frontend.channel_scale
    values = gate_values(gates)
    assert [sum(v > 0 for v in part) for part in values["feedforward"]] == [
        b.feedforward_dim for b in small.config.encoder.blocks
    ]


def test_only_what_is_asked_for_is_gated() -> None:
    config = MODELS["waveform, group norm"]()
    model = built(config)
    gates = Gates(config, GateConfig(heads=None, channels=None, feedforward=0.9), torch.Generator().manual_seed(0)).eval()
    gates.attach(model)
    small = cut_gates(model, gates)
    assert small.config.frontend == config.frontend
    assert [block.num_heads for block in small.config.encoder.blocks] == [4, 4, 4]
    assert all(block.feedforward_dim < 24 for block in small.config.encoder.blocks)
    assert difference(outputs(small), outputs(model)) < 1e-5


def test_a_mask_embedding_over_features_is_cut_with_the_channels() -> None:
    config = MODELS["waveform, group norm"]()
    config = replace(config, heads={"mask": MaskEmbeddingConfig(dim=CHANNELS)})
    model, gates = built(config), random_gates(config)
    small = cut_gates(model, gates)
    kept = gates.settled("channels", 6).nonzero().flatten()  # type: ignore[union-attr]
    assert small.heads["mask"].embedding.equal(model.heads["mask"].embedding[kept])
    gates.attach(model)
    hide = torch.zeros(1, 9, dtype=torch.bool)
    hide[:, 3:6] = True
    with torch.no_grad():
        features = [
            net.frontend(torch.randn(1, 3000, generator=torch.Generator().manual_seed(0)), torch.tensor([3000]))
            for net in (model, small)
        ]  # type: ignore[misc]
        hidden = [
            net.projection(net.heads["mask"](part.values, hide)) for net, part in zip((model, small), features, strict=True)
        ]
    torch.testing.assert_close(*hidden, atol=1e-5, rtol=0)


def test_gates_belong_to_one_model() -> None:
    config = MODELS["log-Mel"]()
    model, gates = built(config), random_gates(config)
    gates.attach(model)
    with pytest.raises(RuntimeError, match="attached to a model already"):
        gates.attach(model)
    with pytest.raises(ValueError, match="of other sizes"):
        random_gates(config).attach(built(MODELS["log-Mel, uneven"]()))


@pytest.mark.parametrize("name", ["waveform, layer norms, pre-norm", "log-Mel"])
def test_gradients_reach_gates_and_are_finite_with_everything_closed(name: str) -> None:
    """In training, with gates so small that whole parts and convolutions close."""
    config = MODELS[name]()
    model, gates = built(config).train(), random_gates(config).train()
    for log_alpha in gates.parameters():
        log_alpha.data.fill_(-1.0)
    gates.attach(model)
    torch.manual_seed(0)
    inputs = torch.randn(2, 6000) if name in WAVEFORM else torch.randn(2, 30, 80)
    for location in (-1.0, -8.0):
        for log_alpha in gates.parameters():
            log_alpha.data.fill_(location)
        gates.sample()
        encode = model.encode if name in WAVEFORM else model.encode_features
        out = encode(inputs)
        loss = out.final.square().mean() + gates.expected_sparsity()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in [*model.parameters(), *gates.parameters()])
        assert all(p.grad.abs().max() > 0 for p in gates.parameters() if p.grad is not None)


def test_recomputed_activations_see_the_same_gates() -> None:
    """Gradient checkpointing runs blocks twice; with shared blocks, every application has the same gates as well."""
    config = MODELS["log-Mel, shared block"]()
    config = replace(config, encoder=replace(config.encoder, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0))
    gradients = []
    for checkpointing in (False, True):
        model, gates = built(config).train(), random_gates(config, empty=False).train()
        model.encoder.gradient_checkpointing = checkpointing
        gates.attach(model)
        torch.manual_seed(0)
        gates.sample()
        model.encode_features(torch.randn(2, 30, 80)).final.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in gates.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("name", ["waveform, layer norms, pre-norm", "log-Mel"])
def test_gates_run_under_bf16_autocast(name: str) -> None:
    config = MODELS[name]()
    model, gates = built(config), random_gates(config)
    gates.attach(model)
    whole = outputs(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = outputs(model)
    assert 0 < difference([part.float() for part in rough], whole) < 0.5


def test_cutting_leaves_the_model_and_the_gates_alone_and_the_result_can_be_saved(tmp_path: Path) -> None:
    """In training mode too, while gates are attached and sampled; the cut model is that of eval mode."""
    config = MODELS["waveform, relative positions"]()
    model, gates = built(config), random_gates(config)
    small = cut_gates(model, gates)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gates.attach(model)
    model.train()
    gates.train().sample()
    again = cut_gates(model, gates)
    assert model.training
    assert gates.training
    assert not again.training
    assert all(tensor.equal(tensors[name]) for name, tensor in model.state_dict().items())
    save_model(again, tmp_path / "small")
    loaded = load_model(tmp_path / "small")
    assert (loaded.config, loaded.provenance) == (small.config, small.provenance)
    assert difference(outputs(loaded), outputs(small)) == 0.0
    assert any(block.head_ids is not None for block in loaded.config.encoder.blocks)
