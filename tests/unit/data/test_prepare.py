"""Preparation: what is stored equals the front-end's output, bad files are survived, interruptions change nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sslim.data.audio_sources import SourceOptions, folder_source
from sslim.data.corpus import Corpus, CorpusError
from sslim.data.corpus_writer import CorpusWriter, only_writer
from sslim.data.feature_presets import MELHUBERT, feature_preset
from sslim.data.prepare import MEASURED, TooManyBadError, prepare
from sslim.data.sources import Segment, Source, SourceUtterance
from sslim.frontends import build_frontend
from sslim.frontends.config import FilterbankConfig, SpectralFrontendConfig

RATE = 16000


def noise(seed: int, num_samples: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


def make_folder(folder: Path, lengths: list[int], rate: int = RATE) -> Path:
    folder.mkdir(parents=True)
    for i, num_samples in enumerate(lengths):
        soundfile.write(folder / f"{i:03d}.flac", noise(i, num_samples), rate)
    return folder


def spoil(path: Path) -> None:
    """Overwrites the middle of a file, so that its header is right and its content is not."""
    data = bytearray(path.read_bytes())
    data[len(data) // 3 :] = os.urandom(16) * ((len(data) - len(data) // 3) // 16)
    path.write_bytes(bytes(data))


def prepare_folder(folder: Path, corpus: Path, **options):
    return prepare(folder_source(folder, SourceOptions()), corpus, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("audio") / "recordings", [4000 + 777 * i for i in range(12)])


@pytest.fixture(scope="module")
def reference(recordings, tmp_path_factory) -> Path:
    """The corpus of an uninterrupted run, in small shards."""
    corpus = tmp_path_factory.mktemp("corpora") / "reference"
    prepare_folder(recordings, corpus, shard_bytes=8000, jobs=1)
    return corpus


# ---- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["melhubert", "fbank80", "mfcc39", "spectrogram", "linear1025", "mfcc39-librosa", "mfcc13-torch"]
)
def test_stored_features_are_the_front_end_s_output_in_float16(recordings, tmp_path, name):
    corpus = prepare_folder(recordings, tmp_path / "c", frontend_config=feature_preset(name)).corpus
    frontend = build_frontend(feature_preset(name))
    for i in (0, 5, 11):
        waveform_S = torch.from_numpy(soundfile.read(recordings / f"{i:03d}.flac", dtype="float32")[0])
        wanted_TF = frontend.base_features(waveform_S[None], torch.tensor([len(waveform_S)])).values[0].numpy()
        stored_TF = corpus.features(i)
        assert stored_TF.dtype == np.float16
        assert stored_TF.shape == wanted_TF.shape == (corpus.num_frames[i], corpus.base_dim)
        # 2**-11 relative is float16's rounding; 2**-24 absolute below its normal range
        np.testing.assert_allclose(stored_TF.astype(np.float32), wanted_TF, rtol=2**-10, atol=2**-20)
    assert not np.array_equal(corpus.features(0)[:5], corpus.features(5)[:5])  # control: the utterances differ


def test_statistics_describe_what_the_front_end_normalises(recordings, tmp_path):
    """Over deltas, too, and equal to the two-pass formula on everything that is stored."""
    from sslim.batch import Padded
    from sslim.frontends.context import append_deltas

    config = feature_preset("mfcc39")
    corpus = prepare_folder(recordings, tmp_path / "c", frontend_config=config).corpus
    rows = []
    for i in range(len(corpus)):
        values = torch.from_numpy(corpus.features(i).astype(np.float32))[None]
        rows.append(append_deltas(Padded(values=values, lengths=torch.tensor([values.shape[1]])), 2, 2).values[0])
    values_TF = torch.cat(rows).double().numpy()
    mean, std, source = corpus.statistics
    assert source == MEASURED
    np.testing.assert_allclose(mean, values_TF.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(std, values_TF.std(0), rtol=1e-5)


def test_published_statistics_are_kept_with_their_name(recordings, tmp_path):
    source = folder_source(recordings, SourceOptions())
    mean, std = np.arange(40, dtype=np.float32), np.full(40, 2.0, dtype=np.float32)
    corpus = prepare(replace(source, statistics=(mean, std, "libri-960")), tmp_path / "c").corpus
    assert corpus.statistics[2] == "libri-960"
    np.testing.assert_array_equal(corpus.statistics[0], mean)
    np.testing.assert_array_equal(corpus.statistics[1], std)
    with pytest.raises(ValueError, match="for 39 features"):
        prepare(replace(source, statistics=(mean[:39], std[:39], "libri-960")), tmp_path / "d")


def test_other_rates_and_channels_become_the_front_end_s(tmp_path):
    folder = make_folder(tmp_path / "audio", [8000], rate=8000)
    corpus = prepare_folder(folder, tmp_path / "c").corpus
    assert corpus.num_samples[0] == 16000
    assert corpus.num_frames[0] == 98
    assert len(corpus.waveform(0)) == 16000


def test_utterances_keep_all_that_the_source_says(recordings, tmp_path):
    phones = (Segment(symbol="a", start_s=0.0, end_s=0.05), Segment(symbol="ʃ", start_s=0.05, end_s=0.1))
    utterances = [
        SourceUtterance(
            id="x/é", audio=recordings / "003.flac", speaker="Søren", label="7", text="a b", split="dev", alignment=phones
        ),
        SourceUtterance(id="part", audio=recordings / "011.flac", start_s=0.1, duration_s=0.25),
    ]
    corpus = prepare(Source(name="s", utterances=utterances, num_utterances=2), tmp_path / "c").corpus
    first, second = corpus.utterance(0), corpus.utterance(1)
    assert (first.id, first.speaker, first.label, first.text, first.split) == ("x/é", "Søren", "7", "a b", "dev")
    assert first.alignment == phones
    assert first.audio == recordings / "003.flac"
    assert (second.speaker, second.alignment, second.start_s, second.duration_s) == (None, None, 0.1, 0.25)
    whole, _ = soundfile.read(recordings / "011.flac", dtype="float32")
    np.testing.assert_array_equal(corpus.waveform(1), whole[1600:5600])
    assert corpus.column("speaker") == ["Søren", None]
    assert corpus.ids() == ["x/é", "part"]


def test_without_features_only_the_manifest_is_written(recordings, tmp_path):
    corpus = prepare_folder(recordings, tmp_path / "c", frontend_config=None).corpus
    assert corpus.frontend_config is None
    assert corpus.statistics is None
    assert corpus.num_samples.tolist() == [4000 + 777 * i for i in range(12)]
    assert len(corpus.waveform(2)) == 4000 + 2 * 777
    with pytest.raises(ValueError, match="without features"):
        corpus.features(0)


def test_stored_features_of_a_source_are_taken_as_they_are(tmp_path):
    values = [np.random.default_rng(i).standard_normal((5 + i, 40)).astype(np.float32) for i in range(3)]
    utterances = [SourceUtterance(id=str(i), read_features=lambda v=v: v) for i, v in enumerate(values)]
    source = Source(name="s", utterances=utterances, num_utterances=3, frontend=MELHUBERT)
    corpus = prepare(source, tmp_path / "c", feature_preset("fbank80")).corpus
    assert corpus.frontend_config == MELHUBERT
    np.testing.assert_array_equal(corpus.features(2), values[2].astype(np.float16))
    with pytest.raises(ValueError, match="features only"):
        corpus.waveform(0)


def test_features_that_float16_cannot_hold_stop_the_run_with_the_utterance(recordings, tmp_path):
    unlogged = SpectralFrontendConfig(features=FilterbankConfig(num_mel_bins=40, log=False, waveform_scale=32768.0))
    with pytest.raises(ValueError, match=r"utterance 000: features reach .*float16.*logarithmic"):
        prepare_folder(recordings, tmp_path / "c", frontend_config=unlogged)


# ---- shards, long and short -------------------------------------------------------------------------------------------


def test_an_utterance_is_contiguous_in_one_shard_and_a_big_one_has_its_own(tmp_path):
    frames = [3, 4, 50, 2, 5, 5]  # of 40 float16 features: 80 bytes a frame; a shard takes 10 frames
    values = [np.full((n, 40), i, dtype=np.float32) for i, n in enumerate(frames)]
    utterances = [SourceUtterance(id=str(i), read_features=lambda v=v: v) for i, v in enumerate(values)]
    source = Source(name="s", utterances=utterances, num_utterances=6, frontend=MELHUBERT)
    corpus = prepare(source, tmp_path / "c", shard_bytes=800).corpus
    sizes = [p.stat().st_size // 80 for p in sorted((tmp_path / "c/features").iterdir())]
    assert sizes == [7, 50, 7, 5]
    for i, wanted in enumerate(values):
        np.testing.assert_array_equal(corpus.features(i), wanted)
    np.testing.assert_array_equal(corpus.features(4, 2, 99), values[4][2:])


def test_very_long_and_many_short_files_together(tmp_path):
    lengths = [400] * 40 + [RATE * 90] + [560] * 40
    corpus = prepare_folder(make_folder(tmp_path / "audio", lengths), tmp_path / "c", jobs=2).corpus
    assert corpus.num_samples.tolist() == lengths
    assert corpus.num_frames.tolist() == [1] * 40 + [1 + (RATE * 90 - 400) // 160] + [2] * 40
    frontend = build_frontend(MELHUBERT)
    whole = torch.from_numpy(corpus.waveform(40))
    wanted = frontend.base_features(whole[None], torch.tensor([len(whole)])).values[0, 4000:4010].numpy()
    np.testing.assert_allclose(corpus.features(40, 4000, 4010).astype(np.float32), wanted, rtol=2**-10)


def test_the_result_does_not_depend_on_the_number_of_jobs(recordings, reference, tmp_path):
    prepare_folder(recordings, tmp_path / "c", shard_bytes=8000, jobs=5)
    assert contents(tmp_path / "c") == contents(reference)
    prepare_folder(recordings, tmp_path / "d", shard_bytes=30_000, jobs=1)
    assert contents(tmp_path / "d") != contents(reference)  # control: shard size does matter


# ---- interruptions ----------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("point", [0, 1, 4, 5, 11, "index", "description", "finish"])
@pytest.mark.parametrize("commit_period_s", [0.0, 1e9])
def test_an_interrupted_preparation_continues_to_the_same_bytes(
    recordings, reference, tmp_path, monkeypatch, point, commit_period_s
):
    """An exception at any point leaves what a killed process leaves: files longer than what was committed."""
    calls = 0

    def fail(*_args, **_keywords):
        raise StoppedError

    def add(self, *args, **keywords):
        nonlocal calls
        if calls == point:
            self._manifest.write(b'{"id": "torn')
            self._shards._file.write(b"torn")
            fail()
        calls += 1
        original_add(self, *args, **keywords)

    original_add = CorpusWriter.add
    with monkeypatch.context() as patch:
        if isinstance(point, int):
            patch.setattr(CorpusWriter, "add", add)
        else:
            patch.setattr(
                CorpusWriter, {"index": "write_index", "description": "write_description", "finish": "finish"}[point], fail
            )
        with pytest.raises(StoppedError):
            prepare_folder(recordings, tmp_path / "c", shard_bytes=8000, commit_period_s=commit_period_s)
    with pytest.raises(CorpusError, match="not finished"):
        Corpus.open(tmp_path / "c")
    outcome = prepare_folder(recordings, tmp_path / "c", shard_bytes=8000)
    assert contents(tmp_path / "c") == contents(reference)
    if isinstance(point, int):  # with a commit after each utterance nothing is done twice
        assert outcome.num_continued == (point if commit_period_s == 0 else 0)


KILLED = """
import sys, time
from pathlib import Path
from sslim.data.audio_sources import SourceOptions, folder_source
from sslim.data.prepare import prepare

