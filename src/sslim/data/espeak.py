"""Speech with exact phone boundaries from espeak-ng, through the ``espeakng-loader`` package (an optional extra, GPL-3).

The library is called by ctypes. It reports every phoneme with the sample at which it starts. Its noise source and buffers
carry over from one utterance to the next, so equal bytes are only obtained from a fresh process: ``python -m sslim.data.espeak
FOLDER`` reads the plan of one shard from standard input, speaks it in order, writes the shard and ends.

What is done to the sound: resampled from 22,050 to 16,000 Hz (soxr HQ), silence before and after, a level in dB below full
scale, and quiet pink noise, because digital silence and noise-free speech give features that no recording has.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from sslim.storage import atomic_folder, write_json

SAMPLE_RATE = 16000
SILENCE = "sil"
ALIGNMENTS = "alignments.jsonl"
SHARD_CONFIG = "shard.json"

# espeak-ng's speak_lib.h
OUTPUT_SYNCHRONOUS = 2
PHONEME_EVENTS_AND_DONT_EXIT = 0x8001
CHARACTERS_UTF8 = 1
EVENT_END_OF_LIST, EVENT_WORD, EVENT_PHONEME = 0, 1, 7
PARAMETER_RATE, PARAMETER_PITCH, PARAMETER_RANGE = 1, 3, 4
# espeak-ng keeps its data folder's path in 160 bytes and silently cuts a longer one.
MAX_DATA_PATH_BYTES = 140

MIN_PHONE_S = 0.004  # a phone keeps at least this much when digital silence before the next one is given to that
STRESS_MARKS = "',%="
PHONES = (
    SILENCE, "p", "b", "t", "d", "k", "g", "t#", "tS", "dZ", "f", "v", "T", "D", "s", "z", "S", "Z", "h", "m", "n", "N", "l",
    "r", "w", "j", "i:", "i", "I", "E", "eI", "e@", "a", "aa", "A:", "A@", "aI", "aI@", "aU", "0", "O:", "O@", "OI", "oU", "U",
    "u:", "U@", "V", "3:", "3", "@", "@L", "i@",
)  # fmt: skip
"""Phone classes: espeak-ng's English mnemonics without stress marks and with rare allophones folded by ``ALLOPHONES``. The name
of a vowel stands for its lexical set, so its sound may depend on the accent (``aa`` is the vowel of *bath*)."""
# Everything else that eight accents and 256 voices were seen to say in 3,000 sentences.
ALLOPHONES = {
    "I2": "I", "I#": "I", "a#": "@", "@-": "@", "@2": "@", "@5": "@", "r-": "r", "t[": "t", "t2": "t", ";": "j", "i@3": "i@",
    "aI2": "aI", "aI3": "aI@", "O2": "O:", "o@": "O@", "VR": "3:", "IR": "3:", "w#": "w",
}  # fmt: skip


class EspeakError(ValueError):
    """Synthetic speech cannot be made; the message says what to install or change."""


class Event(NamedTuple):
    """What the engine reports: ``kind`` is EVENT_WORD or EVENT_PHONEME, ``sample`` counts at the engine's rate."""

    kind: int
    sample: int
    symbol: str


@dataclass(frozen=True, kw_only=True)
class Voice:
    """How a speaker sounds.

    Attributes:
        accent: espeak-ng's voice, e.g. ``en-us``.
        variant: One of its variants (``voices/!v``), e.g. ``f2``; empty for none.
        pitch: 0 to 99, 50 is normal.
        pitch_range: 0 (monotone) to 99, 50 is normal.
        rate_wpm: Words per minute, 80 to 450.
    """

    accent: str
    variant: str
    pitch: int
    pitch_range: int
    rate_wpm: int


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """Plan of one utterance.

    Attributes:
        id: Name of its file.
        sentence: What to say, with punctuation.
        text: What to write into the transcript.
        speaker: Who says it.
        split: train, dev or test.
        voice: How.
        lead_s: Silence before.
        trail_s: Silence after.
        level_db: RMS of the speech in dB relative to full scale.
        snr_db: Level of the speech above the background noise.
        noise_seed: Of that noise.
    """

    id: str
    sentence: str
    text: str
    speaker: str
    split: str
    voice: Voice
    lead_s: float
    trail_s: float
    level_db: float
    snr_db: float
    noise_seed: tuple[int, ...]


def require_espeak() -> None:
    """Raises EspeakError when espeakng-loader is not installed."""
    if importlib.util.find_spec("espeakng_loader") is None:
        raise EspeakError('synthetic speech needs espeak-ng, which is not installed: pip install "sslim[demo]"')


