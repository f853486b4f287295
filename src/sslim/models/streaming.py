"""Streaming inference: a waveform in chunks of any size gives, frame for frame, what ``model.encode`` gives for the whole.

    streaming = StreamingEncoder(model)      # what the streams of a model share
    stream = streaming.open()                # one for each speaker
    for chunk in microphone:                 # (S,) samples, as many as there happen to be
        output = stream.push(chunk)          # an EncoderOutput of the new frames; there may be none
    output = stream.finish()                 # the last ones

The model has to be causal throughout (``sslim.models.causality``). Outputs agree with the whole pass to rounding (1e-5); int8
weights with quantised activations are the exception, where a rounding that differs in the last bit of float32 can tip the next
integer. A stream's memory is bounded where every block has an attention window; without one, keys and values of all frames are
kept, and the work for a frame grows with those before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sslim.audio import longest_wait, samples_of_seconds
from sslim.batch import EncoderOutput
from sslim.frontends.streaming import FeatureStream, frame_samples
from sslim.models.causality import require_causal
from sslim.models.encoding import Inputs
from sslim.models.speech import SpeechModel, in_model_precision
from sslim.nn.streaming import EncoderStreams

MAX_FRAMES = 256  # encoded at a time: an hour that is pushed at once needs no mask of its square


class StreamingEncoder:
    """What the streams of one model share. See the module.

    Args:
        model: In eval mode; it has to stay as it is, because a folded copy of its positions' kernel is kept.

    Attributes:
        model: The model.
        span: Samples that a frame needs, from its first one on.
        hop: Samples from one frame to the next.

    Raises:
        ValueError: The model takes no waveforms, is in training mode, or sees the future; the sentence names the part.
    """

    def __init__(self, model: SpeechModel) -> None:
        if model.frontend is None:
            raise ValueError(f"this {model.config.family} model takes features, not waveforms: there is no front-end to stream")
        if model.training:
            raise ValueError("the model is in training mode, where dropout changes its outputs: call model.eval() first")
        require_causal(model.config)
        self.model = model
        self.span, self.hop = frame_samples(model.frontend)
        self.encoder_streams = EncoderStreams(model.encoder)

    def latency_s(self, chunk_s: float | None = None) -> float:
        """Returns the algorithmic latency: seconds from a frame's first sample to the moment when it can come out, at worst.

        That is the window, the other frames of its stack, frames that deltas wait for, and the rest of the chunk in which the
        last of these samples arrives. Computing comes on top.

        Args:
            chunk_s: Seconds that arrive together; None for single samples.

        Raises:
            ValueError: No whole number of samples, or none.
        """
        chunk = 1 if chunk_s is None else self.num_samples(chunk_s)
        assert self.model.frontend is not None
        return longest_wait(self.span, self.hop, chunk) / self.model.frontend.sample_rate

    def num_samples(self, chunk_s: float) -> int:
        """Returns the samples of a chunk.

        Raises:
            ValueError: No whole number of them, or none.
        """
        assert self.model.frontend is not None
        chunk = samples_of_seconds(chunk_s, self.model.frontend.sample_rate)
        if chunk < 1:
            raise ValueError(f"a chunk of {chunk_s:g} s has no samples; expected more than 0 s")
        return chunk

    def open(self, *, batch: int = 1, keep_layers: bool = True) -> Stream:
        """Returns a stream before its first sample.

        Args:
            batch: Waveforms that arrive side by side, in chunks of equal size, and end together.
            keep_layers: Whether every layer is returned.
        """
        return Stream(self, batch=batch, keep_layers=keep_layers)


class Stream:
    """Waveforms that arrive in chunks, and what has to be remembered of them.

    Args:
        streaming: The model.
        batch: Waveforms side by side.
        keep_layers: Whether every layer is returned.

    Attributes:
        num_samples: Samples that have arrived, of each waveform.
        num_frames: Frames that have come out.
    """

    def __init__(self, streaming: StreamingEncoder, *, batch: int, keep_layers: bool) -> None:
        if batch < 1:
            raise ValueError(f"batch is {batch}; a stream has 1 waveform or more")
        assert streaming.model.frontend is not None
        self.streaming, self.batch, self.keep_layers = streaming, batch, keep_layers
        self.num_samples = self.num_frames = 0
        self._features = FeatureStream(streaming.model.frontend, batch)
        self._encoder = streaming.encoder_streams.open()
        self._finished = False

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the stream holds between two chunks, room that is not used yet included.

        They are less than a frame's samples, what is left of a stack, the frames under the positions' kernel, and for every
        block application at most ``2 * (window + frames of a chunk)`` keys and values of ``num_heads * head_dim`` each, four
        bytes a number; without a window twice those of the stream so far. Recurrent layers keep one vector each.
        """
        return self._features.num_bytes + self._encoder.num_bytes

    def push(self, samples: Tensor) -> EncoderOutput:
        """Takes the next samples and returns the frames that they complete.

        Args:
            samples: (S,) or (B, S) float in [-1, 1] at the front-end's sample rate; S may be 0.

        Returns:
            The new frames (B, T, D), T may be 0; without gradients.

        Raises:
            ValueError: The stream is finished, or the samples are no float waveforms, ``batch`` of them.
        """
        samples_BS = self._checked(samples)
        size = MAX_FRAMES * self.streaming.hop
        parts = samples_BS.split(size, dim=1) if samples_BS.shape[1] > size else (samples_BS,)
        with torch.inference_mode(False), torch.no_grad():  # what is kept must not depend on the caller's mode
            outputs = [self._encode(self._features.push(part_BS)) for part_BS in parts]
        self.num_samples += samples_BS.shape[1]
        return outputs[0] if len(outputs) == 1 else _joined(outputs)

    def finish(self) -> EncoderOutput:
        """Ends the waveforms and returns the frames that have waited for more: an incomplete stack, deltas at the end.

        Raises:
            ValueError: The stream is finished already.
        """
        self._check_open()
        self._finished = True
        with torch.inference_mode(False), torch.no_grad():
            return self._encode(self._features.finish())

    def _check_open(self) -> None:
        if self._finished:
            raise ValueError("this stream is finished: open another one for the next waveform")

    def _checked(self, samples: Tensor) -> Tensor:
        self._check_open()
        samples_BS = samples[None] if samples.dim() == 1 else samples
        if samples_BS.dim() != 2 or len(samples_BS) != self.batch or not samples_BS.is_floating_point():
            expected = f"({self.batch}, samples)" + (" or (samples,)" if self.batch == 1 else "")
            raise ValueError(f"samples are {samples.dtype} of shape {tuple(samples.shape)}; expected float of shape {expected}")
        model = self.streaming.model
        return in_model_precision(model, samples_BS, "samples are").to(next(model.parameters()).device)

    def _encode(self, features_BTF: Tensor) -> EncoderOutput:
        if not features_BTF.shape[1]:
            return self._nothing(features_BTF)
        embed_BTD = self.streaming.model.projection(features_BTF)
        output = self._encoder.push(embed_BTD, keep_layers=self.keep_layers)
        self.num_frames += embed_BTD.shape[1]
        return EncoderOutput(final=output.final, lengths=output.lengths, layers=output.layers, embed=embed_BTD)

    def _nothing(self, like: Tensor) -> EncoderOutput:
        encoder = self.streaming.model.config.encoder
        layers = tuple(like.new_zeros(self.batch, 0, dim) for dim in encoder.layer_dims) if self.keep_layers else ()
        return EncoderOutput(
            final=like.new_zeros(self.batch, 0, encoder.dim),
            lengths=torch.zeros(self.batch, dtype=torch.long, device=like.device),
            layers=layers,
            embed=like.new_zeros(self.batch, 0, encoder.input_dim),
        )


