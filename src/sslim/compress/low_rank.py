"""Low-rank factorisation: a linear map W (out, in) of rank r becomes two of r * (in + out) numbers, where that is fewer.

Every choice here projects what the map gives onto r directions, W' = U_r U_r^T W. Plain, they are the first left singular
vectors of W, and W' is the truncated SVD, the closest matrix of its rank (Eckart and Young 1936). Whitened, they are the
principal directions of what the map really gives on calibration speech, and W' is the matrix that changes that least:

    min E |(W x + b) - (W' x + b')|^2   over W' of rank r and all b'
      = sum of the eigenvalues after the r-th of W Cov(x) W^T,   with b' = b + (W - W') E x

It is the feature mimicking of Yu and Wu 2023, "Compressing Transformers: Features are low-rank, but weights are not!" (AAAI
37(9), algorithm 1), and, but for the mean that goes into the bias, the optimum that DRONE (Chen et al. 2021, NeurIPS) and the
whitened SVD of SVD-LLM (Wang et al. 2024, arXiv 2403.07378) reach by way of the inverse of a covariance's root. Written as a
projection nothing is inverted: covariances of any rank will do.

MelHuBERT's reference lists "low-rank approximation" among its methods and has no code for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sslim.compress.calibration import Calibration
from sslim.compress.importance import share_of
from sslim.compress.moments import Moments, Watched, gather_moments
from sslim.compress.rank_budget import Map, ranks_within
from sslim.config import nearest, to_plain
from sslim.models import ModelConfig, SpeechModel
from sslim.models.elastic import count_parameters
from sslim.models.speech import restore_statistics
from sslim.models.storage import require_float
from sslim.nn.encoder import BlockConfig, EncoderConfig
from sslim.nn.linear import FactoredLinear, whole_matrix

MAPS = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "output": "attention.output",
    "up": "feedforward.up",
    "down": "feedforward.down",
}
DAMPING = 1e-6  # of the weights' own energies beside those of speech: tells directions apart that speech never takes
ROUNDING = 1e-12  # share of the whole energy that counts as nothing
TINY = 1e-300  # in place of a sum that is zero


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Settings of low-rank factorisation; give one of ``ratio``, ``energy`` and ``params``.

    Attributes:
        ratio: Rank of every map as a share of the smaller of its widths, above 0 up to 1.
        energy: Share of the sum of squared singular values (whitened: of the variance of what the map gives) that every map
            keeps at least, above 0 up to 1.
        params: Share of the model's parameters, heads left out, that is left at most; ranks are chosen over all maps, so that
            each loses the least share of its energy for the parameters it saves.
        whiten: Whether directions are those of calibration speech instead of the weights' own.
        maps: Which maps of a block may be factored.
    """

    ratio: float | None = None
    energy: float | None = None
    params: float | None = None
    whiten: bool = False
    maps: tuple[str, ...] = tuple(MAPS)

    def __post_init__(self) -> None:
        given = {name: share for name in ("ratio", "energy", "params") if (share := getattr(self, name)) is not None}
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'none'} of ratio, energy and params is given; expected one of them")
        for name, share in given.items():
            if not 0 < share <= 1:
                raise ValueError(f"{name} is {share}; expected a share above 0 and up to 1")
        if unknown := [name for name in self.maps if name not in MAPS]:
            raise ValueError(f"there is no map {unknown[0]!r}{nearest(unknown[0], MAPS)}; there are {', '.join(MAPS)}")
        if not self.maps:
            raise ValueError(f"maps is empty; expected some of {', '.join(MAPS)}")


def maps_of(config: EncoderConfig, names: Sequence[str] = tuple(MAPS)) -> list[Map]:
    """Returns the linear maps of all blocks of these names, block after block."""
    maps = []
    for number, block in enumerate(config.blocks):
        for name in MAPS:
            in_dim, out_dim = _widths(config, block, name)
            if name in names and in_dim:
                rank = getattr(block.ranks, name)
                maps.append(Map(block=number, name=name, in_dim=in_dim, out_dim=out_dim, rank=rank))
    return maps


def factorize(model: SpeechModel, settings: LowRank, calibration: Calibration | None = None) -> SpeechModel:
    """Returns a model whose linear maps are factored where that makes them smaller.

    A map that is factored already is multiplied out and decomposed anew, unless its factors are the smaller ones. The two
    factors of a map share its scale evenly, which suits the training that should follow. The note in the provenance holds the
    rank of every map (None for whole ones) and the share of its energy that is left, block after block.

    Args:
        model: Any model; it stays as it is, and is no supernet afterwards.
        settings: Ranks.
        calibration: Speech for ``whiten``; every valid frame of all its features counts, at all depths of a shared block.

    Returns:
        The model in eval mode, with no more parameters than it had.

    Raises:
        ValueError: A quantised model, no calibration speech for ``whiten``, a budget below what rank 1 leaves, or weights or
            speech that are not finite.
    """
    maps = maps_of(model.config.transformer, settings.maps)
    spectrum = _spectra(model, settings, maps, calibration)
    ranks = _ranks(model.config, settings, maps, lambda part: spectrum(part).energies)
    state, left = dict(model.state_dict()), [1.0] * len(maps)
    for number, (part, rank) in enumerate(zip(maps, ranks, strict=True)):
        if rank != part.rank:
            taken = spectrum(part)
            state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{_path(part)}.")}
            state |= {f"{_path(part)}.{name}": tensor.float() for name, tensor in taken.tensors(rank).items()}
            left[number] = taken.left(rank)
    small = SpeechModel(_with_ranks(model.config, maps, ranks), model.provenance).to(next(model.parameters()).device)
    restore_statistics(small, state)
    small.load_state_dict(state, strict=True)
    small.provenance.append({"step": "low-rank", **to_plain(settings), **_note(maps, ranks, left)})
    return small.eval()


