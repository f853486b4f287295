"""Pareto fronts: non-dominated sorting and crowding distance (NSGA-II, Deb et al. 2002, sections III-A and III-B).

Points are tuples of values to be minimised. One point dominates another when it is nowhere worse and somewhere better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = Sequence[float]


def dominates(first: Point, second: Point) -> bool:
    """Whether ``first`` is nowhere worse than ``second`` and somewhere better."""
    return all(a <= b for a, b in zip(first, second, strict=True)) and any(a < b for a, b in zip(first, second, strict=True))


def sort_fronts(points: Sequence[Point]) -> list[list[int]]:
    """Returns indices by front: the first is dominated by none, the second only by members of the first, and so on."""
    beaten_by = [sum(dominates(other, point) for other in points) for point in points]
    beats = [[j for j, other in enumerate(points) if dominates(point, other)] for point in points]
    fronts = []
    current = [i for i, count in enumerate(beaten_by) if count == 0]
    while current:
        fronts.append(current)
        following = []
        for i in current:
            for j in beats[i]:
                beaten_by[j] -= 1
                if beaten_by[j] == 0:
                    following.append(j)
        current = sorted(following)
    return fronts


def crowding(points: Sequence[Point]) -> list[float]:
    """Returns each point's crowding distance: the box between its neighbours, summed over objectives; infinite at the ends."""
    distance = [0.0] * len(points)
    for objective in range(len(points[0]) if points else 0):
        order = sorted(range(len(points)), key=lambda i: points[i][objective])
        low, high = points[order[0]][objective], points[order[-1]][objective]
        distance[order[0]] = distance[order[-1]] = math.inf
        if not 0 < high - low < math.inf:
            continue
        for before, i, after in zip(order, order[1:], order[2:], strict=False):
            distance[i] += (points[after][objective] - points[before][objective]) / (high - low)
    return distance


def rank(points: Sequence[Point]) -> list[tuple[int, float]]:
    """Returns for each point its front, from 0, and its crowding distance there with the sign turned: smaller is better."""
    ranks: list[tuple[int, float]] = [(0, 0.0)] * len(points)
    for number, front in enumerate(sort_fronts(points)):
        for i, distance in zip(front, crowding([points[i] for i in front]), strict=True):
            ranks[i] = (number, -distance)
    return ranks


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Returns the indices of the points that no other dominates, sorted by value; of equal points the first only."""
    first: dict[tuple[float, ...], int] = {}
    for i, point in enumerate(points):
        first.setdefault(tuple(point), i)
    return sorted(
        (i for i in first.values() if not any(dominates(other, points[i]) for other in first)), key=lambda i: tuple(points[i])
    )


def spread(values: Sequence[float], count: int) -> list[int]:
    """Returns ``count`` distinct indices (or all) whose rising ``values`` lie about evenly, both ends among them."""
    if count >= len(values):
        return list(range(len(values)))
    if count == 1:
        return [len(values) // 2]
    low, high = values[0], values[-1]
    chosen: list[int] = []
    for k in range(count):
        if k == count - 1:
            return [*chosen, len(values) - 1]
        least, most = (chosen[-1] + 1 if chosen else 0), (len(values) - (count - k) if k else 0)
        wanted = low + (high - low) * k / (count - 1)
        chosen.append(min(range(least, most + 1), key=lambda i: abs(values[i] - wanted)))
    return chosen
