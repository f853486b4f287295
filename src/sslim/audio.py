"""Reading audio, and all whole-number arithmetic between samples, frames and seconds.

Every count of frames in sslim comes from a function of this file. They take a number or an array (also a tensor) of numbers.

Reading: libsndfile decodes (wav, flac, mp3, ogg with Vorbis or Opus, aiff, …), several channels become their mean, soxr ("HQ")
resamples. A file of which less can be decoded than it promises is an error, never a shorter recording.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

Count = TypeVar("Count")  # int, or an integer array or tensor: the same arithmetic holds for all

MAX_OVERSHOOT_S = 0.5  # a segment may end this much after its recording (rounded times), as in Kaldi's extract-segments
BLOCK_SAMPLES = 1 << 20  # read at a time where the length is unknown
# Streaming writers, which cannot know the length beforehand, declare the largest that fits, more or less
UNKNOWN_BYTES = 0x7FFF0000
UNKNOWN_FRAMES = 1 << 62


class AudioError(ValueError):
    """Audio that cannot be used; the message is one sentence with the file and the reason.

    Attributes:
        reason: The reason alone, for a quarantine list.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class AudioInfo:
    """What a file holds before any conversion.

    Attributes:
        num_samples: In one channel.
        sample_rate: Hz.
        num_channels: Channels.
    """

    num_samples: int
    sample_rate: int
    num_channels: int

    @property
    def duration_s(self) -> float:
        return self.num_samples / self.sample_rate


def _open(path: Path) -> Any:
    import soundfile

    if not path.is_file():
        raise AudioError(path, "is a folder, not an audio file" if path.is_dir() else "does not exist")
    if path.stat().st_size == 0:
        raise AudioError(path, "is empty")
    try:
        return soundfile.SoundFile(path)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless formats, which need settings
        reason = getattr(error, "error_string", str(error)).rstrip(". ")
        raise AudioError(path, f"cannot be read as audio ({reason})") from error


def _mp3_has_length(path: Path) -> bool:
    """Whether an MP3 says how long it is (Xing, Info or VBRI frame); else the decoder extrapolates from the first frame."""
    with path.open("rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3":  # its size is four times seven bits
            file.seek(10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True)))
        else:
            file.seek(0)
        first = file.read(2048)
    return any(tag in first for tag in (b"Xing", b"Info", b"VBRI"))


