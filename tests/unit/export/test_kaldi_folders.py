"""Extraction into Kaldi data directories, read back by our own reader, by kaldiio and by a parser written from the format."""

import shutil
import struct

import kaldiio
import numpy as np
import pytest
import soundfile
import torch

import sslim.batch
import sslim.export.kaldi_folders
from sslim.data.kaldi import kaldi_source, read_matrix, read_scp
from sslim.data.prepare import prepare
from sslim.data.sources import Source, SourceUtterance
from sslim.export import ExtractConfig, extract
from sslim.export.kaldi_folders import FeatureUtterance, speakers_are_in_order, write_feature_folder
from sslim.models import PRESETS, build_model

SPEAKERS = {"spk1-b": "spk1", "spk1-a": "spk1", "spk2-z": "spk2", "Spk3-é": "Spk3"}
SECONDS = {"spk1-b": 0.8, "spk1-a": 0.31, "spk2-z": 1.27, "Spk3-é": 0.5}
SORTED = ["Spk3-é", "spk1-a", "spk1-b", "spk2-z"]  # as LC_ALL=C sort has them: upper case first
CONFIG = ExtractConfig(layers="0,2,final", format="ark")


@pytest.fixture(scope="module")
def model():
    model = build_model(PRESETS["melhubert-tiny"](), torch.Generator().manual_seed(0))
    model.set_statistics(torch.full((40,), 8.0), torch.full((40,), 4.0), source="made up")
    return model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Recordings with speakers and texts, prepared."""
    folder, random = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    utterances = []
    for i, (name, seconds) in enumerate(SECONDS.items()):
        soundfile.write(folder / f"{i}.wav", 0.1 * random.normal(size=round(16000 * seconds)), 16000, subtype="FLOAT")
        text = f" text  of {name}"
        utterances.append(SourceUtterance(id=name, audio=folder / f"{i}.wav", speaker=SPEAKERS[name], text=text))
    return prepare(Source(name="s", utterances=utterances, num_utterances=len(utterances)), folder / "corpus").corpus


@pytest.fixture(scope="module")
def wanted(model, corpus):
    """What the model gives for each utterance alone, by layer."""
    found = {key: {} for key in ("layer_00", "layer_02", "final")}
    for i, name in enumerate(corpus.ids()):
        features_TF = torch.from_numpy(np.array(corpus.features(i), dtype=np.float32))
        batch = model.frontend.finish(sslim.batch.Padded(values=features_TF[None], lengths=torch.tensor([len(features_TF)])))
        with torch.inference_mode():
            output = model.encode_features(batch.values, batch.lengths)
        found["layer_00"][name], found["layer_02"][name] = output.layers[0][0].numpy(), output.layers[2][0].numpy()
        found["final"][name] = output.final[0].numpy()
    return found


@pytest.fixture(scope="module")
def extracted(model, corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("extracted") / "with space" / "features"
    return output, extract(model, [corpus.path], output, CONFIG)


def table(path):
    """Key to the words behind it; keys in the order of the file."""
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    found = {row[0]: row[1:] for row in rows}
    assert len(found) == len(rows)
    return found


def parsed(scp):
    """Oracle: reads binary float matrices through a list, by the published layout of Kaldi's archives and nothing of ours."""
    found = {}
    for line in scp.read_text(encoding="utf-8").splitlines():
        key, value = line.split(" ", 1)
        archive, offset = value.rsplit(":", 1)
        with open(archive, "rb") as file:
            file.seek(int(offset) - len(key.encode()) - 1)
            assert file.read(len(key.encode()) + 1) == key.encode() + b" "  # the offset is the byte behind the key
            assert file.read(5) == b"\0BFM "
            sizes = []
            for _ in range(2):
                assert file.read(1) == b"\4"
                sizes.append(struct.unpack("<i", file.read(4))[0])
            values = struct.unpack(f"<{sizes[0] * sizes[1]}f", file.read(4 * sizes[0] * sizes[1]))
            found[key] = np.array(values, dtype=np.float32).reshape(sizes)
    return found


@pytest.mark.parametrize("layer", ["layer_00", "layer_02", "final"])
def test_three_readers_find_the_layer(layer, extracted, wanted):
    output, index = extracted
    scp = output / index["archives"][layer]
    assert scp == output / layer / "feats.scp"
    ours = {key: read_matrix(entry) for key, entry in read_scp(scp).items()}
    theirs = dict(kaldiio.load_scp(str(scp)))
    oracle = parsed(scp)
    assert list(ours) == list(oracle) == SORTED
    assert set(theirs) == set(SORTED)
    for key in SORTED:
        np.testing.assert_array_equal(ours[key], oracle[key])
        np.testing.assert_array_equal(theirs[key], oracle[key])
        np.testing.assert_allclose(oracle[key], wanted[layer][key], rtol=0, atol=1e-5)
    sequential = [key for key, _ in kaldiio.load_ark(str(scp.with_suffix(".ark")))]
    assert sequential == SORTED
    other = {"layer_00": "final", "layer_02": "layer_00", "final": "layer_00"}[layer]
    assert not np.allclose(oracle["spk1-a"], wanted[other]["spk1-a"], atol=1e-2)  # control: layers are told apart


