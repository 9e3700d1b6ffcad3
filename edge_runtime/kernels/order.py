"""Values of a layer in blocks, between C order of its mask and the order in which the compiled core holds them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines.arrays import Floats
from edge_runtime.kernels.library import Library, must
from edge_runtime.kernels.panels import address
from wire.errors import SpecError


def reordered(library: Library, starts: NDArray[np.int32], values: Floats, *, back: bool) -> Floats:
    """Bring values from C order into a layer's order, or back. Cost: one pass; nothing is made but the result.

    Args:
        library: The core.
        starts: ``(blocks, rows + 1)`` of the layer: its order is by block, then by row; C order is by row, then by block.
        values: ``(kept,)``.
        back: Into C order.

    Raises:
        SpecError: There are not as many.
    """
    kept, (blocks, rows) = int(starts[-1, -1]), (len(starts), starts.shape[1] - 1)
    if values.shape != (kept,):
        raise SpecError(f"values of shape {values.shape} for a layer of {kept}")
    values = np.ascontiguousarray(values, np.float32)
    found = np.empty(kept, np.float32)
    code = library.calls.nk_reorder(address(starts), blocks, rows, kept, address(values), address(found), int(back))
    must(code, f"the order of {kept} values in {blocks} blocks")
    return found
