"""Which weights of a tensor are kept: as bits, and as rows and columns. Masks drive the format, values never do.

All numbers are little-endian, elements stand in C order. `gaps` has the third way to say it, `coding` chooses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import prod
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from wire.errors import Malformed

Mask = NDArray[np.bool_]


def mask_digest(mask: Mask) -> str:
    """Name a mask: SHA-256 (hex) of the msgpack list ``[shape, bits]``, bits as in `to_bits`."""
    return hashlib.sha256(msgpack.packb([list(mask.shape), to_bits(mask).tobytes()])).hexdigest()


def sides(shape: Sequence[int]) -> tuple[int, int]:
    """See a tensor as a matrix: the first dimension, and all others together (1 when there is no other)."""
    return (shape[0] if shape else 1), prod(shape[1:])


def index_type(length: int) -> np.dtype[Any] | None:
    """Give the type of an index into a side of this length; None when there is nothing to say."""
    return None if length <= 1 else np.dtype("<u2") if length <= 1 << 16 else np.dtype("<u4")


def index_bytes(shape: Sequence[int], kept: int) -> int:
    """Count the bytes of so many rows and columns."""
    return kept * sum(_width(side) for side in sides(shape))


def _width(side: int) -> int:
    kind = index_type(side)
    return 0 if kind is None else kind.itemsize


def to_bits(mask: Mask) -> NDArray[np.uint8]:
    """Pack a mask: element i in C order is bit ``i % 8`` (lowest first) of byte ``i // 8``; the last bits are 0."""
    return np.packbits(np.ravel(mask), bitorder="little")


def from_bits(data: NDArray[np.uint8], count: int, kept: int, path: str) -> Mask:
    """Unpack a mask of `count` elements into one line.

    Raises:
        Malformed: Wrong length, padding bits that are not 0, or not as many ones as there are values.
    """
    if len(data) != -(-count // 8):
        raise Malformed(f"a bitmap of {len(data)} bytes for {count} elements", path)
    if count % 8 and data[-1] >> (count % 8):
        raise Malformed("padding bits of a bitmap are not 0", path)
    bits = np.unpackbits(data, count=count, bitorder="little")
    ones = int(np.count_nonzero(bits))
    if ones != kept:
        raise Malformed(f"a bitmap has {ones} ones for {kept} values", path)
    return bits.view(np.bool_)


def to_indices(mask: Mask) -> tuple[bytes, bytes]:
    """Give rows and columns of the kept elements in C order."""
    rows, columns = sides(mask.shape)
    flat = np.flatnonzero(np.ravel(mask))
    parts = []
    for side, index in ((rows, flat // max(columns, 1)), (columns, flat % max(columns, 1))):
        kind = index_type(side)
        parts.append(b"" if kind is None else index.astype(kind).tobytes())
    return parts[0], parts[1]


def from_indices(
    rows: NDArray[np.uint8], columns: NDArray[np.uint8], shape: Sequence[int], kept: int, path: str
) -> NDArray[np.int64]:
    """Read rows and columns and give positions in C order ``(kept,)``, ascending.

    Raises:
        Malformed: Wrong length, out of range, unsorted or repeated.
    """
    sizes = sides(shape)
    both: list[NDArray[np.int64]] = []
    for data, side, name in ((rows, sizes[0], "rows"), (columns, sizes[1], "columns")):
        kind = index_type(side)
        if len(data) != (0 if kind is None else kept * kind.itemsize):
            raise Malformed(f"{name} of {len(data)} bytes for {kept} values", path)
        index = np.zeros(kept, np.int64) if kind is None else data.view(kind).astype(np.int64)
        if kept and (side < 1 or int(index.max()) >= side):
            raise Malformed(f"{name} reach beyond {side}", path)
        both.append(index)
    flat = both[0] * sizes[1] + both[1]
    if kept > 1 and int(np.diff(flat).min()) <= 0:
        raise Malformed("indices are not strictly ascending", path)
    return flat
