"""``sslim doctor``: checks a corpus and its targets before hours are spent on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    """Check a prepared corpus, and its labels, for what would waste a training run.

    Attributes:
        corpus: Folder made by `sslim prepare`.
        labels: Label sets to check; all of them when not given.
        frame_period_ms: Frame period of the model that will be trained (10 or 20).
        most: Problems listed at most.
    """

    corpus: tyro.conf.Positional[Path]
    labels: tuple[str, ...] = ()
    frame_period_ms: float = 20.0
    most: int = 20


def main(options: Options) -> None:
    """Prints what was looked at and every problem; a fatal one ends with exit code 2."""
    from rich.console import Console

    from sslim.data.corpus import Corpus
    from sslim.data.doctor import check_alignments, examine

    console = Console(highlight=False)
    corpus = Corpus.open(options.corpus)
    hours = corpus.duration_s() / 3600
    console.print(f"{corpus.name}: {len(corpus):,} utterances, {hours:.2f} h, {corpus.num_quarantined} quarantined")
    period_s = options.frame_period_ms / 1000
    reads: dict[str, Any] = {"stack": max(1, round(period_s / corpus.base_frame_shift_s))} if corpus.base_dim else {}
    if not corpus.base_dim:  # nothing but waveforms: a model has one frame for each period, or one fewer
        hop = round(period_s * corpus.sample_rate)
        reads["waveform_frames"] = lambda num_samples: num_samples // hop
    names = options.labels or tuple(corpus.label_names())
    problems = list(check_alignments(corpus))
    for name in names or (None,):
        labels = None if name is None else corpus.labels(name)
        if labels is None:
            console.print("no label sets: `sslim cluster` makes one")
        else:
            console.print(f"labels {name}: {labels.num_clusters} clusters, one label every {1000 * labels.frame_period_s:g} ms")
        problems += examine(corpus, labels, frame_period_s=period_s, **reads)
    distinct = list({problem.sentence: problem for problem in problems}.values())
    for problem in distinct[: options.most]:
        console.print(f"{'PROBLEM' if problem.fatal else 'note'}  {problem.sentence}", soft_wrap=True)
    if len(distinct) > options.most:
        console.print(f"… and {len(distinct) - options.most} more")
    fatal = sum(problem.fatal for problem in distinct)
    if fatal:
        raise ValueError(
            f"{fatal} {'problem' if fatal == 1 else 'problems'} found in {options.corpus}: mend them before training"
        )
    console.print("nothing wrong found")
