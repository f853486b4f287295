"""Two references for the spectral features: kaldi-native-fbank, and Kaldi's definitions frame by frame in float64."""

from __future__ import annotations

import kaldi_native_fbank
import numpy as np

from sslim.frontends import FeaturesConfig, FilterbankConfig, MfccConfig, SpectrogramConfig

EPSILON = 1.1920929e-07

FBANK = FilterbankConfig
# The option sets that the references use.
OPTIONS: dict[str, FeaturesConfig] = {
    "melhubert": FBANK(num_mel_bins=40, window="hamming", waveform_scale=32768.0),
    "s3prl fbank": FBANK(num_mel_bins=80),
    "s3prl mfcc": MfccConfig(),
    "s3prl spectrogram": SpectrogramConfig(),
    "apc": FBANK(num_mel_bins=80, window="hamming"),
    "voxceleb mfcc": MfccConfig(
        filterbank=FBANK(num_mel_bins=30, high_freq_hz=7600.0, snip_edges=False, use_energy=True, waveform_scale=32768.0),
        num_coefficients=24,
    ),
}
# Options that no reference uses together, so that each is met at least once.
OTHERS: dict[str, FeaturesConfig] = {
    "magnitude": FBANK(power=False, use_energy=True, raw_energy=False, window="hann", num_mel_bins=23),
    "rectangular": FBANK(window="rectangular", remove_dc=False, preemphasis=0.0, low_freq_hz=100.0, high_freq_hz=-400.0),
    "blackman": FBANK(window="blackman", use_energy=True, waveform_scale=100.0, frame_length_ms=20.0, frame_shift_ms=8.0),
    "centred mfcc": MfccConfig(filterbank=FBANK(num_mel_bins=40, snip_edges=False), num_coefficients=20, cepstral_lifter=0.0),
}


def filterbank_of(config: FeaturesConfig) -> FilterbankConfig:
    return config if isinstance(config, FilterbankConfig) else config.filterbank


def native(config: FeaturesConfig, waveform_S: np.ndarray) -> np.ndarray:
    """kaldi-native-fbank: (T, F) float32."""
    filterbank = filterbank_of(config)
    mfcc = isinstance(config, MfccConfig)
    options = kaldi_native_fbank.MfccOptions() if mfcc else kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.samp_freq = filterbank.sample_rate
    options.frame_opts.frame_length_ms = filterbank.frame_length_ms
    options.frame_opts.frame_shift_ms = filterbank.frame_shift_ms
    options.frame_opts.window_type = filterbank.window
    options.frame_opts.preemph_coeff = filterbank.preemphasis
    options.frame_opts.remove_dc_offset = filterbank.remove_dc
    options.frame_opts.snip_edges = filterbank.snip_edges
    options.mel_opts.num_bins = filterbank.num_mel_bins
    options.mel_opts.low_freq = filterbank.low_freq_hz
    options.mel_opts.high_freq = filterbank.high_freq_hz
    options.use_energy = filterbank.use_energy
    options.raw_energy = filterbank.raw_energy
    if isinstance(config, MfccConfig):
        options.num_ceps = config.num_coefficients
        options.cepstral_lifter = config.cepstral_lifter
    else:
        options.use_power = filterbank.power
        options.use_log_fbank = filterbank.log
    online = (kaldi_native_fbank.OnlineMfcc if mfcc else kaldi_native_fbank.OnlineFbank)(options)
    online.accept_waveform(filterbank.sample_rate, waveform_S * np.float32(filterbank.waveform_scale))
    online.input_finished()
    return np.array([online.get_frame(t) for t in range(online.num_frames_ready)])


def _frames(filterbank: FilterbankConfig, waveform_S: np.ndarray) -> np.ndarray:
    length = round(filterbank.sample_rate * filterbank.frame_length_ms / 1000)
    shift = round(filterbank.sample_rate * filterbank.frame_shift_ms / 1000)
    x = waveform_S.astype(np.float64) * filterbank.waveform_scale
    if filterbank.snip_edges:
        count, first = max(0, 1 + (len(x) - length) // shift), 0
    else:
        count, first = (len(x) + shift // 2) // shift, shift // 2 - length // 2
    frames = np.zeros((count, length))
    for t in range(count):
        for i in range(length):
            k = first + t * shift + i
            while not 0 <= k < len(x):
                k = -k - 1 if k < 0 else 2 * len(x) - 1 - k
            frames[t, i] = x[k]
    return frames


def _window(name: str, length: int) -> np.ndarray:
    cosine = np.cos(2 * np.pi * np.arange(length) / (length - 1))
    return {
        "hamming": 0.54 - 0.46 * cosine,
        "hann": 0.5 - 0.5 * cosine,
        "povey": (0.5 - 0.5 * cosine) ** 0.85,
        "rectangular": np.ones(length),
        "blackman": 0.42 - 0.5 * cosine + 0.08 * (2 * cosine**2 - 1),
    }[name]


def _mel(filterbank: FilterbankConfig, size: int) -> np.ndarray:
    def mel(hz: float) -> float:
        return 1127.0 * np.log(1.0 + hz / 700.0)

    high = filterbank.high_freq_hz if filterbank.high_freq_hz > 0 else filterbank.sample_rate / 2 + filterbank.high_freq_hz
    edges = np.linspace(mel(filterbank.low_freq_hz), mel(high), filterbank.num_mel_bins + 2)
    weights = np.zeros((size // 2 + 1, filterbank.num_mel_bins))
    for c in range(size // 2):
        value = mel(c * filterbank.sample_rate / size)
        for f in range(filterbank.num_mel_bins):
            left, centre, right = edges[f : f + 3]
            if left < value <= centre:
                weights[c, f] = (value - left) / (centre - left)
            elif centre < value < right:
                weights[c, f] = (right - value) / (right - centre)
    return weights


def exact(config: FeaturesConfig, waveform_S: np.ndarray) -> np.ndarray:
    """Kaldi's definitions in float64: (T, F)."""
    filterbank = filterbank_of(config)
    frames = _frames(filterbank, waveform_S)
    if filterbank.remove_dc:
        frames = frames - frames.mean(axis=1, keepdims=True)
    raw_energy = np.log(np.maximum((frames**2).sum(axis=1), EPSILON))
    before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    windowed = (frames - filterbank.preemphasis * before) * _window(filterbank.window, frames.shape[1])
    energy = raw_energy if filterbank.raw_energy else np.log(np.maximum((windowed**2).sum(axis=1), EPSILON))
    size = 2 ** int(np.ceil(np.log2(frames.shape[1])))
    power = np.abs(np.fft.rfft(windowed, size, axis=1)) ** 2
    if isinstance(config, SpectrogramConfig):
        return np.concatenate([energy[:, None], np.log(np.maximum(power[:, 1:], EPSILON))], axis=1)
    values = (power if filterbank.power else np.sqrt(power)) @ _mel(filterbank, size)
    values = np.log(np.maximum(values, EPSILON)) if filterbank.log else values
    if isinstance(config, MfccConfig):
        bins = filterbank.num_mel_bins
        order = np.arange(config.num_coefficients)[:, None]
        cosines = np.cos(np.pi / bins * (np.arange(bins) + 0.5) * order) * np.sqrt(np.where(order == 0, 1, 2) / bins)
        lifter = config.cepstral_lifter
        values = values @ cosines.T * (1 + 0.5 * lifter * np.sin(np.pi * order[:, 0] / lifter) if lifter else 1.0)
        return np.concatenate([energy[:, None], values[:, 1:]], axis=1) if filterbank.use_energy else values
    return np.concatenate([energy[:, None], values], axis=1) if filterbank.use_energy else values
