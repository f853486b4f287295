"""Head pruning: attention heads of little worth are taken out, rows of query, key and value and columns of the output map.

The methods of the MelHuBERT compression study (Lin et al., arXiv 2211.09949; ``hp_utils.py``): scores by L1 norm or from data,
in every layer the same share or the worst of the whole model. Deliberately otherwise than there: scores have no dropout and no
random masks and see all calibration speech (``importance``); one call is one round from whatever model it is given, pruned
ones included; and what is left keeps its original numbers through all rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from sslim.compress.calibration import Calibration
from sslim.compress.importance import (
    Chosen,
    Scores,
    best_of_all,
    best_of_each,
    check_amount,
    head_sensitivities,
    head_weights,
    normalized,
    share_of,
)
from sslim.compress.origins import cut, origins
from sslim.config import to_plain
from sslim.models import ModelConfig, SpeechModel
from sslim.models.elastic import slice_model_config
from sslim.nn.encoder import BlockConfig
from sslim.nn.slicing import Units


@dataclass(frozen=True, kw_only=True)
class HeadPruning:
    """Settings of head pruning; give one of ``keep`` and ``num_kept``.

    Attributes:
        keep: Share of the heads that is kept, above 0 up to 1; of each layer or of the whole model, by ``scope``. Every layer
            keeps at least one head.
        num_kept: Heads that are kept, in each layer or in the whole model; a layer with fewer keeps all of them.
        scope: ``layer``: the best heads of every layer (``by_layer`` in the reference); ``model``: the best of every layer,
            then the best of all (``by_whole``). Layers that share a block count as one.
        score: ``l1``: rows of query, key and value and their biases; ``l1-output``: the columns of the output map too;
            ``data``: the loss on calibration speech (``data-driven``).
        normalize: With scope ``model``, the p of the p-norm of a layer's scores that they are divided by
            (``normalize_by_layer``); None compares them as they are, though layers differ in scale.
    """

    keep: float | None = None
    num_kept: int | None = None
    scope: Literal["layer", "model"] = "layer"
    score: Literal["l1", "l1-output", "data"] = "l1"
    normalize: float | None = 2.0

    def __post_init__(self) -> None:
        check_amount(self.keep, self.num_kept)
        if self.normalize is not None and not self.normalize >= 1:
            raise ValueError(f"normalize is {self.normalize}; expected the p of a norm, at least 1, or None")


def prune_heads(model: SpeechModel, settings: HeadPruning, calibration: Calibration | None = None) -> SpeechModel:
    """Returns a model with fewer attention heads: one round of pruning.

    Blocks without attention stay as they are. The note in the provenance names the heads that were removed and those that are
    left by their original numbers, from 0 (see ``origins``).

    Args:
        model: Any model; it stays as it is.
        settings: How many heads, and which.
        calibration: Speech with a loss, for the score ``data``.

    Returns:
        A physically smaller model in eval mode. It computes what the given model computes with the context of the removed heads
        at zero.

    Raises:
        ValueError: A number of heads that the model cannot keep, data scores without a loss, scores that are not finite, or a
            block with LightHuBERT's windows, whose faults make heads depend on one another.
    """
    counts = [block.num_heads for block in model.config.transformer.blocks]
    _check_number(settings, counts)
    kept = _choose(_scores(model, settings, calibration), settings)
    _check_independence(model.config.transformer.blocks, kept)
    units = replace(Units.full(model.config.transformer), heads=kept)
    return cut(model, units, {"step": "heads", **to_plain(settings), "removed_heads": removed_heads(model, kept)})


def heads_kept(model: SpeechModel, settings: HeadPruning, calibration: Calibration | None = None) -> Callable[[float], Chosen]:
    """Returns which heads of each block :func:`prune_heads` keeps for any share; the model is looked at once.

    Args:
        model: Any model.
        settings: Scope and scores; their ``keep`` and ``num_kept`` do not count.
        calibration: Speech with a loss, for the score ``data``.

    Raises:
        ValueError: As :func:`prune_heads`; the function that is returned, too.
    """
    scores, blocks = _scores(model, settings, calibration), model.config.transformer.blocks

    def kept(keep: float) -> Chosen:
        chosen = _choose(scores, replace(settings, keep=keep, num_kept=None))
        _check_independence(blocks, chosen)
        return chosen

    return kept


def removed_heads(model: SpeechModel, kept: Chosen) -> list[list[int]]:
    """Returns the original numbers of each block's heads that are not among those kept, for the provenance."""
    return [[ids[h] for h in range(len(ids)) if h not in part] for ids, part in zip(origins(model).heads, kept, strict=True)]


