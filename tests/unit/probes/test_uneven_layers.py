"""Layers that are not equally wide, as a recurrent encoder's input and outputs are, in one tensor for the probes."""

import torch

from sslim.probes.features import stacked


def test_narrow_layers_are_filled_up_with_zeros() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(7, width, generator=generator) for width in (3, 5, 5)]
    x_LTD = stacked(layers)
    assert x_LTD.shape == (3, 7, 5)
    assert torch.equal(x_LTD[0, :, :3], layers[0])
    assert not x_LTD[0, :, 3:].any()
    assert torch.equal(x_LTD[2], layers[2])
