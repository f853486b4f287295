"""Search spaces of supernets: which widths, heads, feed-forward units and depths a subnet may have.

A :class:`Subnet` says how large each part is; :func:`units_of` says which units those are, in the form that the one slicing
rule (``sslim.nn.slicing``) takes. Layers are counted by kept depth: the first entry of a per-layer tuple is the first layer
that runs, whichever layer of the supernet that is.

Windows are exact bands, unless a LightHuBERT dictionary asks for its own (``slide_wsz``): see ``Subnet.window_rule``.

Source: LightHuBERT (Wang et al., Interspeech 2022) and its released search spaces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

from sslim.config import from_plain, nearest
from sslim.nn.encoder import EncoderConfig
from sslim.nn.positions import ConvPositionsConfig
from sslim.nn.slicing import Units
from sslim.nn.windows import WindowRule

FeedforwardRule = Literal["prefix", "blocks"]


@dataclass(frozen=True, kw_only=True)
class Subnet:
    """The sizes of one subnet.

    Attributes:
        dim: Model width, one for the whole net.
        num_heads: Attention heads of each kept layer, in the order in which they run.
        feedforward_dims: Feed-forward units of each kept layer.
        windows: Attention window of each kept layer, frames on each side, None for all; None as a whole: as in the supernet.
        window_rule: How ``windows`` attend: ``band``, to exactly these frames, or ``lighthubert``, as LightHuBERT's faulty code
            does (``sslim.nn.reference_windows``); its ``slide_wsz`` is read as the latter.
    """

    dim: int
    num_heads: tuple[int, ...]
    feedforward_dims: tuple[int, ...]
    windows: tuple[int | None, ...] | None = None
    window_rule: WindowRule = "band"

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim {self.dim} of the subnet is not at least 1")
        lists = [("feedforward_dims", self.feedforward_dims)]
        lists += [("windows", self.windows)] if self.windows is not None else []  # type: ignore[list-item]
        for name, values in lists:
            if len(values) != len(self.num_heads):
                raise ValueError(f"the subnet has num_heads for {len(self.num_heads)} layers, but {name} for {len(values)}")
        for name, values in [("num_heads", self.num_heads), *lists]:
            if wrong := [value for value in values if value is not None and value < 0]:
                raise ValueError(f"{name} of the subnet holds {wrong[0]}; the least is 0")
        if self.window_rule != "band" and (self.windows is None or all(window is None for window in self.windows)):
            raise ValueError(f"window_rule of the subnet is {self.window_rule!r}, but no layer has a window; expected 'band'")

    @property
    def num_layers(self) -> int:
        """Kept layers."""
        return len(self.num_heads)


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """What the subnets of a supernet can be.

    Attributes:
        dims: Model widths.
        num_heads: Attention heads of a layer.
        feedforward_ratios: Feed-forward units of a layer over the model width; the product is rounded down.
        num_layers: Depths.
        kept_layers: For a number of layers (as text), the depths of the supernet that are kept, counted from 0; None for the
            first ones.
        feedforward_rule: Which feed-forward units a subnet has: ``prefix``, the first ones; ``blocks``, LightHuBERT's, see
            :func:`feedforward_units`.
        depth_map: The encoder's ``depth_map`` where layers share blocks; a shared block is chosen once. None for an encoder
            whose layers are all its own.
        default: The subnet to load when none is asked for.
    """

    dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    feedforward_ratios: tuple[float, ...]
    num_layers: tuple[int, ...]
    kept_layers: dict[str, tuple[int, ...]] | None = None
    feedforward_rule: FeedforwardRule = "prefix"
    depth_map: tuple[int, ...] | None = None
    default: Subnet | None = None

    def __post_init__(self) -> None:
        for name in ("dims", "num_heads", "feedforward_ratios", "num_layers"):
            choices = getattr(self, name)
            if not choices or len(set(choices)) < len(choices) or min(choices) <= 0:
                raise ValueError(f"{name} of the search space is {choices}; it needs distinct values above 0")
        for key, depths in (self.kept_layers or {}).items():
            if str(len(depths)) != key or list(depths) != sorted(set(depths)):
                raise ValueError(f"kept_layers[{key!r}] is {depths}; it needs {key} distinct depths in rising order")
        for number in self.num_layers:
            self.kept_depths(number)

    def kept_depths(self, num_layers: int) -> tuple[int, ...]:
        """Returns the depths of the supernet, from 0, that a subnet of ``num_layers`` layers keeps.

        Raises:
            ValueError: ``kept_layers`` has no list for this number.
        """
        if self.kept_layers is None:
            return tuple(range(num_layers))
        if str(num_layers) not in self.kept_layers:
            known = ", ".join(self.kept_layers)
            raise ValueError(f"{num_layers} layers are asked for, but the space says which layers to keep for {known} only")
        return self.kept_layers[str(num_layers)]

    def blocks(self, num_layers: int) -> tuple[int, ...]:
        """Returns which block each kept layer runs; layers of one block have one choice between them."""
        depths = self.kept_depths(num_layers)
        if self.depth_map is None:
            return depths
        if depths and depths[-1] >= len(self.depth_map):
            raise ValueError(f"the subnet keeps layer {depths[-1] + 1}, the supernet has {len(self.depth_map)}")
        return tuple(self.depth_map[depth] for depth in depths)

    def feedforward_dims(self, dim: int) -> tuple[int, ...]:
        """Returns the feed-forward widths that a layer can have at model width ``dim``."""
        return tuple(int(ratio * dim) for ratio in self.feedforward_ratios)

    def num_subnets(self) -> int:
        """Counts the subnets: every width with every depth and every choice of heads and ratio for every block."""
        per_block = len(self.num_heads) * len(self.feedforward_ratios)
        return len(self.dims) * sum(per_block ** len(set(self.blocks(number))) for number in self.num_layers)

    def uniform(self, dim: int, num_heads: int, feedforward_ratio: float, num_layers: int) -> Subnet:
        """Returns the subnet whose layers are all alike."""
        return Subnet(
            dim=dim, num_heads=(num_heads,) * num_layers, feedforward_dims=(int(feedforward_ratio * dim),) * num_layers
        )

    def largest(self) -> Subnet:
        """Returns the subnet with the most of everything."""
        return self.uniform(max(self.dims), max(self.num_heads), max(self.feedforward_ratios), max(self.num_layers))

    def smallest(self) -> Subnet:
        """Returns the subnet with the least of everything."""
        return self.uniform(min(self.dims), min(self.num_heads), min(self.feedforward_ratios), min(self.num_layers))

    def sample(self, generator: torch.Generator) -> Subnet:
        """Draws depth and width, then ratio and heads of every block, each uniformly from its choices.

        So it is uniform over each choice, not over subnets (``sample_subnet`` of LightHuBERT).
        """

        def one_of(choices: Sequence[Any]) -> Any:
            return choices[int(torch.randint(len(choices), (), generator=generator))]

        num_layers, dim = one_of(self.num_layers), one_of(self.dims)
        blocks = self.blocks(num_layers)
        chosen = {block: (one_of(self.feedforward_ratios), one_of(self.num_heads)) for block in dict.fromkeys(blocks)}
        return Subnet(
            dim=dim,
            num_heads=tuple(chosen[block][1] for block in blocks),
            feedforward_dims=tuple(int(chosen[block][0] * dim) for block in blocks),
        )

    def contains(self, subnet: Subnet) -> bool:
        """Whether the subnet is one of this space's: all its sizes are choices, one for each block, and no window differs."""
        if subnet.dim not in self.dims or subnet.num_layers not in self.num_layers or subnet.windows is not None:
            return False
        widths = self.feedforward_dims(subnet.dim)
        layers = list(zip(self.blocks(subnet.num_layers), subnet.num_heads, subnet.feedforward_dims, strict=True))
        one_choice = len(set(layers)) == len({block for block, _, _ in layers})
        return one_choice and all(heads in self.num_heads and units in widths for _, heads, units in layers)

    def subnet(self, choice: str | Mapping[str, Any]) -> Subnet:
        """Returns the subnet that a user names.

        Args:
            choice: ``default``, ``max``, ``min``, the fields of :class:`Subnet`, or LightHuBERT's dictionary (``embed_dim``,
                ``heads_num``, ``ffn_embed`` or ``ffn_ratio``, ``layer_num``, ``atten_dim``, ``slide_wsz`` of ``"global"`` or an
                even number of frames). ``slide_wsz`` asks for LightHuBERT's own windows, faults included, as a net trained with
                them needs; ``windows`` of :class:`Subnet` for the exact band, half as many frames on each side. A dictionary
                may lie outside the space: what the tensors hold decides (``units_of``).

        Raises:
            ValueError: Another name, an unknown key, lists of different lengths, or a default that the space does not have.
        """
        if isinstance(choice, Mapping):
            plain = dict(choice)
            subnet = _read_lighthubert(plain) if _LIGHTHUBERT_KEYS & plain.keys() else from_plain(Subnet, plain, "subnet")
            self.blocks(subnet.num_layers)
            return subnet
        if choice == "default" and self.default is None:
            raise ValueError("this supernet has no default subnet; ask for 'max', 'min' or a dictionary of sizes")
        named = {"default": lambda: self.default, "max": self.largest, "min": self.smallest}
        if choice not in named:
            known = ", ".join(named)
            raise ValueError(f"no subnet {choice!r}{nearest(str(choice), named)}; there are {known}, or a dictionary")
        return named[choice]()  # type: ignore[return-value]

    def check(self, config: EncoderConfig) -> None:
        """Checks that an encoder can hold every subnet of the space, and the default.

        Raises:
            ValueError: What does not fit.
        """
        repeated = len(set(config.depth_map)) < config.num_layers
        if (repeated or self.depth_map is not None) and self.depth_map != config.depth_map:
            raise ValueError(
                f"the encoder's layers run the blocks {config.depth_map}, so the search space needs the same depth_map, "
                f"not {self.depth_map}"
            )
        subnets = [
            self.uniform(dim, max(self.num_heads), max(self.feedforward_ratios), number)
            for dim in self.dims
            for number in self.num_layers
        ]
        for subnet in [*subnets, *([] if self.default is None else [self.default])]:
            units_of(config, self, subnet).check(config)


