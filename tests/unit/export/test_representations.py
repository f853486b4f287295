import json
from pathlib import Path

import kaldiio
import numpy as np
import pytest
import soundfile
import torch

from sslim.export import ExtractConfig, TooManyBadError, extract
from sslim.export.audio_inputs import find_audio, safe_id
from sslim.export.representations import parse_layers
from sslim.models import PRESETS, build_model
from sslim.storage import load_tensors

LENGTHS_S = {"a": 0.8, "sub/b": 0.31, "sub/c": 1.27, "d": 0.5}


@pytest.fixture(scope="module")
def model():
    model = build_model(PRESETS["melhubert-tiny"](), torch.Generator().manual_seed(0))
    model.set_statistics(torch.full((40,), 8.0), torch.full((40,), 4.0), source="made up")
    return model


@pytest.fixture
def audio(tmp_path):
    random = np.random.default_rng(0)
    for name, seconds in LENGTHS_S.items():
        path = tmp_path / "audio" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * random.normal(size=round(16000 * seconds)), 16000, subtype="FLOAT")
    return tmp_path / "audio"


def expected(model, audio, name):
    samples, _ = soundfile.read(audio / f"{name}.wav", dtype="float32")
    with torch.inference_mode():
        output = model.encode(torch.from_numpy(samples)[None])
    return {f"layer_{k:02d}": layer[0] for k, layer in enumerate(output.layers)} | {"final": output.final[0]}


@pytest.mark.parametrize("form", ["safetensors", "npz", "ark"])
def test_files_hold_what_the_model_gives_alone(form, model, audio, tmp_path):
    output = tmp_path / "features"
    index = extract(model, [audio], output, ExtractConfig(layers="0,2,final", format=form))
    assert index == json.loads((output / "index.json").read_text())
    assert set(index["utterances"]) == set(LENGTHS_S)
    assert index["frame_period_s"] == 0.02
    archives = {key: kaldiio.load_scp(str(output / scp)) for key, scp in index.get("archives", {}).items()}
    for name in LENGTHS_S:
        if form == "ark":
            found = {key: torch.from_numpy(archive[name].copy()) for key, archive in archives.items()}
        elif form == "npz":
            with np.load(output / index["utterances"][name]["file"], allow_pickle=False) as arrays:
                found = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        else:
            found = load_tensors(output / index["utterances"][name]["file"])
        wanted = expected(model, audio, name)
        assert set(found) == {"layer_00", "layer_02", "final"}
        for key, x_TD in found.items():
            torch.testing.assert_close(x_TD, wanted[key], rtol=0, atol=1e-5)
        assert index["utterances"][name]["num_frames"] == len(wanted["final"])
    assert not torch.allclose(found["layer_00"], found["layer_02"])  # control: layers differ
    assert not list(output.rglob("*.tmp"))
    assert not (output / ".staging").exists()


def test_batches_change_nothing(model, audio, tmp_path):
    for batch_s in (0.1, 100.0):
        extract(model, [audio], tmp_path / f"{batch_s}", ExtractConfig(batch_s=batch_s))
    for name in LENGTHS_S:
        alone, together = (load_tensors(tmp_path / f"{batch_s}" / f"{name}.safetensors") for batch_s in (0.1, 100.0))
        for key in alone:
            torch.testing.assert_close(alone[key], together[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["safetensors", "ark"])
def test_interrupted_run_continues(form, model, audio, tmp_path, monkeypatch):
    output = tmp_path / "features"
    config = ExtractConfig(format=form, batch_s=0.1)
    written = []

    def dies(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(model, [audio], output, config, tell=dies)
    assert not (output / "index.json").exists()
    left = {p: p.stat().st_mtime_ns for p in output.rglob("*.safetensors")}
    assert len(left) == 2
    original = model.encode
    monkeypatch.setattr(model, "encode", lambda x, n, **k: (written.append(len(x)), original(x, n, **k))[1])
    index = extract(model, [audio], output, config)
    assert sum(written) == 2  # the two that were missing, and no more
    assert len(index["utterances"]) == 4
    if form == "safetensors":
        assert all(p.stat().st_mtime_ns == time for p, time in left.items())
    extract(model, [audio], output, config)
    assert sum(written) == 2  # a finished folder is left as it is


def test_a_folder_is_not_mixed(model, audio, tmp_path):
    output = tmp_path / "features"
    extract(model, [audio], output, ExtractConfig(layers="final"), origin={"sha256": "1"})
    with pytest.raises(ValueError, match="other layers"):
        extract(model, [audio], output, ExtractConfig(layers="1"), origin={"sha256": "1"})
    with pytest.raises(ValueError, match="another model"):
        extract(model, [audio], output, ExtractConfig(layers="final"), origin={"sha256": "2"})
    with pytest.raises(ValueError, match="other audio"):
        extract(model, [audio / "a.wav"], output, ExtractConfig(layers="final"), origin={"sha256": "1"})
    with pytest.raises(ValueError, match="is not empty and holds no features"):
        extract(model, [audio], audio, ExtractConfig())


def test_unreadable_audio_is_quarantined(model, audio, tmp_path):
    (audio / "broken.wav").write_bytes(b"RIFF not really")
    soundfile.write(audio / "blip.wav", np.zeros(100), 16000)  # shorter than a frame
    whole = (audio / "d.wav").read_bytes()
    (audio / "torn.wav").write_bytes(whole[: len(whole) // 2])
    output = tmp_path / "features"
    with pytest.raises(TooManyBadError, match=r"3 of 7 utterances could not be read, more than --max-bad 0\.01"):
        extract(model, [audio], output, ExtractConfig())
    lines = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert {Path(line["path"]).name for line in lines} == {"broken.wav", "blip.wav", "torn.wav"}
    assert all(line["reason"] for line in lines)
    assert len(list(output.rglob("*.safetensors"))) == 4  # the readable ones are there
    index = extract(model, [audio], tmp_path / "tolerant", ExtractConfig(max_bad=0.5))
    assert index["num_quarantined"] == 3
    assert index["num_utterances"] == 4


def test_layers_are_named():
    assert parse_layers("all", 2) == ("layer_00", "layer_01", "layer_02")
    assert parse_layers("2, 0,final,2", 2) == ("layer_02", "layer_00", "final")
    for wrong in ("3", "-1", "last", "", "1.5"):
        with pytest.raises(ValueError, match="accepted are 0 to 2, 'final' and 'all'"):
            parse_layers(wrong, 2)


def test_ids(audio, tmp_path):
    found = dict(find_audio([audio]))
    assert list(found) == ["a", "d", "sub/b", "sub/c"]
    other = tmp_path / "other" / "a.wav"
    other.parent.mkdir()
    other.write_bytes((audio / "a.wav").read_bytes())
    ids = [name for name, _ in find_audio([audio / "a.wav", other])]
    assert len(set(ids)) == 2
    assert all(name.endswith("/a") for name in ids)
    with pytest.raises(ValueError, match="named twice"):
        find_audio([other, other])
    with pytest.raises(ValueError, match="there is no file or folder"):
        find_audio([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no audio files"):
        find_audio([tmp_path / "empty"])
    assert safe_id("../../etc/pass wd") == "etc/pass_wd"
    assert safe_id("/abs\\x/./y") == "abs/x/y"
