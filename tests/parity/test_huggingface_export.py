"""What is imported from any family and exported to Hugging Face, transformers computes as the reference did: 2e-5.

Import and export go through the two commands. Layers are compared with ours, the last output with what the reference gave for
the same waveform, where that is stored.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import HubertModel

import sslim
from sslim.commands import export, import_
from sslim.frontends.convolution import normalize_waveform

ASSETS = Path(__file__).parent / "assets"
TOLERANCE = 2e-5
STORED = {  # file or folder -> where its outputs are, the name of the last
    "hubert/base_fairseq.pt": ("hubert/base", "hidden3"),
    "hubert/base_s3prl_converted.pt": ("hubert/base", "hidden3"),
    "hubert/large_fairseq.pt": ("hubert/large", "hidden3"),
    "hubert/large_s3prl_converted.pt": ("hubert/large", "hidden3"),
    "hubert/hf_base": ("hubert/hf_base", "hidden3"),
    "hubert/hf_large": ("hubert/hf_large", "last"),
    "distilalhubert/postnorm_2x6.ckpt": ("distilalhubert/postnorm_2x6", "last_hidden_state"),
    "distilalhubert/prenorm_2x2_layernorm.ckpt": ("distilalhubert/prenorm_2x2_layernorm", "last_hidden_state"),
    "distilhubert/synthetic.ckpt": None,
}


def through_both_commands(file, folder, subnet=None):
    """Imports, exports; returns our model and transformers'."""
    import_.main(import_.Options(foreign=file, folder=folder / "native", subnet=subnet))
    export.main(export.Options(model=folder / "native", output=folder / "out", format="huggingface"))
    return sslim.load_model(folder / "native"), from_folder(folder / "out")


def from_folder(folder):
    model, report = HubertModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def outputs(ours, theirs, waveform_BS):
    """Pairs of theirs and ours, layer by layer; theirs takes waveforms normalised outside."""
    lengths_B = torch.full((len(waveform_BS),), waveform_BS.shape[1])
    frontend = ours.config.frontend
    values = normalize_waveform(waveform_BS, lengths_B, frontend.waveform_eps) if frontend.normalize_waveform else waveform_BS
    with torch.inference_mode():
        output, hidden = ours.encode(waveform_BS), theirs(values, output_hidden_states=True)
    # transformers has the last state before its final norm in some versions and after it in others
    return [*zip(hidden.hidden_states[:-1], output.layers[:-1], strict=True), (hidden.last_hidden_state, output.final)]


def largest(pairs):
    return max(float((got - want).abs().max()) for got, want in pairs)


@pytest.mark.parametrize("file", STORED)
def test_imported_and_exported(file, tmp_path):
    ours, theirs = through_both_commands(ASSETS / file, tmp_path)
    if STORED[file] is None:
        waveform_BS, wanted = 0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(0)), None
    else:
        stored, last = load_file(ASSETS / f"{STORED[file][0]}.safetensors"), STORED[file][1]
        waveform_BS, wanted = stored["single.wav"], stored[f"single.{last}"]
    pairs = outputs(ours, theirs, waveform_BS)
    assert len(pairs) == ours.num_layers + 1
    assert largest(pairs) <= TOLERANCE
    if wanted is not None:
        assert largest([(pairs[-1][0], wanted)]) <= TOLERANCE
    change_one_tensor(tmp_path / "out" / "model.safetensors")  # the control
    changed = outputs(ours, from_folder(tmp_path / "out"), waveform_BS)
    assert largest(changed) > TOLERANCE


def change_one_tensor(path):
    tensors = load_file(path)
    tensors["encoder.layers.0.feed_forward.output_dense.weight"] *= 1.01
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture(scope="module")
def lighthubert(tmp_path_factory):
    """A golden supernet as a file, its subnets, and what the reference gave for them."""
    arrays = np.load(ASSETS / "lighthubert" / "supernet_default_subnets.npz")
    described = json.loads((ASSETS / "lighthubert" / "supernet_default_subnets.json").read_text())
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    path = tmp_path_factory.mktemp("supernet") / "supernet.pt"
    weights = {key.removeprefix("model/"): tensor for key, tensor in tensors.items() if key.startswith("model/")}
    torch.save({"cfg": described["cfg"], "model": weights}, path)
    return path, {name: json.dumps(entry["subnet"]) for name, entry in described["subnets"].items()}, tensors


def test_a_uniform_subnet_of_lighthubert(lighthubert, tmp_path):
    """Its positions are cut from a folded kernel, which is exact in the form with a gain: no norm is computed anew."""
    path, subnets, gold = lighthubert
    ours, theirs = through_both_commands(path, tmp_path, subnets["subnet1"])
    pairs = outputs(ours, theirs, gold["gold/subnet1.single.wav"])
    assert largest(pairs) <= TOLERANCE
    assert largest([(pairs[-1][0], gold["gold/subnet1.single.last"])]) <= TOLERANCE


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("dphubert/dphubert.pth", "its front-end scales channels, each by a factor of its own"),
        ("dphubert/dpwavlm.pth", "its front-end scales channels, each by a factor of its own"),
        ("lighthubert", "layer 2 attends to a window"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(file, reason, lighthubert, tmp_path):
    path, subnets, _ = lighthubert
    foreign, subnet = (path, subnets["subnet3"]) if file == "lighthubert" else (ASSETS / file, None)
    with pytest.raises(ValueError, match=f"transformers' HubertModel cannot hold this model: {reason}") as caught:
        through_both_commands(foreign, tmp_path, subnet)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
