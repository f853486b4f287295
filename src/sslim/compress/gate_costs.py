"""What a gated model is expected to cost: the mean number of parameters of what independent gates leave.

The number of parameters is a polynomial of the widths: convolutions side by side multiply theirs, everything else is linear,
and a part of a block that loses its last unit takes its biases and norms along. Its coefficients are read off
``count_parameters`` at a few sizes, so that there is no second rule for counting.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor

from sslim.frontends import ConvFrontendConfig
from sslim.models import ModelConfig
from sslim.models.elastic import count_parameters
from sslim.nn.encoder import BlockConfig, EncoderConfig

Number = Tensor | float


@dataclass(frozen=True, kw_only=True)
class Part:
    """Parameters of one block's attention or feed-forward part.

    Attributes:
        each: Parameters of one head or unit.
        fixed: Those that go with the last head or unit.
    """

    each: int
    fixed: int


@dataclass(frozen=True, kw_only=True)
class ParameterCosts:
    """Coefficients of a model's number of parameters without heads of objectives.

    Attributes:
        rest: What no gate removes.
        heads: Attention of every block.
        feedforward: Feed-forward part of every block.
        channels: Parameters of one channel of every convolution, those that it shares with its neighbours left out.
        pairs: Parameters of one channel of a convolution together with one of the next.
    """

    rest: int
    heads: tuple[Part, ...]
    feedforward: tuple[Part, ...]
    channels: tuple[int, ...]
    pairs: tuple[int, ...]

    def expected(self, sizes: Mapping[str, Sequence[Number]], present: Mapping[str, Sequence[Number]]) -> Number:
        """Returns the expected number of parameters.

        Args:
            sizes: Expected numbers of open gates: ``heads`` and ``feedforward`` of every block, ``channels`` of every
                convolution.
            present: Probabilities that ``heads`` and ``feedforward`` have any open gate.
        """
        total: Number = self.rest
        for kind, parts in (("heads", self.heads), ("feedforward", self.feedforward)):
            for part, size, some in zip(parts, sizes[kind], present[kind], strict=True):
                total = total + part.each * size + part.fixed * some
        channels = sizes["channels"]
        for each, size in zip(self.channels, channels, strict=True):
            total = total + each * size
        for pair, (size, following) in zip(self.pairs, pairwise(channels), strict=True):
            total = total + pair * size * following
        return total


def parameter_costs(config: ModelConfig) -> ParameterCosts:
    """Returns the coefficients of a model's number of parameters."""
    config = keeping_norms(config, range(len(config.transformer.blocks)))
    bare = _with_block_sizes(config, {})
    blocks = range(len(config.transformer.blocks))
    rest = count_parameters(bare, with_heads=False)

    def part(index: int, kind: str) -> Part:
        block = config.transformer.blocks[index]
        most = block.num_heads if kind == "heads" else block.feedforward_dim
        if not most:
            return Part(each=0, fixed=0)
        one, whole = (
            count_parameters(_with_block_sizes(config, {(index, kind): size}), with_heads=False) - rest for size in (1, most)
        )
        each = (whole - one) // (most - 1) if most > 1 else one
        return Part(each=each, fixed=one - each)

    heads, feedforward = (tuple(part(index, kind) for index in blocks) for kind in ("heads", "feedforward"))
    if not isinstance(config.frontend, ConvFrontendConfig):
        return ParameterCosts(rest=rest, heads=heads, feedforward=feedforward, channels=(), pairs=())
    single, pairs = _channel_costs(bare, len(config.frontend.layers))
    narrow = count_parameters(with_channels(bare, (1,) * len(single)), with_heads=False)
    rest = narrow - sum(single) - sum(pairs)
    return ParameterCosts(rest=rest, heads=heads, feedforward=feedforward, channels=single, pairs=pairs)


def _channel_costs(bare: ModelConfig, num_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Coefficients of single widths and of neighbouring ones, by differences around one channel everywhere."""

    def count(*wide: int) -> int:
        widths = tuple(2 if index in wide else 1 for index in range(num_layers))
        return count_parameters(with_channels(bare, widths), with_heads=False)

    ones, twos = count(), [count(index) for index in range(num_layers)]
    pairs = [count(i, i + 1) - twos[i] - twos[i + 1] + ones for i in range(num_layers - 1)]
    around = [sum(pairs[max(i - 1, 0) : i + 1]) for i in range(num_layers)]  # each neighbour has one channel
    return tuple(two - ones - near for two, near in zip(twos, around, strict=True)), tuple(pairs)


def with_channels(config: ModelConfig, channels: Sequence[int]) -> ModelConfig:
    """Returns a description whose convolutions have other widths."""
    assert isinstance(config.frontend, ConvFrontendConfig)
    layers = tuple(replace(layer, channels=width) for layer, width in zip(config.frontend.layers, channels, strict=True))
    projection = replace(config.projection, feature_dim=channels[-1]) if config.projection.linear else config.projection
    return replace(config, frontend=replace(config.frontend, layers=layers), projection=projection)


def _with_block_sizes(config: ModelConfig, sizes: Mapping[tuple[int, str], int]) -> ModelConfig:
    """Returns a description whose blocks have only the heads and units that ``sizes`` names."""
    blocks = tuple(
        replace(
            block,
            num_heads=sizes.get((index, "heads"), 0),
            feedforward_dim=sizes.get((index, "feedforward"), 0),
            head_ids=None,  # which ones they are does not count
        )
        for index, block in enumerate(config.transformer.blocks)
    )
    return replace(config, encoder=replace(config.transformer, blocks=blocks))


def keeping_norms(config: ModelConfig, blocks: Container[int]) -> ModelConfig:
    """Returns a description in which these blocks keep the norms of parts that they lose (as in DPHuBERT), if post-norm.

    A block that lacks a part and its norm already stays as it is; it cannot lose the other part, see :func:`can_vanish`.
    """
    encoder = config.transformer
    if encoder.norm_placement == "pre":
        return config
    kept = tuple(
        replace(block, keep_norms=block.keep_norms or (index in blocks and _is_whole(block)))
        for index, block in enumerate(encoder.blocks)
    )
    return replace(config, encoder=replace(encoder, blocks=kept))


def can_vanish(encoder: EncoderConfig, block: BlockConfig) -> bool:
    """Whether a block can lose a whole part: its norm then stays (post-norm), or is not needed (pre-norm)."""
    return encoder.norm_placement == "pre" or block.keep_norms or _is_whole(block)


def _is_whole(block: BlockConfig) -> bool:
    return block.num_heads > 0 and block.feedforward_dim > 0
