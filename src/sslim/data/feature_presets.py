"""Names for the features that people ask for, so that nobody has to write a front-end's description by hand."""

from __future__ import annotations

from sslim.frontends.config import FilterbankConfig, MfccConfig, NormalizationConfig, SpectralFrontendConfig, SpectrogramConfig

# MelHuBERT's filterbank at its 10 ms frame period; the same is stored for 20 ms, where two frames are stacked on the fly.
MELHUBERT = SpectralFrontendConfig(
    features=FilterbankConfig(num_mel_bins=40, window="hamming", waveform_scale=32768.0),
    normalization=NormalizationConfig(kind="global"),
)
# The others are Kaldi's defaults on samples in [-1, 1] with a normalisation of each utterance, as S3PRL's extracters have them.
UTTERANCE = NormalizationConfig(kind="utterance", unbiased=True, eps=1e-10)

FEATURES: dict[str, SpectralFrontendConfig | None] = {
    "melhubert": MELHUBERT,
    "fbank80": SpectralFrontendConfig(features=FilterbankConfig(num_mel_bins=80), normalization=UTTERANCE),
    "fbank240": SpectralFrontendConfig(features=FilterbankConfig(num_mel_bins=80), deltas=2, normalization=UTTERANCE),
    "mfcc39": SpectralFrontendConfig(features=MfccConfig(), deltas=2, normalization=UTTERANCE),
    "spectrogram": SpectralFrontendConfig(features=SpectrogramConfig(), normalization=UTTERANCE),
    "waveform": None,  # a manifest only, for models that take waveforms
}
