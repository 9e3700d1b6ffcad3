"""The compiled core's layout of a masked matrix: blocks of columns, within a block by row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.kernels.library import Linear
from wire.errors import SpecError
from wire.masks import Mask

_WEIGHTS_MAX = (1 << 31) - 1
_ELEMENTS = 1 << 17
"""Of the mask that are looked at together."""


@dataclass(frozen=True, slots=True)
class LinearLayout:
    """Where the kept weights of a matrix stand.

    Attributes:
        shape: ``(rows, columns)`` of the dense matrix.
        block: Columns per block.
        starts: ``(blocks, rows + 1)`` int32: position of each row's first value.
        index: ``(kept,)`` uint8 or uint16: column within the block.
        call: The same for the core's functions.
    """

    shape: tuple[int, ...]
    block: int
    starts: NDArray[np.int32]
    index: NDArray[Any]
    call: Linear = field(repr=False)

    @classmethod
    def of(cls, mask: Mask, block: int = 256) -> LinearLayout:
        """Lay out a mask ``(rows, columns)``. Cost: one pass over the mask; scratch of a few hundred KiB.

        Raises:
            SpecError: The matrix has no side, or one that is beyond the core's limits.
        """
        shape = mask.shape
        if len(shape) != 2 or min(shape) < 1 or block < 1 or mask.size > _WEIGHTS_MAX:
            raise SpecError(f"a sparse matrix of shape {shape} in blocks of {block} columns")
        rows, columns = shape
        block = min(block, columns, 1 << 16)
        blocks = -(-columns // block)
        starts = np.zeros((blocks, rows + 1), np.int32)
        index = np.empty(int(np.count_nonzero(mask)), np.uint8 if block <= 256 else np.uint16)
        step, end = max(1, _ELEMENTS // block), 0
        for place in range(blocks):
            starts[place, 0] = end
            for row in range(0, rows, step):
                part = mask[row : row + step, place * block : (place + 1) * block]
                count, width = part.shape
                found = np.flatnonzero(part)
                ends = found.searchsorted(np.arange(1, count + 1) * width)  # counting by row takes longer than finding
                starts[place, row + 1 : row + 1 + count] = ends + end
                np.remainder(
                    found.astype(np.uint32), np.uint32(width), out=index[end : end + len(found)], casting="unsafe"
                )
                end += len(found)
        starts.flags.writeable = index.flags.writeable = False  # they are checked once, and relied upon
        call = Linear(rows, columns, block, blocks, index.itemsize, len(index), starts.ctypes.data, index.ctypes.data)
        return cls(shape, block, starts, index, call)

    @property
    def kept(self) -> int:
        """How many weights are kept."""
        return len(self.index)

    @property
    def bytes_index(self) -> int:
        """Size of starts and index."""
        return self.starts.nbytes + self.index.nbytes

    def order(self) -> NDArray[np.int64]:
        """Give the position in C order of each value."""
        rows, columns = self.shape
        order = np.empty(self.kept, np.int64)
        for place, starts in enumerate(self.starts):
            part = slice(starts[0], starts[-1])
            order[part] = np.repeat(np.arange(rows) * columns + place * self.block, np.diff(starts))
            order[part] += self.index[part]
        return order
