"""The compiled core's layout of a masked matrix: blocks of columns, within a block by row."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines.arrays import Floats
from edge_runtime.kernels.library import Library, Linear, must
from edge_runtime.kernels.order import reordered
from edge_runtime.kernels.panels import address
from wire.errors import SpecError
from wire.masks import Bits

_WEIGHTS_MAX = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class LinearLayout:
    """Where the kept weights of a matrix stand.

    Attributes:
        shape: ``(rows, columns)`` of the dense matrix.
        block: Columns per block.
        starts: ``(blocks, rows + 1)`` int32: position of each row's first value.
        index: ``(kept,)`` uint8 or uint16: column within the block.
        call: The same for the core's functions.
        library: The core.
    """

    shape: tuple[int, ...]
    block: int
    starts: NDArray[np.int32]
    index: NDArray[Any]
    call: Linear = field(repr=False)
    library: Library = field(repr=False)

    @classmethod
    def of(cls, library: Library, mask: Bits, block: int = 256) -> LinearLayout:
        """Lay out a mask ``(rows, columns)``. Cost: two passes over its bits; nothing is made but the layout.

        Raises:
            SpecError: The matrix has no side, or one that is beyond the core's limits.
        """
        shape = mask.shape
        if len(shape) != 2 or min(shape) < 1 or block < 1 or mask.size > _WEIGHTS_MAX:
            raise SpecError(f"a sparse matrix of shape {shape} in blocks of {block} columns")
        rows, columns = shape
        block = min(block, columns, 1 << 16)
        starts = np.empty((-(-columns // block), rows + 1), np.int32)
        index = np.empty(mask.kept, np.uint8 if block <= 256 else np.uint16)
        call = Linear(
            rows, columns, block, len(starts), index.itemsize, len(index), starts.ctypes.data, index.ctypes.data
        )
        line = np.ascontiguousarray(mask.line)
        code = library.calls.nk_linear_lay(ctypes.byref(call), address(line), len(line))
        must(code, f"the layout of a matrix {shape}")
        starts.flags.writeable = index.flags.writeable = False  # they are relied upon
        return cls(shape, block, starts, index, call, library)

    @property
    def kept(self) -> int:
        """How many weights are kept."""
        return len(self.index)

    @property
    def bytes_index(self) -> int:
        """Size of starts and index."""
        return self.starts.nbytes + self.index.nbytes

    def to_c_order(self, values: Floats) -> Floats:
        """See `edge_runtime.kernels.Layout.to_c_order`."""
        return reordered(self.library, self.starts, values, back=True)

    def from_c_order(self, values: Floats) -> Floats:
        """See `edge_runtime.kernels.Layout.from_c_order`."""
        return reordered(self.library, self.starts, values, back=False)
