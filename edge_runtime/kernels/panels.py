"""The layout in which the compiled core holds activations: see the beginning of `native/kernels.h`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines.arrays import Floats
from edge_runtime.kernels.library import Image

_LINE = 64
"""Bytes of a cache line: where every buffer begins."""


def image(shape: tuple[int, ...], halo: int = 0) -> Image:
    """Describe activations of shape ``(channels, height, width)`` or ``(features,)``, batch left out."""
    channels, height, width = shape if len(shape) == 3 else (shape[0], 1, 1)
    return Image(channels, height, width, halo)


def samples(batch: int) -> int:
    """Give how many samples the panels of a batch hold."""
    return -(-batch // 4) * 4


def floats(of: Image, batch: int) -> int:
    """Give the length of a panelled buffer."""
    rows: int = of.channels * (of.height + 2 * of.halo) * (of.width + 2 * of.halo)
    return rows * samples(batch)


def buffer(length: int) -> Floats:
    """Give uninitialised memory that begins with a cache line."""
    memory = np.empty(length + _LINE // 4, np.float32)
    start = -memory.ctypes.data % _LINE // 4
    return memory[start : start + length]


def address(array: NDArray[Any] | None) -> int | None:
    """Give where a contiguous array begins, as the core's functions want it."""
    if array is None:
        return None
    if not array.flags.c_contiguous:
        raise ValueError("the compiled core takes contiguous arrays only")
    return array.ctypes.data
