"""Noise added to waveforms while training: Gaussian, or from a folder of recordings, at a drawn ratio of signal to noise.

What S3PRL's ``online`` settings ``noise_type``, ``noise_proportion`` and ``snrs`` describe (and its v0.1 never applies).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sslim.audio import audio_info, read_audio
from sslim.data.audio_sources import audio_files


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Which noise, how much and how often.

    Attributes:
        proportion: Share of the utterances that get noise.
        folder: Folder of noise recordings, of any rate and length; None for Gaussian noise.
        snrs_db: Ratios of signal to noise in dB, of the mean power of all samples of an utterance; one is drawn for each.
    """

    proportion: float = 0.5
    folder: str | None = None
    snrs_db: tuple[float, ...] = (3.0, 6.0, 9.0)

    def __post_init__(self) -> None:
        if not 0 < self.proportion <= 1:
            raise ValueError(f"noise.proportion is {self.proportion:g}; it must be above 0 and at most 1 (noise null for none)")
        if not self.snrs_db or not np.isfinite(self.snrs_db).all():
            raise ValueError(f"noise.snrs_db is {list(self.snrs_db)}; expected one or more numbers of dB")


class Noise:
    """Adds noise to waveforms.

    Args:
        config: Settings.
        sample_rate: Hz of the waveforms.

    Attributes:
        files: Noise recordings in the order of their names; empty for Gaussian noise.

    Raises:
        ValueError: The folder holds no audio that can be read.
    """

    def __init__(self, config: NoiseConfig, sample_rate: int) -> None:
        self.config, self.sample_rate = config, sample_rate
        self.files: list[Path] = []
        if config.folder is not None:
            folder = Path(config.folder)
            if not folder.is_dir():
                raise ValueError(f"noise.folder {folder} is not a folder; expected one of noise recordings")
            self.files = list(audio_files(folder))
            if not self.files:
                raise ValueError(f"noise.folder {folder} holds no audio files")
            for path in self.files:
                audio_info(path)  # what cannot be read shows before training, not in the middle of it

    def add(self, waveform_S: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Returns the waveform with noise, or as it is, by chance; silence, and noise that is silent, change nothing.

        Args:
            waveform_S: (S,) float32.
            generator: Decides whether, which noise, from where on and how loud.

        Raises:
            AudioError: A noise recording cannot be read.
        """
        if generator.random() >= self.config.proportion or len(waveform_S) == 0:
            return waveform_S
        snr_db = self.config.snrs_db[int(generator.integers(len(self.config.snrs_db)))]
        noise_S = self._draw(len(waveform_S), generator)
        signal, noise = (float(np.mean(np.square(values, dtype=np.float64))) for values in (waveform_S, noise_S))
        if signal == 0.0 or noise == 0.0:
            return waveform_S
        return (waveform_S + noise_S * (signal / noise * 10 ** (-snr_db / 10)) ** 0.5).astype(np.float32)

    def _draw(self, num_samples: int, generator: np.random.Generator) -> np.ndarray:
        """Returns ``num_samples`` of noise; a recording is begun anywhere and goes round."""
        if not self.files:
            return generator.standard_normal(num_samples, dtype=np.float32)
        path = self.files[int(generator.integers(len(self.files)))]
        recording_S = read_audio(path, sample_rate=self.sample_rate)
        first = int(generator.integers(len(recording_S)))
        return np.resize(np.roll(recording_S, -first), num_samples)
