"""A mask as the distances between what it keeps, one byte each, and parts packed by zstandard.

Byte b < 255 says: b elements are passed over and the next one is kept. 255 says: 255 elements are passed over. Of a random
mask these bytes are geometrically distributed and independent, so that an entropy coder over bytes brings them to within
2 % of the information limit; zstandard at level 1 is such a coder (higher levels look for repetitions, which a random mask
has not, and end up 0 to 15 % longer and several times slower; ``python -m tests bench codec`` shows both).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wire.errors import Malformed
from wire.masks import PLACES_AT_ONCE, AnyMask, count, joined, windows

_SKIP = 255
_AT_ONCE = 1 << 19
"""Elements that are looked at together: as many as bound what is held beside the result."""


def to_gaps(mask: AnyMask, values: NDArray[Any] | None = None) -> tuple[bytes, NDArray[Any] | None]:
    """Code a mask, and gather what it keeps in the same pass.

    Args:
        mask: Of n elements, in C order.
        values: As many values, of any type.

    Returns:
        The bytes, and the kept values (None without `values`). Cost: one pass; beside the result less than 16 MiB.
    """
    kept = None if values is None else np.empty(count(mask), values.dtype)
    parts = []
    place = done = 0  # the first element that no byte speaks of yet; values gathered
    for start, where in _runs(mask):
        parts.append(_bytes_of(where, start - place))
        place = start + int(where[-1]) + 1
        if values is not None and kept is not None:
            _take(values[start:], where, kept[done : done + len(where)])
            done += len(where)
    return b"".join(parts), kept


def gather(mask: AnyMask, values: NDArray[Any]) -> NDArray[Any]:
    """Give the kept values of a line, as ``values[mask]`` does, in a third to a half of its time."""
    kept = np.empty(count(mask), values.dtype)
    done = 0
    for start, where in _runs(mask):
        _take(values[start:], where, kept[done : done + len(where)])
        done += len(where)
    return kept


def _take(values: NDArray[Any], where: NDArray[np.int64], out: NDArray[Any]) -> None:
    np.take(values, where, out=out, mode="clip")  # nothing is out of range; any other mode makes a copy first


def _runs(mask: AnyMask) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Give the positions of the kept elements, some hundred thousand elements at a time, behind each other run's start.

    numpy has two ways to find them. Up to a density of 0.1 it searches for the next one, which a processor cannot foresee;
    above, it writes every index and goes on past those of ones, in the same time at every density. The second is faster
    from 0.04 on; a few ones more at the end make numpy take it.
    """
    more = 1 + min(mask.size, _AT_ONCE) // 8
    longer = np.ones(min(mask.size, _AT_ONCE) + more, np.bool_)
    for start, part in windows(mask, _AT_ONCE):
        kept = int(np.count_nonzero(part))
        if 0.04 * len(part) < kept <= 0.1 * len(part):
            longer[-len(part) - more : -more] = part
            yield start, np.flatnonzero(longer[-len(part) - more :])[:kept]
        elif kept:
            yield start, np.flatnonzero(part)


def _bytes_of(where: NDArray[np.int64], before: int) -> bytes:
    """Code one run of positions, of which the first has `before` passed elements more in front of it."""
    gaps = np.empty(len(where), np.int64)
    gaps[0] = where[0] + before
    np.subtract(where[1:], where[:-1], out=gaps[1:])
    gaps[1:] -= 1
    if int(gaps.max()) < _SKIP:
        return gaps.astype(np.uint8).tobytes()
    skips = gaps // _SKIP
    data = np.full(len(gaps) + int(skips.sum()), _SKIP, np.uint8)
    data[np.arange(len(gaps)) + np.cumsum(skips)] = gaps - _SKIP * skips
    return data.tobytes()


def from_gaps(data: bytes | memoryview | NDArray[np.uint8], size: int, kept: int, path: str) -> NDArray[np.int64]:
    """Read such bytes, of so many kept elements; gives their positions ``(kept,)``, ascending. See `runs_of`."""
    return joined(runs_of(data, size, kept, path), kept)


def runs_of(
    data: bytes | memoryview | NDArray[np.uint8], size: int, kept: int, path: str
) -> Iterator[NDArray[np.int64]]:
    """Read such bytes, some at a time; gives the positions of the kept elements, ascending. Cost: one pass.

    Args:
        data: The bytes.
        size: Elements of the mask.
        kept: How many of them are kept; -1 when nobody has said.
        path: Where this stands, for error texts.

    Raises:
        Malformed: They reach beyond the mask, keep another number of elements, or end in a skip.
    """
    found = np.frombuffer(data, np.uint8)
    ones = int(np.count_nonzero(found != _SKIP))
    if kept not in (-1, ones):
        raise Malformed(f"gaps keep {ones} elements for {kept} values", path)
    if len(found) and found[-1] == _SKIP:
        raise Malformed("gaps end in a skip", path)
    place = -1
    for start in range(0, len(found), PLACES_AT_ONCE):
        part = found[start : start + PLACES_AT_ONCE]
        stops = part != _SKIP
        steps = np.add(part, stops, dtype=np.int64)
        np.cumsum(steps, out=steps)
        steps += place
        place = int(steps[-1])
        if place >= size:
            raise Malformed(f"gaps reach element {place} of {size}", path)
        yield steps if stops.all() else steps[stops]


def longest(count: int, kept: int) -> int:
    """Give the greatest number of bytes that gaps can take."""
    return kept + count // _SKIP
