"""A mask as the distances between what it keeps, in a Rice code: no tables, so that it is the shortest for small masks.

A gap g, the number of elements passed over, is written as ``g >> low`` zeros and a one, and apart from that its `low` lowest
bits. Of a random mask gaps are geometrically distributed, for which the best `low` is within 3 % of the information limit at
densities up to 0.35 (Golomb 1966; Rice 1979).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from wire.errors import Malformed
from wire.masks import PLACES_AT_ONCE, joined

LOW_MAX = 24
KEPT_MAX = 1 << 16
"""Above so many kept elements packed gaps are as short, and faster; a code of more is refused."""


def to_rice(places: NDArray[np.int64]) -> tuple[bytes, int]:
    """Code a mask by the positions that it keeps, at least one; gives the bytes and the number of low bits.

    Cost: 100 bytes for each position.
    """
    gaps = np.diff(places, prepend=-1) - 1
    guess = min(LOW_MAX, int(np.log2(1 + gaps.mean())))
    low = min(range(max(0, guess - 1), min(LOW_MAX, guess + 1) + 1), key=lambda bits: _size(gaps, bits))
    ones = np.cumsum((gaps >> low) + 1) - 1
    unary = np.zeros(int(ones[-1]) + 1, np.bool_)
    unary[ones] = True
    rest = (gaps[:, None] >> np.arange(low)) & 1
    return np.packbits(unary, bitorder="little").tobytes() + np.packbits(
        rest.astype(np.bool_), bitorder="little"
    ).tobytes(), low


def _size(gaps: NDArray[np.int64], low: int) -> int:
    return -(-(int((gaps >> low).sum()) + len(gaps)) // 8) - (-low * len(gaps) // 8)


def from_rice(data: NDArray[np.uint8], size: int, kept: int, low: int, path: str) -> NDArray[np.int64]:
    """Read such bytes; gives the positions of the kept elements ``(kept,)``, ascending. See `runs_of`."""
    return joined(runs_of(data, size, kept, low, path), kept)


def runs_of(data: NDArray[np.uint8], size: int, kept: int, low: int, path: str) -> Iterator[NDArray[np.int64]]:
    """Read such bytes, some positions at a time, ascending. Memory: a byte per bit of `data`, and 8 for each position.

    Raises:
        Malformed: They keep another number of elements than `kept`, reach beyond `size`, or bits that pad them are not 0.
    """
    split = len(data) - -(-low * kept // 8)
    if split < 0:
        raise Malformed(f"{len(data)} bytes for {kept} elements of {low} low bits", path)
    unary = np.unpackbits(data[:split], bitorder="little")
    ones = np.flatnonzero(unary)
    if len(ones) != kept or (kept and len(unary) - 1 - int(ones[-1]) >= 8) or (not kept and split):
        raise Malformed(f"a code of {len(ones)} elements for {kept} values, or with bytes behind it", path)
    del unary
    bits = np.unpackbits(data[split:], bitorder="little")
    if bits[low * kept :].any():
        raise Malformed("padding bits of a code are not 0", path)
    place, before = -1, -1
    for start in range(0, kept, PLACES_AT_ONCE):
        here = ones[start : start + PLACES_AT_ONCE]
        part = bits[low * start : low * (start + len(here))]
        places = (np.diff(here, prepend=before) - 1) << low
        for bit in range(low):
            places |= part[bit::low].astype(np.int64) << bit
        places += 1
        np.cumsum(places, out=places)
        places += place
        place, before = int(places[-1]), int(here[-1])
        if place >= size:
            raise Malformed(f"a code reaches element {place} of {size}", path)
        yield places


def longest(count: int, kept: int, low: int) -> int:
    """Give the greatest number of bytes that the code of such a mask can take."""
    return -(-((count >> low) + kept) // 8) - (-low * kept // 8)
