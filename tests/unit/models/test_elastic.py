"""Subnets run inside their supernet equal the extracted models: families, shared layers, padding; with controls."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from sslim.batch import Padded
from sslim.frontends import ConvFrontendConfig, ConvLayerConfig
from sslim.models import ModelConfig, ProjectionConfig, SpeechModel, build_model
from sslim.models.elastic import (
    check_supernet,
    count_parameters,
    extract_model,
    model_units,
    model_view,
    run_subnet,
    subnet_config,
    subnet_parameters,
)
from sslim.models.melhubert import melhubert
from sslim.models.search_space import LIGHTHUBERT_BASE, LIGHTHUBERT_SMALL, SearchSpace, Subnet
from sslim.nn.encoder import EncoderConfig, LinearRanks, plain_blocks
from sslim.nn.heads import CodewordHeadConfig, MaskEmbeddingConfig, RegressionHeadConfig, SpectrogramHeadConfig, SplitHeadConfig
from sslim.nn.positions import ConvPositionsConfig, PositionsConfig, SinusoidPositionsConfig
from sslim.nn.relative_positions import RelativePositionsConfig

LAYERS = (ConvLayerConfig(channels=6, kernel=10, stride=5), ConvLayerConfig(channels=8, kernel=4, stride=4))
POSITIONS = ConvPositionsConfig(kernel_size=6, groups=4)
SPACE = SearchSpace(dims=(8, 12, 16), num_heads=(1, 2), feedforward_ratios=(1.5, 2.0), num_layers=(2, 3))
QUIET = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


def mel() -> ModelConfig:
    tiny = melhubert(num_layers=3, dim=16, num_heads=2, feedforward_dim=32, conv_kernel_size=6, conv_groups=4, num_clusters=5)
    return replace(tiny, search_space=SPACE)


def waveform(norm: str = "group") -> ModelConfig:
    return ModelConfig(
        family="hubert",
        frontend=ConvFrontendConfig(layers=LAYERS, norm=norm, bias=norm == "layer", channel_scale=norm == "layer"),  # type: ignore[arg-type]
        projection=ProjectionConfig(feature_dim=8, norm=True),
        encoder=EncoderConfig(dim=16, **plain_blocks(3, 2, 4, 32), positions=POSITIONS, **QUIET),
        heads={
            "mask": MaskEmbeddingConfig(dim=16),
            "masked_prediction": CodewordHeadConfig(num_clusters=7, codeword_dim=5),
            "distillation": RegressionHeadConfig(output_dim=9, bias=False),
            "distillation_0": SplitHeadConfig(num_tasks=2, hidden_dim=3, output_dim=4),
            "reconstruction": SpectrogramHeadConfig(hidden_dim=6, output_dim=4),
        },
        search_space=SPACE,
    )


def lighthubert() -> ModelConfig:
    """Twelve layers, some dropped, and the blocks rule with a last block that is cut."""
    config = waveform("layer")
    space = SearchSpace(
        dims=(8, 12, 16),
        num_heads=(1, 2, 3),
        feedforward_ratios=(1.25, 1.75, 2.0),
        num_layers=(6, 10, 12),
        kept_layers=LIGHTHUBERT_SMALL.kept_layers,
        feedforward_rule="blocks",
    )
    encoder = replace(config.encoder, **plain_blocks(12, 3, 4, 32))
    return replace(config, encoder=encoder, search_space=space)


def shared() -> ModelConfig:
    config = mel()
    encoder = replace(
        config.encoder,
        blocks=config.encoder.blocks[:2],
        depth_map=(0, 1, 1, 0),
        positions=SinusoidPositionsConfig(),
        norm_placement="pre",
        final_norm=True,
    )
    return replace(config, encoder=encoder, search_space=replace(SPACE, num_layers=(2, 3, 4), depth_map=(0, 1, 1, 0)))


def pre_norm(positions: PositionsConfig | None = None) -> ModelConfig:
    """No positions, no input norm, a window of its own, factored maps."""
    config = mel()
    block = replace(config.encoder.blocks[0], attention_window=3, ranks=LinearRanks(query=3, output=5, up=6))
    encoder = replace(
        config.encoder,
        blocks=(block,) * 3,
        positions=positions,
        norm_placement="pre",
        input_norm=False,
        final_norm=True,
    )
    return replace(config, encoder=encoder)


def causal() -> ModelConfig:
    config = pre_norm(replace(POSITIONS, causal=True, weight_norm=False))
    return replace(config, encoder=replace(config.encoder, causal=True, norm_placement="post", final_norm=False))


def relative() -> ModelConfig:
    """WavLM's: gates read the channels of their heads, so heads and width are cut together."""
    config = waveform()
    encoder = replace(
        config.encoder,
        **plain_blocks(3, 4, 4, 32),
        relative_positions=RelativePositionsConfig(num_buckets=8, max_distance=20, num_heads=4),
    )
    return replace(config, family="wavlm", encoder=encoder)


