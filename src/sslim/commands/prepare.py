"""``sslim prepare``: audio, a Kaldi folder or a known corpus to a corpus folder."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from sslim.data.corpus_writer import Progress
    from sslim.data.prepare import Outcome
    from sslim.data.sources import Source

LINE_PERIOD_S = 10.0  # between lines of progress where there is no terminal
NUM_QUARANTINED_SHOWN = 3

Kind = Literal["kaldi", "melhubert", "ark", "len-for-bucket", "numpy", "speech-commands", "digits", "librispeech", "folder"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Turn audio or a known corpus into a corpus folder: manifest, features, statistics and quarantine list.

    An interrupted preparation continues when the same command is run again. Examples:
    `sslim prepare recordings corpus`, `sslim prepare words corpus --label-column word --also digits`,
    `sslim prepare --synthetic 500 corpus`.

    Attributes:
        source: What to read: a folder or list file of any known kind. With --synthetic this is the corpus folder.
        corpus: The folder to write.
        kind: What the source is; found out when not given.
        also: Another source for the same corpus; its ids get its name in front. May be repeated.
        metadata: CSV or TSV file with a column path and any of speaker, label, text, split; index.csv or metadata.csv in the
            source is found without it.
        label_column: Column of that file to take as label.
        speaker_column: Column of that file to take as speaker.
        alignments: Phones to put into the manifest: CPC's converted_aligned_phones.txt, or a folder of the Montreal aligner's
            TextGrids or text files (start end phone).
        stored_features: Take the features of a Kaldi directory although it has audio.
        frame_shift_ms: Stored features of which nothing says what they are: milliseconds from one frame to the next.
        audio_root: Folder that the paths of S3PRL's tables of lengths start from.
        features: What to compute from audio, or what stored features are: melhubert (the default; 40 log-Mel bins), fbank80,
            fbank240, fbank80-hamming, fbank80-speaker, mfcc13, mfcc39, mfcc39-speaker, mfcc24-voxceleb, spectrogram (Kaldi's);
            logmel80, linear201, mfcc13-torch, mfcc39-torch (torchaudio's); fbank80-librosa, fbank160-librosa, fbank240-librosa,
            mel80-librosa, mel160-librosa, mel240-librosa, mfcc13-librosa, mfcc39-librosa, linear1025 (librosa's); fmllr40
            (stored ones only); waveform (a manifest only, for models that take waveforms). NAME@1 is an earlier definition
            of NAME; docs/features.md defines them all.
        max_bad: Share of the utterances that may be unreadable before the preparation stops.
        jobs: Threads; as many as there are cores when not given.
        synthetic: Speak this many utterances with espeak-ng, with exact phone times, and prepare them.
        seed: Chooses what is spoken and how.
    """

    source: tyro.conf.Positional[Path]
    corpus: tyro.conf.Positional[Path | None] = None
    kind: Kind | None = None
    also: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    metadata: Path | None = None
    label_column: str | None = None
    speaker_column: str | None = None
    alignments: Path | None = None
    stored_features: bool = False
    frame_shift_ms: float | None = None
    audio_root: Path | None = None
    features: str | None = None
    max_bad: float = 0.01
    jobs: int | None = None
    synthetic: int | None = None
    seed: int = 0


def main(options: Options) -> None:
    """Prepares a corpus and prints what it holds."""
    from rich.console import Console

    from sslim.data.feature_presets import feature_preset
    from sslim.data.prepare import prepare

    console = Console(highlight=False)
    with _ProgressView(Console(stderr=True, highlight=False)) as view:
        folder, origin, load = _request(options, console, view)
        outcome = prepare(
            load,
            folder,
            feature_preset(options.features or "melhubert"),
            max_bad=options.max_bad,
            jobs=options.jobs,
            origin=origin,
            on_progress=view.update,
        )
    if outcome.already_finished:
        console.print(f"{folder} is already prepared: nothing to do", soft_wrap=True)
    _print_summary(console, outcome, view.seconds, view.audio_s, aligned=options.alignments is not None)