def slow(progress, total, rate):
    print(progress.num_seen, flush=True)
    time.sleep(0.02)

prepare(folder_source(Path(sys.argv[1]), SourceOptions()), sys.argv[2], shard_bytes=8000, commit_period_s=0.05,
        on_progress=slow)
"""


def test_a_killed_process_continues_to_the_same_bytes(recordings, reference, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, recordings, tmp_path / "c"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if int(line) == 8:
                process.send_signal(signal.SIGKILL)
                break
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert 0 < json.loads((tmp_path / "c/preparation.json").read_text())["progress"]["num_seen"] < 12
    outcome = prepare_folder(recordings, tmp_path / "c", shard_bytes=8000)
    assert outcome.num_continued > 0
    assert contents(tmp_path / "c") == contents(reference)


def test_a_finished_corpus_is_left_alone(recordings, tmp_path):
    first = prepare_folder(recordings, tmp_path / "c")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("*")}
    again = prepare_folder(recordings, tmp_path / "c", jobs=3, max_bad=0.5)
    assert again.already_finished
    assert not first.already_finished
    assert again.corpus.digest == first.corpus.digest
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("*")} == before


def test_other_options_on_an_existing_folder_are_refused_with_the_difference(recordings, tmp_path):
    origin = {"sources": [{"path": "/a", "kind": "folder"}], "features": "melhubert"}
    prepare(folder_source(recordings, SourceOptions()), tmp_path / "c", origin=origin)
    for other, wanted in [
        ({**origin, "features": "fbank80"}, "features 'melhubert', now it is 'fbank80'"),
        ({**origin, "sources": [{"path": "/b", "kind": "folder"}]}, "path '/a', now it is '/b'"),
        ({**origin, "sources": [{"path": "/a", "kind": "folder", "label_column": "x"}]}, "label_column not set, now it is 'x'"),
        ({**origin, "sources": origin["sources"] * 2}, "sources 1 values, now it is 2 values"),
    ]:
        with pytest.raises(ValueError, match=wanted):
            prepare(folder_source(recordings, SourceOptions()), tmp_path / "c", origin=other)


def test_a_source_that_changed_meanwhile_is_refused(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "audio", [800] * 6)
    with monkeypatch.context() as patch:
        patch.setattr(CorpusWriter, "write_index", lambda self: (_ for _ in ()).throw(StoppedError()))
        with pytest.raises(StoppedError):
            prepare_folder(folder, tmp_path / "c")
    (folder / "002.flac").rename(folder / "002b.flac")
    with pytest.raises(ValueError, match=r"has changed since .*first 6 utterances"):
        prepare_folder(folder, tmp_path / "c")
    (folder / "002b.flac").unlink()
    with pytest.raises(ValueError, match="has changed since"):
        prepare_folder(folder, tmp_path / "c")


def test_two_preparations_of_one_folder_exclude_each_other(recordings, tmp_path):
    (tmp_path / "c").mkdir()
    with only_writer(tmp_path / "c"), pytest.raises(ValueError, match="another process"):
        prepare_folder(recordings, tmp_path / "c")
    prepare_folder(recordings, tmp_path / "c")


def test_a_folder_with_other_files_is_not_written_to(recordings, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.txt\)"):
        prepare_folder(recordings, tmp_path / "c")
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["thesis.txt"]


# ---- quarantine -------------------------------------------------------------------------------------------------------


def make_bad_folder(folder: Path, num_good: int = 8) -> Path:
    make_folder(folder, [8000] * (num_good + 1))
    spoil(folder / "000.flac")
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "short.wav", noise(1, 399), RATE)
    soundfile.write(folder / "nosamples.wav", np.zeros(0, np.float32), RATE)
    values = noise(2, 1000)
    values[500] = np.nan
    soundfile.write(folder / "nan.wav", values, RATE, subtype="FLOAT")
    (folder / "text.wav").write_text("<html>404</html>")
    soundfile.write(folder / "silent.wav", np.zeros(1000, np.float32), RATE)  # not unreadable: `sslim doctor` names it
    return folder


def test_unreadable_files_are_named_with_their_reasons_and_survived(tmp_path):
    corpus = prepare_folder(make_bad_folder(tmp_path / "audio"), tmp_path / "c", max_bad=0.5).corpus
    entries = {entry["id"]: entry for entry in corpus.quarantine()}
    assert set(entries) == {"000", "empty", "short", "nosamples", "nan", "text"}
    assert corpus.num_quarantined == 6
    assert corpus.ids() == [f"{i:03d}" for i in range(1, 9)] + ["silent"]
    assert entries["empty"]["path"] == str(tmp_path / "audio/empty.wav")
    assert "399 samples" in entries["short"]["reason"]
    assert "finite" in entries["nan"]["reason"]
    assert all(entry["reason"] and "\n" not in entry["reason"] for entry in entries.values())


def test_too_many_unreadable_files_stop_the_run_and_a_higher_limit_continues_it(tmp_path):
    folder = make_bad_folder(tmp_path / "audio")  # 15 files, 6 bad
    with pytest.raises(
        TooManyBadError, match=r"3 of 15 .*max-bad 0.15 allows 2 \(\S*000.flac: is corrupt.*higher --max-bad"
    ) as error:
        prepare_folder(folder, tmp_path / "c", max_bad=0.15)
    assert "\n" not in str(error.value)
    with pytest.raises(TooManyBadError, match="3 of 15"):  # at once: nothing is read again
        prepare_folder(folder, tmp_path / "c", max_bad=0.15)
    with pytest.raises(TooManyBadError, match=r"4 of 15 .*; …\)"):
        prepare_folder(folder, tmp_path / "c", max_bad=0.2)
    outcome = prepare_folder(folder, tmp_path / "c", max_bad=0.4)
    assert outcome.num_continued > 8
    prepare_folder(folder, tmp_path / "d", max_bad=0.5)
    assert contents(tmp_path / "c") == contents(tmp_path / "d")


def test_one_bad_file_is_always_allowed_unless_none_may_be(tmp_path):
    folder = make_folder(tmp_path / "audio", [800] * 5)
    spoil(folder / "003.flac")
    with pytest.raises(TooManyBadError, match="allows 0"):
        prepare_folder(folder, tmp_path / "c", max_bad=0.0)
    assert prepare_folder(folder, tmp_path / "d", max_bad=0.01).corpus.num_quarantined == 1
    spoil(folder / "004.flac")
    with pytest.raises(TooManyBadError, match="allows 1"):
        prepare_folder(folder, tmp_path / "e", max_bad=0.01)


def test_a_missing_file_is_quarantined(recordings, tmp_path):
    utterances = [SourceUtterance(id="a", audio=recordings / "000.flac"), SourceUtterance(id="b", audio=recordings / "no.flac")]
    corpus = prepare(Source(name="s", utterances=utterances, num_utterances=2), tmp_path / "c").corpus
    assert [entry["id"] for entry in corpus.quarantine()] == ["b"]


def test_real_corrupt_files_are_found_and_named(shared_data, tmp_path):
    """The word that all 14 bad files of the keywords are among."""
    folder = shared_data / "keywords"
    source = folder_source(folder, SourceOptions(label_column="keyword"))
    alexa = [u for u in source.utterances if u.label == "alexa"]
    source = replace(source, utterances=alexa, num_utterances=len(alexa))
    corpus = prepare(source, tmp_path / "c", max_bad=0.05, frontend_config=None).corpus
    assert corpus.num_quarantined == 14
    for entry in corpus.quarantine():
        assert _undecodable(Path(entry["path"]))
        assert Path(entry["path"]).parent.name == "alexa"
        assert entry["reason"].startswith("is corrupt")
    assert not _undecodable(corpus.utterance(0).audio)  # control


def _undecodable(path: Path) -> bool:
    try:
        soundfile.read(path)
    except soundfile.LibsndfileError:
        return True
    return False


def test_nothing_readable_is_an_error(tmp_path):
    folder = tmp_path / "audio"
    folder.mkdir()
    (folder / "a.wav").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="nothing of audio can be read"):
        prepare_folder(folder, tmp_path / "c")


def test_a_file_name_that_is_no_utf8_is_no_obstacle(tmp_path):
    folder = make_folder(tmp_path / "audio", [800] * 2)
    odd = os.fsdecode(b"\xff-odd")
    (folder / "000.flac").rename(folder / f"{odd}.flac")
    (folder / f"{odd}-bad.flac").write_bytes(b"")
    corpus = prepare_folder(folder, tmp_path / "c", max_bad=0.9).corpus
    assert sorted([*corpus.ids(), *(entry["id"] for entry in corpus.quarantine())]) == ["001", odd, f"{odd}-bad"]


# ---- ids and progress ---------------------------------------------------------------------------------------------------


def test_equal_ids_are_an_error_that_names_both_files(tmp_path):
    folder = make_folder(tmp_path / "audio", [800] * 3)
    soundfile.write(folder / "001.wav", noise(1, 800), RATE)
    with pytest.raises(ValueError, match=r"'001' comes twice.*001\.flac and .*001\.wav"):
        prepare_folder(folder, tmp_path / "c")


def test_progress_is_reported_for_every_utterance(recordings, tmp_path):
    seen = []
    prepare_folder(
        recordings, tmp_path / "c", on_progress=lambda progress, total, rate: seen.append((progress.num_seen, total, rate))
    )
    assert seen == [(n, 12, RATE) for n in range(13)]


def test_threads_end_with_the_run(recordings, tmp_path, monkeypatch):
    import threading

    monkeypatch.setattr(CorpusWriter, "add", lambda *a, **k: (_ for _ in ()).throw(StoppedError()))
    with pytest.raises(StoppedError):
        prepare_folder(recordings, tmp_path / "c", jobs=4)
    time.sleep(0.05)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prepare")]
