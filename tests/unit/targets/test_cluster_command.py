"""``sslim cluster`` as a user calls it."""

from __future__ import annotations

import pytest

from sslim.checkpoints import save_model
from sslim.cli import main
from sslim.data.labels import LabelStore


def test_features_then_a_layer_then_a_development_set(corpus, other_corpus, model, tmp_path, capsys):
    folder = str(corpus.path)
    assert main(["cluster", folder, "--clusters", "12"]) == 0
    out = capsys.readouterr().out
    assert "PNMI" in out
    assert "next: sslim doctor" in out
    assert corpus.labels("kmeans12").frame_period_s == pytest.approx(0.01)

    save_model(model, tmp_path / "run" / "model")
    stage2 = ["--model", str(tmp_path / "run" / "model"), "--layer", "2"]
    assert main(["cluster", folder, *stage2, "--num-clusters", "7"]) == 0
    labels = corpus.labels("layer2-kmeans7")
    assert labels.frame_period_s == pytest.approx(0.02)
    assert (labels.origin["kind"], labels.origin["layer"], labels.origin["model"]) == ("model", 2, "run")

    codebook = ["--codebook", str(labels.folder)]
    assert main(["cluster", str(other_corpus.path), *stage2, *codebook, "--name", "dev"]) == 0
    applied = LabelStore.open(other_corpus.path / "labels" / "dev")
    assert applied.origin["codebook_digest"] == labels.origin["codebook_digest"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--clusters", "0"], "num_clusters is 0; it must be at least 1"),
        (["--clusters", "100000"], "100000 clusters need at least as many frames"),
        (["--layer", "2"], "a layer, but no model"),
        (["--model", "run"], "--model needs --layer"),
        (["--frame-period-ms", "15"], "15 ms is not a multiple of the 10 ms"),
        (["--codebook", "nowhere"], "nowhere holds no labels"),
        (["--name", "a/b"], "'a/b' is no name for labels"),
    ],
)
def test_mistakes_are_one_sentence(corpus, capsys, arguments, sentence):
    assert main(["cluster", str(corpus.path), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.strip().count("\n") == 0


def test_a_codebook_has_its_own_number_of_clusters(corpus, capsys):
    assert main(["cluster", str(corpus.path), "--clusters", "5"]) == 0
    codebook = str(corpus.path / "labels" / "kmeans5")
    assert main(["cluster", str(corpus.path), "--codebook", codebook, "--clusters", "6", "--name", "x"]) == 2
    assert "has 5" in capsys.readouterr().err
    assert main(["cluster", str(corpus.path), "--clusters", "5"]) == 2
    assert "has labels 'kmeans5' already: choose another name or pass --overwrite" in capsys.readouterr().err
