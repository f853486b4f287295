"""Windowed attention: chunks give what the band mask gives, at every length, with padding, causal, gradients too."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sslim.nn import encoder as encoder_module
from sslim.nn import windows
from sslim.nn.attention import SelfAttention, attention_mask
from sslim.nn.encoder import Encoder, EncoderConfig, plain_blocks
from sslim.nn.positions import ConvPositionsConfig
from sslim.nn.relative_positions import RelativeGate, RelativePositions, RelativePositionsConfig
from sslim.nn.windows import Chunks, chunks_are_faster, window_chunks

CPU = torch.device("cpu")
CONFIG = EncoderConfig(
    dim=16,
    **plain_blocks(2, 2, 8, 24),
    positions=ConvPositionsConfig(kernel_size=4, groups=4),
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
)


def attention(*, causal: bool = False, relative: bool = False) -> tuple[SelfAttention, RelativePositions | None]:
    torch.manual_seed(1)
    gate = RelativeGate(2, 8, (0, 1)) if relative else None
    module = SelfAttention(16, 2, 8, causal=causal, gate=gate).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3.0)
    if not relative:
        return module, None
    positions = RelativePositions(RelativePositionsConfig(num_buckets=8, max_distance=20, num_heads=2))
    torch.nn.init.normal_(positions.table, 0.0, 2.0)
    return module, positions


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_frames=st.integers(1, 40),
    window=st.integers(0, 45),
    lengths=st.none() | st.lists(st.integers(0, 40), min_size=2, max_size=2),
    causal=st.booleans(),
    relative=st.booleans(),
    min_chunk=st.integers(1, 12),
)
def test_chunks_equal_the_band_mask(num_frames, window, lengths, causal, relative, min_chunk) -> None:
    module, positions = attention(causal=causal, relative=relative)
    lengths_B = None if lengths is None else torch.tensor(lengths).clamp(max=num_frames)
    options = {"causal": causal, "window": window, "device": CPU}
    mask = attention_mask(lengths_B, num_frames, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "MIN_CHUNK", min_chunk)
        chunks = window_chunks(2, lengths_B, num_frames, **options)
    outputs, gradients = [], []
    for seen in (mask, chunks):
        module.zero_grad()
        reach = max(num_frames - 1, chunks.reach)
        distances = None if positions is None else positions(reach)
        x = torch.randn(2, num_frames, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
        output, _ = module(x, seen, distances)
        (output * torch.linspace(-1.0, 1.0, output.numel()).view_as(output)).sum().backward()
        outputs.append(output.detach())
        gradients.append([x.grad, *(p.grad.clone() for p in module.parameters())])
    assert outputs[0].isfinite().all()
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=0)
    for chunked, masked in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(chunked, masked, atol=1e-4, rtol=1e-4)


def test_another_window_gives_another_output() -> None:
    """The control of the property above: the comparison can fail."""
    module, _ = attention()
    x = torch.randn(1, 30, 16, generator=torch.Generator().manual_seed(2))
    mask = attention_mask(None, 30, causal=False, window=5, device=CPU)
    chunks = window_chunks(1, None, 30, causal=False, window=4, device=CPU)
    assert (module(x, mask)[0] - module(x, chunks)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_long_inputs_take_chunks_and_stay_finite(causal: bool, dropout: float) -> None:
    block = replace(CONFIG.blocks[0], attention_window=3)
    positions = replace(CONFIG.positions, causal=causal)
    encoder = Encoder(
        replace(CONFIG, blocks=(block, replace(block, attention_window=None)), causal=causal, positions=positions)
    )
    encoder.initialize(torch.Generator().manual_seed(1))
    encoder.train(dropout > 0.0)
    for layer in encoder.blocks:
        layer.attention.dropout = dropout
    x = torch.randn(3, 201, 16, generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([201, 30, 0])  # the second has windows of padding only, the third nothing else
    seen = encoder._masks(x, lengths, need_weights=False)
    assert isinstance(seen[3, "band"], Chunks)
    assert not isinstance(seen[None, "band"], Chunks)
    output = encoder(x, lengths, keep_layers=True)
    output.final.square().sum().backward()
    assert all(layer.isfinite().all() for layer in output.layers)
    assert all(p.grad.isfinite().all() for p in encoder.parameters())
    assert (output.final[1, 30:] == 0).all()
    assert (output.final[2] == 0).all()
    if not dropout:
        explicit = encoder(x, lengths, need_weights=True)
        assert len(explicit.attentions) == 2
        torch.testing.assert_close(explicit.final, output.final, atol=1e-5, rtol=0)
        alone = encoder(x[1:2, :30])  # short enough for the mask
        torch.testing.assert_close(alone.final, output.final[1:2, :30], atol=1e-5, rtol=0)


def test_chunks_are_not_used_where_they_are_no_less_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chunks_are_faster(3000, causal=False, window=32)
    assert not chunks_are_faster(60, causal=False, window=32)
    assert not chunks_are_faster(3000, causal=False, window=1000)
    encoder = Encoder(replace(CONFIG, blocks=(replace(CONFIG.blocks[0], attention_window=1000),) * 2))
    monkeypatch.setattr(encoder_module, "window_chunks", lambda *_, **__: pytest.fail("chunks for a window beyond the input"))
    encoder(torch.randn(1, 300, 16))


def test_chunks_have_no_weights_to_return() -> None:
    module, _ = attention()
    chunks = window_chunks(1, None, 30, causal=False, window=4, device=CPU)
    with pytest.raises(ValueError, match="no whole matrix of weights"):
        module(torch.randn(1, 30, 16), chunks, need_weights=True)


def test_a_negative_window_is_refused() -> None:
    with pytest.raises(ValueError, match="attention_window of block 1 is -1"):
        replace(CONFIG, blocks=(CONFIG.blocks[0], replace(CONFIG.blocks[1], attention_window=-1)))