_LIGHTHUBERT_KEYS = {"atten_dim", "embed_dim", "ffn_embed", "ffn_ratio", "heads_num", "layer_num", "slide_wsz"}
_LIGHTHUBERT_HEAD_DIM = 64


def _window(size: Any) -> int | None:
    if size == "global":
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size < 1 or size % 2:
        raise ValueError(f"slide_wsz of the subnet holds {size!r}; expected 'global' or an even number of frames above 0")
    return size // 2


def _read_lighthubert(values: dict[str, Any]) -> Subnet:
    """Reads the dictionary that LightHuBERT's ``sample_subnet`` gives and ``set_sample_config`` takes."""
    accepted = sorted(_LIGHTHUBERT_KEYS)
    if unknown := sorted(values.keys() - _LIGHTHUBERT_KEYS):
        raise ValueError(f"subnet has no key {unknown[0]!r}{nearest(unknown[0], accepted)}; there are {', '.join(accepted)}")
    if missing := [key for key in ("embed_dim", "heads_num") if key not in values]:
        raise ValueError(f"subnet lacks the key {missing[0]!r}")
    if "ffn_embed" not in values and "ffn_ratio" not in values:
        raise ValueError("subnet lacks the key 'ffn_embed' (or 'ffn_ratio')")
    dim, heads = values["embed_dim"], values["heads_num"]
    lists = {key: values[key] for key in accepted if key in values and key not in ("embed_dim", "layer_num")}
    for key, items in lists.items():
        if not isinstance(items, list | tuple):
            raise ValueError(f"{key} of the subnet is {items!r}; expected a list with a value for each layer")
    for key, items in lists.items():
        if len(items) != (num_layers := values.get("layer_num", len(heads))):
            raise ValueError(f"{key} of the subnet has {len(items)} values, expected one for each of {num_layers} layers")
        if wrong := [item for item in items if item != "global" and not isinstance(item, int | float)]:
            raise ValueError(f"{key} of the subnet holds {wrong[0]!r}; expected numbers")
    if not isinstance(dim, int):
        raise ValueError(f"embed_dim of the subnet is {dim!r}; expected a whole number")
    widths = [_LIGHTHUBERT_HEAD_DIM * number for number in heads]
    if list(lists.get("atten_dim", widths)) != widths:
        raise ValueError(f"atten_dim of the subnet is {lists['atten_dim']}; {heads} heads of 64 need {widths}")
    windows = tuple(_window(size) for size in lists.get("slide_wsz", ()))
    units = lists["ffn_embed"] if "ffn_embed" in lists else [int(ratio * dim) for ratio in lists["ffn_ratio"]]
    plain = {"dim": dim, "num_heads": list(heads), "feedforward_dims": list(units)}
    if any(window is not None for window in windows):
        plain |= {"windows": list(windows), "window_rule": "lighthubert"}
    return from_plain(Subnet, plain, "subnet")


