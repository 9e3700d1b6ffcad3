"""The builds of the compiled core that this machine runs, for tests of its functions."""

from __future__ import annotations

import shutil

import numpy as np

from edge_runtime.kernels.compile import COMPILERS, NATIVE, ORDER
from edge_runtime.kernels.library import AGAIN, look

LIBRARIES = [library for library in (look(NATIVE, isa)[0] for isa in ORDER) if library]
# Without a build there is nothing to test, but where there is a compiler that is a failure of every test here.
CORES = LIBRARIES or ([None] if any(map(shutil.which, COMPILERS)) else [])


def name(library):
    """Name a build for a test's name."""
    return library.isa if library else "missing"


def ready(library):
    """Give a build with one thread."""
    assert library is not None, f"{look(NATIVE)[1]}: run {AGAIN}"
    library.threads(1)
    return library


def order_of(layout, mask):
    """Give the position in C order of each value of a layout, ``(kept,)``."""
    assert mask.size < 1 << 24, "floats count no further"
    return layout.from_c_order(np.flatnonzero(mask).astype(np.float32)).astype(np.int64)