def _joined(outputs: list[EncoderOutput]) -> EncoderOutput:
    """One output of consecutive ones."""
    layers = tuple(torch.cat(parts, dim=1) for parts in zip(*(output.layers for output in outputs), strict=True))
    same = bool(layers) and all(output.final is output.layers[-1] or not output.final.shape[1] for output in outputs)
    return EncoderOutput(
        final=layers[-1] if same else torch.cat([output.final for output in outputs], dim=1),
        lengths=torch.stack([output.lengths for output in outputs]).sum(0),
        layers=layers,
        embed=torch.cat([output.embed for output in outputs if output.embed is not None], dim=1),
    )


def encode_in_pieces(
    stream: Stream, waveform_S: Tensor, chunk: int, note: Callable[[float], None] = lambda _: None
) -> EncoderOutput:
    """Runs a whole waveform through a new stream in chunks of equal size.

    Args:
        stream: Just opened, for one waveform.
        waveform_S: (S,) samples.
        chunk: Samples in a chunk.
        note: Told the seconds that computing took for each whole chunk.

    Returns:
        All frames (1, T, D).
    """
    outputs = []
    for start in range(0, len(waveform_S), chunk):
        began = time.perf_counter()
        outputs.append(stream.push(waveform_S[start : start + chunk]))
        if start + chunk <= len(waveform_S):
            note(time.perf_counter() - began)
    return _joined([*outputs, stream.finish()])


def stream_utterances(
    model: SpeechModel,
    inputs: Inputs,
    chunk_ms: float,
    *,
    bf16: bool = False,
    on_error: Callable[[int, Exception], None] | None = None,
    note: Callable[[float], None] = lambda _: None,
) -> Iterator[tuple[int, tuple[Tensor, ...], Tensor]]:
    """Runs a frozen model over waveforms, one after the other in chunks; the counterpart of ``encoding.encode_utterances``.

    Args:
        model: In eval mode.
        inputs: Waveforms.
        chunk_ms: Milliseconds in a chunk.
        bf16: Whether to run under bf16 autocast; results are float32 all the same.
        on_error: Told the position and error of an utterance that cannot be read, which is left out; None lets it rise.
        note: Told the seconds that computing took for each whole chunk.

    Yields:
        Position, its N + 1 layers (T, D) and its final output (T, D), on the CPU, float32.

    Raises:
        ValueError: The model cannot be streamed, or a chunk is no whole number of samples.
    """
    assert inputs.is_waveform
    streaming = StreamingEncoder(model)
    chunk = streaming.num_samples(chunk_ms / 1000)
    for position in range(len(inputs.lengths)):
        try:
            waveform_S = inputs.read(position)
        except (ValueError, OSError) as error:
            if on_error is None:
                raise
            on_error(position, error)
            continue
        with torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16, enabled=bf16):
            output = encode_in_pieces(streaming.open(), waveform_S, chunk, note)
        yield position, tuple(layer[0].float().cpu() for layer in output.layers), output.final[0].float().cpu()
