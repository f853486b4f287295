"""The ``online`` and ``audio`` settings of S3PRL's checkpoints: which front-end they describe, and back.

Two kinds: ``OnlinePreprocessor`` (``input`` with a feature type, torchaudio's centred transforms, each utterance brought to
``target_level``) and, later, ``kaldi`` with ``delta`` and ``cmvn`` (torchaudio's Kaldi features). What is not stated has the
defaults of the reference's code, and the note says so.

Kaldi spectrograms and energies are not taken on: torchaudio floors their logarithm at zero, sslim as Kaldi does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sslim.checkpoints.importers.settings import Settings, short
from sslim.frontends import FilterbankConfig, MfccConfig, NormalizationConfig, SpectralFrontendConfig, StftConfig
from sslim.models.reconstruction import LEVEL_DB, UTTERANCE

ONLINE_DEFAULTS = {"target_level": LEVEL_DB, "win_ms": 25, "hop_ms": 10, "n_freq": 201, "n_mels": 40, "n_mfcc": 13}
MFCC_MELS, MFCC_OFFSET = 128, 1e-6  # of torchaudio's MFCC, which the settings leave as they are
PASSIVE = ("target", "libri_root", "roots", "max_time", "noise_proportion", "noise_type", "snrs", "channel")
WINDOWS = {"povey": "povey", "hamming": "hamming", "hanning": "hann", "rectangular": "rectangular", "blackman": "blackman"}
KALDI_NUMBERS = {
    "frame_length": "frame_length_ms",
    "frame_shift": "frame_shift_ms",
    "preemphasis_coefficient": "preemphasis",
    "low_freq": "low_freq_hz",
    "high_freq": "high_freq_hz",
}
KALDI_TIMES = ("frame_length", "frame_shift")
# Beyond these a file is corrupt, and its tables would not fit memory.
MOST_MS, MOST_HZ, MOST_BINS, MOST_MELS = 1000.0, 1e6, 1 << 15, 4096
KALDI_BOOLEANS = {"remove_dc_offset": "remove_dc", "snip_edges": "snip_edges", "use_power": "power", "use_log_fbank": "log"}
FBANK_ALONE = ("use_power", "use_log_fbank")  # torchaudio's mfcc has neither
KALDI_OFF = ("dither", "use_energy", "subtract_mean", "htk_compat", "min_duration")  # known where they do nothing


class UnknownFrontendError(Exception):
    """Settings that describe features which sslim does not compute; the message says which."""


def frontend_of(audio: Mapping[str, Any], source: str) -> tuple[SpectralFrontendConfig | None, str]:
    """Reads the settings of a front-end, without stacking.

    Args:
        audio: ``online`` of S3PRL v0.1, ``audio`` of later versions.
        source: The file's name, for errors.

    Returns:
        The front-end and a note; None, and what they ask for, where sslim does not compute it.

    Raises:
        CheckpointError: A setting of the wrong type or out of range.
    """
    try:
        return _kaldi(audio, source) if "kaldi" in audio else _online(audio, source)
    except UnknownFrontendError as error:
        return None, f"unknown: {error}; it takes features from outside"


def _online(audio: Mapping[str, Any], source: str) -> tuple[SpectralFrontendConfig, str]:
    entry = audio.get("input")
    if not isinstance(entry, dict):
        raise UnknownFrontendError(f"its settings of features have no input, only {', '.join(map(str, audio))}")
    _only(audio, ("sample_rate", "input", *ONLINE_DEFAULTS, *PASSIVE))
    _only(entry, ("feat_type", "channel", "log", "delta", "cmvn"))
    settings, flags = Settings(audio, source), Settings(entry, source)
    kind, logarithm = entry.get("feat_type"), flags.boolean("log", False)
    if kind not in ("mel", "linear", "mfcc") or (kind == "mfcc" and logarithm):
        raise UnknownFrontendError(f"feat_type {short(kind)}{' with log' if logarithm else ''}")
    level = audio.get("target_level", LEVEL_DB)
    features = StftConfig(
        sample_rate=settings.count("sample_rate", 16000),
        num_bins=settings.count("n_freq", 201, high=MOST_BINS),
        num_mel_bins=settings.count("n_mels", 40, high=MOST_MELS) if kind == "mel" else 0,
        frame_length_ms=settings.number("win_ms", 25, high=MOST_MS),
        frame_shift_ms=settings.number("hop_ms", 10, high=MOST_MS),
        log=logarithm,
        level_db=None if level in (None, "None") else settings.number("target_level", LEVEL_DB, low=-200),
    )
    cepstra = 0
    if kind == "mfcc":
        cepstra = settings.count("n_mfcc", 13)
        features = replace(features, num_mel_bins=MFCC_MELS, log=True, log_offset=MFCC_OFFSET)
    needed = {"mel": ("n_mels",), "mfcc": ("n_mfcc",), "linear": ()}[kind]
    unsaid = [name for name in ("target_level", "win_ms", "hop_ms", "n_freq", *needed) if name not in audio]
    defaults = "".join(f", {name} {ONLINE_DEFAULTS[name]:g} by default" for name in unsaid)
    config = SpectralFrontendConfig(
        features=features,
        cepstra=cepstra,
        deltas=_order(flags.count("delta", 0, low=0)),
        normalization=UTTERANCE if flags.boolean("cmvn", False) else NormalizationConfig(),
    )
    return config, f"S3PRL's {'log ' if logarithm else ''}{kind} features as its settings say{defaults}"


def _kaldi(audio: Mapping[str, Any], source: str) -> tuple[SpectralFrontendConfig, str]:
    _only(audio, ("kaldi", "delta", "cmvn"))
    kaldi, delta, cmvn = (audio.get(key, {}) for key in ("kaldi", "delta", "cmvn"))
    if not all(isinstance(part, dict) for part in (kaldi, delta, cmvn)):
        raise UnknownFrontendError("its settings kaldi, delta and cmvn are no dictionaries")
    kind = kaldi.get("feat_type", "fbank")
    options = kaldi.get(kind) if isinstance(kind, str) else None
    if kind not in ("fbank", "mfcc") or not isinstance(options, dict):
        raise UnknownFrontendError(f"Kaldi's feat_type {short(kind)}")
    _only(delta, ("order", "win_length"))
    _only(cmvn, ("use_cmvn", "eps"))
    if "use_cmvn" not in cmvn:
        raise UnknownFrontendError("its settings do not say use_cmvn")
    deltas, normalized = Settings(delta, source), Settings(cmvn, source)
    window = deltas.count("win_length", 5, low=3)
    if window % 2 == 0:
        raise UnknownFrontendError(f"deltas over {window} frames, an even number")
    features: FilterbankConfig | MfccConfig = _filterbank(options, source, mfcc=kind == "mfcc")
    if kind == "mfcc":
        mfcc = Settings(options, source)
        features = MfccConfig(
            filterbank=features,  # type: ignore[arg-type]
            num_coefficients=mfcc.count("num_ceps", 13),
            cepstral_lifter=mfcc.number("cepstral_lifter", 22.0),
        )
    normalization = replace(UTTERANCE, eps=normalized.number("eps", UTTERANCE.eps))
    config = SpectralFrontendConfig(
        features=features,
        deltas=_order(deltas.count("order", 2, low=0)),
        delta_window=window // 2,
        normalization=normalization if normalized.boolean("use_cmvn", True) else NormalizationConfig(),
    )
    return config, f"Kaldi's {kind} as its settings say"


def _filterbank(options: Mapping[str, Any], source: str, *, mfcc: bool) -> FilterbankConfig:
    own = ("num_ceps", "cepstral_lifter") if mfcc else FBANK_ALONE
    booleans = {name: native for name, native in KALDI_BOOLEANS.items() if name in own or name not in FBANK_ALONE}
    _only(options, (*KALDI_NUMBERS, *booleans, *KALDI_OFF, "num_mel_bins", "window_type", "raw_energy", *own))
    settings = Settings(options, source)
    for name in KALDI_OFF:
        if options.get(name):
            raise UnknownFrontendError(f"{name} {short(options[name])}")
    lowest = {"high_freq": -24000.0}
    values: dict[str, Any] = {
        native: settings.number(name, 0.0, low=lowest.get(name, 0.0), high=MOST_MS if name in KALDI_TIMES else MOST_HZ)
        for name, native in KALDI_NUMBERS.items()
        if name in options
    }
    values |= {native: settings.boolean(name, True) for name, native in booleans.items() if name in options}
    if "window_type" in options:
        values["window"] = settings.choice("window_type", "povey", WINDOWS)
    return FilterbankConfig(num_mel_bins=settings.count("num_mel_bins", 23, high=MOST_MELS), **values)


def _only(values: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in values:
        if name not in known:
            raise UnknownFrontendError(f"it has the setting {short(name)}, which sslim does not know")


def _order(deltas: int) -> int:
    if deltas > 2:
        raise UnknownFrontendError(f"{deltas} orders of deltas")
    return deltas


def audio_of(frontend: SpectralFrontendConfig, target_dim: int) -> dict[str, Any] | None:
    """Returns the ``audio`` settings that describe a front-end (its stacking is said elsewhere); None where none do.

    Args:
        frontend: The front-end.
        target_dim: Width of what a head restores of each frame: that of the features, or of the linear spectrum.
    """
    alone = replace(frontend, stack=1, stack_tail="pad")
    features = alone.features
    if isinstance(features, StftConfig):
        audio = None if features.level_db is None else _online_of(alone, target_dim)  # the reference always sets a level
    else:
        audio = _kaldi_of(alone)
    return audio if audio is not None and frontend_of(audio, "the export")[0] == alone else None


def _online_of(frontend: SpectralFrontendConfig, target_dim: int) -> dict[str, Any]:
    features = frontend.features
    assert isinstance(features, StftConfig)
    kind = "mfcc" if frontend.cepstra else "mel" if features.num_mel_bins else "linear"
    normalized = frontend.normalization != NormalizationConfig()
    wanted = {"channel": 0, "log": features.log and kind != "mfcc", "delta": frontend.deltas, "cmvn": normalized}
    target = {"feat_type": kind, **wanted}
    if target_dim == features.num_bins != (frontend.cepstra or features.num_mel_bins) * (1 + frontend.deltas):
        target = {"feat_type": "linear", **wanted, "log": True, "delta": 0}
    return {
        "target_level": features.level_db,
        "sample_rate": features.sample_rate,
        "win_ms": features.frame_length_ms,
        "hop_ms": features.frame_shift_ms,
        "n_freq": features.num_bins,
        "n_mels": features.num_mel_bins or 80,
        "n_mfcc": frontend.cepstra or 13,
        "input": {"feat_type": kind, **wanted},
        "target": target,
    }


def _kaldi_of(frontend: SpectralFrontendConfig) -> dict[str, Any] | None:
    features = frontend.features
    if not isinstance(features, FilterbankConfig | MfccConfig):
        return None
    bank = features if isinstance(features, FilterbankConfig) else features.filterbank
    mfcc = isinstance(features, MfccConfig)
    names = {name: native for name, native in (KALDI_NUMBERS | KALDI_BOOLEANS).items() if not (mfcc and name in FBANK_ALONE)}
    options: dict[str, Any] = {name: getattr(bank, native) for name, native in names.items()}
    options |= {"num_mel_bins": bank.num_mel_bins, "window_type": {v: k for k, v in WINDOWS.items()}[bank.window]}
    kind = "fbank"
    if isinstance(features, MfccConfig):
        kind = "mfcc"
        options |= {"num_ceps": features.num_coefficients, "cepstral_lifter": features.cepstral_lifter}
    normalization = frontend.normalization
    cmvn: dict[str, Any] = {"use_cmvn": normalization.kind != "none"}
    if cmvn["use_cmvn"] and normalization.eps != UTTERANCE.eps:
        cmvn["eps"] = normalization.eps
    return {
        "kaldi": {"feat_type": kind, kind: options},
        "delta": {"order": frontend.deltas, "win_length": 2 * frontend.delta_window + 1},
        "cmvn": cmvn,
    }