def _request(options: Options, console: Console, view: _ProgressView) -> tuple[Path, dict[str, Any], Any]:
    """The corpus folder, the description of what is asked for, and the function that reads the sources."""
    from sslim.data.audio_sources import SourceOptions
    from sslim.data.feature_presets import feature_preset, recorded_name
    from sslim.data.phone_alignments import read_phone_alignments, with_alignments
    from sslim.data.prepare import detect_source, load_source, merge_sources

    features = recorded_name(options.features or "melhubert")
    if options.synthetic is not None:
        return _synthetic_request(options, features, view)
    if options.corpus is None:
        raise ValueError(f"sslim prepare needs a SOURCE and a CORPUS folder to write, only {options.source} was given")
    source_options = SourceOptions(
        metadata=None if options.metadata is None else Path(os.path.abspath(options.metadata)),
        label_column=options.label_column,
        speaker_column=options.speaker_column,
        stored_features=options.stored_features,
        frame_shift_ms=options.frame_shift_ms,
        audio_root=None if options.audio_root is None else Path(os.path.abspath(options.audio_root)),
        features=options.features,
    )
    requests: list[tuple[Path, str, SourceOptions]] = []
    asked = [
        (options.source, source_options, options.kind),
        *((path, SourceOptions(features=options.features), None) for path in options.also),
    ]
    for path, chosen, forced in asked:
        kind, reason = (forced, "") if forced else detect_source(path, chosen)
        if reason:
            console.print(f"{path} is of kind {kind}: {reason}", soft_wrap=True)
        requests.append((Path(os.path.abspath(path)), kind, chosen))

    def load() -> Source:
        sources = [load_source(*request) for request in requests]
        source = merge_sources(sources[0], sources[1:]) if len(sources) > 1 else sources[0]
        if options.alignments is not None:
            source = with_alignments(source, read_phone_alignments(options.alignments), options.alignments.name)
        if source.note:
            console.print(source.note, soft_wrap=True)
        if source.frontend is not None and options.features and source.frontend != feature_preset(options.features):
            raise ValueError(f"{source.name} holds stored features: --features {options.features} cannot be computed from them")
        return source

    origin: dict[str, Any] = {"sources": [_plain_request(*request) for request in requests], "features": features}
    if options.alignments is not None:
        origin["alignments"] = str(options.alignments.resolve())
    return options.corpus, origin, load


def _plain_request(path: Path, kind: str, chosen: Any) -> dict[str, Any]:
    from dataclasses import asdict

    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(chosen).items()}
    values.pop("features")  # of the whole corpus
    return {"path": str(path), "kind": kind, **{name: value for name, value in values.items() if value not in (None, False)}}


def _synthetic_request(options: Options, features: str, view: _ProgressView) -> tuple[Path, dict[str, Any], Any]:
    if options.corpus is not None:
        raise ValueError(f"with --synthetic there is no source, only a CORPUS folder: leave out {options.corpus}")
    sources_only = ("kind", "also", "metadata", "label_column", "speaker_column", "alignments", "stored_features")
    for name in (*sources_only, "frame_shift_ms", "audio_root"):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} does not go with --synthetic, which reads no source")
    if options.synthetic is None or options.synthetic < 1:
        raise ValueError(f"--synthetic is {options.synthetic}, it must be at least 1")
    folder, num_utterances = options.source, options.synthetic

    def load() -> Source:
        from sslim.data.prepare import available_cores
        from sslim.data.synthetic import synthetic_source

        return synthetic_source(
            Path(os.path.abspath(folder)) / "audio",
            num_utterances=num_utterances,
            seed=options.seed,
            jobs=options.jobs or available_cores(),
            progress=view.spoken,
        )

    return folder, {"synthetic": num_utterances, "seed": options.seed, "features": features}, load