def _ogg_ends(path: Path) -> bool:
    """Whether the last page of an Ogg file is marked as the end of its stream."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))  # a page has at most 65,307 bytes
        tail = file.read()
    last = tail.rfind(b"OggS\0")
    return last >= 0 and last + 5 < len(tail) and bool(tail[last + 5] & 4)


def _declared_samples(path: Path, file: Any) -> int | None:
    """Returns the samples of each channel that the file promises; None when it promises none.

    Raises:
        AudioError: Bytes are missing at the end. libsndfile itself shortens such wav, aiff, au and w64 files with no more than
            a note in its log, and plays Ogg up to the last page it finds.
    """
    for name, declared, present in re.findall(
        r"^\W*(data|SSND|Data Size|riff)\s*: (\d+) \(should be (\d+)\)", file.extra_info, re.M
    ):
        if int(present) < int(declared) < UNKNOWN_BYTES:
            raise AudioError(
                path, f"is truncated: {present} of the {declared} bytes that its {name.strip()!r} header promises are there"
            )
    missing = re.search(r"frame count (\d+) does not match value from 'ds64' chunk of (\d+)", file.extra_info)
    if missing and int(missing[1]) < int(missing[2]):
        raise AudioError(
            path, f"is truncated: {missing[1]} of the {missing[2]} samples that its 'ds64' header promises are there"
        )
    if file.format == "OGG" and not _ogg_ends(path):
        raise AudioError(path, "is truncated: its last page is not the end of the stream")
    if file.frames >= UNKNOWN_FRAMES or (file.format == "MP3" and not _mp3_has_length(path)):
        return None
    return int(file.frames)


def _decode(path: Path, file: Any, start: int, count: int | None) -> np.ndarray:
    """Decodes ``count`` samples of each channel (all that come when None) from ``start`` on: (S, C) int16 or float32."""
    import soundfile

    # 16-bit samples stay 16-bit: for wav ten times faster than conversion inside libsndfile
    options = {"dtype": "int16" if file.subtype == "PCM_16" else "float32", "always_2d": True}
    try:
        if count is None:
            file.seekable = lambda: False  # soundfile seeks to the place it should have reached, and fails beyond the end
            blocks = [file.read(BLOCK_SAMPLES, **options)]
            while len(blocks[-1]) == BLOCK_SAMPLES:
                blocks.append(file.read(BLOCK_SAMPLES, **options))
            return np.concatenate(blocks)[start:]
        if start:
            file.seek(start)
        return file.read(count, **options)
    except soundfile.LibsndfileError as error:
        reason = error.error_string.removeprefix("Error : ").rstrip(". ")
        raise AudioError(path, f"is corrupt ({reason})") from error


def audio_info(path: str | Path) -> AudioInfo:
    """Returns what a file holds, from its header (the few files without a length there are decoded).

    Raises:
        AudioError: Missing, unreadable or visibly truncated. Damage in the middle shows only when the file is read.
    """
    path = Path(path)
    with _open(path) as file:
        num_samples = _declared_samples(path, file)
        if num_samples is None:
            num_samples = len(_decode(path, file, 0, None))
        return AudioInfo(num_samples=num_samples, sample_rate=file.samplerate, num_channels=file.channels)


def _segment(path: Path, num_samples: int, rate: int, start_s: float, duration_s: float | None) -> tuple[int, int]:
    """First sample and number of samples of a segment."""
    start = round(start_s * rate)
    count = num_samples - start if duration_s is None else round(duration_s * rate)
    if start < 0 or count < 0 or start > num_samples or start + count > num_samples + MAX_OVERSHOOT_S * rate:
        wanted = f"from {start_s:g} s on" if duration_s is None else f"from {start_s:g} s, {duration_s:g} s long,"
        raise AudioError(path, f"the segment {wanted} is not inside the recording of {num_samples / rate:g} s")
    return start, min(count, num_samples - start)


def read_audio(
    path: str | Path, *, sample_rate: int | None = 16000, start_s: float = 0.0, duration_s: float | None = None
) -> np.ndarray:
    """Reads audio as one channel of float32 in [-1, 1].

    Several channels become their mean. Integer samples of n bits are divided by 2^(n-1).

    Args:
        path: Any format of libsndfile: wav, flac, mp3, ogg (Vorbis, Opus), aiff, …
        sample_rate: Hz of the result (soxr, quality HQ); None keeps the file's own.
        start_s: Where to begin.
        duration_s: How much to read; None reads to the end. At most half a second beyond the end is ignored.

    Returns:
        (S,) float32.

    Raises:
        AudioError: The file is missing, unreadable, truncated or corrupt (in the part that is read), has no samples, or
            holds a sample that is not finite.
    """
    path = Path(path)
    with _open(path) as file:
        rate = file.samplerate
        declared = _declared_samples(path, file)
        if declared is None:
            decoded = _decode(path, file, 0, None)
            start, count = _segment(path, len(decoded), rate, start_s, duration_s)
            samples_SC = decoded[start : start + count]
        else:
            start, count = _segment(path, declared, rate, start_s, duration_s)
            samples_SC = _decode(path, file, start, count)
        if len(samples_SC) < count:
            raise AudioError(path, f"is truncated or corrupt: {len(samples_SC)} of {count} promised samples could be decoded")
    mono = _one_channel(samples_SC)
    if not math.isfinite(float(np.abs(mono).max(initial=0.0))):
        raise AudioError(path, f"sample {start + int(np.flatnonzero(~np.isfinite(mono))[0])} is not finite")
    if sample_rate is not None:
        mono = resample(mono, rate, sample_rate)
    if len(mono) == 0:
        raise AudioError(path, "has no samples" if duration_s is None else f"has no samples in a segment of {duration_s:g} s")
    return mono


def _one_channel(samples_SC: np.ndarray) -> np.ndarray:
    mono = samples_SC[:, 0] if samples_SC.shape[1] == 1 else samples_SC.mean(axis=1, dtype=np.float32)
    if samples_SC.dtype == np.int16:
        return np.multiply(mono, np.float32(2.0**-15), dtype=np.float32)
    return np.ascontiguousarray(mono, dtype=np.float32)


def resample(waveform_S: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Returns ``waveform_S`` at another rate (soxr, quality HQ): ``num_resampled_samples`` float32 samples."""
    if from_rate == to_rate:
        return waveform_S
    import soxr

    return soxr.resample(waveform_S, from_rate, to_rate, quality="HQ")


