"""Synthetic speech: exact boundaries, reproducible bytes, speakers and phones that can be told apart."""

from __future__ import annotations

import importlib.util
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sslim.data import espeak, synthetic
from sslim.data.espeak import EVENT_PHONEME, EVENT_WORD, PHONES, Event, phone_class, phone_starts, pink_noise
from sslim.data.sentences import draw_sentence, transcript
from sslim.data.sources import Source
from sslim.data.synthetic import SyntheticConfig, plan_utterance, speaker_voice, synthetic_source

NUM_UTTERANCES, NUM_SPEAKERS = 72, 6
HOP, WINDOW = 160, 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("synthetic")


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "UTTERANCES_PER_SHARD", 36)
        return synthetic_source(folder, num_utterances=NUM_UTTERANCES, num_speakers=NUM_SPEAKERS, jobs=2)


def log_mel(samples: np.ndarray) -> np.ndarray:
    """(T, 26) log energies in bands that widen with frequency, of int16 samples."""
    frames = np.lib.stride_tricks.sliding_window_view(samples / 32768.0, WINDOW)[::HOP] * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames, 512)) ** 2
    edges = np.unique(np.round(700 * (10 ** (np.linspace(0.03, np.log10(1 + 8000 / 700), 28)) - 1) / 8000 * 256).astype(int))
    bands = [power[:, a:b].mean(axis=1) for a, b in pairwise(edges)]
    return np.log(np.stack(bands, axis=1) + 1e-8)


@pytest.fixture(scope="module")
def spectra(source: Source) -> list[np.ndarray]:
    return [log_mel(soundfile.read(u.audio, dtype="int16")[0]) for u in source.utterances]


def test_alignments_cover_the_audio_exactly(source: Source) -> None:
    for utterance in source.utterances:
        info = soundfile.info(utterance.audio)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        segments = utterance.alignment
        assert segments[0].start_s == 0
        assert segments[-1].end_s == info.frames / 16000
        assert all(a.end_s == b.start_s for a, b in pairwise(segments))
        assert all(s.end_s - s.start_s >= 0.003 for s in segments)
        assert (segments[0].symbol, segments[-1].symbol) == ("sil", "sil")
        assert not any(a.symbol == b.symbol == "sil" for a, b in pairwise(segments))
        assert {s.symbol for s in segments} <= set(PHONES)
        assert 0.05 < np.mean([s.end_s - s.start_s for s in segments if s.symbol != "sil"]) < 0.15
        assert utterance.text == utterance.text.lower()


def test_silences_are_quiet_and_vowels_are_loud(source: Source) -> None:
    level: dict[str, list[float]] = {"sil": [], "a": []}
    for utterance in source.utterances:
        samples = soundfile.read(utterance.audio)[0]
        for segment in utterance.alignment:
            if segment.symbol in level:
                part = samples[round(segment.start_s * 16000) : round(segment.end_s * 16000)]
                level[segment.symbol].append(10 * np.log10(np.mean(part**2)))
    assert np.median(level["a"]) - np.median(level["sil"]) > 20
    assert np.median(level["sil"]) > -70  # background noise, not digital silence


def test_every_speaker_is_in_every_split_and_no_id_twice(source: Source) -> None:
    assert len({u.id for u in source.utterances}) == source.num_utterances == NUM_UTTERANCES
    plans = [plan_utterance(SyntheticConfig(num_utterances=120), i) for i in range(120)]
    per_speaker = {name: Counter(p.split for p in plans if p.speaker == name) for name in {p.speaker for p in plans}}
    assert len(per_speaker) == 12
    assert all(splits == {"train": 8, "dev": 1, "test": 1} for splits in per_speaker.values())


def test_fresh_processes_give_identical_bytes_also_for_a_prefix(source: Source, folder: Path, tmp_path: Path) -> None:
    again = synthetic_source(tmp_path, num_utterances=8, num_speakers=NUM_SPEAKERS, jobs=1)
    for first, second in zip(source.utterances, again.utterances, strict=False):
        assert first.audio.read_bytes() == second.audio.read_bytes()
        assert first.alignment == second.alignment
    other = synthetic_source(tmp_path / "other", num_utterances=1, num_speakers=NUM_SPEAKERS, seed=1)
    assert other.utterances[0].audio.read_bytes() != source.utterances[0].audio.read_bytes()
    assert other.utterances[0].speaker == source.utterances[0].speaker


