"""Layouts of audio folders: what is found in them, how they are told apart, and what a malformed one is told."""

import importlib
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import soundfile

from sslim.commands import prepare as command
from sslim.data.audio_sources import SourceOptions, folder_source
from sslim.data.feature_presets import PRESETS
from sslim.data.source_kinds import SOURCES, detect_source, load_source, merge_sources
from sslim.data.sources import SourceLabels
from sslim.frontends.config import SpectralFrontendConfig


def sound(path: Path, num_samples: int = 800) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(0).standard_normal(num_samples) * 0.1, 16000)
    return path


def rows(path: Path, kind: str | None = None, **options):
    kind = kind or detect_source(path, SourceOptions(**options))[0]
    source = load_source(path, kind, SourceOptions(**options))
    found = [(u.id, u.speaker, u.label, u.text, u.split) for u in source.utterances]
    assert len(found) == source.num_utterances
    return found


def plain_folder(root: Path) -> None:
    for name in (
        "train/b.wav",
        "train/a.flac",
        "valid/x/a.wav",
        "Test/a.ogg",
        "a.wav",
        "other/.hidden.wav",
        ".git/c.wav",
        "n.txt",
    ):
        if name.endswith("txt"):
            (root / name).write_text("notes")
        else:
            sound(root / name)


def librispeech(root: Path) -> None:
    sound(root / "dev-clean/84/121123/84-121123-0000.flac")
    sound(root / "dev-clean/84/121123/84-121123-0001.flac")
    sound(root / "train-clean-100/19/198/19-198-0000.flac")
    (root / "dev-clean/84/121123/84-121123.trans.txt").write_text("84-121123-0000 GO ON\n84-121123-0001 NO\n")


def digits(root: Path) -> None:
    for name in ("7_jackson_0", "7_jackson_12", "0_theo_4", "0_theo_5"):
        sound(root / f"recordings/{name}.wav")
    (root / "README.md").write_text("digits")


def digits_with_index(root: Path) -> None:
    sound(root / "theo/0_4.flac")
    sound(root / "theo/0_5.flac")
    (root / "index.csv").write_text(
        f"path,speaker,digit,take\n{root.name}/theo/0_4.flac,theo,0,4\n{root.name}/theo/0_5.flac,theo,0,5\n"
    )


def speech_commands(root: Path) -> None:
    for name in ("yes/aa_nohash_0.wav", "yes/aa_nohash_1.wav", "no/bb_nohash_0.wav", "_background_noise_/hiss.wav"):
        sound(root / name)
    (root / "validation_list.txt").write_text("yes/aa_nohash_1.wav\n")
    (root / "testing_list.txt").write_text("no/bb_nohash_0.wav\n")


def kaldi(root: Path) -> None:
    audio = sound(root / "a.wav")
    (root / "wav.scp").write_text(f"u1 {audio}\n")
    (root / "utt2spk").write_text("u1 s1\n")


LAYOUTS = {
    "folder": (
        plain_folder,
        [
            ("a", None, None, None, None),
            ("Test/a", None, None, None, "test"),
            ("train/a", None, None, None, "train"),
            ("train/b", None, None, None, "train"),
            ("valid/x/a", None, None, None, "dev"),
        ],
    ),
    "librispeech": (
        librispeech,
        [
            ("84-121123-0000", "84", None, "GO ON", "dev-clean"),
            ("84-121123-0001", "84", None, "NO", "dev-clean"),
            ("19-198-0000", "19", None, None, "train-clean-100"),
        ],
    ),
    "digits": (
        digits,
        [
            ("recordings/0_theo_4", "theo", "0", None, "test"),
            ("recordings/0_theo_5", "theo", "0", None, "train"),
            ("recordings/7_jackson_0", "jackson", "7", None, "test"),
            ("recordings/7_jackson_12", "jackson", "7", None, "train"),
        ],
    ),
    "digits with index": (
        digits_with_index,
        [("theo/0_4", "theo", "0", None, "test"), ("theo/0_5", "theo", "0", None, "train")],
    ),
    "speech-commands": (
        speech_commands,
        [
            ("no/bb_nohash_0", "bb", "no", None, "test"),
            ("yes/aa_nohash_0", "aa", "yes", None, "train"),
            ("yes/aa_nohash_1", "aa", "yes", None, "dev"),
        ],
    ),
    "kaldi": (kaldi, [("u1", "s1", None, None, None)]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_recognised_and_read(tmp_path, name):
    build, wanted = LAYOUTS[name]
    root = tmp_path / "set"
    root.mkdir()
    build(root)
    assert detect_source(root)[0] == name.split()[0]
    assert rows(root) == wanted
    for utterance in load_source(root, name.split()[0]).utterances:
        assert utterance.audio.is_absolute()
        assert soundfile.info(utterance.audio).frames == 800


def test_the_reason_names_the_file_that_decided(tmp_path):
    for name, (build, _) in LAYOUTS.items():
        (tmp_path / name).mkdir()
        build(tmp_path / name)
    reasons = {name: detect_source(tmp_path / name)[1] for name in LAYOUTS}
    assert "wav.scp" in reasons["kaldi"]
    assert "validation_list.txt" in reasons["speech-commands"]
    assert "DIGIT_SPEAKER_TAKE" in reasons["digits"]
    assert "index.csv" in reasons["digits with index"]
    assert "SPEAKER-CHAPTER-NUMBER" in reasons["librispeech"]
    assert "a.wav" in reasons["folder"]


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"train-clean-360.mean-var": ""}, "melhubert"),
        ({"kmeans/train.bas.scp": ""}, "melhubert"),
        ({"data.csv": "file_path,label_path,length\n"}, "numpy"),
        ({"train/feats.scp": ""}, "kaldi"),
        ({"1-2-0003.trans.txt": "", "word.csv": "a,b\n"}, None),
    ],
)
def test_characteristic_files_decide(tmp_path, files, kind):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    if kind is None:
        with pytest.raises(ValueError, match=r"no source that sslim knows; the kinds .*kaldi.*librispeech.*folder"):
            detect_source(tmp_path)
    else:
        assert detect_source(tmp_path)[0] == kind