def whole(value: float, what: str) -> int:
    """Returns ``value`` as an int.

    Raises:
        ValueError: It is no whole number (beyond a float's rounding).
    """
    rounded = round(value)
    if not math.isclose(value, rounded, rel_tol=1e-9, abs_tol=1e-6):
        raise ValueError(f"{what} is {value:.6g}, not a whole number")
    return rounded


def samples_of_seconds(duration_s: float, sample_rate: int) -> int:
    """Returns the samples in ``duration_s``.

    Raises:
        ValueError: No whole number of samples.
    """
    return whole(duration_s * sample_rate, f"{duration_s:g} s at {sample_rate} Hz in samples")


def samples_of_ms(duration_ms: float, sample_rate: int) -> int:
    """Returns the samples in ``duration_ms``.

    Raises:
        ValueError: No whole number of samples.
    """
    return whole(duration_ms * sample_rate / 1000, f"{duration_ms:g} ms at {sample_rate} Hz in samples")


def frames_of_seconds(duration_s: float, frame_shift_s: float) -> int:
    """Returns the frame shifts in ``duration_s``.

    Raises:
        ValueError: No whole number of shifts.
    """
    return whole(duration_s / frame_shift_s, f"{duration_s:g} s in frames of {frame_shift_s:g} s")


def num_resampled_samples(num_samples: Count, from_rate: int, to_rate: int) -> Count:
    """Returns the samples that ``resample`` gives: ``num_samples * to_rate / from_rate`` rounded, halves upwards."""
    samples: Any = num_samples
    return (2 * samples * to_rate + from_rate) // (2 * from_rate)


def num_conv_frames(num_samples: Count, kernel: int, stride: int, padding: int = 0) -> Count:
    """Returns the outputs of a convolution with ``padding`` zeros on each side; 0 where the kernel does not fit."""
    padded: Any = num_samples + 2 * padding  # type: ignore[operator]
    return ((padded - kernel) // stride + 1) * (padded >= kernel)


def num_conv_stack_frames(num_samples: Count, layers: Sequence[tuple[int, int]]) -> Count:
    """Returns the outputs of unpadded convolutions one after another, each a (kernel, stride)."""
    for kernel, stride in layers:
        num_samples = num_conv_frames(num_samples, kernel, stride)
    return num_samples


def kaldi_num_frames(num_samples: Count, frame_length: int, shift: int, *, snip_edges: bool = True) -> Count:
    """Returns Kaldi's number of frames: whole frames only, or (``snip_edges`` False) one for each shift, rounded to nearest."""
    if snip_edges:
        return num_conv_frames(num_samples, frame_length, shift)
    samples: Any = num_samples
    return (samples + shift // 2) // shift


def centred_num_frames(num_samples: Count, transform_size: int, shift: int) -> Count:
    """Returns the frames centred on samples 0, ``shift``, 2 ``shift``, … as long as they are no further than the end.

    What is no longer than half a transform gives none: it cannot be mirrored far enough.
    """
    samples: Any = num_samples
    return (samples // shift + 1) * (samples > transform_size // 2)


def num_stacked_frames(num_frames: Count, stack: int, tail: Literal["pad", "drop"] = "pad") -> Count:
    """Returns the frames after stacking ``stack`` in one; an incomplete last one counts with ``pad`` and not with ``drop``."""
    frames: Any = num_frames
    return (frames + stack - 1) // stack if tail == "pad" else frames // stack


def stack_reach(layers: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns the samples that one output of unpadded convolutions (kernel, stride) sees, and those between two outputs."""
    reach, hop = 1, 1
    for kernel, stride in layers:
        reach, hop = reach + (kernel - 1) * hop, hop * stride
    return reach, hop


def longest_wait(span: int, hop: int, chunk: int) -> int:
    """Returns the samples from a frame's first one to the end of the chunk that brings its last one, for the worst frame.

    Frame t needs the samples up to ``t * hop + span`` and so waits ``-(t * hop + span) mod chunk`` for the end of that chunk.
    Over all t this takes every value that leaves the remainder ``-span`` when divided by ``gcd(hop, chunk)``.

    Args:
        span: Samples that a frame needs, from its first one on.
        hop: Samples from one frame to the next.
        chunk: Samples that arrive together; 1 for none to wait for.
    """
    step = math.gcd(hop, chunk)
    return span + chunk - step + -span % step
