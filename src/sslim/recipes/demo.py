"""The demo: the whole story on two CPU cores, as the commands that a user would type.

Expected on two cores without anything else running: LOG.md has the figures.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sslim.config import read_json
from sslim.data.corpus import Corpus
from sslim.storage import write_json

PLAN = "demo.json"
LABELS = "demo"
RECIPE = "melhubert-mini"
MAX_CLUSTERS = 100
FRAMES_PER_CLUSTER = 50  # fewer give clusters of single utterances
STEPS_PER_MINUTE = (
    150  # of the recipe on two cores; only decides how fast the learning rate falls, --minutes is what ends the run
)
MAX_PROBE_FRAMES = 40_000  # 13 minutes at 20 ms: enough for a linear classifier of 40 phones
MIN_PER_CLASS = 4  # a class with fewer utterances cannot be in train, dev and test


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo is about.

    Attributes:
        data: Folder with the user's own audio; None speaks a corpus of its own.
        output: Folder for everything.
        minutes: Of pre-training.
        num_utterances: Of the spoken corpus; 1,000 are about an hour.
        seed: Decides everything random.
    """

    data: Path | None
    output: Path
    minutes: float = 6.0
    num_utterances: int = 1000
    seed: int = 0

    @property
    def corpus(self) -> Path:
        return self.output / "corpus"

    @property
    def run(self) -> Path:
        return self.output / RECIPE  # the folder's name is the model's in tables

    def card(self, task: str) -> Path:
        """Where the result of a probe goes; the report looks there."""
        return self.run / "cards" / f"{task}.json"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the demo.

    Attributes:
        about: What it does and why, one sentence for somebody new.
        command: Verb and arguments.
        is_done: Whether it need not be run again; None for commands that find that out themselves.
    """

    about: str
    command: tuple[str, ...]
    is_done: Callable[[], bool] | None = None

    @property
    def line(self) -> str:
        """As typed into a shell."""
        return shlex.join(("sslim", *self.command))


def claim(config: DemoConfig) -> None:
    """Notes what the folder is for, so that an interrupted demo goes on and another one is refused.

    Raises:
        ValueError: The folder holds another demo, or something else; ``minutes`` is not positive.
    """
    if not config.minutes > 0:
        raise ValueError(f"minutes is {config.minutes:g}, it must be more than 0")
    plain = json.loads(json.dumps(asdict(config), default=lambda path: str(path.resolve())))
    plain.pop("output")
    path = config.output / PLAN
    if path.is_file():
        before = read_json(path)
        for key, value in plain.items():
            if before.get(key) != value:
                raise ValueError(
                    f"{config.output} holds a demo with {key} {before.get(key)}, now it is {value}: "
                    "choose another --output, or delete that folder"
                )
        return
    if config.output.exists() and any(config.output.iterdir()):
        raise ValueError(f"{config.output} is not empty and holds no demo: choose another --output")
    config.output.mkdir(parents=True, exist_ok=True)
    write_json(path, plain)


def steps(config: DemoConfig) -> Iterator[Step]:
    """Yields the commands one after the other; each may depend on what those before it have made."""
    yield prepare_step(config)
    corpus = Corpus.open(config.corpus)
    yield cluster_step(config, int(corpus.num_frames.sum()))
    yield pretrain_step(config)
    for task, about in tasks(corpus):
        yield probe_step(config, task, about)
    yield report_step(config)


def prepare_step(config: DemoConfig) -> Step:
    """Audio to corpus."""
    if config.data is not None:
        about = "Read the audio, compute log-Mel features once, set aside what cannot be read."
        return Step(about=about, command=("prepare", str(config.data), str(config.corpus)))
    about = "Speak a small corpus with espeak-ng: a dozen voices, and every phone's exact time is known."
    settings = ("--synthetic", str(config.num_utterances), "--seed", str(config.seed))
    return Step(about=about, command=("prepare", str(config.corpus), *settings))


def cluster_step(config: DemoConfig, num_frames: int) -> Step:
    """Features to targets."""
    num_clusters = max(2, min(MAX_CLUSTERS, num_frames // FRAMES_PER_CLUSTER))
    return Step(
        about="Make targets without any transcript: k-means sorts frames into clusters, whose numbers will be predicted.",
        command=(
            "cluster", str(config.corpus), "--mfcc", "--name", LABELS,
            "--num-clusters", str(num_clusters), "--seed", str(config.seed)
        ),
        is_done=lambda: (config.corpus / "labels" / LABELS / "digests.json").is_file(),
    )  # fmt: skip


def pretrain_step(config: DemoConfig) -> Step:
    """Targets to model."""
    num_steps = max(20, round(STEPS_PER_MINUTE * config.minutes))
    return Step(
        about="Pre-train a small MelHuBERT: hide stretches of speech, predict the clusters of what was hidden.",
        command=(
            "pretrain", RECIPE, str(config.corpus), "--labels", LABELS, "--output", str(config.run),
            "--minutes", f"{config.minutes:g}", "--steps", str(num_steps), "--seed", str(config.seed),
        ),
        is_done=lambda: (config.run / "model" / "model.json").is_file(),
    )  # fmt: skip


def probe_step(config: DemoConfig, task: str, about: str) -> Step:
    """Model to result card."""
    card = config.card(task)
    fewer = ("--max-frames", str(MAX_PROBE_FRAMES)) if task == "phones" else ()
    return Step(
        about=about,
        command=(
            "probe", task, str(config.run / "model"), "--corpus", str(config.corpus), "--output", str(card),
            *fewer,
        ),
        is_done=card.is_file,
    )  # fmt: skip


def report_step(config: DemoConfig) -> Step:
    """Everything to one page."""
    return Step(
        about="Put curves, an utterance with its targets, and the tables on one page.",
        command=(
            "report",
            str(config.run),
            str(config.corpus),
            "--title",
            "sslim demo",
            "--output",
            str(config.output / "report.html"),
        ),
    )


def tasks(corpus: Corpus) -> list[tuple[str, str]]:
    """Returns the probes that this corpus has what it takes for, each with a sentence."""
    found = []
    if any(corpus.utterance(i).alignment for i in range(min(len(corpus), 20))):
        found.append(("phones", "What did it learn? Read phones from its frozen layers with a linear classifier."))
    for column, about in (
        ("speaker", "And speakers: who is talking, from the same layers, pooled over each utterance."),
        ("label", "Classify the utterances by their label."),
    ):
        counts: dict[str, int] = {}
        for value in corpus.column(column):
            if value is not None:
                counts[value] = counts.get(value, 0) + 1
        if len(counts) > 1 and min(counts.values()) >= MIN_PER_CLASS:
            found.append((column, about))
    return found


def scores(config: DemoConfig) -> list[dict[str, Any]]:
    """Returns the result cards that the demo has made."""
    return [read_json(path) for path in sorted((config.run / "cards").glob("*.json"))]
