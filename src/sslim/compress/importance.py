"""What heads and feed-forward units are worth, and the choice of the best ones.

Scores are one float64 tensor on the CPU for each block, empty where the block has no such part. Layers that share a block have
one score between them: what its applications are worth adds up.

Two kinds of scores, after the MelHuBERT compression study (Lin et al., arXiv 2211.09949). The second kind is there for heads
alone; it is that of Michel et al. 2019, "Are sixteen heads really better than one?" (arXiv 1905.10650), and for units the
first-order Taylor criterion of Molchanov et al. 2017 (arXiv 1611.06440):

- sizes of weights, which need no data;
- sensitivities: to first order, the change of the loss when a part's output is taken away, ``|output . dL/d output|``, summed
  over frames. The reference measures it in training mode, on a random quarter of the batches, with masks and dropout drawn
  anew; here the model is in eval mode, masks are fixed and every batch counts by its share of the mean loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sslim.compress.calibration import Calibration
from sslim.models import SpeechModel
from sslim.nn.encoder import Block
from sslim.nn.linear import FactoredLinear, whole_matrix

Scores = tuple[Tensor, ...]
Chosen = tuple[tuple[int, ...], ...]

EPSILON = 1e-20  # of the norm that scores are divided by, as in the reference


def head_weights(model: SpeechModel, *, with_output: bool = False) -> Scores:
    """Scores heads by the L1 norm of their rows of the query, key and value maps, biases included.

    Of a factored map it is the product that counts.

    Args:
        model: The model.
        with_output: Whether the head's columns of the output map count too; they do not in the reference.
    """
    scores = []
    for described, block in zip(model.config.transformer.blocks, _blocks(model), strict=True):
        if block.attention is None:
            scores.append(_empty())
            continue
        rows = sum(_row_sizes(part) for part in (block.attention.query, block.attention.key, block.attention.value))
        if with_output:
            rows = rows + _column_sizes(block.attention.output)
        scores.append(rows.unflatten(0, (described.num_heads, described.head_dim)).sum(1))  # type: ignore[union-attr]
    return _finite(scores, "heads")


def unit_weights(model: SpeechModel) -> Scores:
    """Scores feed-forward units by the L1 norm of their row of the first map, its bias, and their column of the second."""
    parts = [block.feedforward for block in _blocks(model)]
    sizes = [_empty() if part is None else _row_sizes(part.up) + _column_sizes(part.down) for part in parts]
    return _finite(sizes, "feed-forward units")


def head_sensitivities(model: SpeechModel, calibration: Calibration | None) -> Scores:
    """Scores heads by how the loss reacts to their context ``c`` (attention output before the output map).

    It is the sum over frames of ``|sum_d c_d dL/dc_d|``, for the mean loss over all calibration speech.

    Args:
        model: The model; its mode, its gradients and its random state stay as they are.
        calibration: Its ``losses`` count, all of them.

    Raises:
        ValueError: There are no losses, or a score is not finite.
    """
    watched = [None if block.attention is None else block.attention.output for block in _blocks(model)]
    shapes = [(block.num_heads, block.head_dim) for block in model.config.transformer.blocks]
    return _finite(_sensitivities(model, calibration, watched, shapes), "heads")


def unit_sensitivities(model: SpeechModel, calibration: Calibration | None) -> Scores:
    """Scores feed-forward units by how the loss reacts to what they pass on (``h``, after the activation).

    It is the sum over frames of ``|h dL/dh|``, for the mean loss over all calibration speech.

    Args:
        model: The model; its mode, its gradients and its random state stay as they are.
        calibration: Its ``losses`` count, all of them.

    Raises:
        ValueError: There are no losses, or a score is not finite.
    """
    watched = [None if block.feedforward is None else block.feedforward.down for block in _blocks(model)]
    shapes = [(block.feedforward_dim, 1) for block in model.config.transformer.blocks]
    return _finite(_sensitivities(model, calibration, watched, shapes), "feed-forward units")


def normalized(scores: Scores, p: float | None) -> Scores:
    """Divides each block's scores by their p-norm, so that blocks of different scale can be compared; None leaves them."""
    return scores if p is None else tuple(part / (torch.linalg.vector_norm(part, p) + EPSILON) for part in scores)


def check_amount(keep: float | None, number: int | None, name: str = "num_kept") -> None:
    """Raises ValueError unless exactly one is given, a share in (0, 1] or a number (called ``name``) from 1."""
    if (keep is None) == (number is None):
        raise ValueError(f"keep is {keep} and {name} is {number}; expected one of them and None for the other")
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; expected a share above 0 and up to 1")
    if number is not None and number < 1:
        raise ValueError(f"{name} is {number}; expected at least 1")


