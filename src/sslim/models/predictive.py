"""APC, VQ-APC and NPC: models that estimate features from frames before or around them.

Chung, Hsu, Tang and Glass, "APC" (arXiv 1904.03240), Chung, Tang and Glass, "VQ-APC" (arXiv 2005.08392), Liu, Chung and Glass,
"NPC" (arXiv 2011.00406), with the sizes of S3PRL: 80 channels of Kaldi's filterbank, normalised for each utterance, enter the
encoder as they are, and a linear head gives as many.

What S3PRL exposes of them are ``layers[1:]`` here: of APC and VQ-APC the inputs of the second and the third recurrent layer and
the last one's output before it is quantised (3 states of 3 layers), of NPC the outputs of each block and its masked convolution
in turn and their sum before it is quantised (9 of 4 blocks). ``layers[0]`` are the features, narrower than the rest.
"""

from __future__ import annotations

from sslim.frontends import FilterbankConfig, SpectralFrontendConfig, build_frontend
from sslim.models.melhubert import melhubert_frontend
from sslim.models.reconstruction import UTTERANCE
from sslim.models.speech import ModelConfig, ProjectionConfig
from sslim.nn.conv_encoder import ConvEncoderConfig
from sslim.nn.encoders import AnyEncoderConfig
from sslim.nn.heads import RegressionHeadConfig
from sslim.nn.quantizer import QuantizerConfig
from sslim.nn.recurrent import RecurrentEncoderConfig

APC_HEAD, NPC_HEAD = "autoregressive", "npc"
APC_CODES = QuantizerConfig(num_codes=(512,), code_dims=(512,), temperature=0.5)
NPC_CODES = QuantizerConfig(num_codes=(64,) * 4, code_dims=(128,) * 4, temperature=1.0)


def predictive_frontend(num_mel_bins: int = 80) -> SpectralFrontendConfig:
    """S3PRL's ``create_transform`` of these models: Kaldi's filterbank with a Hamming window, normalised for each utterance."""
    return SpectralFrontendConfig(
        features=FilterbankConfig(num_mel_bins=num_mel_bins, window="hamming"), normalization=UTTERANCE
    )


def _width(frontend: SpectralFrontendConfig | None, feature_dim: int | None) -> int:
    found = None if frontend is None else build_frontend(frontend).feature_dim
    if found is None and feature_dim is None:
        raise ValueError("feature_dim is None; without a front-end it must be the width of the features from outside")
    if found is not None and feature_dim not in (None, found):
        raise ValueError(f"feature_dim is {feature_dim}; the front-end gives {found}")
    return found or feature_dim or 0


def predictive_model(family: str, frontend: SpectralFrontendConfig | None, encoder: AnyEncoderConfig, head: str) -> ModelConfig:
    """Returns a model whose features enter the encoder as they are, with a linear head back to them.

    Args:
        family: Its name, for people.
        frontend: Its features; None for features from outside.
        encoder: Its encoder, for as many features as there are.
        head: Name of the head.
    """
    width = encoder.input_dim
    return ModelConfig(
        family=family,
        frontend=frontend,
        projection=ProjectionConfig(feature_dim=width, linear=False),
        encoder=encoder,
        heads={head: RegressionHeadConfig(output_dim=width)},
    )


def apc(
    *,
    frontend: SpectralFrontendConfig | None = None,
    feature_dim: int | None = None,
    dims: tuple[int, ...] = (512, 512, 512),
    residual: bool = True,
    prenet_dims: tuple[int, ...] = (),
    codes: QuantizerConfig | None = None,
    dropout: float = 0.1,
) -> ModelConfig:
    """Returns an APC of any size, or with ``codes`` after its last layer a VQ-APC.

    The default has 4,105,296 parameters with its head, and 4,630,096 with ``APC_CODES``.

    Args:
        frontend: Its features; None for the reference's, unless ``feature_dim`` is given.
        feature_dim: Width of features from outside.
        dims: Hidden units of each recurrent layer.
        residual: Whether inputs are added to outputs where they are equally wide.
        prenet_dims: Hidden units of a pre-net, which no published model has.
        codes: Codebooks over the last layer.
        dropout: On the output of each recurrent layer.
    """
    if frontend is None and feature_dim is None:
        frontend = predictive_frontend()
    encoder = RecurrentEncoderConfig(
        input_dim=_width(frontend, feature_dim),
        dims=dims,
        residual=residual,
        dropout=dropout,
        prenet_dims=prenet_dims,
        drop_last=True,
        quantizers=() if codes is None else (*(None,) * (len(dims) - 1), codes),
    )
    return predictive_model("apc" if codes is None else "vq-apc", frontend, encoder, APC_HEAD)


def npc(
    *,
    frontend: SpectralFrontendConfig | None = None,
    feature_dim: int | None = None,
    dim: int = 512,
    num_blocks: int = 4,
    kernel: int = 15,
    mask: int = 5,
    codes: QuantizerConfig | None = NPC_CODES,
    dropout: float = 0.1,
) -> ModelConfig:
    """Returns an NPC of any size; the default has 19,380,560 parameters with its head.

    Args:
        frontend: Its features; None for the reference's, unless ``feature_dim`` is given.
        feature_dim: Width of features from outside.
        dim: Channels.
        num_blocks: Convolution blocks.
        kernel: Taps of the masked convolutions.
        mask: Frames around each one that its estimate does not depend on.
        codes: Codebooks; None for none.
        dropout: In the blocks.
    """
    if frontend is None and feature_dim is None:
        frontend = predictive_frontend()
    encoder = ConvEncoderConfig(
        input_dim=_width(frontend, feature_dim),
        dim=dim,
        num_blocks=num_blocks,
        kernel=kernel,
        mask=mask,
        dropout=dropout,
        quantizer=codes,
    )
    return predictive_model("npc", frontend, encoder, NPC_HEAD)


PRESETS = {
    "apc": lambda: apc(),
    "vq-apc": lambda: apc(codes=APC_CODES),
    "npc": lambda: npc(),
    "apc-mini": lambda: apc(frontend=melhubert_frontend(20), dims=(352, 352, 352)),
    "apc-tiny": lambda: apc(frontend=melhubert_frontend(20), dims=(32, 32)),
    "vq-apc-tiny": lambda: apc(
        frontend=melhubert_frontend(20),
        dims=(32, 32),
        codes=QuantizerConfig(num_codes=(16,), code_dims=(32,), temperature=0.5),
    ),
    "npc-tiny": lambda: npc(
        frontend=melhubert_frontend(20),
        dim=32,
        num_blocks=2,
        kernel=11,
        mask=3,
        codes=QuantizerConfig(num_codes=(8, 8), code_dims=(16, 16)),
    ),
}
