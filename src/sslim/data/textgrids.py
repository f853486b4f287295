"""Praat's TextGrid files, which the Montreal aligner writes: the segments of their phone tier (read by ``praatio``)."""

from __future__ import annotations

from pathlib import Path

from sslim.data.sources import Segment

PHONE_TIERS = ("phones", "phone")
SILENCE = "sil"  # the aligner leaves silences empty; its older text files call them so


def read_textgrid(path: Path) -> tuple[Segment, ...]:
    """Returns the phones of one utterance in the order of time, in seconds; intervals without a name are silence.

    A tier is the phones' when it is called ``phones``, or ``SPEAKER - phones`` where the aligner knew the speaker.

    Raises:
        ValueError: It is no TextGrid, or does not have exactly one tier of phones; the message names the file.
    """
    from praatio import textgrid

    try:
        grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=True, reportingMode="silence")
    except Exception as error:  # the parser fails in many ways on what is not a TextGrid
        raise ValueError(f"the alignment {path} cannot be read as a TextGrid ({type(error).__name__}: {error})") from error
    tiers = [name for name in grid.tierNames if name.rpartition(" - ")[2].strip().lower() in PHONE_TIERS]
    if len(tiers) != 1:
        raise ValueError(f"{path} has the tiers {', '.join(grid.tierNames) or 'none'}; expected one called phones")
    tier = grid.getTier(tiers[0])
    if not isinstance(tier, textgrid.IntervalTier):
        raise ValueError(f"the tier {tiers[0]!r} of {path} holds points; expected intervals")
    return tuple(
        Segment(symbol=interval.label.strip() or SILENCE, start_s=float(interval.start), end_s=float(interval.end))
        for interval in tier.entries
    )
