"""Features of a waveform that arrives in chunks: those of the whole waveform, frame for frame.

Two kinds of remainders are kept: samples from the first one that the next frame needs on, and base frames from the first one
that the next output frame needs on (frames before it for deltas, an incomplete stack, frames that wait for their later
neighbours). Both are then given to the front-end's own functions, so nothing of it is computed in a second way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sslim.audio import num_conv_frames, num_stacked_frames, stack_reach
from sslim.batch import Padded
from sslim.frontends.config import (
    ConvFrontendConfig,
    FilterbankConfig,
    FrontendConfig,
    MfccConfig,
    SpectralFrontendConfig,
    SpectrogramConfig,
)
from sslim.frontends.convolution import ConvFrontend
from sslim.frontends.kaldi import KaldiFeatures
from sslim.frontends.spectral import SpectralFrontend


def whole_utterance_needed(config: FrontendConfig) -> str | None:
    """Returns what of a front-end needs the whole utterance, or looks at its ends, as half a sentence; None where nothing does.

    Such features cannot be streamed. Normalised over the utterance, even the first frame depends on the last sample.
    """
    if isinstance(config, ConvFrontendConfig):
        if config.normalize_waveform:
            return "its waveforms are normalised over the whole utterance (frontend.normalize_waveform True); expected False"
        if config.norm == "group":
            return "its first convolution is normalised over the whole utterance (frontend.norm 'group'); expected 'layer'"
        return None
    features, kind = config.features, config.normalization.kind
    if kind not in ("global", "none"):
        return (
            "its features are normalised over the whole utterance, its end included "
            f"(frontend.normalization.kind {kind!r}); expected 'global' or 'none'"
        )
    if not isinstance(features, FilterbankConfig | MfccConfig | SpectrogramConfig):
        return (
            "its frames are centred and mirror the waveform's ends, or come from elsewhere "
            f"(frontend.features.kind {features.kind!r}); expected 'filterbank', 'mfcc' or 'spectrogram'"
        )
    filterbank = features if isinstance(features, FilterbankConfig) else features.filterbank
    if not filterbank.snip_edges:
        return "its frames are centred and mirror the waveform's ends (frontend.features.snip_edges False); expected True"
    if filterbank.frame_shift_ms > filterbank.frame_length_ms:
        return (
            f"its frames skip sound (frontend.features.frame_shift_ms {filterbank.frame_shift_ms:g}, frame_length_ms "
            f"{filterbank.frame_length_ms:g}); expected a shift within the length"
        )
    if config.deltas and config.delta_kind != "regression":
        return (
            f"its first deltas are those of a later window (frontend.delta_kind {config.delta_kind!r}); expected 'regression'"
        )
    return None


def delta_reach(config: SpectralFrontendConfig) -> int:
    """Returns the base frames on each side that deltas see."""
    return config.deltas * config.delta_window


def frame_samples(frontend: SpectralFrontend | ConvFrontend) -> tuple[int, int]:
    """Returns the samples from an output frame's first to the last that it needs, and those from one frame to the next.

    A stack needs its last frame, deltas need the frames after that: both wait. (What deltas see before the frame's own first
    sample is there already.)
    """
    span, hop = _base_samples(frontend)
    if isinstance(frontend, ConvFrontend):
        return span, hop
    later = frontend.stack - 1 + delta_reach(frontend.config)
    return span + later * hop, frontend.stack * hop


def _base_samples(frontend: SpectralFrontend | ConvFrontend) -> tuple[int, int]:
    """Samples that a base frame sees, and those from one to the next."""
    if isinstance(frontend, ConvFrontend):
        return stack_reach([(layer.kernel, layer.stride) for layer in frontend.config.layers])
    assert isinstance(frontend.features, KaldiFeatures)
    return frontend.features.frame_length, frontend.features.shift


class FeatureStream:
    """Waveform chunks to a front-end's output frames, each as soon as the samples that it needs are there.

    Args:
        frontend: It must not need whole utterances (:func:`whole_utterance_needed`).
        batch: Waveforms B that arrive side by side, in chunks of equal size.
    """

    def __init__(self, frontend: SpectralFrontend | ConvFrontend, batch: int = 1) -> None:
        assert whole_utterance_needed(frontend.config) is None
        self.frontend = frontend
        self._span, self._hop = _base_samples(frontend)
        self._samples_BS = torch.empty(batch, 0)
        self._base_BTF: Tensor | None = None
        self._num_base_dropped = self._num_given = 0  # base frames before those kept; output frames given so far

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the stream holds."""
        kept = [self._samples_BS, *([] if self._base_BTF is None else [self._base_BTF])]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def push(self, samples_BS: Tensor) -> Tensor:
        """Takes (B, S) samples, S may be 0; returns the frames (B, T, F) that they complete, T may be 0."""
        samples_BS = torch.cat([self._samples_BS.to(samples_BS), samples_BS], dim=1)
        num_new = num_conv_frames(samples_BS.shape[1], self._span, self._hop)
        self._samples_BS = samples_BS[:, num_new * self._hop :].clone() if num_new else samples_BS
        if not num_new:
            return self._nothing(samples_BS)
        lengths_B = torch.full((len(samples_BS),), samples_BS.shape[1], device=samples_BS.device)
        if isinstance(self.frontend, ConvFrontend):
            return self.frontend(samples_BS, lengths_B).values
        return self._finish(self.frontend.base_features(samples_BS, lengths_B).values, is_end=False)

    def finish(self) -> Tensor:
        """Returns the frames that have waited for later ones, now that the waveform is over."""
        if isinstance(self.frontend, ConvFrontend) or self._base_BTF is None:
            return self._nothing(self._samples_BS)
        return self._finish(self._base_BTF[:, :0], is_end=True)

    def _nothing(self, like: Tensor) -> Tensor:
        return like.new_zeros(len(like), 0, self.frontend.feature_dim, dtype=torch.promote_types(like.dtype, torch.float32))

    def _finish(self, new_BTF: Tensor, *, is_end: bool) -> Tensor:
        """Base frames to the output frames that are complete, by the front-end's own second half over what is kept."""
        assert isinstance(self.frontend, SpectralFrontend)
        stack, reach = self.frontend.stack, delta_reach(self.frontend.config)
        base_BTF = new_BTF if self._base_BTF is None else torch.cat([self._base_BTF, new_BTF], dim=1)
        num_base = self._num_base_dropped + base_BTF.shape[1]
        num_ready = num_stacked_frames(max(num_base - reach, 0), stack, "drop")
        num_ready = self.frontend.num_stacked_frames(num_base) if is_end else num_ready
        lengths_B = torch.full((len(base_BTF),), base_BTF.shape[1], device=base_BTF.device)
        before = self._num_base_dropped // stack  # only whole stacks are dropped
        values = self.frontend.finish(Padded(values=base_BTF, lengths=lengths_B)).values
        values = values[:, self._num_given - before : num_ready - before]
        self._num_given = num_ready
        dropped = max(self._num_given * stack - reach, 0) // stack * stack
        self._base_BTF = base_BTF[:, dropped - self._num_base_dropped :].clone()
        self._num_base_dropped = dropped
        return values
