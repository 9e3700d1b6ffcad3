"""Pools: the maximum with its place, and means. By the compiled core, or plane by plane in numpy (see `columns`)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from math import prod

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines.native.at import Array, At, Op
from edge_runtime.engines.native.columns import BLOCK_BYTES, core, taps, window
from edge_runtime.kernels import library
from edge_runtime.kernels.panels import address
from wire.native.windows import Windows, windows


def _windows(at: At, x: Array, y: Array) -> Windows:
    return windows(at.node.attrs, x.shape[1:], y.shape[1:])


def _planes(array: Array) -> int:
    return int(array.shape[0] * array.shape[1])


def _blocks(of: Windows, x: Array, *y: Array) -> Iterator[list[Array]]:
    """Give a few planes of each array at a time."""
    size = max(1, BLOCK_BYTES // (8 * of.places))
    flat = [x.reshape(-1, *of.sides), *(each.reshape(-1, *of.out) for each in y)]
    for start in range(0, len(flat[0]), size):
        yield [each[start : start + size] for each in flat]


def _corners(of: Windows) -> NDArray[np.intp]:
    """Give where in its plane each window begins."""
    down, along = (np.arange(out) * stride for out, stride in zip(of.out, of.stride, strict=True))
    return down[:, None] * of.sides[1] + along


def _most_forward(at: At) -> None:
    (x,), of = at.x, _windows(at, at.x[0], at.y)
    place = at.saved["place"].view(f"i{x.itemsize}") if at.saved else None
    if found := core(x):
        call, shape = found.calls.nk_most_forward, ctypes.byref(window(of, 1, 1))
        library.must(call(shape, _planes(x), address(x), address(at.y), address(place)), "a pool")
        return
    corners = _corners(of)
    for read, most, *rest in _blocks(of, x, at.y, *(() if place is None else (place,))):
        for tap, _, comes in taps(of):
            value, here = read[:, *comes], corners + tap // of.kernel[1] * of.sides[1] + tap % of.kernel[1]
            if tap == 0:
                most[...] = value
                for kept in rest:
                    kept[...] = here
                continue
            wins = value > most
            wins |= value != value  # noqa: PLR0124 - no number
            np.copyto(most, value, where=wins)
            for kept in rest:
                np.copyto(kept, here, where=wins, casting="same_kind")


def _most_backward(at: At) -> None:
    (dx,) = at.dx
    if dx is None:
        return
    of = _windows(at, dx, at.dy)
    place = at.saved["place"].view(f"i{dx.itemsize}")
    if found := core(dx):
        call, shape = found.calls.nk_most_backward, ctypes.byref(window(of, 1, 1))
        library.must(call(shape, _planes(dx), address(at.dy), address(place), address(dx)), "a pool")
        return
    corners = _corners(of)
    for into, came, kept in _blocks(of, dx, at.dy, place):
        into[...] = 0
        for tap, _, comes in taps(of):
            wins = kept == corners + tap // of.kernel[1] * of.sides[1] + tap % of.kernel[1]
            np.add(into[:, *comes], came, out=into[:, *comes], where=wins)


def _spans(at: At, of: Windows) -> Iterator[tuple[int, int, slice, slice, float]]:
    """Give each window of a mean: where its mean goes, which values it has, and one over how many of them there are."""
    sides = []
    for side, (length, out) in enumerate(zip(of.sides, of.out, strict=True)):
        if "size" in at.node.attrs:
            sides.append([slice(i * length // out, -(-(i + 1) * length // out)) for i in range(out)])
        else:
            starts = range(0, out * of.stride[side], of.stride[side])
            sides.append([slice(start, start + of.kernel[side]) for start in starts])
    for (i, down), (j, along) in ((a, b) for a in enumerate(sides[0]) for b in enumerate(sides[1])):
        yield i, j, down, along, 1 / prod(each.stop - each.start for each in (down, along))


def _mean_forward(at: At) -> None:
    (x,), of = at.x, _windows(at, at.x[0], at.y)
    if found := core(x):
        call, shape, even = found.calls.nk_mean_forward, ctypes.byref(window(of, 1, 1)), "size" in at.node.attrs
        library.must(call(shape, _planes(x), even, address(x), address(at.y)), "a pool")
        return
    read, means = x.reshape(-1, *of.sides), at.y.reshape(-1, *of.out)
    for i, j, down, along, share in _spans(at, of):
        np.sum(read[:, down, along], axis=(1, 2), out=means[:, i, j])
        means[:, i, j] *= share


def _mean_backward(at: At) -> None:
    (dx,) = at.dx
    if dx is None:
        return
    of = _windows(at, dx, at.dy)
    if found := core(dx):
        call, shape, even = found.calls.nk_mean_backward, ctypes.byref(window(of, 1, 1)), "size" in at.node.attrs
        library.must(call(shape, _planes(dx), even, address(at.dy), address(dx)), "a pool")
        return
    size = BLOCK_BYTES // dx.itemsize
    part, dx[...] = np.empty(min(size, _planes(dx)), dx.dtype), 0
    into, came = dx.reshape(-1, *of.sides), at.dy.reshape(-1, *of.out)
    for start in range(0, len(into), size):
        for i, j, down, along, share in _spans(at, of):
            some = came[start : start + size, i, j]
            np.multiply(some, share, out=part[: len(some)])
            into[start : start + size, down, along] += part[: len(some), None, None]


_MOST, _MEAN = Op(_most_forward, _most_backward), Op(_mean_forward, _mean_backward)

POOLS = {
    "max_pool2d": _MOST,
    "max_pool1d": _MOST,
    "avg_pool2d": _MEAN,
    "avg_pool1d": _MEAN,
    "adaptive_avg_pool2d": _MEAN,
    "adaptive_avg_pool1d": _MEAN,
}
"""By the name of the op."""
