"""The ops of the native engine that join values or put them in another order. Flatten and reshape are views: nothing runs."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from edge_runtime.engines.native.at import At, Op


def _add_forward(at: At) -> None:
    np.add(at.x[0], at.x[1], out=at.y)
    for other in at.x[2:]:
        at.y += other


def _add_backward(at: At) -> None:
    for dx in reversed(at.dx):
        if dx is not None:
            np.copyto(dx, at.dy)


def _mul_forward(at: At) -> None:
    np.multiply(at.x[0], at.x[1], out=at.y)


def _mul_backward(at: At) -> None:
    # The factor's gradient first: the other one's may lie over what it reads.
    (whole, factor), (first, second) = at.x, at.dx
    if second is not None and factor.shape == whole.shape:
        np.multiply(at.dy, whole, out=second)
    elif second is not None:
        block, each = at.scratch["block"], prod(whole.shape[2:])
        values, dy, sums = whole.reshape(-1, each), at.dy.reshape(-1, each), second.reshape(-1)
        for start in range(0, len(values), len(block)):
            part, products = slice(start, start + len(block)), block[: len(values) - start]
            np.multiply(dy[part], values[part], out=products)
            np.add.reduce(products, 1, out=sums[part])
    if first is not None:
        np.multiply(at.dy, factor, out=first)


def _concat_forward(at: At) -> None:
    np.concatenate(at.x, 1, out=at.y)


def _concat_backward(at: At) -> None:
    start = 0
    for shape, dx in zip(at.shapes, at.dx, strict=True):
        stop = start + shape[1]
        if dx is not None:
            np.copyto(dx, at.dy[:, start:stop])
        start = stop


def _axes(at: At) -> tuple[int, int]:
    return 1 + at.node.attrs["first"], 1 + at.node.attrs["second"]


def _transpose_forward(at: At) -> None:
    np.copyto(at.y, at.x[0].swapaxes(*_axes(at)))


def _transpose_backward(at: At) -> None:
    if at.dx[0] is not None:
        np.copyto(at.dx[0], at.dy.swapaxes(*_axes(at)))


def _last_forward(at: At) -> None:
    np.copyto(at.y, at.x[0][:, -1])


def _last_backward(at: At) -> None:
    if at.dx[0] is not None:
        at.dx[0][:, :-1] = 0
        np.copyto(at.dx[0][:, -1], at.dy)


OPS: Mapping[str, Op] = {
    "add": Op(_add_forward, _add_backward),
    "mul": Op(_mul_forward, _mul_backward),
    "concat": Op(_concat_forward, _concat_backward),
    "transpose": Op(_transpose_forward, _transpose_backward),
    "last": Op(_last_forward, _last_backward),
}
"""By op."""
