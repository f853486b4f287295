"""Streams: chunks of any size give what the whole waveform gives, when they should, and what cannot be streamed is refused."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sslim.batch import EncoderOutput
from sslim.frontends import (
    HUBERT_CONV_LAYERS,
    ConvFrontendConfig,
    FilterbankConfig,
    MfccConfig,
    NormalizationConfig,
    SpectralFrontendConfig,
    StftConfig,
)
from sslim.models import PRESETS, ModelConfig, ProjectionConfig, SpeechModel, build_model
from sslim.models.chunking import ChunkingConfig
from sslim.models.melhubert import melhubert
from sslim.models.storage import stored_as
from sslim.models.streaming import Stream, StreamingEncoder, encode_in_pieces
from sslim.nn.encoder import BlockConfig, LinearRanks
from sslim.nn.positions import SinusoidPositionsConfig
from sslim.nn.relative_positions import RelativePositionsConfig

RATE = 16000
BASE = melhubert(
    num_layers=2, dim=32, num_heads=4, feedforward_dim=48, conv_kernel_size=16, conv_groups=4, num_clusters=20, causal=True
)


def encoder(**settings: object) -> ModelConfig:
    return replace(BASE, encoder=replace(BASE.encoder, **settings))  # type: ignore[arg-type]


def blocks(*described: BlockConfig) -> dict[str, object]:
    return {"blocks": described, "depth_map": tuple(range(len(described)))}


def frontend(**settings: object) -> ModelConfig:
    assert isinstance(BASE.frontend, SpectralFrontendConfig)
    config = replace(BASE.frontend, **settings)  # type: ignore[arg-type]
    base = 13 if isinstance(config.features, MfccConfig) else config.cepstra or 40
    width = base * (1 + config.deltas) * config.stack
    return replace(BASE, frontend=config, projection=replace(BASE.projection, feature_dim=width))


def convolutional(**settings: object) -> ModelConfig:
    layers = tuple(replace(layer, channels=12) for layer in HUBERT_CONV_LAYERS)
    config = ConvFrontendConfig(layers=layers, norm="layer", **settings)  # type: ignore[arg-type]
    return replace(BASE, frontend=config, projection=ProjectionConfig(feature_dim=12, norm=True))


BLOCK = BlockConfig(num_heads=2, head_dim=8, feedforward_dim=24)
UNEVEN = blocks(
    BlockConfig(num_heads=1, head_dim=6, feedforward_dim=10, ranks=LinearRanks(query=3, down=4)),
    BlockConfig(num_heads=0, head_dim=4, feedforward_dim=8),
    BlockConfig(num_heads=3, head_dim=4, feedforward_dim=0, attention_window=5),
)
RELATIVE = RelativePositionsConfig(num_buckets=12, max_distance=20, num_heads=4)
CONFIGS: dict[str, Callable[[], ModelConfig]] = {
    "post-norm": lambda: BASE,
    "pre-norm": lambda: encoder(norm_placement="pre", input_norm=False, final_norm=True),
    "shared blocks": lambda: encoder(blocks=(BLOCK, BLOCK), depth_map=(0, 1, 0, 1)),
    "uneven blocks, low rank": lambda: encoder(**UNEVEN),
    "windows": lambda: encoder(**blocks(replace(BLOCK, attention_window=3), replace(BLOCK, attention_window=0))),
    "sinusoids": lambda: encoder(positions=SinusoidPositionsConfig()),
    "no positions": lambda: encoder(positions=None),
    "relative positions": lambda: encoder(**blocks(*2 * (replace(BLOCK, num_heads=4),)), relative_positions=RELATIVE),
    "relative positions, window": lambda: encoder(
        **blocks(replace(BLOCK, num_heads=4, attention_window=4)), relative_positions=RELATIVE
    ),
    "10 ms": lambda: frontend(stack=1),
    "stacks of 3, tail dropped": lambda: frontend(stack=3, stack_tail="drop"),
    "deltas": lambda: frontend(deltas=2, stack=1),
    "deltas over seven frames": lambda: frontend(deltas=2, delta_window=3, stack=1),
    "deltas over three frames, stacks of 2": lambda: frontend(deltas=2, delta_window=1, stack=2),
    "deltas, stacks of 3": lambda: frontend(deltas=1, stack=3),
    "MFCC, not normalised": lambda: frontend(features=MfccConfig(), normalization=NormalizationConfig()),
    "cepstra": lambda: frontend(cepstra=13),
    "convolutions": convolutional,
    "GRU": PRESETS["apc-tiny"],
    "GRU with codes": PRESETS["vq-apc-tiny"],
}


def made(config: ModelConfig) -> SpeechModel:
    """A model whose norms, biases and statistics are not ones and zeros."""
    model = build_model(config, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    if getattr(model.config.frontend, "normalization", NormalizationConfig()).kind == "global":
        dim = model.frontend.normalized_dim  # type: ignore[union-attr]
        model.set_statistics(torch.linspace(2.0, 6.0, dim), torch.linspace(2.0, 4.0, dim), source="made up")
    return model


def sound(seconds: float, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    loudness = torch.rand(batch, 1 + int(seconds * 20), generator=generator).repeat_interleave(800, 1)
    return (0.3 * loudness * torch.randn(loudness.shape, generator=generator))[:, : int(seconds * RATE)]


def run(stream: Stream, waveform_BS: Tensor, sizes: list[int]) -> EncoderOutput:
    """Pushes chunks of these sizes, then what is left."""
    parts = waveform_BS.split([*sizes, waveform_BS.shape[1] - sum(sizes)], dim=1)
    outputs = [*(stream.push(part) for part in parts), stream.finish()]
    return EncoderOutput(
        final=torch.cat([output.final for output in outputs], 1),
        layers=tuple(torch.cat(layers, 1) for layers in zip(*(output.layers for output in outputs), strict=True)),
        embed=torch.cat([output.embed for output in outputs], 1),  # type: ignore[misc]
        lengths=torch.stack([output.lengths for output in outputs]).sum(0),
    )


def largest_difference(found: EncoderOutput, wanted: EncoderOutput) -> float:
    assert torch.equal(found.lengths, wanted.lengths)
    assert len(found.layers) == len(wanted.layers)
    pairs = [(found.final, wanted.final), (found.embed, wanted.embed), *zip(found.layers, wanted.layers, strict=True)]
    assert all(ours.shape == theirs.shape for ours, theirs in pairs)  # type: ignore[union-attr]
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)  # type: ignore[operator]


def random_sizes(total: int, largest: int, seed: int) -> list[int]:
    """Chunks from nothing to ``largest`` samples, not quite to the end."""
    generator, sizes = torch.Generator().manual_seed(seed), []
    while sum(sizes) < total - 2 * largest:
        sizes.append(int(torch.randint(largest + 1, (), generator=generator)))
    return sizes


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_chunks_of_any_size_give_what_the_whole_gives(name: str) -> None:
    model = made(CONFIGS[name]())
    streaming = StreamingEncoder(model)
    for seed, (seconds, largest) in enumerate([(0.61, 700), (0.5, 4000), (0.437, 2000), (0.36, 300)]):
        waveform_BS = sound(seconds)
        stream, sizes = streaming.open(), random_sizes(waveform_BS.shape[1], largest, seed)
        whole = model.encode(waveform_BS)
        assert largest_difference(run(stream, waveform_BS, sizes), whole) < 1e-5
        assert stream.num_samples == waveform_BS.shape[1]
        assert stream.num_frames == whole.final.shape[1] == model.frontend.num_frames(waveform_BS.shape[1])  # type: ignore[union-attr]
    assert largest_difference(run(streaming.open(), waveform_BS.flip(1), [1000]), whole) > 1e-2  # the control


@pytest.mark.parametrize("storage", ["int8-weights", "int8-dynamic", "bf16"])
@torch.inference_mode()
def test_quantised_models(storage: str) -> None:
    model = stored_as(made(BASE), storage)  # type: ignore[arg-type]
    waveform_BS = sound(0.61)
    found, whole = run(StreamingEncoder(model).open(), waveform_BS, [320] * 20), model.encode(waveform_BS)
    difference = (found.final - whole.final).abs()
    if storage != "int8-dynamic":
        assert difference.max() < 1e-5
    else:  # a rounding of float32 can tip an activation to the next integer, now and then
        assert difference.max() < 0.05
        assert difference.median() < 1e-3


@torch.inference_mode()
def test_long_chunks_under_bf16_autocast() -> None:
    """More frames at once than are multiplied by hand, in narrow groups: where torch's own bf16 convolution is wrong."""
    model = made(PRESETS["melhubert-causal-tiny"]())
    waveform_BS = sound(3.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(StreamingEncoder(model).open(), waveform_BS, [16_000] * 3)
        wanted = model.encode(waveform_BS)
    exact = model.encode(waveform_BS)
    rounding = largest_difference(wanted, exact)
    assert 0 < rounding < 0.2
    assert largest_difference(found, wanted) < 2 * rounding


@torch.inference_mode()
def test_single_samples() -> None:
    model, waveform_BS = made(frontend(deltas=1)), sound(0.13)
    found = run(StreamingEncoder(model).open(), waveform_BS, [1] * (waveform_BS.shape[1] - 1))
    assert largest_difference(found, model.encode(waveform_BS)) < 1e-5


@pytest.mark.parametrize("num_samples", [0, 1, 399, 400, 559, 560, 879, 880])
@pytest.mark.parametrize("name", ["post-norm", "deltas", "deltas, stacks of 3", "convolutions", "stacks of 3, tail dropped"])
@torch.inference_mode()
def test_short_waveforms(name: str, num_samples: int) -> None:
    model, waveform_BS = made(CONFIGS[name]()), sound(0.2)[:, :num_samples]
    found, whole = run(StreamingEncoder(model).open(), waveform_BS, [num_samples // 2]), model.encode(waveform_BS)
    assert found.final.shape == whole.final.shape
    assert found.final.shape[1] == 0 or largest_difference(found, whole) < 1e-5


@torch.inference_mode()
def test_windows_in_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole pass takes chunked attention here, the stream its own mask; all at once as well, in pieces of its own."""
    monkeypatch.setattr("sslim.models.streaming.MAX_FRAMES", 50)
    model = made(encoder(**blocks(replace(BLOCK, attention_window=7), replace(BLOCK, attention_window=2))))
    waveform_BS = sound(4.1)
    assert model.frontend.num_frames(waveform_BS.shape[1]) > 2 * (64 + 7)  # type: ignore[union-attr]
    whole = model.encode(waveform_BS)
    for sizes in ([1280] * 40, [5000] * 13, []):
        assert largest_difference(run(StreamingEncoder(model).open(), waveform_BS, sizes), whole) < 1e-5


@torch.inference_mode()
def test_streams_side_by_side() -> None:
    model, waveform_BS = made(BASE), sound(0.6, batch=3)
    found = run(StreamingEncoder(model).open(batch=3), waveform_BS, [500, 0, 3000, 1700])
    assert largest_difference(found, model.encode(waveform_BS)) < 1e-5
    assert (found.final[0] - found.final[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "forget",
    [
        lambda stream: setattr(stream._features, "_samples_BS", stream._features._samples_BS * 0),
        lambda stream: setattr(stream._features, "_base_BTF", stream._features._base_BTF * 0),
        lambda stream: setattr(stream._encoder, "_context_BTD", None),
        lambda stream: stream._encoder._pasts[1]._room.zero_(),
    ],
    ids=["samples", "frame of a stack", "positions", "keys and values"],
)
@torch.inference_mode()
def test_nothing_that_is_kept_is_kept_in_vain(forget: Callable[[Stream], None]) -> None:
    model, waveform_BS = made(BASE), sound(0.6)
    whole, stream = model.encode(waveform_BS), StreamingEncoder(model).open()
    stream.push(waveform_BS[:, :5200])  # 31 frames of 10 ms: one of them waits for its stack
    forget(stream)
    rest = stream.push(waveform_BS[:, 5200:])
    assert (rest.final - whole.final[:, 15 : 15 + rest.final.shape[1]]).abs().max() > 1e-3


def test_a_stream_goes_on_outside_of_inference_mode_and_has_no_gradients() -> None:
    model, waveform_BS = made(BASE), sound(0.6)
    whole, stream = model.encode(waveform_BS).final, StreamingEncoder(model).open(keep_layers=False)
    with torch.inference_mode():
        first = stream.push(waveform_BS[0, :4000])
    second = stream.push(waveform_BS[0, 4000:])
    assert not second.final.requires_grad
    assert not second.layers
    torch.testing.assert_close(torch.cat([first.final, second.final, stream.finish().final], 1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk_ms", [5, 20, 30, 80, 330])
@pytest.mark.parametrize("name", ["post-norm", "10 ms", "deltas, stacks of 3", "convolutions"])
@torch.inference_mode()
def test_latency_is_the_longest_that_a_frame_waits(name: str, chunk_ms: int) -> None:
    model = made(CONFIGS[name]())
    streaming, waveform_S = StreamingEncoder(model), sound(1.4)[0]
    stream, chunk, longest = streaming.open(), chunk_ms * RATE // 1000, 0
    for start in range(0, len(waveform_S) - chunk + 1, chunk):
        first, stop = stream.num_frames, start + chunk
        stream.push(waveform_S[start:stop])
        if stream.num_frames > first:
            longest = max(longest, stop - first * streaming.hop)
    assert longest / RATE == streaming.latency_s(chunk_ms / 1000)


def test_latency_without_chunks_is_window_and_stack() -> None:
    assert StreamingEncoder(made(BASE)).latency_s() == 0.025 + 0.010
    assert StreamingEncoder(made(frontend(stack=1))).latency_s() == 0.025
    assert StreamingEncoder(made(frontend(stack=1, deltas=2))).latency_s() == 0.025 + 4 * 0.010
    with pytest.raises(ValueError, match="not a whole number"):
        StreamingEncoder(made(BASE)).latency_s(0.00001)
    with pytest.raises(ValueError, match="has no samples"):
        StreamingEncoder(made(BASE)).latency_s(0.0)


@torch.inference_mode()
def test_memory_is_bounded_by_windows() -> None:
    def sizes(config: ModelConfig) -> list[int]:
        stream, found = StreamingEncoder(made(config)).open(keep_layers=False), []
        for _ in range(120):
            stream.push(sound(0.1)[0])
            found.append(stream.num_bytes)
        return found

    block = BlockConfig(num_heads=2, head_dim=8, feedforward_dim=24, attention_window=10)
    bounded, free = (
        sizes(encoder(**blocks(block, block))),
        sizes(encoder(**blocks(*2 * (replace(block, attention_window=None),)))),
    )
    assert len(set(bounded[20:])) <= 2  # what is left of a frame comes and goes
    kept = 2 * 2 * 2 * (10 + 5) * 2 * 8 * 4  # twice, keys and values, of two blocks: frames of 2 heads of 8 numbers
    context, rest = 15 * 32 * 4, (400 * 2 + 40) * 4
    assert kept < max(bounded) <= kept + context + rest
    assert free[-1] > 5 * bounded[-1]
    stream = StreamingEncoder(made(PRESETS["apc-tiny"]())).open()
    stream.push(sound(1.0)[0])
    assert stream.num_bytes <= 2 * 32 * 4 + rest


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (lambda: melhubert(num_layers=1, dim=32, num_heads=4, feedforward_dim=8), "its transformer encoder is not causal"),
        (PRESETS["npc-tiny"], "its convolutional encoder is not causal"),
        (
            lambda: frontend(normalization=NormalizationConfig(kind="utterance")),
            "kind 'utterance'.; expected 'global' or 'none'",
        ),
        (lambda: frontend(normalization=NormalizationConfig(kind="speaker")), "kind 'speaker'.; expected 'global' or 'none'"),
        (lambda: frontend(features=FilterbankConfig(snip_edges=False)), "snip_edges False.; expected True"),
        (lambda: frontend(features=FilterbankConfig(frame_shift_ms=12.0, frame_length_ms=10.0)), "its frames skip sound"),
        (lambda: frontend(features=StftConfig(num_mel_bins=40)), "kind 'stft'.; expected 'filterbank'"),
        (lambda: frontend(deltas=1, delta_kind="savitzky_golay"), "kind 'savitzky_golay'.; expected 'regression'"),
        (lambda: replace(convolutional(), frontend=replace(convolutional().frontend, norm="group")), "norm 'group'"),
        (lambda: convolutional(normalize_waveform=True), "normalize_waveform True.; expected False"),
        (lambda: replace(BASE, chunking=ChunkingConfig(max_frames=10, compat="reference")), "chunking.compat 'reference'"),
        (lambda: replace(BASE, frontend=None), "takes features, not waveforms"),
    ],
)
def test_what_cannot_be_streamed_is_refused(config: Callable[[], ModelConfig], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        StreamingEncoder(build_model(config()))


def test_any_float_type_is_taken_in_the_models_own() -> None:
    """NumPy makes float64; whole numbers are no waveforms."""
    model = made(BASE)
    sound_1S = 0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = model.encode(sound_1S.float()).final
    assert torch.equal(model.encode(sound_1S).final, expected)
    stream = StreamingEncoder(model).open()
    streamed = torch.cat([stream.push(sound_1S).final, stream.finish().final], 1)
    torch.testing.assert_close(streamed, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="the waveforms are a ndarray, not a tensor; expected a float tensor"):
        model.encode(sound_1S.numpy())  # type: ignore[arg-type]
    features_BTF = torch.randn(1, 9, model.config.projection.feature_dim)
    wanted = model.encode_features(features_BTF.half().float()).final
    assert torch.equal(model.encode_features(features_BTF.half()).final, wanted)
    with pytest.raises(ValueError, match=r"the features are torch.int64; expected a float tensor"):
        model.encode_features(features_BTF.long())
    with pytest.raises(ValueError, match=r"the waveforms are torch.int16; expected a float tensor"):
        model.encode((sound_1S * 32768).to(torch.int16))
    doubled = made(BASE).double()
    assert doubled.encode(sound_1S).final.dtype == torch.float64


def test_wrong_use_is_refused() -> None:
    model = made(BASE)
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        StreamingEncoder(made(BASE).train())
    streaming = StreamingEncoder(model)
    with pytest.raises(ValueError, match="batch is 0"):
        streaming.open(batch=0)
    stream = streaming.open(batch=2)
    for wrong in (torch.zeros(100), torch.zeros(3, 100), torch.zeros(2, 100, dtype=torch.int16), torch.zeros(2, 2, 9)):
        with pytest.raises(ValueError, match=r"expected float of shape \(2, samples\)"):
            stream.push(wrong)
    stream.finish()
    for call in (stream.finish, lambda: stream.push(torch.zeros(2, 100))):
        with pytest.raises(ValueError, match="this stream is finished"):
            call()


def test_whole_chunks_are_timed() -> None:
    times: list[float] = []
    output = encode_in_pieces(StreamingEncoder(made(BASE)).open(), sound(0.5)[0], 1280, times.append)
    assert output.final.shape[1] == int(output.lengths) == 24
    assert len(times) == 6
    assert min(times) > 0
