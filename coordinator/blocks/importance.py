"""Which weights to keep when each second must pay: ``max Gamma(A) = Delta / T`` over sets of weights (PruneFL).

Jiang et al., "Model Pruning Enables Efficient Federated Learning on Edge Devices", IEEE TNNLS 2022: ``Delta(M) = sum z_j`` is
how much the loss falls by training the weights M (z: squared gradients), ``T(M) = c + sum t_j`` the seconds of a round.
Protected weights are always in M; from the free ones A is chosen (problem 7).

`solve` is exact. The paper sorts by ``z / t`` (its algorithm 2); here the same set comes from Dinkelbach's iteration
(*Management Science* 1967) without a sort: with ``lambda`` the best ratio so far, the set that maximises
``Delta - lambda T`` has a better ratio, or there is none. With at most K weights that set is made of the K largest
``z_j - lambda t_j`` above 0, so that a cap is solved exactly too; `stopped` is the paper's way, which ends its sorted pass
early and is not the best under a cap. `climb` is the local search for times that are no sum (algorithm 3).

`undecided` tells how many choices may be wrong when only the largest importance is known, the rest being bounded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.blocks.masks import top_global, top_per_tensor

Mask = NDArray[np.bool_]
Values = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one tensor in one line; what is neither fixed nor free is out.

    Attributes:
        importance: z, not negative, ``(n,)``.
        fixed: Kept whatever happens, ``(n,)``.
        free: May be kept; none of them fixed, ``(n,)``.
        seconds: t of each weight, not negative.
    """

    importance: Values
    fixed: Mask
    free: Mask
    seconds: float


@dataclass(frozen=True, slots=True)
class Base:
    """What is there whatever is chosen.

    Attributes:
        seconds: c.
        importance: Of what no layer lists, such as biases.
    """

    seconds: float
    importance: float = 0.0


@dataclass(frozen=True, slots=True)
class Chosen:
    """A choice.

    Attributes:
        masks: What is kept of each layer, fixed weights included.
        ratio: Its Gamma.
        added: How many of the free weights are kept.
        passes: Sets that were tried.
    """

    masks: list[Mask]
    ratio: float
    added: int
    passes: int


def protected(weights: Values, kept: Mask, fraction: float) -> Mask:
    """Mark the kept weights of one layer that must stay: all but ``floor(fraction * kept)`` of the smallest ``|w|``.

    Of weights as large as the smallest that must stay, all stay (as in PruneFL's public code).

    Args:
        weights: ``(n,)``.
        kept: ``(n,)``.
        fraction: Of the kept weights, that may be pruned; 0 to 1.
    """
    magnitudes = np.abs(weights[kept])
    count = int(fraction * len(magnitudes))
    if count >= len(magnitudes):
        return np.zeros_like(kept)
    least = np.partition(magnitudes, count)[count]
    stays: Mask = kept & (np.abs(weights) >= least)
    return stays


def solve(layers: Sequence[Layer], base: Base, most: int | None = None) -> Chosen:
    """Give the set with the best ratio: the smallest of the best, up to rounding.

    Args:
        layers: In the model's order.
        base: What is there in any case.
        most: How many free weights may be kept; None for any number.

    Cost: one pass over all weights, then a few (five at most were seen) over those whose ``z / t`` exceeds the best ratio so
    far; with a cap a partial sort of at most `most` weights a layer more. 8 bytes for each such weight.

    Raises:
        ValueError: The fixed weights and the base take no time, so that there is no ratio.
    """
    gain, seconds = _fixed(layers, base)
    ratio, passes = gain / seconds, 0
    places = [
        np.flatnonzero(layer.free & (layer.importance > _below(ratio * layer.seconds, layer))) for layer in layers
    ]
    values = [layer.importance[at] for layer, at in zip(layers, places, strict=True)]
    if most is not None:
        for index, value in enumerate(values):
            if len(value) > most:
                largest = np.flatnonzero(top_per_tensor({"": value}, {"": most})[""])
                places[index], values[index] = places[index][largest], value[largest]
    best: list[Mask] = [np.zeros(len(value), np.bool_) for value in values]
    while True:
        passes += 1
        taken = _above(layers, values, ratio, most)
        sums = [float(value[mask].sum(dtype=np.float64)) for value, mask in zip(values, taken, strict=True)]
        spent = [layer.seconds * int(np.count_nonzero(mask)) for layer, mask in zip(layers, taken, strict=True)]
        found = (gain + sum(sums)) / (seconds + sum(spent))
        if not found > ratio:
            return _chosen(layers, [at[mask] for at, mask in zip(places, best, strict=True)], ratio, passes)
        best, ratio = taken, found


