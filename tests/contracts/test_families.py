"""One body over every family of models: batching changes nothing, layers are in their places, the native format keeps all."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sslim.batch import EncoderOutput
from sslim.checkpoints import load_model, save_model
from sslim.frontends import HUBERT_CONV_LAYERS, ConvFrontendConfig
from sslim.models import ModelConfig, SpeechModel, build_model
from sslim.models.distilhubert import distilalhubert, distilhubert
from sslim.models.dphubert import dphubert
from sslim.models.elastic import extract_model
from sslim.models.hubert import hubert
from sslim.models.lighthubert import lighthubert
from sslim.models.melhubert import melhubert
from sslim.models.predictive import apc, npc
from sslim.models.reconstruction import aalbert, mockingjay, tera
from sslim.models.search_space import SearchSpace
from sslim.nn.encoder import Encoder, EncoderConfig
from sslim.nn.positions import ConvPositionsConfig
from sslim.nn.quantizer import QuantizerConfig
from sslim.nn.relative_positions import RelativePositionsConfig

CONV = tuple(replace(layer, channels=12) for layer in HUBERT_CONV_LAYERS)
SMALL = {"dim": 32, "num_heads": 4, "feedforward_dim": 48, "conv_kernel_size": 8, "conv_groups": 4}
NARROW = {"dim": 32, "num_heads": 4, "feedforward_dim": 48}
CODES = QuantizerConfig(num_codes=(6, 9), code_dims=(8, 16))
SPACE = SearchSpace(dims=(16, 32), num_heads=(2, 4), feedforward_ratios=(1.0, 1.5), num_layers=(2, 3))


def windowed() -> ModelConfig:
    config = hubert(num_layers=3, conv_layers=CONV, **SMALL)  # type: ignore[arg-type]
    blocks = tuple(
        replace(block, attention_window=window) for block, window in zip(config.encoder.blocks, (2, None, 5), strict=True)
    )
    return replace(config, encoder=replace(config.encoder, blocks=blocks))


def lighthubert_windows() -> ModelConfig:
    config = windowed()
    blocks = tuple(replace(block, window_rule="lighthubert") for block in config.encoder.blocks)
    return replace(config, encoder=replace(config.encoder, blocks=blocks))


def large_style() -> ModelConfig:
    return hubert(
        num_layers=2,
        conv_layers=CONV,
        conv_norm="layer",
        conv_bias=True,
        normalize_waveform=True,
        norm_placement="pre",
        **SMALL,
    )


def large_student() -> ModelConfig:
    return distilalhubert(
        num_layers=2,
        repeats=2,
        conv_layers=CONV,
        conv_norm="layer",
        normalize_waveform=True,
        norm_placement="pre",
        **SMALL,
    )


def pruned(*, relative: bool) -> ModelConfig:
    """Widths of their own everywhere; layer 2 without attention, layer 3 without feed-forward."""
    widths = (9, 12, 7, 10, 8, 11, 6)
    layers = tuple(replace(layer, channels=width) for layer, width in zip(HUBERT_CONV_LAYERS, widths, strict=True))
    return dphubert(
        num_heads=(3, 0, 2),
        feedforward_dims=(40, 17, 0),
        dim=32,
        head_dim=8,
        frontend=ConvFrontendConfig(layers=layers, channel_scale=True),
        positions=ConvPositionsConfig(kernel_size=8, groups=4),
        relative_positions=RelativePositionsConfig(num_buckets=12, max_distance=20, num_heads=4) if relative else None,
        head_ids=((0, 1, 3), None, (1, 2)) if relative else None,
    )


CONFIGS: dict[str, Callable[[], ModelConfig]] = {
    "melhubert": lambda: melhubert(num_layers=2, **SMALL),
    "hubert, base style": lambda: hubert(num_layers=2, conv_layers=CONV, **SMALL),  # type: ignore[arg-type]
    "hubert, large style": large_style,
    "hubert, windows": windowed,
    "hubert, LightHuBERT's windows": lighthubert_windows,
    "distilhubert": lambda: distilhubert(num_layers=2, teacher_dim=20, conv_layers=CONV, **SMALL),  # type: ignore[arg-type]
    "distilalhubert": lambda: distilalhubert(num_layers=2, repeats=3, conv_layers=CONV, **SMALL),  # type: ignore[arg-type]
    "distilalhubert, large style": large_student,
    "dphubert": lambda: pruned(relative=False),
    "dpwavlm": lambda: pruned(relative=True),
    "mockingjay": lambda: mockingjay(num_layers=2, stack=3, **NARROW),
    "tera": lambda: tera(num_layers=2, **NARROW),
    "tera, pre-norm": lambda: tera(num_layers=2, norm_placement="pre", **NARROW),
    "aalbert": lambda: aalbert(num_layers=3, **NARROW),
    "apc": lambda: apc(dims=(24, 24)),
    "vq-apc": lambda: apc(dims=(24, 24), codes=CODES),
    "npc": lambda: npc(dim=24, codes=CODES),
    "lighthubert": lambda: lighthubert(SPACE, num_layers=3, teacher_dim=20, conv_layers=CONV, **SMALL),  # type: ignore[arg-type]
}
FAMILIES: dict[str, Callable[[], SpeechModel]] = {
    name: (lambda make=make: build_model(make(), torch.Generator().manual_seed(0)))  # type: ignore[misc]
    for name, make in CONFIGS.items()
}
SPECTRAL = ("melhubert", "mockingjay", "tera", "tera, pre-norm", "aalbert", "apc", "vq-apc", "npc")
FAMILIES["lighthubert, smallest subnet"] = lambda: extract_model(FAMILIES["lighthubert"](), "min")


def made(name: str) -> SpeechModel:
    model = FAMILIES[name]().eval()
    if name == "melhubert":
        model.set_statistics(torch.zeros(40), torch.ones(40), source="test")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # norms and biases other than their initial ones and zeros
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def speechlike(batch: int, samples: int) -> torch.Tensor:
    noise = torch.randn(batch, samples, generator=torch.Generator().manual_seed(2))
    return 0.1 * noise * torch.linspace(0.1, 1.0, samples)


LENGTHS = (9000, 8300, 4001, 900, 399, 0)  # the last two are shorter than a frame


def states(output: EncoderOutput) -> tuple[torch.Tensor, ...]:
    assert output.embed is not None
    return output.embed, output.final, *output.layers


def batch_error(model: SpeechModel, lengths: tuple[int, ...] = LENGTHS, claimed: tuple[int, ...] | None = None) -> float:
    """Largest difference between utterances in a padded batch, of the ``claimed`` lengths, and alone, over 1 + |x|."""
    waveform_BS = speechlike(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        waveform_BS[row, length:] = 0.0
    together = model.encode(waveform_BS, torch.tensor(claimed or lengths))
    assert all(x_BTD.isfinite().all() for x_BTD in states(together))
    largest = 0.0
    for row, length in enumerate(lengths):
        alone = model.encode(waveform_BS[row : row + 1, :length])
        assert model.frontend is not None
        frames = model.frontend.num_frames(length)
        assert int(alone.lengths[0]) == frames
        for batched_BTD, single_BTD in zip(states(together), states(alone), strict=True):
            assert not batched_BTD[row, int(together.lengths[row]) :].any()
            errors_TD = (batched_BTD[row, :frames] - single_BTD[0]).detach().abs() / (1 + single_BTD[0].detach().abs())
            largest = max(largest, float(errors_TD.max()) if frames else 0.0)
    return largest


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("gradients", [False, True])
def test_what_an_utterance_is_batched_with_does_not_matter(name: str, gradients: bool) -> None:
    model = made(name)
    with torch.set_grad_enabled(gradients):  # with gradients: one padded batch; without: groups of similar length
        assert batch_error(model) <= 1e-5
        together = model.encode(speechlike(len(LENGTHS), max(LENGTHS)), torch.tensor(LENGTHS))  # noise beyond the lengths
    assert model.frontend is not None
    assert together.lengths.tolist() == [model.frontend.num_frames(length) for length in LENGTHS]
    zeros = speechlike(len(LENGTHS), max(LENGTHS)) * (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None])
    torch.testing.assert_close(together.final, model.encode(zeros, torch.tensor(LENGTHS)).final, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_taken_for_speech_would_be_noticed(name: str) -> None:
    """The control: the same batch without its lengths."""
    model = made(name)
    with torch.no_grad():
        assert batch_error(model, claimed=(max(LENGTHS),) * len(LENGTHS)) > 1e-2


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in SPECTRAL])
def test_the_reference_treats_padding_as_it_did(name: str, tmp_path: Path) -> None:
    """The control of the front-end: statistics over padding, or a frame too many, change what an utterance gives."""
    save_model(made(name), tmp_path / "model")
    model = load_model(tmp_path / "model", compat="reference")
    assert isinstance(frontend := model.config.frontend, ConvFrontendConfig)
    with torch.no_grad():
        error = batch_error(model, (9000, 4001))
    assert error > 1e-3 if frontend.norm == "group" or frontend.reference_mask == "coarse" else error <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_are_where_the_contract_says(name: str) -> None:
    model = made(name)
    output = model.encode(speechlike(1, 8000))
    assert len(output.layers) == model.num_layers + 1
    assert output.final.shape == (1, int(output.lengths[0]), model.config.encoder.dim)
    assert model.frontend is not None
    assert int(output.lengths[0]) == model.frontend.num_frames(8000)
    assert [layer.shape[-1] for layer in output.layers] == list(model.config.encoder.layer_dims)
    encoder = model.config.encoder
    if isinstance(encoder, EncoderConfig):
        as_it_is = encoder.norm_placement == "post"
    else:
        as_it_is = not isinstance(model.encoder, Encoder) and model.encoder.final_quantizer is None
    assert torch.equal(output.final, output.layers[-1]) == as_it_is


@pytest.mark.parametrize("name", FAMILIES)
def test_the_native_format_keeps_the_model(name: str, tmp_path: Path) -> None:
    model = made(name)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == model.config
    waveform_BS = speechlike(1, 6000)
    assert torch.equal(loaded.encode(waveform_BS).final, model.encode(waveform_BS).final)


def test_a_supernet_folder_gives_its_subnets(tmp_path: Path) -> None:
    model = made("lighthubert")
    save_model(model, tmp_path / "supernet")
    waveform_BS = speechlike(1, 6000)
    assert load_model(tmp_path / "supernet").config.search_space == SPACE  # no default subnet: the whole
    for choice in ("min", "max"):
        small = load_model(tmp_path / "supernet", subnet=choice)
        assert small.config.search_space is None
        torch.testing.assert_close(small.encode(waveform_BS).final, extract_model(model, choice).encode(waveform_BS).final)
    with pytest.raises(ValueError, match="default"):
        load_model(tmp_path / "supernet", subnet="default")
    save_model(small, tmp_path / "small")
    with pytest.raises(ValueError, match="is no supernet"):
        load_model(tmp_path / "small", subnet="min")


def test_compat_is_refused_where_it_means_nothing(tmp_path: Path) -> None:
    save_model(made("melhubert"), tmp_path / "model")
    with pytest.raises(ValueError, match="no convolutional front-end"):
        load_model(tmp_path / "model", compat="reference")
    save_model(made("hubert, base style"), tmp_path / "hubert")
    assert load_model(tmp_path / "hubert", compat="reference").config.frontend.compat == "reference"  # type: ignore[union-attr]