@lru_cache(maxsize=4096)  # a search asks for the same few thousands of times
def feedforward_units(rule: FeedforwardRule, supernet_dim: int, num_units: int, dim: int, count: int) -> tuple[int, ...]:
    """Returns which of a block's feed-forward units a subnet has.

    ``prefix``: the first ``count``. ``blocks``: the units lie in blocks of ``supernet_dim``; the first ``dim`` units of each
    block in turn, the first ``count`` of these (LightHuBERT's ``SLinear`` with splits, in whole numbers: its float division is
    off by one for some sizes).

    Args:
        rule: Which rule.
        supernet_dim: Model width of the supernet.
        num_units: Feed-forward units of the supernet's block.
        dim: Model width of the subnet.
        count: Feed-forward units of the subnet's layer.

    Raises:
        ValueError: The block has fewer.
    """
    block = supernet_dim if rule == "blocks" else max(num_units, 1)
    width = dim if rule == "blocks" else block
    blocks = range(math.ceil(num_units / block))
    units = tuple(unit for start in blocks for unit in range(start * block, min(start * block + width, num_units)))
    if count > len(units):
        at = f" at width {dim}" if rule == "blocks" else ""
        raise ValueError(f"{count} feed-forward units are asked for, the supernet has {len(units)}{at}")
    return units[:count]