def _fixed(layers: Sequence[Layer], base: Base) -> tuple[float, float]:
    """Give importance and seconds of what is there in any case."""
    gain = base.importance + sum(float(layer.importance[layer.fixed].sum(dtype=np.float64)) for layer in layers)
    seconds = base.seconds + sum(layer.seconds * int(np.count_nonzero(layer.fixed)) for layer in layers)
    if not seconds > 0.0:
        raise ValueError("what is always there must take time; without any there is no ratio")
    return gain, seconds


def _below(limit: float, layer: Layer) -> Values:
    """Give the greatest number of the importance's own type that is not above a limit, so that ``z > limit`` stays exact."""
    kind = layer.importance.dtype.type if layer.importance.dtype.kind == "f" else np.float64
    with np.errstate(over="ignore"):
        rounded = kind(limit)
    return np.asarray(rounded if float(rounded) <= limit else np.nextafter(rounded, kind(-np.inf)))


def _above(layers: Sequence[Layer], values: Sequence[Values], ratio: float, most: int | None) -> list[Mask]:
    """Mark the values above ``ratio * t``; if they are more than `most`, those that are farthest above."""
    taken: list[Mask] = [
        value > _below(ratio * layer.seconds, layer) for layer, value in zip(layers, values, strict=True)
    ]
    if most is None or sum(int(np.count_nonzero(mask)) for mask in taken) <= most:
        return taken
    scores = {
        str(place): np.where(mask, value.astype(np.float64) - ratio * layer.seconds, -1.0)
        for place, (layer, value, mask) in enumerate(zip(layers, values, taken, strict=True))
    }
    return list(top_global(scores, most).values())


def _chosen(layers: Sequence[Layer], places: Sequence[NDArray[np.int64]], ratio: float, passes: int) -> Chosen:
    masks = []
    for layer, at in zip(layers, places, strict=True):
        mask = layer.fixed.copy()
        mask[at] = True
        masks.append(mask)
    return Chosen(masks, ratio, sum(len(at) for at in places), passes)


def stopped(layers: Sequence[Layer], base: Base, most: int | None = None) -> Chosen:
    """Give what algorithm 2 as it is written gives: the best ``z / t`` first, while Gamma grows and there is room.

    Without `most` it is `solve`; with it, Gamma may be below the best (62 percent of it in the worst of 3000 small cases).

    Cost: a sort of all free weights.
    """
    gain, seconds = _fixed(layers, base)
    places = [np.flatnonzero(layer.free) for layer in layers]
    z = np.concatenate([layer.importance[at].astype(np.float64) for layer, at in zip(layers, places, strict=True)])
    t = np.repeat([layer.seconds for layer in layers], [len(at) for at in places])
    worth = np.divide(z, t, out=np.where(z > 0.0, np.inf, 0.0), where=t > 0.0)
    order = np.argsort(-worth, kind="stable")
    gains, times = gain + np.cumsum(z[order]), seconds + np.cumsum(t[order])
    ratios = np.concatenate([[gain / seconds], gains / times])
    grows = worth[order] > ratios[:-1]
    count = len(order) if grows.all() else int(np.argmin(grows))
    count = count if most is None else min(count, most)
    taken = np.zeros(len(order), np.bool_)
    taken[order[:count]] = True
    parts = np.split(taken, np.cumsum([len(at) for at in places])[:-1])
    picked = [at[mask] for at, mask in zip(places, parts, strict=True)]
    return _chosen(layers, picked, float(ratios[count]), 1)


Clock = Callable[[Sequence[int]], float]
"""Seconds of a round by the kept weights of each layer; must not fall where one grows, and be above 0."""


def climb(
    layers: Sequence[Layer], clock: Clock, importance: float = 0.0, most: int | None = None, start: Sequence[int] = ()
) -> Chosen:
    """Give a set whose ratio no single weight more or less improves, nor any exchange of two if `most` are kept (algorithm 3).

    All weights of a layer take the same time, so that the best n of them are the n most important: the search is over counts.
    It goes in steps of halving size, and ends with steps of one weight that improve nothing.

    Args:
        layers: In the model's order; their own seconds are not used.
        clock: T.
        importance: As in `Base`.
        most: As in `solve`.
        start: How many free weights of each layer to begin with; none by default.

    Cost: a sort of all free weights; then a step is one call of `clock`.

    Raises:
        ValueError: What is always there takes no time.
    """
    ranked = [_ranked(layer) for layer in layers]
    search = _Search(ranked, [int(np.count_nonzero(layer.fixed)) for layer in layers], clock, [], most)
    search.gain = importance + sum(float(layer.importance[layer.fixed].sum(dtype=np.float64)) for layer in layers)
    counts = [min(n, len(at)) for n, (at, _) in zip(start or [0] * len(layers), ranked, strict=True)]
    if not search.clock(search.fixed) > 0.0:
        raise ValueError("what is always there must take time; without any there is no ratio")
    counts, ratio, tried = search.run(counts)
    return _chosen(layers, [at[:n] for n, (at, _) in zip(counts, ranked, strict=True)], ratio, tried)


