"""Names for the features that people ask for, so that nobody has to write a front-end's description by hand.

A name stands for one exact definition. When a definition changes, its number goes up and the old one stays: ``spectrogram`` is
the newest, ``spectrogram@1`` the first. A corpus and a model hold the whole description, not the name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sslim.config import nearest
from sslim.frontends.config import (
    DecibelConfig,
    FeaturesConfig,
    FilterbankConfig,
    MfccConfig,
    NormalizationConfig,
    SpectralFrontendConfig,
    SpectrogramConfig,
    StftConfig,
    StftMfccConfig,
    StoredFeaturesConfig,
)

# MelHuBERT's filterbank at its 10 ms frame period; the same is stored for 20 ms, where two frames are stacked on the fly.
MELHUBERT = SpectralFrontendConfig(
    features=FilterbankConfig(num_mel_bins=40, window="hamming", waveform_scale=32768.0),
    normalization=NormalizationConfig(kind="global"),
)
# What S3PRL calls cmvn, in three meanings: its extracters', its librosa scripts' and its Kaldi recipes'.
UTTERANCE = NormalizationConfig(kind="utterance", unbiased=True, eps=1e-10)
LIBROSA_UTTERANCE = NormalizationConfig(kind="utterance", eps=1e-16)
SPEAKER = NormalizationConfig(kind="speaker")

KALDI_SCALE = 32768.0  # Kaldi's own programs take 16-bit samples as they are; S3PRL's extracters take -1 to 1
LEVEL_DB = -25.0  # target_level of S3PRL's OnlinePreprocessor


@dataclass(frozen=True, kw_only=True)
class FeaturePreset:
    """A named front-end.

    Attributes:
        frontend: Its description; None for waveforms.
        about: What it is, for people.
        used_by: Which published models and tables take it.
        version: Goes up when the definition changes.
    """

    frontend: SpectralFrontendConfig | None
    about: str
    used_by: str = ""
    version: int = 1


def _kaldi(features: FeaturesConfig, deltas: int = 0, normalization: NormalizationConfig = UTTERANCE) -> SpectralFrontendConfig:
    return SpectralFrontendConfig(features=features, deltas=deltas, normalization=normalization)


def _librosa(features: FeaturesConfig, deltas: int = 0) -> SpectralFrontendConfig:
    return SpectralFrontendConfig(
        features=features, deltas=deltas, delta_window=4, delta_kind="savitzky_golay", normalization=LIBROSA_UTTERANCE
    )


def _torch(features: StftConfig, *, cepstra: int = 0, deltas: int = 0) -> SpectralFrontendConfig:
    features = replace(features, level_db=LEVEL_DB)
    return SpectralFrontendConfig(features=features, cepstra=cepstra, deltas=deltas, normalization=UTTERANCE)


FBANK_80 = FilterbankConfig(num_mel_bins=80)
LIBROSA_FBANK = StftConfig(num_mel_bins=80, mel_scale="slaney", log_offset=1e-6)
LIBROSA_MEL = replace(LIBROSA_FBANK, num_bins=1025, frame_length_ms=50.0, frame_shift_ms=12.5)
LINEAR = StftConfig(
    num_bins=1025,
    num_mel_bins=0,
    frame_length_ms=50.0,
    frame_shift_ms=12.5,
    preemphasis=0.97,
    log=False,
    decibels=DecibelConfig(),
)
TORCH_MFCC = StftConfig(num_mel_bins=128, log_offset=1e-6)
KALDI_VOXCELEB = MfccConfig(
    filterbank=FilterbankConfig(
        num_mel_bins=30, high_freq_hz=7600.0, snip_edges=False, use_energy=True, waveform_scale=KALDI_SCALE
    ),
    num_coefficients=24,
)
FMLLR = StoredFeaturesConfig(name="fMLLR", dim=40, frame_shift_ms=10.0)

PRESETS: dict[str, FeaturePreset] = {
    "melhubert": FeaturePreset(
        frontend=MELHUBERT,
        about="40 log-Mel channels, Hamming window, 16-bit scale; global mean and deviation",
        used_by="MelHuBERT",
    ),
    "fbank80": FeaturePreset(
        frontend=_kaldi(FBANK_80), about="Kaldi filterbank, per utterance", used_by="S3PRL baseline `fbank` without deltas"
    ),
    "fbank240": FeaturePreset(
        frontend=_kaldi(FBANK_80, 2),
        about="Kaldi filterbank with two orders of deltas, per utterance",
        used_by="S3PRL `mockingjay` (fbankBase), `tera_fbankBase_T_F_AdamW_b32_200k_100hr`, SUPERB's FBANK",
    ),
    "fbank80-hamming": FeaturePreset(
        frontend=_kaldi(replace(FBANK_80, window="hamming")),
        about="Kaldi filterbank with a Hamming window, per utterance",
        used_by="APC, VQ-APC, NPC of S3PRL",
    ),
    "fbank80-speaker": FeaturePreset(
        frontend=_kaldi(replace(FBANK_80, waveform_scale=KALDI_SCALE), 0, SPEAKER),
        about="Kaldi filterbank, the mean of each speaker subtracted",
        used_by="S3PRL v0.1 `libri_fbank_cmvn`",
    ),
    "mfcc13": FeaturePreset(frontend=_kaldi(MfccConfig()), about="Kaldi MFCC, per utterance"),
    "mfcc39": FeaturePreset(
        frontend=_kaldi(MfccConfig(), 2),
        about="Kaldi MFCC with two orders of deltas, per utterance",
        used_by="S3PRL baseline `mfcc`",
    ),
    "mfcc39-speaker": FeaturePreset(
        frontend=_kaldi(MfccConfig(filterbank=FilterbankConfig(num_mel_bins=23, waveform_scale=KALDI_SCALE)), 2, SPEAKER),
        about="Kaldi MFCC with two orders of deltas, the mean of each speaker subtracted",
        used_by="S3PRL v0.1 `libri_mfcc_cmvn`",
    ),
    "mfcc24-voxceleb": FeaturePreset(
        frontend=_kaldi(KALDI_VOXCELEB, 0, NormalizationConfig()),
        about="MFCC of Kaldi's VoxCeleb recipe, as they are",
        used_by="S3PRL v0.1 `tera_voxceleb_mfccBase`",
    ),
    "spectrogram": FeaturePreset(
        frontend=_kaldi(SpectrogramConfig(filterbank=FilterbankConfig(energy_floor=1.0))),
        about="Kaldi log power spectrum, bin 0 the energy, not below 0 as in torchaudio; per utterance",
        used_by="S3PRL baseline `spectrogram`",
        version=2,
    ),
    "logmel80": FeaturePreset(
        frontend=_torch(StftConfig()),
        about="torchaudio's log-Mel (HTK's scale) at -25 dB, per utterance",
        used_by="S3PRL `tera_logMelBase…`, `audio_albert_logMelBase…`, `mockingjay_logMel…`, baseline `mel`",
    ),
    "linear201": FeaturePreset(
        frontend=_torch(StftConfig(num_mel_bins=0)),
        about="logarithm of torch's power spectrum at -25 dB, per utterance",
        used_by="target of S3PRL `mockingjay_logMelLinearLarge…`, baseline `linear`",
    ),
    "mfcc13-torch": FeaturePreset(frontend=_torch(TORCH_MFCC, cepstra=13), about="torchaudio's MFCC at -25 dB, per utterance"),
    "mfcc39-torch": FeaturePreset(
        frontend=_torch(TORCH_MFCC, cepstra=13, deltas=2),
        about="torchaudio's MFCC at -25 dB with two orders of deltas, per utterance",
    ),
    **{
        f"fbank{80 * (1 + deltas)}-librosa": FeaturePreset(
            frontend=_librosa(LIBROSA_FBANK, deltas),
            about=f"librosa log-Mel (Slaney's scale), 25 ms every 10 ms{text}, per utterance",
            used_by=used,
        )
        for deltas, text, used in (
            (0, "", "S3PRL v0.1 `libri_fbank80`: `aalbert_libri_fbank…`, `upstream_fbankBase`"),
            (1, " with deltas", "S3PRL v0.1 `libri_fbank160`: `mockingjay_libri_fbank…`"),
            (2, " with two orders of deltas", "S3PRL v0.1 `libri_fbank240`"),
        )
    },
    **{
        f"mel{80 * (1 + deltas)}-librosa": FeaturePreset(
            frontend=_librosa(LIBROSA_MEL, deltas),
            about=f"librosa log-Mel (Slaney's scale), 50 ms every 12.5 ms{text}, per utterance",
            used_by=used,
        )
        for deltas, text, used in (
            (0, "", "S3PRL v0.1 `libri_mel80`"),
            (1, " with deltas", "S3PRL v0.1 `libri_mel160`: probably the oldest Mockingjay checkpoints"),
            (2, " with two orders of deltas", "S3PRL v0.1 `libri_mel240`"),
        )
    },
    "mfcc13-librosa": FeaturePreset(
        frontend=_librosa(StftMfccConfig()), about="librosa MFCC, C0 replaced by the root mean square, per utterance"
    ),
    "mfcc39-librosa": FeaturePreset(
        frontend=_librosa(StftMfccConfig(), 2),
        about="librosa MFCC, C0 replaced by the root mean square, with two orders of deltas, per utterance",
        used_by="S3PRL v0.1 `libri_mfcc39`",
    ),
    "linear1025": FeaturePreset(
        frontend=_librosa(LINEAR),
        about="magnitudes after pre-emphasis in decibels, 0 to 1, 50 ms every 12.5 ms, per utterance",
        used_by="S3PRL v0.1 `libri_linear1025`: target of `mockingjay_libri_LinearLarge`",
    ),
    "fmllr40": FeaturePreset(
        frontend=SpectralFrontendConfig(features=FMLLR),
        about="40 fMLLR features of Kaldi's recipes, as they are: never computed, only read from archives",
        used_by="S3PRL v0.1 `libri_fmllr_cmvn`: `tera_libri_fmllr…`",
    ),
    "waveform": FeaturePreset(
        frontend=None, about="a manifest only, for models that take waveforms", used_by="HuBERT, LightHuBERT"
    ),
}

EARLIER: dict[tuple[str, int], SpectralFrontendConfig] = {  # definitions that were replaced, by name and version
    ("spectrogram", 1): _kaldi(SpectrogramConfig()),  # without torchaudio's floor under the energy
}


def feature_preset(name: str) -> SpectralFrontendConfig | None:
    """Returns the front-end that a name stands for, None for ``waveform``.

    Args:
        name: A name of ``PRESETS``, or ``NAME@VERSION``.

    Raises:
        ValueError: There is no such name or version.
    """
    base, _, version = name.partition("@")
    if base not in PRESETS:
        longer = [known for known in PRESETS if base and known.startswith(base)]  # fbank160 is not fbank80
        raise ValueError(
            f"there are no features {name!r}{nearest(base, longer or PRESETS)} (--features takes {', '.join(PRESETS)})"
        )
    newest = PRESETS[base].version
    if version in ("", str(newest)):
        return PRESETS[base].frontend
    if not version.isdigit() or (base, int(version)) not in EARLIER:
        raise ValueError(f"features {base!r} have the versions 1 to {newest}, not {version!r}")
    return EARLIER[base, int(version)]


def recorded_name(name: str) -> str:
    """Returns a name as a corpus records it: with the version, unless that is the first.

    Raises:
        ValueError: As for :func:`feature_preset`.
    """
    feature_preset(name)
    base, _, version = name.partition("@")
    number = int(version or PRESETS[base].version)
    return base if number == 1 else f"{base}@{number}"


def preset_name(frontend: SpectralFrontendConfig) -> str | None:
    """Returns ``NAME@VERSION`` of a front-end, whatever its stacking and its statistics; None when it has no name."""
    alone = _bare(frontend)
    named = [(f"{name}@{preset.version}", preset.frontend) for name, preset in PRESETS.items()]
    named += [(f"{name}@{version}", earlier) for (name, version), earlier in EARLIER.items()]
    return next((name for name, other in named if other is not None and _bare(other) == alone), None)


def _bare(frontend: SpectralFrontendConfig) -> SpectralFrontendConfig:
    plain = replace(frontend, stack=1, stack_tail="pad", normalization=replace(frontend.normalization, statistics=None))
    # without deltas neither their window nor their kind is anything
    return plain if plain.deltas else replace(plain, delta_window=2, delta_kind="regression")
