"""Reading audio, and the arithmetic of samples, frames and seconds."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sslim.audio import (
    AudioError,
    audio_info,
    frames_of_seconds,
    kaldi_num_frames,
    longest_wait,
    num_conv_frames,
    num_conv_stack_frames,
    num_resampled_samples,
    num_stacked_frames,
    read_audio,
    resample,
    samples_of_ms,
    samples_of_seconds,
    stack_reach,
)

RATE = 16000
# HuBERT's feature extractor (arXiv 2106.07447): kernels and strides
HUBERT = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))


def tone(num_samples: int = RATE, rate: int = RATE, frequency_hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency_hz * np.arange(num_samples) / rate)).astype(np.float32)


def cut(source: Path, target: Path, share: float) -> Path:
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


# name: (soundfile's options, tolerance of one sample: half a step of that depth, and libsndfile's scale of 32767 in writing)
FORMATS = {
    "a.wav": ({"subtype": "PCM_16"}, 4e-5),
    "b.wav": ({"subtype": "PCM_U8"}, 1e-2),
    "c.wav": ({"subtype": "PCM_24"}, 1e-6),
    "d.wav": ({"subtype": "PCM_32"}, 1e-6),
    "e.wav": ({"subtype": "FLOAT"}, 0.0),
    "f.wav": ({"subtype": "DOUBLE"}, 0.0),
    "g.wav": ({"subtype": "ULAW"}, 2e-2),
    "h.flac": ({"subtype": "PCM_16"}, 4e-5),
    "i.flac": ({"subtype": "PCM_24"}, 1e-6),
    "j.flac": ({"subtype": "PCM_S8"}, 1e-2),
    "k.aiff": ({"subtype": "PCM_16"}, 4e-5),
    "l.ogg": ({"subtype": "VORBIS"}, 5e-2),
    "m.ogg": ({"subtype": "OPUS"}, 5e-2),
    "n.mp3": ({}, 5e-2),
    "o.wav": ({"format": "RF64", "subtype": "PCM_16"}, 4e-5),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_depth_gives_the_samples_that_were_written(name: str, tmp_path: Path) -> None:
    options, tolerance = FORMATS[name]
    soundfile.write(tmp_path / name, tone(), RATE, **options)
    samples = read_audio(tmp_path / name)
    assert samples.dtype == np.float32
    assert samples.flags.c_contiguous
    np.testing.assert_allclose(samples[1000:-1000], tone()[1000:-1000], rtol=0, atol=tolerance)
    assert audio_info(tmp_path / name).num_samples == len(samples) == RATE
    assert np.abs(samples[1000:-1000] - tone(frequency_hz=441.0)[1000:-1000]).max() > 0.1  # a wrong sound would show


def test_sixteen_bits_are_divided_by_two_to_the_fifteenth(tmp_path: Path) -> None:
    integers = np.array([-32768, -1, 0, 1, 32767], dtype=np.int16)
    for name in ("x.wav", "x.flac"):
        soundfile.write(tmp_path / name, integers, RATE)
        np.testing.assert_array_equal(read_audio(tmp_path / name), integers / np.float32(32768))


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_channels_become_their_mean(subtype: str, tmp_path: Path) -> None:
    left, right = tone(), tone(frequency_hz=1000.0)
    soundfile.write(tmp_path / "x.wav", np.stack([left, right], axis=1), RATE, subtype=subtype)
    samples = read_audio(tmp_path / "x.wav")
    np.testing.assert_allclose(samples, (left + right) / 2, rtol=0, atol=5e-5)
    assert np.abs(samples - left).max() > 0.1
    info = audio_info(tmp_path / "x.wav")
    assert (info.num_samples, info.sample_rate, info.num_channels, info.duration_s) == (RATE, RATE, 2, 1.0)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_other_rates_are_resampled(rate: int, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", tone(rate, rate), rate, subtype="FLOAT")
    samples = read_audio(tmp_path / "x.wav")
    assert len(samples) == RATE
    np.testing.assert_allclose(samples[500:-500], tone()[500:-500], rtol=0, atol=1e-3)
    np.testing.assert_array_equal(read_audio(tmp_path / "x.wav", sample_rate=None), tone(rate, rate))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.sampled_from([8000, 11025, 12000, 22050, 32000, 44100, 48000, 96000]))
def test_length_after_resampling_is_known_beforehand(num_samples: int, rate: int) -> None:
    assert len(resample(np.zeros(num_samples, np.float32), rate, RATE)) == num_resampled_samples(num_samples, rate, RATE)


@pytest.mark.parametrize("name", ["x.wav", "x.flac", "x.ogg"])
def test_segments(name: str, tmp_path: Path) -> None:
    soundfile.write(tmp_path / name, tone(2 * RATE), RATE)
    whole = read_audio(tmp_path / name)
    part = read_audio(tmp_path / name, start_s=0.25, duration_s=0.5)
    np.testing.assert_allclose(part, whole[4000:12000], rtol=0, atol=1e-6)
    assert np.abs(part - whole[4001:12001]).max() > 1e-3  # one sample off would show
    assert len(read_audio(tmp_path / name, start_s=1.5, duration_s=0.9)) == RATE // 2  # times are rounded: a little too long
    for start_s, duration_s, named in (
        (2.5, None, "2.5 s on"),
        (1.5, 2.0, "2 s long"),
        (-1.0, 1.0, "-1 s"),
        (0.0, -1.0, "-1 s long"),
    ):
        with pytest.raises(AudioError, match=f"{named}.* not inside the recording of 2 s"):
            read_audio(tmp_path / name, start_s=start_s, duration_s=duration_s)
    with pytest.raises(AudioError, match="no samples in a segment of 0 s"):
        read_audio(tmp_path / name, start_s=1.0, duration_s=0.0)


def test_all_corrupt_keywords_are_found(shared_data: Path) -> None:
    corrupt = {}
    for path in sorted((shared_data / "keywords" / "alexa").glob("*.flac")):
        try:
            read_audio(path)
        except AudioError as error:
            corrupt[path.stem] = error.reason
    expected = ["031", "032", "033", "034", "049", "051", "145", "193", "194", "195", "196", "246", "256", "257"]
    assert sorted(corrupt) == expected
    assert all(reason.startswith("is corrupt (") for reason in corrupt.values())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", [0.6, 0.02])
def test_truncated_files_are_errors_and_not_shorter_recordings(name: str, share: float, tmp_path: Path) -> None:
    noise = (0.1 * np.random.default_rng(0).standard_normal(4 * RATE)).astype(np.float32)
    soundfile.write(tmp_path / name, noise, RATE, **FORMATS[name][0])
    assert len(read_audio(tmp_path / name)) == len(noise)
    with pytest.raises(AudioError, match=r"truncated|corrupt|cannot be read"):
        read_audio(cut(tmp_path / name, tmp_path / f"cut-{name}", share))


@pytest.mark.parametrize("name", ["x.flac", "x.ogg", "x.mp3"])
def test_damage_in_the_middle_is_an_error(name: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    soundfile.write(tmp_path / name, 0.1 * generator.standard_normal(4 * RATE), RATE)
    data = bytearray((tmp_path / name).read_bytes())
    half = len(data) // 2
    data[half : half + 3000] = generator.bytes(3000)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(AudioError, match="corrupt"):
        read_audio(tmp_path / name)


def test_streamed_files_without_a_length_are_read(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", tone(), RATE)
    wav = bytearray((tmp_path / "x.wav").read_bytes())
    place = wav.find(b"data") + 4
    for size in (b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f"):  # what ffmpeg and sox write to a pipe
        wav[place : place + 4] = size
        (tmp_path / "stream.wav").write_bytes(wav)
        assert len(read_audio(tmp_path / "stream.wav")) == RATE
    soundfile.write(tmp_path / "x.flac", tone(), RATE)
    flac = bytearray((tmp_path / "x.flac").read_bytes())
    flac[21] &= 0xF0  # the 36 bits of STREAMINFO that count the samples
    flac[22:26] = bytes(4)
    (tmp_path / "stream.flac").write_bytes(flac)
    np.testing.assert_array_equal(read_audio(tmp_path / "stream.flac"), read_audio(tmp_path / "x.flac"))
    np.testing.assert_array_equal(
        read_audio(tmp_path / "stream.flac", start_s=0.5, duration_s=0.25), read_audio(tmp_path / "x.flac")[8000:12000]
    )
    assert audio_info(tmp_path / "stream.flac").num_samples == RATE


def test_mp3_without_a_length_is_decoded_to_its_end(tmp_path: Path) -> None:
    sound = np.concatenate([np.zeros(RATE, np.float32), tone(), 0.3 * np.random.default_rng(2).standard_normal(RATE)])
    soundfile.write(tmp_path / "x.mp3", sound, RATE, bitrate_mode="VARIABLE")
    data = (tmp_path / "x.mp3").read_bytes()
    assert b"Xing" in data[:200]
    (tmp_path / "bare.mp3").write_bytes(data[data.find(data[:2], 4) :])  # without the frame that holds the length
    with soundfile.SoundFile(tmp_path / "bare.mp3") as file:
        assert file.frames > 1.1 * len(sound)  # the decoder's guess, which must not make this a truncated file
    assert audio_info(tmp_path / "bare.mp3").num_samples == len(read_audio(tmp_path / "bare.mp3"))
    assert 0 <= len(read_audio(tmp_path / "bare.mp3")) - len(sound) < 4000  # the encoder's padding
    tagged = b"ID3\x04\x00\x00\x00\x00\x20\x00" + bytes(0x20 << 7) + data
    (tmp_path / "tagged.mp3").write_bytes(tagged)
    assert len(read_audio(tmp_path / "tagged.mp3")) == len(sound)


def test_what_is_no_audio_is_named_with_its_reason(tmp_path: Path) -> None:
    cases: dict[str, bytes | None] = {
        "html.wav": b"<html>" * 100,
        "none.wav": b"",
        "flac.flac": b"fLaC" + bytes(100),
        "x.raw": b"abcd",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content or b"")
        with pytest.raises(AudioError, match=f"{name}: (cannot be read as audio|is empty)") as caught:
            read_audio(tmp_path / name)
        assert name not in caught.value.reason  # the reason alone, for the quarantine list
    with pytest.raises(AudioError, match="does not exist"):
        read_audio(tmp_path / "missing.wav")
    with pytest.raises(AudioError, match="is a folder"):
        audio_info(tmp_path)
    soundfile.write(tmp_path / "short.wav", np.zeros(0, np.float32), RATE)
    with pytest.raises(AudioError, match="has no samples"):
        read_audio(tmp_path / "short.wav")
    for bad in (np.nan, np.inf):
        samples = tone()
        samples[1234] = bad
        soundfile.write(tmp_path / "bad.wav", samples, RATE, subtype="FLOAT")
        with pytest.raises(AudioError, match="sample 1234 is not finite"):
            read_audio(tmp_path / "bad.wav")


def test_arithmetic_does_not_import_torch() -> None:
    code = "import sys, sslim.audio; assert 'torch' not in sys.modules and 'soundfile' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@given(st.integers(0, 5000), st.integers(1, 12), st.integers(1, 6), st.integers(0, 3))
def test_conv_frames_are_those_of_a_convolution(num_samples: int, kernel: int, stride: int, padding: int) -> None:
    expected = len(range(0, num_samples + 2 * padding - kernel + 1, stride))
    assert num_conv_frames(num_samples, kernel, stride, padding) == expected


def test_stacks_of_convolutions() -> None:
    convolutions = torch.nn.Sequential(*(torch.nn.Conv1d(1, 1, kernel, stride) for kernel, stride in HUBERT))
    assert stack_reach(HUBERT) == (400, 320)
    for num_samples in (400, 719, 720, 1000, 5555):
        assert num_conv_stack_frames(num_samples, HUBERT) == convolutions(torch.zeros(1, 1, num_samples)).shape[-1]
    assert [num_conv_stack_frames(n, HUBERT) for n in (0, 1, 399, 400, 719, 720)] == [0, 0, 0, 1, 1, 2]


def test_kaldi_frames() -> None:
    assert [kaldi_num_frames(n, 400, 160) for n in (0, 1, 399, 400, 559, 560, 16000)] == [0, 0, 0, 1, 1, 2, 98]
    assert [kaldi_num_frames(n, 400, 160, snip_edges=False) for n in (0, 79, 80, 239, 240, 16000)] == [0, 0, 1, 1, 2, 100]


@given(st.lists(st.integers(0, 100000), min_size=1, max_size=8))
def test_counts_of_arrays_and_tensors_are_those_of_numbers(values: list[int]) -> None:
    functions = (
        lambda n: kaldi_num_frames(n, 400, 160),
        lambda n: kaldi_num_frames(n, 400, 160, snip_edges=False),
        lambda n: num_conv_stack_frames(n, HUBERT),
        lambda n: num_stacked_frames(n, 3),
        lambda n: num_stacked_frames(n, 3, "drop"),
        lambda n: num_resampled_samples(n, 44100, 16000),
    )
    for function in functions:
        expected = [function(value) for value in values]
        assert all(type(value) is int for value in expected)
        assert function(np.array(values)).tolist() == expected
        assert function(torch.tensor(values)).tolist() == expected


def test_stacked_frames() -> None:
    assert [num_stacked_frames(n, 2) for n in (0, 1, 2, 3, 4)] == [0, 1, 1, 2, 2]
    assert [num_stacked_frames(n, 2, "drop") for n in (0, 1, 2, 3, 4)] == [0, 0, 1, 1, 2]


def test_conversions_raise_when_not_whole() -> None:
    assert samples_of_ms(25.0, RATE) == 400
    assert samples_of_seconds(0.1, RATE) == 1600
    assert samples_of_seconds(1e5 + 0.0625, RATE) == 1600001000
    assert frames_of_seconds(0.3, 0.01) == 30  # 29.999999999999996 in binary
    for function, arguments, named in (
        (samples_of_ms, (25.0, 22050), r"25 ms at 22050 Hz in samples is 551\.25"),
        (samples_of_seconds, (0.00001, RATE), r"is 0\.16, not a whole number"),
        (frames_of_seconds, (0.025, 0.01), r"is 2\.5, not a whole number"),
    ):
        with pytest.raises(ValueError, match=named):
            function(*arguments)


def test_the_longest_wait_is_that_of_the_worst_frame() -> None:
    for span, hop, chunk in itertools.product((1, 5, 25, 35), (1, 7, 10, 20), (1, 3, 8, 20, 33, 80)):
        ends = (t * hop + span for t in range(hop * chunk))
        worst = max(span + -(-end // chunk) * chunk - end for end in ends)  # to the end of the chunk with the last sample
        assert longest_wait(span, hop, chunk) == worst