def _once_per_block(name: str, blocks: Sequence[int], values: Sequence[Any]) -> dict[int, Any]:
    """Returns the one choice for each block."""
    chosen: dict[int, Any] = {}
    for layer, (block, value) in enumerate(zip(blocks, values, strict=True)):
        if chosen.setdefault(block, value) != value:
            first = blocks.index(block)
            raise ValueError(
                f"layers {first + 1} and {layer + 1} of the subnet share a block, so they need the same {name}, "
                f"not {chosen[block]} and {value}"
            )
    return chosen


def units_of(config: EncoderConfig, space: SearchSpace | FeedforwardRule, subnet: Subnet) -> Units:
    """Returns the units of an encoder that make up a subnet.

    Args:
        config: The supernet's encoder.
        space: Its search space, or a feed-forward rule alone (then a shallower subnet keeps the first layers).
        subnet: The sizes; they need not be among the space's choices.

    Raises:
        ValueError: A size that the encoder does not have, or layers that share a block and differ.
    """
    rule = space if isinstance(space, str) else space.feedforward_rule
    depths = tuple(range(subnet.num_layers)) if isinstance(space, str) else space.kept_depths(subnet.num_layers)
    if depths and depths[-1] >= config.num_layers:
        raise ValueError(f"the subnet keeps layer {depths[-1] + 1}, the supernet has {config.num_layers}")
    if subnet.dim > config.dim:
        raise ValueError(f"dim {subnet.dim} of the subnet is more than the supernet's {config.dim}")
    positions = config.positions
    if isinstance(positions, ConvPositionsConfig) and subnet.dim % positions.groups:
        raise ValueError(f"dim {subnet.dim} of the subnet is not divisible by the {positions.groups} groups of the positions")
    blocks = [config.depth_map[depth] for depth in depths]
    heads = _once_per_block("number of heads", blocks, subnet.num_heads)
    rows = _once_per_block("feed-forward units", blocks, subnet.feedforward_dims)
    kept_heads, kept_rows = [], []
    for b, block in enumerate(config.blocks):
        if heads.get(b, 0) > block.num_heads:
            layer = blocks.index(b) + 1
            raise ValueError(f"layer {layer} of the subnet: {heads[b]} heads are asked for, the supernet has {block.num_heads}")
        kept_heads.append(tuple(range(heads.get(b, 0))))
        try:
            kept_rows.append(feedforward_units(rule, config.dim, block.feedforward_dim, subnet.dim, rows.get(b, 0)))
        except ValueError as error:
            raise ValueError(f"layer {blocks.index(b) + 1} of the subnet: {error}") from None
    windows = None
    if subnet.windows is not None:
        chosen = _once_per_block("window", blocks, subnet.windows)
        windows = tuple(chosen.get(b, block.attention_window) for b, block in enumerate(config.blocks))
    return Units(
        channels=tuple(range(subnet.dim)),
        heads=tuple(kept_heads),
        feedforward=tuple(kept_rows),
        depths=depths,
        windows=windows,
        window_rule=subnet.window_rule,
    )


# Layers that LightHuBERT keeps at each depth (its layer-dropping masks).
_LIGHTHUBERT_KEPT: dict[str, tuple[int, ...]] = {
    "6": (0, 1, 4, 5, 8, 9),
    "7": (0, 1, 2, 4, 5, 8, 9),
    "8": (0, 1, 2, 4, 5, 6, 8, 9),
    "9": (0, 1, 2, 4, 5, 6, 8, 9, 10),
    "10": (0, 1, 2, 3, 4, 5, 6, 8, 9, 10),
    "11": tuple(range(11)),
    "12": tuple(range(12)),
}

LIGHTHUBERT_BASE = SearchSpace(
    dims=(512, 640, 768),
    num_heads=(8, 10, 12),
    feedforward_ratios=(3.5, 4.0),
    num_layers=(12,),
    kept_layers=_LIGHTHUBERT_KEPT,
    feedforward_rule="blocks",
    default=Subnet(dim=640, num_heads=(10,) * 12, feedforward_dims=(2560,) * 12),
)
LIGHTHUBERT_SMALL = SearchSpace(
    dims=(256, 384, 512),
    num_heads=(4, 6, 8),
    feedforward_ratios=(3.0, 3.5, 4.0),
    num_layers=(10, 11, 12),
    kept_layers=_LIGHTHUBERT_KEPT,
    feedforward_rule="blocks",
    default=Subnet(dim=384, num_heads=(6,) * 12, feedforward_dims=(1536,) * 12),
)
SPACES = {"lighthubert-base": LIGHTHUBERT_BASE, "lighthubert-small": LIGHTHUBERT_SMALL}
