"""``sslim profile`` on native, run, foreign and quantised models: table, file, picture, memory, mistakes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sslim.checkpoints import load_model, save_model
from sslim.cli import main
from sslim.models import build_model
from sslim.models.elastic import count_parameters, slice_model
from sslim.models.melhubert import melhubert
from sslim.nn.slicing import Units
from sslim.profiling import Conditions, count_macs
from sslim.profiling.profile import Profile
from sslim.recipes.peak_memory import peak_memory_bytes
from sslim.recipes.profile import ProfileRecipe, distinct_names, run_profile
from sslim.storage import file_digest

FOREIGN = Path(__file__).parents[1] / "parity" / "assets" / "melhubert" / "melhubert_10ms.ckpt"
CONFIG = replace(
    melhubert(num_layers=4, dim=128, num_heads=4, feedforward_dim=512, conv_kernel_size=16, conv_groups=8), heads={}
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A dense model in a run, half of it, and one with half of its weights zero."""
    folder = tmp_path_factory.mktemp("models")
    dense = build_model(CONFIG, torch.Generator().manual_seed(0))
    save_model(dense, folder / "dense" / "model")
    (folder / "dense" / "run.json").write_text("{}", encoding="utf-8")
    units = Units.prefix(CONFIG.encoder, num_heads=[2] * 4, feedforward_dims=[256] * 4)
    save_model(slice_model(dense, units), folder / "half")
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.dim() > 1:
                parameter.view(-1)[::2] = 0.0
    save_model(dense, folder / "sparse")
    return {path.name: path for path in folder.iterdir()}


def test_the_verb_writes_table_file_and_picture(models: dict[str, Path], tmp_path: Path, capsys) -> None:
    output = tmp_path / "results" / "profile.json"
    given = [str(models[name]) for name in ("half", "sparse", "dense", "half")]
    options = ["--seconds", "0.5", "1", "--threads", "1", "--repeats", "5", "--no-memory", "--check-macs"]
    assert main(["profile", *given, str(FOREIGN), "--baseline", str(models["dense"]), *options, "--output", str(output)]) == 0
    shown = capsys.readouterr()
    profile = Profile.load(output)
    assert [model.name for model in profile.models] == ["dense", "half", "sparse", FOREIGN.name]  # each once, baseline first
    assert profile.conditions == [Conditions(seconds=0.5), Conditions(seconds=1.0)]
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    dense, half, sparse, foreign = profile.models
    file = models["half"] / "model.safetensors"
    assert (half.digest, half.file_bytes) == (file_digest(file), file.stat().st_size)
    assert half.num_parameters == count_parameters(load_model(models["half"]).config, with_heads=False)
    assert sparse.num_parameters == dense.num_parameters
    assert sparse.zero_share == pytest.approx(0.5, abs=0.01)
    assert sparse.nonzero_parameters < 0.52 * dense.num_parameters < dense.nonzero_parameters
    assert (foreign.digest, foreign.family) == (file_digest(FOREIGN), "melhubert")
    whole, small = (row for row in profile.rows_at(Conditions(seconds=1.0)) if row.model in ("dense", "half"))
    assert whole.macs == count_macs(CONFIG, seconds=1.0).total
    assert small.predicted_speedup == whole.macs / small.macs > 1.5
    assert len(small.times_ms) == 5
    assert "0.5 s, 1 thread" in shown.out
    assert "sparse: 50 % of its weights are zeros; zeros are multiplied like any number" in shown.out
    assert max(map(len, shown.out.split("latency: ")[0].splitlines())) <= 120
    assert "torch counts the same" in shown.err


def test_a_quantised_model_is_profiled_like_any_other(models: dict[str, Path], tmp_path: Path) -> None:
    from sslim.models.storage import stored_as

    save_model(stored_as(load_model(models["dense"] / "model"), "int8-dynamic"), tmp_path / "int8")
    recipe = ProfileRecipe(seconds=(0.5,), repeats=2, memory=False, check_macs=True)
    profile = run_profile([tmp_path / "int8"], models["dense"], recipe)
    dense, small = profile.models
    assert small.num_parameters == dense.num_parameters
    assert small.file_bytes < 0.5 * dense.file_bytes
    assert not small.is_sparse  # rounding makes some zeros
    assert profile.rows[1].predicted_speedup == 1.0


def test_peak_memory_is_that_of_a_process_of_its_own(models: dict[str, Path]) -> None:
    ballast = torch.ones(100_000_000)  # 400 MB here must not be seen there
    short, long = (
        peak_memory_bytes(models["half"], Conditions(seconds=seconds, batch=batch)) for seconds, batch in ((0.1, 1), (30.0, 4))
    )
    weights = (models["half"] / "model.safetensors").stat().st_size
    assert weights < short < long < 4 * ballast.numel()
    frames = 4 * 1500
    assert long - short > 4 * 3 * frames * 256  # input, output and one more of a feed-forward layer's activations


def test_memory_goes_into_the_file_and_says_what_it_is(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = ProfileRecipe(seconds=(0.2,), repeats=1)
    profile = run_profile([FOREIGN], None, recipe)
    assert [row.peak_memory_bytes > FOREIGN.stat().st_size // 2 for row in profile.rows] == [True]
    assert "resident memory" in profile.memory_includes
    assert (profile.baseline, profile.rows[0].measured_speedup) == (FOREIGN.name, 1.0)  # the first where none is named


def test_a_process_that_fails_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^the process that measures the peak memory of nowhere ended with 1: .*nowhere"):
        peak_memory_bytes(tmp_path / "nowhere", Conditions())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "there is nothing to profile: name a model"),
        (["nowhere"], "nowhere: there is no such model folder, run folder or checkpoint"),
        (["{tmp}"], "holds no model: it has neither model.json nor a folder model/ with one"),
        (["{half}", "--seconds", "0"], "seconds 0, batch 1 and threads 1 must be above 0"),
        (["{half}", "--seconds", "0.001"], "0.001 s of audio are shorter than one frame"),
        (["{half}", "--repeats", "0"], "repeats is 0; expected at least 1 round"),
        (["{half}", "--device", "tpu"], "device is 'tpu'; accepted are cpu, cuda and cuda:N"),
        (["{half}", "--baselin", "{half}"], "did you mean --baseline?"),
    ],
)
def test_mistakes_are_one_sentence(models, tmp_path: Path, capsys, arguments: list[str], sentence: str) -> None:
    filled = [argument.format(tmp=tmp_path, half=models["half"]) for argument in arguments]
    assert main(["profile", *filled, "--no-memory"]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_models_of_one_name_get_as_much_of_their_path_as_it_takes(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("a/x/model", "b/x", "c/y/model", "y2.ckpt", "a/z/y")]
    assert distinct_names(places) == ["a/x", "b/x", "c/y", "y2.ckpt", "z/y"]