def test_tables_are_what_kaldi_s_scripts_look_for(extracted, wanted):
    output, index = extracted
    assert index["speakers_in_order"]
    for layer in index["layers"]:
        folder = output / layer
        names = {path.name for path in folder.iterdir()}
        lists = {"feats.scp", "utt2spk", "utt2dur", "utt2num_frames", "text"}
        assert names == lists | {"spk2utt", "feats.ark", "frame_shift"}
        tables = {name: table(folder / name) for name in lists}
        assert all(list(rows) == SORTED for rows in tables.values())
        assert {key: row[0] for key, row in tables["utt2spk"].items()} == SPEAKERS
        spk2utt = {"Spk3": ["Spk3-é"], "spk1": ["spk1-a", "spk1-b"], "spk2": ["spk2-z"]}
        assert list(table(folder / "spk2utt").items()) == list(spk2utt.items())
        for key in SORTED:
            assert tables["utt2num_frames"][key] == [str(len(wanted[layer][key]))]
            assert float(tables["utt2dur"][key][0]) == pytest.approx(SECONDS[key], abs=1e-4)
            assert tables["text"][key] == ["text", "of", key]
        assert float((folder / "frame_shift").read_text()) == 0.02


def test_our_own_preparation_takes_the_folder(extracted, wanted):
    output, _ = extracted
    source = kaldi_source(output / "layer_02")
    found = {utterance.id: utterance for utterance in source.utterances}
    assert list(found) == SORTED
    assert found["spk2-z"].speaker == "spk2"
    np.testing.assert_allclose(found["spk2-z"].read_features(), wanted["layer_02"]["spk2-z"], rtol=0, atol=1e-5)


def test_moved_archives_are_found_by_our_reader(extracted, tmp_path, wanted):
    shutil.copytree(extracted[0] / "final", tmp_path / "moved")
    text = (tmp_path / "moved" / "feats.scp").read_text().replace(str(extracted[0]), "/gone")
    (tmp_path / "moved" / "feats.scp").write_text(text)
    entry = read_scp(tmp_path / "moved" / "feats.scp")["spk1-a"]
    np.testing.assert_allclose(read_matrix(entry), wanted["final"]["spk1-a"], rtol=0, atol=1e-5)


def test_killed_between_and_inside_archives(model, corpus, tmp_path, monkeypatch, extracted):
    """A run that dies while the second archive is written leaves the first whole and no list of the second."""
    output = tmp_path / "features"
    original, calls = sslim.export.kaldi_folders.write_ark_scp, []

    def dies(folder, items, **options):
        calls.append(folder)
        if len(calls) == 2:
            (folder / "feats.ark").write_bytes(b"half of it")  # as if the archive had its name, and the list not yet
            raise KeyboardInterrupt
        return original(folder, items, **options)

    monkeypatch.setattr(sslim.export.kaldi_folders, "write_ark_scp", dies)
    with pytest.raises(KeyboardInterrupt):
        extract(model, [corpus.path], output, CONFIG)
    first = (output / "layer_00" / "feats.ark").stat().st_mtime_ns
    assert not (output / "layer_02" / "feats.scp").exists()
    assert not (output / "index.json").exists()
    monkeypatch.setattr(model, "encode_features", lambda *_: pytest.fail("the model ran again"))
    index = extract(model, [corpus.path], output, CONFIG)
    assert index["utterances"] == extracted[1]["utterances"]
    assert (output / "layer_00" / "feats.ark").stat().st_mtime_ns == first
    for layer in index["layers"]:
        whole, resumed = parsed(extracted[0] / layer / "feats.scp"), parsed(output / layer / "feats.scp")
        assert all(np.array_equal(whole[key], resumed[key]) for key in SORTED)
    assert not [path for path in output.rglob("*") if path.name.endswith(".tmp") or path.name == ".staging"]


def test_left_over_staging_goes_and_older_layouts_are_refused(model, corpus, extracted, tmp_path):
    output = tmp_path / "features"
    shutil.copytree(extracted[0], output)
    (output / ".staging").mkdir()
    extract(model, [corpus.path], output, CONFIG)
    assert not (output / ".staging").exists()
    settings = (output / "settings.json").read_text()
    (output / "settings.json").write_text(settings.replace('"format_version": 2', '"format_version": 1'))
    with pytest.raises(ValueError, match="holds features of another layout; name another folder"):
        extract(model, [corpus.path], output, CONFIG)


def test_a_model_that_moved_is_the_same_model(model, corpus, tmp_path):
    config = ExtractConfig(layers="final")
    for path in ("here", "there"):
        extract(model, [corpus.path], tmp_path / "f", config, origin={"path": path, "sha256": "1"})
    with pytest.raises(ValueError, match="another model"):
        extract(model, [corpus.path], tmp_path / "f", config, origin={"path": "here", "sha256": "2"})


def test_unknown_speakers_and_missing_texts(tmp_path):
    rows = [
        FeatureUtterance(id="b", num_frames=2, duration_s=0.5, text="x"),
        FeatureUtterance(id="a", num_frames=2, duration_s=0.25, speaker="Mr  X"),
    ]
    write_feature_folder(tmp_path, rows, 0.01, lambda key: np.full((2, 3), ord(key)))
    assert table(tmp_path / "utt2spk") == {"a": ["Mr_X"], "b": ["b"]}
    assert list(table(tmp_path / "spk2utt")) == ["Mr_X", "b"]
    assert not (tmp_path / "text").exists()  # Kaldi's scripts refuse one with holes
    assert parsed(tmp_path / "feats.scp")["b"][1, 2] == ord("b")


def test_order_of_speakers():
    def of(**speakers):
        return [FeatureUtterance(id=key, num_frames=1, duration_s=1, speaker=name) for key, name in speakers.items()]

    assert speakers_are_in_order(of(b_2="b", a_1="a", b_1="b"))
    assert not speakers_are_in_order(of(x1="b", x2="a"))
    assert not speakers_are_in_order(of(x1="a", x2="b", x3="a"))