class _Id(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    )


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class Engine:
    """The espeak-ng library, one per process; use :func:`open_engine`.

    Attributes:
        sample_rate: Hz of what it speaks.
        data_path: Folder of its voices.
    """

    def __init__(self, library_path: str, data_path: str) -> None:
        self.data_path = Path(data_path)
        self._library = ctypes.CDLL(library_path)
        self._chunks: list[np.ndarray] = []
        self._events: list[Event] = []
        self.sample_rate = self._library.espeak_Initialize(
            OUTPUT_SYNCHRONOUS, 0, data_path.encode(), PHONEME_EVENTS_AND_DONT_EXIT
        )
        if self.sample_rate <= 0:
            raise EspeakError(f"espeak-ng cannot start with its data in {data_path} (code {self.sample_rate})")
        self._callback = _CALLBACK(self._receive)  # kept, the library holds only a pointer
        self._library.espeak_SetSynthCallback(self._callback)
        self._voice: Voice | None = None

    def _receive(self, samples: Any, num_samples: int, events: Any) -> int:
        if num_samples > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        i = 0
        while events[i].type != EVENT_END_OF_LIST:
            event = events[i]
            if event.type == EVENT_PHONEME:
                self._events.append(Event(EVENT_PHONEME, event.sample, bytes(event.id.string).decode("latin-1")))
            elif event.type == EVENT_WORD:
                self._events.append(Event(EVENT_WORD, event.sample, ""))
            i += 1
        return 0

    def set_voice(self, voice: Voice) -> None:
        """Chooses who speaks next.

        Raises:
            EspeakError: There is no such accent or variant (an unknown variant alone is not reported by the library).
        """
        if voice == self._voice:
            return
        name = voice.accent + (f"+{voice.variant}" if voice.variant else "")
        if voice.variant and not (self.data_path / "voices" / "!v" / voice.variant).is_file():
            raise EspeakError(f"espeak-ng has no voice variant {voice.variant!r}")
        code = self._library.espeak_SetVoiceByName(name.encode())
        if code != 0:  # 2 = not found; the library would go on with the previous voice
            raise EspeakError(f"espeak-ng has no voice {name!r} (code {code})")
        parameters = {PARAMETER_RATE: voice.rate_wpm, PARAMETER_PITCH: voice.pitch, PARAMETER_RANGE: voice.pitch_range}
        for parameter, value in parameters.items():
            self._library.espeak_SetParameter(parameter, value, 0)
        self._voice = voice

    def speak(self, sentence: str) -> tuple[np.ndarray, list[Event]]:
        """Speaks a sentence.

        Returns:
            int16 samples (S,) at ``sample_rate`` and the events in order of time.

        Raises:
            EspeakError: The library fails or says nothing.
        """
        self._chunks.clear()
        self._events.clear()
        raw = sentence.encode()
        code = self._library.espeak_Synth(raw, len(raw) + 1, 0, 1, 0, CHARACTERS_UTF8, None, None)
        if code != 0 or not self._chunks:
            raise EspeakError(f"espeak-ng cannot speak {sentence!r} (code {code})")
        return np.concatenate(self._chunks), list(self._events)


@contextmanager
def open_engine() -> Iterator[Engine]:
    """Yields the engine; its data folder is reached through a link where its path is too long for espeak-ng."""
    require_espeak()
    import espeakng_loader

    data_path = espeakng_loader.get_data_path()
    with TemporaryDirectory() as folder:
        if len(data_path.encode()) > MAX_DATA_PATH_BYTES:
            link = Path(folder) / "espeak-ng-data"
            link.symlink_to(data_path, target_is_directory=True)
            data_path = str(link)
        yield Engine(espeakng_loader.get_library_path(), data_path)


def phone_class(mnemonic: str) -> str:
    """Returns the class of an espeak-ng phoneme: without stress, allophones folded, every kind of pause as ``sil``."""
    plain = mnemonic.lstrip(STRESS_MARKS)
    if plain.startswith("_") or not plain:
        return SILENCE
    return ALLOPHONES.get(plain, plain)


