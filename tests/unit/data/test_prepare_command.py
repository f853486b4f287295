"""``sslim prepare`` as a user sees it: what is printed, which exit code, which sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sslim.cli import main
from sslim.data.corpus import Corpus


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "words"
    folder.mkdir()
    lines = ["path,word,who"]
    for i in range(4):
        soundfile.write(folder / f"{i}.flac", 0.1 * np.random.default_rng(i).standard_normal(8000), 16000)
        lines.append(f"{i}.flac,w{i % 2},s{i}")
    (folder / "index.csv").write_text("\n".join(lines) + "\n")
    return folder


def run(*arguments) -> int:
    return main(["prepare", *map(str, arguments)])


def test_a_folder_becomes_a_corpus_and_the_same_command_again_does_nothing(folder, tmp_path, capsys):
    command = (folder, tmp_path / "c", "--label-column", "word", "--speaker-column", "who", "--jobs", 2)
    assert run(*command) == 0
    output = capsys.readouterr().out
    wanted = ("of kind folder", "index.csv lists 4 files", "speakers", "192 of 10 ms", "4 utterances, 0 quarantined")
    for text in wanted:
        assert text in output
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.column("label") == ["w0", "w1", "w0", "w1"]
    assert run(*command) == 0
    assert "already prepared: nothing to do" in capsys.readouterr().out
    assert run(folder, tmp_path / "c", "--label-column", "who") == 2
    assert "label_column 'word', now it is 'who'" in capsys.readouterr().err


def test_sources_are_put_together(folder, tmp_path, capsys):
    digits = tmp_path / "digits"
    digits.mkdir()
    soundfile.write(digits / "7_theo_1.wav", 0.1 * np.random.default_rng(9).standard_normal(4000), 8000)
    assert run(folder, tmp_path / "c", "--also", digits, "--label-column", "word") == 0
    output = capsys.readouterr().out
    assert "of kind folder" in output
    assert "of kind digits" in output
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.ids() == ["0", "1", "2", "3", "digits/7_theo_1"]
    assert corpus.column("label")[-2:] == ["w1", "7"]
    assert corpus.num_samples.tolist() == [8000] * 5


def test_bad_files_are_shown_and_too_many_stop_it(folder, tmp_path, capsys):
    for i in (1, 3):
        (folder / f"{i}.flac").write_bytes(b"")
    assert run(folder, tmp_path / "c") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "2 of 4 utterances cannot be read" in error
    assert run(folder, tmp_path / "c", "--max-bad", "0.5") == 0
    captured = capsys.readouterr()
    assert "continuing after 4 of 4" in captured.err
    assert "2 utterances, 2 quarantined" in captured.out
    assert "1.flac: is empty" in captured.out
    assert [json.loads(line)["id"] for line in (tmp_path / "c/quarantine.jsonl").read_text().splitlines()] == ["1", "3"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["{folder}"], "needs a SOURCE and a CORPUS"),
        (["{folder}/none", "{tmp}/c"], "does not exist"),
        (["{tmp}/c", "{tmp}/d", "--synthetic", "5"], "there is no source, only a CORPUS"),
        (["{tmp}/c", "--synthetic", "0"], "must be at least 1"),
        (["{tmp}/c", "--synthetic", "5", "--kind", "folder"], "--kind does not go with --synthetic"),
        (["{folder}", "{tmp}/c", "--max-bad", "2"], "max_bad is 2, it must be a share between 0 and 1"),
        (["{folder}", "{tmp}/c", "--jobs", "0"], "jobs is 0"),
        (["{folder}", "{tmp}/c", "--kind", "librispeech"], "holds no audio files"),
        (["{folder}", "{tmp}/c", "--label-column", "wort"], "no column 'wort'; did you mean 'word'?"),
        (["{folder}", "{tmp}/c", "--features", "mel"], "--features"),
        (["{folder}", "{folder}"], "holds other files"),
    ],
)
def test_mistakes_are_one_sentence_with_exit_code_2(folder, tmp_path, capsys, arguments, wanted):
    assert run(*(text.format(folder=folder, tmp=tmp_path) for text in arguments)) == 2
    error = capsys.readouterr().err
    assert wanted in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_synthetic_speech_is_prepared_with_its_phones(tmp_path, capsys):
    pytest.importorskip("espeakng_loader")
    assert run("--synthetic", 2, tmp_path / "c", "--seed", 5) == 0
    corpus = Corpus.open(tmp_path / "c")
    first = corpus.utterance(0)
    assert first.alignment is not None
    assert first.alignment[-1].end_s <= first.duration_s + 0.05
    assert not Path(json.loads((tmp_path / "c/manifest.jsonl").read_text().splitlines()[0])["audio"]).is_absolute()
    (tmp_path / "c").rename(tmp_path / "moved")
    assert len(Corpus.open(tmp_path / "moved").waveform(0)) == corpus.num_samples[0]
