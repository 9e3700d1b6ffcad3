"""Windows of planes as columns of a matrix and back: by the compiled core, or by numpy.

The compiled core takes float32. Numpy does the rest: float64, and machines without a build.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np

from edge_runtime.engines.native.at import Array
from edge_runtime.kernels import library
from edge_runtime.kernels.panels import address
from wire.native.windows import Windows

BLOCK_BYTES = 1 << 16
"""Where numpy needs memory for a piece of an array, it takes pieces of this size."""

Slices = tuple[slice, slice]


def core(like: Array) -> library.Library | None:
    """Give the compiled core if it can do arrays of this type."""
    return library.open_library() if like.dtype == np.float32 else None


def window(of: Windows, channels: int, held: int) -> library.Window:
    """Describe windows to the compiled core; `channels` of the `held` ones of each sample are meant."""
    (down, along) = zip(of.kernel, of.stride, of.padding, strict=True)
    kernels, strides, paddings = zip(down, along, strict=True)
    return library.Window(channels, held, *of.sides, *of.out, *kernels, *strides, *paddings)


def start(array: Array, channel: int) -> int:
    """Give where a channel of the first sample of a contiguous array begins, as the core's functions want it."""
    return (address(array) or 0) + channel * int(array[0, 0].nbytes)


def taps(of: Windows) -> Iterator[tuple[int, Slices, Slices]]:
    """Give each tap of all windows: its number, and which of the output's places read which of the plane's there."""
    for tap in range(of.taps):
        reads, read = [], []
        for side, at in enumerate(divmod(tap, of.kernel[1])):
            stride, before = of.stride[side], of.padding[side] - at
            first = max(0, -(-before // stride))
            last = max(first, min(of.out[side], -(-(of.sides[side] + before) // stride)))
            reads.append(slice(first, last))
            start = first * stride - before
            read.append(slice(start, start + (last - first) * stride, stride))
        yield tap, (reads[0], reads[1]), (read[0], read[1])


def take(of: Windows, x: Array, first: int, channels: int, columns: Array) -> None:
    """Lay out windows as columns.

    Args:
        of: The windows.
        x: ``(n, held, *sides)``.
        first: The first of the channels that are meant.
        channels: How many.
        columns: Written: ``(channels * taps, n * places)``.
    """
    if (found := core(x)) and of.padding >= (0, 0):
        at = ctypes.byref(window(of, channels, x.shape[1]))
        library.must(found.calls.nk_window_take(at, len(x), start(x, first), address(columns)), "columns")
        return
    planes = x.reshape(len(x), x.shape[1], *of.sides)[:, first : first + channels].swapaxes(0, 1)
    into = columns.reshape(channels, of.taps, len(x), *of.out)
    for tap, reads, read in taps(of):
        if reads != (slice(0, of.out[0]), slice(0, of.out[1])):
            into[:, tap] = 0
        into[:, tap, :, *reads] = planes[:, :, *read]


def give(of: Windows, columns: Array, dx: Array, first: int, channels: int, *, adds: bool) -> None:
    """Add columns up where `take` took them from.

    Args:
        of: The windows.
        columns: As `take` writes them; spoilt.
        dx: ``(n, held, *sides)``; the channels that are meant are written.
        first: The first of these.
        channels: How many.
        adds: Whether something is there already.
    """
    if (found := core(dx)) and not adds and of.padding >= (0, 0):
        at = ctypes.byref(window(of, channels, dx.shape[1]))
        library.must(found.calls.nk_window_give(at, len(dx), address(columns), start(dx, first)), "columns")
        return
    planes = dx.reshape(len(dx), dx.shape[1], *of.sides)[:, first : first + channels].swapaxes(0, 1)
    came = columns.reshape(channels, of.taps, len(dx), *of.out)
    if not adds:
        planes[...] = 0
    for tap, reads, read in taps(of):
        planes[:, :, *read] += came[:, tap, :, *reads]
