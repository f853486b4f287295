"""The kinds of encoders that a model can have, and which class each description builds.

They share what the rest relies on. A description has ``input_dim``, ``dim``, ``num_layers``, ``layer_dims`` (widths of the
N + 1 layers) and ``causal``; an encoder has ``initialize`` and gives an ``EncoderOutput`` for frames, lengths, ``keep_layers``.
"""

from __future__ import annotations

from sslim.nn.conv_encoder import ConvEncoder, ConvEncoderConfig
from sslim.nn.encoder import Encoder, EncoderConfig
from sslim.nn.recurrent import RecurrentEncoder, RecurrentEncoderConfig

AnyEncoderConfig = EncoderConfig | RecurrentEncoderConfig | ConvEncoderConfig
AnyEncoder = Encoder | RecurrentEncoder | ConvEncoder


def build_encoder(config: AnyEncoderConfig) -> AnyEncoder:
    """Builds the encoder that ``config`` describes."""
    if isinstance(config, EncoderConfig):
        return Encoder(config)
    return RecurrentEncoder(config) if isinstance(config, RecurrentEncoderConfig) else ConvEncoder(config)
