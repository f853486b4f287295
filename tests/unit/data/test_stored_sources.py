"""Archives without lists, S3PRL's arrays and its tables of lengths: what is found, what it is taken for, what must be said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sslim.cli import main
from sslim.data.ark import KaldiError, list_ark, read_ark, read_object, write_ark_scp
from sslim.data.ark_folders import ark_source
from sslim.data.corpus import Corpus
from sslim.data.feature_presets import feature_preset
from sslim.data.kaldi import kaldi_source
from sslim.data.label_layout import LayoutError
from sslim.data.length_tables import length_table_source
from sslim.data.numpy_lists import numpy_source
from sslim.data.prepare import prepare
from sslim.data.source_kinds import detect_source
from sslim.data.stored_features import recognised, stored_as
from sslim.frontends import StoredFeaturesConfig, build_frontend


def matrix(seed: int, num_frames: int = 30, dim: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_frames, dim)).astype(np.float32)


def write_ark(path: Path, items: dict[str, np.ndarray]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_ark_scp(path.parent, items.items(), name=path.stem)
    path.with_suffix(".scp").unlink()
    return path


# ---- archives --------------------------------------------------------------------------------------------------------


def test_offsets_of_an_archive_are_those_of_its_list(tmp_path: Path) -> None:
    items = {f"u{i}": matrix(i, 5 + i) for i in range(4)}
    write_ark_scp(tmp_path, items.items())
    stated = {line.split()[0]: int(line.rsplit(":", 1)[1]) for line in (tmp_path / "feats.scp").read_text().splitlines()}
    assert list_ark(tmp_path / "feats.ark") == stated
    for key, offset in stated.items():
        np.testing.assert_array_equal(read_object(tmp_path / "feats.ark", offset), items[key])
    (tmp_path / "text.ark").write_text("a [ 1 2\n 3 4 ]\nb [ 5 6\n 7 8\n 9 1 ]\n")
    assert [(key, array.tolist()) for key, array in read_ark(tmp_path / "text.ark")][1] == ("b", [[5, 6], [7, 8], [9, 1]])
    assert read_object(tmp_path / "text.ark", list_ark(tmp_path / "text.ark")["b"]).shape == (3, 2)
    (tmp_path / "twice.ark").write_text("a [ 1\n2 ]\na [ 3\n4 ]\n")
    with pytest.raises(KaldiError, match="'a' comes a second time"):
        list_ark(tmp_path / "twice.ark")


def test_a_folder_of_archives_for_each_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "fmllr_cmvn"
    first, second = {"19-198-0000": matrix(0), "19-198-0001": matrix(1)}, {"84-121123-0000": matrix(2)}
    write_ark(root / "train_clean_100" / "fmllr_cmvn.ark", first)
    write_ark(root / "dev_clean" / "fmllr_cmvn.ark", second)
    assert detect_source(root) == ("ark", "dev_clean/fmllr_cmvn.ark is there, without a list")
    assert main(["prepare", str(root), str(tmp_path / "c")]) == 0
    assert "taken for fmllr40, told from the name fmllr_cmvn" in " ".join(capsys.readouterr().out.split())
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.frontend_config == feature_preset("fmllr40")
    found = {corpus.utterance(i).id: corpus.utterance(i) for i in range(3)}
    assert {name: (u.speaker, u.split) for name, u in found.items()} == {
        "19-198-0000": ("19", "train-clean-100"),
        "19-198-0001": ("19", "train-clean-100"),
        "84-121123-0000": ("84", "dev-clean"),
    }
    for name, values in (first | second).items():
        stored = corpus.features(found[name].index).astype(np.float32)
        np.testing.assert_allclose(stored, values, rtol=2**-10, atol=2**-20)


def test_numbered_archives_of_timit(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number in (1, 2, 10):
            items = {f"{split}_{number}_{i}": matrix(i) for i in range(2)}
            write_ark(tmp_path / "data-fmllr-tri3" / split / f"feats_fmllr_{split}.{number}.ark", items)
    source = ark_source(tmp_path / "data-fmllr-tri3")
    assert [u.id for u in source.utterances if u.split == "test"] == [f"test_{n}_{i}" for n in (1, 2, 10) for i in range(2)]
    assert {u.split for u in source.utterances} == {"train", "test"}
    (tmp_path / "data-fmllr-tri3/test/utt2spk").write_text("test_1_0 s1\n")
    assert [u.speaker for u in ark_source(tmp_path / "data-fmllr-tri3").utterances][:2] == ["s1", None]


def test_what_nothing_tells_must_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ark(tmp_path / "x" / "feats.ark", {"a": matrix(0, 30, 24)})
    assert main(["prepare", str(tmp_path / "x"), str(tmp_path / "c")]) == 2
    error = capsys.readouterr().err
    assert "24 wide: name them with --features (mfcc24-voxceleb) or give their frame period with --frame-shift-ms" in error
    assert main(["prepare", str(tmp_path / "x"), str(tmp_path / "c"), "--frame-shift-ms", "12.5"]) == 0
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.base_frame_shift_s == 0.0125
    assert isinstance(corpus.frontend_config.features, StoredFeaturesConfig)
    assert main(["prepare", str(tmp_path / "x"), str(tmp_path / "d"), "--features", "fbank240"]) == 2
    assert "'fbank240' are 240 wide, the stored ones 24; those of this width: mfcc24-voxceleb" in capsys.readouterr().err
    both = ["--features", "mfcc24-voxceleb", "--frame-shift-ms", "10"]
    assert main(["prepare", str(tmp_path / "x"), str(tmp_path / "d"), *both]) == 2
    assert "leave out --frame-shift-ms 10" in capsys.readouterr().err


def test_stored_features_that_cannot_be_computed_are_not_promised_from_audio(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    soundfile.write(tmp_path / "a" / "x.wav", 0.1 * np.random.default_rng(0).standard_normal(4000), 16000)
    assert main(["prepare", str(tmp_path / "a"), str(tmp_path / "c"), "--features", "fmllr40"]) == 2
    assert "fMLLR features cannot be computed from audio, and a stores none" in capsys.readouterr().err


def test_a_kaldi_directory_that_names_fmllr_is_not_taken_for_a_filterbank(tmp_path: Path) -> None:
    for name in ("data-fmllr", "data"):
        (tmp_path / name).mkdir()
        write_ark_scp(tmp_path / name, [("a", matrix(0))])
    assert kaldi_source(tmp_path / "data-fmllr").frontend == feature_preset("fmllr40")
    assert kaldi_source(tmp_path / "data").frontend == feature_preset("melhubert")  # 40 features, as before
    assert kaldi_source(tmp_path / "data", named="fmllr40").frontend == feature_preset("fmllr40")
    named = kaldi_source(tmp_path / "data", frame_shift_ms=20.0).frontend
    assert named.features == StoredFeaturesConfig(name=f"{tmp_path.name}/data", dim=40, frame_shift_ms=20.0)


@pytest.mark.parametrize(
    ("where", "dim", "name"),
    [
        ("libri_fbank160/train-clean-100.csv", 160, "fbank160-librosa"),
        ("libri_mel160_subword5000", 160, "mel160-librosa"),
        ("melanie/x", 80, "mel80-librosa"),
        ("caramel/x", 80, None),
        ("timit_mfcc39", 39, "mfcc39-librosa"),
        ("libri_mfcc_cmvn", 39, "mfcc39-speaker"),
        ("voxceleb_mfcc_kaldi", 24, "mfcc24-voxceleb"),
        ("libri_linear1025", 1025, "linear1025"),
        ("libri_fmllr_cmvn", 40, "fmllr40"),
        ("libri_fbank160", 161, None),
        ("features", 80, None),
    ],
)
def test_names_that_tell(where: str, dim: int, name: str | None) -> None:
    assert recognised(dim, where) == name
    if name is not None:
        assert stored_as(dim, where).frontend == feature_preset(name)


# ---- arrays of S3PRL -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fbank160-librosa", "mfcc39-librosa", "mel80-librosa"])
def test_arrays_with_deltas_and_normalisation_become_the_same_features(tmp_path: Path, name: str) -> None:
    """The static part, with deltas and normalisation made anew, is what was stored, and what a waveform gives."""
    config = feature_preset(name)
    assert config is not None
    frontend = build_frontend(config)
    root = tmp_path / f"libri_{name.removesuffix('-librosa')}"
    (root / "dev-clean").mkdir(parents=True)
    waveform = 0.1 * torch.randn(1, 12000, generator=torch.Generator().manual_seed(0))
    waveform *= torch.linspace(0.1, 1, 12000)
    whole = frontend(waveform, torch.tensor([12000]))
    np.save(root / "dev-clean" / "84-121123-0000.npy", whole.values[0].numpy())
    (root / "dev-clean.csv").write_text(",file_path,length,label\n0,dev-clean/84-121123-0000.npy,76,None\n")
    source = numpy_source(root)
    assert source.frontend == config
    corpus = prepare(source, tmp_path / "c").corpus
    assert corpus.utterance(0).speaker == "84"
    assert corpus.base_dim == frontend.base_dim
    stored = torch.from_numpy(corpus.features(0).astype(np.float32))[None]
    again = frontend.finish(type(whole)(values=stored, lengths=whole.lengths))
    torch.testing.assert_close(again.values, whole.values, rtol=0, atol=0.02)  # stored with 11 bits
    shuffled = frontend.finish(type(whole)(values=stored.flip(-1), lengths=whole.lengths))
    assert (shuffled.values - whole.values).abs().mean() > 0.1  # the control


def test_arrays_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    np.save(tmp_path / "mine" / "a.npy", matrix(0, 20, 160))
    (tmp_path / "mine" / "x.csv").write_text(",file_path,length,label\n0,a.npy,20,\n")
    with pytest.raises(ValueError, match=r"fbank160-librosa, mel160-librosa\) or give their frame period"):
        numpy_source(tmp_path / "mine")
    source = numpy_source(tmp_path / "mine", named="mel160-librosa")
    assert next(iter(source.utterances)).read_features().shape == (20, 80)
    assert numpy_source(tmp_path / "mine", frame_shift_ms=10.0).frontend.features.dim == 160


# ---- tables of lengths -----------------------------------------------------------------------------------------------


def librispeech(root: Path) -> Path:
    for subset, name in (
        ("train-clean-100", "19-198-0000"),
        ("train-clean-100", "19-198-0001"),
        ("dev-clean", "84-121123-0000"),
    ):
        speaker, chapter, _ = name.split("-")
        folder = root / subset / speaker / chapter
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{name}.flac", 0.1 * np.random.default_rng(0).standard_normal(4800), 16000)
    return root


def table(folder: Path, name: str, *lines: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.csv").write_text(",file_path,length,label\n" + "".join(f"{i},{x}\n" for i, x in enumerate(lines)))


@pytest.mark.parametrize("version", ["first", "later"])
def test_tables_of_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str], version: str) -> None:
    """The first version's paths are arrays that were never there, its lengths those at 22,050 Hz."""
    root, tables = librispeech(tmp_path / "LibriSpeech"), tmp_path / "data" / "len_for_bucket"
    if version == "first":
        table(tables, "train-clean-100", "train-clean-100/19-198-0001.npy,6615,", "train-clean-100/19-198-0000.npy,6615,")
        table(tables, "dev-clean", "dev-clean/84-121123-0000.npy,6615,")
    else:
        lines = [f"train-clean-100/19/198/19-198-000{i}.flac,4800,None" for i in (1, 0)]
        table(tables, "train-clean-100", *lines)
        table(tables, "dev-clean", "dev-clean/84/121123/84-121123-0000.flac,4800,None")
    assert detect_source(tables)[0] == "len-for-bucket"
    assert main(["prepare", str(tables), str(tmp_path / "c")]) == 2
    assert "--audio-root" in capsys.readouterr().err
    assert main(["prepare", str(tables), str(tmp_path / "c"), "--audio-root", str(root)]) == 0
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.num_samples.tolist() == [4800] * 3
    assert corpus.ids() == ["84-121123-0000", "19-198-0001", "19-198-0000"]
    assert corpus.column("split") == ["dev-clean", "train-clean-100", "train-clean-100"]
    assert corpus.column("speaker") == ["84", "19", "19"]


def test_tables_of_other_sound_and_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    soundfile.write(tmp_path / "set" / "a.b.wav", np.zeros(800), 16000)
    table(tmp_path, "train", "set/a.b.wav,800,happy", "set/gone.wav,800,")
    assert detect_source(tmp_path)[0] == "len-for-bucket"
    found = {u.id: u for u in length_table_source(tmp_path).utterances}
    assert (found["set/a.b"].label, found["set/a.b"].split) == ("happy", "train")
    assert found["set/gone"].audio == tmp_path / "set" / "gone.wav"  # goes into quarantine when it is read
    table(tmp_path, "dev", "set/a.b.wav,800,")
    with pytest.raises(LayoutError, match=r"'set/a\.b' comes a second time"):
        length_table_source(tmp_path)
