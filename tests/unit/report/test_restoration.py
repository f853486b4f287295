"""A restoration comes back as it was saved, its figures are in the caption, and parts that do not fit are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sslim.report import Restoration, build_report, load_restoration, save_restoration


def restoration(*, name: str = "speaker/0001", hidden: bool = True) -> Restoration:
    original = np.random.default_rng(0).normal(size=(60, 12)).astype(np.float32)
    covered, channels = np.zeros(60, dtype=bool), np.zeros(12, dtype=bool)
    if hidden:
        covered[10:20] = channels[3:5] = True
    altered = original * ~(covered[:, None] | channels)
    restored = original + 0.25 * (covered[:, None] | channels) + 9.0 * ~(covered[:, None] | channels)
    return Restoration(
        id=name,
        frame_shift_s=0.01,
        original_TO=original,
        altered_TF=altered.astype(np.float32),
        restored_TO=restored.astype(np.float32),
        covered_T=covered,
        channels_O=channels,
    )


def run_with(folder: Path, shown: Restoration) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "altered_loss": 0.5}\n')
    save_restoration(folder, shown)
    return folder


def test_it_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    shown = restoration()
    save_restoration(tmp_path, shown)
    read = load_restoration(tmp_path)
    assert read is not None
    assert (read.id, read.frame_shift_s) == (shown.id, shown.frame_shift_s)
    for name in ("original_TO", "altered_TF", "restored_TO", "covered_T", "channels_O"):
        assert np.array_equal(getattr(read, name), getattr(shown, name)), name
    assert load_restoration(tmp_path / "none") is None


def test_the_caption_counts_only_what_was_altered(tmp_path: Path) -> None:
    shown = restoration()
    page = build_report([run_with(tmp_path / "run", shown)])
    scored = shown.covered_T[:, None] | shown.channels_O
    guess = np.abs(shown.original_TO.mean(0) - shown.original_TO)[scored].mean()
    assert f"restored to 0.25 on average (absolute difference); the mean of these frames would be {guess:.2f} away" in page
    assert "Orange bars above" in page
    nothing = build_report([run_with(tmp_path / "other", restoration(hidden=False))])
    assert "restored to 9.00 on average" in nothing  # the control: then everything counts
    assert "Orange bar" not in nothing


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    page = build_report([run_with(tmp_path / "run", restoration(name='<script>alert("1")</script>'))])
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    shown = restoration()
    with pytest.raises(ValueError, match=r"restored_TO has shape \(59, 12\); expected \(60, 12\)"):
        replace(shown, restored_TO=shown.restored_TO[1:])
    with pytest.raises(ValueError, match="channels_O has shape"):
        replace(shown, channels_O=shown.channels_O[1:])
    save_restoration(tmp_path, shown)
    (tmp_path / "report_restoration.json").write_text("{}")
    with pytest.raises(ValueError, match="lack 'id'"):
        load_restoration(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"altered_TF": torch.zeros(60)}, r"altered_TF has shape \(60,\)"),
        ({"original_TO": torch.tensor(1.0)}, r"original_TO has shape \(\); expected \(frames, features\)"),
        ({"covered_T": torch.zeros(60)}, "holds covered_T as torch.float32; expected torch.bool"),
        ({"restored_TO": torch.zeros(60, 12, dtype=torch.bfloat16)}, "holds restored_TO as torch.bfloat16"),
        ({"frame_shift_s": [0.01]}, r"has the frame_shift_s \[0.01\]; expected seconds above 0"),
        ({"frame_shift_s": 0}, "has the frame_shift_s 0; expected seconds above 0"),
    ],
)
def test_malformed_files_are_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    save_restoration(tmp_path, restoration())
    tensors, names = load_file(tmp_path / "report_restoration.safetensors"), {"id": "x", "frame_shift_s": 0.01}
    save_file(
        tensors | {key: value for key, value in changes.items() if key in tensors}, tmp_path / "report_restoration.safetensors"
    )
    names |= {key: value for key, value in changes.items() if key in names}
    (tmp_path / "report_restoration.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match=sentence):
        load_restoration(tmp_path)