def test_one_odd_name_among_them_makes_it_a_plain_folder(tmp_path):
    digits(tmp_path)
    sound(tmp_path / "recordings/noise.wav")
    assert detect_source(tmp_path)[0] == "folder"
    assert len(rows(tmp_path, "digits")) == 4  # forced: the odd one is left out


def test_unknown_kinds_and_missing_paths_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no kind of source 'librispeach'; did you mean 'librispeech'\?; the kinds are kaldi"):
        load_source(tmp_path, "librispeach")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        detect_source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no audio files .*SPEAKER-CHAPTER-NUMBER"):
        load_source(tmp_path, "librispeech")


def test_the_command_s_choices_are_the_tables():
    assert get_args(command.Kind) == tuple(SOURCES)
    words = (command.Options.__doc__ or "").partition("        features:")[2].partition("        max_bad:")[0]
    assert set(PRESETS) <= set(re.findall(r"[\w-]+", words))


def test_every_kind_has_its_reader():
    for kind in SOURCES.values():
        module, function = kind.reader.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_links_to_folders_are_followed_once(tmp_path):
    sound(tmp_path / "real/a.wav")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/link").symlink_to(tmp_path / "real")
    (tmp_path / "set/loop").symlink_to(tmp_path / "set")
    assert [row[0] for row in rows(tmp_path / "set")] == ["link/a"]


def test_any_part_of_librispeech_will_do(tmp_path):
    librispeech(tmp_path)
    chapter = tmp_path / "dev-clean/84/121123"
    assert [row[0] for row in rows(chapter)] == ["84-121123-0000", "84-121123-0001"]
    assert {row[4] for row in rows(chapter)} == {"dev-clean"}
    (chapter / "84-121123.trans.txt").write_text("GO ON\n")
    with pytest.raises(ValueError, match=r"line 1 starts with 'GO'"):
        rows(tmp_path)


# ---- metadata ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "comma"), [("index.csv", ","), ("metadata.csv", ","), ("index.tsv", "\t"), ("metadata.tsv", "\t")]
)
def test_a_metadata_file_is_found_and_its_order_kept(tmp_path, name, comma):
    for audio in ("b.wav", "x/a.wav", "c.wav"):
        sound(tmp_path / audio)
    lines = [
        ["speaker", "path", "text", "split", "label"],
        ["s1", "x/a.wav", "hello", "dev", "7"],
        ["", "b.wav", "", "train", ""],
    ]
    (tmp_path / name).write_text("\ufeff" + "\n".join(comma.join(line) for line in lines) + "\n\n")
    assert rows(tmp_path) == [("x/a", "s1", "7", "hello", "dev"), ("b", None, None, None, "train")]
    note = folder_source(tmp_path, SourceOptions()).note
    assert "1 audio files that it does not list" in note


def test_quoted_fields_and_chosen_columns(tmp_path):
    sound(tmp_path / "a, b.wav")
    (tmp_path / "m.csv").write_text('file_name,who,digit\n"a, b.wav","O\'Neil, Pat",7\n')
    options = {"metadata": tmp_path / "m.csv", "label_column": "digit", "speaker_column": "who"}
    assert rows(tmp_path, **options) == [("a, b", "O'Neil, Pat", "7", None, None)]
    assert rows(tmp_path / "m.csv") == [("a, b", None, None, None, None)]


def test_paths_may_start_above_the_folder_or_be_absolute(tmp_path):
    audio = sound(tmp_path / "set/a.wav")
    for listed in ("set/a.wav", "./a.wav", str(audio)):
        (tmp_path / "set/index.csv").write_text(f"path\n{listed}\n")
        assert rows(tmp_path / "set") == [("a", None, None, None, None)]


def test_a_listed_file_that_is_missing_is_left_to_the_quarantine(tmp_path):
    sound(tmp_path / "a.wav")
    (tmp_path / "index.csv").write_text("path\ngone.wav\na.wav\n")
    assert [row[0] for row in rows(tmp_path)] == ["gone", "a"]