def _ranked(layer: Layer) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Give a layer's free weights, the most important first, and the sums of the first 0, 1, 2 ... of them."""
    free = np.flatnonzero(layer.free)
    order = free[np.argsort(-layer.importance[free], kind="stable")]
    return order, np.concatenate([[0.0], np.cumsum(layer.importance[order], dtype=np.float64)])


@dataclass(slots=True)
class _Search:
    """The local search over how many free weights of each layer are kept."""

    ranked: list[tuple[NDArray[np.int64], NDArray[np.float64]]]
    fixed: list[int]
    clock: Clock
    moves: list[tuple[int, int]]
    most: int | None
    gain: float = 0.0

    def ratio(self, counts: Sequence[int]) -> float:
        gained = self.gain + sum(float(sums[n]) for n, (_, sums) in zip(counts, self.ranked, strict=True))
        return gained / self.clock([n + fixed for n, fixed in zip(counts, self.fixed, strict=True)])

    def run(self, counts: list[int]) -> tuple[list[int], float, int]:
        best, tried = self.ratio(counts), 1
        step = 1 << max((len(at) for at, _ in self.ranked), default=1).bit_length()
        while step:
            moved = False
            for trial in self._trials(counts, step):
                found, tried = self.ratio(trial), tried + 1
                if found > best:
                    counts, best, moved = trial, found, True
                    break
            step = step if moved else step >> 1
        return counts, best, tried

    def _trials(self, counts: list[int], step: int) -> list[list[int]]:
        """Give what one more or less of a layer gives, or one more of one and one less of another, in steps of this size."""
        room = None if self.most is None else self.most - sum(counts)
        trials = []
        for grown in range(-1, len(counts)):
            for shrunk in range(-1, len(counts)):
                if grown == shrunk or (grown >= 0 and shrunk >= 0 and room is None):
                    continue
                trial, left = list(counts), room
                if shrunk >= 0:
                    less = min(step, counts[shrunk])
                    trial[shrunk] -= less
                    left = None if left is None else left + less
                if grown >= 0:
                    trial[grown] += min(
                        step, len(self.ranked[grown][0]) - counts[grown], step if left is None else left
                    )
                if trial != counts:
                    trials.append(trial)
        return trials


def undecided(
    layers: Sequence[Layer], uppers: Sequence[Values], base: Base, chosen: Chosen, most: int | None = None
) -> int:
    """Count the free weights of which it is not certain that the true importance would have chosen as `chosen` did.

    The best ratio grows with z, so the true one lies between that of the lower bounds, ``low``, and that of the upper
    ones, ``high``. Without a cap in force, a weight that was taken is certain where ``L > high t``, and one that was left
    where ``U <= low t``. Where the cap holds back, a taken weight must also stay ahead of every one that was left, at both
    ends of the ratio's range (its lead is linear in the ratio).

    Args:
        layers: With the lower bounds L by which `solve` chose.
        uppers: Upper bounds U, by layer.
        base: As given to `solve`; both bounds have it.
        chosen: What `solve` gave for L.
        most: As given to `solve`.

    Returns:
        0 if the choice is certainly the one that the true importance gives; else how many weights may be wrong, at most.
        With a cap in force only weights that were taken are counted.
    """
    highest = [dataclasses.replace(layer, importance=upper) for layer, upper in zip(layers, uppers, strict=True)]
    low, high = chosen.ratio, solve(highest, base, most).ratio
    full = most is not None and chosen.added == most
    doubtful = 0
    rivals: list[tuple[float, float]] = []
    for layer, upper, mask in zip(layers, uppers, chosen.masks, strict=True):
        left = upper[layer.free & ~mask]
        left = left[left > _below(low * layer.seconds, layer)]
        if full and len(left):
            rivals.append((layer.seconds, float(left.max())))
        elif not full:
            doubtful += len(left)
    for layer, mask in zip(layers, chosen.masks, strict=True):
        t = layer.seconds
        limit = max([high * t, *(z + max(low * (t - other), high * (t - other)) for other, z in rivals)])
        lowest = layer.importance[layer.free & mask]
        doubtful += int(np.count_nonzero(lowest <= _below(limit, layer)))
    return doubtful