FAMILIES: dict[str, Callable[[], ModelConfig]] = {
    "melhubert": mel,
    "waveform": waveform,
    "lighthubert": lighthubert,
    "shared": shared,
    "pre-norm": pre_norm,
    "causal": causal,
    "relative": relative,
}


def build(config: ModelConfig) -> SpeechModel:
    """Random everywhere, norms and biases included, so that a wrong slice shows."""
    generator = torch.Generator().manual_seed(0)
    model = build_model(config, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def features(model: SpeechModel) -> Padded:
    values = torch.randn(3, 11, model.config.projection.feature_dim, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([11, 4, 10])
    for row, length in enumerate(lengths):
        values[row, length:] = 0
    return Padded(values=values, lengths=lengths)


def subnets(config: ModelConfig, count: int) -> list[Subnet]:
    assert config.search_space is not None
    generator, space = torch.Generator().manual_seed(2), config.search_space
    chosen = [space.largest(), space.smallest(), *(space.sample(generator) for _ in range(count - 4))]
    same_choice = dict(zip(space.blocks(chosen[-1].num_layers), range(chosen[-1].num_layers), strict=False))
    windows = tuple(None if same_choice[block] % 2 else 2 for block in space.blocks(chosen[-1].num_layers))
    faulty = [] if config.encoder.causal or config.encoder.relative_positions is not None else ["lighthubert"]
    return [*chosen, *(replace(chosen[-1], windows=windows, window_rule=rule) for rule in ("band", *faulty))]


@pytest.mark.parametrize("family", FAMILIES)
def test_elastic_equals_extracted(family: str) -> None:
    """18 subnets of each family (17 without LightHuBERT's windows), padded batches; parameters as counted; 124 in all."""
    config = FAMILIES[family]()
    model = build(config)
    x = features(model)
    for subnet in subnets(config, 18):
        alone = extract_model(model, subnet)
        elastic, extracted = run_subnet(model, subnet, x), alone.encode_features(x.values, x.lengths)
        pairs = [(elastic.embed, extracted.embed), (elastic.final, extracted.final)]
        for ours, theirs in [*pairs, *zip(elastic.layers, extracted.layers, strict=True)]:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        assert len(elastic.layers) == subnet.num_layers + 1
        assert alone.config == subnet_config(config, subnet)
        assert alone.config.search_space is None
        assert subnet_parameters(config, subnet) == alone.num_parameters()
        assert subnet_parameters(config, subnet, with_heads=False) == alone.num_parameters(with_heads=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_units_give_another_output(family: str) -> None:
    """The control of the property above: a subnet is not its neighbour of equal size."""
    config = FAMILIES[family]()
    model = build(config)
    assert config.search_space is not None
    subnet, x = config.search_space.smallest(), features(model)
    units = model_units(config, subnet)
    other = replace(units, heads=tuple(tuple(head + 1 for head in heads) for heads in units.heads))
    with torch.no_grad():
        difference = model_view(model, other).encode_features(x.values, x.lengths).final - run_subnet(model, subnet, x).final
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_waveforms_go_through_the_whole_front_end(norm: str) -> None:
    model = build(waveform(norm))
    samples, lengths = torch.randn(2, 400, generator=torch.Generator().manual_seed(3)), torch.tensor([400, 300])
    view, alone = model_view(model, model_units(model.config, "min")), extract_model(model, "min")
    torch.testing.assert_close(view.encode(samples, lengths).final, alone.encode(samples, lengths).final, atol=1e-5, rtol=0)
    assert alone.frontend is not model.frontend
    assert count_parameters(model.config) == model.num_parameters()


def test_heads_of_a_subnet() -> None:
    model = build(waveform())
    view, alone = model_view(model, model_units(model.config, "min")), extract_model(model, "min")
    x = torch.randn(2, 5, 8)
    assert alone.heads["mask"].embedding.shape == (8,)
    assert torch.equal(alone.heads["mask"].embedding, model.heads["mask"].embedding[:8])
    for name in ("masked_prediction", "distillation", "distillation_0"):
        torch.testing.assert_close(view.heads[name](x), alone.heads[name](x))
    assert view.heads["distillation"](x).shape == (2, 5, 9)


def test_gradients_equal_those_of_the_extracted_model() -> None:
    """The whole way: every gradient of the extracted model is the kept part of the supernet's, the rest is zero or none."""
    model = build(lighthubert())
    assert model.config.search_space is not None
    subnet, x = model.config.search_space.sample(torch.Generator().manual_seed(5)), features(model)
    units = model_units(model.config, subnet)
    alone = extract_model(model, subnet)
    for which in (model_view(model, units), alone):
        which.encode_features(x.values, x.lengths).final.square().sum().backward()
    bare = build(model.config)
    with torch.no_grad():
        for parameter, source in zip(bare.parameters(), model.parameters(), strict=True):
            parameter.copy_(torch.zeros_like(source) if source.grad is None else source.grad)
    cut = dict(model_view(bare, units).state_dict())
    whole = sum(
        float(p.grad.square().sum()) for n, p in model.named_parameters() if p.grad is not None and "positions" not in n
    )
    kept = 0.0
    for name, parameter in alone.named_parameters():
        if parameter.grad is not None and "positions" not in name:  # weight norm there: the supernet's gradient is another
            torch.testing.assert_close(cut[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=name)
            kept += float(parameter.grad.square().sum())
    assert whole == pytest.approx(kept, rel=1e-4)
    dropped = model.encoder.blocks[11].attention.query.weight.grad
    assert (dropped is None) == (subnet.num_layers < 12)


def test_published_parameter_counts() -> None:
    """``calc_sampled_param_num`` of spec 2.2: no heads but the mask embedding of 768, no gain of weight norm."""
    config = ModelConfig(
        family="lighthubert",
        frontend=ConvFrontendConfig(norm="layer"),
        projection=ProjectionConfig(feature_dim=512, norm=True),
        encoder=EncoderConfig(dim=768, **plain_blocks(12, 12, 64, 3072)),
        search_space=LIGHTHUBERT_BASE,
    )
    small = replace(config, search_space=LIGHTHUBERT_SMALL)
    counts = {name: subnet_parameters(config, name) + 768 for name in ("min", "default", "max")}
    assert counts == {"min": 41_249_536, "default": 66_897_664, "max": 94_377_728 + 128}
    assert [subnet_parameters(small, name) + 768 for name in ("min", "default", "max")] == [11_449_088, 26_879_744, 44_398_336]


def test_extraction_is_a_copy_and_is_recorded() -> None:
    model = build(mel())
    small = extract_model(model, "min")
    before = small.encoder.blocks[0].attention.query.weight.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(small.encoder.blocks[0].attention.query.weight, before)
    assert small.provenance[-1]["step"] == "extract"
    assert small.provenance[-1]["subnet"]["dim"] == 8


def test_gradient_checkpointing_and_training_mode_reach_the_subnet() -> None:
    model = build(mel()).train()
    model.encoder.gradient_checkpointing = True
    x = features(model)
    run_subnet(model, "min", x).final.square().sum().backward()
    checkpointed = model.projection.linear.weight.grad.clone()
    model.zero_grad()
    model.encoder.gradient_checkpointing = False
    run_subnet(model.eval(), "min", x).final.square().sum().backward()
    assert checkpointed.abs().sum() > 0
    assert not torch.equal(checkpointed, model.projection.linear.weight.grad)  # dropout was on


def test_a_model_without_a_space_has_no_named_subnets() -> None:
    model = build(replace(mel(), search_space=None))
    with pytest.raises(ValueError, match="subnet 'min' is asked for, but this melhubert model is no supernet"):
        extract_model(model, "min")
    assert extract_model(model, Subnet(dim=8, num_heads=(1,), feedforward_dims=(4,))).num_layers == 1


def test_supernets_that_cannot_be_are_refused() -> None:
    check_supernet(relative())
    with pytest.raises(ValueError, match="at width 8 the gates of relative positions find the channels of 2 heads, but head 4"):
        check_supernet(replace(relative(), search_space=replace(SPACE, num_heads=(2, 4))))
    as_they_are = replace(mel(), projection=ProjectionConfig(feature_dim=16, linear=False))
    check_supernet(replace(as_they_are, search_space=replace(SPACE, dims=(16,))))
    with pytest.raises(ValueError, match=r"dims of the search space must be \(16,\), not \(8, 12, 16\)"):
        check_supernet(as_they_are)
    with pytest.raises(ValueError, match="this melhubert model is no supernet: it has no search space"):
        check_supernet(replace(mel(), search_space=None))
