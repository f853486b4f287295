"""Speed of the filterbank against kaldi-native-fbank, one thread, on the same audio.

The two take turns, so that whatever else the machine does meets both alike, and processor time is counted, not waiting; the
medians over all turns are compared. A call costs about 0.1 ms whatever its length, so short utterances gain less.

    python benchmarks/features.py [--data FOLDER] [--repetitions 9] [--seconds 120]
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import kaldi_native_fbank
import numpy as np
import torch

from sslim.audio import AudioError, read_audio
from sslim.frontends import FilterbankConfig
from sslim.frontends.kaldi import KaldiFeatures

CONFIG = FilterbankConfig(num_mel_bins=40, window="hamming", waveform_scale=32768.0)
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def waveforms(folder: Path | None, seconds: float) -> tuple[list[np.ndarray], str]:
    """Real utterances of about ``seconds`` in total, or noise of the same lengths where there are none."""
    audio: list[np.ndarray] = []
    paths = [] if folder is None else sorted(p for p in folder.rglob("*") if p.suffix in (".wav", ".flac", ".ogg", ".mp3"))
    for path in (paths[i] for i in np.random.default_rng(0).permutation(len(paths))):
        if sum(map(len, audio)) >= seconds * 16000:
            break
        try:
            audio.append(read_audio(path))
        except AudioError:  # the folder holds corrupt files on purpose
            continue
    if audio:
        return audio, f"{len(audio)} recordings from {folder.name if folder else ''}"
    generator = np.random.default_rng(0)
    while sum(map(len, audio)) < seconds * 16000:
        audio.append(0.1 * generator.standard_normal(generator.integers(16000, 16 * 16000)).astype(np.float32))
    return audio, f"{len(audio)} pieces of noise"


def ours(audio: list[np.ndarray]) -> Callable[[], int]:
    features = KaldiFeatures(CONFIG)

    def run() -> int:
        with torch.inference_mode():
            return sum(features(torch.from_numpy(x)[None], torch.tensor([len(x)])).values.shape[1] for x in audio)

    return run


def kaldi(audio: list[np.ndarray]) -> Callable[[], int]:
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0
    options.frame_opts.window_type = "hamming"
    options.mel_opts.num_bins = 40
    scaled = [x * np.float32(32768) for x in audio]  # outside the measurement, in its favour

    def run() -> int:
        total = 0
        for x in scaled:
            fbank = kaldi_native_fbank.OnlineFbank(options)
            fbank.accept_waveform(16000, x)
            fbank.input_finished()
            total += fbank.num_frames_ready
        return total

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=SHARED if SHARED.is_dir() else None, help="folder of audio (default: ../shared/data)"
    )
    parser.add_argument("--repetitions", type=int, default=9, help="turns of each")
    parser.add_argument("--seconds", type=float, default=120.0, help="audio in one turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    audio, description = waveforms(options.data, options.seconds)
    duration_s = sum(map(len, audio)) / 16000
    contestants = {"sslim": ours(audio), "kaldi-native-fbank": kaldi(audio)}
    frames = {name: run() for name, run in contestants.items()}
    assert len(set(frames.values())) == 1, frames
    times_s: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.repetitions):
        for name, run in contestants.items():
            started = time.process_time()
            run()
            times_s[name].append(time.process_time() - started)
    speed = {name: duration_s / statistics.median(times) for name, times in times_s.items()}
    ratio = speed["sslim"] / speed["kaldi-native-fbank"]
    print(f"40-bin filterbank, one thread, {description}, {duration_s:.0f} s of audio, {options.repetitions} turns")
    print(f"{'':20}  x real time (median)  (best)")
    for name, times in times_s.items():
        print(f"{name:20}  {speed[name]:20,.0f}  {duration_s / min(times):6,.0f}")
    result = {
        "benchmark": "features",
        "audio": description,
        "duration_s": round(duration_s, 1),
        "repetitions": options.repetitions,
        "sslim_x_real_time": round(speed["sslim"]),
        "kaldi_native_fbank_x_real_time": round(speed["kaldi-native-fbank"]),
        "ratio": round(ratio, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
