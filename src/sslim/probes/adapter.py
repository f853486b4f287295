"""Models that are not sslim's: anything that maps waveforms to frames can be a row of the table.

    adapter = ForwardAdapter(
        name="mine", forward=my_module, output_dim=512, frame_shift_s=0.02, sample_rate=16000, frame_length_s=0.025
    )
    card = probe(Corpus.open("corpora/words"), [adapter], ProbeConfig(task="label"))

Only from Python: the command line imports nobody's code. The module is called with one utterance at a time, so that nothing
depends on how it treats padding; ``batched=True`` promises that it takes lengths and is right about them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sslim.data.corpus import Corpus
from sslim.models.encoding import length_batches
from sslim.probes.baselines import waveform_at
from sslim.probes.features import Representation


@dataclass(frozen=True, kw_only=True)
class ForwardAdapter:
    """A function or module of waveforms with what a probe has to know about it.

    Attributes:
        name: For the table.
        forward: (B, S) float32 waveforms in [-1, 1] to (B, T, D) frames, or to a list of such tensors of equal T and D, one for
            each layer. With ``batched`` it takes (B,) int64 numbers of samples as well and returns a pair: the same, and (B,)
            numbers of valid frames. A module, or that of a bound method, is put into eval mode and run without gradients.
        output_dim: D.
        frame_shift_s: Seconds from one frame to the next.
        sample_rate: In Hz; audio is brought to it.
        frame_length_s: Seconds of sound that a frame sees, from the start of its shift: the phone at its middle is the frame's.
            None for the shift itself, 0 where frame t stands for the moment t shifts after the start.
        num_layers: How many tensors ``forward`` gives.
        batched: See ``forward``.
        device: Where waveforms are put.
    """

    name: str
    forward: Callable[..., Any]
    output_dim: int
    frame_shift_s: float
    sample_rate: int = 16000
    frame_length_s: float | None = None
    num_layers: int = 1
    batched: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.output_dim < 1 or self.num_layers < 1 or self.sample_rate < 1 or not self.frame_shift_s > 0:
            raise ValueError(
                f"{self.name}: output_dim {self.output_dim}, num_layers {self.num_layers}, sample_rate {self.sample_rate} and "
                f"frame_shift_s {self.frame_shift_s} must all be above 0"
            )

    def run(self, waveforms: list[Tensor]) -> list[Tensor]:
        """Returns (L, T, D) float32 of each waveform (S,), on the CPU.

        Raises:
            ValueError: ``forward`` gives anything but what it was said to.
        """
        lengths_B = torch.tensor([len(waveform) for waveform in waveforms], device=self.device)
        padded_BS = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True).to(self.device)
        owner = self.forward if isinstance(self.forward, nn.Module) else getattr(self.forward, "__self__", None)
        if isinstance(owner, nn.Module):
            owner.eval()
        with torch.inference_mode():
            if not self.batched:
                layers = self._checked(self.forward(padded_BS), len(waveforms))
                return [layers[:, 0].float().cpu()]
            output, num_frames_B = self.forward(padded_BS, lengths_B)
        layers = self._checked(output, len(waveforms))
        counts = [int(count) for count in num_frames_B]
        if len(counts) != len(waveforms) or min(counts) < 0 or max(counts) > layers.shape[2]:
            raise ValueError(
                f"{self.name} gives the frame counts {counts} for {len(waveforms)} rows of {layers.shape[2]} frames"
            )
        return [layers[:, row, :count].float().cpu() for row, count in enumerate(counts)]

    def _check_period(self, num_frames: int, num_samples: int, corpus: Corpus, index: int) -> None:
        """Raises ValueError where the frames of an utterance do not fill it at the period that was named."""
        seconds = num_samples / self.sample_rate
        window_s = self.frame_shift_s if self.frame_length_s is None else self.frame_length_s
        missing_s = seconds - num_frames * self.frame_shift_s
        if abs(missing_s) > window_s + 2 * self.frame_shift_s + 0.02 * seconds:
            raise ValueError(
                f"{self.name} gives {num_frames} frames for the {seconds:.2f} s of {corpus.utterance(index).id}: one every "
                f"{1000 * seconds / max(1, num_frames):.3g} ms, not every {1000 * self.frame_shift_s:g} (frame_shift_s)"
            )

    def _checked(self, output: Any, batch_size: int) -> Tensor:
        """Returns (L, B, T, D)."""
        if not isinstance(output, Tensor | list | tuple):
            raise ValueError(f"{self.name} gives {type(output).__name__}; expected a tensor, or a list of them")
        layers = [output] if isinstance(output, Tensor) else list(output)
        for layer in layers:
            if not isinstance(layer, Tensor) or layer.dim() != 3 or layer.shape[::2] != (batch_size, self.output_dim):
                found = f"shape {tuple(layer.shape)}" if isinstance(layer, Tensor) else type(layer).__name__
                raise ValueError(f"{self.name} gives {found}; expected ({batch_size}, frames, {self.output_dim})")
        if len(layers) != self.num_layers or len({layer.shape for layer in layers}) > 1:
            shapes = ", ".join(str(tuple(layer.shape)) for layer in layers)
            raise ValueError(f"{self.name} gives layers of shape {shapes}; expected {self.num_layers} of one shape")
        return torch.stack(layers)

    def representation(self, corpus: Corpus, batch_s: float) -> Representation:
        """Returns its layers of a corpus. How many frames an utterance has is found by running it, once for each.

        Args:
            corpus: Where from.
            batch_s: Seconds of padded audio in a batch, with ``batched``.
        """
        counted: dict[int, int] = {}

        def layers_of(indices: np.ndarray) -> Iterator[tuple[int, Tensor]]:
            max_samples = batch_s * corpus.sample_rate if self.batched else 0
            for batch in length_batches(corpus.num_samples[indices], max_samples):
                waveforms = [torch.from_numpy(waveform_at(corpus, int(indices[p]), self.sample_rate)) for p in batch]
                for position, waveform_S, x_LTD in zip(batch, waveforms, self.run(waveforms), strict=True):
                    self._check_period(x_LTD.shape[1], len(waveform_S), corpus, int(indices[position]))
                    counted[int(indices[position])] = x_LTD.shape[1]
                    yield position, x_LTD

        def num_frames(indices: np.ndarray) -> np.ndarray:
            unknown = np.array([index for index in indices.tolist() if index not in counted], dtype=np.int64)
            for _ in layers_of(unknown):
                pass
            return np.array([counted[index] for index in indices.tolist()], dtype=np.int64)

        parameters = self.forward.parameters() if isinstance(self.forward, nn.Module) else ()
        return Representation(
            name=self.name,
            kind="model",
            num_layers=self.num_layers,
            frame_shift_s=self.frame_shift_s,
            frame_length_s=self.frame_length_s,
            num_parameters=sum(parameter.numel() for parameter in parameters),
            num_frames=num_frames,
            layers_of=layers_of,
        )