def test_complete_shards_are_kept_and_torn_ones_made_again(
    source: Source, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "UTTERANCES_PER_SHARD", 36)
    shutil.copytree(folder, tmp_path / "copy")
    kept, torn = tmp_path / "copy" / "shard-00000", tmp_path / "copy" / "shard-00001"
    before = (torn / "synthetic-000040.flac").read_bytes()
    stamp = kept.stat().st_ino
    (torn / "synthetic-000040.flac").write_bytes(before[:100])
    counts: list[int] = []
    made = synthetic_source(tmp_path / "copy", num_utterances=38, num_speakers=NUM_SPEAKERS, progress=counts.append)
    assert kept.stat().st_ino == stamp
    assert counts == [36, 38]
    assert made.num_utterances == 38
    fresh = synthetic_source(tmp_path / "copy", num_utterances=NUM_UTTERANCES, num_speakers=NUM_SPEAKERS)
    assert (torn / "synthetic-000040.flac").read_bytes() == before
    assert [u.alignment for u in fresh.utterances] == [u.alignment for u in source.utterances]
    with pytest.raises(ValueError, match="holds a synthetic corpus with seed 0, not 5"):
        synthetic_source(tmp_path / "copy", num_utterances=38, num_speakers=NUM_SPEAKERS, seed=5)


