"""``sslim compress low-rank``: factorises the matrices of a model's encoder."""

from __future__ import annotations

from dataclasses import dataclass

from sslim.commands.compression_options import CompressionOptions, run


@dataclass(frozen=True, kw_only=True)
class Options(CompressionOptions):
    """Replace the matrices of MODEL's encoder by two thin ones each, wherever these are smaller.

    Examples: `sslim compress low-rank models/melhubert --ratio 0.25 --output runs/quarter-rank`,
    `sslim compress low-rank runs/teacher --params 0.5 --whiten --corpus corpora/speech --recover-minutes 5 --output runs/half`.
    """

    ratio: float | None = None
    """Rank of every matrix as a share of its smaller width."""
    energy: float | None = None
    """Share of its energy (squared singular values) that every matrix keeps."""
    params: float | None = None
    """Share of the model's parameters that is left; ranks are chosen over all matrices by what each loses."""
    budget: str | None = None
    """Keep as much as fits: params=25M, macs=2G (for each second of audio) or latency_ms=12 (as measured here)."""
    whiten: bool = False
    """Keep what the matrices do to speech, not the matrices as such (--corpus)."""


def main(options: Options) -> None:
    """Factorises, trains if asked to, and prints what was bought."""
    settings = {"ratio": options.ratio, "energy": options.energy, "params": options.params, "whiten": options.whiten}
    run(options, options.pipeline("low-rank", settings, options.budget))