def phone_starts(samples: np.ndarray, events: Sequence[Event], sample_rate: int) -> list[tuple[str, int]]:
    """Turns events into phones and the samples at which they start.

    The engine reports a stop at its burst; the closure before it is digital silence at the end of the phone before, or between
    a word's start and its first phone. That silence is given to the stop, as phoneticians do, so a vowel never contains it.

    Args:
        samples: int16 (S,).
        events: Words and phonemes in order of time.
        sample_rate: Hz.

    Returns:
        (class, first sample) in order; the first starts at 0, neighbouring silences are one.
    """
    keep = int(MIN_PHONE_S * sample_rate)
    nonzero = np.flatnonzero(samples)
    starts: list[tuple[str, int]] = []
    previous = Event(EVENT_WORD, 0, "")
    for event in events:
        if event.kind == EVENT_PHONEME:
            symbol, start = phone_class(event.symbol), event.sample
            if symbol != SILENCE:
                before = np.searchsorted(nonzero, start)
                last_sound = int(nonzero[before - 1]) + 1 if before else 0
                earliest = previous.sample + (keep if previous.kind == EVENT_PHONEME else 0)
                if last_sound > previous.sample or previous.kind == EVENT_WORD:
                    start = min(start, max(last_sound, earliest))
            if not starts and start > 0:
                starts.append((SILENCE, 0))
            while starts and starts[-1][1] >= start:  # a phone of no length
                starts.pop()
            if start < len(samples) and not (starts and starts[-1][0] == symbol == SILENCE):
                starts.append((symbol, start))
        previous = event
    return starts or [(SILENCE, 0)]


def pink_noise(num_samples: int, generator: np.random.Generator) -> np.ndarray:
    """Returns noise (S,) of RMS 1 whose power falls by 3 dB per octave from 50 Hz on."""
    size = 1 << max(num_samples - 1, 1).bit_length()
    frequencies_hz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    spectrum = np.fft.rfft(generator.standard_normal(size)) / np.sqrt(np.maximum(frequencies_hz, 50.0))
    spectrum[0] = 0
    noise = np.fft.irfft(spectrum, size)[:num_samples]
    return noise / np.sqrt(np.mean(noise**2))


def render(engine: Engine, plan: Utterance) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """Speaks one utterance.

    Returns:
        int16 samples (S,) at 16 kHz, and (phone class, first sample) in order, the first at 0.
    """
    import soxr

    engine.set_voice(plan.voice)
    raw, events = engine.speak(plan.sentence)
    phones = phone_starts(raw, events, engine.sample_rate)
    speech = soxr.resample(raw.astype(np.float64) / 32768.0, engine.sample_rate, SAMPLE_RATE, quality="HQ")
    lead, trail = round(plan.lead_s * SAMPLE_RATE), round(plan.trail_s * SAMPLE_RATE)
    loud = speech[np.abs(speech) > 1e-3]  # the pauses are not counted into the level
    rms = float(np.sqrt(np.mean(loud**2)))
    target = 10 ** (plan.level_db / 20)
    noise = pink_noise(lead + len(speech) + trail, np.random.default_rng(plan.noise_seed))
    sound = noise * target * 10 ** (-plan.snr_db / 20)
    sound[lead : lead + len(speech)] += speech * (target / rms)
    sound *= min(1.0, 0.95 / float(np.abs(sound).max()))
    starts = [(SILENCE, 0)] if lead else []
    for symbol, sample in phones:
        start = lead + min(len(speech), round(sample * SAMPLE_RATE / engine.sample_rate))
        if not (starts and starts[-1][0] == symbol == SILENCE):
            starts.append((symbol, start))
    if trail and starts[-1][0] != SILENCE:
        starts.append((SILENCE, lead + len(speech)))
    return np.round(sound * 32767).astype(np.int16), starts


def write_shard(folder: Path, config: dict[str, Any], plans: Sequence[Utterance]) -> None:
    """Speaks the utterances of one shard in order and writes it whole: flac files, ``alignments.jsonl``, ``shard.json``.

    Args:
        folder: The shard's folder; appears only when complete.
        config: Plain values to put into ``shard.json``.
        plans: What to speak.
    """
    import soundfile

    with open_engine() as engine, atomic_folder(folder) as temporary:
        with (temporary / ALIGNMENTS).open("w", encoding="utf-8") as file:
            for plan in plans:
                samples, starts = render(engine, plan)
                soundfile.write(temporary / f"{plan.id}.flac", samples, SAMPLE_RATE, subtype="PCM_16")
                line = {
                    "id": plan.id,
                    "speaker": plan.speaker,
                    "text": plan.text,
                    "split": plan.split,
                    "num_samples": len(samples),
                    "phones": starts,
                }
                file.write(json.dumps(line) + "\n")
        write_json(temporary / SHARD_CONFIG, {**config, "num_utterances": len(plans)})


def main() -> None:
    """Reads ``{"config": ..., "utterances": [...]}`` from standard input, writes the shard into the folder of argument 1."""
    plan = json.load(sys.stdin)
    utterances = [
        Utterance(**{**values, "voice": Voice(**values["voice"]), "noise_seed": tuple(values["noise_seed"])})
        for values in plan["utterances"]
    ]
    try:
        write_shard(Path(sys.argv[1]), plan["config"], utterances)
    except (EspeakError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
