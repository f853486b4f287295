"""Descriptions of front-ends: which features, which normalisation, how many frames stacked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
class StftConfig:
    """Centred short-time Fourier transform: powers, or Mel channels of them (S3PRL's ``OnlinePreprocessor``).

    Frame t is centred on sample ``t * shift``, the waveform mirrored at both ends; the Hann window is periodic; the triangular
    channels (HTK's Mel scale) are linear in Hz and not normalised. With 128 channels and ``log_offset`` 1e-6, a front-end's
    ``cepstra`` are torchaudio's MFCC.

    Attributes:
        sample_rate: Hz.
        num_bins: Bins of the spectrum (``n_freq``); the transform has ``2 * (num_bins - 1)`` samples.
        num_mel_bins: Mel channels F between 0 Hz and half the sample rate; 0 for the bins themselves.
        frame_length_ms: Window length, in the middle of the transform.
        frame_shift_ms: Hop.
        log: Natural logarithm.
        log_offset: Added to powers before the logarithm.
        level_db: Level in dB that each utterance's root mean square is brought to (``target_level``); None leaves it.
    """

    kind: Literal["stft"] = "stft"
    sample_rate: int = 16000
    num_bins: int = 201
    num_mel_bins: int = 80
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    log: bool = True
    log_offset: float = 1e-10
    level_db: float | None = None


FeaturesConfig = FilterbankConfig | MfccConfig | SpectrogramConfig | StftConfig


@dataclass(frozen=True, kw_only=True)
class NormalizationConfig:
    """Mean and variance normalisation of features (after deltas).

    Attributes:
        kind: ``global`` uses stored statistics, ``utterance`` each utterance's own valid frames, ``none`` nothing.
        statistics: Where the global statistics come from, e.g. ``libri-960``; None while they are missing.
        unbiased: For ``utterance``: divide by T - 1 (S3PRL) instead of T.
        eps: Added to the standard deviation.
    """

    kind: Literal["global", "utterance", "none"] = "none"
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
        normalization: Mean and variance normalisation.
        stack: Frames concatenated into one.
        stack_tail: What becomes of frames that do not fill a stack: ``pad`` with zeros (MelHuBERT) or ``drop`` (S3PRL).
    """

    kind: Literal["spectral"] = "spectral"
    features: FeaturesConfig
    cepstra: int = 0
    deltas: int = 0
    delta_window: int = 2
    normalization: NormalizationConfig = NormalizationConfig()
    stack: int = 1
    stack_tail: Literal["pad", "drop"] = "pad"


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
