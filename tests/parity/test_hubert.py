"""HuBERT files of fairseq, S3PRL and transformers compute what their reference computed: 2e-5 on real frames."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sslim

ASSETS = Path(__file__).parent / "assets" / "hubert"
FILES = {  # file or folder -> stored outputs
    "base_fairseq.pt": "base",
    "base_s3prl_converted.pt": "base",
    "large_fairseq.pt": "large",
    "large_s3prl_converted.pt": "large",
    "hf_base": "hf_base",
    "hf_large": "hf_large",
}
TOLERANCE = 2e-5
NUM_LAYERS = 3


def expected_layers(output, stored, prefix):
    """Pairs of ours and theirs: the encoder's input, every layer, the final output.

    fairseq's last stored layer has passed the final norm; transformers stores that one apart as ``last``.
    """
    pairs = [(output.layers[k], stored[f"{prefix}.hidden{k}"]) for k in range(NUM_LAYERS)]
    if f"{prefix}.last" in stored:
        pairs.append((output.layers[NUM_LAYERS], stored[f"{prefix}.hidden{NUM_LAYERS}"]))
        pairs.append((output.final, stored[f"{prefix}.last"]))
    else:
        pairs.append((output.final, stored[f"{prefix}.hidden{NUM_LAYERS}"]))
    return pairs


def encode_batch(file, compat=None):
    """Encodes the stored batch; returns the output, what was stored, and its valid frames."""
    stored = load_file(ASSETS / f"{FILES[file]}.safetensors")
    waveform_BS = stored["batch.wav"]
    lengths_B = torch.tensor([int(row.nonzero()[-1]) + 1 for row in waveform_BS])
    assert lengths_B.min() < waveform_BS.shape[1]
    model = sslim.load_model(ASSETS / file, compat=compat)
    with torch.inference_mode():
        return model.encode(waveform_BS, lengths_B), stored


def largest(pairs, lengths_B):
    return max(
        float((got[row, :length] - want[row, :length]).abs().max())
        for got, want in pairs
        for row, length in enumerate(lengths_B.tolist())
    )


@pytest.mark.parametrize("file", FILES)
def test_an_utterance_alone(file):
    stored = load_file(ASSETS / f"{FILES[file]}.safetensors")
    with torch.inference_mode():
        output = sslim.load_model(ASSETS / file).encode(stored["single.wav"])
    pairs = expected_layers(output, stored, "single")
    assert all(got.shape == want.shape for got, want in pairs)
    assert largest(pairs, output.lengths) < TOLERANCE


@pytest.mark.parametrize("file", FILES)
def test_a_padded_batch_under_compat(file):
    output, stored = encode_batch(file, compat="reference")
    if "batch.padding_mask" in stored:  # fairseq's own frame mask
        assert output.lengths.tolist() == (stored["batch.padding_mask"] == 0).sum(1).tolist()
    assert largest(expected_layers(output, stored, "batch"), output.lengths) < TOLERANCE


@pytest.mark.parametrize("file", FILES)
def test_without_compat_padding_changes_nothing(file):
    output, stored = encode_batch(file)
    model = sslim.load_model(ASSETS / file)
    for row, length in enumerate(output.lengths.tolist()):
        samples = int(stored["batch.wav"][row].nonzero()[-1]) + 1
        with torch.inference_mode():
            alone = model.encode(stored["batch.wav"][row : row + 1, :samples])
        assert alone.final.shape[1] == length
        torch.testing.assert_close(output.final[row, :length], alone.final[0], atol=1e-5, rtol=0)
    if "hf_large" not in file:  # layer norms and exact frames: the reference has no padding fault there
        assert largest(expected_layers(output, stored, "batch"), output.lengths) > 1e-2


def test_both_containers_hold_the_same_model():
    fairseq, converted = (sslim.load_model(ASSETS / name) for name in ("base_fairseq.pt", "base_s3prl_converted.pt"))
    assert fairseq.config == converted.config
    assert all(torch.equal(tensor, converted.state_dict()[name]) for name, tensor in fairseq.state_dict().items())