def share_of(keep: float, count: int) -> int:
    """Returns a share of a number of parts, rounded to the nearest, at least one of any."""
    return min(count, max(1, int(keep * count + 0.5)))


def best_of_each(scores: Scores, counts: Sequence[int]) -> Chosen:
    """Returns for each block the numbers, rising, of its ``counts`` best parts; of equal ones the first."""
    return tuple(tuple(sorted(_ranked(part)[:count])) for part, count in zip(scores, counts, strict=True))


def best_of_all(scores: Scores, total: int, *, minimum: int = 1, multiple: int = 1) -> Chosen:
    """Returns for each block the numbers, rising, of its parts among the best of the whole model.

    Args:
        scores: Scores that can be compared between blocks.
        total: How many parts are kept at most; what ``minimum`` asks for is kept in any case.
        minimum: The best parts of each block that are always kept; a block that has fewer keeps all of them.
        multiple: Parts are kept by so many at a time, ranked by their mean score; the last few of a block may be fewer.
    """
    ranked = [_ranked(part) for part in scores]
    counts, groups = [], []
    for block, order in enumerate(ranked):
        least = least_of(len(order), minimum, multiple)
        counts.append(least)
        starts = range(least, len(order), multiple)
        groups += [(-float(scores[block][order[i : i + multiple]].mean()), block, len(order[i : i + multiple])) for i in starts]
    left = total - sum(counts)
    for _, block, size in sorted(groups, key=lambda group: group[0]):  # stable: within a block the order of its ranks
        if size > left:
            break
        counts[block] += size
        left -= size
    return tuple(tuple(sorted(order[:count])) for order, count in zip(ranked, counts, strict=True))


def least_of(count: int, minimum: int, multiple: int) -> int:
    """Returns how many of a block's ``count`` parts :func:`best_of_all` always keeps."""
    return min(-(-min(minimum, count) // multiple) * multiple, count)


def _ranked(scores: Tensor) -> list[int]:
    return scores.argsort(descending=True, stable=True).tolist()


def _blocks(model: SpeechModel) -> list[Block]:
    return list(model.transformer.blocks)  # type: ignore[arg-type]


def _empty() -> Tensor:
    return torch.zeros(0, dtype=torch.float64)


def _row_sizes(part: nn.Linear | FactoredLinear) -> Tensor:
    weight, bias = whole_matrix(part)
    return weight.abs().sum(1) + bias.abs()


def _column_sizes(part: nn.Linear | FactoredLinear) -> Tensor:
    return whole_matrix(part)[0].abs().sum(0)


def _finite(scores: Sequence[Tensor], what: str) -> Scores:
    for block, part in enumerate(scores):
        if not bool(torch.isfinite(part).all()):
            raise ValueError(f"scores of the {what} of block {block} are not finite: the model or its loss is broken")
    return tuple(scores)


def _sensitivities(
    model: SpeechModel,
    calibration: Calibration | None,
    watched: Sequence[nn.Module | None],
    shapes: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """Returns for each block the sum over frames and losses of ``|sum_w x_pw dL/dx_pw|``, where x enters the watched module.

    Gradients are taken of these inputs alone: none is left behind in the parameters, which may be frozen.

    Args:
        model: The model.
        calibration: Its losses.
        watched: For each block the module whose input (B, T, parts * width) counts; None where it has none.
        shapes: For each block its parts and their width.
    """
    if calibration is None or not calibration.losses:
        raise ValueError("data-driven scores need calibration speech with a loss: name a corpus, or choose the score 'l1'")
    seen: list[tuple[int, Tensor]] = []

    def note(block: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                seen.append((block, inputs[0] if inputs[0].requires_grad else inputs[0].requires_grad_()))

        return hook

    scores = [torch.zeros(parts, dtype=torch.float64) for parts, _ in shapes]
    hooks = [part.register_forward_pre_hook(note(block)) for block, part in enumerate(watched) if part is not None]
    was_training = model.training
    try:
        model.eval()
        for loss in calibration.losses if hooks else ():
            seen.clear()
            with torch.enable_grad():
                value = loss(model)
            assert seen, "the loss does not run the model"
            gradients = torch.autograd.grad(value, [x_BTP for _, x_BTP in seen], allow_unused=True)
            for (block, x_BTP), gradient_BTP in zip(seen, gradients, strict=True):
                if gradient_BTP is not None:
                    product_BTPW = (x_BTP.detach().float() * gradient_BTP.float()).unflatten(-1, shapes[block])
                    scores[block] += product_BTPW.sum(-1).abs().sum((0, 1)).double().cpu()
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return scores