def low_rank_left(
    model: SpeechModel, settings: LowRank, calibration: Calibration | None = None
) -> Callable[[float], ModelConfig]:
    """Returns what :func:`factorize` leaves for any share of the parameters; every map is taken apart once.

    Args:
        model: Any model.
        settings: Maps and directions; their ``ratio``, ``energy`` and ``params`` do not count.
        calibration: Speech for ``whiten``.

    Raises:
        ValueError: As :func:`factorize`; the function that is returned, too.
    """
    maps = maps_of(model.config.transformer, settings.maps)
    spectrum = _spectra(model, settings, maps, calibration)
    energies = {part: spectrum(part).energies for part in maps}

    def left(params: float) -> ModelConfig:
        chosen = replace(settings, ratio=None, energy=None, params=params)
        return _with_ranks(model.config, maps, _ranks(model.config, chosen, maps, energies.__getitem__))

    return left


def least_share(config: ModelConfig, settings: LowRank) -> float:
    """Returns the smallest ``params`` that :func:`factorize` can leave: rank 1 everywhere that settings allow."""
    least = _least_parameters(config, maps_of(config.transformer, settings.maps))
    whole = count_parameters(config, with_heads=False)
    share = least / whole
    return share if int(share * whole) >= least else math.nextafter(share, 1.0)


def low_rank_config(config: ModelConfig, settings: LowRank) -> ModelConfig:
    """Returns the description of what :func:`factorize` leaves with a ``ratio``, found without a model or data.

    Raises:
        ValueError: Ranks that singular values decide.
    """
    if settings.ratio is None:
        raise ValueError("with energy or params the ranks depend on singular values; with ratio they are known beforehand")
    maps = maps_of(config.transformer, settings.maps)
    return _with_ranks(config, maps, _ranks(config, settings, maps))


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """A map taken apart; float64 on the CPU.

    Attributes:
        weight: (out, in) the whole matrix.
        bias: (out,).
        directions: (out, k) orthonormal directions of what it gives, the strongest first; k is the smaller width.
        energies: (k,) squared singular values, whitened or not, falling.
        shift: (out,) the mean of ``weight @ x``; zero where speech has not been looked at.
    """

    weight: Tensor
    bias: Tensor
    directions: Tensor
    energies: Tensor
    shift: Tensor

    def left(self, rank: int | None) -> float:
        """Returns the share of the energy that the first ``rank`` directions hold; 1 where there is none at all."""
        total = float(self.energies.sum())
        return float(self.energies[:rank].sum()) / total if total else 1.0

    def tensors(self, rank: int | None) -> dict[str, Tensor]:
        """Returns the tensors of a linear layer (None), or of a factored one: inner and outer have equal singular values."""
        if rank is None:
            return {"weight": self.weight, "bias": self.bias}
        kept_OR = self.directions[:, :rank]
        left, values, right = torch.linalg.svd(kept_OR.T @ self.weight, full_matrices=False)
        bias = self.bias + self.shift - kept_OR @ (kept_OR.T @ self.shift)
        inner, outer = values.sqrt()[:, None] * right, kept_OR @ left * values.sqrt()
        return {"inner.weight": inner, "outer.weight": outer, "outer.bias": bias}


def decompose(weight: Tensor, bias: Tensor, moments: Moments | None = None) -> Spectrum:
    """Takes a map apart.

    Args:
        weight: (out, in).
        bias: (out,).
        moments: Of what the map takes, or of what it gives if that is narrower; None for the truncated SVD.
    """
    weight, bias = weight.detach().double().cpu(), bias.detach().double().cpu()
    basis, reduced = None, weight
    if len(weight) > weight.shape[1]:  # what a tall matrix gives lies in the space of its columns
        basis, reduced = torch.linalg.qr(weight)
    gram, shift = reduced @ reduced.T, torch.zeros_like(bias)
    if moments is not None:
        of_input = moments.watched.of_input
        shift = weight @ moments.mean if of_input else moments.mean - bias
        spread = reduced @ moments.covariance @ reduced.T if of_input else moments.covariance
        damping = DAMPING * float(spread.trace()) / max(float(gram.trace()), TINY)
        gram = spread + (damping or 1.0) * gram  # speech that never varies tells nothing: the plain directions
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return Spectrum(
        weight=weight,
        bias=bias,
        directions=vectors.flip(1) if basis is None else basis @ vectors.flip(1),
        energies=values.flip(0).clamp(min=0.0),
        shift=shift,
    )


