"""A mask as the distances between what it keeps, one byte each, and parts packed by zstandard.

Byte b < 255 says: b elements are passed over and the next one is kept. 255 says: 255 elements are passed over. Of a random
mask these bytes are geometrically distributed and independent, so that an entropy coder over bytes brings them to within
2 % of the information limit; zstandard at level 1 is such a coder (higher levels look for repetitions, which a random mask
has not, and end up 0 to 15 % longer and several times slower; ``python -m tests bench codec`` shows both).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wire.errors import Malformed

_SKIP = 255
_AT_ONCE = 1 << 17
"""Elements that are looked at together: what is needed for them stays in a core's own cache."""


def to_gaps(mask: NDArray[np.bool_], values: NDArray[Any] | None = None) -> tuple[bytes, NDArray[Any] | None]:
    """Code a flat mask, and gather what it keeps in the same pass.

    Args:
        mask: Of n elements.
        values: As many values, of any type.

    Returns:
        The bytes, and the kept values (None without `values`). Cost: one pass; beside the result less than 4 MiB.
    """
    kept = int(np.count_nonzero(mask)) if values is not None else 0
    gathered = np.empty(kept, values.dtype) if values is not None else None
    parts = []
    done, place = 0, 0  # values gathered; the first element that no byte speaks of yet
    for start in range(0, len(mask), _AT_ONCE):
        where = np.flatnonzero(mask[start : start + _AT_ONCE])
        if not len(where):
            continue
        if values is not None and gathered is not None:
            line = values[start : start + _AT_ONCE]
            np.take(line, where, out=gathered[done : done + len(where)], mode="clip")  # clip: straight into `out`
            done += len(where)
        gaps = np.empty(len(where), np.int64)
        gaps[0] = where[0] + start - place
        np.subtract(where[1:], where[:-1], out=gaps[1:])
        gaps[1:] -= 1
        place = int(where[-1]) + start + 1
        parts.append(_bytes_of(gaps))
    return b"".join(parts), gathered


def _bytes_of(gaps: NDArray[np.int64]) -> bytes:
    if int(gaps.max()) < _SKIP:
        return gaps.astype(np.uint8).tobytes()
    skips = gaps // _SKIP
    data = np.full(len(gaps) + int(skips.sum()), _SKIP, np.uint8)
    data[np.arange(len(gaps)) + np.cumsum(skips)] = gaps - _SKIP * skips
    return data.tobytes()


def from_gaps(data: bytes | memoryview | NDArray[np.uint8], count: int, kept: int, path: str) -> NDArray[np.int64]:
    """Read such bytes; gives the positions of the kept elements ``(kept,)``, ascending. Cost: one pass.

    Args:
        data: The bytes.
        count: Elements of the mask.
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
    result = np.empty(ones, np.int64)
    done, place = 0, -1
    for start in range(0, len(found), _AT_ONCE):
        part = found[start : start + _AT_ONCE]
        stops = part != _SKIP
        steps = np.add(part, stops, dtype=np.int64)
        np.cumsum(steps, out=steps)
        steps += place
        place = int(steps[-1])
        hits = steps if stops.all() else steps[stops]
        result[done : done + len(hits)] = hits
        done += len(hits)
    if place >= count:
        raise Malformed(f"gaps reach element {place} of {count}", path)
    return result


def longest(count: int, kept: int) -> int:
    """Give the greatest number of bytes that gaps can take."""
    return kept + count // _SKIP
