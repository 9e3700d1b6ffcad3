"""Sparse updates: which coordinates count when each device sends its own largest, and how many they should be.

Han, Wang and Leung, "Adaptive Gradient Sparsification for Efficient Federated Learning: An Online Learning Approach", ICDCS
2020: fairness-aware bidirectional top-k (section III), and k itself as an online learning problem of which only the sign of
a derivative is known (section IV). What the text leaves open follows the authors' public code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]
Floats = NDArray[np.float32]

_NEVER = np.uint64((1 << 64) - 1)
_LOW = np.uint64((1 << 32) - 1)
_MAGNITUDE = np.uint32((1 << 31) - 1)

WINDOW = 20
"""Updates of k after which the interval of the search may shrink."""

STRETCH = 1.5
"""What an interval reaches beyond the values of k that it was made from."""

PATIENCE = 10
"""Rounds without a usable loss for which k stays as it is."""

_PROBE_FLOOR = 0.1
"""The probed k may lie below the least k, down to this fraction of it."""


def ranked(values: Floats) -> NDArray[np.int64]:
    """Give the order of falling magnitude; of equal ones the first comes first. Cost: one sort, 8 bytes per value twice."""
    keys = (~np.ascontiguousarray(values).view(np.uint32) & _MAGNITUDE).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(len(keys), dtype=np.uint64)
    keys.sort()
    keys &= _LOW
    return keys.view(np.int64)


def fair_top(lists: Iterable[tuple[Places, Floats]], count: int, size: int) -> Places:
    """Choose exactly `count` distinct coordinates from what devices sent (FAB-top-k).

    Ranks are walked from the first. At each, the devices are visited in falling order of the magnitude that they have there,
    and what they have there is taken if it is new, until there are enough. So everything that stands among the first
    ``count // devices`` of any device is taken. Of equal magnitudes at one rank the lower coordinate is taken first, where
    the paper says nothing.

    Args:
        lists: For each device the distinct coordinates that it sent, and the values there. Gone through once.
        count: How many.
        size: Coordinates in all, at most 2^32.

    Returns:
        Ascending ``(count,)``; all that were sent, if those are fewer.

    Cost: a sort per device; memory: 8 bytes per coordinate of the model, twice, and what a sort takes.
    """
    first = np.full(size, _NEVER, np.uint64)
    for places, values in lists:
        keys = np.empty(len(values), np.uint64)
        keys[ranked(values)] = np.arange(len(values), dtype=np.uint64)
        keys <<= np.uint64(32)
        keys |= ~values.view(np.uint32) & _MAGNITUDE
        first[places] = np.minimum(first[places], keys)
    sent = np.flatnonzero(first != _NEVER)
    if count >= len(sent):
        return sent
    if count <= 0:
        return sent[:0]
    keys = first[sent]
    last = np.partition(keys, count - 1)[count - 1]
    taken = keys < last
    equal = np.flatnonzero(keys == last)
    taken[equal[: count - int(np.count_nonzero(taken))]] = True
    chosen: Places = sent[taken]
    return chosen


def exchange_time(count: float, size: int, compute: float, exchange: float) -> float:
    """Give a round's normalised time: computing, the whole model down, `count` of `size` values up.

    The paper has ``compute + exchange (2 k_up + 2 k_down) / (2 size)``: both ways sparse, and a position costs as much as a
    value. Here devices are sent the whole model, and an update has either positions or one bit per weight of the model,
    whichever is less, or is sent whole.

    Args:
        count: k.
        size: Weights of the model.
        compute: Time of the local steps; the paper's unit.
        exchange: Time for the whole model down and up again; 10 in the paper.
    """
    share = count / size
    return compute + exchange / 2 * (1.0 + min(1.0, 2.0 * share, share + 1 / 32))


@dataclass(frozen=True, slots=True)
class Search:
    """Where the search for k stands.

    Attributes:
        count: k; a whole number is drawn from it (`rounded`).
        low: Least k of the present interval.
        high: Greatest k of it.
        steps: Calls of `moved` since the interval was set; m' in the paper.
        steps_before: The same of the interval before, at its end.
        held: Calls in a row that brought no sign.
        seen: Updates since the interval was last thought about.
        seen_low: Least k in them; 0 when there are none.
        seen_high: Greatest k in them.
    """

    count: float
    low: float
    high: float
    steps: int = 0
    steps_before: int = 0
    held: int = 0
    seen: int = 0
    seen_low: float = 0.0
    seen_high: float = 0.0


def step_size(search: Search) -> float:
    """Give ``(k_max - k_min) / sqrt(2 m')`` for the next call of `moved` (section IV)."""
    return (search.high - search.low) / math.sqrt(2 * (search.steps + 1))


def probed(search: Search, least: float) -> float:
    """Give k' = k - delta / 2, the k that is held against k, at most one less than it.

    Args:
        search: Where it stands.
        least: The least k of all; k' may lie below it, down to a tenth.
    """
    return min(max(search.count - step_size(search) / 2, _PROBE_FLOOR * least), search.count - 1.0)


def rounded(count: float, drawn: float) -> int:
    """Give a whole number whose mean is `count`; `drawn` is uniform in [0, 1)."""
    floor = math.floor(count)
    return floor + (drawn < count - floor)


def projected_time(time_probe: float, drop: float, drop_probe: float) -> float | None:
    """Give the time that k' would take for the drop of the loss that k made in one round.

    Args:
        time_probe: Time of a round with k'.
        drop: Loss before less loss after a round with k.
        drop_probe: The same with k'.

    Returns:
        ``time_probe * drop / drop_probe``; None when one of the losses did not fall, and nothing can be said.
    """
    if not (drop > 0.0 and drop_probe > 0.0):
        return None
    return time_probe * drop / drop_probe


def slope_sign(time: float, time_probe: float, count: float, probe: float) -> int:
    """Give the sign of ``(tau(k) - tau(k')) / (k - k')``."""
    slope = (time - time_probe) * (count - probe)
    return (slope > 0.0) - (slope < 0.0)


def moved(search: Search, sign: int | None, bounds: tuple[float, float]) -> Search:
    """Make one step against the sign of the derivative, and shrink the interval when it is time (section IV, algorithm 3).

    ``k <- k - delta sign``, back into the interval. Without a sign k stays for `PATIENCE` rounds and then grows by delta.
    After `WINDOW` updates the interval becomes what they covered, stretched by `STRETCH` both ways within `bounds`, if that
    has ``B + B' <= sqrt(2) B`` and this interval has had as many steps as the one before; the step size then starts over.

    Args:
        search: Where it stands.
        sign: Of the derivative of the time at k; None when it is not known.
        bounds: Least and greatest k of all.
    """
    delta = step_size(search)
    search = dataclasses.replace(search, steps=search.steps + 1)
    if sign is None and search.held < PATIENCE:
        return dataclasses.replace(search, held=search.held + 1)
    count = search.count + (delta if sign is None else -delta * sign)
    count = min(max(count, search.low), search.high)
    search = dataclasses.replace(
        search,
        count=count,
        held=0,
        seen=search.seen + 1,
        seen_low=min(search.seen_low, count) if search.seen else count,
        seen_high=max(search.seen_high, count),
    )
    return _shrunk(search, bounds) if search.seen >= WINDOW else search


def _shrunk(search: Search, bounds: tuple[float, float]) -> Search:
    low, high = max(search.seen_low / STRETCH, bounds[0]), min(search.seen_high * STRETCH, bounds[1])
    before, now = search.high - search.low, high - low
    search = dataclasses.replace(search, seen=0, seen_low=0.0, seen_high=0.0)
    if now <= 0.0 or before + now > math.sqrt(2.0) * before or search.steps < search.steps_before:
        return search
    return dataclasses.replace(search, low=low, high=high, steps=0, steps_before=search.steps)
