"""Depthwise convolutions, every channel by a kernel of its own: by the compiled core, or by numpy some channels at a time."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np

from edge_runtime.engines.native.at import Array, At
from edge_runtime.engines.native.columns import BLOCK_BYTES, core, taps, window
from edge_runtime.kernels import library
from edge_runtime.kernels.panels import address
from wire.native.windows import Windows


def forward(at: At, of: Windows) -> None:
    """Write the output of a depthwise convolution with these windows."""
    (x,), weight, bias = at.x, at.params["weight"], at.params["bias"]
    if found := core(x):
        plane, places = at.scratch["plane"], [address(each) for each in (x, weight, bias, at.y)]
        call, shape = found.calls.nk_depth_forward, ctypes.byref(window(of, x.shape[1], x.shape[1]))
        library.must(call(shape, len(x), *places, address(plane), plane.size), "a depthwise convolution")
        return
    for read, gone, some, part in _blocks(of, x, at.y):
        gone[...] = bias[some, None, None]
        for tap, goes, comes in taps(of):
            product = _piece(part, gone[:, *goes])
            np.multiply(read[:, *comes], _kernels(weight)[some, tap, None, None], out=product)
            gone[:, *goes] += product


def backward(at: At, of: Windows) -> None:
    """Write its input's gradient, if that is wanted, and those of its weights into scratch."""
    (x,), (dx,), weight, dy = at.x, at.dx, at.params["weight"], at.dy
    moved, bias = at.scratch["weight"], at.scratch["bias"]
    if found := core(x):
        plane, places = at.scratch["plane"], [address(each) for each in (x, weight, dy, dx, moved, bias)]
        call, shape = found.calls.nk_depth_backward, ctypes.byref(window(of, x.shape[1], x.shape[1]))
        library.must(call(shape, len(x), *places, address(plane), plane.size), "a depthwise convolution")
        return
    np.sum(dy.reshape(*dy.shape[:2], -1), axis=(0, 2), out=bias)
    moved[...] = 0
    for read, came, some, part in _blocks(of, x, dy):
        for tap, goes, comes in taps(of):
            product = _piece(part, came[:, *goes])
            np.multiply(read[:, *comes], came[:, *goes], out=product)
            _kernels(moved)[some, tap] += product.sum(axis=(1, 2))
    if dx is None:
        return
    dx[...] = 0
    for into, came, some, part in _blocks(of, dx, dy):
        for tap, goes, comes in taps(of):
            product = _piece(part, came[:, *goes])
            np.multiply(came[:, *goes], _kernels(weight)[some, tap, None, None], out=product)
            into[:, *comes] += product


def _blocks(of: Windows, x: Array, y: Array) -> Iterator[tuple[Array, Array, slice, Array]]:
    """Give some channels of one sample after another: of x, of y, which, and room for a product."""
    size = max(1, min(x.shape[1], BLOCK_BYTES // (of.places * x.itemsize)))
    part = np.empty(size * of.places, x.dtype)
    planes, places = x.reshape(*x.shape[:2], *of.sides), y.reshape(*y.shape[:2], *of.out)
    for sample in range(len(x)):
        for first in range(0, x.shape[1], size):
            some = slice(first, min(x.shape[1], first + size))
            yield planes[sample, some], places[sample, some], some, part


def _kernels(weight: Array) -> Array:
    return weight.reshape(len(weight), -1)


def _piece(part: Array, like: Array) -> Array:
    return part[: like.size].reshape(like.shape)
