"""What spectral features share: one utterance at a time or a whole batch, and tables that no cast may shorten."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sslim.batch import Padded, zero_padding


class FixedTables(nn.Module):
    """Numpy tables as buffers that are no part of the state, follow the device and keep their type when a model is cast."""

    def set_tables(self, tables: Mapping[str, np.ndarray | None]) -> None:
        """Registers the tables by name; None for one that this configuration lacks."""
        self._tables = {name: table for name, table in tables.items() if table is not None}
        for name in tables:
            self.register_buffer(name, self._table(name, torch.device("cpu")), persistent=False)

    def _table(self, name: str, device: torch.device) -> Tensor | None:
        if name not in self._tables:
            return None
        table = self._tables[name]
        return torch.tensor(table, dtype=torch.float64 if table.dtype == np.float64 else torch.float32, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name in self._tables:
            if getattr(self, name).device.type != "meta":
                setattr(self, name, self._table(name, getattr(self, name).device))
        return self


def features_of_batch(
    waveform_BS: Tensor,
    lengths_B: Tensor,
    *,
    dim: int,
    num_frames: Callable[[int], int],
    compute: Callable[[Tensor, Tensor, int, torch.dtype], Tensor],
) -> Padded:
    """Computes features of a padded batch of waveforms: on a CPU one utterance after the other, else all at once.

    Args:
        waveform_BS: (B, S) float samples in [-1, 1].
        lengths_B: (B,) valid samples of each row.
        dim: Width F of the features.
        num_frames: Samples to frames.
        compute: (B, S) samples, zero beyond (B,) lengths, to (B, T, F) of a type; beyond a row's frames it may be anything.

    Returns:
        (B, T, F), T the frames of the longest row, zero beyond each length; float32 (float64 for float64 samples).

    Raises:
        ValueError: Shapes or lengths do not fit.
    """
    if waveform_BS.dim() != 2 or lengths_B.shape != waveform_BS.shape[:1] or not waveform_BS.is_floating_point():
        raise ValueError(
            f"waveforms are {waveform_BS.dtype} of shape {tuple(waveform_BS.shape)} with {tuple(lengths_B.shape)} lengths; "
            "expected float (batch, samples) with one length for each"
        )
    lengths = lengths_B.tolist()
    if lengths and not 0 <= min(lengths) <= max(lengths) <= waveform_BS.shape[1]:
        raise ValueError(f"lengths are {lengths}; the waveforms have {waveform_BS.shape[1]} samples")
    counts = [num_frames(length) for length in lengths]
    frames_B = torch.tensor(counts, dtype=torch.int64, device=waveform_BS.device)
    double = waveform_BS.dtype == torch.float64
    longest = max(counts, default=0)
    if longest == 0:
        empty = waveform_BS.new_zeros(len(waveform_BS), 0, dim, dtype=torch.float64 if double else torch.float32)
        return Padded(values=empty, lengths=frames_B)
    if waveform_BS.device.type != "cpu":
        lengths_B = lengths_B.to(waveform_BS.device)
        # float64 to the end costs little on a GPU, where a product in float32 may be rounded to TF32
        zeroed_BS = zero_padding(waveform_BS[..., None], lengths_B)[..., 0]
        values = zero_padding(compute(zeroed_BS, lengths_B, longest, torch.float64), frames_B)
        return Padded(values=values if double else values.float(), lengths=frames_B)
    rows = []
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        whole = len(lengths) == 1 and length == waveform_BS.shape[1]
        row_1S = waveform_BS if whole else waveform_BS[b : b + 1, :length]
        row = compute(row_1S, lengths_B[b : b + 1], count, torch.float64 if double else torch.float32)
        rows.append(functional.pad(row, (0, 0, 0, longest - count)) if count < longest else row)
    return Padded(values=torch.cat(rows) if len(rows) > 1 else rows[0], lengths=frames_B)
