"""Cepstra of stored filterbank features are MFCC without liftering."""

import pytest
import torch

from sslim.batch import Padded
from sslim.frontends import FilterbankConfig, MfccConfig, SpectralFrontendConfig, build_frontend

BANK = FilterbankConfig(num_mel_bins=40, window="hamming", waveform_scale=32768.0)


def test_they_equal_mfcc_without_lifter() -> None:
    waveform = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([16000])
    mfcc = MfccConfig(filterbank=BANK, num_coefficients=13, cepstral_lifter=0.0)
    want = build_frontend(SpectralFrontendConfig(features=mfcc, deltas=1))(waveform, lengths).values
    stored = build_frontend(SpectralFrontendConfig(features=BANK)).base_features(waveform, lengths)
    got = build_frontend(SpectralFrontendConfig(features=BANK, cepstra=13, deltas=1)).finish(stored).values
    torch.testing.assert_close(got, want, atol=2e-4, rtol=0)
    fewer_bands = build_frontend(SpectralFrontendConfig(features=BANK, cepstra=12, deltas=1)).finish(stored).values
    assert fewer_bands.shape[-1] == 24
    torch.testing.assert_close(fewer_bands[..., :12], got[..., :12])


def test_padding_stays_zero() -> None:
    stored = Padded(values=torch.ones(2, 6, 40), lengths=torch.tensor([6, 3]))
    values = build_frontend(SpectralFrontendConfig(features=BANK, cepstra=5)).finish(stored).values
    assert (values[1, 3:] == 0).all()
    assert (values[1, :3, 0] != 0).all()


@pytest.mark.parametrize(("cepstra", "message"), [(-1, "must not be negative"), (41, "more than the 40 features")])
def test_impossible_numbers_are_refused(cepstra: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_frontend(SpectralFrontendConfig(features=BANK, cepstra=cepstra))
