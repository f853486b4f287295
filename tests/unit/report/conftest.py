"""A run's folder made by hand, with figures that the page must show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sslim.report import Example, save_example

PHONES = ("h", "e", "l", "oʊ", "w", "ɜː", "d")
HOSTILE = '<script>alert("1")</script>&$\\frac{}\'\x00'


def write_run(folder: Path, *, num_steps: int = 300, seed: int = 0) -> Path:
    """A run with curves, events and settings."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    rows = []
    for step in range(10, num_steps + 1, 10):
        progress = 1 - np.exp(-step / 120)
        rows.append(
            {
                "step": step, "kind": "train", "loss": 4.6 - 2 * progress + 0.1 * random.normal(),
                "masked_accuracy": 0.3 * progress + 0.01 * random.normal(), "unmasked_accuracy": 0.6 * progress,
                "learning_rate": 5e-4 * min(1.0, step / 60), "gradient_norm": float(np.exp(random.normal() * 0.4)),
                "prediction_entropy": 4.6 - progress, "audio_s_per_s": 300 + 20 * random.normal(), "data_wait": 0.0123,
                "batch_size": 8,
            }
        )  # fmt: skip
        if step % 100 == 0:
            rows.append({"step": step, "kind": "valid", "loss": 4.7 - 1.9 * progress, "masked_accuracy": 0.28 * progress})
    rows.append({"step": 200, "kind": "event", "event": "non-finite gradient", "message": "batch 17 was skipped"})
    rows.append({"step": 210, "kind": "event", "event": "saved", "bytes": 1234567})
    config = {
        "seed": 1234,
        "model": {"encoder": {"dim": 192, "blocks": [{"num_heads": 3}, {"num_heads": 3}]}},
        "num_parameters": 2345678,
    }
    (folder / "run.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def an_example(num_frames: int = 150, *, id: str = "synthetic/0001") -> Example:
    """Formant-like features with everything there is to draw."""
    random = np.random.default_rng(0)
    phones_T = np.repeat(np.arange(num_frames // 10 + 1) % len(PHONES), 10)[:num_frames]
    phones_T[:10] = -1
    labels_T = (phones_T * 13 + (np.arange(num_frames) % 10 > 4)) % 100
    bands_F = np.arange(40)[None]
    features_TF = (
        -8 + 6 * np.exp(-((bands_F - 6 - 3 * phones_T[:, None]) ** 2) / 12) + 0.5 * random.normal(size=(num_frames, 40))
    )
    mask_T = np.zeros(num_frames, dtype=bool)
    mask_T[30:40] = mask_T[70:85] = mask_T[120:130] = True
    predictions_T = np.where(mask_T & (random.random(num_frames) < 0.5), 3, labels_T)
    return Example(
        id=id, frame_shift_s=0.02, features_TF=features_TF, labels_T=labels_T, mask_T=mask_T, predictions_T=predictions_T,
        phones_T=phones_T, phone_names=PHONES,
    )  # fmt: skip


def write_card(path: Path, **values: object) -> Path:
    """A result card with two baselines, a learned mix and five layers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"name": "log-Mel", "kind": "features", "layer": "-", "scores": [0.5712, 0.5732], "num_parameters": 0},
        {"name": "random weights", "kind": "random", "layer": "mix", "scores": [0.66, 0.67], "num_parameters": 2345678},
        *({"name": "demo", "kind": "model", "layer": str(i), "scores": [0.6 + 0.03 * i, 0.62 + 0.03 * i]} for i in range(5)),
        {"name": "demo", "kind": "model", "layer": "mix", "scores": [0.7654, 0.7854], "num_parameters": 2345678},
    ]
    for row in rows:
        row |= {"mean": float(np.mean(row["scores"])), "sd": float(np.std(row["scores"], ddof=1)), "dev_scores": row["scores"]}
    card = {
        "format_version": 1, "task": "digits", "metric": "accuracy", "chance": 0.1, "corpus": {"name": "spoken digits"},
        "protocol": {"split": "each speaker left out", "utterances": {"train": 3}}, "rows": rows,
    }  # fmt: skip
    path.write_text(json.dumps(card | values), encoding="utf-8")
    return path


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "demo-run")
    save_example(folder, an_example())
    write_card(folder / "cards" / "digits.json")
    return folder
