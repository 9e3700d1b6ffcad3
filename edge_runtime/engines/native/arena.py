"""The one piece of memory in which all arrays of a pass lie, at the places that `wire.native.plan` gave them."""

from __future__ import annotations

from collections.abc import Hashable
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines.native.at import Array
from wire.masked import ALIGN
from wire.native.plan import Seen


class Arena:
    """Grows when a pass needs more; an engine and its narrower widths share one, since one pass runs at a time.

    Args:
        dtype: Of all arrays.
    """

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.passes: dict[Hashable, Any] = {}
        """What is ready to run in it; forgotten when it grows, since arrays then lie elsewhere."""
        self._memory: Array = np.empty(0, self.dtype)

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self._memory.nbytes

    def hold(self, length: int) -> None:
        """Have room for so many entries. What was in it is lost when it grows."""
        if length > len(self._memory):
            self.clear()  # gone before the new one is made
            self._memory = aligned(length, self.dtype)

    def clear(self) -> None:
        """Let go of the memory, and of all that runs in it."""
        self.passes.clear()
        self._memory = np.empty(0, self.dtype)

    def see(self, seen: Seen) -> Array:
        """Give one array of a plan."""
        slot, shape = seen
        return self._memory[slot.start : slot.start + prod(shape)].reshape(shape)


def aligned(length: int, dtype: Any) -> NDArray[Any]:
    """Give uninitialised memory that begins with a cache line: matrix products may round differently at another place."""
    size = np.dtype(dtype).itemsize
    memory = np.empty(length + ALIGN // size, dtype)
    start = -memory.ctypes.data % ALIGN // size
    return memory[start : start + length]