def heads_config(config: ModelConfig, settings: HeadPruning) -> ModelConfig:
    """Returns a description with the sizes that :func:`prune_heads` leaves, found without a model or data.

    With scope ``layer`` it is the description itself, but for the numbers of heads in a table of relative positions. With scope
    ``model`` scores decide how many heads each layer keeps; the description spreads them evenly and has the right number of
    parameters.

    Raises:
        ValueError: As :func:`prune_heads`; and with scope ``model`` where heads of one layer have more parameters than those of
            another, so that the number of parameters depends on scores.
    """
    blocks = config.transformer.blocks
    counts = [block.num_heads for block in blocks]
    _check_number(settings, counts)
    if settings.scope == "model" and len({_head_cost(block) for block in blocks if block.num_heads}) > 1:
        raise ValueError("heads differ in width or rank between layers: with scope 'model' the size left depends on scores")
    kept = _choose(tuple(-torch.arange(count, dtype=torch.float64) for count in counts), replace(settings, normalize=None))
    _check_independence(blocks, kept)
    return slice_model_config(config, replace(Units.full(config.transformer), heads=kept))


def surviving_heads(model: SpeechModel) -> Chosen:
    """Returns for each block the original numbers, from 0, of the heads that are left after all rounds of pruning.

    Which original block each block is: ``origins(model).blocks``.
    """
    return origins(model).heads


def _scores(model: SpeechModel, settings: HeadPruning, calibration: Calibration | None) -> Scores:
    if settings.score == "data":
        return head_sensitivities(model, calibration)
    return head_weights(model, with_output=settings.score == "l1-output")


def _choose(scores: Scores, settings: HeadPruning) -> Chosen:
    counts = [len(part) for part in scores]
    keep, num_kept = settings.keep, settings.num_kept
    if settings.scope == "layer":
        wanted = [share_of(keep, count) if keep is not None else min(num_kept or 0, count) for count in counts]
        return best_of_each(scores, wanted)
    total = share_of(keep, sum(counts)) if keep is not None else num_kept or 0
    return best_of_all(normalized(scores, settings.normalize), total)


def _check_number(settings: HeadPruning, counts: Sequence[int]) -> None:
    """Refuses a number of heads that the layers do not have or cannot go down to."""
    if settings.num_kept is None:
        return
    if settings.scope == "layer":
        low, high, where = 1, max(counts, default=0), "the layer with most heads has"
    else:
        low, high, where = sum(count > 0 for count in counts), sum(counts), "the model has"
    if not low <= settings.num_kept <= high:
        raise ValueError(f"num_kept is {settings.num_kept}, but {where} {high} heads; expected {low} to {high}")


def _check_independence(blocks: Sequence[BlockConfig], kept: Chosen) -> None:
    """Refuses to take heads from a block where that would change the others (``sslim.nn.reference_windows``, rule 2)."""
    for number, (block, heads) in enumerate(zip(blocks, kept, strict=True)):
        if block.has_reference_windows and len(heads) < block.num_heads:
            raise ValueError(
                f"block {number} has window_rule 'lighthubert', with which heads depend on one another and none can be "
                "removed; expected 'band'"
            )


def _head_cost(block: BlockConfig) -> tuple[int | None, ...]:
    ranks = block.ranks
    return block.head_dim, ranks.query, ranks.key, ranks.value, ranks.output
