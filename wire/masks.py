"""Which weights of a tensor are kept: as bits, and as rows and columns. Masks drive the format, values never do.

All numbers are little-endian, elements stand in C order. `gaps` has the third way to say it, `coding` chooses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from wire.errors import Malformed

Mask = NDArray[np.bool_]
_AT_ONCE = 1 << 16
"""Elements, or bytes of eight, that are looked at together."""
_WINDOW = 1 << 17
"""Elements that are bools while bits are made of positions."""
PLACES_AT_ONCE = 1 << 14
"""Positions that are worked out together: as many as bound what is held beside the result, some 40 bytes each."""
_BIN = ((b"\xc4", 1), (b"\xc5", 2), (b"\xc6", 4))
"""What msgpack writes before bytes, and of how many bytes their number is that follows it."""
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class Bits:
    """A mask in an eighth of the memory: as it travels, and as a device holds it.

    Attributes:
        shape: Of the tensor.
        line: Read-only: element i in C order is bit ``i % 8`` (lowest first) of byte ``i // 8``; the last bits are 0.
        kept: How many are 1.
    """

    shape: tuple[int, ...]
    line: NDArray[np.uint8]
    kept: int

    @property
    def size(self) -> int:
        """Count the elements."""
        return prod(self.shape)


AnyMask = Mask | Bits


def packed(mask: AnyMask) -> Bits:
    """Give a mask as bits; what is bits already as it is."""
    if isinstance(mask, Bits):
        return mask
    line = np.packbits(np.ravel(mask), bitorder="little")
    line.flags.writeable = False
    return Bits(mask.shape, line, int(np.count_nonzero(mask)))


def all_ones(shape: Sequence[int]) -> Bits:
    """Give the mask that keeps everything."""
    size = prod(shape)
    line = np.full(-(-size // 8), 255, np.uint8)
    if size % 8:
        line[-1] >>= 8 - size % 8
    line.flags.writeable = False
    return Bits(tuple(shape), line, size)


def unpacked(mask: AnyMask) -> Mask:
    """Give a mask as bools, a byte each; what is bools already as it is."""
    if not isinstance(mask, Bits):
        return mask
    return np.unpackbits(mask.line, count=mask.size, bitorder="little").view(np.bool_).reshape(mask.shape)


def count(mask: AnyMask) -> int:
    """Count what a mask keeps."""
    return mask.kept if isinstance(mask, Bits) else int(np.count_nonzero(mask))


def windows(mask: AnyMask, length: int) -> Iterator[tuple[int, Mask]]:
    """Give a mask in one line, so many elements (a multiple of 8) at a time, behind each other part's start."""
    flat = None if isinstance(mask, Bits) else np.ravel(mask)
    for start in range(0, mask.size, length):
        if flat is not None:
            yield start, flat[start : start + length]
        elif isinstance(mask, Bits):
            found = np.unpackbits(
                mask.line[start // 8 : (start + length) // 8],
                count=min(length, mask.size - start),
                bitorder="little",
            )
            yield start, found.view(np.bool_)


def positions(mask: AnyMask) -> NDArray[np.int64]:
    """Give the positions in C order of what is kept, ``(kept,)``, ascending."""
    return joined(_places(mask), count(mask))


def joined(runs: Iterable[NDArray[np.int64]], kept: int) -> NDArray[np.int64]:
    """Put so many positions that come some at a time into one line, which is made when the first of them are there."""
    found = np.empty(0, np.int64)
    done = 0
    for run in runs:
        if not done:
            found = np.empty(kept, np.int64)
        found[done : done + len(run)] = run
        done += len(run)
    return found


def _places(mask: AnyMask) -> Iterator[NDArray[np.int64]]:
    """Give the same, some at a time."""
    for start, part in windows(mask, _AT_ONCE):
        yield np.flatnonzero(part) + start


def bits_at(runs: Iterable[NDArray[np.int64]], shape: Sequence[int]) -> Bits:
    """Make a mask of positions in C order, ascending over all runs and within the shape, a window of it at a time."""
    line = np.zeros(-(-prod(shape) // 8), np.uint8)
    window = np.zeros(min(8 * len(line), _WINDOW), np.bool_)
    kept = 0
    for run in runs:
        kept, start = kept + len(run), 0
        while start < len(run):
            first = int(run[start]) & ~7
            stop = int(run.searchsorted(first + _WINDOW))
            here = run[start:stop] - first
            window[here] = True
            found = np.packbits(window[: here[-1] + 1], bitorder="little")
            line[first >> 3 : (first >> 3) + len(found)] |= found
            window[here] = False
            start = stop
    line.flags.writeable = False
    return Bits(tuple(shape), line, kept)


def mask_digest(mask: AnyMask) -> str:
    """Name a mask: SHA-256 (hex) of the msgpack list ``[shape, bits]``, bits as in `Bits.line`, which are not copied."""
    line = packed(mask).line
    mark, length = next(pair for pair in _BIN if len(line) < 1 << 8 * pair[1])
    digest = hashlib.sha256(b"\x92" + msgpack.packb(list(mask.shape)) + mark + len(line).to_bytes(length, "big"))
    digest.update(line.data)
    return digest.hexdigest()


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


def from_bits(line: NDArray[np.uint8], shape: Sequence[int], kept: int, path: str) -> Bits:
    """Take a mask of so many bits; they are copied.

    Raises:
        Malformed: Wrong length, padding bits that are not 0, or not as many ones as there are values.
    """
    size = prod(shape)
    if len(line) != -(-size // 8):
        raise Malformed(f"a bitmap of {len(line)} bytes for {size} elements", path)
    if size % 8 and line[-1] >> (size % 8):
        raise Malformed("padding bits of a bitmap are not 0", path)
    ones = sum(int(_ONES[line[start : start + _AT_ONCE]].sum()) for start in range(0, len(line), _AT_ONCE))
    if ones != kept:
        raise Malformed(f"a bitmap has {ones} ones for {kept} values", path)
    line = line.copy()
    line.flags.writeable = False
    return Bits(tuple(shape), line, kept)


def to_indices(mask: AnyMask) -> tuple[bytes, bytes]:
    """Give rows and columns of the kept elements in C order. Memory: those, and some at a time as numbers."""
    rows, columns = sides(mask.shape)
    kinds, parts = (index_type(rows), index_type(columns)), (bytearray(), bytearray())
    for flat in _places(mask):
        for kind, part, index in zip(kinds, parts, np.divmod(flat, max(columns, 1)), strict=True):
            part.extend(b"" if kind is None else index.astype(kind).tobytes())
    return bytes(parts[0]), bytes(parts[1])


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
