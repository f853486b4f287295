"""LNSR: no noise, equal sizes, PGD against Gaussian noise, padding, norms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sslim.analysis.lnsr import LnsrConfig, measure_lnsr, relative_changes
from sslim.batch import EncoderOutput
from sslim.frontends import NormalizationConfig
from sslim.models import build_model
from sslim.models.encoding import Inputs
from sslim.models.melhubert import melhubert

SMALL = {"num_layers": 2, "dim": 24, "num_heads": 3, "feedforward_dim": 32, "conv_kernel_size": 8, "conv_groups": 4}


@pytest.fixture(scope="module")
def model():
    config = melhubert(dropout=0.0, **SMALL)
    frontend = replace(config.frontend, normalization=NormalizationConfig(kind="utterance", eps=1e-3))
    made = build_model(replace(config, frontend=frontend, heads={}), torch.Generator().manual_seed(0))
    for parameter in made.encoder.blocks.parameters():
        parameter.data *= 3.0
    return made


def inputs(model, counts=(30, 45, 61), *, waveform: bool = False) -> Inputs:
    generator = torch.Generator().manual_seed(3)
    shapes = [(320 * n,) if waveform else (n, model.frontend.base_dim) for n in counts]
    values = [0.1 * torch.randn(shape, generator=generator) for shape in shapes]
    unit_s = 1 / 16000 if waveform else model.frontend.base_frame_shift_s
    return Inputs(lengths=np.array([len(v) for v in values]), unit_s=unit_s, read=values.__getitem__, is_waveform=waveform)


def test_no_noise_changes_nothing_and_more_noise_changes_more(model):
    curves = measure_lnsr(model, inputs(model), LnsrConfig(epsilons=(0.0, 0.02, 0.2), steps=2))
    none, little, much = (curves[i : i + 2] for i in (0, 2, 4))
    assert all(curve.input == 0.0 and curve.layers == [0.0] * 3 for curve in none)
    for less, more in zip(little, much, strict=True):
        assert all(0 < a < b for a, b in zip(less.layers, more.layers, strict=True))


@pytest.mark.parametrize("perturb", ["features", "waveform"])
def test_the_worst_case_is_worse_than_noise_of_the_same_size(model, perturb):
    given = inputs(model, waveform=perturb == "waveform")
    pgd, gaussian = measure_lnsr(model, given, LnsrConfig(perturb=perturb, epsilons=(0.1,), steps=5))
    assert (pgd.noise, gaussian.noise) == ("pgd", "gaussian")
    assert pgd.input == pytest.approx(gaussian.input, rel=1e-4)
    assert 0.05 < pgd.input <= 0.1 + 1e-6
    assert pgd.layers[-1] > 1.2 * gaussian.layers[-1]
    (one, _) = measure_lnsr(model, given, LnsrConfig(perturb=perturb, epsilons=(0.1,), steps=1))
    assert one.layers[-1] < pgd.layers[-1]  # the control: steps are what makes it worse


def test_the_layer_that_is_attacked_suffers(model):
    attacked = [measure_lnsr(model, inputs(model), LnsrConfig(epsilons=(0.1,), steps=8, attacked_layer=k))[0] for k in (0, 2)]
    assert attacked[0].layers[0] > attacked[1].layers[0]
    assert attacked[1].layers[2] > attacked[0].layers[2]


def test_results_do_not_depend_on_the_batch_but_on_the_seed(model):
    config = LnsrConfig(epsilons=(0.1,), steps=2)
    whole = measure_lnsr(model, inputs(model), config)
    alone = measure_lnsr(model, inputs(model), replace(config, batch_s=0.01))
    for one, other in zip(whole, alone, strict=True):
        assert one.layers == pytest.approx(other.layers, rel=2e-3)  # signs of tiny gradients may flip
    assert measure_lnsr(model, inputs(model), config) == whole
    assert measure_lnsr(model, inputs(model), replace(config, seed=1))[1].layers != whole[1].layers


def test_both_norms_are_what_numpy_says():
    clean, noisy = (torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    clean[1, 4:], noisy[1, 4:] = 0.0, 0.0
    outputs = [EncoderOutput(final=x, lengths=torch.tensor([7, 4]), layers=(x,)) for x in (clean, noisy)]
    for name, order in (("frobenius", "fro"), ("spectral", 2)):
        expected = [
            np.linalg.norm((noisy - clean)[b, :length].numpy(), order) / np.linalg.norm(clean[b, :length].numpy(), order)
            for b, length in enumerate((7, 4))
        ]
        assert relative_changes(*outputs, name)[:, 0].tolist() == pytest.approx(expected, rel=1e-5)


def test_mistakes_are_sentences(model):
    with pytest.raises(ValueError, match=r"attacked_layer is 3; this model has layers 0 to 2"):
        measure_lnsr(model, inputs(model), LnsrConfig(attacked_layer=3))
    with pytest.raises(ValueError, match="steps is 0"):
        LnsrConfig(steps=0)
    with pytest.raises(ValueError, match="epsilons are"):
        LnsrConfig(epsilons=(-1.0,))
    with pytest.raises(ValueError, match="expected waveforms"):
        measure_lnsr(model, inputs(model), LnsrConfig(perturb="waveform"))
