"""A speech corpus made offline, with exact phone boundaries: many speakers, any size, the same bytes for the same seed.

Utterance *i* is a function of (seed, number of speakers, i): who speaks, what, in which split, how loud and how noisy. Speakers
do not depend on the seed: corpora of different seeds have the same speakers and different sentences. A folder is made shard by
shard; complete shards are kept when a run is repeated, extended or shortened.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from sslim.config import read_json
from sslim.data.espeak import ALIGNMENTS, SAMPLE_RATE, SHARD_CONFIG, EspeakError, Utterance, Voice, require_espeak
from sslim.data.sentences import draw_sentence, transcript
from sslim.data.sources import Segment, Source, SourceUtterance
from sslim.storage import TornFolderError, check_folder

RECIPE_VERSION = 1  # changes whenever the same seed would give other bytes
UTTERANCES_PER_SHARD = 200  # about 12 minutes of audio
SPLIT_CYCLE = ("train", "train", "train", "train", "dev", "train", "train", "train", "train", "test")

ACCENTS = (
    "en-us", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us-nyc", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en",
)  # fmt: skip
# Variants that sound like people, women and men in turn at first; whispers, robots and those that overdrive are left out, and
# so is every variant with breath noise (f2, f3, f5, Alicia, sandro, victor): espeak-ng seeds that noise from the clock.
VARIANTS = (
    "f1", "", "Annie", "m3", "f4", "Andy", "linda", "benjamin", "steph", "Denis", "Andrea", "m7", "belinda", "Nguyen", "aunty",
    "Gene", "anika", "m2", "shelby", "Lee", "grandma", "edward2", "steph2", "RicishayMax2", "Mario", "adam", "m5", "Diogo",
    "iven4", "david", "travis", "marcelo",
)  # fmt: skip
MAX_SPEAKERS = len(ACCENTS) * len(VARIANTS)


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Which synthetic corpus.

    Attributes:
        num_utterances: Size; a larger corpus of the same seed begins with the smaller one.
        seed: Of sentences, levels and noise.
        num_speakers: Speakers in turn.
        min_snr_db: Background noise is at least this far below the speech, evenly distributed up to ``max_snr_db``.
        max_snr_db: Likewise.
    """

    num_utterances: int
    seed: int = 0
    num_speakers: int = 12
    min_snr_db: float = 20.0
    max_snr_db: float = 35.0


