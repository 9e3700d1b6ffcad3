"""The largest values of a line: what coordinators make masks of, and what devices tell of their importance."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def largest(line: NDArray[Any], count: int) -> NDArray[np.bool_]:
    """Mark the `count` largest values of a line; of equal ones the first.

    Where a value is no number fewer may be marked, or others.

    Args:
        line: One dimension.
        count: None for 0 or less, all if there are no more.

    Cost: some passes over the line and a partial sort, O(values); beside the line a copy of it at most.
    """
    if not 0 < count < line.size:
        return np.full(line.size, count > 0, np.bool_)
    least = _least(line, count)
    marked: NDArray[np.bool_] = line > least
    missing = count - int(np.count_nonzero(marked))
    marked[np.flatnonzero(line == least)[:missing]] = True
    return marked


def _least(line: NDArray[Any], count: int) -> Any:
    """Give the least of the largest values.

    Under masks most are one value. Among as many equals a partial sort takes twenty times as long as it does elsewhere, so
    they are left out where they are half of the line.
    """
    lowest = line.min()
    many = int(np.count_nonzero(line > lowest))
    if count > many:
        return lowest
    part = line[line > lowest] if many <= line.size // 2 else line.copy()
    place = part.size - count
    part.partition(place)
    return part[place]