def frames_and_phones(source: Source, spectra: list[np.ndarray], shift_s: float = 0.0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per utterance: level-free spectra and the phone at each frame's centre, boundaries moved by ``shift_s``."""
    result = []
    for utterance, spectrum in zip(source.utterances, spectra, strict=True):
        centres = (np.arange(len(spectrum)) * HOP + WINDOW / 2) / 16000 - shift_s
        starts = np.array([s.start_s for s in utterance.alignment])
        index = np.clip(np.searchsorted(starts, centres, side="right") - 1, 0, None)
        symbols = np.array([PHONES.index(s.symbol) for s in utterance.alignment])[index]
        result.append((spectrum - spectrum.mean(axis=0), symbols))
    return result


def centroid_accuracy(utterances: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Nearest class mean, learnt on even utterances, tested on odd ones."""
    train, test = utterances[::2], utterances[1::2]
    x, y = np.concatenate([u[0] for u in train]), np.concatenate([u[1] for u in train])
    classes = np.unique(y)
    means = np.stack([x[y == c].mean(axis=0) for c in classes])
    x, y = np.concatenate([u[0] for u in test]), np.concatenate([u[1] for u in test])
    distance = (means**2).sum(axis=1) - 2 * x @ means.T
    return float((classes[distance.argmin(axis=1)] == y).mean())


def test_phones_sound_alike_and_boundaries_are_where_they_should_be(source: Source, spectra: list[np.ndarray]) -> None:
    exact = centroid_accuracy(frames_and_phones(source, spectra))
    rng = np.random.default_rng(0)
    shuffled = []
    for spectrum, symbols in frames_and_phones(source, spectra):
        runs = np.split(symbols, np.flatnonzero(np.diff(symbols)) + 1)
        shuffled.append((spectrum, np.concatenate([runs[i] for i in rng.permutation(len(runs))])))
    assert exact > 3 * centroid_accuracy(shuffled)
    assert exact > 0.25
    shifted = {shift: centroid_accuracy(frames_and_phones(source, spectra, shift)) for shift in (-0.04, -0.02, 0.02, 0.04)}
    assert exact > max(shifted.values())
    assert min(shifted[-0.02], shifted[0.02]) > max(shifted[-0.04], shifted[0.04])


def test_speakers_differ_more_than_halves_of_one_speaker(source: Source, spectra: list[np.ndarray]) -> None:
    names = sorted({u.speaker for u in source.utterances})
    halves = []
    for half in (0, 1):
        rows = []
        for name in names:
            own = [s for u, s in zip(source.utterances, spectra, strict=True) if u.speaker == name][half::2]
            mean = np.concatenate(own).mean(axis=0)
            rows.append(mean - mean.mean())  # loudness is drawn for every utterance
        halves.append(np.stack(rows))
    distance = np.linalg.norm(halves[0][:, None] - halves[1][None], axis=-1)
    same = np.diag(distance)
    different = distance[~np.eye(len(names), dtype=bool)]
    assert different.mean() > 2 * same.mean()
    assert (distance.argmin(axis=1) == np.arange(len(names))).all()


def test_closures_belong_to_the_stop() -> None:
    samples = np.full(10000, 100, np.int16)
    samples[1800:2000] = 0  # closure inside a word, before the stop's burst at 2000
    samples[3000:3400] = 0  # between a word's start at 3000 and its first phone at 3400
    samples[6000:7000] = 0  # a pause, then a word that starts at 7000 with its closure up to 7500
    samples[7000:7500] = 0
    events = [
        Event(EVENT_WORD, 0, ""),
        Event(EVENT_PHONEME, 0, "'a"),
        Event(EVENT_PHONEME, 2000, "t"),
        Event(EVENT_WORD, 3000, ""),
        Event(EVENT_PHONEME, 3400, "b"),
        Event(EVENT_PHONEME, 4000, ",aU"),
        Event(EVENT_PHONEME, 6000, "_:"),
        Event(EVENT_PHONEME, 6900, "_"),
        Event(EVENT_WORD, 7000, ""),
        Event(EVENT_PHONEME, 7500, "k"),
        Event(EVENT_PHONEME, 10000, "_:"),
    ]
    assert phone_starts(samples, events, 22050) == [
        ("a", 0),
        ("t", 1800),
        ("b", 3000),
        ("aU", 4000),
        ("sil", 6000),
        ("k", 7000),
    ]


def test_a_silent_phone_keeps_its_place() -> None:
    samples = np.zeros(1000, np.int16)
    samples[:200] = 5
    events = [Event(EVENT_PHONEME, 0, "a"), Event(EVENT_PHONEME, 200, "t#"), Event(EVENT_PHONEME, 600, "3")]
    assert phone_starts(samples, events, 22050) == [("a", 0), ("t#", 200), ("3", 600)]


@pytest.mark.parametrize(
    ("mnemonic", "symbol"), [("'eI", "eI"), (",a", "a"), ("_:", "sil"), ("_!", "sil"), ("I#", "I"), ("t#", "t#"), ("", "sil")]
)
def test_phone_classes(mnemonic: str, symbol: str) -> None:
    assert phone_class(mnemonic) == symbol


def test_sentences_are_varied_and_clean() -> None:
    sentences = [draw_sentence(np.random.default_rng([7, i])) for i in range(2000)]
    assert sentences == [draw_sentence(np.random.default_rng([7, i])) for i in range(2000)]
    assert len(set(sentences)) > 1900
    words = Counter(word for s in sentences for word in transcript(s).split())
    assert len(words) > 500
    assert not any("{" in s or ":" in s or " a a" in s or " a o" in s for s in sentences)
    assert transcript("last August, the Queen's dog ran.") == "last august the queen's dog ran"


def test_speakers_are_distinct_and_do_not_depend_on_the_seed() -> None:
    names = [speaker_voice(i)[0] for i in range(synthetic.MAX_SPEAKERS)]
    voices = {(v.accent, v.variant) for _, v in map(speaker_voice, range(synthetic.MAX_SPEAKERS))}
    assert len(set(names)) == len(voices) == synthetic.MAX_SPEAKERS
    plans = [plan_utterance(SyntheticConfig(num_utterances=1, seed=seed), 3) for seed in (0, 1)]
    assert plans[0].speaker == plans[1].speaker
    assert plans[0].sentence != plans[1].sentence


def test_no_speaker_has_breath_noise_that_differs_from_run_to_run() -> None:
    import espeakng_loader

    folder = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    breathes = {v: "\nbreath " in (folder / v).read_text("latin-1") for v in (*synthetic.VARIANTS, "f2") if v}
    assert breathes.pop("f2")  # a voice known to differ
    assert not any(breathes.values())


def test_noise_is_pink() -> None:
    power = np.abs(np.fft.rfft(pink_noise(1 << 16, np.random.default_rng(0)))) ** 2
    octaves = [power[2**k : 2 ** (k + 1)].mean() for k in range(9, 15)]
    np.testing.assert_allclose(np.diff(10 * np.log10(octaves)), -3.0, atol=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_utterances": 0}, "not 0"), ({"num_speakers": 257}, "1 to 256 speakers, not 257"), ({"seed": -1}, "not -1")],
)
def test_nonsense_is_refused(tmp_path: Path, change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic_source(tmp_path, **{"num_utterances": 2, **change})


def test_a_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "sslim\[demo\]"'):
        synthetic_source(tmp_path, num_utterances=2)


@pytest.mark.parametrize(("accent", "variant"), [("en-atlantis", ""), ("en-us", "nobody")])
def test_an_unknown_voice_is_an_error_of_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accent: str, variant: str
) -> None:
    monkeypatch.setattr(synthetic, "ACCENTS", (accent,))
    monkeypatch.setattr(synthetic, "VARIANTS", (variant,))
    with pytest.raises(ValueError, match=f"espeak-ng has no voice.*{variant or accent}"):
        synthetic_source(tmp_path, num_utterances=1, num_speakers=1)
    assert list(tmp_path.iterdir()) == []


def test_a_data_folder_with_a_long_path_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import espeakng_loader

    long = tmp_path / ("x" * 200)
    long.symlink_to(espeakng_loader.get_data_path(), target_is_directory=True)
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(long))
    with espeak.open_engine() as engine:
        engine.set_voice(speaker_voice(0)[1])
        samples, events = engine.speak("a red fox.")
    assert len(samples) > 5000
    assert [phone_class(e.symbol) for e in events if e.kind == EVENT_PHONEME][:3] == ["@", "r", "E"]