def speaker_voice(speaker: int) -> tuple[str, Voice]:
    """Returns the name and the voice of the speaker with a number: variant, accent, pitch, liveliness and speed."""
    variant = VARIANTS[speaker % len(VARIANTS)]
    accent = ACCENTS[(speaker + speaker // len(VARIANTS)) % len(ACCENTS)]
    generator = np.random.default_rng([RECIPE_VERSION, speaker])
    voice = Voice(
        accent=accent,
        variant=variant,
        pitch=int(generator.integers(35, 66)),
        pitch_range=int(generator.integers(30, 71)),
        rate_wpm=int(generator.integers(145, 196)),
    )
    return f"{speaker:03d}-{variant or 'plain'}-{accent}", voice


def plan_utterance(config: SyntheticConfig, index: int) -> Utterance:
    """Returns the plan of utterance ``index``.

    Speakers take turns. The split follows a cycle of ten, started at another place for every speaker, so that each speaker has
    8 in 10 utterances in train, 1 in dev and 1 in test, and short corpora have all three as well.
    """
    speaker, turn = index % config.num_speakers, index // config.num_speakers
    name, voice = speaker_voice(speaker)
    generator = np.random.default_rng([RECIPE_VERSION, config.seed, index])
    sentence = draw_sentence(generator)
    varied = Voice(
        accent=voice.accent,
        variant=voice.variant,
        pitch=voice.pitch + int(generator.integers(-4, 5)),
        pitch_range=voice.pitch_range,
        rate_wpm=round(voice.rate_wpm * generator.uniform(0.93, 1.07)),
    )
    return Utterance(
        id=f"synthetic-{index:06d}",
        sentence=sentence,
        text=transcript(sentence),
        speaker=name,
        split=SPLIT_CYCLE[(turn + 3 * speaker) % len(SPLIT_CYCLE)],
        voice=varied,
        lead_s=round(generator.uniform(0.05, 0.3), 4),
        trail_s=round(generator.uniform(0.05, 0.3), 4),
        level_db=round(generator.uniform(-29.0, -23.0), 2),
        snr_db=round(generator.uniform(config.min_snr_db, config.max_snr_db), 2),
        noise_seed=(RECIPE_VERSION, config.seed, index, 1),
    )


def _check(config: SyntheticConfig) -> None:
    if config.num_utterances < 1:
        raise ValueError(f"a synthetic corpus has at least one utterance, not {config.num_utterances}")
    if not 1 <= config.num_speakers <= MAX_SPEAKERS:
        raise ValueError(f"a synthetic corpus has 1 to {MAX_SPEAKERS} speakers, not {config.num_speakers}")
    if config.seed < 0:
        raise ValueError(f"the seed of a synthetic corpus is 0 or more, not {config.seed}")
    if not 0 <= config.min_snr_db <= config.max_snr_db:
        raise ValueError(
            f"the noise of a synthetic corpus is 0 dB or more below the speech, not {config.min_snr_db} to {config.max_snr_db}"
        )


def _recipe(config: SyntheticConfig) -> dict[str, float]:
    """Everything that decides an utterance's bytes; the number of utterances does not."""
    values = {key: value for key, value in asdict(config).items() if key != "num_utterances"}
    return {"recipe_version": RECIPE_VERSION, "utterances_per_shard": UTTERANCES_PER_SHARD, **values}


def _is_complete(folder: Path, config: SyntheticConfig, num_utterances: int) -> bool:
    """Tells whether a shard need not be made again.

    Raises:
        ValueError: It belongs to another corpus.
    """
    if not folder.exists():
        return False
    try:
        check_folder(folder)
    except TornFolderError:
        return False
    found = read_json(folder / SHARD_CONFIG)
    for key, value in _recipe(config).items():
        if found.get(key) != value:
            raise ValueError(
                f"{folder.parent} holds a synthetic corpus with {key} {found.get(key)}, not {value}: give another folder"
            )
    return found["num_utterances"] >= num_utterances


def _make_shard(folder: Path, config: SyntheticConfig, indices: range) -> None:
    plan = {"config": _recipe(config), "utterances": [asdict(plan_utterance(config, i)) for i in indices]}
    package_root = str(Path(__file__).resolve().parents[2])
    python_path = os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-m", "sslim.data.espeak", str(folder.resolve())],
        input=json.dumps(plan),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"ended with code {result.returncode}"]
        raise EspeakError(f"synthetic speech for {folder} failed: {lines[-1]}")


def _shards(folder: Path, config: SyntheticConfig) -> list[tuple[Path, range]]:
    count = config.num_utterances
    return [
        (folder / f"shard-{start // UTTERANCES_PER_SHARD:05d}", range(start, min(start + UTTERANCES_PER_SHARD, count)))
        for start in range(0, count, UTTERANCES_PER_SHARD)
    ]


def make_corpus(folder: Path, config: SyntheticConfig, *, jobs: int = 2, progress: Callable[[int], None] | None = None) -> None:
    """Makes the shards that are missing, each in a process of its own.

    Args:
        folder: Where to; made if needed.
        config: Which corpus.
        jobs: Processes at a time.
        progress: Called with the number of utterances available so far.

    Raises:
        ValueError: Nonsensical config, espeak-ng not installed or failing, or another corpus in the folder.
    """
    _check(config)
    folder.mkdir(parents=True, exist_ok=True)
    missing, available = [], 0
    for shard, indices in _shards(folder, config):
        if not _is_complete(shard, config, len(indices)):
            missing.append((shard, indices))
        else:
            available += len(indices)
    if progress is not None:
        progress(available)
    if not missing:
        return
    require_espeak()
    pool = ThreadPoolExecutor(max(1, jobs))
    try:
        running = {pool.submit(_make_shard, shard, config, indices): indices for shard, indices in missing}
        for done in as_completed(running):
            done.result()
            available += len(running[done])
            if progress is not None:
                progress(available)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read_shard(folder: Path, num_utterances: int) -> Iterator[SourceUtterance]:
    with (folder / ALIGNMENTS).open(encoding="utf-8") as file:
        for line in islice(file, num_utterances):
            values = json.loads(line)
            starts: Sequence[tuple[str, int]] = values["phones"]
            ends = [start for _, start in starts[1:]] + [values["num_samples"]]
            yield SourceUtterance(
                id=values["id"],
                audio=folder / f"{values['id']}.flac",
                speaker=values["speaker"],
                text=values["text"],
                split=values["split"],
                alignment=tuple(
                    Segment(symbol=symbol, start_s=start / SAMPLE_RATE, end_s=end / SAMPLE_RATE)
                    for (symbol, start), end in zip(starts, ends, strict=True)
                ),
            )


def synthetic_source(
    folder: str | Path,
    *,
    num_utterances: int,
    seed: int = 0,
    num_speakers: int = 12,
    jobs: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Source:
    """Makes (or completes) a synthetic corpus in a folder and describes it.

    Args:
        folder: For the audio; can be deleted once a corpus has been prepared from it.
        num_utterances: Size; 1,000 are about an hour.
        seed: Of sentences, levels and noise.
        num_speakers: 1 to 256.
        jobs: Processes at a time.
        progress: Called with the number of utterances available so far.

    Raises:
        ValueError: As for :func:`make_corpus`.
    """
    folder = Path(folder)
    config = SyntheticConfig(num_utterances=num_utterances, seed=seed, num_speakers=num_speakers)
    make_corpus(folder, config, jobs=jobs, progress=progress)
    utterances = [u for shard, indices in _shards(folder, config) for u in _read_shard(shard, len(indices))]
    return Source(
        name=f"synthetic-{num_utterances}-seed{seed}",
        utterances=utterances,
        num_utterances=len(utterances),
        note=f"synthetic speech of {min(num_speakers, num_utterances)} espeak-ng voices with noise at {config.min_snr_db:g} to "
        f"{config.max_snr_db:g} dB, phone alignments are exact",
    )
