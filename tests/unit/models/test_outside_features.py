"""Models that name no features read those that a corpus is named for: with deltas and normalisation, stacked as they stack."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sslim.cli import main
from sslim.data.corpus import Corpus
from sslim.data.feature_presets import feature_preset
from sslim.frontends import build_frontend
from sslim.models import SpeechModel, build_model
from sslim.models.encoding import corpus_inputs, encode_utterances, give_features
from sslim.models.reconstruction import tera
from sslim.probes.features import model_representation
from sslim.recipes.corpus_batches import frame_facts
from sslim.targets.vectors import LayerVectors

SIZES = {"num_layers": 2, "dim": 16, "num_heads": 2, "feedforward_dim": 32}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    """The same two recordings, prepared with four kinds of features."""
    folder = tmp_path_factory.mktemp("outside")
    rng = np.random.default_rng(0)
    (folder / "audio").mkdir()
    for name, num_samples in (("a", 20_000), ("b", 16_123)):
        loudness = np.repeat(rng.uniform(0, 0.3, num_samples // 800 + 1), 800)[:num_samples]
        soundfile.write(folder / "audio" / f"{name}.wav", loudness * rng.normal(size=num_samples), 16_000)
    made = {}
    for name in ("fbank160-librosa", "fbank80-librosa", "melhubert", "mfcc39"):
        assert main(["prepare", str(folder / "audio"), str(folder / name), "--features", name]) == 0
        made[name] = Corpus.open(folder / name)
    return made


def outside(feature_dim: int, stack: int = 1) -> SpeechModel:
    return build_model(tera(feature_dim=feature_dim, stack=stack, **SIZES), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize(
    ("features", "feature_dim"), [("fbank160-librosa", 160), ("fbank80-librosa", 80), ("melhubert", 40), ("mfcc39", 39)]
)
@torch.inference_mode()
def test_states_are_those_of_the_named_features(
    corpora: dict[str, Corpus], features: str, feature_dim: int, stack: int
) -> None:
    corpus, model, given = corpora[features], outside(feature_dim, stack), outside(feature_dim, stack)
    frontend = build_frontend(feature_preset(features))  # type: ignore[arg-type]
    if features == "melhubert":
        assert corpus.statistics is not None
        mean, std, source = corpus.statistics
        frontend.set_statistics(torch.as_tensor(mean), torch.as_tensor(std), source=source)
    found = dict(model_representation(model, corpus, "outside").layers_of(np.arange(2)))
    assert frame_facts(corpus, model).frame_period_s == pytest.approx(0.01 * stack)
    vectors = LayerVectors(corpus, model, 2).read([0, 1])
    for index in range(2):
        values = torch.from_numpy(np.array(corpus.waveform(index)))[None]
        named = frontend(values, torch.tensor([values.shape[1]])).values
        whole = named[:, : named.shape[1] // stack * stack]
        wanted = given.encode_features(whole)
        assert found[index].shape[1] == whole.shape[1] // stack
        assert (found[index][-1] - wanted.final[0]).abs().max() < 0.02  # features are stored as 16-bit numbers
        assert (vectors[index] - wanted.layers[2][0]).abs().max() < 0.02
        base = torch.from_numpy(np.asarray(corpus.features(index), dtype=np.float32))[None, : whole.shape[1]]
        if base.shape[-1] == feature_dim:  # the control: not what is stored
            assert (given.encode_features(base).final - wanted.final).abs().max() > 0.5


def test_what_does_not_fit_is_refused(corpora: dict[str, Corpus]) -> None:
    with pytest.raises(ValueError, match="takes 160 features from outside, and corpus audio holds 80 features"):
        give_features(outside(160), corpora["fbank80-librosa"])
    with pytest.raises(ValueError, match="has no front-end"):
        corpus_inputs(outside(80), corpora["fbank80-librosa"], [0])


def test_extraction_and_a_saved_model_agree(corpora: dict[str, Corpus], tmp_path: Path) -> None:
    """What training and compression save has the front-end; it takes waveforms from then on."""
    corpus, model = corpora["fbank160-librosa"], outside(160, stack=3)
    give_features(model, corpus)
    stored = {position: final for position, _, final in encode_utterances(model, corpus_inputs(model, corpus, [0]))}
    waveform_BS = torch.from_numpy(np.array(corpus.waveform(0)))[None]
    with torch.inference_mode():
        assert (model.encode(waveform_BS).final[0] - stored[0]).abs().max() < 0.02


def test_features_from_elsewhere_are_not_asked_of_sound(
    corpora: dict[str, Corpus], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forty channels are not forty fMLLR features."""
    corpus, output = corpora["melhubert"], tmp_path / "run"
    assert main(["pretrain", "tera-fmllr-base", str(corpus.path), "--output", str(output), "--steps", "1"]) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "takes fMLLR features, which cannot be computed from sound, and corpus audio holds melhubert@1" in said
    assert not output.exists()
