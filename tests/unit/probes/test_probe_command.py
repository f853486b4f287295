"""The verb on a real corpus folder, made of a few sounds: pitch is the label, loudness the speaker."""

import json

import numpy as np
import pytest
import soundfile
import torch

from sslim.checkpoints import save_model
from sslim.cli import main
from sslim.config import from_plain, to_plain
from sslim.data.corpus import Corpus
from sslim.models import PRESETS, build_model
from sslim.probes import FineTuningConfig, ProbeConfig, read_card, read_tuned
from sslim.probes.baselines import log_mel_representation
from sslim.probes.features import model_representation, pooled_features, randomised
from sslim.profiling import count_macs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tones")
    random = np.random.default_rng(0)
    lines = ["path,speaker,label"]
    for i in range(48):
        label, speaker = i % 2, (i // 2) % 4
        time_s = np.arange(round(16000 * random.uniform(0.2, 0.5))) / 16000
        tone = np.sin(2 * np.pi * (500, 1500)[label] * time_s) * 0.1 * (speaker + 1)
        soundfile.write(folder / f"{i:02d}.wav", tone + 0.01 * random.normal(size=len(time_s)), 16000)
        lines.append(f"{i:02d}.wav,s{speaker},{('low', 'high')[label]}")
    (folder / "index.csv").write_text("\n".join(lines) + "\n")
    output = tmp_path_factory.mktemp("corpora") / "tones"
    assert main(["prepare", str(folder), str(output), "--kind", "folder"]) == 0
    return output


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory):
    built = build_model(PRESETS["melhubert-tiny"](), torch.Generator().manual_seed(0))
    mean, std, source = Corpus.open(corpus).statistics
    built.set_statistics(torch.from_numpy(mean), torch.from_numpy(std), source=source)
    save_model(built, tmp_path_factory.mktemp("run") / "model")
    return built, next(tmp_path_factory.getbasetemp().glob("run*/model"))


