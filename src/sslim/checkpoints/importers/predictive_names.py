"""The tables between S3PRL's names of APC, VQ-APC and NPC tensors and the native ones; their ``audio`` settings; both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sslim.checkpoints.importers.fairseq_names import with_parts
from sslim.checkpoints.importers.s3prl_frontends import audio_of, frontend_of
from sslim.checkpoints.importers.settings import Settings, short
from sslim.frontends import SpectralFrontendConfig
from sslim.models.predictive import APC_HEAD, NPC_HEAD

GRU_PARTS = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
COUNTER = "num_batches_tracked"  # of batch norms: with a momentum, as here, it decides nothing
CODEBOOK = "codebook_CxE.weight"  # a linear layer's (code_dim, num_codes), native codes are its columns
OWN_AUDIO = ("feat_type", "feat_dim", "decode_wav", "cmvn")  # settings that S3PRL takes out while it runs
HOP = ("frame_length", "frame_shift")


def _parts(foreign: str, native: str, parts: tuple[str, ...]) -> dict[str, str]:
    return {f"{foreign}.{part}": f"{native}.{part}" for part in parts}


def _codebooks(native: str) -> dict[str, str]:
    return {
        "vq_layers.{i}.vq_logits.weight": f"{native}.groups.{{i}}.weight",
        "vq_layers.{i}.vq_logits.bias": f"{native}.groups.{{i}}.bias",
        f"vq_layers.{{i}}.{CODEBOOK}": f"{native}.groups.{{i}}.codes",
    }


OLD_APC = (
    _parts("rnns.{i}", "encoder.layers.{i}", GRU_PARTS)
    | with_parts({"prenet.layers.{i}": "encoder.prenet.{i}"})
    | with_parts({"postnet.layer": f"heads.{APC_HEAD}.linear"})
)
"""Of S3PRL v0.1 and of the authors' own code."""

NPC = (
    with_parts({"blocks.{i}.conv": "encoder.blocks.{i}.conv", "blocks.{i}.linear": "encoder.blocks.{i}.linear"})
    | _parts("blocks.{i}.bn1", "encoder.blocks.{i}.conv_norm", NORM_PARTS)
    | _parts("blocks.{i}.bn2", "encoder.blocks.{i}.linear_norm", NORM_PARTS)
    | with_parts({"masked_convs.{i}.conv": "encoder.masked.{i}"})
    | _codebooks("encoder.quantizer")
    | with_parts({"postnet": f"heads.{NPC_HEAD}.linear"})
)


def apc_names(num_layers: int) -> dict[str, str]:
    """Returns the table of APC and VQ-APC, whose last layer may be quantised."""
    return (
        _parts("rnn_layers.{i}", "encoder.layers.{i}", GRU_PARTS)
        | _codebooks(f"encoder.quantizers.{num_layers - 1}")
        | with_parts({"postnet": f"heads.{APC_HEAD}.linear"})
    )


def foreign_names(table: Mapping[str, str], count: int) -> dict[str, str]:
    """Returns the way back, native names to foreign ones, with the numbers below ``count`` spelt out."""
    pairs = table.items()
    return {native.replace("{i}", str(i)): foreign.replace("{i}", str(i)) for foreign, native in pairs for i in range(count)}


def predictive_frontend_of(audio: Mapping[str, Any], width: int, source: str) -> tuple[SpectralFrontendConfig | None, str]:
    """Reads ``data.audio``: torchaudio's Kaldi filterbank with a Hamming window, normalised for each utterance.

    S3PRL took the settings of its own (``OWN_AUDIO``) out of the dictionary that it saved later: where all are gone they have
    the defaults of its code, which every published model has, and the note says so.

    Args:
        audio: The settings.
        width: Features that the tensors take.
        source: The file's name, for errors.

    Returns:
        The front-end and a note; None, and what they ask for, where sslim does not compute it.

    Raises:
        CheckpointError: A setting of the wrong type or out of range.
    """
    settings = Settings(audio, source)
    kind, lost = audio.get("feat_type", "fbank"), [name for name in ("feat_type", "feat_dim") if name not in audio]
    if kind != "fbank":
        return None, f"unknown: feat_type {short(kind)}; it takes features from outside"
    decoded, normalized = settings.boolean("decode_wav", False), settings.boolean("cmvn", True)
    if decoded and not normalized:
        return None, "unknown: features of 16-bit samples (decode_wav) without cmvn; it takes features from outside"
    options = {name: value for name, value in audio.items() if name not in OWN_AUDIO}
    for name in ("num_mel_bins", "window_type", "sample_frequency"):
        if name in options:
            return None, f"unknown: it has the setting {name}, which its own code sets; it takes features from outside"
    bins = settings.count("feat_dim", width)
    kaldi = {
        "kaldi": {"feat_type": "fbank", "fbank": {**options, "num_mel_bins": bins, "window_type": "hamming"}},
        "delta": {"order": 0},
        "cmvn": {"use_cmvn": normalized},
    }
    frontend, note = frontend_of(kaldi, source)
    if frontend is None:
        return None, note
    gone = f"; {' and '.join(lost)} are not in them: {bins} filterbank channels, as the tensors say" if lost else ""
    if len(lost) == 2 and "cmvn" not in audio:
        gone += ", normalised for each utterance by default"
    return frontend, f"Kaldi's fbank with a Hamming window as its settings say{gone}"


def predictive_audio_of(frontend: SpectralFrontendConfig) -> dict[str, Any] | None:
    """Returns the ``data.audio`` settings that describe a front-end; None where none do."""
    kaldi = audio_of(frontend, target_dim=0)
    options = None if kaldi is None or "kaldi" not in kaldi else kaldi["kaldi"].get("fbank")
    if kaldi is None or options is None:
        return None
    width = options["num_mel_bins"]
    audio = {"feat_type": "fbank", "feat_dim": width, "decode_wav": False, "cmvn": kaldi["cmvn"]["use_cmvn"]}
    audio |= {name: value for name, value in options.items() if name not in ("num_mel_bins", "window_type")}

    def same(settings: Mapping[str, Any]) -> bool:
        return predictive_frontend_of(settings, width, "the export")[0] == frontend

    for name in [name for name in audio if name not in (*OWN_AUDIO, *HOP)]:
        shorter = {other: value for other, value in audio.items() if other != name}
        audio = shorter if same(shorter) else audio  # what has its default is left out, as in S3PRL's own files
    return audio if same(audio) else None