@pytest.mark.parametrize(
    ("text", "options", "wanted"),
    [
        ("paths,label\na.wav,1\n", {}, r"no column 'path'; its columns are paths, label; is it 'paths'\?"),
        ("path;label\na.wav;1\n", {}, "no column 'path'; its columns are path;label"),
        ("path,digit\na.wav,1\n", {"label_column": "digits"}, r"no column 'digits'; did you mean 'digit'\?"),
        ("path,who\na.wav,1\n", {"speaker_column": "speaker_id"}, "no column 'speaker_id'; its columns are path, who"),
        ("path,label\na.wav\n", {}, "line 2 has 1 fields, its header has 2"),
        ("path,label\n,1\n", {}, "row 2: column 'path' is empty"),
        ("path\n", {}, "lists no files"),
        ("", {}, "lists no files"),
        ("path\nno.wav\n", {}, r"none of the 1 files .* exists, for example .*no\.wav"),
        ('path\n"a.wav\n', {}, "not a CSV or TSV file"),
    ],
)
def test_malformed_metadata_is_explained(tmp_path, text, options, wanted):
    sound(tmp_path / "a.wav")
    (tmp_path / "index.csv").write_text(text)
    with pytest.raises(ValueError, match=wanted):
        folder_source(tmp_path, SourceOptions(**options))


def test_other_mistakes_with_metadata(tmp_path):
    sound(tmp_path / "a.wav")
    with pytest.raises(ValueError, match="--label-column needs a metadata file"):
        folder_source(tmp_path, SourceOptions(label_column="digit"))
    with pytest.raises(ValueError, match=r"nowhere\.csv does not exist"):
        folder_source(tmp_path, SourceOptions(metadata=tmp_path / "nowhere.csv"))
    (tmp_path / "index.csv").write_bytes(b"path\n\xff\xfe.wav\n")
    with pytest.raises(ValueError, match="in UTF-8"):
        folder_source(tmp_path, SourceOptions())
    (tmp_path / "metadata.tsv").write_text("path\na.wav\n")
    with pytest.raises(ValueError, match=r"holds index\.csv and metadata\.tsv: choose one"):
        folder_source(tmp_path, SourceOptions())


def test_options_steer_the_detection_to_kinds_that_know_them(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    digits_with_index(root)
    assert rows(root, label_column="take") == [("theo/0_4", "theo", "4", None, None), ("theo/0_5", "theo", "5", None, None)]
    with pytest.raises(ValueError, match=r"--label-column does not apply to .*kind digits; it applies to folder"):
        load_source(root, "digits", SourceOptions(label_column="take"))
    with pytest.raises(ValueError, match="is not of kind kaldi, to which --stored-features applies"):
        detect_source(root, SourceOptions(stored_features=True))


# ---- several sources --------------------------------------------------------------------------------------------------


def test_merged_sources_keep_their_ids_and_labels_apart(tmp_path):
    sound(tmp_path / "one/a.wav")
    sound(tmp_path / "two/a.wav")
    one, two = (folder_source(tmp_path / name, SourceOptions()) for name in ("one", "two"))
    label_sets = {
        name: SourceLabels(frame_period_s=0.01, num_clusters=9, read=lambda key, name=name: {"a": name}[key])
        for name in ("one", "two")
    }
    merged = merge_sources(replace(one, labels={"x": label_sets["one"]}), [replace(two, labels={"y": label_sets["two"]})])
    assert merged.name == "one+two"
    assert [u.id for u in merged.utterances] == ["a", "two/a"]
    assert merged.num_utterances == 2
    assert merged.labels["x"].read("a") == "one"
    assert merged.labels["y"].read("two/a") == "two"
    for name, foreign in (("x", "two/a"), ("y", "a")):
        with pytest.raises(KeyError):
            merged.labels[name].read(foreign)
    with pytest.raises(ValueError, match="both bring labels 'x'"):
        merge_sources(replace(one, labels={"x": label_sets["one"]}), [replace(two, labels={"x": label_sets["two"]})])


def test_sources_with_different_stored_features_are_not_merged(tmp_path):
    sound(tmp_path / "one/a.wav")
    source = folder_source(tmp_path / "one", SourceOptions())
    frontends = [
        config for config in (preset.frontend for preset in PRESETS.values()) if isinstance(config, SpectralFrontendConfig)
    ]
    with pytest.raises(ValueError, match="different stored features"):
        merge_sources(replace(source, frontend=frontends[0]), [replace(source, frontend=frontends[1])])
    assert merge_sources(source, [replace(source, frontend=frontends[1])]).frontend == frontends[1]


def test_shared_digits_and_librispeech_are_recognised(shared_data):
    digit_rows = rows(shared_data / "fsdd")
    assert len(digit_rows) == 3000
    assert sum(row[4] == "test" for row in digit_rows) == 300
    assert {row[2] for row in digit_rows} == set("0123456789")
    assert len({row[1] for row in digit_rows}) == 6
    assert detect_source(shared_data / "librispeech")[0] == "librispeech"
    assert {row[1] for row in rows(shared_data / "librispeech")} == {"100", "1001", "1088", "2412", "6313"}
