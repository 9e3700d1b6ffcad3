"""Ratios by a common deadline: what a device's turn takes at every ratio, and which end of the round pays best.

``T_n(ratio) = c + u * work(ratio) + v * bytes(ratio)`` with a device's own c, u and v, none negative, fitted to its measured
turns (`timecost.fit`). For a deadline every device takes the least ratio that meets it, and the deadline is taken that gives
the most progress per second, ``mean g(ratio_n) / longest T_n``. What a ratio is worth, g, is learnt from the losses that
devices report (`blocks.worth`). As they fall the deadline is made longer (`stretch`). The idea: FedMP's reward makes devices
equal, but not fast; equal times follow from the model of time, and how fast is one number for the whole fleet
(docs/decisions/fedmp.md).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.blocks import timecost
from coordinator.blocks.nesting import kept_counts
from coordinator.blocks.timecost import Line
from coordinator.fitting import Means
from coordinator.fitting import fit as fitted
from wire.memory import uniform
from wire.messages import Recipe
from wire.spec import ModelSpec, parameter_count
from wire.work import multiplications

Numbers = NDArray[np.float64]
Places = NDArray[np.intp]

GRID = 100
"""Ratios are looked for in steps of 1/GRID."""
RATIOS = np.arange(GRID) / GRID
_DEADLINES = 200
_LEAST = 1e-3
_SHARES = (0.01, 0.55, 0.44)
"""Prior: what of the whole model's turn is constant, work and bytes. With little that is constant, what a device's first turns
at high ratios say of lower ones errs upward, and a turn that is too short is the cheaper mistake."""


@dataclass(frozen=True, slots=True)
class Load:
    """What turns at the ratios 0, 1/GRID, 2/GRID and so on consist of, below 1.

    Attributes:
        work: Multiplications of a sample (`wire.work`).
        size: Weights.
    """

    work: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def prior(self) -> Line:
        """Give the times before any is measured; the unit is arbitrary."""
        constant, work, size = _SHARES
        return Line(constant, (work / max(1, self.work[0]), size / max(1, self.size[0])))

    def at(self, ratio: float) -> tuple[int, int]:
        """Give both at a ratio, rounded to the grid."""
        place = place_of(ratio)
        return self.work[place], self.size[place]


def place_of(ratio: float) -> int:
    """Give the ratio's place in the grid."""
    return min(GRID - 1, max(0, round(ratio * GRID)))


def load_of(spec: ModelSpec) -> Load:
    """Count work and weights at every ratio of the grid. Cost: GRID walks over the model, a few milliseconds each."""
    works, sizes = [], []
    for place in range(GRID):
        structure = uniform(spec, 1.0 - place / GRID)
        works.append(multiplications(spec, structure))
        sizes.append(parameter_count(spec, structure))
    return Load(tuple(works), tuple(sizes))


def most(spec: ModelSpec) -> float:
    """Give the largest ratio of the grid that leaves no group with a single channel, but those that have no more.

    What a layer of one channel passes on is one number for each place. Rounds with such a layer are short, and worth far less
    than the losses in them say (docs/decisions/fedmp.md).
    """
    sizes = [group.size for group in spec.groups if group.prunable and group.size > 1]
    least = [min(kept_counts(size, [1.0 - float(ratio)])[0] for size in sizes) if sizes else 2 for ratio in RATIOS]
    return max(float(ratio) for ratio, kept in zip(RATIOS, least, strict=True) if kept > 1)


def seconds_of(load: Load, turns: Sequence[Sequence[float]], trust: float) -> Numbers:
    """Give what a device's turn takes at every ratio of the grid.

    Args:
        load: See `load_of`.
        turns: Its measured turns, each a ratio and seconds; at least one.
        trust: Strength of the prior, in turns (`timecost.fit`).
    """
    line, _ = timecost.fit([load.at(ratio) for ratio, _ in turns], [took for _, took in turns], load.prior, trust)
    work, size = line.weights
    return line.constant + work * np.array(load.work, np.float64) + size * np.array(load.size, np.float64)


