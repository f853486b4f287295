"""What masked reconstruction alters: stretches of time, bands of channels, magnitudes (TERA, section III-B; Mockingjay, II-A).

A batch's alteration is drawn at once, on the device of its lengths, and kept as vectors over time and over channels.

``mode="reference"`` draws as S3PRL's ``process_train_MAM_data`` does: spans start no later than frame ``length - span - 1``, so
the last frame is never altered and those near either end seldom; the uppermost channel never is; utterances in which
``length * time_share / span`` rounds to 0 are left alone; one dice decides for a whole batch whether it gets noise, and hidden
frames get it too. Only padding is treated otherwise: the reference alters it, and it marks padded frames of utterances that are
shorter than a span, and in v0.1 of all others; here neither happens.

``mode="exact"`` lets spans and bands reach over both ends, so that every frame is equally likely to be altered and so is every
channel; where spans may not overlap, a frame's probability is within 8 % of the mean, because fewer or more of them fit as the
first lies later or earlier. The number of spans is rounded up or down at random, so that short utterances take part; noise is
decided for each utterance by itself; and what is hidden stays zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sslim.batch import Padded, valid_mask, zero_padding


@dataclass(frozen=True, kw_only=True)
class AlterationConfig:
    """What is altered of the features that a model sees.

    Attributes:
        time_share: Expected ``spans * length / frames``; overlaps make the altered share smaller (``mask_proportion``).
        span_min: Shortest span in frames; each utterance draws one length for all its spans (``mask_consecutive_min``).
        span_max: Longest span (``mask_consecutive_max``).
        overlap: Whether spans may overlap (``mask_allow_overlap``).
        bucket_ratio: Where they may not: span lengths from one possible start to the next (``mask_bucket_ratio``).
        zero_share: Probability that what a span covers becomes zero.
        replace_share: Probability that it is replaced by other frames of the utterance; else it stays, but has to be restored.
        dice: Whether that is decided once for an ``utterance``, as in the reference and in Mockingjay's paper, or per ``span``.
        max_channels: Most neighbouring channels that are zero over a whole utterance; how many is drawn from 0 to this many
            (``mask_frequency`` of v0.1).
        max_channel_share: The same as a share of all channels (``mask_frequency`` of later versions).
        noise_probability: Probability of Gaussian noise on all features (``noise_proportion``, TERA's magnitude alteration).
        noise_deviation: Its standard deviation.
        mode: ``exact`` or ``reference``, see the module's docstring.
    """

    time_share: float = 0.15
    span_min: int = 7
    span_max: int = 7
    overlap: bool = True
    bucket_ratio: float = 1.2
    zero_share: float = 0.8
    replace_share: float = 0.1
    dice: Literal["utterance", "span"] = "utterance"
    max_channels: int = 0
    max_channel_share: float = 0.0
    noise_probability: float = 0.0
    noise_deviation: float = 0.2
    mode: Literal["exact", "reference"] = "exact"

    def __post_init__(self) -> None:
        for name in ("time_share", "zero_share", "replace_share", "max_channel_share", "noise_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share from 0 to 1")
        if self.zero_share + self.replace_share > 1.0 + 1e-9:
            raise ValueError(f"zero_share {self.zero_share} and replace_share {self.replace_share} add up to more than 1")
        if not 1 <= self.span_min <= self.span_max:
            raise ValueError(f"spans of {self.span_min} to {self.span_max} frames: expected 1 <= span_min <= span_max")
        if self.bucket_ratio < 1.0:
            raise ValueError(f"bucket_ratio is {self.bucket_ratio}; below 1 spans would overlap")
        if self.max_channels < 0 or self.noise_deviation < 0:
            raise ValueError(
                f"max_channels {self.max_channels} and noise_deviation {self.noise_deviation} must not be negative"
            )
        if self.max_channels and self.max_channel_share:
            raise ValueError(
                f"max_channels {self.max_channels} and max_channel_share {self.max_channel_share} are both given; give one"
            )
        if self.mode == "reference" and self.dice == "span":
            raise ValueError("dice is 'span'; the reference throws one for an utterance: leave out mode='reference'")

    @property
    def alters_channels(self) -> bool:
        """Whether bands of channels become zero."""
        return self.max_channels > 0 or self.max_channel_share > 0

    @property
    def hides_something(self) -> bool:
        """Whether there is something to restore; else (noise alone, or nothing) all elements are."""
        return self.time_share > 0 or self.alters_channels

    def widest_band(self, num_channels: int) -> int:
        """Returns how many of ``num_channels`` channels may become zero.

        Raises:
            ValueError: More than there are; ``reference`` cannot even zero all of them.
        """
        widest = self.max_channels or int(num_channels * self.max_channel_share)
        most = num_channels - 1 if self.mode == "reference" else num_channels
        if widest > most:
            raise ValueError(f"up to {widest} channels are to be zero; of {num_channels} channels {most} can be")
        return widest


@dataclass(frozen=True, kw_only=True)
class Alteration:
    """What is altered in a batch.

    Attributes:
        time_BT: True on frames that spans cover, those that stay as they are included; never on padding.
        zero_BT: True on those that become zero.
        source_BT: Frame that each takes its values from: itself, or another one where it is replaced.
        channels_BF: True on channels that are zero in all frames.
        noise_BTF: What is added; None without noise.
    """

    time_BT: Tensor
    zero_BT: Tensor
    source_BT: Tensor
    channels_BF: Tensor
    noise_BTF: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class _Spans:
    """Spans of a batch in the order they were drawn.

    Attributes:
        starts_BN: First frame; may lie before the utterance.
        sources_BN: First frame of what replaces them.
        active_BN: False where an utterance has fewer spans.
        width_B: Their length.
    """

    starts_BN: Tensor
    sources_BN: Tensor
    active_BN: Tensor
    width_B: Tensor


def _generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """The generator itself where it is on the device, else one there that follows from it."""
    if generator.device.type == device.type:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device=device).manual_seed(seed)


def _below(bounds: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a whole number from 0 up to, not including, each bound (at least 1)."""
    draws = torch.rand(bounds.shape, dtype=torch.float64, device=bounds.device, generator=generator)
    return torch.minimum((draws * bounds).long(), bounds - 1)


def _choose(counts_B: Tensor, most: int, width: int, generator: torch.Generator) -> Tensor:
    """Draws up to ``most`` distinct numbers below each count, in random order: (B, N); after the count they mean nothing."""
    scores = torch.rand(len(counts_B), width, device=counts_B.device, generator=generator)
    scores = scores.masked_fill(~valid_mask(counts_B, width), 2.0)
    return scores.topk(min(most, width), dim=1, largest=False).indices


def _draw_spans(config: AlterationConfig, lengths_B: Tensor, num_frames: int, generator: torch.Generator) -> _Spans:
    width_B = config.span_min + _below(torch.full_like(lengths_B, config.span_max - config.span_min + 1), generator)
    expected_B = config.time_share * lengths_B.double() / width_B
    reference = config.mode == "reference"
    if reference:
        wanted_B = expected_B.round().long()  # half to even, as Python's
    else:
        wanted_B = (expected_B + torch.rand(expected_B.shape, device=expected_B.device, generator=generator)).floor().long()
    most = max(1, int(config.time_share * num_frames / config.span_min) + 1)
    last_B = (lengths_B - width_B - 1).clamp(min=0)  # of the reference's possible starts
    if config.overlap:
        first_B, step_B = (torch.zeros_like(last_B) if reference else 1 - width_B), torch.ones_like(last_B)
        counts_B = last_B + 1 if reference else lengths_B + width_B - 1
        possible = num_frames + config.span_max
    else:
        step_B = (width_B * config.bucket_ratio).round().long()
        if reference:
            first_B = _below(torch.minimum(width_B, last_B) + 1, generator)
            counts_B = torch.div(last_B - first_B, step_B, rounding_mode="floor") + 1
        else:
            first_B = 1 - width_B + _below(step_B, generator)
            counts_B = torch.div(lengths_B - 1 - first_B, step_B, rounding_mode="floor") + 1
        possible = num_frames // config.span_min + 2
    starts_BN = first_B[:, None] + _choose(counts_B, most, possible, generator) * step_B[:, None]
    number = starts_BN.shape[1]
    active_BN = valid_mask(torch.minimum(wanted_B, counts_B).clamp(min=0), number)
    if reference:
        sources_BN = _choose(last_B + 1, number, max(num_frames, number), generator)
    else:
        sources_BN = _below((lengths_B - width_B).clamp(min=0)[:, None].expand(-1, number) + 1, generator)
    return _Spans(starts_BN=starts_BN, sources_BN=sources_BN, active_BN=active_BN, width_B=width_B)


def _last_span(spans: _Spans, lengths_B: Tensor, num_frames: int, span_max: int) -> Tensor:
    """Returns (B, T): the number of the span that covers each frame, the last drawn of several; -1 where none does."""
    offsets_C = torch.arange(span_max, device=lengths_B.device)
    frames_BNC = spans.starts_BN[..., None] + offsets_C
    inside_BNC = spans.active_BN[..., None] & (offsets_C < spans.width_B[:, None, None])
    inside_BNC &= (frames_BNC >= 0) & (frames_BNC < lengths_B[:, None, None])
    numbers_BNC = torch.arange(spans.starts_BN.shape[1], device=lengths_B.device)[None, :, None].expand_as(frames_BNC)
    last_BT = torch.full((len(lengths_B), num_frames), -1, device=lengths_B.device)
    frames, numbers = frames_BNC.clamp(0, num_frames - 1).flatten(1), numbers_BNC.where(inside_BNC, -1).flatten(1)
    return last_BT.scatter_reduce_(1, frames, numbers, "amax")


def _alter_time(
    config: AlterationConfig, lengths_B: Tensor, num_frames: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns time_BT, zero_BT and source_BT of an :class:`Alteration`."""
    own_BT = torch.arange(num_frames, device=lengths_B.device).expand(len(lengths_B), -1)
    if not config.time_share or not num_frames:
        nothing_BT = torch.zeros_like(own_BT, dtype=torch.bool)
        return nothing_BT, nothing_BT, own_BT
    spans = _draw_spans(config, lengths_B, num_frames, generator)
    last_BT = _last_span(spans, lengths_B, num_frames, config.span_max)
    time_BT, number_BT = last_BT >= 0, last_BT.clamp(min=0)
    thrown = spans.starts_BN.shape if config.dice == "span" else (len(lengths_B), 1)
    dice_BT = torch.rand(thrown, device=lengths_B.device, generator=generator)
    dice_BT = dice_BT.gather(1, number_BT) if config.dice == "span" else dice_BT.expand(-1, num_frames)
    zero_BT = time_BT & (dice_BT < config.zero_share)
    replaced_BT = time_BT & ~zero_BT & (dice_BT < config.zero_share + config.replace_share)
    other_BT = spans.sources_BN.gather(1, number_BT) + own_BT - spans.starts_BN.gather(1, number_BT)
    other_BT = torch.minimum(other_BT.clamp(min=0), (lengths_B - 1).clamp(min=0)[:, None])
    return time_BT, zero_BT, other_BT.where(replaced_BT, own_BT)


def _alter_channels(config: AlterationConfig, batch_size: int, num_channels: int, generator: torch.Generator) -> Tensor:
    """Returns (B, F): one band for each utterance, of 0 up to the widest number of channels."""
    device, widest = generator.device, config.widest_band(num_channels)
    if not widest:
        return torch.zeros(batch_size, num_channels, dtype=torch.bool, device=device)
    width_B = _below(torch.full((batch_size,), widest + 1, device=device), generator)
    if config.mode == "reference":
        first_B = _below(num_channels - width_B, generator)
    else:
        first_B = 1 - width_B + _below((num_channels + width_B - 1).clamp(min=1), generator)
    channel_F = torch.arange(num_channels, device=device)
    return (channel_F >= first_B[:, None]) & (channel_F < (first_B + width_B)[:, None])


def draw_alteration(
    lengths_B: Tensor,
    num_frames: int,
    num_features: int,
    config: AlterationConfig,
    generator: torch.Generator,
    *,
    stack: int = 1,
) -> Alteration:
    """Draws what is altered in a padded batch.

    Args:
        lengths_B: (B,) real frames; everything is drawn on their device.
        num_frames: Padded length T.
        num_features: Features F of a frame.
        config: What to alter.
        generator: CPU generator. On another device it seeds one there, which draws other numbers than the CPU's.
        stack: Frames that are stacked in one: each loses the same band. (``reference`` takes their channels for neighbours.)

    Raises:
        ValueError: More channels are to be altered than there are.
    """
    generator = _generator_on(lengths_B.device, generator)
    time_BT, zero_BT, source_BT = _alter_time(config, lengths_B, num_frames, generator)
    repeats = 1 if config.mode == "reference" else stack
    channels_BF = _alter_channels(config, len(lengths_B), num_features // repeats, generator).repeat(1, repeats)
    noise_BTF = None
    if config.noise_probability:
        throws = 1 if config.mode == "reference" else len(lengths_B)
        fires_B11 = torch.rand(throws, 1, 1, device=lengths_B.device, generator=generator) < config.noise_probability
        shape = (len(lengths_B), num_frames, num_features)
        noise_BTF = torch.randn(shape, device=lengths_B.device, generator=generator) * config.noise_deviation * fires_B11
        if config.mode == "exact":
            noise_BTF = noise_BTF.masked_fill(zero_BT[..., None] | channels_BF[:, None], 0.0)
    return Alteration(time_BT=time_BT, zero_BT=zero_BT, source_BT=source_BT, channels_BF=channels_BF, noise_BTF=noise_BTF)


def altered_features(features: Padded, alteration: Alteration) -> Padded:
    """Returns a copy of (B, T, F) features with an alteration done to it; padding is zero."""
    source_BTF = alteration.source_BT[..., None].expand_as(features.values)
    values = features.values.gather(1, source_BTF)
    values = values.masked_fill(alteration.zero_BT[..., None] | alteration.channels_BF[:, None], 0.0)
    if alteration.noise_BTF is not None:
        values = values + alteration.noise_BTF
    return Padded(values=zero_padding(values, features.lengths), lengths=features.lengths)