def _spectra(
    model: SpeechModel, settings: LowRank, maps: Sequence[Map], calibration: Calibration | None
) -> Callable[[Map], Spectrum]:
    """Takes maps apart one by one. Nothing is kept: in float64 all of them together are twice the model and more."""
    require_float(model)
    if settings.whiten and calibration is None:
        raise ValueError("whitened factors need calibration speech, but there is none: name a corpus, or leave out whiten")
    seen: dict[Watched, Moments] = {}
    if settings.whiten and calibration is not None:
        seen = gather_moments(model, {_watched(part) for part in maps}, calibration)
    return lambda part: _spectrum(model, part, seen.get(_watched(part)))


def _spectrum(model: SpeechModel, part: Map, moments: Moments | None) -> Spectrum:
    module = model.get_submodule(_path(part))
    assert isinstance(module, nn.Linear | FactoredLinear)
    weight, bias = whole_matrix(module)
    if not bool(torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise ValueError(f"{_path(part)} is not finite: the model is broken")
    return decompose(weight, bias, moments)


def _path(part: Map) -> str:
    return f"encoder.blocks.{part.block}.{MAPS[part.name]}"


def _watched(part: Map) -> Watched:
    """What speech has to be seen of for a map: the narrower side of it; query, key and value are given the same."""
    of_input = part.in_dim <= part.out_dim
    same = of_input and part.name in ("key", "value")
    return Watched(path=_path(replace(part, name="query") if same else part), of_input=of_input)


def _widths(config: EncoderConfig, block: BlockConfig, name: str) -> tuple[int, int]:
    """Input and output width of a map; (0, 0) where the block has no such part."""
    hidden = block.feedforward_dim if name in ("up", "down") else block.num_heads * block.head_dim
    if not hidden:
        return 0, 0
    return (hidden, config.dim) if name in ("output", "down") else (config.dim, hidden)


def _ranks(
    config: ModelConfig, settings: LowRank, maps: Sequence[Map], energies: Callable[[Map], Tensor] | None = None
) -> list[int | None]:
    """Returns the rank that every map gets, None for whole ones; the energies of a map are asked for where they decide."""
    if settings.ratio is not None:
        return [part.at(share_of(settings.ratio, min(part.in_dim, part.out_dim))) for part in maps]
    assert energies is not None
    if settings.energy is not None:
        return [part.at(_rank_for(settings.energy, energies(part))) for part in maps]
    assert settings.params is not None
    whole = count_parameters(config, with_heads=False)
    fixed = whole - sum(part.size(part.rank) for part in maps)
    least, budget = _least_parameters(config, maps), int(settings.params * whole)
    if least > budget:
        raise ValueError(
            f"params is {settings.params}, but rank 1 everywhere leaves {least:,} of {whole:,} parameters; expected at least "
            f"{math.ceil(1000 * least / whole) / 1000:g}"
        )
    return ranks_within(maps, [_shares(energies(part)) for part in maps], budget - fixed)


def _least_parameters(config: ModelConfig, maps: Sequence[Map]) -> int:
    """Parameters without heads when every map is as thin as it can be."""
    saved = sum(part.size(part.rank) - min(part.size(1), part.size(part.form)) for part in maps)
    return count_parameters(config, with_heads=False) - saved


def _rank_for(share: float, energies: Tensor) -> int:
    """Returns the smallest rank that keeps a share of the energy."""
    kept = energies.cumsum(0)
    return max(1, int((kept < (share - ROUNDING) * kept[-1]).sum()) + 1) if float(kept[-1]) else 1


def _shares(energies: Tensor) -> list[float]:
    return (energies / max(float(energies.sum()), TINY)).tolist()


def _with_ranks(config: ModelConfig, maps: Sequence[Map], ranks: Sequence[int | None]) -> ModelConfig:
    blocks = list(config.transformer.blocks)
    for part, rank in zip(maps, ranks, strict=True):
        block = blocks[part.block]
        blocks[part.block] = replace(block, ranks=replace(block.ranks, **{part.name: rank}))
    return replace(config, encoder=replace(config.transformer, blocks=tuple(blocks)), search_space=None)


def _note(maps: Sequence[Map], ranks: Sequence[int | None], left: Sequence[float]) -> dict[str, Any]:
    """Returns the rank and the energy of every map for the provenance, one dictionary for each block."""
    num_blocks = max((part.block for part in maps), default=-1) + 1
    noted: dict[str, list[dict[str, Any]]] = {key: [{} for _ in range(num_blocks)] for key in ("ranks", "energy_left")}
    for part, rank, share in zip(maps, ranks, left, strict=True):
        noted["ranks"][part.block][part.name] = rank
        noted["energy_left"][part.block][part.name] = round(share, 6)
    return noted