def test_the_verb_writes_a_card(corpus, model, tmp_path, capsys):
    card_path = tmp_path / "cards" / "label.json"
    arguments = ["probe", "label", str(model[1]), "--corpus", str(corpus), "--folds", "speaker", "--output", str(card_path)]
    assert main([*arguments, "--seeds", "2"]) == 0
    card = read_card(card_path)
    assert card["corpus"]["digest"] == Corpus.open(corpus).digest
    assert [row["name"] for row in card["rows"]] == ["log-Mel", "random weights", model[1].parent.name]
    for row in card["rows"]:
        assert row["mean"] > 0.95
        assert row["sd"] == pytest.approx(np.std(row["scores"], ddof=1), abs=1e-3)
        assert [len(choice["folds"]) for choice in row["chosen"]] == [4, 4]
    assert card["rows"][2]["num_parameters"] == model[0].num_parameters(with_heads=False)
    assert card["rows"][2]["macs_seconds"] == 10.0
    assert card["rows"][2]["macs_per_second"] == count_macs(model[0].config, seconds=10.0).per_second
    assert [row["macs_per_second"] for row in card["rows"][:2]] == [None, None]  # baselines
    assert len(card["rows"][2]["layer_weights"]) == 3
    assert "log-Mel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["phones"], "has an alignment"),
        (["label", "x", "--layer", "x"], "accepted are 'mix', 'all', 'last', 'mean' or a number"),
        (["label", "--seeds", "0"], "at least 1"),
        (["label", "--column", "colour"], "its columns are speaker, label, text, split"),
        (["label", "--column", "text"], "needs at least two classes and has none"),
        (["label", "--no-baselines"], "nothing to probe"),
        (["label", "--classifier", "concat"], "the task label has no frames"),
        (["label", "--steps", "5"], "--steps 5 is for --protocol s3prl-v0.1"),
        (["label", "--hidden-dim", "5"], "--hidden-dim 5 is for --classifier mlp"),
        (["label", "--classifier", "mlp", "--hidden-dim", "0"], "--hidden-dim is 0; expected 1 or more"),
        (["label", "--save-model", "x"], "is for --fine-tune with one model, not 0"),
        (["label", "x", "--weighted-sum", "--layer", "1"], "--layer 1 asks for others"),
        (["label", "--split", "random", "--split-lists", "x"], "'random' was asked for"),
        (["label", "--split-lists", "nowhere"], "the list nowhere/train_split.txt cannot be read"),
        (["label", "x", "--protocol", "s3prl-v0.1", "--layer", "mix"], "never trained its weighted sum"),
        (["label", "x", "--protocol", "s3prl-v0.1", "--fine-tune"], "fine-tune without its protocol"),
        (["label", "x", "--fine-tune", "--folds", "speaker"], "needs a train, a dev and a test part"),
        (["speaker-frames", "--column", "label"], "takes its classes from speakers"),
        (["label", "--baseline-features", "mfc39"], "there are no features 'mfc39'"),
        (["speaker", "--folds", "speaker"], "cannot be learnt with speaker folds"),
        (["label", "--epochs", "4"], "--epochs 4 is for --fine-tune"),
        (["label", "--model-learning-rates", "1e-5", "1e-4"], "--model-learning-rates 1e-05 0.0001 is for --fine-tune"),
        (["label", "--train-frontend"], "--train-frontend is for --fine-tune"),
        (["label", "--fine-tune"], "--fine-tune is for a model, and none is named"),
        (["label", "--phone-labels", "montreal"], "--phone-labels montreal is for --protocol s3prl-v0.1"),
        (["label", "--phone-labels", "montreal", "--protocol", "s3prl-v0.1"], "is for the task phones, not label"),
        (["label", "--num-folds", "4"], "--num-folds 4 is for --folds"),
        (["label", "--folds", "speaker", "--num-folds", "1"], "1 folds are too few"),
        (["label", "--folds", "speaker", "--speaker-disjoint"], "parts that are drawn at random"),
        (["label", "--split", "manifest", "--speaker-disjoint"], "parts that are drawn at random"),
        (["label", "--protocol", "s3prl-v0.1", "--speaker-disjoint"], "parts that are drawn at random"),
        (["label", "--folds", "speaker", "--split", "random"], "--split random is for one train, dev and test part"),
        (["label", "--layer", "3"], "--layer 3 is for a model, and none is named"),
        (["label", "--device", "nonsense"], "--device nonsense is for a model, and none is named"),
        (["label", "--output", f"{'x' * 300}.json"], "a name in it is longer than 255 bytes"),
        (["label", "--max-frames", "50"], "is for frames, and the task label has none"),
        (["speaker-frames", "--max-frames", "-5"], "--max-frames is -5"),
        (["speaker-frames", "--pooling", "mean"], "is for utterances, and the task speaker-frames classifies frames"),
        (["label", "--split-seed", "-1"], "the seed of a split is -1"),
        (["label", "--batch-seconds", "inf"], "a batch of inf seconds cannot be made"),
        (["label", "--batch-seconds", "0"], "a batch of 0 seconds cannot be made"),
        (["label", "--output", "."], "is a folder; give the name of a file"),
        (["label", "--output", "/dev/null/card.json"], "cannot be written: /dev/null is no folder"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, corpus, capsys):
    assert main(["probe", *arguments, "--corpus", str(corpus)]) == 2
    error = capsys.readouterr().err
    assert sentence in error.replace("\n", " ")
    assert "Traceback" not in error


def test_features_without_parameters_cannot_be_trained(corpus, model, capsys):
    arguments = ["probe", "label", str(model[1]), "--corpus", str(corpus), "--fine-tune", "--train-frontend"]
    assert main(arguments) == 2
    assert "--train-frontend is for a learnt front-end" in " ".join(capsys.readouterr().err.split())


