"""load_model and the two commands: what a user sees."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sslim
from sslim.checkpoints import CheckpointError
from sslim.commands import export, import_

ASSETS = Path(__file__).parents[2] / "parity" / "assets"
FILE = ASSETS / "melhubert" / "melhubert_10ms.ckpt"


def write(path, contents):
    torch.save(contents, path)
    return path


def test_statistics_make_waveforms_possible():
    waveform = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0)) * 0.1
    bare = sslim.load_model(FILE)
    with pytest.raises(ValueError, match="libri-960"):
        bare.encode(waveform)
    bare.encode_features(torch.zeros(1, 5, 40))
    supplied = sslim.load_model(FILE, statistics="libri-960")
    assert supplied.encode(waveform).final.isfinite().all()
    assert supplied.config.frontend.normalization.statistics == "libri-960"
    assert supplied.config.frontend == supplied.frontend.config
    assert supplied.provenance[-1] == {"action": "set statistics", "source": "libri-960"}
    with pytest.raises(ValueError, match="libri-961"):
        sslim.load_model(FILE, statistics="libri-961")


def test_statistics_of_another_width_are_refused(tmp_path):
    np.save(tmp_path / "s.npy", np.ones((2, 39)))
    with pytest.raises(ValueError, match="39"):
        sslim.load_model(FILE, statistics=tmp_path / "s.npy")


def test_paths_that_are_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt does not exist"):
        sslim.load_model(tmp_path / "nowhere.ckpt")
    with pytest.raises(CheckpointError, match=r"no model\.json \(sslim\) and no config\.json \(Hugging Face\)$"):
        sslim.load_model(tmp_path)
    sslim.save_model(sslim.load_model(FILE), tmp_path / "run" / "model")
    with pytest.raises(CheckpointError, match=r"its folder .*run/model is one"):
        sslim.load_model(tmp_path / "run")
    folder = tmp_path / "hf"
    folder.mkdir()
    for name, said in (("config.json", "is the description of a model"), ("pytorch_model.bin", "without their description")):
        (folder / name).write_text("{}")
        with pytest.raises(CheckpointError, match=rf"{said}: give (its|their) folder .*hf$"):
            sslim.load_model(folder / name)
    (tmp_path / "page.ckpt").write_text("<html>login</html>")
    with pytest.raises(CheckpointError, match="HTML page"):
        sslim.load_model(tmp_path / "page.ckpt")


def test_unknown_contents_list_keys_and_formats(tmp_path):
    path = write(tmp_path / "other.pt", {"weights": torch.zeros(1), "epoch": 3})
    with pytest.raises(
        CheckpointError, match=r"keys are weights, epoch; known formats: MelHuBERT \(model, Upstream_Config"
    ) as caught:
        sslim.load_model(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="and 12 more"):
        sslim.load_model(write(path, {f"k{i}": i for i in range(20)}))
    with pytest.raises(CheckpointError, match="holds a Tensor"):
        sslim.load_model(write(path, torch.zeros(2)))
    scores = [((0, 1), 12.5), ((1, 3), torch.tensor(3.0))]
    with pytest.raises(CheckpointError, match="list of head scores"):
        sslim.load_model(write(path, scores))


def test_a_subnet_of_no_supernet_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no supernet"):
        sslim.load_model(FILE, subnet="max")


def test_import_and_export_commands(tmp_path, capsys):
    import_.main(import_.Options(foreign=FILE, folder=tmp_path / "m"))
    said = capsys.readouterr().out
    assert "3 layers of width 64" in said
    assert "no statistics" in said
    import_.main(import_.Options(foreign=FILE, folder=tmp_path / "m", statistics="libri-360"))
    assert "no statistics" not in capsys.readouterr().out
    export.main(export.Options(model=tmp_path / "m", output=tmp_path / "out.ckpt"))
    assert "not in it: the features' statistics (libri-360)" in capsys.readouterr().out
    first, last = sslim.load_model(FILE), sslim.load_model(tmp_path / "out.ckpt")
    assert all(torch.equal(tensor, last.state_dict()[name]) for name, tensor in first.state_dict().items())


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_light():
    code = """
import sys, time
start = time.process_time()
import sslim
took = time.process_time() - start
heavy = {"torch", "numpy", "soundfile", "scipy", "safetensors"} & set(sys.modules)
assert not heavy, heavy
assert set(sslim.__all__) <= set(dir(sslim))
try:
    sslim.load_modell
except AttributeError as error:
    assert "load_modell" in str(error)
else:
    raise SystemExit("no error")
import sslim.commands.import_, sslim.commands.export
assert "torch" not in sys.modules
print(took)
assert sslim.load_model.__module__ == "sslim.checkpoints.loading"
assert "torch" in sys.modules  # the control
assert sslim.__version__[0].isdigit()
"""
    assert float(run(code)) < 0.15