class _ProgressView:
    """A bar with rates and time left on a terminal; elsewhere a line every few seconds.

    Attributes:
        seconds: Since the first utterance of this run.
        audio_s: Seconds of audio read in this run.
    """

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = console
        self.seconds = self.audio_s = 0.0
        self._started: float | None = None
        self._last_line = 0.0
        self._first: tuple[int, int] = (0, 0)
        self._bar = Progress(
            TextColumn("preparing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, rates="")

    def __enter__(self) -> _ProgressView:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def spoken(self, num_utterances: int) -> None:
        """Shows how many synthetic utterances there are."""
        now = time.monotonic()
        if self.console.is_terminal:
            self._bar.update(self._task, completed=num_utterances, rates="speaking")
        elif now - self._last_line >= LINE_PERIOD_S:
            self._last_line = now
            self.console.print(f"{num_utterances:,} utterances spoken", soft_wrap=True)

    def update(self, progress: Progress, total: int, sample_rate: int) -> None:
        """Shows how far it is; called after every utterance, so it draws nothing itself."""
        now = time.monotonic()
        if self._started is None:
            self._started = self._last_line = now
            self._first = (progress.num_seen, progress.num_samples)
            if progress.num_seen:
                self.console.print(f"continuing after {progress.num_seen:,} of {total:,} utterances")
        self.seconds = now - self._started
        self.audio_s = (progress.num_samples - self._first[1]) / sample_rate
        if not self.console.is_terminal and now - self._last_line < LINE_PERIOD_S:
            return
        per_s = (progress.num_seen - self._first[0]) / max(self.seconds, 1e-3)
        rates = f"{per_s:,.0f} files/s, {self.audio_s / max(self.seconds, 1e-3):,.0f} × real time"
        if progress.num_quarantined:
            rates += f", {progress.num_quarantined} quarantined"
        if self.console.is_terminal:
            self._bar.update(self._task, completed=progress.num_seen, total=total, rates=rates)
            return
        self._last_line = now
        left_s = (total - progress.num_seen) / per_s if per_s else 0.0
        self.console.print(f"{progress.num_seen:,} of {total:,}: {rates}, {left_s:,.0f} s left", soft_wrap=True)


def _print_summary(console: Console, outcome: Outcome, seconds: float, audio_s: float, *, aligned: bool) -> None:
    from rich.table import Table

    from sslim.data.doctor import check_alignments

    corpus = outcome.corpus
    num_bytes = sum(path.stat().st_size for path in (corpus.path / "features").glob("*.bin"))
    speakers = {name for name in corpus.column("speaker") if name is not None}
    table = Table(show_header=False, box=None, title=f"corpus {corpus.name}", title_justify="left")
    rows = [
        ("utterances", f"{len(corpus):,}"),
        ("hours", f"{corpus.duration_s() / 3600:,.2f}"),
        ("speakers", f"{len(speakers):,}" if speakers else "not known"),
        ("frames", f"{int(corpus.num_frames.sum()):,} of {1000 * corpus.base_frame_shift_s:g} ms, {corpus.base_dim} features"),
        ("features", f"{num_bytes / 1e6:,.1f} MB"),
        ("statistics", corpus.description["statistics"] or "none"),
        ("quarantined", f"{corpus.num_quarantined:,}"),
        *((f"labels {name}", _label_row(corpus, name, outcome)) for name in corpus.label_names()),
    ]
    if not outcome.already_finished and seconds > 0:
        rows.append(("speed", f"{seconds:,.1f} s, {audio_s / max(seconds, 1e-3):,.0f} × real time"))
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
    entries = corpus.quarantine()
    for entry in entries[:NUM_QUARANTINED_SHOWN]:
        console.print(f"quarantined {entry['path']}: {entry['reason']}", soft_wrap=True)
    if len(entries) > NUM_QUARANTINED_SHOWN:
        console.print(
            f"… and {len(entries) - NUM_QUARANTINED_SHOWN} more in {corpus.path / 'quarantine.jsonl'}", soft_wrap=True
        )
    if aligned:
        for problem in check_alignments(corpus):
            console.print(f"note: {problem.sentence}", soft_wrap=True)
    print(f"{corpus.path}: {len(corpus):,} utterances, {corpus.num_quarantined} quarantined")


def _label_row(corpus: Any, name: str, outcome: Outcome) -> str:
    missing = outcome.missing_labels.get(name, 0)
    text = f"{corpus.labels(name).num_clusters} clusters"
    return f"{text}, {missing:,} utterances without" if missing else text
