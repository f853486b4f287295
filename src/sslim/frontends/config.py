"""Descriptions of front-ends: which features, which normalisation, how many frames stacked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sslim.config import OMIT_DEFAULT

Window = Literal["hamming", "povey", "hann", "rectangular", "blackman"]


@dataclass(frozen=True, kw_only=True)
class FilterbankConfig:
    """Kaldi-compatible log-Mel filterbank (``compute-fbank-feats``; option names spelt out).

    Attributes:
        sample_rate: Hz.
        num_mel_bins: Mel channels F.
        frame_length_ms: Window length.
        frame_shift_ms: Hop.
        window: Window function.
        preemphasis: Coefficient; 0 for none.
        remove_dc: Subtract each frame's mean.
        snip_edges: Only whole frames; False centres frames and reflects at the edges.
        low_freq_hz: Lower edge of the first channel.
        high_freq_hz: Upper edge of the last; 0 or below counts from the Nyquist frequency.
        power: Power spectrum (True) or magnitude.
        log: Natural logarithm, floored at float32 epsilon.
        use_energy: Put log energy before the channels (F + 1 features).
        raw_energy: Measure that energy before pre-emphasis and windowing.
        energy_floor: Least value of that energy before its logarithm; 0 for none but float32 epsilon (Kaldi), 1 for torchaudio.
        waveform_scale: Factor on waveforms in [-1, 1]; 32768 for 16-bit scale.
    """

    kind: Literal["filterbank"] = "filterbank"
    sample_rate: int = 16000
    num_mel_bins: int = 40
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    window: Window = "povey"
    preemphasis: float = 0.97
    remove_dc: bool = True
    snip_edges: bool = True
    low_freq_hz: float = 20.0
    high_freq_hz: float = 0.0
    power: bool = True
    log: bool = True
    use_energy: bool = False
    raw_energy: bool = True
    energy_floor: float = field(default=0.0, metadata={OMIT_DEFAULT: True})
    waveform_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class MfccConfig:
    """Kaldi-compatible MFCC (``compute-mfcc-feats``): DCT-II of the log filterbank, then liftering.

    Attributes:
        filterbank: The filterbank underneath (its ``use_energy`` replaces C0 by log energy).
        num_coefficients: Cepstra kept, C0 first.
        cepstral_lifter: Liftering constant; 0 for none.
    """

    kind: Literal["mfcc"] = "mfcc"
    filterbank: FilterbankConfig = FilterbankConfig(num_mel_bins=23)
    num_coefficients: int = 13
    cepstral_lifter: float = 22.0


@dataclass(frozen=True, kw_only=True)
class SpectrogramConfig:
    """Kaldi-compatible log power spectrogram (``compute-spectrogram-feats``): bin 0 is replaced by log energy.

    Attributes:
        filterbank: Framing, window and scale; its Mel settings are not used.
    """

    kind: Literal["spectrogram"] = "spectrogram"
    filterbank: FilterbankConfig = FilterbankConfig()


@dataclass(frozen=True, kw_only=True)
class DecibelConfig:
    """Magnitudes in decibels, brought to 0 to 1 and cut there (S3PRL's ``linear`` features; Tacotron's spectrograms).

    The result is ``(20 log10(max(floor, magnitude)) - reference_db + range_db) / range_db``.

    Attributes:
        floor: Least magnitude.
        reference_db: What becomes 1.
        range_db: What lies so far below becomes 0.
    """

    floor: float = 1e-5
    reference_db: float = 20.0
    range_db: float = 100.0


@dataclass(frozen=True, kw_only=True)
class StftConfig:
    """Centred short-time Fourier transform: powers, or Mel channels of them.

    Frame t is centred on sample ``t * shift``, the waveform mirrored at both ends; the Hann window is periodic; the triangular
    channels are linear in Hz. The defaults are S3PRL's ``OnlinePreprocessor`` (torchaudio): with 128 channels and a
    ``log_offset`` of 1e-6, a front-end's ``cepstra`` are torchaudio's MFCC. ``mel_scale="slaney"`` gives librosa's features.

    Attributes:
        sample_rate: Hz.
        num_bins: Bins of the spectrum (``n_freq``); the transform has ``2 * (num_bins - 1)`` samples.
        num_mel_bins: Mel channels F between 0 Hz and half the sample rate; 0 for the bins themselves.
        mel_scale: ``htk`` (torchaudio's default: all channels 1 high) or ``slaney`` (librosa's default: linear below 1 kHz, and
            all channels of the same area).
        frame_length_ms: Window length, in the middle of the transform.
        frame_shift_ms: Hop.
        preemphasis: Coefficient, of the whole waveform before it is mirrored; 0 for none.
        log: Natural logarithm.
        log_offset: Added to powers before the logarithm.
        decibels: Scale of magnitudes, in place of powers and their logarithm; only for the bins themselves.
        level_db: Level in dB that each utterance's root mean square is brought to (``target_level``); None leaves it.
    """

    kind: Literal["stft"] = "stft"
    sample_rate: int = 16000
    num_bins: int = 201
    num_mel_bins: int = 80
    mel_scale: Literal["htk", "slaney"] = field(default="htk", metadata={OMIT_DEFAULT: True})
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    preemphasis: float = field(default=0.0, metadata={OMIT_DEFAULT: True})
    log: bool = True
    log_offset: float = 1e-10
    decibels: DecibelConfig | None = field(default=None, metadata={OMIT_DEFAULT: True})
    level_db: float | None = None


@dataclass(frozen=True, kw_only=True)
class StftMfccConfig:
    """MFCC of Mel channels in decibels, as librosa computes them: DCT-II without liftering.

    Attributes:
        spectrum: The Mel channels, without logarithm.
        num_coefficients: Cepstra kept.
        range_db: Channels more than this below the loudest one of the utterance are raised to there (``top_db``).
        rms: Put the root mean square of the frame's samples, not windowed, in place of C0 (S3PRL).
    """

    kind: Literal["stft_mfcc"] = "stft_mfcc"
    spectrum: StftConfig = StftConfig(num_mel_bins=128, mel_scale="slaney", log=False)
    num_coefficients: int = 13
    range_db: float = 80.0
    rms: bool = True


@dataclass(frozen=True, kw_only=True)
class StoredFeaturesConfig:
    """Features that come from elsewhere and cannot be computed here, for example fMLLR: only their width and times are known.

    Attributes:
        name: What they are, for people.
        dim: Width F.
        frame_shift_ms: From one frame to the next.
        centred: Whether frame t is centred on ``t * frame_shift_ms``; else it stands for a window that starts there.
        frame_length_ms: That window.
        sample_rate: Hz of the sound they were made from.
    """

    kind: Literal["stored"] = "stored"
    name: str
    dim: int
    frame_shift_ms: float
    centred: bool = False
    frame_length_ms: float = 25.0
    sample_rate: int = 16000


FeaturesConfig = FilterbankConfig | MfccConfig | SpectrogramConfig | StftConfig | StftMfccConfig | StoredFeaturesConfig


def features_sample_rate(features: FeaturesConfig) -> int:
    """Returns the sample rate in Hz of the waveforms that features are made from."""
    if isinstance(features, StftMfccConfig):
        return features.spectrum.sample_rate
    return features.filterbank.sample_rate if isinstance(features, MfccConfig | SpectrogramConfig) else features.sample_rate


@dataclass(frozen=True, kw_only=True)
class NormalizationConfig:
    """Mean and variance normalisation of features (after deltas).

    Attributes:
        kind: ``global`` uses stored statistics, ``utterance`` each utterance's own valid frames, ``none`` nothing. ``speaker``
            subtracts the mean of all frames of an utterance's speaker (Kaldi's ``apply-cmvn`` without options), from the base
            features: a corpus holds them without it. Of a waveform alone the speaker is not known, and each utterance is taken
            for all that its speaker has said.
        statistics: Where the global statistics come from, e.g. ``libri-960``; None while they are missing.
        unbiased: For ``utterance``: divide by T - 1 (S3PRL) instead of T.
        eps: Added to the standard deviation.
    """

    kind: Literal["global", "utterance", "speaker", "none"] = "none"
    statistics: str | None = None
    unbiased: bool = False
    eps: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SpectralFrontendConfig:
    """Spectral features, deltas, normalisation, stacking.

    Attributes:
        features: The per-frame transformation.
        cepstra: Coefficients kept of the orthonormal DCT-II of the features, lowest first; 0 leaves the features as they are.
            With a log filterbank underneath this is MFCC without liftering, computed from stored filterbank features.
        deltas: Orders of deltas appended (0, 1, 2).
        delta_window: Frames on each side of a delta's regression.
        delta_kind: ``regression`` repeats the edges and takes the delta of the delta (torchaudio); ``savitzky_golay`` fits a
            polynomial of the order to the features themselves, at the edges to the outermost window (librosa).
        normalization: Mean and variance normalisation.
        stack: Frames concatenated into one.
        stack_tail: What becomes of frames that do not fill a stack: ``pad`` with zeros (MelHuBERT) or ``drop`` (S3PRL).
    """

    kind: Literal["spectral"] = "spectral"
    features: FeaturesConfig
    cepstra: int = 0
    deltas: int = 0
    delta_window: int = 2
    delta_kind: Literal["regression", "savitzky_golay"] = field(default="regression", metadata={OMIT_DEFAULT: True})
    normalization: NormalizationConfig = NormalizationConfig()
    stack: int = 1
    stack_tail: Literal["pad", "drop"] = "pad"


def same_base_features(one: SpectralFrontendConfig, other: SpectralFrontendConfig) -> bool:
    """Returns whether two front-ends have the same base features, which is what a corpus stores."""
    without_speaker = [config.normalization.kind == "speaker" for config in (one, other)]
    return one.features == other.features and without_speaker[0] == without_speaker[1]


@dataclass(frozen=True, kw_only=True)
class ConvLayerConfig:
    """One convolution over time, without padding.

    Attributes:
        channels: Outputs.
        kernel: Taps.
        stride: Inputs from one output to the next.
    """

    channels: int
    kernel: int
    stride: int


HUBERT_CONV_LAYERS = (
    ConvLayerConfig(channels=512, kernel=10, stride=5),
    *(ConvLayerConfig(channels=512, kernel=3, stride=2) for _ in range(4)),
    *(ConvLayerConfig(channels=512, kernel=2, stride=2) for _ in range(2)),
)


@dataclass(frozen=True, kw_only=True)
class ConvFrontendConfig:
    """Learnt convolutions over the waveform (wav2vec 2.0, section 2; HuBERT, section II).

    Attributes:
        sample_rate: Hz.
        layers: The convolutions.
        norm: ``group`` normalises each channel of the first layer over time (HuBERT Base), ``layer`` all channels of a frame
            after every layer (HuBERT Large).
        bias: Whether the convolutions have one.
        channel_scale: Whether the last layer's channels are multiplied by a stored vector (DPHuBERT's ``dummy_weight``).
        normalize_waveform: Whether each utterance's samples get zero mean and unit variance first.
        waveform_eps: Added to that variance (fairseq 1e-5, transformers' feature extractor 1e-7).
        gradient_scale: Factor on gradients into the stack; 0 freezes it.
        reference_mask: Which frames the reference counts as real under ``compat``: those of convolution arithmetic, or
            fairseq's coarse rule, which keeps one or two more.
        compat: ``reference`` reproduces the reference's treatment of padding: group statistics include it, and frames are
            counted by ``reference_mask``. None keeps features free of what an utterance is batched with.
    """

    kind: Literal["convolution"] = "convolution"
    sample_rate: int = 16000
    layers: tuple[ConvLayerConfig, ...] = HUBERT_CONV_LAYERS
    norm: Literal["group", "layer"] = "group"
    bias: bool = False
    channel_scale: bool = False
    normalize_waveform: bool = False
    waveform_eps: float = 1e-5
    gradient_scale: float = 1.0
    reference_mask: Literal["exact", "coarse"] = "exact"
    compat: Literal["reference"] | None = None


FrontendConfig = SpectralFrontendConfig | ConvFrontendConfig