def least_ratio(spec: ModelSpec, recipe: Recipe, means: Means) -> float | None:
    """Give the least ratio of the grid whose sub-model a device holds; None when it holds none.

    Cost: seven predictions.
    """
    low, high = 0, GRID
    while low < high:
        place = (low + high) // 2
        if fitted(spec, (uniform(spec, 1.0 - place / GRID),), recipe, means) is None:
            low = place + 1
        else:
            high = place
    return None if low >= GRID else low / GRID


def stretch(losses: Sequence[float], learnt: float, grow: float) -> float:
    """Give how many times the best deadline is to be taken, so that sub-models grow with what is learnt.

    The deadline of most progress per second knows nothing of where small models end. Their training loss goes on falling
    to nothing after the accuracy has come to rest, so that no rest is seen in it; hence the deadline grows with its fall.

    Args:
        losses: What each device lately lost, on its own training data; above 0.
        learnt: A loss at which the fleet is past its first steps.
        grow: From 0, which never stretches; with 1 the deadline doubles where the loss halves.

    Returns:
        ``(learnt / median loss) ** grow``, at least 1. The median, since losses are the devices' word.
    """
    if not losses:
        return 1.0
    try:
        return max(1.0, float((learnt / max(_LEAST, statistics.median(losses))) ** grow))
    except OverflowError:  # longer than there are numbers: no deadline
        return math.inf


def equalised(seconds: Numbers, least: Sequence[float], high: float, worth: Numbers, stretch: float = 1.0) -> Numbers:
    """Choose the deadline of most progress per second, and for each device the least ratio that meets it.

    Args:
        seconds: ``(devices, GRID)``, what each device's turn takes at every ratio of the grid.
        least: The least ratio that each device's memory holds.
        high: The largest ratio that is chosen, except where memory asks for more; a device that is late even so is late.
        worth: ``(GRID,)``, what a round at each ratio is worth (`worth.worth`).
        stretch: How many times the best deadline is taken; at least 1 (`stretch`).

    Returns:
        ``(devices,)`` ratios. Cost: `_DEADLINES` passes over `seconds`.
    """
    falling, first, last = _between(seconds, least, high)
    rows = np.arange(len(first))
    best, found = -math.inf, last
    for longest in np.geomspace(*_ends(falling, first, last), _DEADLINES):
        places = _met(falling, first, last, longest)
        gain = float(worth[places].mean()) / float(falling[rows, places].max())
        if gain > best * (1.0 + 1e-12):
            best, found = gain, places
    if stretch > 1.0:
        found = _met(falling, first, last, stretch * float(falling[rows, found].max()))
    return np.asarray(RATIOS[found], np.float64)


def at(seconds: Numbers, least: Sequence[float], high: float, share: float) -> Numbers:
    """Give each device the least ratio that meets one deadline.

    Args:
        seconds: As for `equalised`, and so are the next two and what is returned.
        least: See there.
        high: See there.
        share: Which deadline: 0 for what the slowest device takes at its largest ratio, 1 for what one takes at its least, and
            in between evenly by factors.
    """
    falling, first, last = _between(seconds, least, high)
    lowest, highest = _ends(falling, first, last)
    return np.asarray(RATIOS[_met(falling, first, last, lowest * (highest / lowest) ** share)], np.float64)


def _between(seconds: Numbers, least: Sequence[float], high: float) -> tuple[Numbers, Places, Places]:
    """Give the times, never growing with the ratio, and the first and last place in the grid that each device may have."""
    first = np.array([place_of(ratio) for ratio in least])
    # A time model says that a smaller model is not slower, yet a ceiling of counts may make steps: keep it falling.
    return np.minimum.accumulate(seconds, axis=1), first, np.maximum(first, place_of(high))


def _ends(falling: Numbers, first: Places, last: Places) -> tuple[float, float]:
    """Give the shortest deadline that can be met, and the longest one of any use."""
    rows = np.arange(len(first))
    lowest = float(falling[rows, last].max())
    return lowest, max(lowest, float(falling[rows, first].max()))


def _met(falling: Numbers, first: Places, last: Places, longest: float) -> Places:
    """Give each device the first place in the grid that is over in time."""
    found: Places = np.clip((falling > longest * (1.0 + 1e-9)).sum(axis=1), first, last)
    return found