def test_fine_tuning_and_s3prl_from_the_command_line(corpus, model, tmp_path, capsys):
    folder = model[1]
    before = (folder / "model.safetensors").read_bytes()
    common = ["--corpus", str(corpus), "--seeds", "1", "--no-baselines"]
    card_path = tmp_path / "card.json"
    arguments = ["probe", "label", str(folder), *common, "--fine-tune", "--epochs", "1", "--output", str(card_path)]
    assert main([*arguments, "--save-model", str(tmp_path / "tuned")]) == 0
    assert read_card(card_path)["rows"][0]["fine_tuned"]
    assert read_tuned(tmp_path / "tuned").description.classes == ("high", "low")
    assert (folder / "model.safetensors").read_bytes() == before
    assert main(["probe", "label", str(tmp_path / "tuned"), *common]) == 0  # a run folder like any other
    capsys.readouterr()
    again = ["probe", "label", str(tmp_path / "tuned"), *common, "--fine-tune", "--save-model", str(tmp_path / "tuned")]
    assert main(again) == 2
    assert "has the model of a run or of this probe; give another folder" in capsys.readouterr().err.replace("\n", " ")
    published = ["probe", "label", str(folder), *common, "--protocol", "s3prl-v0.1", "--steps", "20"]
    assert main([*published, "--baseline-features", "fbank80", "--output", str(card_path)]) == 0
    card = read_card(card_path)
    assert [row["name"] for row in card["rows"]] == ["fbank80", folder.parent.name]
    assert card["rows"][1]["layer"] == "2"
    assert card["config"]["pooling"] == "mean"
    assert card["config"]["published"]["num_steps"] == 20
    assert card["config"]["split"] | {"source": "cpc", "seed": 1337} == card["config"]["split"]


def test_the_description_of_an_ordinary_probe_is_what_it_was():
    """What was added since is left out of a card while it is not used."""
    names = "task column pooling layer hidden_dim split num_seeds max_frames shuffle_labels baselines batch_s bf16"
    plain = to_plain(ProbeConfig(task="label"))
    assert set(plain) == set(names.split())
    assert set(plain["split"]) == {"source", "folds", "num_folds", "speaker_disjoint", "seed"}
    assert from_plain(ProbeConfig, plain) == ProbeConfig(task="label")
    used = ProbeConfig(task="phones", context=4, baseline_features=("fbank80",), fine_tuning=FineTuningConfig(max_epochs=3))
    assert from_plain(ProbeConfig, to_plain(used)) == used
    assert from_plain(ProbeConfig, to_plain(used)) != ProbeConfig(task="phones", context=4)


def test_a_card_of_another_version_is_refused(tmp_path):
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"format_version": 99, "task": "label", "rows": []}))
    with pytest.raises(ValueError, match="version 99"):
        read_card(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a result card"):
        read_card(path)


def test_stored_features_and_waveforms_give_the_same(corpus, model, monkeypatch):
    opened, indices = Corpus.open(corpus), np.arange(6)
    stored = pooled_features(model_representation(model[0], opened, "m"), opened, indices, "mean-std")
    reads = []
    original = Corpus.waveform
    monkeypatch.setattr(Corpus, "waveform", lambda self, i: (reads.append(i), original(self, i))[1])
    monkeypatch.setattr("sslim.models.encoding.reads_stored_features", lambda model, corpus: False)
    computed = pooled_features(model_representation(model[0], opened, "m"), opened, indices, "mean-std")
    assert sorted(reads) == list(range(6))
    torch.testing.assert_close(stored, computed, rtol=0, atol=2e-2)  # the store is float16: 0.004 of a log energy of 10
    other = pooled_features(model_representation(randomised(model[0], 5), opened, "r"), opened, indices, "mean-std")
    assert (stored - other).abs().max() > 0.1  # control


def test_log_mel_is_the_stored_features_themselves(corpus):
    opened, indices = Corpus.open(corpus), np.array([3, 7])
    pooled = pooled_features(log_mel_representation(opened, pooled=True), opened, indices, "mean-std")
    for row, index in enumerate(indices):
        x_TF = opened.features(int(index)).astype(np.float64)
        expected = np.concatenate([x_TF.mean(0), x_TF.std(0)])
        np.testing.assert_allclose(pooled[0, row].numpy(), expected, atol=2e-3)


def test_random_weights_follow_the_seed_and_keep_the_statistics(model):
    one, again, other = (randomised(model[0], seed) for seed in (1, 1, 2))
    name = "encoder.blocks.0.feedforward.up.weight"
    assert torch.equal(one.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert torch.equal(one.frontend.mean, model[0].frontend.mean)
    assert not one.training
